"""Reviews, decided by real modules in real processes: chains, patches, failures, deadlines, logs."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
from structlog.testing import capture_logs

from bulkhead.sandbox import DeadlinePassed, Sandbox
from bulkhead.service.config import ConfigError, load_config
from bulkhead.service.demo import CONFIGURATION
from bulkhead.service.review import BadReview, ModuleFailed, Reviewer, Stage, Undecided
from tests.support.guests import PRELUDE, printing
from tests.support.kubernetes_types import check_reply
from tests.support.served import REVIEWS, recorded

Wat = Callable[[str], bytes]
Guests = dict[str, str]
Make = Callable[[str, Guests], Awaitable[Reviewer]]

TOKEN = "a-very-secret-token"
PASSWORD = base64.b64encode(b"correct horse").decode()
UID = "1234"
CONFIG_MAP = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "c", "namespace": "n"},
    "data": {"a": "b"},
}
EVERYTHING = '[{operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*/*"]}]'

# Turns `{"request":…}` into `{"response":…}`: the review comes back as the module saw it.
RETURNING = """(module {prelude}
  (data (i32.const 512) "{{\\22response\\22")
  (func (export "{entry}") (call $read)
    (call $write (i32.const 1) (i32.const 512) (i32.const 11))
    (call $write (i32.const 1) (i32.const 1034) (i32.sub (i32.load (i32.const 8)) (i32.const 10)))))"""
TRAPPING = """(module (memory (export "memory") 1) (func (export "{entry}") (unreachable)))"""
SPINNING = """(module (memory (export "memory") 1) (func (export "{entry}") (loop $again (br $again))))"""
SILENT = """(module (memory (export "memory") 1) (func (export "{entry}")))"""


def returning(entry: str) -> str:
    return RETURNING.format(prelude=PRELUDE, entry=entry)


class _CheckedReviewer(Reviewer):
    """Whatever it answers must be an answer to kube-apiserver, too."""

    async def authenticate(self, body: bytes, **options: Any) -> bytes:
        return _checked("/authn", body, await super().authenticate(body, **options))

    async def authorize(self, body: bytes, **options: Any) -> bytes:
        return _checked("/authz", body, await super().authorize(body, **options))

    async def admit(self, body: bytes, **options: Any) -> bytes:
        path = "/mutate" if options["stage"] is Stage.MUTATING else "/validate"
        return _checked(path, body, await super().admit(body, **options))


def _checked(path: str, body: bytes, reply: bytes) -> bytes:
    check_reply(path, json.loads(body), json.loads(reply))
    return reply


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that wasmtime is probed once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
async def make(tmp_path: Path, state_dir: Path, wat: Wat) -> AsyncIterator[Make]:
    """Builds a reviewer from a configuration and the text of the modules that it names."""
    sandboxes: list[Sandbox] = []

    async def build(configuration: str, guests: Guests) -> Reviewer:
        for name, text in guests.items():
            (tmp_path / f"{name}.wasm").write_bytes(wat(text))
        path = tmp_path / "bulkhead.yaml"
        path.write_text(configuration)
        config = load_config(path)
        sandboxes.append(await Sandbox.open(config.sandbox_options(state_dir)))
        return await _CheckedReviewer.open(config, sandboxes[-1])

    yield build
    for sandbox in sandboxes:
        await sandbox.close()


# Authentication


def token_review(version: str = "v1", **spec: Any) -> bytes:
    body = {
        "apiVersion": f"authentication.k8s.io/{version}",
        "kind": "TokenReview",
        "spec": {"token": TOKEN, **spec},
    }
    return json.dumps(body).encode()


def says_of_token(status: Any) -> str:
    response = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}
    return printing("authn", json.dumps({"response": response}))


def known_as(name: str, **status: Any) -> str:
    return says_of_token({"authenticated": True, "user": {"username": name}, **status})


def authentication(*names: str, more: str = "") -> str:
    modules = "".join(f"  - {{module: {name}.wasm}}\n" for name in names)
    return f"authentication:\n{more}  modules:\n{modules}"


UNKNOWN = says_of_token({"authenticated": False})


async def test_the_first_module_that_knows_a_token_decides(make: Make) -> None:
    guests = {"no": UNKNOWN, "ann": known_as("ann"), "bob": known_as("bob")}
    reviewer = await make(authentication("no", "ann", "bob"), guests)
    with capture_logs() as logs:
        reply = json.loads(await reviewer.authenticate(token_review("v1beta1")))
    assert reply["apiVersion"] == "authentication.k8s.io/v1beta1"
    assert reply["status"] == {"authenticated": True, "user": {"username": "ann"}}
    (event,) = [each for each in logs if each["event"] == "review"]
    assert (event["decision"], event["decided_by"], event["user"]) == ("authenticated", "ann", "ann")
    assert [module["name"] for module in event["modules"]] == ["no", "ann"]


async def test_a_failing_module_is_skipped(make: Make) -> None:
    guests = {"bad": TRAPPING.format(entry="authn"), "ann": known_as("ann")}
    reviewer = await make(authentication("bad", "ann"), guests)
    status = json.loads(await reviewer.authenticate(token_review()))["status"]
    assert status == {"authenticated": True, "user": {"username": "ann"}}


async def test_a_refusal_after_failures_says_that_it_is_no_clean_one(make: Make) -> None:
    guests = {"no": UNKNOWN, "bad": TRAPPING.format(entry="authn"), "mute": SILENT.format(entry="authn")}
    reviewer = await make(authentication("bad", "no", "mute"), guests)
    status = json.loads(await reviewer.authenticate(token_review()))["status"]
    assert status == {
        "authenticated": False,
        "error": "module bad failed: trap; module mute failed: invalid_output",
    }


async def test_a_token_is_authenticated_only_for_audiences_that_match(make: Make) -> None:
    guests = {"aware": known_as("ann", audiences=["x", "y"]), "unaware": known_as("bob")}
    reviewer = await make(authentication("aware", "unaware", more="  audiences: [api]\n"), guests)

    async def ask(*audiences: str) -> Any:
        reply = await reviewer.authenticate(token_review(audiences=list(audiences)))
        status = json.loads(reply)["status"]
        return status.get("user", {}).get("username"), status.get("audiences")

    assert await ask("y", "z") == ("ann", ["y"])
    assert await ask("api") == ("bob", ["api"])
    assert await ask("z") == (None, None)
    assert await ask() == ("ann", ["x", "y"])


async def test_without_modules_nobody_is_authenticated(make: Make) -> None:
    reviewer = await make("{}", {})
    assert json.loads(await reviewer.authenticate(token_review()))["status"] == {"authenticated": False}


# Authorization


def access_review(version: str = "v1", groups: str = "groups") -> bytes:
    spec = {"user": "ann", groups: ["g"], "resourceAttributes": {"verb": "get", "resource": "pods"}}
    body = {"apiVersion": f"authorization.k8s.io/{version}", "kind": "SubjectAccessReview", "spec": spec}
    return json.dumps(body).encode()


def says_of_access(**status: Any) -> str:
    response = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "status": status}
    return printing("authz", json.dumps({"response": response}))


def authorization(*names: str) -> str:
    return "authorization:\n  modules:\n" + "".join(f"  - {{module: {name}.wasm}}\n" for name in names)


ALLOWS = says_of_access(allowed=True, reason="member")
DENIES = says_of_access(allowed=False, denied=True)
NO_OPINION = says_of_access(allowed=False)


@pytest.mark.parametrize(
    ("guests", "status"),
    [
        ({"a": NO_OPINION, "b": ALLOWS, "c": DENIES}, {"allowed": True, "reason": "member"}),
        ({"a": NO_OPINION, "b": DENIES, "c": ALLOWS}, {"allowed": False, "denied": True}),
        ({"a": NO_OPINION, "b": NO_OPINION}, {"allowed": False}),
        (
            {"a": TRAPPING.format(entry="authz"), "b": ALLOWS},
            {"allowed": True, "reason": "member", "evaluationError": "module a failed: trap"},
        ),
        (
            {"a": says_of_access(allowed=True, denied=True)},
            {"allowed": False, "denied": True, "evaluationError": "module a both allowed and denied: denied"},
        ),
        ({}, {"allowed": False}),
    ],
)
async def test_the_first_module_that_allows_or_denies_decides(
    make: Make, guests: Guests, status: Any
) -> None:
    reviewer = await make(authorization(*guests) if guests else "{}", guests)
    assert json.loads(await reviewer.authorize(access_review()))["status"] == status


async def test_nobody_decides_where_one_failed_and_no_other_decided(make: Make) -> None:
    reviewer = await make(authorization("a", "b"), {"a": TRAPPING.format(entry="authz"), "b": NO_OPINION})
    with (
        capture_logs() as logs,
        pytest.raises(Undecided, match=r"^no module decided: module a failed: trap$"),
    ):
        await reviewer.authorize(access_review())
    assert [each["decision"] for each in logs if each["event"] == "review"] == ["undecided"]


async def test_modules_see_the_groups_of_v1beta1_as_v1_calls_them(make: Make) -> None:
    configuration = "authorization: {modules: [{module: a.wasm, debug: true, settings: {k: [1.5]}}]}"
    reviewer = await make(configuration, {"a": returning("authz")})
    with capture_logs() as logs, pytest.raises(Undecided):
        await reviewer.authorize(access_review("v1beta1", "group"))
    (debug,) = [each for each in logs if each["event"] == "module_debug"]
    assert debug["output"]["settings"] == {"k": [1.5]}
    seen = debug["output"]["response"]
    assert seen["apiVersion"] == "authorization.k8s.io/v1"
    assert seen["spec"]["groups"] == ["g"]
    assert "group" not in seen["spec"]


# Admission


def admission_review(object_: Any = CONFIG_MAP, version: str = "v1", **changes: Any) -> bytes:
    request = {
        "uid": UID,
        "operation": "CREATE",
        "resource": {"group": "", "version": "v1", "resource": "configmaps"},
        "namespace": "n",
        "object": object_,
        "oldObject": None,
        **changes,
    }
    body = {"apiVersion": f"admission.k8s.io/{version}", "kind": "AdmissionReview", "request": request}
    return json.dumps(body).encode()


def says_of_object(**response: Any) -> str:
    review = {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": UID, "allowed": True, **response},
    }
    return printing("validate", json.dumps({"response": review}))


def changes_to(patch: Any, patch_type: str) -> str:
    return says_of_object(patch=base64.b64encode(json.dumps(patch).encode()).decode(), patchType=patch_type)


def adding(key: str) -> str:
    return changes_to([{"op": "add", "path": f"/data/{key}", "value": "new"}], "JSONPatch")


def admission(*modules: str) -> str:
    """Modules as `NAME[, more keys]`, asked about everything."""
    lines = []
    for module in modules:
        name, comma, keys = module.partition(",")
        lines.append(f"  - {{module: {name}.wasm{comma}{keys}, rules: {EVERYTHING}}}\n")
    return "admission:\n  modules:\n" + "".join(lines)


async def validate(reviewer: Reviewer, body: bytes | None = None) -> Any:
    reply = json.loads(await reviewer.admit(body or admission_review(), stage=Stage.VALIDATING))
    assert reply["response"]["uid"] == UID
    return reply["response"]


async def mutate(reviewer: Reviewer, body: bytes | None = None) -> Any:
    reply = json.loads(await reviewer.admit(body or admission_review(), stage=Stage.MUTATING))
    assert reply["response"]["uid"] == UID
    return reply["response"]


def applied(response: Any, original: Any = CONFIG_MAP) -> Any:
    assert response["patchType"] == "JSONPatch"
    return jsonpatch.apply_patch(original, json.loads(base64.b64decode(response["patch"])))


async def test_all_validating_modules_are_asked_and_all_denials_told(make: Make) -> None:
    guests = {
        "a": says_of_object(allowed=False, status={"code": 422, "message": "no a"}, warnings=["wa"]),
        "b": says_of_object(warnings=["wb"], auditAnnotations={"why": "fine"}),
        "c": says_of_object(allowed=False, status={"message": "no c"}),
    }
    response = await validate(await make(admission("a", "b", "c"), guests))
    assert response == {
        "uid": UID,
        "allowed": False,
        "status": {"code": 422, "message": "a: no a; c: no c", "status": "Failure"},
        "warnings": ["a: wa", "b: wb"],
        "auditAnnotations": {"b_why": "fine"},
    }


async def test_the_reply_has_the_version_that_was_sent(make: Make) -> None:
    reviewer = await make(admission("a"), {"a": says_of_object()})
    reply = json.loads(await reviewer.admit(admission_review(version="v1beta1"), stage=Stage.VALIDATING))
    assert reply == {
        "apiVersion": "admission.k8s.io/v1beta1",
        "kind": "AdmissionReview",
        "response": {"uid": UID, "allowed": True},
    }


async def test_only_modules_whose_rules_match_are_asked(make: Make) -> None:
    denies = says_of_object(allowed=False)
    configuration = """
