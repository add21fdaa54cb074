"""What is started and what comes of it: a process for a job, and the bare facts of its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from bulkhead.sandbox.compiled import CompiledModule
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.outcome import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of one entry point."""

    module: CompiledModule
    entry_point: str
    arguments: tuple[str, ...]
    stdin: bytes
    limits: Limits
    wall_seconds: float
    """`limits.wall_seconds`, or less where the caller's deadline comes first."""


class EndReason(IntEnum):
    """What we did to a process. The numbers are those of native/protocol.h."""

    BY_ITSELF = 0
    WALL_TIME = 1
    KILLED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The bare facts of a process that has ended and is reaped."""

    wait_status: int
    """As from os.wait4."""
    reason: EndReason
    stdout: bytes
    stdout_exceeded: bool
    stderr: bytes
    """The guest's words and the runtime's, mixed."""
    stderr_truncated: bool
    usage: Usage
    overhead_bytes: int
    """How much of the peak memory is the runtime's own."""


@dataclass(frozen=True, slots=True)
class Run:
    """A job that was started. `ended` gets an Exit, or a SandboxError if there never was a process."""

    ended: asyncio.Future[Exit]
    kill: Callable[[], None]
    """Ends the run; `ended` comes when the process is reaped. Harmless afterwards."""
