"""The reviewer: Kubernetes reviews in, answers out. The one door for the front ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from bulkhead.sandbox import (
    DeadlinePassed,
    InvalidModule,
    InvalidRequest,
    Sandbox,
    StoreFull,
    UnknownModule,
)
from bulkhead.service import admission, authentication, authorization, strictjson
from bulkhead.service.admission import Admission, AdmissionModule, Stage
from bulkhead.service.authentication import Authentication
from bulkhead.service.authorization import Authorization
from bulkhead.service.call import ReviewModule
from bulkhead.service.config import AdmissionModuleConfig, Config, ConfigError, ModuleConfig, Problem
from bulkhead.service.errors import BadReview, ModuleFailed, Undecided
from bulkhead.service.yamlfile import Location

__all__ = ["BadReview", "DeadlinePassed", "ModuleFailed", "Reviewer", "Stage", "Undecided"]

# Of what the client still waits we keep a part, to answer in: kube-apiserver rounds its
# `?timeout=` up to a second, and an answer that comes late is as good as none.
_MARGIN_SHARE = 0.1
_MOST_MARGIN_SECONDS = 0.2

_ENTRY_POINTS = {
    "authentication": authentication.ENTRY_POINT,
    "authorization": authorization.ENTRY_POINT,
    "admission": admission.ENTRY_POINT,
}

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reviewer:
    """Answers reviews with the modules of one configuration. Owned by the event loop of its sandbox."""

    sandbox: Sandbox
    authentication: Authentication
    authorization: Authorization
    admission: Admission

    @classmethod
    async def open(cls, config: Config, sandbox: Sandbox) -> Reviewer:
        """Stores, compiles and prepares every module that the configuration names.

        Raises ConfigError with what is wrong with each of them; SandboxError if the host fails us.
        """
        problems: list[Problem] = []
        ready: dict[str, list[tuple[ModuleConfig, ReviewModule]]] = {}
        for section, modules in config.sections():
            ready[section] = []
            for index, module in enumerate(modules):
                location = (section, "modules", index)
                try:
                    ready[section].append((module, await _prepare(config, sandbox, section, module)))
                except _NotUsable as error:
                    problems.append(config.problem((*location, *error.key), f"module {module.name}: {error}"))
        if problems:
            raise ConfigError(problems)
        return cls(
            sandbox,
            Authentication(
                tuple(module for _, module in ready["authentication"]), config.authentication.audiences
            ),
            Authorization(tuple(module for _, module in ready["authorization"])),
            Admission(tuple(_admission_modules(ready["admission"]))),
        )

    @property
    def modules(self) -> tuple[ReviewModule, ...]:
        """All modules, section by section, in the order of the configuration."""
        return (
            *self.authentication.modules,
            *self.authorization.modules,
            *(each.module for each in self.admission.modules),
        )

    async def authenticate(self, body: bytes, *, deadline: float | None = None) -> bytes:
        """Answers a TokenReview, as JSON, in the version that was sent.

        `deadline` is on time.monotonic(). Raises BadReview, DeadlinePassed (nothing was run).
        """
        return await self.authentication.answer(self.sandbox, body, deadline=_answer_by(deadline))

    async def authorize(self, body: bytes, *, deadline: float | None = None) -> bytes:
        """Answers a SubjectAccessReview, as JSON, in the version that was sent.

        `deadline` is on time.monotonic(). Raises BadReview, Undecided, DeadlinePassed (nothing was run).
        """
        return await self.authorization.answer(self.sandbox, body, deadline=_answer_by(deadline))

    async def admit(
        self, body: bytes, *, stage: Stage, module: str | None = None, deadline: float | None = None
    ) -> bytes:
        """Answers an AdmissionReview, as JSON, in the version that was sent.

        `module`: ask no other than the one of this name. `deadline` is on time.monotonic(). Raises
        UnknownModule, BadReview, ModuleFailed, DeadlinePassed (nothing was run).
        """
        if module is not None and module not in self.admission.names(stage):
            raise UnknownModule(f"no {stage} module of that name is configured")
        return await self.admission.answer(
            self.sandbox, body, stage=stage, only=module, deadline=_answer_by(deadline)
        )


def _answer_by(deadline: float | None) -> float | None:
    """When runs must have ended for an answer to arrive by `deadline`. Raises DeadlinePassed."""
    if deadline is None:
        return None
    left_seconds = deadline - time.monotonic()
    if left_seconds <= 0:
        raise DeadlinePassed("the deadline had passed before any module could be asked")
    return deadline - min(left_seconds * _MARGIN_SHARE, _MOST_MARGIN_SECONDS)


class _NotUsable(Exception):
    """A configured module cannot be used. `key` is the part of its configuration that is to blame."""

    def __init__(self, key: Location, message: str) -> None:
        super().__init__(message)
        self.key = key


async def _prepare(config: Config, sandbox: Sandbox, section: str, module: ModuleConfig) -> ReviewModule:
    """Raises _NotUsable, SandboxError."""
    limits = config.limits_of(module)
    try:
        limits.within(sandbox.options.maximum_limits)
    except InvalidRequest as error:
        raise _NotUsable(("limits",), str(error)) from None
    entry_point = _ENTRY_POINTS[section]
    try:
        data = await asyncio.to_thread(module.module.read_bytes)
    except OSError as error:
        raise _NotUsable(("module",), f"cannot read {module.module}: {error.strerror}") from None
    try:
        info, _ = await sandbox.put(data)
        await sandbox.prepare(info.digest, entry_point, metered=limits.fuel is not None)
    except (InvalidModule, StoreFull, UnknownModule) as error:
        raise _NotUsable(("module",), str(error)) from None
    return ReviewModule(
        section=section,
        name=module.name,
        digest=info.digest,
        entry_point=entry_point,
        limits=limits,
        settings=strictjson.encode(module.settings) if module.has_settings else None,
        debug=module.debug,
    )


def _admission_modules(ready: list[tuple[ModuleConfig, ReviewModule]]) -> Iterator[AdmissionModule]:
    for config, module in ready:
        assert isinstance(config, AdmissionModuleConfig)
        if not config.rules:
            _log.warning(
                "module_is_never_asked", section=module.section, module=module.name, why="it has no rules"
            )
        yield AdmissionModule(
            module=module,
            mutating=config.mutating,
            rules=tuple(rule.rule() for rule in config.rules),
            failure_policy=config.failure_policy,
        )
