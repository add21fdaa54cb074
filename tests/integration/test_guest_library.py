"""The library for module authors, the build of the demo modules, and the page that describes both."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.plain_wasmtime import PlainWasmtime

ROOT = Path(__file__).resolve().parents[2]
GUESTS = ROOT / "guests"
PAGE = ROOT / "docs" / "module-specification.md"
needs_zig = pytest.mark.skipif(find_spec("ziglang") is None, reason="needs ziglang; ./dev test installs it")


def zig(*arguments: str, folder: Path, cache: Path) -> None:
    """Runs the compiler, and fails with its words if it does."""
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments,
         "--cache-dir", str(cache), "--global-cache-dir", str(cache)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zig-cache")


@needs_zig
@pytest.mark.slow
def test_the_library_passes_its_own_tests_in_wasmtime(tmp_path: Path, cache: Path) -> None:
    program = tmp_path / "tests.wasm"
    zig(
        *("test", "-target", "wasm32-wasi", "-O", "safe", "--test-no-exec"),
        *(f"-femit-bin={program}", "zig/tests.zig"),
        folder=GUESTS,
        cache=cache,
    )
    run = PlainWasmtime(tmp_path).run(program, None)
    assert run.exit_code == 0, run.stderr
    assert re.search(r"All \d+ tests passed", run.stderr)


@needs_zig
@pytest.mark.slow
def test_the_documented_zig_module_builds_and_answers(tmp_path: Path, cache: Path) -> None:
    """The page's example, built with the page's command line."""
    sections = PAGE.read_text().split("### Zig\n")[1]
    source = re.search(r"```zig\n(.*?)```", sections, re.DOTALL)
    command = re.search(r"python -m ziglang (.*?)\n\n", sections, re.DOTALL)
    assert source is not None
    assert command is not None
    (tmp_path / "team.zig").write_text(source[1])
    shutil.copytree(GUESTS / "zig", tmp_path / "guests" / "zig")
    zig(*command[1].replace("\\\n", " ").split(), folder=tmp_path, cache=cache)

    review = (
        b'{"request":{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u",'
        b'"kind":{"group":"","kind":"Pod"},"object":{"metadata":{"labels":{%s}}}}},'
        b'"settings":{"label":"team"}}'
    )
    wasmtime = PlainWasmtime(tmp_path)
    refused = wasmtime.run(tmp_path / "team.wasm", "validate", review % b'"app":"x"')
    assert b'"allowed":false' in refused.stdout
    assert b'the label \\"team\\" is missing' in refused.stdout
    allowed = wasmtime.run(tmp_path / "team.wasm", "validate", review % b'"team":"x"')
    assert b'"allowed":true' in allowed.stdout
    without = wasmtime.run(tmp_path / "team.wasm", "validate", b'{"request":{}}')
    assert b'{"error":"' in without.stdout


@needs_zig
@pytest.mark.slow
def test_the_demo_modules_are_what_their_sources_build() -> None:
    done = run_build(GUESTS, "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sha256:") == 4


@needs_zig
@pytest.mark.slow
def test_the_check_names_a_module_that_differs_or_is_missing(tmp_path: Path) -> None:
    """Also shows that the folder of a checkout does not change what is built."""
    checkout = tmp_path / "another folder"
    shutil.copytree(GUESTS, checkout / "guests", ignore=shutil.ignore_patterns(".zig-cache"))
    demo = checkout / "service" / "demo"
    demo.mkdir(parents=True)
    for name in ("magic-authn.wasm", "magic-authz.wasm", "magic-validate.wasm"):
        shutil.copy(ROOT / "service" / "demo" / name, demo)
    with (demo / "magic-authz.wasm").open("ab") as module:
        module.write(b"\x00")
    done = run_build(checkout / "guests", "--check")
    assert done.returncode == 1
    assert "magic-authz.wasm differs" in done.stderr
    assert "magic-mutate.wasm is missing" in done.stderr
    assert "magic-authn.wasm" not in done.stderr
    assert "magic-validate.wasm" not in done.stderr


def test_the_build_says_which_toolchain_to_install(tmp_path: Path) -> None:
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").touch()
    (tmp_path / "ziglang" / "__main__.py").write_text("print('0.1.0')")

    done = subprocess.run(
        [sys.executable, str(GUESTS / "build.py")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ziglang here is 0.1.0" in done.stderr
    assert "pip install ziglang==" in done.stderr


def run_build(guests: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(guests / "build.py"), *arguments], capture_output=True, text=True, check=False
    )
