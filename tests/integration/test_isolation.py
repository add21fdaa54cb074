"""Hosts that do not allow everything: what is done without, and that it can be refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead.sandbox import LAYER_NAMES, Layer, find_layers, names_of, parse_layers
from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.isolation import require_layers
from tests.support.guests import printing

# Namespaces of namespaces can be forbidden by whoever is root in the outer one.
_WITHOUT_NAMESPACES = ("unshare", "--user", "--map-root-user", "sh", "-c")
_FORBID = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" "$@"'


def bulkhead(*arguments: str, without_namespaces: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bulkhead.service.cli", *arguments]
    if without_namespaces:
        if shutil.which("unshare") is None:
            pytest.skip("needs unshare (Debian: util-linux)")
        probe = subprocess.run([*_WITHOUT_NAMESPACES, _FORBID, "true"], capture_output=True)
        if probe.returncode != 0:
            pytest.skip("needs user namespaces, to make one in which there are no others")
        command = [*_WITHOUT_NAMESPACES, _FORBID, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    return {each["what"]: each for each in json.loads(done.stdout)["findings"]}


def test_doctor_tells_each_layer(tmp_path: Path) -> None:
    found = findings(bulkhead("doctor", "--json", "--state-dir", str(tmp_path)))
    assert {f"isolation: {name}" for name in LAYER_NAMES} <= set(found)
    works = {f"isolation: {each.name}": each.works for each in find_layers()}
    assert {what: found[what]["state"] == "ok" for what in works} == works


def test_what_does_not_work_is_told_and_done_without(tmp_path: Path, wat: Callable[[str], bytes]) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    done = bulkhead("doctor", "--json", *state, without_namespaces=True)
    found = findings(done)
    for name in ("namespaces", "empty-root"):
        finding = found[f"isolation: {name}"]
        assert finding["state"] == "degraded"
        assert "new namespaces" in finding["found"]
        assert "user.max_user_namespaces" in finding["advice"]
    for name in ("limits", "no-new-privs", "capabilities", "landlock", "seccomp"):
        assert found[f"isolation: {name}"]["state"] == "ok", "which needs no namespaces"
    assert found["zygotes"]["state"] == "ok"
    module = tmp_path / "module.wasm"
    module.write_bytes(wat(printing("hello", "still isolated")))
    ran = bulkhead("run", *state, "--entry", "hello", str(module), without_namespaces=True)
    assert (ran.returncode, ran.stdout) == (0, "still isolated"), ran.stderr


def test_a_layer_that_is_required_and_does_not_work_is_a_reason_not_to_start(tmp_path: Path) -> None:
    config = tmp_path / "bulkhead.yaml"
    config.write_text("isolation: {require: [seccomp, namespaces]}\n")
    options = ("check", "--config", str(config), "--state-dir", str(tmp_path / "state"))
    assert bulkhead(*options).returncode == 0
    refused = bulkhead(*options, without_namespaces=True)
    assert refused.returncode != 0
    assert "isolation that is required does not work here: namespaces (clone" in refused.stderr
    assert "seccomp" not in refused.stderr.partition("does not work here: ")[2].partition(";")[0]
    assert "Traceback" not in refused.stderr


def test_a_layer_that_is_not_one_is_named(tmp_path: Path) -> None:
    config = tmp_path / "bulkhead.yaml"
    config.write_text("isolation:\n  require: [seccomp, firewall]\n")
    done = bulkhead("check", "--config", str(config), "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 2
    assert "bulkhead.yaml:2: isolation.require[1]: expected one of limits, " in done.stderr
    assert "got 'firewall'" in done.stderr


def test_layers_have_names() -> None:
    assert parse_layers(["seccomp", "empty-root"]) == Layer.SECCOMP | Layer.EMPTY_ROOT
    assert names_of(Layer.SECCOMP | Layer.EMPTY_ROOT) == ["empty-root", "seccomp"]
    assert parse_layers(LAYER_NAMES) == Layer(sum(Layer))
    with pytest.raises(ValueError, match="no isolation layer 'firewall'"):
        parse_layers(["firewall"])
    require_layers(Layer(0), 0)
    with pytest.raises(SandboxError, match="does not work here: landlock"):
        require_layers(Layer.LANDLOCK | Layer.LIMITS, Layer.LIMITS)
