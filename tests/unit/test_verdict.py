"""From the facts of a process that ended to an outcome."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from bulkhead.sandbox.compiled import CompiledModule
from bulkhead.sandbox.launch import EndReason, Exit, Job
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.outcome import Outcome, Usage
from bulkhead.sandbox.verdict import judge

LIMITS = Limits(memory_bytes=64 << 20, cpu_seconds=1.0, wall_seconds=2.0)
SMALL = Usage(wall_seconds=0.01, cpu_seconds=0.01, peak_memory_bytes=5 << 20)
RUNTIME_WORDS = b"Error: failed to run main module `/proc/self/fd/3`\n\nCaused by:\n    wasm trap"


@pytest.fixture(scope="module")
def job() -> Job:
    module = CompiledModule.load("sha256:" + "0" * 64, b"x", metered=False)
    return Job(module=module, entry_point="run", arguments=(), stdin=b"", limits=LIMITS, wall_seconds=2.0)


def exited(code: int) -> Exit:
    return ended(code << 8)


def ended(wait_status: int, reason: EndReason = EndReason.BY_ITSELF) -> Exit:
    return Exit(
        wait_status=wait_status,
        reason=reason,
        stdout=b"{}",
        stdout_exceeded=False,
        stderr=b"",
        stderr_truncated=False,
        usage=SMALL,
        overhead_bytes=4 << 20,
    )


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (exited(0), Outcome.OK),
        (exited(1), Outcome.EXIT_NONZERO),
        (exited(125), Outcome.EXIT_NONZERO),
        (exited(134), Outcome.TRAP),
        (ended(signal.SIGPROF), Outcome.CPU_LIMIT),
        (ended(signal.SIGXCPU), Outcome.CPU_LIMIT),
        (ended(signal.SIGXFSZ), Outcome.STDOUT_LIMIT),
        (ended(signal.SIGSYS), Outcome.SANDBOX_VIOLATION),
        (ended(signal.SIGSEGV), Outcome.SANDBOX_CRASH),
        (ended(signal.SIGKILL), Outcome.KILLED),
        (ended(signal.SIGTERM), Outcome.KILLED),
        (ended(signal.SIGKILL, EndReason.WALL_TIME), Outcome.TIMEOUT),
        (ended(signal.SIGKILL, EndReason.KILLED), Outcome.CANCELLED),
        # It ended before our signal came.
        (ended(0, EndReason.WALL_TIME), Outcome.OK),
        (replace(exited(0), stdout_exceeded=True), Outcome.STDOUT_LIMIT),
        (replace(exited(134), usage=replace(SMALL, peak_memory_bytes=68 << 20)), Outcome.MEMORY_LIMIT),
        (replace(exited(7), usage=replace(SMALL, peak_memory_bytes=68 << 20)), Outcome.EXIT_NONZERO),
        (replace(ended(signal.SIGKILL), usage=replace(SMALL, cpu_seconds=3.0)), Outcome.CPU_LIMIT),
    ],
)
def test_tells_the_outcome_from_what_happened(job: Job, end: Exit, outcome: Outcome) -> None:
    result = judge(job, end)
    assert result.outcome is outcome
    assert result.ok is (outcome is Outcome.OK)
    assert result.message


def test_believes_nothing_that_a_guest_prints(job: Job) -> None:
    forged = replace(exited(0), stderr=RUNTIME_WORDS)
    assert judge(job, forged).outcome is Outcome.OK
    assert judge(job, replace(exited(3), stderr=RUNTIME_WORDS)).outcome is Outcome.EXIT_NONZERO


@pytest.mark.parametrize("guest_words", [b"", b"words", b"words\n", b"Error: mine\n"])
def test_keeps_the_runtimes_words_from_clients(job: Job, guest_words: bytes) -> None:
    result = judge(job, replace(exited(134), stderr=guest_words + RUNTIME_WORDS))
    assert result.stderr == guest_words
    assert result.diagnostics == RUNTIME_WORDS.decode()


def test_names_the_limit_that_was_hit(job: Job) -> None:
    assert "2 s" in judge(job, ended(signal.SIGKILL, EndReason.WALL_TIME)).message
    early = replace(job, wall_seconds=0.5)
    assert "deadline" in judge(early, ended(signal.SIGKILL, EndReason.WALL_TIME)).message
    assert "1 s" in judge(job, ended(signal.SIGPROF)).message
