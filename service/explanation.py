"""Why a review was answered as it was: what each module said, and who was not asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from bulkhead.sandbox import Usage
from bulkhead.service import patch, strictjson
from bulkhead.service.admission import Admission, AdmissionDecision, AdmissionModule, Stage
from bulkhead.service.admission_answer import AdmissionAnswer
from bulkhead.service.admission_verdict import AdmissionVerdict
from bulkhead.service.authentication import TokenAnswer, TokenDecision
from bulkhead.service.authorization import AccessAnswer, AccessDecision, AccessVerdict
from bulkhead.service.call import Answered, Failure, ReviewModule
from bulkhead.service.config import FailurePolicy
from bulkhead.service.edge import Fault, fault_of
from bulkhead.service.mask import NOTHING, Mask
from bulkhead.service.objectdiff import object_diff
from bulkhead.service.rules import Rule, Target
from bulkhead.service.words import clean

_MOST_WORDS_CHARACTERS = 2048

_T = TypeVar("_T")


class Decision(StrEnum):
    """What became of a review."""

    ALLOWED = "allowed"
    DENIED = "denied"
    AUTHENTICATED = "authenticated"
    NOT_AUTHENTICATED = "not_authenticated"
    NO_OPINION = "no_opinion"
    FAILED = "failed"
    NOT_ASKED = "not_asked"
    """Not reached: the stage before had ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleExplanation:
    """One configured module."""

    name: str
    said: str
    """In a few words; or why it was not asked."""
    asked: bool = True
    failure: str | None = None
    """In one word, if it failed."""
    wall_seconds: float = 0.0
    usage: Usage | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    """`details` and `diagnostics` of its failure, and what it wrote on `stderr`; masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One decision. What is secret is masked, but in the patch and the reply, which are exact."""

    decision: Decision
    message: str = ""
    """Who it is, the code and the message of a denial, a reason."""
    stage: Stage | None = None
    """Of an AdmissionReview."""
    asked_about: str = ""
    modules: Sequence[ModuleExplanation] = ()
    warnings: Sequence[str] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    patch: bytes = b""
    """JSON; empty if there is none."""
    diff: Sequence[str] = ()
    reply: bytes | None = None
    """The answer that kube-apiserver gets."""
    fault: Fault | None = None
    """The error that it gets instead."""


# TokenReview


def explain_token(modules: Sequence[ReviewModule], decision: TokenDecision) -> Explanation:
    """Explains the decision of a TokenReview; `modules` are all that are configured."""
    verdict = decision.verdict
    if verdict.user is not None:
        groups = f" in {', '.join(verdict.user.groups)}" if verdict.user.groups else ""
        audiences = f" for {', '.join(verdict.audiences)}" if verdict.audiences else ""
        decided, message = Decision.AUTHENTICATED, f"{verdict.user.username}{groups}{audiences}"
    else:
        decided = Decision.FAILED if verdict.error else Decision.NOT_AUTHENTICATED
        message = verdict.error
    return Explanation(
        decision=decided,
        message=decision.mask.text(message),
        asked_about="whose the token is",
        modules=[
            *(_asked(each, decision.mask, _said_of_token(each.name, decision)) for each in decision.asked),
            *_not_reached(modules, decision.asked),
        ],
        reply=decision.reply(),
    )


def _said_of_token(name: str, decision: TokenDecision) -> Callable[[TokenAnswer], str]:
    def said(answer: TokenAnswer) -> str:
        if answer.user is None:
            return f"could not tell: {answer.error}" if answer.error else "does not know the token"
        if decision.verdict.by != name:
            return f"knows {answer.user.username}, but the token is for other audiences than were asked for"
        return f"authenticated {answer.user.username}"

    return said


# SubjectAccessReview


def explain_access(modules: Sequence[ReviewModule], decision: AccessDecision) -> Explanation:
    """Explains the decision of a SubjectAccessReview; `modules` are all that are configured."""
    verdict, fault = decision.verdict, None
    if isinstance(verdict, AccessVerdict):
        decided = (
            Decision.ALLOWED
            if verdict.allowed
            else Decision.DENIED
            if verdict.denied
            else Decision.NO_OPINION
        )
        message = "; ".join(filter(None, (verdict.reason, verdict.evaluation_error)))
    else:
        decided, fault = Decision.FAILED, fault_of(verdict)
        message = fault.message
    about = strictjson.decode(strictjson.encode(decision.question.about))
    return Explanation(
        decision=decided,
        message=message,
        asked_about=f"{decision.question.user}: {', '.join(f'{k} {v}' for k, v in about.items() if v)}",
        modules=[
            *(_asked(each, NOTHING, _said_of_access) for each in decision.asked),
            *_not_reached(modules, decision.asked),
        ],
        reply=decision.reply() if fault is None else None,
        fault=fault,
    )


def _said_of_access(answer: AccessAnswer) -> str:
    said = (
        "allowed and denied, which is denied"
        if answer.allowed and answer.denied
        else "allowed"
        if answer.allowed
        else "denied"
        if answer.denied
        else "no opinion"
    )
    return ": ".join(filter(None, (said, answer.reason, answer.error)))


