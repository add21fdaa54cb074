"""The probe: whether a compiler, a runner and a set of flags fit together, tried with a tiny module."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.isolation import NO_LAYERS, Layer
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.memfile import create_memfile
from bulkhead.sandbox.outcome import Way
from bulkhead.sandbox.spawner import Spawner
from bulkhead.sandbox.spawner_protocol import (
    KEY_BYTES,
    Bounds,
    ProcessEnd,
    Program,
    ProgramFlags,
    StartFailed,
    ZygoteReport,
    ZygoteState,
)
from bulkhead.sandbox.tool import ToolEnd, execute_tool

# Exports `echo`, which writes what it reads (at most 64 KiB), `random`, which writes 16 random bytes,
# `spin`, which never ends, `trap`, which hits `unreachable`, and a memory of two pages. Made from:
#   (module
#     (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
#     (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
#     (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
#     (memory (export "memory") 2)
#     (func $tell (param $size i32)
#       (i32.store (i32.const 0) (i32.const 16))
#       (i32.store (i32.const 4) (local.get $size))
#       (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
#     (func (export "echo")
#       (i32.store (i32.const 0) (i32.const 16))
#       (i32.store (i32.const 4) (i32.const 65536))
#       (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
#       (call $tell (i32.load (i32.const 8))))
#     (func (export "random")
#       (drop (call $random (i32.const 16) (i32.const 16)))
#       (call $tell (i32.const 16)))
#     (func (export "spin") (loop (br 0)))
#     (func (export "trap") (unreachable)))
PROBE_MODULE = base64.b64decode(
    "AGFzbQEAAAABFgRgBH9/f38Bf2ACf38Bf2ABfwBgAAACaAMWd2FzaV9zbmFwc2hvdF9wcmV2aWV3MQdmZF9yZWFkAAAWd2FzaV9zbmFw"
    "c2hvdF9wcmV2aWV3MQhmZF93cml0ZQAAFndhc2lfc25hcHNob3RfcHJldmlldzEKcmFuZG9tX2dldAABAwYFAgMDAwMFAwEAAgcoBQZt"
    "ZW1vcnkCAARlY2hvAAQGcmFuZG9tAAUEc3BpbgAGBHRyYXAABwpcBRsAQQBBEDYCAEEEIAA2AgBBAUEAQQFBCBABGgskAEEAQRA2AgBB"
    "BEGAgAQ2AgBBAEEAQQFBCBAAGkEIKAIAEAMLDQBBEEEQEAIaQRAQAwsHAANADAALCwMAAAsALgRuYW1lARwEAARyZWFkAQV3cml0ZQIG"
    "cmFuZG9tAwR0ZWxsAgkBAwEABHNpemU="
)
TRAP_EXIT_CODE = 134
"""What the wasmtime CLI exits with after a trap. A guest's own codes pass up to 125, others become 1."""

_LIMITS = Limits(memory_bytes=2 * 65536)
_TOO_LITTLE_MEMORY = Limits(memory_bytes=65536)
_INPUT = b"bulkhead\n"

_RANDOM_RUNS = 20
_READY_SECONDS = 10.0
_BOUNDS = Bounds(
    wall_seconds=10,
    cpu_seconds=5,
    data_bytes=64 << 20,
    address_bytes=64 << 30,
    file_bytes=65536,
    stderr_bytes=4096,
)
_LITTLE_CPU_SECONDS = 0.02

# One of tokio's threads is enough for a run, and starting more costs 15 % of it. One heap for all threads
# saves each run the making of others; and glibc, shrinking such another heap, would open a file, for which
# the system call filter kills. The guest does not see this environment.
RUN_ENVIRONMENT = ("TOKIO_WORKER_THREADS=1", "MALLOC_ARENA_MAX=1")
# What is done without, in turn, where an honest run does not survive.
_SACRIFICES = (
    NO_LAYERS,
    Layer.SECCOMP,
    Layer.SECCOMP | Layer.LANDLOCK,
    Layer.SECCOMP | Layer.LANDLOCK | Layer.EMPTY_ROOT | Layer.NAMESPACES,
)
_WITHOUT_LIBRARY = Layer.LIMITS | Layer.NO_NEW_PRIVS
_ANNOUNCEMENT = b"bulkhead: confined"  # native/zygote_protocol.h

