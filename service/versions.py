"""What a review says it is: its kind and version. Modules always see v1."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import Raw

from bulkhead.service import strictjson
from bulkhead.service.call import Unreadable
from bulkhead.service.errors import BadReview
from bulkhead.service.strictjson import NotStrict
from bulkhead.service.words import clean

V1 = "v1"
V1BETA1 = "v1beta1"

_MOST_SHOWN_CHARACTERS = 80


class _Header(msgspec.Struct, rename="camel"):
    api_version: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class ReviewType:
    """A kind of review, in the two versions that Kubernetes sends."""

    kind: str
    group: str

    @property
    def v1(self) -> Raw:
        """The apiVersion that modules see, as JSON."""
        return Raw(strictjson.encode(f"{self.group}/{V1}"))

    @property
    def _a_kind(self) -> str:
        return f"{'an' if self.kind.startswith('A') else 'a'} {self.kind}"

    def version_of(self, body: bytes) -> str:
        """`v1` or `v1beta1`, of a body that `strictjson.check` has passed.

        Raises BadReview for everything else; Mismatch if kind or apiVersion are no strings.
        """
        header = strictjson.read(body, _Header)
        group, _, version = header.api_version.rpartition("/")
        if (header.kind, group) != (self.kind, self.group) or version not in (V1, V1BETA1):
            expected = f"{self._a_kind} of {self.group}/{V1} or {self.group}/{V1BETA1}"
            raise BadReview(f"expected {expected}, got {_shown(header)}")
        return version

    def require_v1(self, response: Raw) -> None:
        """Checks a module's response. Raises Unreadable, Mismatch."""
        header = strictjson.read(response, _Header, "response")
        if header.kind != self.kind or header.api_version != f"{self.group}/{V1}":
            raise Unreadable(f"response: expected {self._a_kind} of {self.group}/{V1}, got {_shown(header)}")


def check_body(body: bytes) -> None:
    """Refuses what is not one strict JSON document. Raises BadReview."""
    try:
        strictjson.check(body)
    except NotStrict as error:
        raise BadReview(f"expected a review as JSON: {error}") from None


def _shown(header: _Header) -> str:
    if not header.kind and not header.api_version:
        return "an object without kind and apiVersion"
    kind = clean(header.kind, _MOST_SHOWN_CHARACTERS) or "an object without kind"
    version = clean(header.api_version, _MOST_SHOWN_CHARACTERS)
    return f"{kind} of {version}" if version else f"{kind} without apiVersion"
