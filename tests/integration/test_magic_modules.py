"""The demo modules themselves, under plain wasmtime: what each answers to recorded and to odd requests."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.module import Abi, check_runnable, describe
from tests.support.plain_wasmtime import DEFAULT_MEMORY_BYTES, PlainWasmtime

Json = dict[str, Any]
Ask = Callable[..., Json]
AskRaw = Callable[..., Json]

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "service" / "demo"
REVIEWS = ROOT / "tests" / "data" / "reviews"
ENTRY_POINTS = {
    "magic-authn": "authn",
    "magic-authz": "authz",
    "magic-validate": "validate",
    "magic-mutate": "validate",
}
ADMISSION = sorted(path.name for path in REVIEWS.glob("admission-*.json"))
ADMISSION_MODULES = ["magic-validate", "magic-mutate"]


@pytest.fixture(scope="module")
def wasmtime(tmp_path_factory: pytest.TempPathFactory) -> PlainWasmtime:
    return PlainWasmtime(tmp_path_factory.mktemp("wasmtime"))


@pytest.fixture(scope="module")
def ask_raw(wasmtime: PlainWasmtime) -> AskRaw:
    """`ask_raw("magic-authn", b"…")` runs a module with exactly this input and returns its output."""

    def ask_with(name: str, stdin: bytes, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> Json:
        run = wasmtime.run(DEMO / f"{name}.wasm", ENTRY_POINTS[name], stdin, memory_bytes=memory_bytes)
        assert run.exit_code == 0, run.stderr
        output: Json = json.loads(run.stdout)
        return output

    return ask_with


@pytest.fixture(scope="module")
def ask(ask_raw: AskRaw) -> Ask:
    """`ask("magic-authn", review)` runs a module on a review, which may be JSON text already."""

    def ask_review(name: str, request: Json | str, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> Json:
        text = request if isinstance(request, str) else json.dumps(request, ensure_ascii=False)
        return ask_raw(name, f'{{"request":{text}}}'.encode(), memory_bytes)

    return ask_review


def recorded(name: str) -> Json:
    body: Json = json.loads((REVIEWS / name).read_text())["body"]
    return body


def config_map_review(object_text: str, **request: Any) -> str:
    """An AdmissionReview as text, since numbers must not pass through Python's."""
    fields = {"uid": "u-1", "kind": {"group": "", "version": "v1", "kind": "ConfigMap"}, **request}
    start = json.dumps(fields, ensure_ascii=False).removesuffix("}")
    return (
        '{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview",'
        f'"request":{start},"object":{object_text}}}}}'
    )


def patched_text(output: Json) -> str:
    """The text of the whole edited object in a mutating answer."""
    answer = output["response"]["response"]
    assert answer["allowed"] is True
    assert answer["patchType"] == "Full"
    return base64.b64decode(answer["patch"], validate=True).decode()


def assert_fails(output: Json, *words: str) -> None:
    assert set(output) == {"error"}
    for word in words:
        assert word in output["error"]


# The files


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_is_a_small_runnable_module_with_one_entry_point(name: str) -> None:
    data = (DEMO / f"{name}.wasm").read_bytes()
    info = describe(data, max_bytes=150_000)
    check_runnable(info, Limits())
    assert info.abi is Abi.K8S_WASM
    assert {export.name for export in info.exports} == {"memory", ENTRY_POINTS[name]}
    assert {each.name for each in info.imports} == {"fd_read", "fd_write"}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_holds_no_trace_of_the_machine_that_built_it(name: str) -> None:
    data = (DEMO / f"{name}.wasm").read_bytes()
    for trace in (b"producers", b".zig\x00", b"/home", b"/root", b"/tmp", b".debug_"):
        assert trace not in data


def test_the_four_modules_differ() -> None:
    digests = {hashlib.sha256((DEMO / f"{name}.wasm").read_bytes()).hexdigest() for name in ENTRY_POINTS}
    assert len(digests) == 4


# magic-authn


def test_authenticates_the_magic_token(ask: Ask) -> None:
    assert ask("magic-authn", recorded("tokenreview-v1-magic-token.json")) == {
        "response": {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "status": {
                "authenticated": True,
                "user": {"username": "magic-user", "uid": "0", "groups": ["magic-group"]},
            },
        }
    }


def test_does_not_authenticate_another_token(ask: Ask) -> None:
    output = ask("magic-authn", recorded("tokenreview-v1-wrong-token.json"))
    assert output["response"]["status"] == {"authenticated": False}


@pytest.mark.parametrize(
    ("token", "authenticated"),
    [
        (r'"magic\u002dtoken"', True),
        ('"magic-token "', False),
        ('"magic-toke"', False),
        (r'"magic-token\u0000"', False),
        ('"Magic-Token"', False),
        ('"mägic-token"', False),
        ('""', False),
    ],
)
def test_compares_the_whole_token(ask: Ask, token: str, authenticated: bool) -> None:
    review = f'{{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{{"token":{token}}}}}'
    assert ask("magic-authn", review)["response"]["status"]["authenticated"] is authenticated


