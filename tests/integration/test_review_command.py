"""`bulkhead review`, as it is used from a shell."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonpatch
import pytest

from tests.support.guests import PRELUDE, printing
from tests.support.kubernetes_types import check_reply
from tests.support.served import REVIEWS, command, recorded

Done = subprocess.CompletedProcess[str]
Wat = Callable[[str], bytes]

DEMO = str(files("bulkhead.service.demo") / "bulkhead.yaml")
TOKEN = "a-very-secret-token"
EVERYTHING = 'rules: [{operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*/*"]}]'
TALKING = f"""(module {PRELUDE} (data (i32.const 200) "no database\\0a\\1b[2Jat all")
  (func (export "validate") (call $write (i32.const 2) (i32.const 200) (i32.const 22)) (unreachable)))"""
SHOUTING = f"""(module {PRELUDE} (func (export "authn") (call $read)
  (call $write (i32.const 2) (i32.const 1024) (i32.load (i32.const 8))) (unreachable)))"""

CONFIG_MAP = """
apiVersion: v1
kind: ConfigMap
metadata: {name: c}
data: {a: b}
"""
REFUSED_CONFIG_MAP = CONFIG_MAP.replace("a: b", "not-allowed-value: x")


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shared, so that wasmtime is probed once."""
    return str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def review(state_dir: str, tmp_path: Path) -> Callable[..., Done]:
    """Runs the command; the first argument is the text of its file, or the file."""

    def run(content: str | Path, *options: str, config: str | Path = DEMO) -> Done:
        path = content if isinstance(content, Path) else tmp_path / "review.yaml"
        if isinstance(content, str):
            path.write_text(content)
        line = command("review", str(path), "--config", str(config), "--state-dir", state_dir, *options)
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def configured(tmp_path: Path, wat: Wat) -> Callable[..., Path]:
    """Writes a configuration and the modules that it names."""

    def write(configuration: str, **guests: str) -> Path:
        for name, text in guests.items():
            (tmp_path / f"{name}.wasm").write_bytes(wat(text))
        path = tmp_path / "bulkhead.yaml"
        path.write_text(configuration)
        return path

    return write


def said(kind: str, group: str, **content: Any) -> str:
    return json.dumps({"response": {"apiVersion": f"{group}.k8s.io/v1", "kind": kind, **content}})


def admitting(**response: Any) -> str:
    return printing("validate", said("AdmissionReview", "admission", response={"allowed": True, **response}))


def admission(*modules: str) -> str:
    return "admission:\n  modules:\n" + "".join(f"  - {{{module}, {EVERYTHING}}}\n" for module in modules)


def document(done: Done) -> Any:
    found = json.loads(done.stdout)
    assert found["exitCode"] == done.returncode
    return found


def modules_of(stage: Any) -> dict[str, Any]:
    return {module["name"]: module for module in stage["modules"]}


# What is answered


def test_changes_an_object_and_refuses_the_result(review: Callable[..., Done]) -> None:
    done = review(REFUSED_CONFIG_MAP)
    assert done.returncode == 3, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == ('DENIED 403: magic-validate: data key "not-allowed-value" is not allowed in a ConfigMap')
    assert "+  magic-value: foobar" in rest
    assert any(line.startswith("  magic-mutate ") and "changed the object" in line for line in rest)
    assert any(line.startswith("  magic-validate ") and "denied: data key" in line for line in rest)
    assert "guessed: resource configmaps, in namespace default, user bulkhead-review" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_validating_modules_see_what_the_mutating_ones_made(
    review: Callable[..., Done], configured: Callable[..., Path]
) -> None:
    changed = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "c", "namespace": "default"},
        "data": {"n": "m"},
    }
    patch = base64.b64encode(json.dumps(changed).encode()).decode()
    echo = f"""(module {PRELUDE} (func (export "validate") (call $read)
      (call $write (i32.const 2) (i32.const 1024) (i32.load (i32.const 8)))))"""
    config = configured(
        admission("module: m.wasm, mutating: true", "module: v.wasm"),
        m=admitting(patch=patch, patchType="Full"),
        v=echo,
    )
    (one,) = document(review(CONFIG_MAP, "--json", config=config))["reviews"]
    seen = json.loads(modules_of(one["stages"][1])["v"]["stderr"])["request"]
    assert seen["request"]["object"] == changed
    assert jsonpatch.apply_patch({**changed, "data": {"a": "b"}}, one["stages"][0]["patch"]) == changed


@pytest.mark.parametrize(
    ("name", "exit_code", "decision"),
    [
        ("tokenreview-v1-magic-token", 0, "AUTHENTICATED as magic-user in magic-group"),
        ("tokenreview-v1beta1-wrong-token", 3, "NOT AUTHENTICATED"),
        ("subjectaccessreview-v1-create-configmaps", 0, "ALLOWED"),
        ("subjectaccessreview-v1-list-nodes", 4, "NO OPINION"),
        ("admission-mutate-create-configmaps", 0, "ALLOWED"),
        ("admission-validate-delete-pods", 0, "ALLOWED"),
    ],
)
def test_answers_recorded_requests(
    review: Callable[..., Done], name: str, exit_code: int, decision: str
) -> None:
    done = review(REVIEWS / f"{name}.json")
    assert done.returncode == exit_code, done.stderr
    assert done.stdout.startswith(decision)


