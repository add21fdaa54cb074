"""What one run costs: wasmtime from the shell, a bare C loop, our launcher."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import uvloop

from benchmarks.samples import Samples
from bulkhead.sandbox import Limits, Sandbox, SandboxOptions

_ROOT = Path(__file__).resolve().parent.parent
_LIMITS = Limits(wall_seconds=10, cpu_seconds=10)


def _floor_program(folder: Path) -> Path:
    """Compiles floor.c with the compiler that the package build uses."""
    sys.path.insert(0, str(_ROOT / "build_support"))
    import backend  # type: ignore[import-not-found]

    program = folder / "floor"
    command = [
        *backend._compiler(),
        "-std=c11",
        "-O2",
        "-o",
        str(program),
        str(_ROOT / "benchmarks" / "floor.c"),
    ]
    subprocess.run(command, check=True)
    return program


def _floor(program: Path, name: str, argv: list[str], request: Path, count: int, cpu: int) -> Samples:
    """Runs a command `count` times from the C loop."""
    command = [str(program), str(count), str(cpu), str(request), *argv]
    environment = {"TOKIO_WORKER_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"floor failed with {done.returncode}: {shlex.join(command)}\n{done.stderr}")
    *runs, own = done.stdout.splitlines()
    samples = Samples(name)
    for line in runs:
        wall, cpu_time = map(int, line.split())
        samples.wall_seconds.append(wall / 1e9)
        samples.cpu_seconds += cpu_time / 1e9
    samples.cpu_seconds += int(own.split()[1]) / 1e9
    return samples


async def _launcher(sandbox: Sandbox, digest: str, entry_point: str, request: bytes, count: int) -> Samples:
    samples = Samples("Bulkhead's launcher")
    spawner = psutil.Process((await sandbox._spawners.living()).pid)
    before = time.process_time() + sum(spawner.cpu_times()[:2])
    for _ in range(count):
        start = time.perf_counter()
        result = await sandbox.run(digest, entry_point, stdin=request, limits=_LIMITS)
        samples.wall_seconds.append(time.perf_counter() - start)
        if not result.ok:
            raise SystemExit(f"the benchmark's run failed: {result.message}\n{result.diagnostics}")
        samples.cpu_seconds += result.usage.cpu_seconds
    # Ours and the spawner's; its children's come one by one above.
    samples.cpu_seconds += time.process_time() + sum(spawner.cpu_times()[:2]) - before
    return samples


def _artifact(sandbox: Sandbox, module: Path, folder: Path) -> Path:
    path = folder / "module.cwasm"
    runtime = sandbox.runtime
    subprocess.run(
        [str(runtime.compiler), "compile", *runtime.flags, "-o", str(path), str(module)], check=True
    )
    return path


async def measure(
    module: Path, entry_point: str, request: bytes, *, rounds: int, count: int
) -> list[Samples]:
    """Alternates the ways in several rounds, so that a slow moment of the machine hits all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        floor = _floor_program(folder)
        request_file = folder / "request.json"
        request_file.write_bytes(request)
        async with await Sandbox.open(SandboxOptions(state_dir=folder / "state")) as sandbox:
            info = await sandbox.load(await asyncio.to_thread(module.read_bytes))
            await sandbox.prepare(info.digest, entry_point)
            runtime = sandbox.runtime
            artifact = _artifact(sandbox, module, folder)
            limits = runtime.limit_flags(_LIMITS, stdin_bytes=len(request))
            tail = ["--allow-precompiled", "--invoke", entry_point, str(artifact)]
            compiling = [str(runtime.compiler), "run", "-C", "cache=n", "--invoke", entry_point, str(module)]
            full = [str(runtime.compiler), "run", *runtime.flags, *limits, *tail]
            quick = [str(runtime.runner), "run", *runtime.flags, *limits, *tail]
            cpu = max(os.sched_getaffinity(0))
            ways = [
                ("wasmtime run module.wasm", compiling, max(5, count // 10), -1),
                ("bare C loop, wasmtime, precompiled", full, max(5, count // 3), -1),
                ("bare C loop, as Bulkhead runs it", quick, count, -1),
                ("the same, pinned to one CPU (the floor)", quick, count, cpu),
            ]
            results = [Samples(name) for name, *_ in ways] + [Samples("Bulkhead's launcher")]
            for _ in range(rounds):
                for result, (_, argv, times, pin) in zip(results, ways, strict=False):
                    _add(result, _floor(floor, result.name, argv, request_file, times, pin))
                _add(results[-1], await _launcher(sandbox, info.digest, entry_point, request, count))
            return results


def _add(total: Samples, part: Samples) -> None:
    total.wall_seconds += part.wall_seconds
    total.cpu_seconds += part.cpu_seconds


def run(module: Path, entry_point: str, request: bytes, *, rounds: int, count: int) -> list[Samples]:
    # On the event loop that the service runs on.
    return uvloop.run(measure(module, entry_point, request, rounds=rounds, count=count))
