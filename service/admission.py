"""AdmissionReview: may this object pass, and how should it change?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import msgspec
import structlog
from msgspec import Raw

from bulkhead.sandbox import Sandbox
from bulkhead.service import rules, strictjson
from bulkhead.service.admission_answer import ADMISSION_REVIEW, AdmissionAnswer, read_answer
from bulkhead.service.admission_verdict import (
    AdmissionVerdict,
    Told,
    ends_chain,
    fold,
    write_patch,
    write_reply,
)
from bulkhead.service.call import Answered, ReviewModule
from bulkhead.service.config import FailurePolicy
from bulkhead.service.errors import BadReview, ModuleFailed
from bulkhead.service.mask import Mask, mask_of_objects
from bulkhead.service.offload import run_sized
from bulkhead.service.rules import Rule, Target
from bulkhead.service.strictjson import Mismatch
from bulkhead.service.versions import V1, check_body
from bulkhead.service.words import clean

ENTRY_POINT = "validate"
MAX_UID_LENGTH = 256  # Kubernetes sends UUIDs

_NULL = Raw(b"null")
_OPERATIONS = ("CREATE", "UPDATE", "DELETE", "CONNECT")

_log = structlog.get_logger()


class Stage(StrEnum):
    """The two times that kube-apiserver asks: first who may change the object, then who may refuse it."""

    MUTATING = "mutating"
    VALIDATING = "validating"


# What is asked


class _GroupVersionResource(msgspec.Struct):
    group: str | None = None
    version: str | None = None
    resource: str | None = None


class _User(msgspec.Struct):
    username: str | None = None


class _Request(msgspec.Struct, rename="camel"):
    uid: str = ""
    operation: str = ""
    resource: _GroupVersionResource | None = None
    sub_resource: str | None = None
    namespace: str | None = None
    name: str | None = None
    user_info: _User | None = None
    dry_run: bool | None = None
    object: Raw = _NULL
    old_object: Raw = _NULL


class _Review(msgspec.Struct, rename="camel"):
    api_version: str
    request: _Request


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionQuestion:
    """An AdmissionReview that was sent."""

    api_version: str
    uid: str
    target: Target
    name: str
    user: str
    dry_run: bool
    object: bytes
    """JSON; `null` for DELETE and most of CONNECT."""
    old_object: bytes
    review_v1: bytes
    """What modules see."""

    def with_object(self, changed: bytes) -> bytes:
        """What modules see once one before them has changed the object."""
        if changed is self.object:
            return self.review_v1
        return replace_object(self.review_v1, changed)

    @property
    def mask(self) -> Mask:
        """What of this request must not be logged."""
        return mask_of_objects([self.object, self.old_object])


def read_question(body: bytes) -> AdmissionQuestion:
    """Reads an AdmissionReview of v1 or v1beta1. Raises BadReview."""
    check_body(body)
    try:
        version = ADMISSION_REVIEW.version_of(body)
        review = strictjson.read(body, _Review)
    except Mismatch as error:
        raise BadReview(str(error)) from None
    request = review.request
    if not 0 < len(request.uid) <= MAX_UID_LENGTH:
        raise BadReview(
            f"request.uid: expected a string of 1 to {MAX_UID_LENGTH} characters, got {len(request.uid)}"
        )
    if request.operation not in _OPERATIONS:
        got = repr(clean(request.operation, 40)) if request.operation else "nothing"
        raise BadReview(f"request.operation: expected one of {', '.join(_OPERATIONS)}, got {got}")
    return AdmissionQuestion(
        api_version=review.api_version,
        uid=request.uid,
        target=_target(request),
        name=request.name or "",
        user=(request.user_info and request.user_info.username) or "",
        dry_run=bool(request.dry_run),
        object=_object(request.object, "object"),
        old_object=_object(request.old_object, "oldObject"),
        review_v1=body if version == V1 else to_v1(body),
    )


def _target(request: _Request) -> Target:
    resource = request.resource
    if resource is None or not resource.resource or not resource.version:
        raise BadReview("request.resource: expected an object with group, version and resource")
    return Target(
        operation=request.operation,
        group=resource.group or "",
        version=resource.version,
        resource=resource.resource,
        subresource=request.sub_resource or "",
        namespace=request.namespace or "",
    )


def _object(raw: Raw, key: str) -> bytes:
    data = bytes(raw)
    if data != b"null" and not data.startswith(b"{"):
        raise BadReview(f"request.{key}: expected an object or null")
    return data


def replace_object(review: bytes, changed: bytes) -> bytes:
    """The same review with another object."""
    members = strictjson.split(review)
    request = {**strictjson.split(members["request"]), "object": Raw(changed)}
    return strictjson.join({**members, "request": Raw(strictjson.join(request))})


def to_v1(body: bytes) -> bytes:
    """A v1beta1 review as v1: the requests are the same."""
    return strictjson.join({**strictjson.split(body), "apiVersion": ADMISSION_REVIEW.v1})


# The modules


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionModule:
    """A configured module, and when it is asked."""

    module: ReviewModule
    mutating: bool
    rules: tuple[Rule, ...]
    failure_policy: FailurePolicy

    async def ask(
        self, sandbox: Sandbox, question: AdmissionQuestion, current: bytes, deadline: float | None
    ) -> Answered[AdmissionAnswer]:
        """Asks about the request with its object as it is by now."""
        read = partial(read_answer, uid=question.uid, current=current, mutating=self.mutating)
        review = await run_sized(len(current), question.with_object, current)
        return await self.module.ask(sandbox, review, read, deadline=deadline, mask=question.mask)

    def told(self, answered: Answered[AdmissionAnswer]) -> Told:
        """The answer with what it needs to be folded."""
        return Told(self.module.name, answered.answer, self.failure_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionDecision:
    """How an AdmissionReview was decided at one stage, and the answer."""

    question: AdmissionQuestion
    matching: Sequence[AdmissionModule]
    """Those to ask, in the order of the configuration."""
    asked: Sequence[Answered[AdmissionAnswer]]
    """The answers of the first of these: one that ends the chain is the last."""
    verdict: AdmissionVerdict | ModuleFailed
    final: bytes
    """The object as the last module left it, as JSON."""
    changes: bytes
    """The JSON patch that makes it of the object that was sent; empty if it is refused, or the same."""

    def reply(self) -> bytes:
        """The answer as JSON, in the version that was sent. Raises ModuleFailed."""
        if isinstance(self.verdict, ModuleFailed):
            # Anew: with a traceback it would hold the whole review, in a circle.
            raise ModuleFailed(*self.verdict.args)
        return write_reply(self.question.api_version, self.question.uid, self.verdict, self.changes)


@dataclass(frozen=True, slots=True)
class Admission:
    """The admission modules, in the order of the configuration."""

    modules: tuple[AdmissionModule, ...]

    async def answer(
        self, sandbox: Sandbox, body: bytes, *, stage: Stage, only: str | None, deadline: float | None
    ) -> bytes:
        """Answers an AdmissionReview. Raises BadReview, ModuleFailed."""
        return (await self.decide(sandbox, body, stage=stage, only=only, deadline=deadline)).reply()

    async def decide(
        self, sandbox: Sandbox, body: bytes, *, stage: Stage, only: str | None, deadline: float | None
    ) -> AdmissionDecision:
        """Decides an AdmissionReview, and tells how. Raises BadReview."""
        question = await run_sized(len(body), read_question, body)
        modules = self.matching(question.target, stage, only)
        if stage is Stage.MUTATING:
            asked, final = await _ask_in_order(sandbox, modules, question, deadline)
        else:
            asked, final = await _ask_all(sandbox, modules, question, deadline), question.object
        verdict: AdmissionVerdict | ModuleFailed
        changes = b""
        try:
            verdict = fold([module.told(each) for module, each in zip(modules, asked, strict=False)])
            if verdict.allowed:  # a refused object is not changed
                size_bytes = len(question.object) + len(final)
                changes = await run_sized(size_bytes, write_patch, question.object, final)
        except ModuleFailed as error:
            verdict = error.with_traceback(None)
        decision = AdmissionDecision(
            question=question, matching=modules, asked=asked, verdict=verdict, final=final, changes=changes
        )
        _log_decision(decision, stage)
        return decision

    def names(self, stage: Stage) -> tuple[str, ...]:
        """The modules that are asked at this stage."""
        return tuple(each.module.name for each in self.modules if each.mutating is (stage is Stage.MUTATING))

    def matching(self, target: Target, stage: Stage, only: str | None = None) -> list[AdmissionModule]:
        """The modules to ask about such a request; `only` the one of that name, if it matches."""
        mutating = stage is Stage.MUTATING
        return [
            module
            for module in self.modules
            if module.mutating is mutating
            and only in (None, module.module.name)
            and rules.any_matches(module.rules, target)
        ]


async def _ask_in_order(
    sandbox: Sandbox, modules: Sequence[AdmissionModule], question: AdmissionQuestion, deadline: float | None
) -> tuple[list[Answered[AdmissionAnswer]], bytes]:
    """Each module sees the object as those before it left it. Returns the object as it is in the end."""
    asked: list[Answered[AdmissionAnswer]] = []
    current = question.object
    for module in modules:
        answered = await module.ask(sandbox, question, current, deadline)
        asked.append(answered)
        if ends_chain(module.told(answered)):
            break
        if isinstance(answered.answer, AdmissionAnswer) and answered.answer.changed is not None:
            current = answered.answer.changed
    return asked, current


async def _ask_all(
    sandbox: Sandbox, modules: Sequence[AdmissionModule], question: AdmissionQuestion, deadline: float | None
) -> list[Answered[AdmissionAnswer]]:
    """All at once; in the order of the configuration."""
    if len(modules) == 1:  # the usual case needs no task
        return [await modules[0].ask(sandbox, question, question.object, deadline)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(module.ask(sandbox, question, question.object, deadline)) for module in modules
        ]
    return [task.result() for task in tasks]


def _log_decision(decision: AdmissionDecision, stage: Stage) -> None:
    question, target = decision.question, decision.question.target
    verdict = decision.verdict if isinstance(decision.verdict, AdmissionVerdict) else None
    denied = verdict is not None and not verdict.allowed
    _log.info(
        "review",
        kind=ADMISSION_REVIEW.kind,
        api_version=question.api_version,
        stage=stage.value,
        uid=clean(question.uid, MAX_UID_LENGTH),
        decision="undecided" if verdict is None else "denied" if denied else "allowed",
        operation=target.operation,
        group=target.group,
        version=target.version,
        resource=target.resource,
        subresource=target.subresource or None,
        namespace=target.namespace or None,
        name=question.name or None,
        user=question.user,
        dry_run=question.dry_run,
        code=verdict.code if verdict is not None and denied else None,
        # Not the message: it may quote the object.
        patch_bytes=len(decision.changes),
        warnings=len(verdict.warnings) if verdict is not None else 0,
        modules=[each.for_log() for each in decision.asked],
    )
