"""How a run ended: a frozen value. A failing guest is data, not an exception."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Outcome(StrEnum):
    """How a run ended. The names are those of `bulkhead.v1.Outcome`, which explains each."""

    OK = "ok"
    EXIT_NONZERO = "exit_nonzero"
    TRAP = "trap"
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    STDOUT_LIMIT = "stdout_limit"
    CANCELLED = "cancelled"
    KILLED = "killed"
    SANDBOX_CRASH = "sandbox_crash"
    SANDBOX_VIOLATION = "sandbox_violation"
    START_FAILED = "start_failed"


class Way(IntEnum):
    """How a run's process came into being. The numbers are those of native/protocol.h."""

    EXEC = 0
    """wasmtime was executed for it."""
    ZYGOTE = 1
    """It was forked from a wasmtime that had loaded the module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one run used."""

    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    """Largest resident set of the process, the runtime's own share included."""
    private_memory_bytes: int = 0
    """The part of it that it did not share with its zygote or other runs, estimated from above: the pages
    that it touched first, those of mapped files included."""
    way: Way = Way.EXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run, ended. `stdout` is a result only when the outcome is OK."""

    outcome: Outcome
    exit_code: int
    """The guest's own, with OK and EXIT_NONZERO; otherwise 0."""
    stdout: bytes
    stderr: bytes
    """What the guest wrote, without what the runtime added."""
    stderr_truncated: bool
    usage: Usage
    message: str
    """One sentence for people; holds nothing of the host."""
    diagnostics: str
    """What the runtime printed about the failure; may name paths: for logs only."""

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK
