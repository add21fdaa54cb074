"""One question to one module: what goes in, what must come out, and what counts as a failure.

A k8s-wasm module reads `{"request": REVIEW, "settings": ANY}` and writes `{"response": REVIEW}` or
`{"error": TEXT}`. A module that fails is an answer like others, a `Failure`; what became of it is
for the review's kind to decide.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import structlog
from msgspec import Raw

from bulkhead.sandbox import (
    DeadlinePassed,
    InvalidModule,
    InvalidRequest,
    Limits,
    Outcome,
    Overloaded,
    RunResult,
    Sandbox,
    SandboxError,
    UnknownModule,
    Usage,
)
from bulkhead.service import strictjson
from bulkhead.service.mask import Mask
from bulkhead.service.offload import run_sized
from bulkhead.service.strictjson import Mismatch, NotStrict
from bulkhead.service.words import clean

INVALID_OUTPUT = "invalid_output"
MODULE_ERROR = "module_error"
NOT_USABLE = "not_usable"
OVERLOADED = "overloaded"
SANDBOX_ERROR = "sandbox_error"

_MOST_LOGGED_CHARACTERS = 4096
_MOST_ERROR_CHARACTERS = 256

_T = TypeVar("_T")
_log = structlog.get_logger()


class Unreadable(ValueError):
    """A module's response is not what was asked for. The text says what was expected."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A module that was asked and gave no answer."""

    reason: str
    """One word: the outcome of its run, or one of the constants above."""
    details: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """What is known of it, as the log has it but not masked: for the operator's eyes only."""

    def told(self, name: str) -> str:
        """What clients are told: nothing of the host, and nothing that the module wrote."""
        return f"module {name} failed: {self.reason}"


@dataclass(frozen=True, slots=True)
class Answered(Generic[_T]):
    """What became of one question."""

    name: str
    answer: _T | Failure
    wall_seconds: float
    """With the time that it waited for its turn."""
    usage: Usage | None
    """None if no process ran."""
    stderr: bytes = field(default=b"", repr=False)
    """What the module wrote there, not masked: for the operator's eyes only."""

    def for_log(self) -> dict[str, object]:
        """The fields of a log event that tell of this question."""
        fields: dict[str, object] = {
            "name": self.name,
            "outcome": self.answer.reason if isinstance(self.answer, Failure) else Outcome.OK.value,
            "wall_seconds": round(self.wall_seconds, 6),
        }
        if self.usage is not None:
            fields["cpu_seconds"] = round(self.usage.cpu_seconds, 6)
            fields["peak_memory_bytes"] = self.usage.peak_memory_bytes
        return fields


