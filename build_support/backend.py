"""The build backend: setuptools, after making what is not Python.

Two things are made inside the source tree, where an editable install finds them and a wheel takes
them from: the protobuf code (src/bulkhead/v1) from proto/, and the spawner and its library
(sandbox/native/bin) from C. A system compiler builds them; where there is none, the build asks pip for
ziglang, a compiler in a wheel. BULKHEAD_CC overrides the choice: a command such as `clang`, or `zig`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

_ROOT = Path(__file__).resolve().parent.parent
_ZIG = "ziglang==0.17.1"
# The oldest glibc that the project supports; only zig can build for another than the machine's.
_ZIG_TARGET = f"{platform.machine()}-linux-gnu.2.28"
_C_FLAGS = [
    "-std=c11", "-O2", "-g0", "-fstack-protector-strong",
    "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wstrict-prototypes", "-Wmissing-prototypes",
]  # fmt: skip
# What is built: the program or library, its sources, its flags.
_NATIVE = {
    "bulkhead-spawner": (
        ("spawner.c", "programs.c", "process.c", "runs.c", "zygotes.c", "confine.c"),
        ("-fPIE",),
    ),
    "libbulkhead-zygote.so": (
        ("zygote.c", "confine.c"),
        ("-shared", "-fPIC", "-fvisibility=hidden", "-ldl", "-lpthread"),
    ),
}
_PROTO_PACKAGE = (
    '"""Generated from proto/bulkhead/v1 by the build: messages and clients of the gRPC API."""\n'
)

Settings = dict[str, Any] | None


def _compiler() -> list[str]:
    """The command that compiles C; raises SystemExit with what to do where there is none."""
    chosen = os.environ.get("BULKHEAD_CC", "")
    if chosen and chosen != "zig":
        return shlex.split(chosen)
    for name in () if chosen else ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang") is None:
        raise SystemExit(f"no C compiler: install one (Debian: gcc libc6-dev) or `pip install {_ZIG}`")
    return [sys.executable, "-m", "ziglang", "cc", "-target", _ZIG_TARGET]


def _needs_zig() -> bool:
    chosen = os.environ.get("BULKHEAD_CC", "")
    return chosen == "zig" or not (chosen or any(map(shutil.which, ("cc", "gcc", "clang"))))


def compiler_command() -> list[str]:
    """The compiler with the flags that all of our C is built with."""
    return [*_compiler(), *_C_FLAGS]


def build_native() -> None:
    """Compiles sandbox/native: the spawner, and the library that it preloads into wasmtime."""
    native = _ROOT / "src" / "bulkhead" / "sandbox" / "native"  # there in an sdist, too
    (native / "bin").mkdir(exist_ok=True)
    for name, (sources, flags) in _NATIVE.items():
        target = native / "bin" / name
        fresh = target.with_name(f"{name}.{os.getpid()}")
        files = [str(native / source) for source in sources]
        command = [*compiler_command(), *files, *flags, "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"compiling {name} failed: {shlex.join(command)}\n{done.stderr}")
        fresh.replace(target)  # never in place: a service that runs from this tree has it mapped


def generate_protobuf() -> None:
    """Generates Python code and type stubs for proto/bulkhead/v1 into src/bulkhead/v1.

    Made elsewhere and moved file by file: a service that runs from this tree never finds it half made.
    """
    from grpc_tools import protoc

    package = _ROOT / "src" / "bulkhead" / "v1"
    package.mkdir(exist_ok=True)
    # The plugin of mypy-protobuf is found beside the Python that builds.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    includes = [f"-I{_ROOT / 'proto'}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    files = [str(path) for path in sorted((_ROOT / "proto").rglob("*.proto"))]
    with tempfile.TemporaryDirectory(dir=package.parent, prefix=".generating-") as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        if protoc.main(["protoc", *includes, *outputs, *files]) != 0:
            raise SystemExit("generating the protobuf code failed")
        made = Path(out) / "bulkhead" / "v1"
        (made / "__init__.py").write_text(_PROTO_PACKAGE)
        fresh = {path.name for path in made.iterdir()}
        for path in made.iterdir():
            path.replace(package / path.name)
    for stale in package.glob("*.py*"):
        if stale.name not in fresh:
            stale.unlink()


def _prepare() -> None:
    generate_protobuf()
    build_native()


def _compiler_requirement() -> list[str]:
    return [_ZIG] if _needs_zig() else []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler_requirement()]


def build_wheel(
    directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _prepare()
    # No extension module, so any Python; a program of this platform, so not any platform.
    name = f"linux_{platform.machine()}"
    settings = {**(config_settings or {}), "--build-option": ["--plat-name", name]}
    return build_meta.build_wheel(directory, settings, metadata_directory)


def build_editable(
    directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _prepare()
    return build_meta.build_editable(directory, config_settings, metadata_directory)
