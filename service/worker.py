"""A worker: one front end with a sandbox of its own, in a process of its own.

The supervisor starts it, and is told through a pipe when it is ready or why it is not. It ends
gracefully on SIGTERM, and at once when the supervisor is gone: it holds one end of a pipe of which
the supervisor holds the other (the lifeline), and asks the kernel for SIGKILL as well. Ctrl-C at a
terminal reaches it, too, and is left to the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import structlog
import uvloop

from bulkhead.sandbox import Sandbox, SandboxError
from bulkhead.service.config import Config, ConfigError, load_config
from bulkhead.service.configured import sandbox_options
from bulkhead.service.log import Format, configure_logging
from bulkhead.service.names import ModuleNames
from bulkhead.service.review import Reviewer

Role = Literal["https", "grpc"]

_PR_SET_PDEATHSIG = 1
# After the grace time: for answers on their way, and to reap what was killed.
_CLOSE_SECONDS = 0.5

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the supervisor tells a worker, as JSON in its one argument. No secrets: anyone can read it."""

    role: Role
    config: str
    state_dir: str
    wasmtime: str | None
    log_level: str
    log_format: Format
    supervisor_pid: int
    lifeline_fd: int
    ready_fd: int
    host: str
    port: int
    listener_fd: int = -1
    """The HTTPS worker's; the gRPC worker listens by itself."""
    certificate: str = ""
    key: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    _die_with(settings.supervisor_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(settings.log_level, settings.log_format)
    structlog.contextvars.bind_contextvars(worker=settings.role)
    with os.fdopen(settings.ready_fd, "w") as ready:
        try:
            uvloop.run(_serve(settings, lambda port: _tell(ready, {"port": port})))
        except (SandboxError, ConfigError, OSError) as error:
            if ready.closed:
                _log.error("worker_failed", error=str(error))
            else:
                _tell(ready, {"error": str(error)})  # the supervisor says it, once
            sys.exit(1)


def _tell(ready: object, message: dict[str, int | str]) -> None:
    ready.write(json.dumps(message))  # type: ignore[attr-defined]
    ready.close()  # type: ignore[attr-defined]


def _die_with(supervisor_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        os._exit(1)


async def _serve(settings: WorkerSettings, ready: Callable[[int], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(settings.lifeline_fd, os._exit, 1)  # nothing is ever written: readable is closed
    config = load_config(Path(settings.config))
    wasmtime = Path(settings.wasmtime) if settings.wasmtime else None
    sandbox = await Sandbox.open(sandbox_options(config, Path(settings.state_dir), wasmtime))
    try:
        reviewer = await Reviewer.open(config, sandbox)
        start = _start_https if settings.role == "https" else _start_grpc
        port, stop_front_end = await start(settings, config, reviewer, sandbox)
        ready(port)
        await stop.wait()
        _log.info("worker_stopping", runs=sandbox.active_runs)
        await _stop(config, sandbox, stop_front_end)
    finally:
        await sandbox.close()


async def _stop(config: Config, sandbox: Sandbox, stop_front_end: Callable[[float], Awaitable[None]]) -> None:
    """Lets reviews in flight finish, then kills their runs so that they are answered as failed."""
    grace_seconds = config.server.grace_seconds
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(_quietly(stop_front_end(grace_seconds + _CLOSE_SECONDS)))
        done, _ = await asyncio.wait({stopping}, timeout=grace_seconds)
        if not done:
            await sandbox.close()


async def _quietly(stopping: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError):
        await stopping


async def _start_https(
    settings: WorkerSettings, config: Config, reviewer: Reviewer, sandbox: Sandbox
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    from bulkhead.service.https import HttpsServer
    from bulkhead.service.tls import TlsFiles, server_context

    files = TlsFiles(Path(), Path(settings.certificate), Path(settings.key))
    server = HttpsServer(
        reviewer, max_body_bytes=config.server.max_body_bytes, max_in_flight=_max_in_flight(sandbox)
    )
    listener = socket.socket(fileno=settings.listener_fd)
    server.start(listener, server_context(files))
    return settings.port, server.stop


async def _start_grpc(
    settings: WorkerSettings, config: Config, reviewer: Reviewer, sandbox: Sandbox
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    from bulkhead.service.grpc_server import GrpcServer

    server = GrpcServer(
        reviewer,
        sandbox,
        ModuleNames(reviewer.modules),
        max_body_bytes=config.server.max_body_bytes,
        max_in_flight=_max_in_flight(sandbox),
    )
    return await server.start(settings.host, settings.port), server.stop


def _max_in_flight(sandbox: Sandbox) -> int:
    """Room for a full queue of runs; a review is at least one run, most are exactly one."""
    return sandbox.options.max_concurrent_runs + sandbox.options.max_queued_runs


if __name__ == "__main__":
    main()