def test_never_repeats_a_token(ask: Ask) -> None:
    review = recorded("tokenreview-v1-wrong-token.json")
    review["spec"]["token"] = "s3cret"
    assert "s3cret" not in json.dumps(ask("magic-authn", review))


# magic-authz


def test_lets_the_magic_group_do_anything_with_config_maps(ask: Ask) -> None:
    review = recorded("subjectaccessreview-v1-create-configmaps.json")
    for verb in ("create", "delete", "*"):
        review["spec"]["resourceAttributes"]["verb"] = verb
        assert ask("magic-authz", review) == {
            "response": {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "status": {"allowed": True},
            }
        }


@pytest.mark.parametrize(
    "name",
    [
        "subjectaccessreview-v1-list-deployments.json",
        "subjectaccessreview-v1-list-nodes.json",
        "subjectaccessreview-v1-list-pods-selector.json",
        "subjectaccessreview-v1-list-secrets.json",
        "subjectaccessreview-v1-nonresource-get-metrics.json",
    ],
)
def test_has_no_opinion_on_the_rest(ask: Ask, name: str) -> None:
    assert ask("magic-authz", recorded(name))["response"]["status"] == {"allowed": False}


@pytest.mark.parametrize(
    "change",
    [
        {"groups": ["system:authenticated"]},
        {"groups": []},
        {"groups": None},
        {"groups": ["magic-group-2", "magic"]},
        {"user": "magic-group", "groups": ["magic-user"]},
        {"resourceAttributes": None},
        {"resourceAttributes": {"verb": "get"}},
        {"resourceAttributes": {"verb": "get", "resource": "configmaps", "group": "example.com"}},
        {"resourceAttributes": {"verb": "get", "resource": "*"}},
    ],
)
def test_has_no_opinion_where_anything_is_different(ask: Ask, change: Json) -> None:
    review = recorded("subjectaccessreview-v1-create-configmaps.json")
    review["spec"].update(change)
    assert ask("magic-authz", review)["response"]["status"] == {"allowed": False}


# magic-validate


@pytest.mark.parametrize("name", ADMISSION)
def test_lets_recorded_requests_pass_and_repeats_their_uid(ask: Ask, name: str) -> None:
    review = recorded(name)
    assert ask("magic-validate", review) == {
        "response": {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "response": {"uid": review["request"]["uid"], "allowed": True},
        }
    }


def test_refuses_a_config_map_with_the_forbidden_key(ask: Ask) -> None:
    review = recorded("admission-validate-create-configmaps.json")
    review["request"]["object"]["data"]["not-allowed-value"] = "x"
    answer = ask("magic-validate", review)["response"]["response"]
    assert answer["uid"] == review["request"]["uid"]
    assert answer["allowed"] is False
    assert answer["status"]["code"] == 403
    assert "not-allowed-value" in answer["status"]["message"]


def test_refuses_the_forbidden_key_in_an_update(ask: Ask) -> None:
    review = recorded("admission-validate-update-configmaps.json")
    review["request"]["object"]["data"] = {"not-allowed-value": ""}
    assert ask("magic-validate", review)["response"]["response"]["allowed"] is False


def test_refuses_the_forbidden_key_however_it_is_escaped(ask: Ask) -> None:
    review = config_map_review(r'{"data":{"\u006eot-allowed\u002Dvalue":null}}')
    assert ask("magic-validate", review)["response"]["response"]["allowed"] is False


@pytest.mark.parametrize(
    "object_text",
    [
        '{"data":{"a":"not-allowed-value"}}',
        '{"data":{"not-allowed-value2":"","not-allowed":""}}',
        '{"metadata":{"labels":{"not-allowed-value":"x"}}}',
        '{"binaryData":{"not-allowed-value":"eA=="}}',
        '{"data":null}',
        "{}",
        "null",
    ],
)
def test_only_data_keys_count(ask: Ask, object_text: str) -> None:
    assert ask("magic-validate", config_map_review(object_text))["response"]["response"]["allowed"] is True


def test_looks_at_config_maps_of_the_core_group_only(ask: Ask) -> None:
    data = '{"data":{"not-allowed-value":"x"}}'
    for kind in (
        {"group": "", "version": "v1", "kind": "Secret"},
        {"group": "example.com", "version": "v1", "kind": "ConfigMap"},
    ):
        assert ask("magic-validate", config_map_review(data, kind=kind))["response"]["response"]["allowed"]


