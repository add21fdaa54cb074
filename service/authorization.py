"""SubjectAccessReview: may they? The modules are asked in order until one allows or denies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import structlog
from msgspec import Raw

from bulkhead.sandbox import Sandbox
from bulkhead.service import strictjson
from bulkhead.service.call import Answered, Failure, ReviewModule
from bulkhead.service.errors import BadReview, Undecided
from bulkhead.service.mask import NOTHING
from bulkhead.service.offload import run_sized
from bulkhead.service.strictjson import Mismatch
from bulkhead.service.versions import V1, ReviewType, check_body
from bulkhead.service.words import clean, cut

SUBJECT_ACCESS_REVIEW = ReviewType("SubjectAccessReview", "authorization.k8s.io")
ENTRY_POINT = "authz"

_MOST_WORDS_CHARACTERS = 256  # of one module
_MOST_REASON_CHARACTERS = 1024

_log = structlog.get_logger()


# What is asked


class ResourceAttributes(msgspec.Struct, frozen=True):
    """What of a resource is asked about, as far as it is logged; the rest passes through."""

    namespace: str | None = None
    verb: str | None = None
    group: str | None = None
    version: str | None = None
    resource: str | None = None
    subresource: str | None = None
    name: str | None = None


class NonResourceAttributes(msgspec.Struct, frozen=True):
    """What of a path is asked about."""

    path: str | None = None
    verb: str | None = None


class _Spec(msgspec.Struct, rename="camel"):
    user: str | None = None
    uid: str | None = None
    extra: dict[str, list[str] | None] | None = None
    resource_attributes: ResourceAttributes | None = None
    non_resource_attributes: NonResourceAttributes | None = None


class _SpecV1(_Spec, rename="camel"):
    groups: list[str] | None = None


class _SpecV1Beta1(_Spec, rename="camel"):
    group: list[str] | None = None


class _ReviewV1(msgspec.Struct, rename="camel"):
    api_version: str
    spec: _SpecV1


class _ReviewV1Beta1(msgspec.Struct, rename="camel"):
    api_version: str
    spec: _SpecV1Beta1


@dataclass(frozen=True, slots=True)
class AccessQuestion:
    """A SubjectAccessReview that was sent."""

    api_version: str
    user: str
    about: ResourceAttributes | NonResourceAttributes
    review_v1: bytes
    """What modules see."""


def read_question(body: bytes) -> AccessQuestion:
    """Reads a SubjectAccessReview of v1 or v1beta1. Raises BadReview."""
    check_body(body)
    try:
        is_v1 = SUBJECT_ACCESS_REVIEW.version_of(body) == V1
        review = strictjson.read(body, _ReviewV1) if is_v1 else strictjson.read(body, _ReviewV1Beta1)
    except Mismatch as error:
        raise BadReview(str(error)) from None
    spec = review.spec
    about = spec.resource_attributes or spec.non_resource_attributes
    if about is None or (spec.resource_attributes is not None and spec.non_resource_attributes is not None):
        got = "neither" if about is None else "both"
        raise BadReview(f"spec: expected either resourceAttributes or nonResourceAttributes, got {got}")
    return AccessQuestion(
        api_version=review.api_version,
        user=spec.user or "",
        about=about,
        review_v1=body if is_v1 else to_v1(body),
    )


def to_v1(body: bytes) -> bytes:
    """A v1beta1 review as v1: the list `group` is called `groups` there. Raises BadReview."""
    review = strictjson.split(body)
    spec = strictjson.split(review["spec"])
    if "groups" in spec:
        raise BadReview("spec.groups: expected spec.group, as v1beta1 calls it")
    # In its place, so that the rest stays in order.
    renamed = {("groups" if key == "group" else key): value for key, value in spec.items()}
    return strictjson.join(
        {**review, "apiVersion": SUBJECT_ACCESS_REVIEW.v1, "spec": Raw(strictjson.join(renamed))}
    )


# What a module answers


class _Status(msgspec.Struct, rename="camel"):
    allowed: bool | None = None
    denied: bool | None = None
    reason: str | None = None
    evaluation_error: str | None = None


class _Response(msgspec.Struct):
    status: _Status


@dataclass(frozen=True, slots=True)
class AccessAnswer:
    """What one module says."""

    allowed: bool
    denied: bool
    reason: str = ""
    error: str = ""

    @property
    def decides(self) -> bool:
        return self.allowed or self.denied


def read_answer(response: Raw) -> AccessAnswer:
    """Reads a module's response. Raises Unreadable, Mismatch."""
    SUBJECT_ACCESS_REVIEW.require_v1(response)
    status = strictjson.read(response, _Response, "response").status
    return AccessAnswer(
        allowed=bool(status.allowed),
        denied=bool(status.denied),
        reason=clean(status.reason or "", _MOST_WORDS_CHARACTERS),
        error=clean(status.evaluation_error or "", _MOST_WORDS_CHARACTERS),
    )


