"""etcd and an unmodified kube-apiserver, built from their published modules and kept for the next time."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "go"
_KUBERNETES = "k8s.io/kubernetes"
_PACKAGES = (f"{_KUBERNETES}/cmd/kube-apiserver", "./etcd", "./replycheck")


class CannotBuild(Exception):
    """There is no Go, or it cannot get the modules. Says what is missing."""


def programs() -> Path:
    """The folder with `kube-apiserver`, `etcd` and `replycheck`.

    Raises CannotBuild, and CalledProcessError where a program does not compile.
    """
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise CannotBuild("needs Go, to build kube-apiserver and etcd: install Go 1.26 or later")
    folder = _cache() / _digest()
    if not (folder / "done").exists():
        _build(go, folder)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkhead" / "e2e"


def _digest() -> str:
    """Changes with all that the programs are made of."""
    state = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*")):
        if file.is_file():
            state.update(str(file.relative_to(SOURCES)).encode() + b"\0" + file.read_bytes() + b"\0")
    return state.hexdigest()[:16]


def _build(go: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    version = _version()
    package = "k8s.io/component-base/version"
    major, minor = version[1:].split(".")[:2]
    flags = (
        f"-s -w -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    )
    # Of the checkout nothing but these sources is meant: no workspace above it, no version control.
    settings = {"GOFLAGS": "-mod=readonly -buildvcs=false", "GOWORK": "off", "GOTOOLCHAIN": "local"}
    environment = {**os.environ, **settings, "CGO_ENABLED": "0"}
    _say(f"building kube-apiserver {version} and etcd: some ten minutes the first time, then never again")
    if subprocess.run([go, "mod", "download"], cwd=SOURCES, env=environment).returncode != 0:
        raise CannotBuild(
            "`go mod download` failed: to build kube-apiserver and etcd it needs Go 1.26 or later and,"
            " the first time, a Go module proxy (GOPROXY)"
        )
    for each in _PACKAGES:
        _say(f"building {each}")
        command = [go, "build", "-ldflags", flags, "-o", f"{folder}/", each]
        subprocess.run(command, cwd=SOURCES, env=environment, check=True)
    (folder / "done").touch()


def _version() -> str:
    for line in (SOURCES / "go.mod").read_text().splitlines():
        name, _, version = line.strip().partition(" ")
        if name == _KUBERNETES:
            return version
    raise AssertionError(f"{SOURCES / 'go.mod'} does not require {_KUBERNETES}")


def _say(text: str) -> None:
    print(f"e2e: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(programs())
    except CannotBuild as error:
        sys.exit(f"e2e: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"e2e: `go build {error.cmd[-1]}` failed; see above")
