"""Waiting for what blocks and cannot be called off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")


async def run_in_daemon_thread(function: Callable[[], _T]) -> _T:
    """Calls `function` in a thread of its own. Whoever is cancelled leaves it behind, to end some time.

    Unlike with asyncio.to_thread, no end of the event loop or of the process waits for it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def deliver(result: _T | None, error: BaseException | None) -> None:
        if done.done():
            return  # nobody waits any more
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # None only if it is the result

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=run, name="bulkhead-fetch", daemon=True).start()
    return await done
