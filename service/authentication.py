"""TokenReview: who is this? The modules are asked in order until one knows the token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import structlog
from msgspec import Raw

from bulkhead.sandbox import Sandbox
from bulkhead.service import strictjson
from bulkhead.service.call import Answered, Failure, ReviewModule, Unreadable
from bulkhead.service.errors import BadReview
from bulkhead.service.mask import Mask, mask_of_token
from bulkhead.service.offload import run_sized
from bulkhead.service.strictjson import Mismatch
from bulkhead.service.versions import V1, ReviewType, check_body
from bulkhead.service.words import clean, cut

TOKEN_REVIEW = ReviewType("TokenReview", "authentication.k8s.io")
ENTRY_POINT = "authn"

_MOST_ERROR_CHARACTERS = 256  # of one module
_MOST_ERRORS_CHARACTERS = 1024

_log = structlog.get_logger()


# What is asked


class _Spec(msgspec.Struct):
    token: str = ""
    audiences: list[str] | None = None


class _Review(msgspec.Struct, rename="camel"):
    api_version: str
    spec: _Spec


@dataclass(frozen=True, slots=True)
class TokenQuestion:
    """A TokenReview that was sent."""

    api_version: str
    token: str
    audiences: tuple[str, ...]
    review_v1: bytes
    """What modules see."""

    def __repr__(self) -> str:
        return f"TokenQuestion({self.api_version})"  # the token must not get into a log


def read_question(body: bytes) -> TokenQuestion:
    """Reads a TokenReview of v1 or v1beta1. Raises BadReview."""
    check_body(body)
    try:
        version = TOKEN_REVIEW.version_of(body)
        review = strictjson.read(body, _Review)
    except Mismatch as error:
        raise BadReview(str(error)) from None
    if not review.spec.token:
        raise BadReview("spec.token: expected a string that is not empty")
    return TokenQuestion(
        api_version=review.api_version,
        token=review.spec.token,
        audiences=tuple(review.spec.audiences or ()),
        review_v1=body if version == V1 else _to_v1(body),
    )


def _to_v1(body: bytes) -> bytes:
    return strictjson.join({**strictjson.split(body), "apiVersion": TOKEN_REVIEW.v1})


# What a module answers


class User(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who it is, as Kubernetes' UserInfo."""

    username: str = ""
    uid: str | None = None
    groups: list[str] | None = None
    extra: dict[str, list[str]] | None = None


class _Status(msgspec.Struct):
    authenticated: bool | None = None
    user: User | None = None
    audiences: list[str] | None = None
    error: str | None = None


class _Response(msgspec.Struct):
    status: _Status


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """What one module says of a token."""

    user: User | None
    """None: not authenticated."""
    audiences: tuple[str, ...] = ()
    """Empty: the module does not know of audiences."""
    error: str = ""
    """Its reason why it could not tell; in its own words."""


def read_answer(response: Raw) -> TokenAnswer:
    """Reads a module's response. Raises Unreadable, Mismatch."""
    TOKEN_REVIEW.require_v1(response)
    status = strictjson.read(response, _Response, "response").status
    if not status.authenticated:
        return TokenAnswer(None, error=clean(status.error or "", _MOST_ERROR_CHARACTERS))
    if status.user is None or not status.user.username:
        raise Unreadable("response.status.user.username: expected a string that is not empty")
    return TokenAnswer(status.user, tuple(status.audiences or ()))


# What is answered


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """What all of the modules together say."""

    user: User | None
    audiences: tuple[str, ...] = ()
    error: str = ""
    by: str = ""
    """The module that authenticated."""


def accepted_audiences(
    wanted: Sequence[str], answered: Sequence[str], own: Sequence[str]
) -> tuple[str, ...] | None:
    """For which audiences a token is good; None if for none of those that were wanted.

    `own` are the API server's audiences: a module that names none has authenticated for those.
    """
    if not wanted:
        return tuple(answered)
    valid = frozenset(answered or own)
    return tuple(audience for audience in wanted if audience in valid) or None


