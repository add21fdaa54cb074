"""Connections spread over workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from bulkhead.service.acceptor import Acceptor
from bulkhead.service.balance import Balance, Share, part
from tests.support.sandboxes import eventually


class Worker:
    """Accepts from a socket that others accept from, too, and keeps the connections."""

    def __init__(self, listener: socket.socket, share: Share) -> None:
        self.connections: set[asyncio.BaseTransport] = set()
        self.acceptor = Acceptor(
            listener.dup(), None, lambda: _Connection(self), lambda: len(self.connections), share=share
        )


class _Connection(asyncio.Protocol):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._worker.connections.add(transport)

    def connection_lost(self, _: Exception | None) -> None:
        assert self._transport is not None
        self._worker.connections.discard(self._transport)
        self._worker.acceptor.tell_count()


class Service:
    """Workers that accept from one socket, in one process."""

    def __init__(self, listener: socket.socket, balance: Balance, workers: int) -> None:
        self._address = listener.getsockname()
        self.balance = balance
        self.workers = [Worker(listener, Share(balance, index)) for index in range(workers)]
        self.clients: list[asyncio.StreamWriter] = []

    @property
    def held(self) -> list[int]:
        return [len(worker.connections) for worker in self.workers]

    async def connect(self, count: int) -> None:
        """So many connect at the same time, and are accepted."""
        held = sum(self.held)
        connected = await asyncio.gather(*(asyncio.open_connection(*self._address) for _ in range(count)))
        self.clients += [writer for _, writer in connected]
        await eventually(lambda: sum(self.held) == held + count, "the workers to accept")

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for worker in self.workers:
            for transport in worker.connections:
                transport.close()


Start = Callable[[int], Awaitable[Service]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(workers: int) -> Service:
            return await stack.enter_async_context(_service(workers))

        yield start


@asynccontextmanager
async def _service(workers: int) -> AsyncIterator[Service]:
    balance = Balance.of(workers)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Service(listener, balance, workers)
        for worker in service.workers:
            worker.acceptor.start()
        try:
            yield service
        finally:
            for worker in service.workers:
                await worker.acceptor.stop()
            service.close()
            balance.close()


async def test_each_holds_as_many_as_the_others(start: Start) -> None:
    service = await start(4)
    for held in (1, 2):
        for _ in range(4):
            await service.connect(1)
        assert service.held == [held] * 4


async def test_many_at_once_are_spread(start: Start) -> None:
    service = await start(4)
    await service.connect(64)
    assert max(service.held) - min(service.held) <= 4


async def test_who_has_lost_connections_gets_the_next_ones(start: Start) -> None:
    service = await start(2)
    await service.connect(8)
    for transport in list(service.workers[0].connections):
        transport.close()
    await eventually(lambda: service.held == [0, 4], "the worker to notice")
    await service.connect(4)
    assert service.held == [4, 4]


async def test_nobody_waits_for_a_worker_that_is_gone(start: Start) -> None:
    service = await start(2)
    await service.workers[0].acceptor.stop()
    await service.connect(4)
    assert service.held == [0, 4]
    assert Share(service.balance, 1).lead == 0


async def test_one_that_does_not_come_for_its_connections_costs_the_others_a_moment(start: Start) -> None:
    service = await start(2)
    await service.workers[0].acceptor.stop()
    service.balance.hold(0, 0)  # as if it were there: stopped, or busy without end
    await service.connect(20)
    assert service.held == [0, 20]


def test_all_see_what_each_says() -> None:
    ours = Balance.of(3)
    theirs = Balance(ours.fd)
    one, two, three = (Share(theirs, index) for index in range(3))
    one.hold(7)
    two.hold(5)
    assert (ours.lead(0), ours.lead(1)) == (2, 0)
    three.hold(0)
    assert (one.lead, two.lead, three.lead) == (7, 5, 0)
    three.retire()
    assert (one.lead, two.lead) == (2, 0)
    ours.close()


@pytest.mark.parametrize(("total", "parts"), [(8, 1), (8, 3), (2, 4), (0, 2), (512, 7)])
def test_parts_make_the_whole_and_differ_by_one_at_most(total: int, parts: int) -> None:
    each = [part(total, index, parts) for index in range(parts)]
    assert sum(each) == total
    assert max(each) - min(each) <= 1
