"""Replies, read by Kubernetes' own code."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc
from tests.e2e.guests import TRAPPING_VALIDATE, patching, refusing, rule, saying
from tests.support.guests import TRAPPING_AUTHN, printing
from tests.support.served import REVIEWS, Served, recorded, serve

pytestmark = pytest.mark.e2e

Wat = Callable[[str], bytes]

NAMES = sorted(path.stem for path in REVIEWS.glob("*.json"))


def check(built: Path, exchanges: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What Kubernetes' types and checks find wrong."""
    lines = "".join(json.dumps(exchange) + "\n" for exchange in exchanges)
    done = subprocess.run([built / "replycheck"], input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def over_grpc(served: Served, path: str, body: bytes, module: str = "") -> bytes:
    stub = reviews_pb2_grpc.ReviewServiceStub(served.channel())
    if path.startswith("/authn"):
        return bytes(stub.Authenticate(reviews_pb2.AuthenticateRequest(review=body)).review)
    if path.startswith("/authz"):
        return bytes(stub.Authorize(reviews_pb2.AuthorizeRequest(review=body)).review)
    stage = "MUTATING" if path.startswith("/mutate") else "VALIDATING"
    number = reviews_pb2.AdmissionStage.Value(f"ADMISSION_STAGE_{stage}")
    return bytes(stub.Admit(reviews_pb2.AdmitRequest(review=body, stage=number, module=module)).review)


def test_every_recorded_request_gets_a_reply_that_kube_apiserver_takes(built: Path, tmp_path: Path) -> None:
    exchanges = []
    with serve(tmp_path) as served:
        for name in NAMES:
            document = recorded(name)
            exchanges += asked(served, name, document["path"], document["body"])
    assert len(exchanges) == 2 * len(NAMES) > 20
    assert check(built, exchanges) == []


# Modules that say all that can be said. name: (module text, more of its configuration)
_SAYING: dict[str, tuple[str, dict[str, Any]]] = {
    "patches": (
        patching({"op": "add", "path": "/changed", "value": {"~/": [1.10, None]}}),
        {"mutating": True},
    ),
    "changes-nothing": (patching(), {"mutating": True}),
    "fails-to-mutate": (TRAPPING_VALIDATE, {"mutating": True, "failurePolicy": "Ignore"}),
    "refuses": (refusing("no"), {}),
    "refuses-oddly": (saying(allowed=False, status={"code": 200, "status": "Success", "reason": "?"}), {}),
    "refuses-silently": (saying(allowed=False), {}),
    "warns": (saying(allowed=True, warnings=["a", "b\n" * 200, "c"], auditAnnotations={"k": "v"}), {}),
    "fails": (TRAPPING_VALIDATE, {}),
    "is-ignored": (TRAPPING_VALIDATE, {"failurePolicy": "Ignore"}),
}


def deciding(allowed: bool, denied: bool) -> str:
    """Answers every question about access with this."""
    status = {"allowed": allowed, "denied": denied, "reason": "because"}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "status": status}
    return printing("authz", json.dumps({"response": review}))


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory, wat: Wat) -> Iterator[Served]:
    """A Bulkhead with modules that say all that can be said, about everything."""
    folder = tmp_path_factory.mktemp("speaking")
    everything = [{**rule(["*"], "*", "*/*"), "apiVersions": ["*"]}]
    admission = [
        {"name": name, "module": f"{name}.wasm", "rules": everything, **more}
        for name, (_, more) in _SAYING.items()
    ]
    texts = {name: text for name, (text, _) in _SAYING.items()}
    texts |= {"fails-to-authenticate": TRAPPING_AUTHN, "says-both": deciding(True, True)}
    for name, text in texts.items():
        (folder / f"{name}.wasm").write_bytes(wat(text))
    configuration = {
        "authentication": {"modules": [{"module": "fails-to-authenticate.wasm"}]},
        "authorization": {"modules": [{"module": "says-both.wasm"}]},
        "admission": {"modules": admission},
    }
    (folder / "bulkhead.yaml").write_text(json.dumps(configuration))
    with serve(folder / "served", "--config", str(folder / "bulkhead.yaml")) as served:
        yield served