def accept(
    name: str, answer: TokenAnswer | Failure, wanted: Sequence[str], own: Sequence[str]
) -> TokenVerdict | None:
    """The verdict if this module has authenticated the token, for an audience that was wanted."""
    if isinstance(answer, Failure) or answer.user is None:
        return None
    audiences = accepted_audiences(wanted, answer.audiences, own)
    return None if audiences is None else TokenVerdict(answer.user, audiences, by=name)


def refuse(answers: Sequence[tuple[str, TokenAnswer | Failure]]) -> TokenVerdict:
    """The verdict when no module has authenticated the token: with the reasons of those that could not tell.

    A token for another audience is a plain refusal, as with Kubernetes' own authenticators.
    """
    errors = []
    for name, answer in answers:
        if isinstance(answer, Failure):
            errors.append(answer.told(name))
        elif answer.error:
            errors.append(f"module {name}: {answer.error}")
    return TokenVerdict(None, error=cut("; ".join(errors), _MOST_ERRORS_CHARACTERS))


class _StatusOut(msgspec.Struct, omit_defaults=True):
    authenticated: bool
    user: User | None = None
    audiences: tuple[str, ...] = ()
    error: str = ""


def write_reply(question: TokenQuestion, verdict: TokenVerdict, mask: Mask) -> bytes:
    """The TokenReview that goes back. The token does not."""
    status = _StatusOut(
        authenticated=verdict.user is not None,
        user=verdict.user,
        audiences=verdict.audiences,
        error=mask.text(verdict.error),
    )
    return strictjson.encode(
        {
            "apiVersion": question.api_version,
            "kind": TOKEN_REVIEW.kind,
            "metadata": {},
            "spec": {},
            "status": status,
        }
    )


@dataclass(frozen=True, slots=True)
class TokenDecision:
    """How a TokenReview was decided, and the answer."""

    question: TokenQuestion
    asked: Sequence[Answered[TokenAnswer]]
    """In the order of the configuration; modules after the one that decided are not asked."""
    verdict: TokenVerdict
    mask: Mask
    """What of this review must not be shown."""

    def reply(self) -> bytes:
        """The answer as JSON, in the version that was sent."""
        return write_reply(self.question, self.verdict, self.mask)


@dataclass(frozen=True, slots=True)
class Authentication:
    """The chain of authentication modules."""

    modules: tuple[ReviewModule, ...]
    audiences: tuple[str, ...]
    """The API server's own."""

    async def answer(self, sandbox: Sandbox, body: bytes, *, deadline: float | None) -> bytes:
        """Answers a TokenReview. Raises BadReview."""
        return (await self.decide(sandbox, body, deadline=deadline)).reply()

    async def decide(self, sandbox: Sandbox, body: bytes, *, deadline: float | None) -> TokenDecision:
        """Decides a TokenReview, and tells how. Raises BadReview."""
        question = await run_sized(len(body), read_question, body)
        mask = mask_of_token(question.token)
        asked: list[Answered[TokenAnswer]] = []
        verdict = None
        for module in self.modules:
            answered = await module.ask(
                sandbox, question.review_v1, read_answer, deadline=deadline, mask=mask
            )
            asked.append(answered)
            verdict = accept(module.name, answered.answer, question.audiences, self.audiences)
            if verdict is not None:
                break
        if verdict is None:
            verdict = refuse([(each.name, each.answer) for each in asked])
        _log_decision(question, verdict, asked, mask)
        return TokenDecision(question, asked, verdict, mask)


def _log_decision(
    question: TokenQuestion, verdict: TokenVerdict, asked: Sequence[Answered[TokenAnswer]], mask: Mask
) -> None:
    _log.info(
        "review",
        kind=TOKEN_REVIEW.kind,
        api_version=question.api_version,
        decision="authenticated" if verdict.user else "not_authenticated",
        user=mask.text(verdict.user.username) if verdict.user else None,
        wanted_audiences=question.audiences,
        audiences=verdict.audiences,
        decided_by=verdict.by or None,
        error=mask.text(verdict.error) or None,
        modules=[each.for_log() for each in asked],
    )
