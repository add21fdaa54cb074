"""The servers that are asked: Bulkhead as `bulkhead serve`, and one that runs modules inside itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_SECONDS = 60


@dataclass(slots=True)
class Server:
    """A running server with an HTTPS endpoint that answers `/validate`."""

    name: str
    process: subprocess.Popen[str]
    address: str
    grpc_address: str = ""
    log: Path | None = None

    def words(self) -> str:
        """What it has logged, as far as it is kept; and whether it still runs."""
        status = self.process.poll()
        state = "it runs" if status is None else f"it ended with status {status}"
        return (self.log.read_text() if self.log else "") + state

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def pids(self) -> set[int]:
        return {process.pid for process in self.tree()}

    def cpu_seconds(self) -> float:
        """CPU time so far, of its processes and of those that they waited for."""
        used = 0.0
        for process in self.tree():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used += times.user + times.system + times.children_user + times.children_system
        return used

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@dataclass(frozen=True, slots=True)
class Certificate:
    """The one that Bulkhead makes for itself in its state directory, which the other servers use, too."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        return self.folder / "tls.crt"

    @property
    def key(self) -> Path:
        return self.folder / "tls.key"


def admission_module(name: str, file: Path, **settings: object) -> dict[str, object]:
    """The configuration of a module that is asked about every update of a Pod."""
    rule = {"operations": ["UPDATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}
    return {"name": name, "module": str(file), "rules": [rule], **settings}


def bulkhead(folder: Path, state: Path, configuration: dict[str, object], *options: str) -> Server:
    """Starts `bulkhead serve` on free ports; its state outlives it, and so does the certificate in it."""
    folder.mkdir()
    config, ready = folder / "bulkhead.yaml", folder / "ready.json"
    # JSON is YAML.
    config.write_text(json.dumps(configuration))
    command = [sys.executable, "-m", "bulkhead.service.cli", "serve", "--config", str(config)]
    command += ["--state-dir", str(state), "--ready-file", str(ready), "--log-level", "warning"]
    command += ["--https-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0", *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    _wait(process, ready.exists, lambda: (folder / "log").read_text())
    told = json.loads(ready.read_text())
    return Server("Bulkhead", process, told["httpsAddress"], told["grpcAddress"], folder / "log")


def wazero(program: Path, certificate: Certificate, module: Path, *options: str) -> Server:
    """Starts go/wazeroserver."""
    command = [str(program), "-module", str(module)]
    command += ["-certificate", str(certificate.certificate), "-key", str(certificate.key), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        address = out.readline().strip()
    if not address:
        raise SystemExit(f"{' '.join(command)} did not start")
    return Server("wazero", process, address)


def _wait(process: subprocess.Popen[str], ready: Callable[[], bool], log: Callable[[], str]) -> None:
    give_up_at = time.monotonic() + _START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > give_up_at:
            process.kill()
            process.wait()
            raise SystemExit(f"bulkhead serve did not start:\n{log()}")
        time.sleep(0.05)
