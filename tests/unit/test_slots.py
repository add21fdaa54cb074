"""A bounded number of runs with a bounded queue."""

from __future__ import annotations

import asyncio
import time

import pytest

from bulkhead.sandbox import DeadlinePassed, Overloaded
from bulkhead.sandbox.slots import Slots


async def turn(slots: Slots, order: list[int], number: int) -> None:
    await slots.acquire(None)
    order.append(number)


async def settle() -> None:
    """Lets every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_serves_in_the_order_of_arrival() -> None:
    slots, order = Slots(1, 10), list[int]()
    await slots.acquire(None)
    tasks = [asyncio.create_task(turn(slots, order, number)) for number in range(3)]
    await settle()
    assert (slots.active, slots.waiting, order) == (1, 3, [])
    for expected in ([0], [0, 1], [0, 1, 2]):
        slots.release()
        await settle()
        assert order == expected
    await asyncio.gather(*tasks)
    slots.release()
    assert (slots.active, slots.waiting) == (0, 0)


async def test_refuses_at_once_when_the_queue_is_full() -> None:
    slots = Slots(1, 1)
    await slots.acquire(None)
    waiting = asyncio.create_task(slots.acquire(None))
    await settle()
    with pytest.raises(Overloaded):
        await slots.acquire(None)
    slots.release()
    await waiting


async def test_does_not_start_after_the_deadline() -> None:
    slots = Slots(1, 1)
    with pytest.raises(DeadlinePassed):
        await slots.acquire(time.monotonic() - 1)
    await slots.acquire(None)
    with pytest.raises(DeadlinePassed):
        await slots.acquire(time.monotonic() + 0.01)
    assert (slots.active, slots.waiting) == (1, 0)


async def test_forgets_a_waiter_that_is_cancelled() -> None:
    slots = Slots(1, 2)
    await slots.acquire(None)
    given_up = asyncio.create_task(slots.acquire(None))
    next_one = asyncio.create_task(slots.acquire(None))
    await settle()
    given_up.cancel()
    await settle()
    assert slots.waiting == 1
    slots.release()
    await next_one
    slots.release()
    assert slots.active == 0


async def test_passes_a_turn_on_that_comes_as_its_waiter_is_cancelled() -> None:
    slots = Slots(1, 2)
    await slots.acquire(None)
    given_up = asyncio.create_task(slots.acquire(None))
    next_one = asyncio.create_task(slots.acquire(None))
    await settle()
    slots.release()  # the turn is given_up's, which does not know yet
    given_up.cancel()
    await asyncio.wait_for(next_one, 5)
    assert given_up.cancelled()
    slots.release()
    assert slots.active == 0
