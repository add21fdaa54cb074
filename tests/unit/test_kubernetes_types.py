"""The checker of replies finds what kube-apiserver would not take."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest

from tests.support.kubernetes_types import check_reply

UID = "f86bef2b"
OBJECT = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "b"}}
REVIEW = {
    "apiVersion": "admission.k8s.io/v1",
    "kind": "AdmissionReview",
    "request": {"uid": UID, "operation": "CREATE", "object": OBJECT},
}
TOKEN = {
    "apiVersion": "authentication.k8s.io/v1beta1",
    "kind": "TokenReview",
    "spec": {"token": "t", "audiences": ["a"]},
}
ACCESS = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {"user": "u"}}
USER = {"username": "u", "uid": "1", "groups": ["g"], "extra": {"k": ["v"]}}
STATUS = {"code": 403, "message": "no", "status": "Failure", "reason": "Forbidden"}


def encoded(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


PATCH = encoded([{"op": "add", "path": "/data/x", "value": "y"}])


def check_admission(path: str, response: Any, sent: Any = REVIEW) -> None:
    check_reply(path, sent, {"apiVersion": sent["apiVersion"], "kind": sent["kind"], "response": response})


def check_status(sent: Any, status: Any) -> None:
    reply = {
        "apiVersion": sent["apiVersion"],
        "kind": sent["kind"],
        "metadata": {},
        "spec": {},
        "status": status,
    }
    check_reply("/", sent, reply)


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_takes_what_kube_apiserver_takes(version: str) -> None:
    sent = {**REVIEW, "apiVersion": f"admission.k8s.io/{version}"}
    check_admission("/validate", {"uid": UID, "allowed": True}, sent)
    check_admission("/validate", {"uid": UID, "allowed": False, "status": STATUS}, sent)
    changing = {"uid": UID, "allowed": True, "patch": PATCH, "patchType": "JSONPatch", "warnings": ["w"]}
    check_admission("/mutate", {**changing, "auditAnnotations": {"module_key": "v"}}, sent)
    check_status(TOKEN, {"authenticated": True, "user": USER, "audiences": ["a"]})
    check_status(TOKEN, {"authenticated": False, "error": "could not tell"})
    check_status(ACCESS, {"allowed": False, "denied": True, "reason": "r", "evaluationError": "e"})


@pytest.mark.parametrize(
    ("path", "response"),
    [
        ("/validate", {"uid": "another", "allowed": True}),
        ("/validate", {"uid": UID}),
        ("/validate", {"uid": UID, "allowed": "true"}),
        ("/validate", {"uid": UID, "allowed": True, "unknown": 1}),
        ("/validate", {"uid": UID, "allowed": True, "patch": PATCH, "patchType": "JSONPatch"}),
        ("/validate", {"uid": UID, "allowed": True, "patch": "", "patchType": ""}),
        ("/mutate", {"uid": UID, "allowed": True, "patch": PATCH}),
        ("/mutate", {"uid": UID, "allowed": True, "patchType": "JSONPatch"}),
        ("/mutate", {"uid": UID, "allowed": True, "patch": PATCH, "patchType": "Full"}),
        ("/mutate", {"uid": UID, "allowed": True, "patch": "[]", "patchType": "JSONPatch"}),
        ("/mutate", {"uid": UID, "allowed": True, "patch": encoded([]), "patchType": "JSONPatch"}),
        (
            "/mutate",
            {
                "uid": UID,
                "allowed": True,
                "patch": encoded([{"op": "remove", "path": "/x"}]),
                "patchType": "JSONPatch",
            },
        ),
        (
            "/mutate",
            {"uid": UID, "allowed": False, "status": STATUS, "patch": PATCH, "patchType": "JSONPatch"},
        ),
        ("/validate", {"uid": UID, "allowed": False}),
        ("/validate", {"uid": UID, "allowed": False, "status": {**STATUS, "code": 200}}),
        ("/validate", {"uid": UID, "allowed": False, "status": {**STATUS, "code": "403"}}),
        ("/validate", {"uid": UID, "allowed": False, "status": {**STATUS, "why": "x"}}),
        ("/validate", {"uid": UID, "allowed": True, "warnings": ["a\nb"]}),
        ("/validate", {"uid": UID, "allowed": True, "warnings": ["x" * 121]}),
        ("/validate", {"uid": UID, "allowed": True, "warnings": ["x" * 120] * 35}),
        ("/validate", {"uid": UID, "allowed": True, "warnings": "w"}),
        ("/validate", {"uid": UID, "allowed": True, "auditAnnotations": {"a/b": "v"}}),
        ("/validate", {"uid": UID, "allowed": True, "auditAnnotations": {"x" * 64: "v"}}),
        ("/validate", {"uid": UID, "allowed": True, "auditAnnotations": {"a": 1}}),
    ],
)
def test_finds_what_is_wrong_with_an_admission_reply(path: str, response: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - an assertion, or what a reader of types raises
        check_admission(path, response)


def test_finds_a_patch_where_there_is_no_object() -> None:
    deleting = copy.deepcopy(REVIEW)
    deleting["request"]["object"] = None  # type: ignore[index]
    with pytest.raises(AssertionError, match="no object"):
        check_admission(
            "/mutate", {"uid": UID, "allowed": True, "patch": PATCH, "patchType": "JSONPatch"}, deleting
        )


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (TOKEN, {"authenticated": True}),
        (TOKEN, {"authenticated": True, "user": USER}),
        (TOKEN, {"authenticated": True, "user": USER, "audiences": ["b"]}),
        (TOKEN, {"authenticated": True, "user": {**USER, "groups": "g"}, "audiences": ["a"]}),
        (TOKEN, {"authenticated": True, "user": {**USER, "extra": {"k": "v"}}, "audiences": ["a"]}),
        (TOKEN, {"authenticated": True, "user": {**USER, "name": "u"}, "audiences": ["a"]}),
        (TOKEN, {"authenticated": False, "user": USER}),
        (TOKEN, {"authenticated": 0}),
        (ACCESS, {"allowed": True, "denied": True}),
        (ACCESS, {"allowed": True, "because": "x"}),
        (ACCESS, {"denied": True}),
        (ACCESS, {"allowed": None}),
    ],
)
def test_finds_what_is_wrong_with_a_status(sent: Any, status: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - an assertion, or what a reader of types raises
        check_status(sent, status)


def test_finds_another_version() -> None:
    with pytest.raises(AssertionError):
        check_reply("/validate", REVIEW, {**REVIEW, "apiVersion": "admission.k8s.io/v1beta1"})
