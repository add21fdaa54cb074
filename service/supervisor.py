"""`bulkhead serve`: prepares everything once, then keeps one worker for each front end alive.

A small process: it loads neither grpc nor an HTTP server, has no threads while workers start, and
answers nothing itself. It holds the HTTPS socket, so that connections wait, rather than fail, while a
worker is replaced. When it dies, the workers do.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from bulkhead.sandbox import Runtime, Sandbox
from bulkhead.service.config import Address, Config
from bulkhead.service.configured import sandbox_options
from bulkhead.service.listener import listen
from bulkhead.service.log import Format
from bulkhead.service.names import NamedModule
from bulkhead.service.review import Reviewer
from bulkhead.service.tls import TlsFiles, ensure_certificate
from bulkhead.service.worker import Role, WorkerSettings

_log = structlog.get_logger()

_READY_SECONDS = 60.0
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.05, 5.0
# A worker that lived so long has not died from its start: begin with the short pause again.
_STABLE_SECONDS = 30.0
# Beyond the configured grace time, for a worker to kill its runs and leave.
_STOP_SLACK_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line and the configuration say together."""

    config_path: Path
    config: Config
    state_dir: Path
    wasmtime: Path | None
    https: Address
    grpc: Address
    log_level: str
    log_format: Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is being served, for whoever wants to be told."""

    https_address: str
    grpc_address: str
    tls: TlsFiles
    state_dir: Path
    runtime: Runtime
    modules: tuple[NamedModule, ...]


class WorkerFailed(Exception):
    """A worker did not get ready. The text is its own complaint."""


@dataclass(slots=True)
class _Worker:
    """One front end's process, replaced when it dies."""

    settings: WorkerSettings
    process: subprocess.Popen[bytes] | None = None
    stopping: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> int:
        """Starts the process and waits until it is ready; returns its port. Raises WorkerFailed."""
        ready_read, ready_write = os.pipe()
        settings = replace(self.settings, ready_fd=ready_write)
        fds = [fd for fd in (settings.lifeline_fd, ready_write, settings.listener_fd) if fd >= 0]
        command = [sys.executable, "-m", "bulkhead.service.worker", settings.to_json()]
        self.ended = asyncio.Event()
        try:
            # No preexec_fn: Popen then uses vfork, and the child is never a copy of this process.
            self.process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                command, pass_fds=fds, stdin=subprocess.DEVNULL
            )
        finally:
            os.close(ready_write)
        self._watch(self.process.pid)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                message = await _read_all(ready_read)
        except TimeoutError:
            self.process.kill()  # not self.kill(): this is no stop, and another may be started
            await self.ended.wait()
            raise WorkerFailed(f"the {settings.role} worker was not ready in {_READY_SECONDS:g} s") from None
        told = json.loads(message or b"{}")
        if "port" not in told:
            await self.ended.wait()
            status = self.process.returncode
            raise WorkerFailed(
                told.get("error") or f"the {settings.role} worker died at its start (status {status})"
            )
        self.settings = replace(self.settings, port=int(told["port"]))
        return self.settings.port

    def _watch(self, pid: int) -> None:
        """Sets `ended` when the process has ended and is reaped."""
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(pid)
        ended, process = self.ended, self.process

        def on_end() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            assert process is not None
            process.wait()
            ended.set()

        loop.add_reader(pidfd, on_end)

    def terminate(self) -> None:
        self.stopping = True
        if self.process is not None and not self.ended.is_set():
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.stopping = True
        if self.process is not None and not self.ended.is_set():
            self.process.kill()

    async def keep_alive(self) -> None:
        """Replaces the process whenever it dies, until it is told to stop."""
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            started_at = time.monotonic()
            await self.ended.wait()
            if self.stopping or self.process is None:
                return
            _log.error("worker_died", worker=self.settings.role, status=self.process.returncode)
            if time.monotonic() - started_at > _STABLE_SECONDS:
                backoff = _FIRST_BACKOFF_SECONDS
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _LONGEST_BACKOFF_SECONDS)
            if self.stopping:
                return
            try:
                await self.start()
                _log.warning("worker_restarted", worker=self.settings.role)
            except WorkerFailed as error:
                _log.error("worker_not_restarted", worker=self.settings.role, error=str(error))


class Supervisor:
    """Owns the listening socket, the lifeline and the workers."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._workers: list[_Worker] = []
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._listener: socket.socket | None = None

    async def start(self) -> Serving:
        """Prepares modules and certificate, starts the workers, and waits until both answer.

        Raises SandboxError, ConfigError or WorkerFailed; each text is for people.
        """
        options, config = self._options, self._options.config
        tls = ensure_certificate(options.state_dir / "tls", options.https.host)
        self._listener = listen(options.https, "--https-address")
        async with await Sandbox.open(
            sandbox_options(config, options.state_dir, options.wasmtime)
        ) as sandbox:
            # Compiles once what both workers then take from the cache.
            modules = (await Reviewer.open(config, sandbox)).modules
            runtime = sandbox.runtime
        for warning in runtime.warnings:
            _log.warning("wasmtime", warning=warning)
        self._workers = [
            _Worker(self._settings("https", self._listener.getsockname()[1], tls)),
            _Worker(self._settings("grpc", options.grpc.port, tls)),
        ]
        https_port, grpc_port = await asyncio.gather(*(worker.start() for worker in self._workers))
        return Serving(
            https_address=str(Address(options.https.host, https_port)),
            grpc_address=str(Address(options.grpc.host, grpc_port)),
            tls=tls,
            state_dir=options.state_dir,
            runtime=runtime,
            modules=modules,
        )

    def _settings(self, role: Role, port: int, tls: TlsFiles) -> WorkerSettings:
        options = self._options
        address = options.https if role == "https" else options.grpc
        assert self._listener is not None
        return WorkerSettings(
            role=role,
            config=str(options.config_path),
            state_dir=str(options.state_dir),
            wasmtime=str(options.wasmtime) if options.wasmtime else None,
            log_level=options.log_level,
            log_format=options.log_format,
            supervisor_pid=os.getpid(),
            lifeline_fd=self._lifeline_read,
            ready_fd=-1,
            host=address.host,
            port=port,
            listener_fd=self._listener.fileno() if role == "https" else -1,
            certificate=str(tls.certificate),
            key=str(tls.key),
        )

    async def run(self, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
        """Keeps the workers alive until `stop`; then lets them finish, or not, on `stop_now`."""
        keeping = [asyncio.create_task(worker.keep_alive()) for worker in self._workers]
        await stop.wait()
        assert self._listener is not None
        self._listener.close()  # the workers close theirs: connections are refused, and do not wait in vain
        for worker in self._workers:
            worker.terminate()
        hurry = asyncio.create_task(_wait(stop_now))
        ends = asyncio.create_task(self._wait_ended())
        grace = self._options.config.server.grace_seconds + _STOP_SLACK_SECONDS
        await asyncio.wait({hurry, ends}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for worker in self._workers:
            worker.kill()
        hurry.cancel()
        await ends
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)

    async def _wait_ended(self) -> None:
        for worker in self._workers:
            await worker.ended.wait()

    async def close(self) -> None:
        """Ends whatever still runs."""
        for worker in self._workers:
            worker.kill()
            if worker.process is not None:
                await worker.ended.wait()
        if self._listener is not None:
            self._listener.close()
        os.close(self._lifeline_read)
        os.close(self._lifeline_write)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _read_all(fd: int) -> bytes:
    """Reads a pipe to its end, and closes it."""
    reader = asyncio.StreamReader()
    with os.fdopen(fd, "rb") as pipe:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            return await reader.read()
        finally:
            transport.close()