LimitFlags = Callable[..., tuple[str, ...]]


class ProbeFailed(SandboxError):
    """These programs and flags do not work together."""


async def probe(
    spawner: Spawner, compiler: Path, runner: Path, flags: Sequence[str], limit_flags: LimitFlags
) -> int:
    """Compiles and runs: the answer is right, a trap is told as one, the memory limit bites.

    Returns the peak memory of the runner with next to nothing in it, in bytes.
    Raises ProbeFailed with the first thing that is not so.
    """
    artifact = await _compile(spawner, compiler, flags)
    try:

        async def run(entry_point: str, limits: Limits) -> ToolEnd:
            argv = [str(runner), "run", *flags, *limit_flags(limits, stdin_bytes=0), "--allow-precompiled"]
            argv += ["--invoke", entry_point, "/proc/self/fd/3"]
            return await execute_tool(spawner, argv, stdin=_INPUT, files=(artifact,))

        running = await run("echo", _LIMITS)
        _expect(running, "running", exit_code=0, stdout=_INPUT)
        _expect(await run("trap", _LIMITS), "trapping", exit_code=TRAP_EXIT_CODE)
        _expect(await run("echo", _TOO_LITTLE_MEMORY), "limiting memory", exit_code=1)
        return running.usage.peak_memory_bytes
    finally:
        os.close(artifact)


async def _compile(spawner: Spawner, compiler: Path, flags: Sequence[str]) -> int:
    """Returns a descriptor of the probe module's artifact. Raises ProbeFailed."""
    module, artifact = create_memfile("probe.wasm"), create_memfile("probe.cwasm")
    try:
        os.write(module, PROBE_MODULE)
        compiling = [str(compiler), "compile", *flags, "-o", "/proc/self/fd/4", "/proc/self/fd/3"]
        _expect(await execute_tool(spawner, compiling, files=(module, artifact)), "compiling", exit_code=0)
    except BaseException:
        os.close(artifact)
        raise
    finally:
        os.close(module)
    return artifact


async def probe_isolation(
    spawner: Spawner, compiler: Path, runner: Path, flags: Sequence[str], limit_flags: LimitFlags
) -> tuple[Layer, bool, str]:
    """Runs within as many layers as honest runs can bear: all that work on this machine, it is hoped.

    Returns the layers, whether the preloaded library works with this runner (it sets up most of them),
    and why there are not more. Raises ProbeFailed when the module cannot be compiled.
    """
    artifact = await _compile(spawner, compiler, flags)
    complaint = ""
    try:
        for without in _SACRIFICES:
            layers = Layer(spawner.layers) & ~without
            argv = [str(runner), "run", *flags, *limit_flags(_LIMITS, stdin_bytes=0), "--allow-precompiled"]
            program = Program(
                key=secrets.token_bytes(KEY_BYTES),
                argv=(*argv, "--invoke", "echo", "/proc/self/fd/3"),
                environment=(*RUN_ENVIRONMENT, "BULKHEAD_ANNOUNCE=1"),
                flags=ProgramFlags.IS_WASMTIME,
                layers=layers,
            )
            spawner.register(program, (artifact,))
            spawner_end = spawner.run(program.key, _BOUNDS, stdin=_INPUT)[0]
            spawner.forget(program.key)
            try:
                end = await spawner_end
            except StartFailed as error:
                complaint = complaint or str(error)
                continue
            if (end.wait_status, end.stdout) == (0, _INPUT) and _ANNOUNCEMENT in end.stderr:
                return layers, True, complaint
            words = " ".join(end.stderr.decode(errors="replace").split())[:200]
            complaint = complaint or f"a run within them ended with status {end.wait_status:#x}: {words}"
    finally:
        os.close(artifact)
    return Layer(spawner.layers) & _WITHOUT_LIBRARY, False, complaint