# What is answered


class AccessVerdict(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What all of the modules together say: the status of the answer."""

    allowed: bool
    denied: bool = False
    reason: str = ""
    evaluation_error: str = ""


def decides(answer: AccessAnswer | Failure) -> bool:
    """Whether no further module is to be asked."""
    return isinstance(answer, AccessAnswer) and answer.decides


def fold(answers: Sequence[tuple[str, AccessAnswer | Failure]]) -> AccessVerdict:
    """The verdict of the modules that were asked: the last one's, if it decided.

    Raises Undecided if none decided and one failed: nobody knows what that one would have said.
    """
    errors = []
    for name, answer in answers:
        if isinstance(answer, Failure):
            errors.append(answer.told(name))
        else:
            if answer.allowed and answer.denied:
                errors.append(f"module {name} both allowed and denied: denied")
            if answer.error:
                errors.append(f"module {name}: {answer.error}")
    error = cut("; ".join(errors), _MOST_REASON_CHARACTERS)
    if answers and isinstance(last := answers[-1][1], AccessAnswer) and last.decides:
        return AccessVerdict(not last.denied, last.denied, last.reason, error)
    failures = [answer.told(name) for name, answer in answers if isinstance(answer, Failure)]
    if failures:
        raise Undecided(cut(f"no module decided: {'; '.join(failures)}", _MOST_REASON_CHARACTERS))
    reasons = [answer.reason for _, answer in answers if isinstance(answer, AccessAnswer) and answer.reason]
    return AccessVerdict(False, False, cut("; ".join(reasons), _MOST_REASON_CHARACTERS), error)


def write_reply(question: AccessQuestion, verdict: AccessVerdict) -> bytes:
    """The SubjectAccessReview that goes back."""
    return strictjson.encode(
        {
            "apiVersion": question.api_version,
            "kind": SUBJECT_ACCESS_REVIEW.kind,
            "metadata": {},
            "spec": {},
            "status": verdict,
        }
    )


@dataclass(frozen=True, slots=True)
class AccessDecision:
    """How a SubjectAccessReview was decided, and the answer."""

    question: AccessQuestion
    asked: Sequence[Answered[AccessAnswer]]
    """In the order of the configuration; modules after the one that decided are not asked."""
    verdict: AccessVerdict | Undecided

    def reply(self) -> bytes:
        """The answer as JSON, in the version that was sent. Raises Undecided."""
        if isinstance(self.verdict, Undecided):
            # Anew: with a traceback it would hold the whole review, in a circle.
            raise Undecided(*self.verdict.args)
        return write_reply(self.question, self.verdict)


@dataclass(frozen=True, slots=True)
class Authorization:
    """The chain of authorization modules."""

    modules: tuple[ReviewModule, ...]

    async def answer(self, sandbox: Sandbox, body: bytes, *, deadline: float | None) -> bytes:
        """Answers a SubjectAccessReview. Raises BadReview, Undecided."""
        return (await self.decide(sandbox, body, deadline=deadline)).reply()

    async def decide(self, sandbox: Sandbox, body: bytes, *, deadline: float | None) -> AccessDecision:
        """Decides a SubjectAccessReview, and tells how. Raises BadReview."""
        question = await run_sized(len(body), read_question, body)
        asked: list[Answered[AccessAnswer]] = []
        for module in self.modules:
            answered = await module.ask(
                sandbox, question.review_v1, read_answer, deadline=deadline, mask=NOTHING
            )
            asked.append(answered)
            if decides(answered.answer):
                break
        verdict: AccessVerdict | Undecided
        try:
            verdict = fold([(each.name, each.answer) for each in asked])
        except Undecided as error:
            verdict = error.with_traceback(None)
        _log_decision(question, verdict, asked)
        return AccessDecision(question, asked, verdict)


def _log_decision(
    question: AccessQuestion, verdict: AccessVerdict | Undecided, asked: Sequence[Answered[AccessAnswer]]
) -> None:
    decided = verdict if isinstance(verdict, AccessVerdict) else None
    _log.info(
        "review",
        kind=SUBJECT_ACCESS_REVIEW.kind,
        api_version=question.api_version,
        decision=_decision(decided),
        user=question.user,
        **_asked_about(question.about),
        decided_by=asked[-1].name if asked and decides(asked[-1].answer) else None,
        reason=(decided.reason or None) if decided else None,
        error=(decided.evaluation_error or None) if decided else None,
        modules=[each.for_log() for each in asked],
    )


def _decision(verdict: AccessVerdict | None) -> str:
    if verdict is None:
        return "undecided"
    if verdict.allowed:
        return "allowed"
    return "denied" if verdict.denied else "no_opinion"


def _asked_about(about: ResourceAttributes | NonResourceAttributes) -> dict[str, str]:
    return {key: value for key, value in msgspec.structs.asdict(about).items() if value}
