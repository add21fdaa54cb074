"""A real `bulkhead serve`, started for tests and spoken to as its clients do."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from tests.support.processes import mortal
from tests.support.sandboxes import runs_of

START_SECONDS = 60.0
REVIEWS = Path(__file__).resolve().parent.parent / "data" / "reviews"


def recorded(name: str) -> dict[str, Any]:
    """A request that a real kube-apiserver sent: path, headers, body."""
    document: dict[str, Any] = json.loads((REVIEWS / f"{name}.json").read_bytes())
    return document


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]
    log_path: Path
    state_dir: Path
    _channels: list[grpc.Channel] = field(default_factory=list)

    @property
    def https_address(self) -> tuple[str, int]:
        host, _, port = self.ready["httpsAddress"].rpartition(":")
        return host, int(port)

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ready["caCertificate"])

    def connect(self, timeout_seconds: float = 30.0) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(*self.https_address, context=self.tls(), timeout=timeout_seconds)

    def request(
        self,
        path: str,
        body: bytes | None = b"",
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request on a connection of its own."""
        connection = self.connect()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def review(self, path: str, review: Any) -> Any:
        """Posts a review as JSON; returns the answer, which must be a 200."""
        reply = self.request(path, json.dumps(review).encode())
        assert reply.status == 200, reply.body
        return reply.json

    def channel(self) -> grpc.Channel:
        channel = grpc.insecure_channel(self.ready["grpcAddress"])
        self._channels.append(channel)
        return channel

    def log(self) -> str:
        return self.log_path.read_text()

    def worker(self, role: str) -> psutil.Process:
        """The worker process of a front end."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if f'"role": "{role}"' in " ".join(child.cmdline()):
                    return child
        raise AssertionError(f"no {role} worker runs")

    def tree(self) -> list[psutil.Process]:
        """The service's process and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def spawner(self) -> psutil.Process:
        """The process that starts the runs of all workers."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.name() == "bulkhead-spawner":
                    return child
        raise AssertionError("no spawner runs")

    def runs(self) -> int:
        """How many runs there are now."""
        with suppress(psutil.NoSuchProcess):  # one ended while they were counted
            return len(runs_of(self.spawner()))
        return 0

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def wait_until(condition: Any, what: str, seconds: float = 20.0) -> None:
    """Waits for a condition. Generous: only a failure takes long."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, f"gave up waiting for: {what}"
        time.sleep(0.01)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of the processes runs any more."""
    return not any(_runs(process) for process in processes)


def _runs(process: psutil.Process) -> bool:
    """It may end at any moment, in the middle of being looked at, too."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command(*arguments: str) -> list[str]:
    """The command line of `bulkhead`, as installed here."""
    return [sys.executable, "-m", "bulkhead.service.cli", *arguments]


@contextmanager
def serve(folder: Path, *arguments: str, state_dir: Path | None = None) -> Iterator[Served]:
    """Starts `bulkhead serve` on free ports, and stops it afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log_path = folder / "ready.json", folder / "log"
    state = state_dir or folder / "state"
    line = command(
        "serve", "--state-dir", str(state), "--ready-file", str(ready_file), "--log-level", "debug"
    )
    line += ["--https-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0", *arguments]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            mortal(line), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(os.environ)
        )
    served = None
    try:
        wait_until(lambda: ready_file.exists() or process.poll() is not None, "bulkhead serve", START_SECONDS)
        assert process.poll() is None, log_path.read_text()
        served = Served(process, json.loads(ready_file.read_bytes()), log_path, state)
        yield served
    finally:
        if served is not None:
            served.close()
        elif process.poll() is None:
            process.kill()
            process.wait()