def test_lets_a_deletion_pass_whatever_the_old_object_holds(ask: Ask) -> None:
    review = recorded("admission-validate-delete-configmaps.json")
    review["request"]["oldObject"]["data"]["not-allowed-value"] = "x"
    assert ask("magic-validate", review)["response"]["response"]["allowed"] is True


# magic-mutate


@pytest.mark.parametrize("name", ADMISSION)
def test_patches_recorded_config_maps_and_nothing_else(ask: Ask, name: str) -> None:
    review = recorded(name)
    output = ask("magic-mutate", review)
    edited = review["request"]["object"]
    is_config_map = review["request"]["kind"]["kind"] == "ConfigMap" and edited is not None
    if is_config_map and edited["data"].get("magic-value") != "foobar":
        expected = copy.deepcopy(edited)
        expected["data"]["magic-value"] = "foobar"
        assert json.loads(patched_text(output)) == expected
        assert output["response"]["response"]["uid"] == review["request"]["uid"]
    else:
        assert output["response"]["response"] == {"uid": review["request"]["uid"], "allowed": True}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"data":{"a":"b"}}', '{"data":{"a":"b","magic-value":"foobar"}}'),
        ('{"data":{}}', '{"data":{"magic-value":"foobar"}}'),
        ('{"data":{ }, "z":1}', '{"data":{ "magic-value":"foobar"}, "z":1}'),
        ('{"data":null,"z":1}', '{"data":{"magic-value":"foobar"},"z":1}'),
        ('{"kind":"ConfigMap"}', '{"kind":"ConfigMap","data":{"magic-value":"foobar"}}'),
        ("{}", '{"data":{"magic-value":"foobar"}}'),
        ('{"data":{"magic-value":"old","z":"1"}}', '{"data":{"magic-value":"foobar","z":"1"}}'),
        ('{"data":{"magic-value":null}}', '{"data":{"magic-value":"foobar"}}'),
        (r'{"d\u0061ta":{"a":"}"}}', r'{"d\u0061ta":{"a":"}","magic-value":"foobar"}}'),
    ],
)
def test_adds_the_magic_value_wherever_it_is_missing(ask: Ask, before: str, after: str) -> None:
    assert patched_text(ask("magic-mutate", config_map_review(before))) == after


def test_leaves_a_config_map_alone_that_has_the_value(ask: Ask) -> None:
    review = config_map_review(r'{"data":{"magic-value":"foo\u0062ar"}}')
    assert ask("magic-mutate", review)["response"]["response"] == {"uid": "u-1", "allowed": True}


def test_is_idempotent(ask: Ask) -> None:
    once = patched_text(ask("magic-mutate", config_map_review('{"data":{"a":"b"}}')))
    assert ask("magic-mutate", config_map_review(once))["response"]["response"] == {
        "uid": "u-1",
        "allowed": True,
    }


def test_keeps_every_digit_every_escape_and_the_order_of_keys(ask: Ask) -> None:
    kept = (
        '"z":12345678901234567890,"a":1.10,"m":[1E400,-0,0.1000000000000000055,1e-7],'
        r'"s":"\u00fc\/ü \ud83d\ude00 😀 \ud800","deep":{"b":{"a":[[],{}]}},' + '"e" : [ 1 , 2 ]'
    )
    after = patched_text(ask("magic-mutate", config_map_review(f'{{{kept},"data":{{}}}}')))
    assert after == f'{{{kept},"data":{{"magic-value":"foobar"}}}}'


def test_patches_unicode_data_of_any_length(ask: Ask) -> None:
    for length in range(12):
        data = json.dumps({"ключ": "é" * length + "x" * (length % 3)}, ensure_ascii=False)
        after = patched_text(ask("magic-mutate", config_map_review(f'{{"data":{data}}}')))
        assert after == f'{{"data":{data.removesuffix("}")},"magic-value":"foobar"}}}}'


def test_patches_a_review_of_eight_mebibytes_within_the_default_memory(ask: Ask) -> None:
    data = {f"key-{number}": "x" * 1000 + "é" for number in range(8_200)}
    review = config_map_review(json.dumps({"data": data}, ensure_ascii=False))
    assert len(review.encode()) > 7.9 * 2**20
    expected = {"data": {**data, "magic-value": "foobar"}}
    assert json.loads(patched_text(ask("magic-mutate", review))) == expected


def test_eight_mebibytes_of_tiny_values_need_no_more_memory(ask: Ask) -> None:
    numbers = ",".join(["1"] * (4 * 2**20 - 200))
    after = patched_text(ask("magic-mutate", config_map_review(f'{{"n":[{numbers}]}}'), 24 << 20))
    assert after == f'{{"n":[{numbers}],"data":{{"magic-value":"foobar"}}}}'


