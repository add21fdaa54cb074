"""One spawner for several processes: they share its zygotes, and it places all their runs.

The process that starts the others has a SpawnerHost, and gives each of them a socket, through which
they get as many connections as they need: one at the start, another one whenever the spawner died.
"""

from __future__ import annotations

import asyncio
import socket

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.spawner import Spawner, SpawnerKeeper

_QUESTION = b"spawner?"
# For the answer; it includes the start of a spawner.
_ANSWER_SECONDS = 15.0


class SpawnerHost:
    """Keeps a spawner alive and connects others to it. Owned by one event loop."""

    def __init__(self) -> None:
        self._keeper = SpawnerKeeper()
        self._offered: set[socket.socket] = set()
        self._answering: set[asyncio.Task[None]] = set()

    def offer(self) -> socket.socket:
        """Returns the socket for one other process, which is to close it here when it has it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._offered.add(ours)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._on_question, ours)
        return theirs

    def _on_question(self, asker: socket.socket) -> None:
        try:
            question = asker.recv(len(_QUESTION))
        except BlockingIOError:
            return
        except OSError:
            question = b""
        if question != _QUESTION:
            self._drop(asker)
            return
        task = asyncio.create_task(self._answer(asker))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, asker: socket.socket) -> None:
        try:
            connection = (await self._keeper.living()).connect()
        except SandboxError:
            self._drop(asker)  # it then starts a spawner of its own, or says why it cannot
            return
        with connection:
            try:
                socket.send_fds(asker, [_QUESTION], [connection.fileno()])
            except OSError:
                self._drop(asker)

    def _drop(self, asker: socket.socket) -> None:
        if asker in self._offered:
            self._offered.discard(asker)
            asyncio.get_running_loop().remove_reader(asker.fileno())
            asker.close()

    async def close(self) -> None:
        """Ends the spawner, and with it all runs."""
        for task in self._answering:
            task.cancel()
        for asker in tuple(self._offered):
            self._drop(asker)
        await self._keeper.close()


class SharedSpawners(SpawnerKeeper):
    """Connects to a SpawnerHost's spawner whenever one is needed; starts its own where that fails."""

    def __init__(self, host: socket.socket) -> None:
        super().__init__()
        self._host = host

    async def _start(self) -> Spawner:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await Spawner.attach(await self._ask())
        except (TimeoutError, OSError, SandboxError):
            return await super()._start()

    async def _ask(self) -> socket.socket:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        self._host.setblocking(False)
        await loop.sock_sendall(self._host, _QUESTION)
        readable = asyncio.Event()
        loop.add_reader(self._host.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._host.fileno())
        _, fds, _, _ = socket.recv_fds(self._host, len(_QUESTION), 1)
        if not fds:
            raise OSError("the host of the spawner is gone")
        return socket.socket(fileno=fds[0])

    async def close(self) -> None:
        await super().close()
        self._host.close()
