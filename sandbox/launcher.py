"""From jobs to processes: which program of the spawner's a job is a run of, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from bulkhead.sandbox.compiled import CompiledModule
from bulkhead.sandbox.errors import Overloaded, SandboxError
from bulkhead.sandbox.isolation import NO_LAYERS, Layer, names_of
from bulkhead.sandbox.launch import Exit, Job, Run
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.memfile import create_memfile, write_memfile
from bulkhead.sandbox.probe import RUN_ENVIRONMENT
from bulkhead.sandbox.spawner import SHORTAGES, Spawner, SpawnerKeeper
from bulkhead.sandbox.spawner_protocol import (
    KEY_BYTES,
    MOST_INLINE_STDIN_BYTES,
    NO_FLAGS,
    Bounds,
    ProcessEnd,
    Program,
    ProgramFlags,
    Stage,
    StartFailed,
    ZygoteReport,
    ZygoteState,
)
from bulkhead.sandbox.wasmtime import Runtime

_ARTIFACT_FD = 3
# The runtime's own data: heap, thread stacks, tables, the instance. Measured: 11 MiB with wasmtime-min.
_RUNTIME_DATA_BYTES = 64 << 20
_TABLE_ELEMENT_BYTES = 16
# Address space is only reserved, not used: 4 GiB and guard pages for one linear memory.
_RUNTIME_ADDRESS_BYTES = 64 << 30
# What nobody configured: the least recently run goes first.
_MOST_CASUAL = 256
# Run so often within their time here, and they get a zygote; at most so many do.
_CASUAL_RUNS_TO_ZYGOTE = 3
_MOST_CASUAL_ZYGOTES = 32
_CASUAL_IDLE_SECONDS = 60.0
_KEPT_IDLE_SECONDS = 900.0
# To a zygote's first word. Runs do not wait for it: they execute wasmtime until then.
_READY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Kind:
    """What jobs have in common that one zygote can serve."""

    module: CompiledModule
    entry_point: str
    arguments: tuple[str, ...]
    limits: Limits


@dataclass(slots=True)
class _Known:
    """A kind of job that the spawner knows as a program."""

    program: Program
    runs: int = 0


@dataclass(frozen=True, slots=True)
class ZygoteNews:
    """What became of the zygote of an entry point."""

    digest: str
    entry_point: str
    state: ZygoteState
    layers: Layer
    reason: str


@dataclass(slots=True)
class Launcher:
    """Starts jobs. Owned by one event loop; never blocks it."""

    runtime: Runtime
    spawners: SpawnerKeeper
    most_stdin_bytes: int
    zygotes: bool = True
    """False: every run executes wasmtime."""
    required: Layer = NO_LAYERS
    """A run that lacks one of these has failed, whatever it says."""
    on_news: Callable[[ZygoteNews], None] = field(default=lambda news: None)
    _spawner: Spawner | None = None
    _known: OrderedDict[_Kind, _Known] = field(default_factory=OrderedDict)
    _kept: set[_Kind] = field(default_factory=set)
    """Configured; all others are casual, and may be forgotten."""
    _names: dict[bytes, _Kind] = field(default_factory=dict)
    _casual_zygotes: int = 0
    _ready: dict[bytes, asyncio.Event] = field(default_factory=dict)

    async def keep(self, module: CompiledModule, entry_point: str, limits: Limits) -> None:
        """Gets ready to run a kind of job often. Returns when its zygote is there, or will not be.

        Raises SandboxError.
        """
        kind = _Kind(module, entry_point, (), limits)
        spawner = await self._living()
        if kind in self._kept:
            return
        if kind in self._known:
            self._drop(kind)
        self._kept.add(kind)
        known = self._add(spawner, kind)
        if self.zygotes:
            ready = self._ready.setdefault(known.program.key, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ready.wait(), _READY_SECONDS)

    def forget(self, module: CompiledModule) -> None:
        """No more runs of a module; those that there are go on."""
        for kind in [kind for kind in self._known if kind.module is module]:
            self._drop(kind)
        self._kept = {kind for kind in self._kept if kind.module is not module}

    def close(self) -> None:
        """Lets go of all modules."""
        self._known.clear()
        self._kept.clear()
        self._names.clear()

    async def start(self, job: Job) -> Run:
        """Raises SandboxError when no process can be started at all, Overloaded when just not now."""
        spawner = await self._living()
        known = self._program_of(spawner, job)
        limits = job.limits
        bounds = Bounds(
            wall_seconds=job.wall_seconds,
            cpu_seconds=limits.cpu_seconds,
            data_bytes=limits.memory_bytes
            + limits.table_elements * _TABLE_ELEMENT_BYTES
            + _RUNTIME_DATA_BYTES,
            address_bytes=limits.memory_bytes + _RUNTIME_ADDRESS_BYTES,
            # One more than allowed, so that too much can be told from just enough.
            file_bytes=limits.stdout_bytes + 1,
            stderr_bytes=limits.stderr_bytes,
        )
        stdin_fd = _stdin_file(job.stdin) if len(job.stdin) > MOST_INLINE_STDIN_BYTES else None
        try:
            ended, kill = spawner.run(known.program.key, bounds, stdin=job.stdin, stdin_fd=stdin_fd)
        except BaseException:
            if stdin_fd is not None:
                os.close(stdin_fd)
            raise
        result: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        ended.add_done_callback(lambda end: self._finish(end, result, job, stdin_fd))
        return Run(result, kill)

    def _finish(
        self,
        ended: asyncio.Future[ProcessEnd],
        result: asyncio.Future[Exit],
        job: Job,
        stdin_fd: int | None,
    ) -> None:
        if stdin_fd is not None:
            os.close(stdin_fd)
        error = ended.exception()
        if isinstance(error, StartFailed) and error.stage is Stage.REQUEST:
            self._lose(job)
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        elif missing := self.required & ~ended.result().layers:
            result.set_exception(SandboxError(f"a run was not isolated by {', '.join(names_of(missing))}"))
        else:
            result.set_result(self._exit(ended.result(), job))

    def _exit(self, end: ProcessEnd, job: Job) -> Exit:
        most = job.limits.stdout_bytes
        return Exit(
            wait_status=end.wait_status,
            reason=end.reason,
            stdout=end.stdout[:most],
            stdout_exceeded=len(end.stdout) > most,
            stderr=end.stderr,
            stderr_truncated=end.stderr_truncated,
            usage=end.usage,
            # The artifact is mapped and read as far as the guest needs its code: no more than all of it.
            overhead_bytes=self.runtime.resident_bytes + job.module.size_bytes,
        )

    # Programs

    async def _living(self) -> Spawner:
        spawner = self._spawner
        if spawner is not None and spawner.alive:
            return spawner
        spawner = await self.spawners.living()
        if spawner is not self._spawner:
            self._adopt(spawner)
        return spawner

    def _adopt(self, spawner: Spawner) -> None:
        """Tells a new spawner what the last one knew."""
        self._spawner = spawner
        spawner.on_zygote = self._on_zygote
        self._known.clear()
        self._names.clear()
        self._casual_zygotes = 0
        for kind in self._kept:
            self._add(spawner, kind)

    def _program_of(self, spawner: Spawner, job: Job) -> _Known:
        kind = _Kind(job.module, job.entry_point, job.arguments, job.limits)
        known = self._known.get(kind)
        if known is None:
            known = self._add(spawner, kind)
            self._forget_casual()
        if kind in self._kept:
            return known
        known.runs += 1
        self._known.move_to_end(kind)
        if (
            known.runs == _CASUAL_RUNS_TO_ZYGOTE
            and self.zygotes
            and self._casual_zygotes < _MOST_CASUAL_ZYGOTES
        ):
            self._drop(kind)
            known = self._add(spawner, kind, zygote=True)
            known.runs = _CASUAL_RUNS_TO_ZYGOTE
            self._casual_zygotes += 1
        return known

    def _add(self, spawner: Spawner, kind: _Kind, *, zygote: bool = False) -> _Known:
        kept = kind in self._kept
        argv = _command(self.runtime, kind, self.most_stdin_bytes)
        flags = ProgramFlags.IS_WASMTIME if self.runtime.preloads else NO_FLAGS
        if self.zygotes and (kept or zygote):
            flags |= ProgramFlags.HAS_ZYGOTE
        marks = [self.runtime.identity, kind.module.digest, str(kind.module.metered), str(int(flags)), *argv]
        program = Program(
            key=hashlib.sha256("\0".join(marks).encode(errors="surrogatepass")).digest()[:KEY_BYTES],
            argv=argv,
            environment=RUN_ENVIRONMENT,
            flags=flags,
            layers=self.runtime.layers,
            idle_seconds=_KEPT_IDLE_SECONDS if kept else _CASUAL_IDLE_SECONDS,
        )
        spawner.register(program, (kind.module.artifact_fd,))
        known = self._known[kind] = _Known(program)
        self._names[program.key] = kind
        return known

    def _drop(self, kind: _Kind) -> None:
        known = self._known.pop(kind)
        if kind not in self._kept and known.program.flags & ProgramFlags.HAS_ZYGOTE:
            self._casual_zygotes -= 1
        if self._names.get(known.program.key) == kind:
            del self._names[known.program.key]
        if self._spawner is not None:
            self._spawner.forget(known.program.key)

    def _lose(self, job: Job) -> None:
        """The spawner does not know the program, having had no descriptor left for it: tell it again."""
        kind = _Kind(job.module, job.entry_point, job.arguments, job.limits)
        if kind in self._known:
            self._drop(kind)

    def _forget_casual(self) -> None:
        if len(self._known) <= _MOST_CASUAL:
            return
        casual = [kind for kind in self._known if kind not in self._kept]
        for kind in casual[: max(0, len(casual) - _MOST_CASUAL)]:
            self._drop(kind)

    def _on_zygote(self, report: ZygoteReport) -> None:
        if (event := self._ready.pop(report.key, None)) is not None:
            event.set()
        if (kind := self._names.get(report.key)) is not None:
            self.on_news(
                ZygoteNews(
                    kind.module.digest, kind.entry_point, report.state, Layer(report.layers), report.reason
                )
            )


def _stdin_file(stdin: bytes) -> int:
    fd = -1
    try:
        fd = create_memfile("stdin")
        write_memfile(fd, stdin)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno in SHORTAGES:
            raise Overloaded("the host is short of descriptors or memory; try again later") from error
        raise SandboxError(f"cannot make the files of a run: {error.strerror}") from error
    return fd


def _command(runtime: Runtime, kind: _Kind, most_stdin_bytes: int) -> tuple[str, ...]:
    return (
        str(runtime.runner),
        "run",
        *runtime.flags,
        *runtime.limit_flags(kind.limits, stdin_bytes=most_stdin_bytes),
        "--allow-precompiled",
        "--argv0",
        "module.wasm",
        # One word: a name that begins with a hyphen stays a name. Also for _start: without it, an
        # export with an empty name would run instead.
        f"--invoke={kind.entry_point}",
        f"/proc/self/fd/{_ARTIFACT_FD}",
        *kind.arguments,
    )
