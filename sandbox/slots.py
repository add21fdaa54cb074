"""How many runs there are at once, and how many may wait for their turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from bulkhead.sandbox.errors import DeadlinePassed, Overloaded


class Slots:
    """A bounded number of runs with a bounded queue in front, first come, first served.

    A slot is given back when the run's process is reaped, not when its caller goes away: the
    bound holds for processes. Owned by one event loop.
    """

    def __init__(self, most_active: int, most_waiting: int) -> None:
        self._free = most_active
        self._most_active = most_active
        self._most_waiting = most_waiting
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        return self._most_active - self._free

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self, deadline: float | None) -> None:
        """Takes a slot. `deadline` is on time.monotonic().

        Raises Overloaded at once when the queue is full, DeadlinePassed when the turn did not come.
        """
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed("the deadline had passed before the run could start")
        if self._free > 0 and not self._waiting:
            self._free -= 1
            self._idle.clear()
            return
        if len(self._waiting) >= self._most_waiting:
            raise Overloaded(
                f"{self._most_active} runs are active and {self._most_waiting} wait; try again later"
            )
        await self._wait_turn(deadline)

    async def _wait_turn(self, deadline: float | None) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release()  # the turn came in the very moment: pass it on
            else:
                with contextlib.suppress(ValueError):  # passed over by a release in between
                    self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise DeadlinePassed("the deadline passed while the run waited for its turn") from None
            raise

    def release(self) -> None:
        """Gives a slot back, to the longest waiting if there is one."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
        if self._free == self._most_active:
            self._idle.set()

    async def until_idle(self) -> None:
        """Returns when no slot is taken and nobody waits for one."""
        await self._idle.wait()