class _Failed(Exception):
    """A failure on its way to the log: with its details, which nobody else gets."""

    def __init__(self, reason: str, **details: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = details


class _Output(msgspec.Struct):
    response: Raw = msgspec.field(default_factory=Raw)
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewModule:
    """A configured module, ready to be asked."""

    section: str
    """`authentication`, `authorization` or `admission`."""
    name: str
    digest: str
    entry_point: str
    limits: Limits
    settings: bytes | None
    """As JSON; None when none are configured."""
    debug: bool
    not_usable: str = ""
    """Why it cannot be asked, if it cannot: it then fails whenever it is."""

    async def ask(
        self,
        sandbox: Sandbox,
        review: bytes,
        read: Callable[[Raw], _T],
        *,
        deadline: float | None,
        mask: Mask,
    ) -> Answered[_T]:
        """Runs the module on a review, as JSON of version v1, and reads its response with `read`.

        `read` raises Unreadable or Mismatch for a response that is not what was asked for. Every
        failure is in the answer, and logged; nothing is raised but cancellation and defects.
        """
        start = time.monotonic()
        result: RunResult | None = None
        answer: _T | Failure
        try:
            result = await self._run(sandbox, self._input(review), deadline)
            answer = await run_sized(len(result.stdout), _read_answer, result, read)
        except _Failed as failed:
            answer = Failure(failed.reason, failed.details)
            self._log_failure(failed, result, mask)
        if self.debug:
            await run_sized(len(review), self._log_debug, review, result, mask)
        wall_seconds = time.monotonic() - start
        if result is None:
            return Answered(self.name, answer, wall_seconds, None)
        return Answered(self.name, answer, wall_seconds, result.usage, result.stderr)

    def _input(self, review: bytes) -> bytes:
        # Spliced, not written anew: the module sees numbers and escapes as they were sent.
        settings = b"" if self.settings is None else b',"settings":' + self.settings
        return b'{"request":' + review + settings + b"}"

    async def _run(self, sandbox: Sandbox, stdin: bytes, deadline: float | None) -> RunResult:
        if self.not_usable:
            raise _Failed(NOT_USABLE, details=self.not_usable)
        try:
            return await sandbox.run(
                self.digest, self.entry_point, stdin=stdin, limits=self.limits, deadline=deadline
            )
        except DeadlinePassed as error:
            raise _Failed(Outcome.TIMEOUT, details=str(error)) from None
        except Overloaded as error:
            raise _Failed(OVERLOADED, details=str(error)) from None
        except (SandboxError, UnknownModule, InvalidModule, InvalidRequest) as error:
            # It was checked and prepared when it was configured: whatever it is now, it is our fault.
            raise _Failed(SANDBOX_ERROR, details=str(error)) from error

    def _log_failure(self, failed: _Failed, result: RunResult | None, mask: Mask) -> None:
        _log.warning(
            "module_failed",
            section=self.section,
            module=self.name,
            digest=self.digest,
            reason=failed.reason,
            **{key: _loggable(text, mask) for key, text in failed.details.items()},
            **_told_by_run(result, mask),
        )

    def _log_debug(self, review: bytes, result: RunResult | None, mask: Mask) -> None:
        # Without the settings: they are the operator's own, and may hold what nobody masks.
        _log.info(
            "module_debug",
            section=self.section,
            module=self.name,
            input=mask.value(strictjson.decode(review)),
            output=None if result is None else _shown_output(result.stdout, mask),
            **_told_by_run(result, mask),
        )


def _read_answer(result: RunResult, read: Callable[[Raw], _T]) -> _T:
    """What `read` makes of the response in a run's output. Raises _Failed."""
    if not result.ok:
        raise _Failed(result.outcome, details=result.message, diagnostics=result.diagnostics)
    try:
        return read(_response(result.stdout))
    except (NotStrict, Mismatch, Unreadable) as error:
        raise _Failed(INVALID_OUTPUT, details=str(error)) from None


def _response(stdout: bytes) -> Raw:
    """The response in a module's output. Raises _Failed, NotStrict, Mismatch, Unreadable."""
    if not stdout:
        raise Unreadable("expected JSON on standard output, got nothing")
    strictjson.check(stdout)
    output = strictjson.read(stdout, _Output)
    # An empty text is how some languages write that there is none.
    if output.error:
        raise _Failed(MODULE_ERROR, details=clean(output.error, _MOST_ERROR_CHARACTERS))
    if len(output.response) == 0 or bytes(output.response) == b"null":
        raise Unreadable("expected a response or an error, got neither")
    return output.response


# Logging


def _told_by_run(result: RunResult | None, mask: Mask) -> dict[str, object]:
    if result is None:
        return {}
    return {
        "outcome": result.outcome.value,
        "exit_code": result.exit_code,
        "stderr": _loggable(result.stderr.decode(errors="replace"), mask),
    }


def _loggable(text: str, mask: Mask) -> str:
    # Masked before it is cut: half a token is a secret, too.
    return clean(mask.text(text), _MOST_LOGGED_CHARACTERS)


def _shown_output(stdout: bytes, mask: Mask) -> Any:
    try:
        strictjson.check(stdout)
    except NotStrict:
        return _loggable(stdout.decode(errors="replace"), mask)
    output = strictjson.decode(stdout)
    match output:
        case {"response": {"response": {"patch": str(patch)} as response}}:
            response["patch"] = _shown_patch(patch)
    return mask.value(output)


def _shown_patch(patch: str) -> Any:
    """The object inside a `Full` patch; of a JSON patch only what it touches, not the values."""
    try:
        data = base64.b64decode(patch, validate=True)
        strictjson.check(data)
    except ValueError:
        return f"({len(patch)} characters)"
    match strictjson.decode(data):
        case dict(whole):
            return whole
        case list(operations):
            return [
                {key: each.get(key) for key in ("op", "path")}
                for each in operations
                if isinstance(each, dict)
            ]
        case _:
            return f"({len(patch)} characters)"