def test_prints_the_reply_that_kube_apiserver_would_get(review: Callable[..., Done]) -> None:
    sent = recorded("admission-mutate-create-configmaps")
    done = review(REVIEWS / "admission-mutate-create-configmaps.json", "--reply")
    check_reply(sent["path"], sent["body"], json.loads(done.stdout))
    both = review(REVIEWS / "admission-mutate-create-configmaps.json", "--reply", "--stage", "both")
    mutated, validated = map(json.loads, both.stdout.splitlines())
    assert mutated == json.loads(done.stdout)
    check_reply("/validate", sent["body"], validated)


def test_answers_each_document_and_exits_with_the_worst(review: Callable[..., Done]) -> None:
    token = json.dumps(recorded("tokenreview-v1-magic-token")["body"])
    access = json.dumps(recorded("subjectaccessreview-v1-list-nodes")["body"])
    done = review(f"{token}\n---\n{access}\n---{REFUSED_CONFIG_MAP}")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1] == "3 reviews: 1 authenticated, 1 no opinion, 1 denied"
    assert review(f"{token}\n---\n{access}").returncode == 4
    assert review(f"# twice\n---\n{token}\n---\n{token}").returncode == 0


def test_reads_standard_input(state_dir: str) -> None:
    line = command("review", "-", "--config", DEMO, "--state-dir", state_dir, "--json")
    done = subprocess.run(line, input=CONFIG_MAP, capture_output=True, text=True, timeout=60)
    (one,) = document(done)["reviews"]
    assert (one["source"], one["decision"]) == ("standard input", "allowed")


# Why


def test_says_who_was_not_asked_and_why(review: Callable[..., Done], configured: Callable[..., Path]) -> None:
    pods = '[{operations: [CREATE], apiGroups: [""], apiVersions: [v1], resources: [pods]}]'
    config = configured(
        admission("module: a.wasm, mutating: true", "name: b, module: a.wasm, mutating: true")
        + f"  - {{name: pods, module: a.wasm, mutating: true, rules: {pods}}}\n"
        "  - {name: norules, module: a.wasm}\n",
        a=admitting(allowed=False, status={"code": 422, "message": "no"}),
    )
    done = review(CONFIG_MAP, "--json", config=config)
    assert done.returncode == 3
    mutating, validating = document(done)["reviews"][0]["stages"]
    assert {name: module["said"] for name, module in modules_of(mutating).items()} == {
        "a": "denied: no",
        "b": "not asked: a had ended the chain",
        "pods": "not asked: its rules do not match: resources",
    }
    assert validating["decision"] == "not_asked"
    assert validating["reply"] is None
    only = document(review(CONFIG_MAP, "--json", "--stage", "validate", config=config))
    (validating,) = only["reviews"][0]["stages"]
    assert modules_of(validating)["norules"]["said"] == "not asked: it has no rules"


def test_tells_what_each_module_took(review: Callable[..., Done]) -> None:
    (one,) = document(review(CONFIG_MAP, "--json"))["reviews"]
    module = modules_of(one["stages"][0])["magic-mutate"]
    assert module["wallSeconds"] > 0
    assert module["cpuSeconds"] > 0
    assert module["peakMemoryBytes"] > 0
    assert (module["asked"], module["failure"], module["stderr"]) == (True, None, None)


def test_asks_one_module_only(review: Callable[..., Done]) -> None:
    (one,) = document(review(REFUSED_CONFIG_MAP, "--json", "--module", "magic-mutate"))["reviews"]
    assert [stage["stage"] for stage in one["stages"]] == ["mutating"]
    assert one["decision"] == "allowed"


def test_shows_the_operator_what_a_failing_module_wrote(
    review: Callable[..., Done], configured: Callable[..., Path]
) -> None:
    config = configured(admission("module: talking.wasm"), talking=TALKING)
    done = review(CONFIG_MAP, config=config)
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert lines[0] == "DENIED 500: module talking failed: trap"
    assert "        no database" in lines
    assert "         [2Jat all" in lines  # no escape sequence of a module reaches a terminal
    assert "wasm `unreachable` instruction executed" in done.stdout
    assert "failed: trap (failurePolicy: Fail)" in done.stdout
    reply = review(CONFIG_MAP, "--reply", "--stage", "validate", config=config).stdout
    assert json.loads(reply)["response"]["status"]["message"] == "module talking failed: trap"
    assert "database" not in reply


