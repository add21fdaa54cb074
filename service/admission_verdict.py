"""One answer to an AdmissionReview, made of those of the modules."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from bulkhead.service import patch, strictjson
from bulkhead.service.admission_answer import ADMISSION_REVIEW, AdmissionAnswer
from bulkhead.service.call import Failure
from bulkhead.service.config import FailurePolicy
from bulkhead.service.errors import ModuleFailed
from bulkhead.service.words import clean, cut

MOST_MESSAGES_CHARACTERS = 8192

# kube-apiserver sends warnings on as HTTP headers. It asks for at most 120 characters each, and
# cuts them once there are more than 4096 in all.
MOST_WARNING_CHARACTERS = 120
MOST_WARNINGS_BYTES = 4096

# kube-apiserver puts its webhook's name and a slash before the key: what is ours must be a
# qualified name without one.
MOST_KEY_CHARACTERS = 63
MOST_ANNOTATION_CHARACTERS = 4096
MOST_ANNOTATIONS = 64  # of one module

_LEAST_CODE, _LARGEST_CODE = 400, 599
_FAILED_CODE = 500
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_.-]")
_NOT_AT_ENDS = "-_."
_DIGEST_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Told:
    """What one module told us, and what becomes of it if that is a failure."""

    name: str
    answer: AdmissionAnswer | Failure
    failure_policy: FailurePolicy


@dataclass(frozen=True, slots=True)
class AdmissionVerdict:
    """What all of the modules together say."""

    allowed: bool
    code: int = 0
    message: str = ""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Denial:
    code: int
    message: str
    reason: str = ""


def ends_chain(told: Told) -> bool:
    """Whether no later module is to be asked: it would change an object that does not pass."""
    if isinstance(told.answer, Failure):
        return told.failure_policy is not FailurePolicy.IGNORE
    return not told.answer.allowed


def fold(every: Sequence[Told]) -> AdmissionVerdict:
    """The verdict. One denial denies; all are told, in the order of the configuration.

    Raises ModuleFailed if a module failed whose failures are for the cluster to judge, unless
    another one denied: the cluster might ignore the failure, and the denial with it.
    """
    denials = [denial for told in every if (denial := _denial(told)) is not None]
    errors = [told for told in every if _is_error(told)]
    if errors and not denials:
        raise ModuleFailed("; ".join(_failure_text(told) for told in errors))
    warnings, annotations = _warnings(every), _annotations(every)
    if not denials:
        return AdmissionVerdict(True, warnings=warnings, annotations=annotations)
    return AdmissionVerdict(
        allowed=False,
        code=denials[0].code,
        message=cut("; ".join(denial.message for denial in denials), MOST_MESSAGES_CHARACTERS),
        reason=denials[0].reason,
        warnings=warnings,
        annotations=annotations,
    )


def _is_error(told: Told) -> bool:
    return isinstance(told.answer, Failure) and told.failure_policy is FailurePolicy.ERROR


def _failure_text(told: Told) -> str:
    assert isinstance(told.answer, Failure)
    return told.answer.told(told.name)


def _denial(told: Told) -> _Denial | None:
    answer = told.answer
    if isinstance(answer, Failure):
        if told.failure_policy is not FailurePolicy.FAIL:
            return None
        return _Denial(_FAILED_CODE, answer.told(told.name), "InternalError")
    if answer.allowed:
        return None
    # What is no code of an HTTP error would look like a success, or crash the API server.
    code = answer.code if _LEAST_CODE <= answer.code <= _LARGEST_CODE else _LEAST_CODE
    return _Denial(code, f"{told.name}: {answer.message or 'denied without a reason'}", answer.reason)


def _warnings(every: Sequence[Told]) -> tuple[str, ...]:
    """Those of all modules, each with its module's name, as many as fit."""
    kept: list[str] = []
    size = 0
    for told in every:
        for text in _warnings_of(told):
            warning = clean(text, MOST_WARNING_CHARACTERS)
            size += len(warning.encode())
            if size > MOST_WARNINGS_BYTES:
                return tuple(kept)
            kept.append(warning)
    return tuple(kept)


def _warnings_of(told: Told) -> list[str]:
    if isinstance(told.answer, Failure):
        ignored = told.failure_policy is FailurePolicy.IGNORE
        return [f"{told.answer.told(told.name)}; ignored"] if ignored else []
    return [f"{told.name}: {text}" for text in told.answer.warnings if text.strip()]


def _annotations(every: Sequence[Told]) -> dict[str, str]:
    """Those of all modules, each key with its module's name before it."""
    kept: dict[str, str] = {}
    for told in every:
        if isinstance(told.answer, AdmissionAnswer):
            for key, value in told.answer.annotations[:MOST_ANNOTATIONS]:
                kept[_annotation_key(told.name, key, kept)] = clean(value, MOST_ANNOTATION_CHARACTERS)
    return kept


def _annotation_key(name: str, key: str, taken: Mapping[str, str]) -> str:
    """`NAME_KEY` as a qualified name. Names of modules have no `_`: none can be taken for another."""
    whole = f"{name}_{key}"
    fitting = _NOT_IN_KEYS.sub("-", whole).rstrip(_NOT_AT_ENDS)
    if len(fitting) <= MOST_KEY_CHARACTERS and "_" in fitting and fitting not in taken:
        return fitting
    digest = hashlib.sha256(whole.encode()).hexdigest()[:_DIGEST_DIGITS]
    return f"{fitting[: MOST_KEY_CHARACTERS - _DIGEST_DIGITS - 1]}_{digest}"


# The reply


class _StatusOut(msgspec.Struct, omit_defaults=True):
    code: int
    message: str
    reason: str = ""
    status: str = ""


class _ResponseOut(msgspec.Struct, rename="camel", omit_defaults=True):
    uid: str
    allowed: bool
    status: _StatusOut | None = None
    patch: str = ""
    patch_type: str = ""
    warnings: tuple[str, ...] = ()
    audit_annotations: Mapping[str, str] = msgspec.field(default_factory=dict)


def write_patch(original: bytes, final: bytes) -> bytes:
    """One JSON patch from the object that was sent to the one that the last module left; empty if none."""
    if original == final:
        return b""
    operations = patch.diff(strictjson.decode_exact(original), strictjson.decode_exact(final))
    return strictjson.encode_exact(operations) if operations else b""


def write_reply(api_version: str, uid: str, verdict: AdmissionVerdict, changes: bytes) -> bytes:
    """The AdmissionReview that goes back. `changes` is a JSON patch; empty: none."""
    response = _ResponseOut(
        uid=uid,
        allowed=verdict.allowed,
        status=None
        if verdict.allowed
        else _StatusOut(verdict.code, verdict.message, verdict.reason, "Failure"),
        patch=base64.b64encode(changes).decode(),
        patch_type="JSONPatch" if changes else "",
        warnings=verdict.warnings,
        audit_annotations=verdict.annotations,
    )
    return strictjson.encode({"apiVersion": api_version, "kind": ADMISSION_REVIEW.kind, "response": response})
