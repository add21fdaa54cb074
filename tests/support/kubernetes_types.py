"""What kube-apiserver makes of a reply: Kubernetes' own types, and the rules of its webhook clients.

The types are the models that the package lightkube-models has of Kubernetes' OpenAPI document. A field
that they do not know, or one of another type, is an error. That document has no AdmissionReview: its
fields are named here, and tests/e2e has each kind of reply read by Kubernetes' own code.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

import jsonpatch
import msgspec
from lightkube.models.authentication_v1 import TokenReviewStatus
from lightkube.models.authorization_v1 import SubjectAccessReviewStatus
from lightkube.models.meta_v1 import Status

_Json = dict[str, Any]

_STATUSES = {"TokenReview": TokenReviewStatus, "SubjectAccessReview": SubjectAccessReviewStatus}

# content.IsQualifiedName of k8s.io/apimachinery, without the prefix: the webhook's name comes there.
_QUALIFIED_NAME = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_MOST_WARNING_CHARACTERS = 120
_MOST_WARNINGS_CHARACTERS = 4096


def check_reply(path: str, sent: _Json, reply: _Json) -> None:
    """Fails unless kube-apiserver would take `reply` for an answer to the review `sent`, posted to `path`."""
    assert (reply["apiVersion"], reply["kind"]) == (sent["apiVersion"], sent["kind"])
    if sent["kind"] == "AdmissionReview":
        assert reply.keys() == {"apiVersion", "kind", "response"}
        _check_admission(sent["request"], reply["response"], mutating=path.startswith("/mutate"))
        return
    assert reply.keys() <= {"apiVersion", "kind", "metadata", "spec", "status"}
    _check_model(reply["status"], _STATUSES[sent["kind"]])
    if sent["kind"] == "TokenReview":
        _check_token(sent["spec"], reply["status"])
    else:
        status = reply["status"]
        assert not (status["allowed"] and status.get("denied")), "allowed and denied"


# Types


class _AdmissionResponse(msgspec.Struct, omit_defaults=True, rename="camel", forbid_unknown_fields=True):
    """AdmissionResponse of k8s.io/api/admission/v1 and v1beta1."""

    uid: str
    allowed: bool
    status: dict[str, Any] | None = None
    patch: str | None = None
    patch_type: str | None = None
    audit_annotations: dict[str, str] | None = None
    warnings: list[str] | None = None


def _check_model(value: _Json, model: Any) -> None:
    read = msgspec.to_builtins(msgspec.convert(value, model, strict=True))
    assert read == value, f"{value} is to {model.__name__} only {read}"  # unknown fields are gone


# Rules


def _check_token(spec: _Json, status: _Json) -> None:
    wanted = spec.get("audiences")
    if status["authenticated"]:
        assert status["user"]["username"]
        # The model has no type for it.
        msgspec.convert(status["user"].get("extra", {}), dict[str, list[str]], strict=True)
        assert "error" not in status
        if wanted:
            assert status["audiences"], "authenticated for none of the audiences that were asked for"
            assert set(status["audiences"]) <= set(wanted)
    else:
        assert status.keys() <= {"authenticated", "error"}


def _check_admission(request: _Json, response: _Json, *, mutating: bool) -> None:
    _check_model(response, _AdmissionResponse)
    assert response["uid"] == request["uid"]
    assert isinstance(response["allowed"], bool)
    if not response["allowed"]:
        # The model writes what it is.
        _check_model({"apiVersion": "v1", "kind": "Status", **response["status"]}, Status)
        assert 400 <= response["status"]["code"] <= 599  # below it would become 400
        assert response["status"]["message"]
        assert response["status"]["status"] == "Failure"
    assert ("patch" in response) == ("patchType" in response), "patch and patchType: both, or neither"
    if "patch" in response:
        assert mutating, "a patch of a validating webhook"
        assert response["allowed"], "a patch of a refused object"
        _check_patch(request.get("object"), response)
    _check_warnings(response.get("warnings", []))
    _check_annotations(response.get("auditAnnotations", {}))


def _check_patch(original: _Json | None, response: _Json) -> None:
    assert response["patchType"] == "JSONPatch"
    assert original is not None, "a patch where there is no object"
    operations = json.loads(base64.b64decode(response["patch"], validate=True))
    assert operations, "a patch that changes nothing"
    changed = jsonpatch.apply_patch(original, operations)
    assert (changed["apiVersion"], changed["kind"]) == (original["apiVersion"], original["kind"])


def _check_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        assert warning.strip()
        assert warning.isprintable(), "kube-apiserver drops warnings with control characters"
        assert len(warning) <= _MOST_WARNING_CHARACTERS
    assert sum(map(len, warnings)) <= _MOST_WARNINGS_CHARACTERS


def _check_annotations(annotations: Mapping[str, str]) -> None:
    for key in annotations:
        assert _QUALIFIED_NAME.fullmatch(key), f"{key!r} is no qualified name of at most 63 characters"