async def probe_zygote(
    spawner: Spawner,
    compiler: Path,
    runner: Path,
    flags: Sequence[str],
    limit_flags: LimitFlags,
    layers: Layer,
) -> None:
    """Runs from zygotes: output is right, no two runs draw the same random bytes, limits bite.

    Raises ProbeFailed with the first thing that is not so: then every run has to execute the runner.
    """
    artifact = await _compile(spawner, compiler, flags)
    known = []
    try:
        for entry_point in ("echo", "random", "spin", "trap"):
            argv = [str(runner), "run", *flags, *limit_flags(_LIMITS, stdin_bytes=0), "--allow-precompiled"]
            program = Program(
                key=secrets.token_bytes(KEY_BYTES),
                argv=(*argv, "--invoke", entry_point, "/proc/self/fd/3"),
                environment=RUN_ENVIRONMENT,
                flags=ProgramFlags.IS_WASMTIME | ProgramFlags.HAS_ZYGOTE,
                layers=layers,
            )
            known.append(program.key)
            await _start_zygote(spawner, program, artifact)
        await _try_zygotes(spawner, *known)
    finally:
        for key in known:
            spawner.forget(key)
        os.close(artifact)


async def _start_zygote(spawner: Spawner, program: Program, artifact: int) -> None:
    reports: asyncio.Queue[ZygoteReport] = asyncio.Queue()
    spawner.on_zygote = reports.put_nowait
    spawner.register(program, (artifact,))
    try:
        async with asyncio.timeout(_READY_SECONDS):
            while (report := await reports.get()).key != program.key:
                continue
    except TimeoutError:
        raise ProbeFailed(f"no zygote after {_READY_SECONDS:g} s") from None
    if report.state is not ZygoteState.READY:
        raise ProbeFailed(f"no zygote: {report.reason or report.state.name.lower()}")


async def _try_zygotes(spawner: Spawner, echo: bytes, random: bytes, spin: bytes, trap: bytes) -> None:
    async def run(key: bytes, bounds: Bounds = _BOUNDS, stdin: bytes = b"") -> ProcessEnd:
        end = await spawner.run(key, bounds, stdin=stdin)[0]
        if end.usage.way is not Way.ZYGOTE:
            raise ProbeFailed("a run was not forked from its zygote")
        return end

    def expect(what: str, end: ProcessEnd, status: int, stdout: bytes = b"") -> None:
        if end.wait_status != status or end.stdout != stdout:
            words = " ".join(end.stderr.decode(errors="replace").split())[:300]
            raise ProbeFailed(f"{what} from a zygote ended with status {end.wait_status:#x}: {words}")

    for text in (_INPUT, _INPUT * 2):
        expect("running", await run(echo, stdin=text), 0, text)
    expect("trapping", await run(trap), TRAP_EXIT_CODE << 8)
    drawn = [(await run(random)).stdout for _ in range(_RANDOM_RUNS)]
    if len(set(drawn)) != _RANDOM_RUNS or any(len(each) != 16 for each in drawn):
        raise ProbeFailed("runs of one zygote share their randomness")
    little_time = replace(_BOUNDS, cpu_seconds=_LITTLE_CPU_SECONDS)
    expect("limiting CPU time", await run(spin, little_time), signal.SIGPROF)
    little_output = await run(echo, replace(_BOUNDS, file_bytes=1), _INPUT)
    expect("limiting output", little_output, signal.SIGXFSZ, _INPUT[:1])


def _expect(end: ToolEnd, what: str, *, exit_code: int, stdout: bytes = b"") -> None:
    if end.exit_code != exit_code or end.stdout != stdout:
        words = " ".join(end.stderr.split())[:300]
        raise ProbeFailed(f"{what} a tiny module ended with status {end.wait_status:#x}: {words}")
