"""Keeps tokens and the contents of Secret objects out of logs, wherever a module repeats them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from bulkhead.service import strictjson

MASKED = "***"
WITHHELD = "(withheld: there is too much in it that must be masked)"

# Each is looked for in the whole text.
_MOST_SECRETS = 200
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"  # a copy of the whole object


class Mask:
    """What must not be logged of one review. Worked out when first needed, which is rare."""

    def __init__(self, find: Callable[[], Iterable[str]]) -> None:
        """`find` returns the secret texts of the review."""
        self._find = find

    @cached_property
    def _secrets(self) -> list[str]:
        # The longest first: one may be part of another.
        return sorted({secret for secret in self._find() if secret}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` without the secrets."""
        if len(self._secrets) > _MOST_SECRETS:
            return WITHHELD
        for secret in self._secrets:
            text = text.replace(secret, MASKED)
        return text

    def value(self, value: Any) -> Any:
        """A decoded review without secrets: those of this one, and of any object of a secret kind in it."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(item) for key, item in mask_object(value).items()}
        return value


NOTHING = Mask(list)


def mask_of_token(token: str) -> Mask:
    """For a TokenReview."""
    return Mask(lambda: [token])


def mask_of_objects(objects: Iterable[bytes]) -> Mask:
    """For an AdmissionReview of these objects, as JSON or `null`."""
    return Mask(lambda: [secret for each in objects for secret in _secrets_of(each)])


def mask_object(value: dict[str, Any]) -> dict[str, Any]:
    """A Kubernetes object without what its kind makes secret; other objects as they are."""
    kind = value.get("kind")
    if kind == "Secret":
        hidden: dict[str, Any] = {
            key: _mask_all(value[key]) for key in ("data", "stringData") if key in value
        }
        return {**value, **hidden, **_mask_last_applied(value)}
    if kind == "TokenReview":
        return {**value, **_mask_member(value, "spec", "token")}
    if kind == "TokenRequest":
        return {**value, **_mask_member(value, "status", "token")}
    return value


def _mask_all(value: Any) -> Any:
    return dict.fromkeys(value, MASKED) if isinstance(value, dict) else MASKED


def _mask_member(value: dict[str, Any], parent: str, key: str) -> dict[str, Any]:
    inner = value.get(parent)
    return {parent: {**inner, key: MASKED}} if isinstance(inner, dict) and inner.get(key) else {}


def _mask_last_applied(value: dict[str, Any]) -> dict[str, Any]:
    metadata = value.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    if (
        not isinstance(metadata, dict)
        or not isinstance(annotations, dict)
        or _LAST_APPLIED not in annotations
    ):
        return {}
    return {"metadata": {**metadata, "annotations": {**annotations, _LAST_APPLIED: MASKED}}}


def _secrets_of(document: bytes) -> list[str]:
    # Most objects are of no secret kind, and some are large: decode only those that can be.
    if not any(part in document for part in (b"Secret", b"TokenRequest", b"\\u")):
        return []
    return _secrets_in(strictjson.decode(document))


def _secrets_in(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    if value.get("kind") == "TokenRequest":
        status = value.get("status")
        return [status["token"]] if isinstance(status, dict) and isinstance(status.get("token"), str) else []
    if value.get("kind") != "Secret":
        return []
    found = [text for text in _values(value.get("stringData")) if isinstance(text, str)]
    for text in _values(value.get("data")):
        if isinstance(text, str):
            found += [text, *_decoded(text)]
    return found


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _decoded(text: str) -> list[str]:
    try:
        return [base64.b64decode(text, validate=True).decode()]
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return []  # not text, so no text to look for
