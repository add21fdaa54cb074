"""A worker: one front end with a sandbox of its own, in a process of its own.

The supervisor starts it, and tells it over a socket what to serve and when to change that. It ends
gracefully on SIGTERM, and at once when the supervisor is gone: the socket ends with it, and the
kernel is asked for SIGKILL as well. What a terminal sends to all its processes (Ctrl-C, a hang-up) is left to
the supervisor.
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
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import structlog
import uvloop

from bulkhead.sandbox import (
    Sandbox,
    SandboxError,
    SandboxOptions,
    UnknownModule,
    ZygoteNews,
    ZygoteState,
    names_of,
)
from bulkhead.service.balance import Balance, Share, part
from bulkhead.service.chains import Chains, open_chains
from bulkhead.service.configured import sandbox_options
from bulkhead.service.control import Channel, Commit, Done, Failed, Message, Prepare, Ready
from bulkhead.service.generation import Generation
from bulkhead.service.log import Format, configure_logging
from bulkhead.service.names import ModuleNames
from bulkhead.service.review import Reviewer
from bulkhead.service.tls import TlsMaterial

Role = Literal["https", "grpc"]

_PR_SET_PDEATHSIG = 1
# After the grace time: for answers on their way, and to reap what was killed.
_CLOSE_SECONDS = 0.5

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What the supervisor tells a worker, as JSON in its one argument. No secrets: anyone can read it."""

    role: Role
    name: str
    """The role, and a number where there are several of it."""
    share: int
    """How many workers of the role share its runs, its queue and its connections."""
    state_dir: str
    wasmtime: str | None
    log_level: str
    log_format: Format
    supervisor_pid: int
    control_fd: int
    host: str
    port: int
    spawner_fd: int = -1
    """To get connections to the spawner that all workers share."""
    index: int = 0
    """Which of those it is."""
    listener_fd: int = -1
    """What all HTTPS workers accept from; the gRPC worker listens by itself."""
    balance_fd: int = -1
    """The HTTPS workers': how many connections each of them holds."""

    @property
    def fds(self) -> list[int]:
        """The descriptors that it inherits."""
        fds = (self.control_fd, self.spawner_fd, self.listener_fd, self.balance_fd)
        return [fd for fd in fds if fd >= 0]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class _FrontEnd:
    """What a worker serves with."""

    port: int
    set_tls: Callable[[TlsMaterial | None], Awaitable[None]]
    stop: Callable[[float], Awaitable[None]]


def main() -> None:
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    _die_with(settings.supervisor_pid)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    configure_logging(settings.log_level, settings.log_format)
    structlog.contextvars.bind_contextvars(worker=settings.name)
    sys.exit(uvloop.run(_run(settings)))


