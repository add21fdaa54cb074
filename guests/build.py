#!/usr/bin/env python3
"""Builds the demo modules from their sources: `python guests/build.py`, or `--check` to compare.

The toolchain is the PyPI wheel named by TOOLCHAIN; nothing else takes part, so the same sources
give the same bytes on every machine and in every folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ZIG_VERSION = "0.17.1"
TOOLCHAIN = f"ziglang=={ZIG_VERSION}"
GUESTS = Path(__file__).resolve().parent
SHIPPED = GUESTS.parent / "service" / "demo"

# What every WebAssembly runtime has had for years, and no more: a module that needs a feature which
# Bulkhead turns off would be refused.
_CPU = "mvp+bulk_memory+mutable_globals+sign_ext"
# `safe`: an overflow or a wrong index traps, instead of giving a wrong verdict.
_PER_MODULE = ["-target", "wasm32-wasi", "-mcpu", _CPU, "-O", "safe", "-fstrip", "-fsingle-threaded"]
# The stack comes first in memory, so that an overflow traps instead of reaching the data.
_STACK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Guest:
    """One module: its folder's name, and the entry point that it exports."""

    name: str
    entry_point: str

    @property
    def file_name(self) -> str:
        return f"{self.name}.wasm"


GUESTS_TO_BUILD = (
    Guest("magic-authn", "authn"),
    Guest("magic-authz", "authz"),
    Guest("magic-validate", "validate"),
    Guest("magic-mutate", "validate"),
)


class BuildFailed(Exception):
    """A module could not be built, or differs from the one shipped; the text says what to do."""


def check_toolchain() -> None:
    """Raises BuildFailed unless this Python has the pinned compiler."""
    advice = f"the modules are built with {TOOLCHAIN}: {sys.executable} -m pip install {TOOLCHAIN}"
    if importlib.util.find_spec("ziglang") is None:
        raise BuildFailed(f"no ziglang in this Python; {advice}")
    version = _zig("version").strip()
    if version != ZIG_VERSION:
        raise BuildFailed(f"ziglang here is {version}; {advice}")


def build(guest: Guest, out: Path, cache: Path) -> bytes:
    """Builds one module into the folder `out` and returns its bytes. Raises BuildFailed."""
    program = out / guest.file_name
    _zig(
        "build-exe",
        *("--name", guest.name, f"-femit-bin={program}"),
        *("--cache-dir", str(cache), "--global-cache-dir", str(cache)),
        # A reactor: no _start, only the entry point and the memory are exported.
        *("-fno-entry", f"--export={guest.entry_point}", "--stack", str(_STACK_BYTES)),
        *(*_PER_MODULE, "--dep", "bulkhead", f"-Mroot={guest.name}/main.zig"),
        *(*_PER_MODULE, "-Mbulkhead=zig/bulkhead.zig"),
    )
    return program.read_bytes()


def build_all(cache: Path) -> dict[str, bytes]:
    """Builds all modules: file name to bytes. Raises BuildFailed."""
    check_toolchain()
    with tempfile.TemporaryDirectory(prefix="bulkhead-guests-") as out:
        return {guest.file_name: build(guest, Path(out), cache) for guest in GUESTS_TO_BUILD}


def describe(name: str, data: bytes) -> str:
    return f"{name:20} {len(data):7} bytes  sha256:{hashlib.sha256(data).hexdigest()}"


def check(built: dict[str, bytes], shipped: Path = SHIPPED) -> None:
    """Raises BuildFailed where `shipped` does not hold exactly the modules that were built."""
    problems = []
    for name, data in built.items():
        path = shipped / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.read_bytes() != data:
            problems.append(f"{path} differs\n  shipped {describe(name, path.read_bytes())}"
                            f"\n  built   {describe(name, data)}")  # fmt: skip
    if problems:
        problems.append("after changing a source, run `python guests/build.py` and commit its modules")
        raise BuildFailed("\n".join(problems))


def ship(built: dict[str, bytes], shipped: Path = SHIPPED) -> None:
    """Puts the modules where the package takes them from; each appears whole or not at all."""
    shipped.mkdir(exist_ok=True)
    for name, data in built.items():
        fresh = shipped / f".{name}.{os.getpid()}"
        fresh.write_bytes(data)
        fresh.replace(shipped / name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the demo modules into service/demo/.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the modules shipped are not these"
    )
    arguments = parser.parse_args()
    try:
        if arguments.check:
            # From nothing: a cache could hide that something is missing.
            with tempfile.TemporaryDirectory(prefix="bulkhead-zig-cache-") as cache:
                built = build_all(Path(cache))
            check(built)
        else:
            built = build_all(GUESTS / ".zig-cache")
            ship(built)
    except BuildFailed as failure:
        print(f"guests/build.py: {failure}", file=sys.stderr)
        return 1
    for name, data in built.items():
        print(describe(name, data))
    return 0


def _zig(*arguments: str) -> str:
    """Runs the compiler in the folder of the sources and returns its stdout. Raises BuildFailed."""
    # The environment must not choose another standard library or cache.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ZIG_")}
    command = [sys.executable, "-m", "ziglang", *arguments]
    done = subprocess.run(command, cwd=GUESTS, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildFailed(f"`zig {' '.join(arguments)}` failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