def test_says_that_memory_ran_out(ask: Ask) -> None:
    review = config_map_review(json.dumps({"data": {"a": "x" * (2 << 20)}}))
    assert_fails(ask("magic-mutate", review, 1 << 20), "out of memory")


# What all have in common


@pytest.mark.parametrize("name", ENTRY_POINTS)
@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        (b"", "empty"),
        (b"hello", "byte 0"),
        (b'{"request":{}', "not a JSON document"),
        (b'{"request":{}} {"request":{}}', "byte 15"),
        (b'\xef\xbb\xbf{"request":{}}', "byte 0"),
        (b'{"request":{"a":"\xff"}}', "not UTF-8"),
        ('{"request":{}}'.encode("utf-16"), "not a JSON document"),
        (b"[" * 100_000, "too deeply"),
        (b"[]", '"request"'),
        (b"{}", "request: expected an object, found nothing"),
        (b'{"request":[]}', "request: expected an object, found an array"),
        (b'{"request":null}', "request"),
        (b'{"request":{},"request":{}}', "twice"),
        (b'{"request":{}}', "apiVersion: expected a string, found nothing"),
        (b'{"request":{"apiVersion":"v1","kind":"Pod"}}', "expected a "),
    ],
)
def test_explains_what_is_wrong_with_its_input(ask_raw: AskRaw, name: str, stdin: bytes, words: str) -> None:
    assert_fails(ask_raw(name, stdin), words)


@pytest.mark.parametrize(
    ("name", "review", "words"),
    [
        ("magic-authn", {"kind": "TokenReview"}, "spec.token"),
        ("magic-authn", {"kind": "TokenReview", "spec": {"token": None}}, "spec.token"),
        ("magic-authn", {"kind": "TokenReview", "spec": {"token": 7}}, "found a number"),
        ("magic-authn", {"kind": "TokenReview", "spec": "magic-token"}, "spec: expected an object"),
        ("magic-authz", {"kind": "SubjectAccessReview"}, "spec: expected an object"),
        ("magic-authz", {"kind": "SubjectAccessReview", "spec": {"groups": "magic-group"}}, "groups"),
        ("magic-validate", {"kind": "AdmissionReview"}, "request: expected an object"),
        ("magic-mutate", {"kind": "AdmissionReview", "request": {}}, "uid"),
        ("magic-mutate", {"kind": "AdmissionReview", "request": {"uid": 5}}, "found a number"),
        ("magic-validate", {"kind": "AdmissionReview", "request": {"uid": "u"}}, "kind: expected an object"),
    ],
)
def test_explains_what_is_missing_from_a_review(ask: Ask, name: str, review: Json, words: str) -> None:
    groups = {"TokenReview": "authentication", "SubjectAccessReview": "authorization"}
    group = groups.get(review["kind"], "admission")
    assert_fails(ask(name, {"apiVersion": f"{group}.k8s.io/v1", **review}), words)


@pytest.mark.parametrize("name", ADMISSION_MODULES)
@pytest.mark.parametrize(
    ("object_text", "words"),
    [
        ('{"data":[]}', "data: expected an object, found an array"),
        ('"text"', "object: expected an object, found a string"),
        ('{"data":{},"data":{"not-allowed-value":"x"}}', '"data" occurs twice'),
    ],
)
def test_gives_no_verdict_on_an_object_it_cannot_read(
    ask: Ask, name: str, object_text: str, words: str
) -> None:
    assert_fails(ask(name, config_map_review(object_text)), words)


@pytest.mark.parametrize(
    ("name", "review"),
    [
        ("magic-authn", "tokenreview-v1beta1-wrong-token.json"),
        ("magic-authz", "subjectaccessreview-v1beta1-create-configmaps.json"),
    ],
)
def test_refuses_an_api_version_that_it_was_not_written_for(ask: Ask, name: str, review: str) -> None:
    assert_fails(ask(name, recorded(review)), "expected a", "k8s.io/v1")


@pytest.mark.parametrize("settings", ["null", "{}", "[1]", '"x"', '{"a":{"request":1}}'])
def test_takes_any_settings(ask_raw: AskRaw, settings: str) -> None:
    review = json.dumps(recorded("tokenreview-v1-magic-token.json"))
    for document in (f'{{"settings":{settings},"request":{review}}}', f' {{ "request" : {review} }}\n'):
        output = ask_raw("magic-authn", document.encode())
        assert output["response"]["status"]["authenticated"] is True


def test_traps_when_its_output_cannot_be_written(wasmtime: PlainWasmtime) -> None:
    """An answer that is lost must not end in exit code 0."""
    review = json.dumps({"request": recorded("tokenreview-v1-magic-token.json")}).encode()
    with Path("/dev/full").open("wb") as full:
        run = wasmtime.run(DEMO / "magic-authn.wasm", "authn", review, stdout=full)
    assert run.exit_code == 134