admission:
  modules:
  - {module: pods.wasm, rules: [{operations: ["*"], apiGroups: [""], apiVersions: [v1], resources: [pods]}]}
  - {module: norules.wasm}
"""
    reviewer = await make(configuration, {"pods": denies, "norules": denies})
    assert await validate(reviewer) == {"uid": UID, "allowed": True}
    pods = admission_review(resource={"group": "", "version": "v1", "resource": "pods"})
    assert (await validate(reviewer, pods))["allowed"] is False


async def test_each_stage_asks_its_own_modules(make: Make) -> None:
    guests = {"m": adding("m"), "v": says_of_object(allowed=False)}
    reviewer = await make(admission("m, mutating: true", "v"), guests)
    assert "patch" not in await validate(reviewer)
    assert (await mutate(reviewer))["allowed"] is True


async def test_mutating_modules_work_on_one_anothers_results(make: Make) -> None:
    renamed = {**CONFIG_MAP, "data": {"a/b": "1", "~": "2"}}
    guests = {
        "a": changes_to(renamed, "Full"),
        "b": changes_to([{"op": "replace", "path": "/data/a~1b", "value": None}], "JSONPatch"),
        "c": says_of_object(),
    }
    names = ["a, mutating: true", "b, mutating: true", "c, mutating: true, debug: true"]
    reviewer = await make(admission(*names), guests)
    with capture_logs() as logs:
        response = await mutate(reviewer)
    final = {**CONFIG_MAP, "data": {"a/b": None, "~": "2"}}
    assert applied(response) == final
    (debug,) = [each for each in logs if each["event"] == "module_debug"]
    assert debug["input"]["request"]["object"] == final


async def test_numbers_come_through_modules_as_they_were_written(make: Make) -> None:
    body = admission_review().replace(b'{"a": "b"}', b'{"n": 12345678901234567890, "x": 1.10}')
    response = await mutate(await make(admission("a, mutating: true"), {"a": adding("m")}), body)
    assert applied(response)["data"]["m"] == "new"
    patch = base64.b64decode(response["patch"])
    assert json.loads(patch) == [{"op": "add", "path": "/data/m", "value": "new"}]
    full = json.dumps(CONFIG_MAP).replace('{"a": "b"}', '{"n": 12345678901234567890, "x": 1.10}')
    said = base64.b64encode(full.encode()).decode()
    reviewer = await make(admission("f, mutating: true"), {"f": says_of_object(patch=said, patchType="Full")})
    changes = base64.b64decode((await mutate(reviewer))["patch"])
    assert b"12345678901234567890" in changes
    assert b"1.10" in changes


async def test_an_object_that_stays_the_same_gets_no_patch(make: Make) -> None:
    guests = {
        "a": changes_to(CONFIG_MAP, "Full"),
        "b": adding("m"),
        "c": changes_to([{"op": "remove", "path": "/data/m"}], "JSONPatch"),
    }
    reviewer = await make(admission(*(f"{name}, mutating: true" for name in guests)), guests)
    assert await mutate(reviewer) == {"uid": UID, "allowed": True}


async def test_a_refused_object_is_not_changed_and_not_shown_to_later_modules(make: Make) -> None:
    guests = {"a": adding("m"), "b": says_of_object(allowed=False, status={"code": 403}), "c": adding("n")}
    reviewer = await make(admission(*(f"{name}, mutating: true" for name in guests)), guests)
    with capture_logs() as logs:
        response = await mutate(reviewer)
    assert response["allowed"] is False
    assert "patch" not in response
    assert [each["name"] for each in logs[-1]["modules"]] == ["a", "b"]


async def test_a_patch_where_there_is_no_object_is_a_failure(make: Make) -> None:
    reviewer = await make(admission("a, mutating: true"), {"a": changes_to(CONFIG_MAP, "Full")})
    response = await mutate(reviewer, admission_review(None, operation="DELETE", oldObject=CONFIG_MAP))
    assert response["status"]["message"] == "module a failed: invalid_output"


FAILING = {
    "trap": TRAPPING.format(entry="validate"),
    "invalid_output": SILENT.format(entry="validate"),
    "exit_nonzero": printing("validate", '{"response":{"allowed":true}}', "(call $proc_exit (i32.const 3))"),
    "cpu_limit": SPINNING.format(entry="validate"),
    "module_error": printing("validate", '{"error": "no database at /etc/x"}'),
}


@pytest.mark.parametrize("reason", FAILING)
async def test_a_failure_denies_and_tells_only_which(make: Make, reason: str) -> None:
    configuration = "limits: {cpu: 200ms, timeout: 10s}\n" + admission("a")
    reviewer = await make(configuration, {"a": FAILING[reason]})
    with capture_logs() as logs:
        response = await validate(reviewer)
    assert response == {
        "uid": UID,
        "allowed": False,
        "status": {
            "code": 500,
            "message": f"module a failed: {reason}",
            "reason": "InternalError",
            "status": "Failure",
        },
    }
    (failed,) = [each for each in logs if each["event"] == "module_failed"]
    assert (failed["module"], failed["reason"], failed["log_level"]) == ("a", reason, "warning")


ALLOWING = json.dumps(
    {
        "response": {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "response": {"allowed": True},
        }
    }
)


async def test_output_as_asked_allows(make: Make) -> None:
    reviewer = await make(admission("a"), {"a": printing("validate", ALLOWING)})
    assert await validate(reviewer) == {"uid": UID, "allowed": True}


@pytest.mark.parametrize(
    "output",
    [
        "",
        " ",
        "null",
        "[]",
        "{}",
        '{"response": null}',
        '{"response": null, "error": null}',
        '{"response": 5}',
        '{"error": 5}',
        ALLOWING[:-1],
        ALLOWING + "{}",
        ALLOWING.replace('"allowed"', '"allowed": false, "allowed"'),
        ALLOWING.replace('"allowed"', '"uid": "other", "allowed"'),
        ALLOWING.replace("AdmissionReview", "TokenReview"),
        ALLOWING.replace("/v1", "/v1beta1"),
        ALLOWING.replace('"response"', '"x": NaN, "response"', 1),
        "\ufeff" + ALLOWING,
        '{"x": ' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"x": ' + "1" * 5_000 + "}",
        '{"x": "\\ud800"}',
    ],
)
async def test_output_that_is_not_as_asked_never_allows(make: Make, output: str) -> None:
    reviewer = await make(admission("a"), {"a": printing("validate", output)})
    response = await validate(reviewer)
    assert response["allowed"] is False
    assert response["status"]["message"] == "module a failed: invalid_output"


async def test_an_ignored_failure_allows_with_a_warning(make: Make) -> None:
    guests = {"a": FAILING["trap"], "b": adding("m")}
    names = ["a, mutating: true, failurePolicy: Ignore", "b, mutating: true"]
    response = await mutate(await make(admission(*names), guests))
    assert response["warnings"] == ["module a failed: trap; ignored"]
    assert applied(response)["data"] == {"a": "b", "m": "new"}


@pytest.mark.parametrize("stage", Stage)
async def test_a_failure_with_policy_error_is_left_to_the_cluster(make: Make, stage: Stage) -> None:
    mutating = "true" if stage is Stage.MUTATING else "false"
    module = f"a, failurePolicy: Error, mutating: {mutating}"
    reviewer = await make(admission(module), {"a": FAILING["trap"]})
    with pytest.raises(ModuleFailed, match=r"^module a failed: trap$"):
        await reviewer.admit(admission_review(), stage=stage)


async def test_a_denial_outweighs_anothers_failure(make: Make) -> None:
    guests = {"a": FAILING["trap"], "b": says_of_object(allowed=False, status={"message": "no"})}
    response = await validate(await make(admission("a, failurePolicy: Error", "b"), guests))
    assert (response["allowed"], response["status"]["message"]) == (False, "b: no")


# Deadlines and overload


async def test_nothing_is_run_once_the_deadline_has_passed(make: Make) -> None:
    reviewer = await make(admission("a"), {"a": says_of_object()})
    with capture_logs() as logs, pytest.raises(DeadlinePassed):
        await reviewer.admit(admission_review(), stage=Stage.VALIDATING, deadline=time.monotonic() - 1)
    assert logs == []


async def test_a_module_that_does_not_end_is_a_timeout_before_the_deadline(make: Make) -> None:
    configuration = "limits: {timeout: 60s, cpu: 60s}\n" + admission("a")
    reviewer = await make(configuration, {"a": SPINNING.format(entry="validate")})
    deadline = time.monotonic() + 2.0
    reply = await reviewer.admit(admission_review(), stage=Stage.VALIDATING, deadline=deadline)
    assert json.loads(reply)["response"]["status"]["message"] == "module a failed: timeout"
    assert time.monotonic() < deadline


async def test_an_overloaded_sandbox_is_a_failure_of_the_module(make: Make) -> None:
    limits = "limits: {maxConcurrentRuns: 1, maxQueuedRuns: 0, cpu: 1s, timeout: 60s}\n"
    configuration = limits + admission("a")
    reviewer = await make(configuration, {"a": SPINNING.format(entry="validate")})
    messages = sorted(
        each["status"]["message"] for each in await asyncio.gather(*(validate(reviewer) for _ in range(3)))
    )
    assert messages == [
        "module a failed: cpu_limit",
        "module a failed: overloaded",
        "module a failed: overloaded",
    ]


async def test_a_cancelled_review_leaves_no_run_behind(make: Make) -> None:
    configuration = "limits: {timeout: 60s, cpu: 60s}\n" + admission("a", "b")
    spinning = SPINNING.format(entry="validate")
    reviewer = await make(configuration, {"a": spinning, "b": spinning})
    task = asyncio.create_task(validate(reviewer))
    await reached(reviewer.sandbox, active_runs=2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await reached(reviewer.sandbox, active_runs=0)
    assert reviewer.sandbox.waiting_runs == 0


async def reached(sandbox: Sandbox, active_runs: int) -> None:
    """Waits for a number of runs. Generous: only a failure takes long."""
    async with asyncio.timeout(30):
        while sandbox.active_runs != active_runs:  # noqa: ASYNC110 - nothing tells when it changes
            await asyncio.sleep(0.01)


# Bad input


async def test_a_bad_review_is_refused_before_any_module_is_asked(make: Make) -> None:
    reviewer = await make(admission("a"), {"a": says_of_object()})
    with capture_logs() as logs:
        with pytest.raises(BadReview, match="expected a TokenReview"):
            await reviewer.authenticate(admission_review())
        with pytest.raises(BadReview, match="expected a SubjectAccessReview"):
            await reviewer.authorize(token_review())
        with pytest.raises(BadReview, match="expected an AdmissionReview"):
            await reviewer.admit(access_review(), stage=Stage.VALIDATING)
    assert logs == []


async def test_a_large_review_is_answered(make: Make) -> None:
    large = {**CONFIG_MAP, "data": {f"key-{number}": "x" * 50 for number in range(20_000)}}
    body = admission_review(large)
    assert len(body) > 1 << 20
    assert (await validate(await make(admission("a"), {"a": says_of_object()}), body))["allowed"] is True
    with pytest.raises(BadReview, match='the key "key-7" is there twice'):
        await (await make("{}", {})).admit(body.replace(b'"key-9"', b'"key-7"'), stage=Stage.VALIDATING)


# Logs


def logged(logs: list[Any]) -> str:
    return json.dumps(logs, default=repr)


async def test_a_token_is_never_logged_whatever_a_module_does_with_it(make: Make) -> None:
    shouting = f"""(module {PRELUDE} (func (export "authn") (call $read)
      (call $write (i32.const 2) (i32.const 1024) (i32.load (i32.const 8)))
      (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 8))) (unreachable)))"""
    leaking = says_of_token({"authenticated": False, "error": f"cannot check {TOKEN}"})
    erring = printing("authn", json.dumps({"error": f"cannot check {TOKEN}"}))
    guests = {"shouting": shouting, "leaking": leaking, "erring": erring, "returning": returning("authn")}
    modules = "".join(f"  - {{module: {name}.wasm, debug: true}}\n" for name in guests)
    reviewer = await make("authentication:\n  modules:\n" + modules, guests)
    with capture_logs() as logs:
        reply = await reviewer.authenticate(token_review())
    assert len([each for each in logs if each["event"] == "module_debug"]) == 4
    assert TOKEN not in logged(logs)
    assert TOKEN not in reply.decode()


async def test_the_contents_of_a_secret_are_never_logged(make: Make) -> None:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": "n"},
        "data": {"p": PASSWORD},
    }
    resource = {"group": "", "version": "v1", "resource": "secrets"}
    quoting = says_of_object(allowed=False, status={"message": f"{PASSWORD} is weak, so is correct horse"})
    guests = {"a": returning("validate"), "b": quoting, "c": changes_to(secret, "Full")}
    reviewer = await make(admission(*(f"{name}, debug: true" for name in guests)), guests)
    with capture_logs() as logs:
        await validate(reviewer, admission_review(secret, resource=resource))
    text = logged(logs)
    assert len([each for each in logs if each["event"] == "module_debug"]) == 3
    assert PASSWORD not in text
    assert "correct horse" not in text
    assert "is weak" in text


async def test_each_decision_is_one_event_with_what_it_took(make: Make) -> None:
    reviewer = await make(admission("a", "b"), {"a": says_of_object(), "b": FAILING["trap"]})
    with capture_logs() as logs:
        await validate(reviewer, admission_review(userInfo={"username": "ann"}, name="c"))
    (event,) = [each for each in logs if each["event"] == "review"]
    wanted = {
        "kind": "AdmissionReview", "stage": "validating", "uid": UID, "decision": "denied",
        "operation": "CREATE", "resource": "configmaps", "namespace": "n", "name": "c", "user": "ann",
        "code": 500,
    }  # fmt: skip
    assert {key: event[key] for key in wanted} == wanted
    assert [(each["name"], each["outcome"]) for each in event["modules"]] == [("a", "ok"), ("b", "trap")]
    assert all(each["wall_seconds"] > 0 and each["cpu_seconds"] > 0 for each in event["modules"])


# Opening


async def test_every_module_that_cannot_be_used_is_told_with_its_line(make: Make) -> None:
    configuration = """
