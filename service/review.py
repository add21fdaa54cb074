"""The reviewer: Kubernetes reviews in, answers out. The one door for the front ends."""

from __future__ import annotations

import time

from bulkhead.sandbox import DeadlinePassed, Sandbox, UnknownModule
from bulkhead.service.admission import Stage
from bulkhead.service.call import ReviewModule
from bulkhead.service.chains import Chains, find_chains
from bulkhead.service.config import Config
from bulkhead.service.errors import BadReview, ModuleFailed, Undecided

__all__ = ["BadReview", "DeadlinePassed", "ModuleFailed", "Reviewer", "Stage", "Undecided"]

# Of what the client still waits we keep a part, to answer in: kube-apiserver rounds its
# `?timeout=` up to a second, and an answer that comes late is as good as none.
_MARGIN_SHARE = 0.1
_MOST_MARGIN_SECONDS = 0.2


class Reviewer:
    """Answers reviews with the modules of one configuration at a time. Owned by its sandbox's event loop."""

    def __init__(self, sandbox: Sandbox, chains: Chains) -> None:
        self.sandbox = sandbox
        self.chains = chains
        """May be replaced at any time: reviews that have begun go on with what they began with."""

    @classmethod
    async def open(cls, config: Config, sandbox: Sandbox) -> Reviewer:
        """Finds the modules of a configuration. Raises ConfigError, SandboxError."""
        return cls(sandbox, await find_chains(config, sandbox))

    @property
    def modules(self) -> tuple[ReviewModule, ...]:
        """All modules, section by section, in the order of the configuration."""
        return self.chains.modules

    async def authenticate(self, body: bytes, *, deadline: float | None = None) -> bytes:
        """Answers a TokenReview, as JSON, in the version that was sent.

        `deadline` is on time.monotonic(). Raises BadReview, DeadlinePassed (nothing was run).
        """
        return await self.chains.authentication.answer(self.sandbox, body, deadline=_answer_by(deadline))

    async def authorize(self, body: bytes, *, deadline: float | None = None) -> bytes:
        """Answers a SubjectAccessReview, as JSON, in the version that was sent.

        `deadline` is on time.monotonic(). Raises BadReview, Undecided, DeadlinePassed (nothing was run).
        """
        return await self.chains.authorization.answer(self.sandbox, body, deadline=_answer_by(deadline))

    async def admit(
        self, body: bytes, *, stage: Stage, module: str | None = None, deadline: float | None = None
    ) -> bytes:
        """Answers an AdmissionReview, as JSON, in the version that was sent.

        `module`: ask no other than the one of this name. `deadline` is on time.monotonic(). Raises
        UnknownModule, BadReview, ModuleFailed, DeadlinePassed (nothing was run).
        """
        if module is not None and module not in self.chains.admission.names(stage):
            raise UnknownModule(f"no {stage} module of that name is configured")
        return await self.chains.admission.answer(
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
