"""From the facts of a process that ended to an outcome. Nothing that a guest prints counts."""

from __future__ import annotations

import os
import signal

from bulkhead.sandbox.launch import EndReason, Exit, Job
from bulkhead.sandbox.limits import format_quantity
from bulkhead.sandbox.outcome import Outcome, RunResult
from bulkhead.sandbox.probe import TRAP_EXIT_CODE

# Of native/zygote.c, where a run could not be confined. No guest's: wasmtime makes 1 of what it asks
# for above 125.
NOT_CONFINED_EXIT_CODE = 127
_CPU_SIGNALS = frozenset({signal.SIGPROF, signal.SIGXCPU})
_CRASH_SIGNALS = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGTRAP}
)
# A module that fails with so much of its memory resident failed for want of memory. Few touch all
# of it: allocators keep some in reserve.
_EXHAUSTED_SHARE = 0.9
# Where wasmtime's own words begin in standard error, after all of the guest's.
_RUNTIME_WORDS = b"Error: failed to "


def judge(job: Job, end: Exit) -> RunResult:
    """Classifies a run: first what we did to it, then the signal, then the exit code."""
    outcome = _outcome(job, end)
    exit_code = os.WEXITSTATUS(end.wait_status) if outcome in (Outcome.OK, Outcome.EXIT_NONZERO) else 0
    guest_words, runtime_words = _split_stderr(end.stderr, outcome)
    return RunResult(
        outcome=outcome,
        exit_code=exit_code,
        stdout=end.stdout,
        stderr=guest_words,
        stderr_truncated=end.stderr_truncated,
        usage=end.usage,
        message=_message(job, outcome, exit_code),
        diagnostics=runtime_words.decode(errors="replace"),
    )


def _outcome(job: Job, end: Exit) -> Outcome:
    if os.WIFSIGNALED(end.wait_status):
        return _outcome_of_signal(job, end, os.WTERMSIG(end.wait_status))
    if end.stdout_exceeded:
        return Outcome.STDOUT_LIMIT
    code = os.WEXITSTATUS(end.wait_status)
    if code == 0:
        return Outcome.OK
    if code == NOT_CONFINED_EXIT_CODE:
        return Outcome.START_FAILED
    if code != TRAP_EXIT_CODE:
        return Outcome.EXIT_NONZERO
    return Outcome.MEMORY_LIMIT if _memory_exhausted(job, end) else Outcome.TRAP


def _outcome_of_signal(job: Job, end: Exit, number: int) -> Outcome:
    if number == signal.SIGKILL:
        if end.reason is EndReason.WALL_TIME:
            return Outcome.TIMEOUT
        if end.reason is EndReason.KILLED:
            return Outcome.CANCELLED
        # RLIMIT_CPU kills, too, behind the timer.
        return Outcome.CPU_LIMIT if end.usage.cpu_seconds > job.limits.cpu_seconds else Outcome.KILLED
    if number in _CPU_SIGNALS:
        return Outcome.CPU_LIMIT
    if number == signal.SIGXFSZ:
        return Outcome.STDOUT_LIMIT
    if number == signal.SIGSYS:
        return Outcome.SANDBOX_VIOLATION
    if number in _CRASH_SIGNALS:
        return Outcome.MEMORY_LIMIT if _memory_exhausted(job, end) else Outcome.SANDBOX_CRASH
    return Outcome.KILLED


def _memory_exhausted(job: Job, end: Exit) -> bool:
    guest_bytes = end.usage.peak_memory_bytes - end.overhead_bytes
    return guest_bytes >= job.limits.memory_bytes * _EXHAUSTED_SHARE


def _split_stderr(stderr: bytes, outcome: Outcome) -> tuple[bytes, bytes]:
    """The guest's words and the runtime's, which hold paths of the host and addresses.

    The runtime speaks last, and begins where the guest stopped, be it in the middle of a line. A
    guest that imitates it loses its own words, and no more.
    """
    at = -1 if outcome is Outcome.OK else stderr.find(_RUNTIME_WORDS)
    return (stderr, b"") if at < 0 else (stderr[:at], stderr[at:])


def _message(job: Job, outcome: Outcome, exit_code: int) -> str:
    if outcome is Outcome.OK:  # most end so, and the rest is a lot of text to put together
        return "it succeeded"
    limits = job.limits
    cpu_or_wall = (
        "the caller's deadline came"
        if job.wall_seconds < limits.wall_seconds
        else (f"it ran longer than {limits.wall_seconds:g} s")
    )
    return {
        Outcome.EXIT_NONZERO: f"it exited with code {exit_code}",
        Outcome.TRAP: "it trapped",
        Outcome.TIMEOUT: cpu_or_wall,
        Outcome.CPU_LIMIT: f"it used more than {limits.cpu_seconds:g} s of CPU time",
        Outcome.MEMORY_LIMIT: f"it failed with its {format_quantity(limits.memory_bytes)} of memory used up",
        Outcome.STDOUT_LIMIT: f"it wrote more than {format_quantity(limits.stdout_bytes)} to standard output",
        Outcome.CANCELLED: "its caller went away",
        Outcome.KILLED: "something outside of Bulkhead killed it",
        Outcome.SANDBOX_CRASH: "the runtime crashed under it",
        Outcome.SANDBOX_VIOLATION: "it made a forbidden system call",
        Outcome.START_FAILED: "it could not be started",
    }[outcome]