authentication:
  modules:
  - module: good.wasm
  - {name: other, module: admitting.wasm}
admission:
  modules:
  - module: admitting.wasm
  - module: returns.wasm
"""
    guests = {
        "good": UNKNOWN,
        "admitting": says_of_object(),
        "returns": SILENT.format(entry="validate").replace(")))", ") (result i32) (i32.const 0)))"),
    }
    with pytest.raises(ConfigError) as caught:
        await make(configuration, guests)
    told = [(problem.line, problem.where) for problem in caught.value.problems]
    assert told == [(5, "authentication.modules[1].module"), (9, "admission.modules[1].module")]
    first, second = (problem.message for problem in caught.value.problems)
    assert first.startswith("module other: the module has no export 'authn'")
    assert second.startswith("module returns: ")


async def test_a_file_that_is_no_module_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "text.wasm").write_text("(module)")
    with pytest.raises(
        ConfigError, match=r"bulkhead\.yaml:3: authentication\.modules\[0\]\.module: module text: "
    ):
        await make("authentication:\n  modules:\n  - module: text.wasm\n", {})


async def test_tells_which_modules_it_has(make: Make) -> None:
    guests = {"n": UNKNOWN, "v": says_of_object()}
    reviewer = await make(authentication("n") + admission("v"), guests)
    told = [(each.section, each.name, each.entry_point) for each in reviewer.modules]
    assert told == [("authentication", "n", "authn"), ("admission", "v", "validate")]
    assert all(each.digest.startswith("sha256:") for each in reviewer.modules)


# What a real kube-apiserver sent, answered by the demo

RECORDED = sorted(path.stem for path in REVIEWS.glob("*.json"))


async def test_the_demo_answers_every_recorded_review(state_dir: Path) -> None:
    config = load_config(CONFIGURATION)
    decisions = {}
    async with await Sandbox.open(config.sandbox_options(state_dir)) as sandbox:
        reviewer = await _CheckedReviewer.open(config, sandbox)
        for name in RECORDED:
            sent = recorded(name)
            reply = json.loads(await answer(reviewer, sent["path"], json.dumps(sent["body"]).encode()))
            assert (reply["kind"], reply["apiVersion"]) == (sent["body"]["kind"], sent["body"]["apiVersion"])
            decisions[name] = decision(reply)
    assert {name for name, decided in decisions.items() if decided == "authenticated"} == {
        "tokenreview-v1-magic-token"
    }
    assert {name for name, decided in decisions.items() if decided == "patched"} == {
        "admission-mutate-create-configmaps",
        "admission-mutate-create-configmaps-dryrun",
    }
    assert {name for name, decided in decisions.items() if decided == "allowed"} == {
        name
        for name in RECORDED
        if name.startswith("admission-validate") or (name.startswith("subject") and "configmaps" in name)
    }


async def answer(reviewer: Reviewer, path: str, body: bytes) -> bytes:
    match path.partition("?")[0]:
        case "/authn":
            return await reviewer.authenticate(body)
        case "/authz":
            return await reviewer.authorize(body)
        case "/mutate":
            return await reviewer.admit(body, stage=Stage.MUTATING)
        case _:
            return await reviewer.admit(body, stage=Stage.VALIDATING)


def decision(reply: Any) -> str:
    said = reply.get("status") or reply.get("response")
    if said.get("authenticated"):
        return "authenticated"
    if said.get("patch"):
        return "patched"
    return "allowed" if said.get("allowed") else "refused"