def asked(served: Served, name: str, path: str, body: Any, module: str = "") -> list[dict[str, Any]]:
    """The exchanges with both front ends."""
    data = json.dumps(body).encode()
    reply = served.request(path, data)
    assert reply.status == 200, reply.body
    return [
        {"name": f"{name} {transport}", "path": path, "request": body, "reply": answer.decode()}
        for transport, answer in (("https", reply.body), ("grpc", over_grpc(served, path, data, module)))
    ]


def responses(exchanges: list[dict[str, Any]], part: str) -> list[Any]:
    return [json.loads(exchange["reply"])[part] for exchange in exchanges]


@pytest.mark.parametrize("module", _SAYING)
@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_whatever_a_module_says_kube_apiserver_takes_the_reply(
    built: Path, speaking: Served, module: str, version: str
) -> None:
    stage = "mutate" if _SAYING[module][1].get("mutating") else "validate"
    exchanges = []
    for name in NAMES:
        body = recorded(name)["body"]
        # A patch cannot be used where there is no object.
        if body["kind"] == "AdmissionReview" and body["request"].get("object"):
            body["apiVersion"] = f"admission.k8s.io/{version}"
            exchanges += asked(speaking, name, f"/{stage}/{module}", body, module)
    assert len(exchanges) > 20
    assert check(built, exchanges) == []
    replies = responses(exchanges, "response")
    assert {reply["allowed"] for reply in replies} == {module not in _REFUSING}
    assert {"patch" in reply for reply in replies} == {module == "patches"}
    assert {bool(reply.get("warnings")) for reply in replies} == {
        module in ("warns", "is-ignored", "fails-to-mutate")
    }
    assert {"auditAnnotations" in reply for reply in replies} == {module == "warns"}


_REFUSING = ("refuses", "refuses-oddly", "refuses-silently", "fails")


def test_whatever_modules_say_of_tokens_and_access_kube_apiserver_takes_the_reply(
    built: Path, speaking: Served
) -> None:
    exchanges = []
    for name in NAMES:
        document = recorded(name)
        if document["body"]["kind"] != "AdmissionReview":
            exchanges += asked(speaking, name, document["path"], document["body"])
    assert len(exchanges) > 20
    assert check(built, exchanges) == []
    for status in responses(exchanges, "status"):
        assert status.get("error") or (status["denied"] and status["evaluationError"])


GOOD = {"uid": "1", "allowed": True}


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ({**GOOD, "uid": "2"}, "uid"),
        ({**GOOD, "extra": 1}, "unknown field"),
        ({**GOOD, "allowed": "yes"}, "cannot be read"),
        ({**GOOD, "patchType": "JSONPatch", "patch": "W10="}, "patch"),
        ({"uid": "1", "allowed": False}, "without a message"),
        ({"uid": "1", "allowed": False, "status": {"message": "no", "code": 200}}, "code 200"),
    ],
)
def test_the_check_finds_what_is_wrong(built: Path, response: dict[str, Any], problem: str) -> None:
    head = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
    exchange = {
        "name": "bad",
        "path": "/validate",
        "request": {**head, "request": {"uid": "1"}},
        "reply": json.dumps({**head, "response": response}),
    }
    (found,) = check(built, [exchange])
    assert problem in found["problem"]


@pytest.mark.parametrize(
    ("operations", "problem"),
    [
        ([{"op": "add", "path": "/a", "value": 1}], ""),
        ([{"op": "remove", "path": "/missing"}], "cannot be applied"),
        ({"op": "add"}, "cannot be read"),
    ],
)
def test_the_check_applies_patches(built: Path, operations: Any, problem: str) -> None:
    head = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
    patch = base64.b64encode(json.dumps(operations).encode()).decode()
    response = {**GOOD, "patchType": "JSONPatch", "patch": patch}
    exchange = {
        "name": "patched",
        "path": "/mutate",
        "request": {**head, "request": {"uid": "1", "object": {}}},
        "reply": json.dumps({**head, "response": response}),
    }
    found = [each["problem"] for each in check(built, [exchange])]
    assert [problem in each for each in found] == ([True] if problem else [])


def test_the_check_knows_contradictions(built: Path) -> None:
    head = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
    reply = json.dumps({**head, "status": {"allowed": True, "denied": True}})
    (found,) = check(built, [{"name": "both", "path": "/authz", "request": head, "reply": reply}])
    assert "both allowed and denied" in found["problem"]
