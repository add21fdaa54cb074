"""A bounded number of runs with a bounded queue."""

from __future__ import annotations

import asyncio
import random
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


async def test_survives_a_waiter_that_is_cancelled_before_its_turn_comes_in_the_same_moment() -> None:
    """The order of the two matters: here the release finds a waiter that is about to leave."""
    slots = Slots(1, 2)
    await slots.acquire(None)
    given_up = asyncio.create_task(slots.acquire(None))
    next_one = asyncio.create_task(slots.acquire(None))
    await settle()
    given_up.cancel()
    slots.release()
    await asyncio.wait_for(next_one, 5)
    await settle()
    assert given_up.cancelled()
    slots.release()
    assert (slots.active, slots.waiting) == (0, 0)


async def test_the_last_waiter_to_leave_frees_the_slot() -> None:
    slots = Slots(1, 1)
    await slots.acquire(None)
    given_up = asyncio.create_task(slots.acquire(None))
    await settle()
    given_up.cancel()
    slots.release()
    await settle()
    assert given_up.cancelled()
    assert (slots.active, slots.waiting) == (0, 0)
    await slots.acquire(None)


async def test_waits_until_nobody_has_or_wants_a_slot() -> None:
    slots = Slots(1, 1)
    await slots.until_idle()
    await slots.acquire(None)
    waiting = asyncio.create_task(slots.acquire(None))
    idle = asyncio.create_task(slots.until_idle())
    await settle()
    slots.release()
    await waiting
    assert not idle.done()
    slots.release()
    await asyncio.wait_for(idle, 5)


@pytest.mark.parametrize("seed", range(20))
async def test_never_gives_more_slots_than_there_are_and_loses_none(seed: int) -> None:
    """Takers that stay, leave in between, or come too late, in a random order."""
    chance = random.Random(seed)
    slots, taken = Slots(3, 10), 0

    async def take() -> None:
        nonlocal taken
        deadline = chance.choice((None, None, time.monotonic() + chance.random() / 100))
        await slots.acquire(deadline)
        try:
            taken += 1
            assert taken <= 3
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        finally:
            taken -= 1
            slots.release()

    takers: list[asyncio.Task[None]] = []
    for _ in range(200):
        takers.append(asyncio.create_task(take()))
        if chance.random() < 0.4:
            chance.choice(takers).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    ends = await asyncio.gather(*takers, return_exceptions=True)
    assert {type(end) for end in ends} <= {type(None), Overloaded, DeadlinePassed, asyncio.CancelledError}
    assert (slots.active, slots.waiting, taken) == (0, 0, 0)


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