def test_a_failure_that_is_left_to_the_cluster_is_no_reply(
    review: Callable[..., Done], configured: Callable[..., Path]
) -> None:
    config = configured(admission("module: talking.wasm, failurePolicy: Error"), talking=TALKING)
    done = review(CONFIG_MAP, config=config)
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED: module talking failed: trap")
    assert "no reply: HTTP 500" in done.stdout
    assert done.stderr == ""
    done = review(CONFIG_MAP, "--reply", "--stage", "validate", config=config)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no reply: HTTP 500: module talking failed: trap" in done.stderr


def test_warnings_and_audit_annotations_are_shown(
    review: Callable[..., Done], configured: Callable[..., Path]
) -> None:
    ok = admitting(warnings=["old api"], auditAnnotations={"why": "fine"})
    config = configured(admission("module: ok.wasm"), ok=ok)
    lines = review(CONFIG_MAP, config=config).stdout.splitlines()
    assert lines[lines.index("warnings") + 1] == "  ok: old api"
    assert lines[lines.index("audit annotations") + 1] == "  ok_why: fine"


def test_a_token_is_never_shown(review: Callable[..., Done], configured: Callable[..., Path]) -> None:
    erring = said("TokenReview", "authentication", status={"error": f"cannot check {TOKEN}"})
    config = configured(
        "authentication: {modules: [{module: shouting.wasm}, {module: erring.wasm}]}",
        shouting=SHOUTING,
        erring=printing("authn", erring),
    )
    sent = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": TOKEN}}
    for options in ([], ["--json"], ["--reply"]):
        done = review(json.dumps(sent), *options, config=config)
        assert done.returncode == 1  # nobody could tell: no clean refusal
        assert TOKEN not in done.stdout + done.stderr
    assert review(json.dumps(sent), config=config).stdout.startswith("FAILED: module shouting failed: trap; ")


def test_an_undecided_access_review_is_a_failure(
    review: Callable[..., Done], configured: Callable[..., Path]
) -> None:
    config = configured(
        "authorization: {modules: [{module: bad.wasm}]}", bad=TALKING.replace('"validate"', '"authz"')
    )
    done = review(REVIEWS / "subjectaccessreview-v1-list-nodes.json", "--json", config=config)
    assert done.returncode == 1
    (stage,) = document(done)["reviews"][0]["stages"]
    assert stage["fault"]["httpStatus"] == 503
    assert modules_of(stage)["bad"]["stderr"].startswith("no database")


def test_there_are_colours_on_a_terminal(state_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "review.yaml"
    path.write_text(CONFIG_MAP)
    here, there = pty.openpty()
    line = command("review", str(path), "--config", DEMO, "--state-dir", state_dir)
    environment = {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm"}
    done = subprocess.run(line, stdout=there, stderr=subprocess.PIPE, timeout=60, env=environment)
    os.close(there)
    shown = os.read(here, 1 << 16)
    os.close(here)
    assert done.returncode == 0, done.stderr
    assert shown.startswith(b"\x1b[1;32mALLOWED")


# What is wrong


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (Path("/nonexistent"), [], "cannot read the file: No such file"),
        ("{", [], "not YAML"),
        ("just: words", [], "expected a Kubernetes object or a review"),
        (CONFIG_MAP, ["--module", "nobody"], "expected one of magic-mutate, magic-validate"),
        (CONFIG_MAP, ["--module", "magic-mutate", "--stage", "validate"], "no validating module"),
        (CONFIG_MAP, ["--json", "--reply"], "choose one of them"),
        (CONFIG_MAP, ["--operation", "UPDATE"], "needs --old"),
        (CONFIG_MAP, ["--operation", "create"], "--operation"),
        (REVIEWS / "tokenreview-v1-magic-token.json", ["--stage", "mutate"], "is for AdmissionReviews"),
        (REVIEWS / "tokenreview-v1-magic-token.json", ["--user", "ann"], "holds no plain object"),
    ],
)
def test_says_what_is_wrong_with_a_call(
    review: Callable[..., Done], content: str | Path, options: list[str], message: str
) -> None:
    done = review(content, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_says_what_is_wrong_with_the_configuration(review: Callable[..., Done], tmp_path: Path) -> None:
    config = tmp_path / "bulkhead.yaml"
    config.write_text("limits: {memory: lots}\nauthentication: {modules: [{module: nothing.wasm}]}\n")
    done = review(CONFIG_MAP, config=config)
    assert done.returncode == 2
    assert "bulkhead.yaml:1: limits.memory" in done.stderr


def test_refuses_what_serving_would_refuse(
    review: Callable[..., Done], configured: Callable[..., Path]
) -> None:
    config = configured("server: {maxBodyBytes: 1Ki}")
    done = review(CONFIG_MAP.replace("a: b", f"a: {'b' * 2000}"), config=config)
    assert done.returncode == 2
    assert "at most 1024 bytes (server.maxBodyBytes)" in done.stderr


def test_explains_itself() -> None:
    done = subprocess.run(command("review", "--help"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for words in ("Exit codes", "3  denied, not authenticated", "--operation"):
        assert words in done.stdout
