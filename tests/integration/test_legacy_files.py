"""The configuration files of k8s-wasm, with the flags that its API server has, and the demo modules."""

from __future__ import annotations

import json
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from tests.support.served import command, serve, wait_until

DEMO = Path(str(files("bulkhead.service.demo")))
TOKEN_REVIEW = {
    "apiVersion": "authentication.k8s.io/v1",
    "kind": "TokenReview",
    "spec": {"token": "magic-token"},
}
RULES = """
  rules:
  - operations: ["CREATE", "UPDATE"]
    apiGroups: [""]
    apiVersions: ["v1"]
    resources: ["configmaps"]
"""


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files and the one that the third names, with modules by absolute and by relative paths."""
    (tmp_path / "authn.conf").write_text(f"modules:\n- module: {DEMO}/magic-authn.wasm\n")
    document = {"modules": [{"name": "Magic Authz", "module": f"{DEMO}/magic-authz.wasm"}]}
    (tmp_path / "authz.conf").write_text(json.dumps(document, indent="\t"))
    (tmp_path / "admission.conf").write_text("""
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: PodSecurity
  configuration: {kind: PodSecurityConfiguration}
- name: WASM
  path: wasm.conf
""")
    (tmp_path / "magic_mutate.wasm").write_bytes((DEMO / "magic-mutate.wasm").read_bytes())
    (tmp_path / "wasm.conf").write_text(
        f"modules:\n- module: magic_mutate.wasm\n  mutating: true{RULES}"
        f"- name: magic-validation\n  module: {DEMO}/magic-validate.wasm{RULES}"
    )
    return tmp_path


def flags(folder: Path) -> list[str]:
    return [
        f"--authentication-wasm-config-file={folder}/authn.conf",
        f"--authorization-wasm-config-file={folder}/authz.conf",
        f"--admission-control-config-file={folder}/admission.conf",
    ]


def bulkhead(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, cwd="/")


def test_check_lists_the_modules_with_their_files_and_notes(folder: Path, state_dir: str) -> None:
    done = bulkhead("check", "--state-dir", state_dir, *flags(folder))
    assert done.returncode == 0, done.stderr
    *modules, last = done.stdout.splitlines()
    assert [(line.split()[0], line.split()[1], line.split()[3]) for line in modules] == [
        ("authentication", "magic-authn", f"{folder}/authn.conf"),
        ("authorization", "magic-authz", f"{folder}/authz.conf"),
        ("admission", "magic-mutate", f"{folder}/wasm.conf"),
        ("admission", "magic-validation", f"{folder}/wasm.conf"),
    ]
    assert last.endswith("are good: 4 modules")
    assert done.stderr.replace(f"{folder}/", "").splitlines() == [
        "note: authn.conf:2: modules[0].name: 'magic-authn.wasm' has the name magic-authn here",
        "note: authz.conf:4: modules[0].name: 'Magic Authz' has the name magic-authz here",
        "note: admission.conf:5: plugins[0]: ignored: the plugin PodSecurity is kube-apiserver's own",
        "note: wasm.conf:2: modules[0].name: 'magic_mutate.wasm' has the name magic-mutate here",
    ]


def test_check_counts_one_module_as_one(folder: Path, state_dir: str) -> None:
    done = bulkhead("check", "--state-dir", state_dir, flags(folder)[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{folder}/authn.conf is good: 1 module"
    assert "authn.conf" not in done.stdout.splitlines()[0]  # there is no other


def test_check_tells_every_problem_of_all_files(folder: Path, state_dir: str) -> None:
    (folder / "authn.conf").write_text("modules: [{module: none.wasm, debug: 1}]")
    (folder / "authz.conf").unlink()
    (folder / "bulkhead.yaml").write_text("limit: {}\n")
    done = bulkhead("check", "--state-dir", state_dir, "--config", f"{folder}/bulkhead.yaml", *flags(folder))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.replace(f"{folder}/", "").splitlines()
    assert [line.partition(": expected")[0] for line in lines] == [
        "authz.conf: cannot read the file: No such file or directory",
        "bulkhead.yaml:1: limit",
        "authn.conf:1: modules[0].debug",
        "authn.conf:1: modules[0].module",
        "bulkhead: the configuration has 4 problems",
    ]


def test_check_points_at_a_module_that_cannot_be_used(folder: Path, state_dir: str) -> None:
    (folder / "magic_mutate.wasm").write_bytes(b"no module")
    done = bulkhead("check", "--state-dir", state_dir, *flags(folder))
    assert done.returncode == 2
    assert f"{folder}/wasm.conf:2: modules[0].module: module magic-mutate: " in done.stderr


def test_check_needs_a_configuration(state_dir: str) -> None:
    done = bulkhead("check", "--state-dir", state_dir)
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_check_says_which_modules_are_never_asked(folder: Path, state_dir: str) -> None:
    (folder / "wasm.conf").write_text("modules:\n- {name: a, module: magic_mutate.wasm}\n")
    done = bulkhead("check", "--state-dir", state_dir, flags(folder)[2])
    assert done.returncode == 0
    assert f"note: {folder}/wasm.conf:2: modules[0]: module a is never asked: it has no rules" in done.stderr


def test_review_reads_the_files_as_well(folder: Path, state_dir: str) -> None:
    (folder / "map.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {not-allowed-value: x}\n"
    )
    done = bulkhead("review", f"{folder}/map.yaml", "--state-dir", state_dir, *flags(folder))
    assert done.returncode == 3, done.stderr
    assert "magic-validation" in done.stdout


def test_they_are_served_and_watched(folder: Path) -> None:
    with serve(folder / "served", *flags(folder)) as served:
        assert [each["name"] for each in served.ready["modules"]] == [
            "magic-authn",
            "magic-authz",
            "magic-mutate",
            "magic-validation",
        ]
        assert served.review("/authn", TOKEN_REVIEW)["status"]["user"]["username"] == "magic-user"
        assert "has the name magic-mutate here" in served.log()
        (folder / "wasm.conf").write_text("modules: []\n")
        wait_until(lambda: '"generation": 2' in (folder / "served" / "ready.json").read_text(), "a reload")
        ready = json.loads((folder / "served" / "ready.json").read_text())
        assert [each["name"] for each in ready["modules"]] == ["magic-authn", "magic-authz"]
