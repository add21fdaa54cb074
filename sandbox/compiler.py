"""Compiling modules: in a limited process, once, with the result kept."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from bulkhead.sandbox.cache import CompileCache, cache_key
from bulkhead.sandbox.compiled import CompiledModule
from bulkhead.sandbox.errors import InvalidModule, InvalidModuleReason, SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.memfile import create_memfile, read_memfile, write_memfile
from bulkhead.sandbox.spawner import Spawner
from bulkhead.sandbox.spawner_protocol import Bounds
from bulkhead.sandbox.tool import ToolEnd, execute_tool
from bulkhead.sandbox.wasmtime import Runtime

_MOST_ARTIFACT_BYTES = 256 << 20
# A module of 4 MB was seen to take 59 s and 5.4 GB unbounded; honest ones of that size take 2 s
# and 200 MB. One thread: a hostile module must not take all CPUs from the reviews.
COMPILE_BOUNDS = Bounds(
    wall_seconds=40,
    cpu_seconds=10,
    data_bytes=512 << 20,
    address_bytes=1 << 40,
    file_bytes=_MOST_ARTIFACT_BYTES,
    stderr_bytes=64 << 10,
)
_METERED = ("-W", "fuel=1")
_TOO_MUCH = "the module takes too much to compile"


@dataclass(frozen=True, slots=True)
class Compiler:
    """Turns modules into artifacts, through the cache."""

    runtime: Runtime
    cache: CompileCache
    bounds: Bounds = COMPILE_BOUNDS

    async def compile(self, spawner: Spawner, digest: str, data: bytes, *, metered: bool) -> CompiledModule:
        """Returns the compiled module, from the cache if it is there.

        Raises InvalidModule when the module is at fault, and SandboxError when we are.
        """
        flags = self._flags(metered=metered)
        key = cache_key(digest, self.runtime.identity, flags)
        artifact = self.cache.load(key)
        if artifact is None:
            artifact = await self._compile(spawner, data, flags)
            self.cache.save(key, artifact)
        return CompiledModule.load(digest, artifact, metered=metered)

    def forget(self, digest: str) -> None:
        """Removes what the cache has of a module, as compiled by this runtime."""
        for metered in (False, True):
            self.cache.discard(cache_key(digest, self.runtime.identity, self._flags(metered=metered)))

    def _flags(self, *, metered: bool) -> tuple[str, ...]:
        return (*self.runtime.flags, *(_METERED if metered else ()))

    async def _compile(self, spawner: Spawner, data: bytes, flags: tuple[str, ...]) -> bytes:
        argv = [str(self.runtime.compiler), "compile", *flags, "-C", "parallel-compilation=n"]
        source, target = create_memfile("module.wasm"), create_memfile("module.cwasm")
        try:
            write_memfile(source, data)
            argv += ["-o", "/proc/self/fd/4", "/proc/self/fd/3"]
            end = await execute_tool(spawner, argv, files=(source, target), bounds=self.bounds)
            _judge(end)
            artifact = read_memfile(target, _MOST_ARTIFACT_BYTES)
        except OSError as error:
            raise SandboxError(f"cannot compile: {error.strerror}") from error
        finally:
            os.close(source)
            os.close(target)
        if not artifact:
            raise SandboxError("wasmtime compile succeeded without an artifact")
        return artifact


def _judge(end: ToolEnd) -> None:
    if end.exit_code == 0:
        return
    if end.exit_code == 1:
        raise InvalidModule(
            InvalidModuleReason.MALFORMED, f"wasmtime refuses the module: {_complaint(end.stderr)}"
        )
    number = os.WTERMSIG(end.wait_status) if os.WIFSIGNALED(end.wait_status) else 0
    if end.reason is EndReason.WALL_TIME:
        raise InvalidModule(InvalidModuleReason.COMPILE_LIMIT, f"{_TOO_MUCH} time")
    if number in (signal.SIGPROF, signal.SIGXCPU):
        raise InvalidModule(InvalidModuleReason.COMPILE_LIMIT, f"{_TOO_MUCH} CPU time")
    if number == signal.SIGXFSZ:
        raise InvalidModule(InvalidModuleReason.COMPILE_LIMIT, "the module compiles to too much code")
    if number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        # How a Rust program ends when memory is refused, or its stack is used up.
        raise InvalidModule(InvalidModuleReason.COMPILE_LIMIT, f"{_TOO_MUCH} memory")
    raise SandboxError(f"wasmtime compile ended with status {end.wait_status:#x}: {end.stderr.strip()[:500]}")


def _complaint(stderr: str) -> str:
    """The cause that wasmtime names, without the paths and traces around it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if "Caused by:" in lines:
        lines = lines[lines.index("Caused by:") + 1 :]
    causes = [line for line in lines if "/proc/self" not in line and not line.startswith("Error:")]
    text = "; ".join(causes) or "no reason given"
    return "".join(c if c.isprintable() else "�" for c in text)[:300]
