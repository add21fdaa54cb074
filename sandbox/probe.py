"""The probe: whether a compiler, a runner and a set of flags fit together, tried with a tiny module."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.memfile import create_memfile
from bulkhead.sandbox.spawner import Spawner
from bulkhead.sandbox.tool import ToolEnd, execute_tool

# Exports `echo`, which writes what it reads (at most 64 KiB), `trap`, which hits `unreachable`, and
# a memory of two pages. Made from:
#   (module
#     (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
#     (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
#     (memory (export "memory") 2)
#     (func (export "echo")
#       (i32.store (i32.const 0) (i32.const 16))
#       (i32.store (i32.const 4) (i32.const 65536))
#       (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
#       (i32.store (i32.const 4) (i32.load (i32.const 8)))
#       (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
#     (func (export "trap") (unreachable)))
PROBE_MODULE = base64.b64decode(
    "AGFzbQEAAAABDAJgBH9/f38Bf2AAAAJEAhZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxB2ZkX3JlYWQAABZ3YXNpX3NuYXBzaG90X3By"
    "ZXZpZXcxCGZkX3dyaXRlAAADAwIBAQUDAQACBxgDBm1lbW9yeQIABGVjaG8AAgR0cmFwAAMKOAIyAEEAQRA2AgBBBEGAgAQ2AgBB"
    "AEEAQQFBCBAAGkEEQQgoAgA2AgBBAUEAQQFBCBABGgsDAAAL"
)
TRAP_EXIT_CODE = 134
"""What the wasmtime CLI exits with after a trap. A guest's own codes pass up to 125, others become 1."""

_LIMITS = Limits(memory_bytes=2 * 65536)
_TOO_LITTLE_MEMORY = Limits(memory_bytes=65536)
_INPUT = b"bulkhead\n"

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
    module, artifact = create_memfile("probe.wasm"), create_memfile("probe.cwasm")
    try:
        os.write(module, PROBE_MODULE)
        compiling = [str(compiler), "compile", *flags, "-o", "/proc/self/fd/4", "/proc/self/fd/3"]
        _expect(await execute_tool(spawner, compiling, files=(module, artifact)), "compiling", exit_code=0)

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
        os.close(module)
        os.close(artifact)


def _expect(end: ToolEnd, what: str, *, exit_code: int, stdout: bytes = b"") -> None:
    if end.exit_code != exit_code or end.stdout != stdout:
        words = " ".join(end.stderr.split())[:300]
        raise ProbeFailed(f"{what} a tiny module ended with status {end.wait_status:#x}: {words}")
