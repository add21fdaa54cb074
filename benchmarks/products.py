"""Programs and modules that the benchmarks build from their sources, and keep for the next time."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
_ROOT = HERE.parent
_GO = HERE / "go"
_POLICY = HERE / "guests" / "pod-policy"
_NATIVE = _ROOT / "sandbox" / "native"
_RUST_TARGET = "wasm32-wasip1"


class Missing(Exception):
    """A toolchain is not here, or cannot get what it needs. Says which."""


def go_programs() -> Path:
    """The folder with `load` and `wazeroserver`. Raises Missing."""

    def build(out: Path) -> None:
        _go("-o", f"{out}/", "./load", "./wazeroserver")

    return _kept("go", [*_GO.glob("go.*"), *_GO.glob("load/*"), *_GO.glob("wazeroserver/*")], build)


def go_policy() -> Path:
    """The module written in Go, the largest one. Raises Missing."""

    def build(out: Path) -> None:
        _go("-buildmode=c-shared", "-o", str(out / "policy.wasm"), "./gopolicy", GOOS="wasip1", GOARCH="wasm")

    return _kept("go-policy", [_GO / "go.mod", *_GO.glob("gopolicy/*")], build) / "policy.wasm"


def _go(*arguments: str, **variables: str) -> None:
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise Missing("there is no Go")
    # Of the checkout nothing but these sources is meant: no workspace above it, no version control.
    settings = {"GOFLAGS": "-mod=readonly -buildvcs=false", "GOWORK": "off", "GOTOOLCHAIN": "local"}
    environment = {**os.environ, **settings, "CGO_ENABLED": "0", **variables}
    command = [go, "build", "-ldflags", "-s -w", *arguments]
    _run(command, "Go 1.26 or later and a Go module proxy", cwd=_GO, environment=environment)


def pod_policy() -> Path:
    """The module written in Rust. Raises Missing."""
    cargo = shutil.which("cargo") or shutil.which("cargo", path=Path.home() / ".cargo" / "bin")
    if cargo is None:
        raise Missing("there is no cargo")

    def build(out: Path) -> None:
        with tempfile.TemporaryDirectory() as target:
            command = [cargo, "build", "--locked", "--release", "--target", _RUST_TARGET]
            environment = {**os.environ, "CARGO_TARGET_DIR": target}
            _run(command, f"the Rust target {_RUST_TARGET}", cwd=_POLICY, environment=environment)
            shutil.copy(Path(target) / _RUST_TARGET / "release" / "pod_policy.wasm", out)

    return _kept("pod-policy", _POLICY.rglob("*"), build) / "pod_policy.wasm"


def c_program(name: str, *native: str) -> Path:
    """A C program of this folder, linked with sources of the sandbox."""
    sources = [HERE / name, *(_NATIVE / each for each in native)]

    def build(out: Path) -> None:
        sys.path.insert(0, str(_ROOT / "build_support"))
        import backend  # type: ignore[import-not-found]

        command = [*backend.compiler_command(), f"-I{_NATIVE}", "-o", str(out / "program")]
        subprocess.run([*command, *map(str, sources)], check=True)

    return _kept(name, [*sources, *_NATIVE.glob("*.h")], build) / "program"


def _run(command: list[str], needs: str, *, cwd: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise Missing(f"cannot build {cwd.name}, which needs {needs}: {done.stderr.strip()[-500:]}")


def _kept(kind: str, sources: Iterable[Path], build: Callable[[Path], None]) -> Path:
    """The folder with what `build` makes of the sources; built once for each state of them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkhead" / "benchmarks"
    folder = cache / f"{kind}-{_digest(sources)}"
    if folder.exists():
        return folder
    print(f"bench: building {kind}, once", file=sys.stderr, flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        made = Path(name) / kind
        made.mkdir()
        build(made)
        made.rename(folder)
    return folder


def _digest(sources: Iterable[Path]) -> str:
    state = hashlib.sha256()
    for file in sorted(sources):
        if file.is_file() and "target" not in file.parts:
            state.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return state.hexdigest()[:16]