def _die_with(supervisor_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor_pid:
        os._exit(1)


async def _run(settings: WorkerSettings) -> int:
    """Serves until SIGTERM; returns the exit code."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    channel = await Channel.open(socket.socket(fileno=settings.control_fd))
    generation = await channel.receive()
    assert isinstance(generation, Generation)
    try:
        sandbox = await Sandbox.open(_sandbox_options(settings, generation))
        sandbox.on_zygote = _log_zygote
    except (SandboxError, OSError) as error:
        await channel.send(Failed(str(error)))  # the supervisor says it, once
        return 1
    try:
        worker = await _Worker.start(settings, generation, sandbox)
    except (SandboxError, UnknownModule, OSError) as error:
        await channel.send(Failed(str(error)))
        await sandbox.close()
        return 1
    await channel.send(Ready(worker.port))
    obeying = asyncio.create_task(worker.obey(channel))
    await stop.wait()
    _log.info("worker_stopping", runs=sandbox.active_runs)
    await worker.stop()
    obeying.cancel()
    return 0


def _sandbox_options(settings: WorkerSettings, generation: Generation) -> SandboxOptions:
    wasmtime = Path(settings.wasmtime) if settings.wasmtime else None
    options = sandbox_options(generation.config, Path(settings.state_dir), wasmtime)
    return replace(
        options,
        max_concurrent_runs=max(1, part(options.max_concurrent_runs, settings.index, settings.share)),
        max_queued_runs=part(options.max_queued_runs, settings.index, settings.share),
        spawner_host=socket.socket(fileno=settings.spawner_fd),
    )


def _log_zygote(news: ZygoteNews) -> None:
    """Says when runs are not forked as they should be, and when they are again."""
    facts = {"digest": news.digest, "entry_point": news.entry_point}
    match news.state:
        case ZygoteState.READY:
            _log.debug("zygote_ready", **facts, isolation=names_of(news.layers))
        case ZygoteState.DIED:
            _log.warning("zygote_died", **facts, reason=news.reason, then="another one is started")
        case ZygoteState.SHUNNED:
            _log.error(
                "zygote_shunned", **facts, reason=news.reason, then="runs start wasmtime anew, for a while"
            )
        case ZygoteState.UNFIT:
            _log.error("zygote_unfit", **facts, reason=news.reason, then="runs start wasmtime anew")


class _Worker:
    """The front end, and what it serves now."""

    def __init__(
        self, role: Role, generation: Generation, reviewer: Reviewer, names: ModuleNames, front_end: _FrontEnd
    ) -> None:
        self._role = role
        self._generation = generation
        self._reviewer = reviewer
        self._names = names
        self._front_end = front_end
        self._prepared: tuple[Generation, Chains] | None = None

    @property
    def port(self) -> int:
        return self._front_end.port

    @classmethod
    async def start(cls, settings: WorkerSettings, generation: Generation, sandbox: Sandbox) -> _Worker:
        """Loads the modules and begins to accept. Raises SandboxError, UnknownModule."""
        reviewer = Reviewer(sandbox, await open_chains(generation.config, sandbox, generation.pins))
        names = ModuleNames(reviewer.modules)
        start = _start_https if settings.role == "https" else _start_grpc
        front_end = await start(settings, generation, reviewer, names)
        return cls(settings.role, generation, reviewer, names, front_end)

    async def obey(self, channel: Channel) -> None:
        """Does what the supervisor says, and dies with it."""
        try:
            while True:
                await channel.send(await self._answer(await channel.receive()))
        except (EOFError, ConnectionError):
            os._exit(1)

    async def _answer(self, message: Message) -> Message:
        match message:
            case Prepare(generation):
                done = self._prepare(generation)
            case Commit():
                done = self._commit()
            case _:
                raise AssertionError(f"unexpected: {type(message).__name__}")
        try:
            await done
        except (SandboxError, UnknownModule) as error:
            return Failed(str(error))
        return Done()

    async def _prepare(self, generation: Generation) -> None:
        """Loads what the generation names, beside what is there. Raises SandboxError, UnknownModule."""
        self._drop_prepared()
        sandbox = self._reviewer.sandbox
        options = generation.config.sandbox_options(sandbox.options.state_dir)
        sandbox.allow(options.limits, options.maximum_limits)
        try:
            self._prepared = generation, await open_chains(generation.config, sandbox, generation.pins)
        except BaseException:
            self._release(pin.digest for pin in generation.pins.values())
            raise

    def _drop_prepared(self) -> None:
        """Forgets what was prepared and never served, because another worker could not follow."""
        if self._prepared is not None:
            _, chains = self._prepared
            self._prepared = None
            self._release(module.digest for module in chains.modules)

    async def _commit(self) -> None:
        """From now on serves what was prepared. Reviews that have begun end as they would have."""
        assert self._prepared is not None
        self._generation, chains = self._prepared
        self._prepared = None
        before, self._reviewer.chains = self._reviewer.chains, chains
        self._names.replace(chains.modules)
        self._release(module.digest for module in before.modules)
        generation = self._generation
        await self._front_end.set_tls(generation.https_tls if self._role == "https" else generation.grpc_tls)

    def _release(self, digests: Iterable[str]) -> None:
        """Unloads modules that are not served."""
        served = {module.digest for module in self._reviewer.modules}
        self._reviewer.sandbox.release(set(digests) - served)

    async def stop(self) -> None:
        """Lets reviews in flight finish, then kills their runs so that they are answered as failed."""
        grace_seconds = self._generation.config.server.grace_seconds
        sandbox = self._reviewer.sandbox
        stopping = asyncio.create_task(_quietly(self._front_end.stop(grace_seconds + _CLOSE_SECONDS)))
        done, _ = await asyncio.wait({stopping}, timeout=grace_seconds)
        if not done:
            await sandbox.close()
        await stopping
        await sandbox.close()


async def _quietly(stopping: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError):
        await stopping


async def _start_https(
    settings: WorkerSettings, generation: Generation, reviewer: Reviewer, names: ModuleNames
) -> _FrontEnd:
    from bulkhead.service.https import HttpsServer

    server = HttpsServer(
        reviewer,
        max_body_bytes=generation.config.server.max_body_bytes,
        max_in_flight=_max_in_flight(reviewer.sandbox),
        workers=settings.share,
        share=Share(Balance(settings.balance_fd), settings.index),
    )
    server.start(socket.socket(fileno=settings.listener_fd), generation.https_tls)
    return _FrontEnd(settings.port, server.set_tls, server.stop)


async def _start_grpc(
    settings: WorkerSettings, generation: Generation, reviewer: Reviewer, names: ModuleNames
) -> _FrontEnd:
    from bulkhead.service.grpc_server import GrpcServer

    server = GrpcServer(
        reviewer,
        reviewer.sandbox,
        names,
        max_body_bytes=generation.config.server.max_body_bytes,
        max_in_flight=_max_in_flight(reviewer.sandbox),
    )
    port = await server.start(settings.host, settings.port, generation.grpc_tls)
    return _FrontEnd(port, server.set_tls, server.stop)


def _max_in_flight(sandbox: Sandbox) -> int:
    """Room for a full queue of runs; a review is at least one run, most are exactly one."""
    return sandbox.options.max_concurrent_runs + sandbox.options.max_queued_runs


if __name__ == "__main__":
    main()
