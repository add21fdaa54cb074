"""What one run costs: wasmtime from the shell, bare C programs, our launcher, an instance in this process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import uvloop

from benchmarks.floors import STAYS_WHERE_IT_BEGINS, ExecFloor, ZygoteFloor
from benchmarks.inprocess import NAME as IN_PROCESS
from benchmarks.inprocess import Instances
from benchmarks.samples import Samples
from benchmarks.subjects import Subject, pod_review
from bulkhead.sandbox import Limits, Sandbox, SandboxOptions, Way
from bulkhead.sandbox.spawner import LIBRARY

_FLOOR = "the same, all on one CPU: the floor"
_EXEC_FLOOR = "the same, all on one CPU"
_ENTRY_POINT = "validate"
_LIMITS = Limits(wall_seconds=10, cpu_seconds=10)
_WARM_UP_RUNS = 10


@dataclass(frozen=True, slots=True)
class _Row:
    """One way of running."""

    name: str
    measure: Callable[[int], Awaitable[Samples]]
    share: float = 1.0
    """Of the runs that the others make: slow ones need not be repeated as often."""


def run(subject: Subject, *, rounds: int, count: int, skipped: list[str]) -> list[Samples]:
    """Alternates the ways in many rounds, so that a slow moment of the machine hits all of them."""
    # On the event loop that the service runs on.
    return uvloop.run(_measure(subject, rounds, count, skipped))


def floor_of(results: list[Samples]) -> Samples:
    """The least that a run can cost in a process of its own."""
    by_name = {each.name: each for each in results}
    return by_name.get(_FLOOR) or by_name[_EXEC_FLOOR]


async def _measure(subject: Subject, rounds: int, count: int, skipped: list[str]) -> list[Samples]:
    request = b'{"request":' + pod_review() + b"}"
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        request_file = folder / "request.json"
        request_file.write_bytes(request)
        executing = await _Launcher.open(stack, folder / "exec", subject, request, Way.EXEC)
        rows = [
            *_exec_rows(executing.sandbox, folder, subject, request_file),
            _Row(executing.name, executing.measure),
        ]
        if obstacle := executing.sandbox.runtime.zygote_obstacle:
            skipped.append(f"zygotes, which do not work here: {obstacle}")
        else:
            forking = await _Launcher.open(stack, folder / "zygote", subject, request, Way.ZYGOTE)
            rows += [*await _zygote_rows(forking, request_file), _Row(forking.name, forking.measure)]
        rows.append(_row(IN_PROCESS, Instances(subject.file, _ENTRY_POINT, request).measure))
        return await _in_rounds(subject, rows, rounds, count)


async def _in_rounds(subject: Subject, rows: list[_Row], rounds: int, count: int) -> list[Samples]:
    results = [Samples(row.name) for row in rows]
    print(f"bench: runs: {subject.name}, {rounds} rounds", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for row, result in zip(rows, results, strict=True):
            result.add(await row.measure(max(1, int(count * row.share))))
    return results


def _row(name: str, measure: Callable[[int], Samples], share: float = 1.0) -> _Row:
    """Of something that blocks the event loop, on which nothing else happens meanwhile."""

    async def blocking(count: int) -> Samples:
        return measure(count)

    return _Row(name, blocking, share)


def _exec_rows(sandbox: Sandbox, folder: Path, subject: Subject, request: Path) -> list[_Row]:
    """Processes that execute wasmtime for every run."""
    runtime = sandbox.runtime
    artifact = folder / "module.cwasm"
    compiler, runner = str(runtime.compiler), str(runtime.runner)
    subprocess.run([compiler, "compile", *runtime.flags, "-o", str(artifact), str(subject.file)], check=True)
    limits = runtime.limit_flags(_LIMITS, stdin_bytes=request.stat().st_size)
    tail = [*runtime.flags, *limits, "--allow-precompiled", "--invoke", _ENTRY_POINT, str(artifact)]
    cpu = max(os.sched_getaffinity(0))
    floor = ExecFloor.build(request)
    compiling = [compiler, "run", "-C", "cache=n", "--invoke", _ENTRY_POINT, str(subject.file)]
    return [
        _row("wasmtime run module.wasm", lambda count: floor.measure(compiling, count), 0.03),
        _row(
            "C program, wasmtime, precompiled",
            lambda count: floor.measure([compiler, "run", *tail], count),
            0.3,
        ),
        _row(
            "C program, wasmtime-min, precompiled",
            lambda count: floor.measure([runner, "run", *tail], count),
            0.5,
        ),
        _row(
            _EXEC_FLOOR,
            lambda count: floor.measure([runner, "run", *tail], count, cpu),
            0.5,
        ),
    ]


async def _zygote_rows(launcher: _Launcher, request: Path) -> list[_Row]:
    """A C program that forks every run from a zygote: the one that Bulkhead started, made again."""
    (program, artifact_fd), *_ = [
        (known.program, kind.module.artifact_fd)
        for kind, known in launcher.sandbox._launcher._known.items()
        if kind.module.digest == launcher.digest and kind.entry_point == _ENTRY_POINT
    ]
    works = (await launcher.sandbox._spawners.living()).layers
    floor = ZygoteFloor.build(
        request, LIBRARY, layers=program.layers & works, artifact_fd=artifact_fd, argv=program.argv
    )
    cpu = max(os.sched_getaffinity(0))
    return [
        _row("C program, a zygote, not pinned", floor.measure),
        _row(
            "the same, each run stays on its CPU", lambda count: floor.measure(count, STAYS_WHERE_IT_BEGINS)
        ),
        _row(_FLOOR, lambda count: floor.measure(count, cpu)),
    ]


@dataclass(frozen=True, slots=True)
class _Launcher:
    """Bulkhead's, as the service uses it, one run after another."""

    name: str
    sandbox: Sandbox
    digest: str
    request: bytes
    way: Way

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, state: Path, subject: Subject, request: bytes, way: Way
    ) -> _Launcher:
        options = SandboxOptions(state_dir=state, zygotes=way is Way.ZYGOTE)
        sandbox = await stack.enter_async_context(await Sandbox.open(options))
        info = await sandbox.load(await asyncio.to_thread(subject.file.read_bytes))
        await sandbox.prepare(info.digest, _ENTRY_POINT, limits=_LIMITS)
        name = "Bulkhead, zygotes" if way is Way.ZYGOTE else "Bulkhead, exec for every run"
        launcher = cls(name, sandbox, info.digest, request, way)
        for _ in range(_WARM_UP_RUNS):
            await launcher.run()
        return launcher

    async def measure(self, count: int) -> Samples:
        samples = Samples(self.name)
        helpers = psutil.Process((await self.sandbox._spawners.living()).pid)
        before = time.process_time() + _own_cpu_seconds(helpers)
        for _ in range(count):
            start = time.perf_counter()
            used = await self.run()
            samples.wall_seconds.append(time.perf_counter() - start)
            samples.cpu_seconds += used
        samples.cpu_seconds += time.process_time() + _own_cpu_seconds(helpers) - before
        return samples

    async def run(self) -> float:
        """One run; the CPU seconds of its process."""
        result = await self.sandbox.run(self.digest, _ENTRY_POINT, stdin=self.request, limits=_LIMITS)
        if not result.ok:
            raise SystemExit(f"the benchmark's run failed: {result.message}\n{result.diagnostics}")
        if result.usage.way is not self.way:
            raise SystemExit(
                f"the benchmark's run was started by {result.usage.way.name}, not {self.way.name}"
            )
        return result.usage.cpu_seconds


def _own_cpu_seconds(spawner: psutil.Process) -> float:
    """Of the spawner and its zygotes, without the runs: those tell theirs one by one."""
    used = 0.0
    for process in (spawner, *spawner.children(recursive=True)):
        times = process.cpu_times()
        used += times.user + times.system
    return used
