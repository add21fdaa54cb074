"""`bulkhead run`, `inspect` and `doctor`, as they are used from a shell."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from tests.support.guests import ECHO, ENDINGS, printing
from tests.support.served import command

DEMO = Path(str(files("bulkhead.service.demo")))
REVIEW = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "magic-token"}}


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wat: Callable[[str], bytes]) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "echo.wasm").write_bytes(wat(ECHO))
    (folder / "endings.wasm").write_bytes(wat(ENDINGS))
    return folder


def bulkhead(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=60, env=environment)


def run(state_dir: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return bulkhead("run", "--state-dir", state_dir, *arguments, stdin=stdin)


def test_runs_a_module_with_bytes_in_and_out(state_dir: str, folder: Path) -> None:
    stdin = bytes(range(256))
    done = run(state_dir, str(folder / "echo.wasm"), stdin=stdin)
    assert (done.returncode, done.stdout) == (0, stdin)
    assert done.stderr.startswith(b"ok: ")
    assert done.stderr.count(b"\n") == 1
    for word in (b"wall", b"cpu", b"peak"):
        assert word in done.stderr


@pytest.mark.parametrize("wrapped", [True, False])
def test_hands_a_review_to_a_module_as_it_expects_it(state_dir: str, wrapped: bool) -> None:
    stdin = json.dumps({"request": REVIEW} if wrapped else REVIEW).encode()
    done = run(state_dir, str(DEMO / "magic-authn.wasm"), "--entry", "authn", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["response"]["status"]["authenticated"] is True


def test_adds_settings_to_a_review(state_dir: str, tmp_path: Path, wat: Callable[[str], bytes]) -> None:
    module = tmp_path / "echo-authn.wasm"
    module.write_bytes(wat(ECHO.replace('"_start"', '"authn"')))
    (tmp_path / "settings.json").write_text('{"a": [1, 2]}')
    for settings in ('{"a":[1,2]}', f"@{tmp_path / 'settings.json'}"):
        done = run(state_dir, str(module), "--settings", settings, stdin=json.dumps(REVIEW).encode())
        assert json.loads(done.stdout) == {"request": REVIEW, "settings": {"a": [1, 2]}}


@pytest.mark.parametrize(
    ("entry_point", "options", "exit_code", "outcome"),
    [
        ("exit", [], 10, b"exit_nonzero"),
        ("trap", [], 11, b"trap"),
        ("sleep", ["--timeout", "100ms"], 12, b"timeout"),
        ("spin", ["--cpu", "50ms"], 13, b"cpu_limit"),
        ("spin", ["--fuel", "1000"], 11, b"trap"),
        ("flood", ["--stdout", "1Ki"], 15, b"stdout_limit"),
    ],
)
def test_says_the_outcome_with_its_exit_code(
    state_dir: str, folder: Path, entry_point: str, options: list[str], exit_code: int, outcome: bytes
) -> None:
    done = run(state_dir, str(folder / "endings.wasm"), "--entry", entry_point, *options)
    assert done.returncode == exit_code
    assert done.stderr.splitlines()[-1].startswith(outcome + b": ")


def test_passes_the_modules_own_words_on(state_dir: str, folder: Path) -> None:
    done = run(state_dir, str(folder / "endings.wasm"), "--entry", "words")
    assert done.stderr.startswith(b"words of the guest\n")
    assert b"unreachable" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"trap: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{folder}/nothing.wasm"], "No such file"),
        (["{folder}/endings.wasm"], "--entry"),
        (["{folder}/endings.wasm", "--entry", "nobody"], "nobody"),
        (["{folder}/echo.wasm", "--memory", "lots"], "--memory"),
        (["{folder}/echo.wasm", "--timeout", "2"], "--timeout"),
        (["{folder}/echo.wasm", "--settings", "{{}}"], "--settings"),
        (["{folder}/echo.wasm", "--memory", "64Ki"], "memory"),
        (["sha256:" + "0" * 64], "module"),
        (["/etc/passwd"], "not a WebAssembly module"),
    ],
)
def test_says_what_is_wrong_with_a_call(
    state_dir: str, folder: Path, arguments: list[str], expected: str
) -> None:
    done = run(state_dir, *(argument.format(folder=folder) for argument in arguments))
    assert done.returncode == 2
    assert expected in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_inspects_a_module_for_people_and_for_programs(state_dir: str) -> None:
    path = str(DEMO / "magic-authz.wasm")
    for_people = bulkhead("inspect", "--state-dir", state_dir, path)
    assert for_people.returncode == 0
    for word in (b"sha256:", b"k8s-wasm", b"wasi_snapshot_preview1.fd_read", b"() -> ()"):
        assert word in for_people.stdout
    document = json.loads(bulkhead("inspect", "--state-dir", state_dir, path, "--json").stdout)
    assert document["digest"].startswith("sha256:")
    assert document["runnable"] is True
    assert {"name": "authz", "kind": "func", "signature": "() -> ()", "runnable": True} in document["exports"]


def test_says_why_a_module_cannot_be_run(state_dir: str, tmp_path: Path, wat: Callable[[str], bytes]) -> None:
    path = tmp_path / "policy.wasm"
    path.write_bytes(
        wat(
            '(module (import "wapc" "__host_call" (func)) (memory (export "memory") 1)'
            ' (func (export "__guest_call") (param i32 i32) (result i32) (i32.const 1))'
            ' (@custom "io.kubewarden.metadata" "{\\"protocolVersion\\":\\"v1\\"}"))'
        )
    )
    done = bulkhead("inspect", "--state-dir", state_dir, str(path), "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 2
    assert document["abi"] == "kubewarden-wapc"
    assert document["kubewardenMetadata"] == {"protocolVersion": "v1"}
    assert document["refusal"]["reason"] == "UNKNOWN_IMPORT"
    assert b"UNKNOWN_IMPORT" in bulkhead("inspect", "--state-dir", state_dir, str(path)).stdout


def test_names_of_a_guest_cannot_play_with_the_terminal(
    state_dir: str, tmp_path: Path, wat: Callable[[str], bytes]
) -> None:
    path = tmp_path / "rude.wasm"
    path.write_bytes(wat(printing("\\1b[2J[red]gotcha", "x")))
    done = bulkhead("inspect", "--state-dir", state_dir, str(path))
    assert b"\x1b[2J" not in done.stdout
    assert b"[red]gotcha" in done.stdout


def test_checks_a_configuration_without_serving_it(state_dir: str) -> None:
    done = bulkhead("check", "--state-dir", state_dir, "--config", str(DEMO / "bulkhead.yaml"))
    assert done.returncode == 0, done.stderr
    assert b"magic-authn" in done.stdout
    assert b"is good: 4 modules" in done.stdout


def test_tells_every_problem_of_a_configuration(
    state_dir: str, tmp_path: Path, wat: Callable[[str], bytes]
) -> None:
    path = tmp_path / "bulkhead.yaml"
    path.write_text("limits: {memory: lots}\nserver: {port: 1}\n")
    done = bulkhead("check", "--state-dir", state_dir, "--config", str(path))
    assert done.returncode == 2
    for place in (b":1: limits.memory", b":2: server.port", b"has 2 problems"):
        assert place in done.stderr
    (tmp_path / "echo.wasm").write_bytes(wat(ECHO))
    (tmp_path / "text.wasm").write_text("(module)")
    path.write_text(
        "authentication: {modules: [{module: echo.wasm}]}\nadmission: {modules: [{module: text.wasm}]}\n"
    )
    done = bulkhead("check", "--state-dir", state_dir, "--config", str(path))
    assert done.returncode == 2
    for word in (b"module echo", b"authn", b"module text", b"not a WebAssembly module"):
        assert word in done.stderr


def test_the_doctor_says_what_it_found(state_dir: str) -> None:
    done = bulkhead("doctor", "--state-dir", state_dir)
    assert done.returncode == 0
    for word in (b"wasmtime", b"49.0.3", b"runner", b"flags", b"pidfd", b"Bulkhead can serve here"):
        assert word in done.stdout
    document = json.loads(bulkhead("doctor", "--state-dir", state_dir, "--json").stdout)
    assert document["canServe"] is True
    assert {"what", "state", "found", "advice"} == set(document["findings"][0])


def test_the_doctor_says_what_to_do_when_nothing_can_be_run(state_dir: str, tmp_path: Path) -> None:
    done = bulkhead("doctor", "--state-dir", state_dir, "--wasmtime", str(tmp_path))
    assert done.returncode == 1
    assert b"not a wasmtime program" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["serve"], ["run"], ["inspect"], ["doctor"], ["check"]])
def test_every_command_explains_itself(arguments: list[str]) -> None:
    done = bulkhead(*arguments, "--help")
    assert done.returncode == 0
    assert b"Usage: " in done.stdout
