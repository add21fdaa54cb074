"""Waiting for what blocks."""

from __future__ import annotations

import asyncio
import threading

import pytest

from bulkhead.service.daemon_thread import run_in_daemon_thread


def divide_by_zero() -> float:
    return 1 / 0


async def test_hands_over_results_and_errors() -> None:
    assert await run_in_daemon_thread(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await run_in_daemon_thread(divide_by_zero)


def test_what_blocks_is_left_behind() -> None:
    """Neither its caller nor the end of the loop waits for it, and its late result goes nowhere."""
    release, started = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def block() -> None:
        threads.append(threading.current_thread())
        started.set()
        release.wait()

    async def give_up() -> None:
        waiting = asyncio.create_task(run_in_daemon_thread(block))
        await asyncio.to_thread(started.wait)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(give_up())
    (thread,) = threads
    assert thread.is_alive()
    assert thread.daemon, "or else the process would wait for it"
    release.set()
    thread.join()
