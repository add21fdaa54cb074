"""The sandbox: modules in, runs out. The one door for the layers above."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bulkhead.sandbox.cache import CompileCache
from bulkhead.sandbox.compiled import CompiledModule
from bulkhead.sandbox.compiler import Compiler
from bulkhead.sandbox.cpus import usable_cpus
from bulkhead.sandbox.errors import (
    DeadlinePassed,
    InvalidModule,
    InvalidModuleReason,
    InvalidRequest,
    Overloaded,
    SandboxError,
)
from bulkhead.sandbox.files import make_private_directory
from bulkhead.sandbox.isolation import NO_LAYERS, Layer, require_layers
from bulkhead.sandbox.launch import Exit, Job
from bulkhead.sandbox.launcher import Launcher, ZygoteNews
from bulkhead.sandbox.limits import Limits, largest
from bulkhead.sandbox.module import ModuleInfo, check_fits, check_runnable, describe, digest_of
from bulkhead.sandbox.outcome import Outcome, RunResult, Usage
from bulkhead.sandbox.shared_spawner import SharedSpawners
from bulkhead.sandbox.slots import Slots
from bulkhead.sandbox.spawner import SHORTAGES, SpawnerKeeper
from bulkhead.sandbox.spawner_protocol import StartFailed
from bulkhead.sandbox.store import ModuleStore
from bulkhead.sandbox.verdict import judge
from bulkhead.sandbox.wasmtime import Runtime, find_runtime

_MOST_ARGUMENT_BYTES = 32 << 10
_MOST_ARGUMENTS = 256
# Loaded modules that no configuration holds; the least recently run goes first.
_MOST_LOADED = 128
# From SIGKILL to the report of the end; only a machine in trouble takes longer.
_REAP_SECONDS = 0.5
# A module that does not come to an end on no input has been started, which is all that a probe asks.
_PROBE_SECONDS = 0.25
_NOT_STARTED = frozenset({Outcome.START_FAILED, Outcome.SANDBOX_CRASH, Outcome.SANDBOX_VIOLATION})
# What wasmtime says before a guest has run.
_RUNTIME_REFUSALS = (
    "Error: failed to run main module",
    "Error: failed to load module",
    "Error: support for compiling modules",
)
_DEFAULT_LIMITS = Limits()
_MAXIMUM_LIMITS = Limits(
    memory_bytes=1 << 30,
    wall_seconds=60,
    cpu_seconds=60,
    stdout_bytes=64 << 20,
    stderr_bytes=1 << 20,
    stack_bytes=4 << 20,
    table_elements=1_000_000,
)


def default_concurrent_runs() -> int:
    """Runs are short and mostly compute; some sleep, so a few more than CPUs."""
    return max(8, 4 * usable_cpus())


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """How a sandbox is set up. Sizes in bytes."""

    state_dir: Path
    """Modules, compiled code, copies of the runtime; only its owner may write there."""
    wasmtime: Path | None = None
    """A wasmtime program, or the folder that holds it; None: look for one."""
    limits: Limits = _DEFAULT_LIMITS
    """Of runs that ask for none."""
    maximum_limits: Limits = _MAXIMUM_LIMITS
    """The most that any run may ask for."""
    max_module_bytes: int = 32 << 20
    max_store_bytes: int = 4 << 30
    max_stdin_bytes: int = 64 << 20
    max_concurrent_runs: int = field(default_factory=default_concurrent_runs)
    max_queued_runs: int = 512
    zygotes: bool = True
    """Fork runs from a wasmtime that has loaded the module, where that works; else execute it for each."""
    require: Layer = NO_LAYERS
    """Layers of isolation without which nothing is run."""
    spawner_host: socket.socket | None = None
    """What a SpawnerHost offered; without one, the sandbox starts a spawner of its own."""


@dataclass(slots=True)
class _Loaded:
    """A module that this process can run without touching the disk."""

    info: ModuleInfo
    compiled: dict[bool, CompiledModule] = field(default_factory=dict)
    """By whether it counts fuel."""
    pinned: bool = False
    data: bytes | None = None
    """Of a module that is not in the store."""


class Sandbox:
    """Runs modules, each run in a process of its own. Owned by one event loop."""

    def __init__(
        self,
        options: SandboxOptions,
        runtime: Runtime,
        store: ModuleStore,
        compiler: Compiler,
        spawners: SpawnerKeeper,
        launcher: Launcher,
    ) -> None:
        self.options = options
        self.runtime = runtime
        self.store = store
        self._compiler = compiler
        self._spawners = spawners
        self._launcher = launcher
        self.on_zygote: Callable[[ZygoteNews], None] = lambda news: None
        """Called with news of zygotes: that one is ready, or died, or cannot be."""
        launcher.on_news = lambda news: self.on_zygote(news)
        self._slots = Slots(options.max_concurrent_runs, options.max_queued_runs)
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._compiling = asyncio.Lock()
        self._closed = False
        self._kills: set[Callable[[], None]] = set()
        """One for each run."""

    @classmethod
    async def open(cls, options: SandboxOptions) -> Sandbox:
        """Finds and probes wasmtime, and gets ready to run.

        Raises SandboxError with one sentence that says what is missing and what to do.
        """
        make_private_directory(options.state_dir)
        store = ModuleStore(options.state_dir / "modules", max_total_bytes=options.max_store_bytes)
        cache = CompileCache(options.state_dir / "cache", options.state_dir / "cache.secret")
        spawners = SharedSpawners(options.spawner_host) if options.spawner_host else SpawnerKeeper()
        try:
            spawner = await spawners.living()
            runtime = await find_runtime(spawner, options.state_dir, options.wasmtime)
            require_layers(options.require, runtime.layers)
        except BaseException:
            await spawners.close()
            raise
        launcher = Launcher(
            runtime,
            spawners,
            options.max_stdin_bytes,
            zygotes=options.zygotes and not runtime.zygote_obstacle,
            required=options.require,
        )
        return cls(options, runtime, store, Compiler(runtime, cache), spawners, launcher)

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, grace_seconds: float = 0.0) -> None:
        """Waits at most `grace_seconds` for runs, those in the queue included, then kills them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._slots.until_idle()
        self._closed = True  # what still waits for its turn is not started any more
        for kill in tuple(self._kills):
            kill()
        # Killed runs are results like others, and their callers are told so.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAP_SECONDS):
                await self._slots.until_idle()
        await self._spawners.close()
        # All runs have failed by now; their callbacks close the files.
        await self._slots.until_idle()
        self._loaded.clear()
        self._launcher.close()

    @property
    def active_runs(self) -> int:
        return self._slots.active

    @property
    def waiting_runs(self) -> int:
        return self._slots.waiting

    # Modules

    async def put(self, data: bytes, *, expected_digest: str | None = None) -> tuple[ModuleInfo, bool]:
        """Checks and compiles a module, then stores it; returns what it is and whether it is new.

        Raises InvalidModule (then nothing is kept), StoreFull, SandboxError.
        """
        digest = await asyncio.to_thread(digest_of, data)
        if expected_digest is not None and digest != expected_digest:
            raise InvalidModule(
                InvalidModuleReason.DIGEST_MISMATCH, f"the module has digest {digest}, not {expected_digest}"
            )
        known = digest in self._loaded
        loaded = await self._load_bytes(digest, data)
        await self._compiled(loaded, metered=False, data=data)
        try:
            _, created = await asyncio.to_thread(self.store.put_bytes, data)
        except BaseException:
            if not known:
                self._forget(digest)
            raise
        return loaded.info, created

    async def load(self, data: bytes) -> ModuleInfo:
        """Like `put`, but for this process only: the module is not stored."""
        digest = await asyncio.to_thread(digest_of, data)
        loaded = await self._load_bytes(digest, data)
        await self._compiled(loaded, metered=False, data=data)
        self._pin(loaded).data = data
        return loaded.info

    def inspect(self, digest: str) -> ModuleInfo:
        """What a stored or loaded module is. Raises UnknownModule, SandboxError."""
        if (loaded := self._loaded.get(digest)) is not None:
            return loaded.info
        return describe(self.store.read(digest), max_bytes=self.options.max_module_bytes)

    async def prepare(self, digest: str, entry_point: str, *, limits: Limits | None = None) -> None:
        """Loads a module for good, so that running it needs no compiler and no disk, and little time.

        Raises UnknownModule, InvalidModule (the entry point), SandboxError.
        """
        chosen = limits if limits is not None else self.options.limits
        loaded = await self._load(digest)
        loaded.info.require_entry_point(entry_point)
        compiled = await self._compiled(loaded, metered=chosen.fuel is not None)
        self._pin(loaded)
        await self._launcher.keep(compiled, entry_point, chosen)

    async def probe(self, digest: str, entry_point: str, *, limits: Limits) -> None:
        """Starts a module on an empty input. What it makes of that does not matter.

        Raises InvalidModule where the runtime cannot start it, UnknownModule, InvalidRequest, SandboxError.
        """
        limits = replace(limits, wall_seconds=min(limits.wall_seconds, _PROBE_SECONDS))
        result = await self.run(digest, entry_point, limits=limits)
        words = result.stderr.decode(errors="replace") + result.diagnostics
        if result.outcome in _NOT_STARTED or (
            result.outcome is Outcome.EXIT_NONZERO and words.startswith(_RUNTIME_REFUSALS)
        ):
            why = words.strip().rpartition("\n")[2].strip() or result.message
            raise InvalidModule(InvalidModuleReason.NOT_RUNNABLE, f"the runtime cannot start it: {why}")

    def release(self, digests: Iterable[str]) -> None:
        """Unloads modules that were loaded for good. Runs of them end as they would."""
        for digest in digests:
            if (loaded := self._loaded.get(digest)) is not None:
                loaded.pinned = False
                self._forget(digest)

    def allow(self, limits: Limits, maximum_limits: Limits) -> None:
        """Changes the limits of runs that ask for none, and lets runs ask for more than before."""
        most = largest([maximum_limits, self.options.maximum_limits])
        self.options = replace(self.options, limits=limits, maximum_limits=most)

    def delete(self, digest: str) -> None:
        """Removes a module from the store, and its compiled code. Raises UnknownModule.

        Runs of it end as they would. What was loaded for good, by `load` or `prepare`, stays so.
        """
        self.store.delete(digest)
        self._forget(digest)
        if digest not in self._loaded:
            self._compiler.forget(digest)

    # Runs

    async def run(
        self,
        digest: str,
        entry_point: str,
        *,
        stdin: bytes = b"",
        arguments: Sequence[str] = (),
        limits: Limits | None = None,
        deadline: float | None = None,
    ) -> RunResult:
        """Runs an exported function once, in a process of its own.

        `limits` None means the options' own; `deadline` is on time.monotonic(). How the guest
        fails is in the result. Raises UnknownModule, InvalidModule (the entry point),
        InvalidRequest, Overloaded, DeadlinePassed (nothing was started), SandboxError.
        Cancelling kills the run.
        """
        if self._closed:
            raise SandboxError("the sandbox is closed")
        chosen = limits if limits is not None else self.options.limits
        loaded = await self._load(digest)
        self._check(loaded.info, entry_point, stdin, arguments, chosen)
        compiled = await self._compiled_by(deadline, loaded, metered=chosen.fuel is not None)
        await self._slots.acquire(deadline)
        if self._closed:
            self._slots.release()
            raise SandboxError("the sandbox is closed")
        wall_seconds = _wall_seconds(chosen, deadline)
        if wall_seconds <= 0:
            self._slots.release()
            raise DeadlinePassed("the deadline had passed before the run could start")
        job = Job(
            module=compiled,
            entry_point=entry_point,
            arguments=tuple(arguments),
            stdin=stdin,
            limits=chosen,
            wall_seconds=wall_seconds,
        )
        return await self._run(job)

    async def _run(self, job: Job) -> RunResult:
        """Runs a job that has a slot."""
        try:
            run = await self._launcher.start(job)
        except BaseException:
            self._slots.release()
            raise
        self._kills.add(run.kill)
        run.ended.add_done_callback(self._on_end)
        run.ended.add_done_callback(lambda _: self._kills.discard(run.kill))
        try:
            # Shielded: the slot is free when the process is reaped, whatever happens to us.
            return judge(job, await asyncio.shield(run.ended))
        except asyncio.CancelledError:
            run.kill()
            raise
        except StartFailed as error:
            if error.error_number in SHORTAGES:
                raise Overloaded(
                    "the host is short of descriptors, processes or memory; try later"
                ) from error
            return _not_started(error)

    def _on_end(self, ended: asyncio.Future[Exit]) -> None:
        self._slots.release()
        if not ended.cancelled():
            ended.exception()  # seen, even if the caller is gone

    def _check(
        self, info: ModuleInfo, entry_point: str, stdin: bytes, arguments: Sequence[str], limits: Limits
    ) -> None:
        info.require_entry_point(entry_point)
        limits.within(self.options.maximum_limits)
        check_fits(info, limits)
        if len(stdin) > self.options.max_stdin_bytes:
            raise InvalidRequest(
                f"stdin has {len(stdin)} bytes; at most {self.options.max_stdin_bytes} are allowed"
            )
        if arguments and entry_point != "_start":
            raise InvalidRequest(f"the entry point {entry_point!r} takes no arguments; only _start does")
        if any("\0" in text for text in (entry_point, *arguments)):
            raise InvalidRequest("the entry point or an argument holds a NUL character")
        try:
            size = sum(len(os.fsencode(text)) for text in arguments)
        except UnicodeEncodeError:
            raise InvalidRequest("an argument is not valid Unicode") from None
        if len(arguments) > _MOST_ARGUMENTS or size > _MOST_ARGUMENT_BYTES:
            raise InvalidRequest(
                f"at most {_MOST_ARGUMENTS} arguments of {_MOST_ARGUMENT_BYTES} bytes in all"
            )

    # Loading

    async def _load(self, digest: str) -> _Loaded:
        if (loaded := self._loaded.get(digest)) is not None:
            self._loaded.move_to_end(digest)
            return loaded
        data = await asyncio.to_thread(self.store.read, digest)
        return await self._load_bytes(digest, data)

    async def _load_bytes(self, digest: str, data: bytes) -> _Loaded:
        info = await asyncio.to_thread(describe, data, max_bytes=self.options.max_module_bytes)
        check_runnable(info, self.options.maximum_limits)
        return self._loaded.get(digest) or _Loaded(info)

    def _keep(self, loaded: _Loaded) -> None:
        """Remembers a module that was compiled, and forgets others that are rarely run."""
        self._loaded[loaded.info.digest] = loaded
        unpinned = [digest for digest, loaded in self._loaded.items() if not loaded.pinned]
        for digest in unpinned[: max(0, len(unpinned) - _MOST_LOADED)]:
            self._unload(digest)

    def _pin(self, loaded: _Loaded) -> _Loaded:
        """Keeps a compiled module for good. Returns the one that is kept: another may have come first."""
        kept = self._loaded.setdefault(loaded.info.digest, loaded)
        kept.compiled = loaded.compiled | kept.compiled
        kept.pinned = True
        return kept

    def _forget(self, digest: str) -> None:
        """Unloads a module that is not loaded for good."""
        loaded = self._loaded.get(digest)
        if loaded is not None and not loaded.pinned:
            self._unload(digest)

    def _unload(self, digest: str) -> None:
        for compiled in self._loaded.pop(digest).compiled.values():
            self._launcher.forget(compiled)

    async def _compiled_by(self, deadline: float | None, loaded: _Loaded, *, metered: bool) -> CompiledModule:
        """Like `_compiled`. Raises DeadlinePassed when it is not done in time."""
        if deadline is None or metered in loaded.compiled:
            return await self._compiled(loaded, metered=metered)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._compiled(loaded, metered=metered)
        except TimeoutError:
            raise DeadlinePassed("the deadline passed while the module was being compiled") from None

    async def _compiled(self, loaded: _Loaded, *, metered: bool, data: bytes | None = None) -> CompiledModule:
        if (known := loaded.compiled.get(metered)) is not None:
            return known
        # One at a time: a compilation may use all the memory that it is allowed.
        async with self._compiling:
            digest = loaded.info.digest
            kept = self._loaded.get(digest, loaded)  # another task may have loaded it, too
            if (known := kept.compiled.get(metered)) is None:
                source = data or loaded.data or kept.data
                if source is None:
                    source = await asyncio.to_thread(self.store.read, digest)
                spawner = await self._spawners.living()
                known = await self._compiler.compile(spawner, digest, source, metered=metered)
                kept.compiled[metered] = known
                self._keep(kept)
            loaded.compiled[metered] = known
            return known


def _wall_seconds(limits: Limits, deadline: float | None) -> float:
    if deadline is None:
        return limits.wall_seconds
    return min(limits.wall_seconds, deadline - time.monotonic())


def _not_started(error: StartFailed) -> RunResult:
    return RunResult(
        outcome=Outcome.START_FAILED,
        exit_code=0,
        stdout=b"",
        stderr=b"",
        stderr_truncated=False,
        usage=Usage(wall_seconds=0.0, cpu_seconds=0.0, peak_memory_bytes=0),
        message="its process could not be started",
        diagnostics=str(error),
    )
