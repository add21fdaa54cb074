"""Native code in the place of a guest's: what a bug in wasmtime would let a module do.

An honest module is compiled, and the machine code of its function is overwritten with a program made from
C. It reaches the sandbox as an artifact of the compile cache, so all else is as for any module.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bulkhead.sandbox import Sandbox
from bulkhead.sandbox.cache import cache_key
from bulkhead.sandbox.memfile import read_memfile
from tests.support.wat import wat

_ROOT = Path(__file__).resolve().parent.parent.parent
_SOURCE = _ROOT / "tests" / "hostile" / "native" / "attempts.c"
_SCRIPT = """
SECTIONS {
  . = 0;
  .text : { *(.entry) *(.text*) *(.rodata*) }
  /DISCARD/ : { *(.comment) *(.note*) *(.eh_frame*) *(.gnu*) }
}
"""
_FLAGS = (
    *("-Os", "-ffreestanding", "-fPIC", "-fno-stack-protector", "-fno-jump-tables", "-fcf-protection=none"),
    *("-fno-asynchronous-unwind-tables", "-fno-builtin", "-mno-sse", "-nostdlib", "-static"),
    *("-Wl,--oformat=binary", "-Wl,--build-id=none", "-Wl,-e,entry"),
)
_STEPS = 3000  # of the honest function: some twelve bytes of machine code each


def attempts() -> list[str]:
    """The names of all attempts; the place in the list is the number that standard input asks for."""
    return re.findall(r"^ATTEMPT\((\w+)\)", _SOURCE.read_text(), re.MULTILINE)


def _honest_module() -> bytes:
    """Exports `run`, which takes much room and cannot be computed beforehand."""
    steps = [
        f"(global.set $x (i64.{'add' if n % 2 else 'xor'} (global.get $x) (i64.const {_odd_number(n)})))"
        for n in range(_STEPS)
    ]
    body = "\n".join(steps)
    memory = '(memory (export "memory") 1)'
    return wat(f'(module (global $x (mut i64) (i64.const 1)) {memory} (func (export "run") {body}))')


def _odd_number(n: int) -> int:
    return n * 0x9E3779B97F4A7C15 % 2**62


def _machine_code(folder: Path) -> bytes:
    """Compiles attempts.c into what may lie at any address."""
    sys.path.insert(0, str(_ROOT / "build_support"))
    import backend  # type: ignore[import-not-found]

    cases = (f"case {number}: return attempt_{name}();" for number, name in enumerate(attempts()))
    (folder / "dispatch.h").write_text("\n".join(cases))
    (folder / "script.ld").write_text(_SCRIPT)
    target = folder / "attempts.bin"
    command = [*backend._compiler(), *_FLAGS, f"-Wl,-T,{folder / 'script.ld'}", f"-I{folder}"]
    done = subprocess.run(
        [*command, "-o", str(target), str(_SOURCE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target.read_bytes()


@dataclass(frozen=True, slots=True)
class _Function:
    """The largest function of an artifact: where its code lies in the file."""

    offset: int
    size: int


def _largest_function(artifact: bytes) -> _Function:
    """Reads the symbol table of an ELF file."""
    (sections_at,) = struct.unpack_from("<Q", artifact, 0x28)
    entry_size, count = struct.unpack_from("<HH", artifact, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", artifact, sections_at + index * entry_size)
        for index in range(count)
    ]
    best = _Function(0, 0)
    for _, kind, _, _, offset, size, *_ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for at in range(offset, offset + size, 24):
            _, info, _, section, value, length = struct.unpack_from("<IBBHQQ", artifact, at)
            if info & 15 == 2 and length > best.size and section < count:  # STT_FUNC
                best = _Function(sections[section][4] + value - sections[section][3], length)
    assert best.size > 0, "the artifact has no functions"
    return best


async def plant(sandbox: Sandbox, folder: Path) -> bytes:
    """Puts an artifact with the attempts into the sandbox's cache; returns the module it passes for.

    Another sandbox with the same state directory then runs them, as the module's entry point `run`.
    """
    module = _honest_module()
    info = await sandbox.load(module)
    compiled = sandbox._loaded[info.digest].compiled[False]
    artifact = bytearray(read_memfile(compiled.artifact_fd, compiled.size_bytes))
    function, code = _largest_function(bytes(artifact)), _machine_code(folder)
    assert len(code) <= function.size, (len(code), function.size)
    artifact[function.offset : function.offset + len(code)] = code
    compiler = sandbox._compiler
    key = cache_key(info.digest, sandbox.runtime.identity, compiler._flags(metered=False))
    compiler.cache.save(key, bytes(artifact))
    return module