def _not_reached(modules: Sequence[ReviewModule], asked: Sequence[Answered[Any]]) -> list[ModuleExplanation]:
    return [
        ModuleExplanation(name=module.name, said=f"not asked: {asked[-1].name} had decided", asked=False)
        for module in modules[len(asked) :]
    ]


# AdmissionReview


def explain_admission(
    admission: Admission, decision: AdmissionDecision, stage: Stage, only: str | None
) -> Explanation:
    """Explains the decision of an AdmissionReview at a stage."""
    question, verdict, fault = decision.question, decision.verdict, None
    mask = question.mask
    warnings: Sequence[str] = ()
    annotations: Mapping[str, str] = {}
    if isinstance(verdict, AdmissionVerdict):
        decided = Decision.ALLOWED if verdict.allowed else Decision.DENIED
        message = "" if verdict.allowed else f"{verdict.code}: {verdict.message}"
        warnings = [mask.text(each) for each in verdict.warnings]
        annotations = {key: mask.text(each) for key, each in verdict.annotations.items()}
    else:
        decided, fault = Decision.FAILED, fault_of(verdict)
        message = fault.message
    return Explanation(
        decision=decided,
        message=mask.text(message),
        stage=stage,
        asked_about=_about(question.target, question.name, question.user),
        modules=_admission_modules(admission, decision, stage, only),
        warnings=warnings,
        annotations=annotations,
        patch=decision.changes,
        diff=object_diff(question.object, decision.final) if decision.changes else (),
        reply=decision.reply() if fault is None else None,
        fault=fault,
    )


def explain_not_asked(admission: Admission, stage: Stage) -> Explanation:
    """For a stage that is not reached: the one before has refused the object."""
    return Explanation(
        decision=Decision.NOT_ASKED,
        message="refused before",
        stage=stage,
        modules=[
            ModuleExplanation(name=name, said="not asked: refused before", asked=False)
            for name in admission.names(stage)
        ],
    )


def _about(target: Target, name: str, user: str) -> str:
    resource = ".".join(filter(None, (target.resource, target.version, target.group)))
    whole = f"{resource}/{target.subresource}" if target.subresource else resource
    place = "/".join(filter(None, (target.namespace, name)))
    return " ".join(filter(None, (target.operation, whole, place, user and f"by {user}")))


def _admission_modules(
    admission: Admission, decision: AdmissionDecision, stage: Stage, only: str | None
) -> list[ModuleExplanation]:
    """In the order of the configuration."""
    explained = {}
    current = decision.question.object
    for module, answered in zip(decision.matching, decision.asked, strict=False):
        said = _said_of_object(module.mutating, current)
        explained[answered.name] = _asked(
            answered, decision.question.mask, said, policy=module.failure_policy
        )
        if isinstance(answered.answer, AdmissionAnswer) and answered.answer.changed is not None:
            current = answered.answer.changed
    for module in decision.matching[len(decision.asked) :]:
        name = module.module.name
        said_why = f"not asked: {decision.asked[-1].name} had ended the chain"
        explained[name] = ModuleExplanation(name=name, said=said_why, asked=False)
    return [
        explained.get(module.module.name) or _not_matching(module, decision.question.target, only)
        for module in admission.modules
        if module.mutating is (stage is Stage.MUTATING)
    ]


def _said_of_object(mutating: bool, current: bytes) -> Callable[[AdmissionAnswer], str]:
    def said(answer: AdmissionAnswer) -> str:
        if not answer.allowed:
            return f"denied: {answer.message or 'without a reason'}"
        if answer.changed is not None and not _same(current, answer.changed):
            return "allowed, changed the object"
        return "allowed, changed nothing" if mutating else "allowed"

    return said


def _same(left: bytes, right: bytes) -> bool:
    return patch.same(strictjson.decode_exact(left), strictjson.decode_exact(right))


def _not_matching(module: AdmissionModule, target: Target, only: str | None) -> ModuleExplanation:
    name = module.module.name
    if only not in (None, name):
        why = "another one was chosen"
    elif not module.rules:
        why = "it has no rules"
    else:
        why = f"its rules do not match: {_mismatches(module.rules, target)}"
    return ModuleExplanation(name=name, said=f"not asked: {why}", asked=False)


def _mismatches(rules: Sequence[Rule], target: Target) -> str:
    """Which keys of which rule."""
    each = [", ".join(rule.mismatches(target)) for rule in rules]
    return each[0] if len(each) == 1 else "; ".join(f"rules[{n}]: {keys}" for n, keys in enumerate(each))


# One module


def _asked(
    answered: Answered[_T], mask: Mask, said: Callable[[_T], str], *, policy: FailurePolicy | None = None
) -> ModuleExplanation:
    answer = answered.answer
    failure, details = None, {}
    if isinstance(answer, Failure):
        failure, details = answer.reason, dict(answer.details)
        becomes = "" if policy is None else f" (failurePolicy: {policy.value})"
        words = f"failed: {answer.reason}{becomes}"
    else:
        words = said(answer)
    all_words = {**details, "stderr": answered.stderr.decode(errors="replace")}
    return ModuleExplanation(
        name=answered.name,
        said=clean(mask.text(words), _MOST_WORDS_CHARACTERS),
        failure=failure,
        wall_seconds=answered.wall_seconds,
        usage=answered.usage,
        words={key: mask.text(text) for key, text in all_words.items() if text.strip()},
    )
