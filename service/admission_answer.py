"""What one module says of an AdmissionReview, and the object that it wants instead."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, replace

import msgspec
from msgspec import Raw

from bulkhead.service import patch, strictjson
from bulkhead.service.call import Unreadable
from bulkhead.service.patch import BadPatch
from bulkhead.service.strictjson import NotStrict
from bulkhead.service.versions import ReviewType
from bulkhead.service.words import clean

ADMISSION_REVIEW = ReviewType("AdmissionReview", "admission.k8s.io")

MOST_MESSAGE_CHARACTERS = 2048
MOST_REASON_CHARACTERS = 64

_PATCH = "response.response.patch"


class _Status(msgspec.Struct):
    code: int | None = None
    message: str | None = None
    reason: str | None = None


class _Said(msgspec.Struct, rename="camel"):
    allowed: bool
    uid: str | None = None
    status: _Status | None = None
    patch: str | None = None
    patch_type: str | None = None
    warnings: list[str] | None = None
    audit_annotations: dict[str, str] | None = None


class _Response(msgspec.Struct):
    response: _Said


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionAnswer:
    """What one module says. `message` and `reason` are clean; the other words are its own."""

    allowed: bool
    code: int = 0
    message: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    changed: bytes | None = None
    """The object as the module wants it, as JSON; None if it asks for no change."""


def read_answer(response: Raw, *, uid: str, current: bytes, mutating: bool) -> AdmissionAnswer:
    """Reads a module's response to a request with this uid, which showed it the object `current`.

    A missing uid is taken for the right one: a run has only one question to answer. Raises
    Unreadable, Mismatch.
    """
    ADMISSION_REVIEW.require_v1(response)
    said = strictjson.read(response, _Response, "response").response
    if said.uid is not None and said.uid != uid:
        raise Unreadable("response.response.uid: expected the uid of the request, got another")
    if said.patch and not mutating:
        raise Unreadable(f"{_PATCH}: expected none from a module that is not configured as mutating")
    status = said.status or _Status()
    answer = AdmissionAnswer(
        allowed=said.allowed,
        code=status.code or 0,
        message=clean(status.message or "", MOST_MESSAGE_CHARACTERS),
        reason=clean(status.reason or "", MOST_REASON_CHARACTERS),
        warnings=tuple(said.warnings or ()),
        annotations=tuple((said.audit_annotations or {}).items()),
    )
    if said.patch and said.allowed:
        return replace(answer, changed=_changed(current, said.patch, said.patch_type or ""))
    return answer


def _changed(current: bytes, encoded: str, patch_type: str) -> bytes:
    """The object that a module's patch makes of the one that it was shown. Raises Unreadable, Mismatch."""
    if current == b"null":
        raise Unreadable(f"{_PATCH}: expected none, as the request has no object to change")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise Unreadable(f"{_PATCH}: expected base64") from None
    try:
        strictjson.check(data)
        if patch_type == "Full":
            changed = data.strip()
        elif patch_type == "JSONPatch":
            changed = patch.apply(data, current)
            strictjson.check(changed)  # a patch can nest it too deep
        else:
            got = repr(clean(patch_type, 40)) if patch_type else "nothing"
            raise Unreadable(f"response.response.patchType: expected Full or JSONPatch, got {got}")
    except (NotStrict, BadPatch) as error:
        raise Unreadable(f"{_PATCH}: {error}") from None
    _require_same_object(current, changed)
    return changed


class _Metadata(msgspec.Struct):
    name: str | None = None
    namespace: str | None = None


class _Identity(msgspec.Struct, rename="camel"):
    api_version: str | None = None
    kind: str | None = None
    metadata: _Metadata | None = None

    def parts(self) -> dict[str, str]:
        metadata = self.metadata or _Metadata()
        return {
            "apiVersion": self.api_version or "",
            "kind": self.kind or "",
            "metadata.name": metadata.name or "",
            "metadata.namespace": metadata.namespace or "",
        }


def _require_same_object(current: bytes, changed: bytes) -> None:
    """A module may change an object, not put another in its place.

    What is not named yet may be: with `generateName` the name comes later.
    """
    before = strictjson.read(current, _Identity).parts()
    after = strictjson.read(changed, _Identity, _PATCH).parts()
    for part, value in before.items():
        if value and after[part] != value:
            raise Unreadable(f"{_PATCH}: expected the object to keep its {part}")
