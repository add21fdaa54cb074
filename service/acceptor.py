"""Accepting connections under a flood: a bounded number of them, of which a bounded number shakes hands.

A TLS handshake costs a millisecond of CPU. An event loop that begins thousands at once finishes all of
them late, each client gives up, and nobody is served. Here a few proceed, the others wait, and what
is too much is refused at once.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
import time
from collections.abc import Callable

import structlog

from bulkhead.service.balance import Share

_log = structlog.get_logger()

_HANDSHAKE_SECONDS = 3.0
# Enough that stalled ones, which hold a place for their three seconds, leave room for others.
_MOST_HANDSHAKES = 256
# Of all workers. kube-apiserver needs a few, which it keeps.
MOST_CONNECTIONS = 4096
# For a worker that holds fewer connections to take the one that waits. One that is idle needs a tenth of it;
# one that is too busy has no claim.
_GIVE_WAY_SECONDS = 0.002
# Between two connections that are ended for others to get them: a new one costs both sides a millisecond.
_SHED_SECONDS = 0.1
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_BACK_OFF_SECONDS = 0.1
_WARNING_SECONDS = 1.0  # between two: anybody can make us write one
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: no goodbye, nothing left in the kernel


class Acceptor:
    """Takes connections from a listening socket and hands them over once TLS is agreed on."""

    def __init__(
        self,
        listener: socket.socket,
        tls: ssl.SSLContext | None,
        factory: Callable[[], asyncio.Protocol],
        count_open: Callable[[], int],
        *,
        most_connections: int = MOST_CONNECTIONS,
        share: Share | None = None,
    ) -> None:
        """`factory` makes what serves a connection, `count_open` tells how many it serves now.

        With `tls` None, connections are in plaintext. `share`: beside others that accept from the socket.
        """
        self._listener = listener
        self._tls = tls
        self._factory = factory
        self._count_open = count_open
        self._most_connections = most_connections
        self._share = share or Share.all()
        self._handshakes = asyncio.Semaphore(_MOST_HANDSHAKES)
        self._next_warning = 0.0
        self._stopped = False
        self._next_shed = 0.0
        self._beginning: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to accept."""
        self._listener.setblocking(False)
        self.tell_count()
        self._task = asyncio.create_task(self._accept())

    def set_context(self, tls: ssl.SSLContext | None) -> None:
        """For connections that are accepted from now on; None: plaintext."""
        self._tls = tls

    async def stop(self) -> None:
        """Accepts nothing more; connections that were handed over stay."""
        self._stopped = True
        self._share.retire()
        tasks = [task for task in (self._task, *self._beginning) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    def tell_count(self) -> None:
        """To be called when a connection that was handed over has ended, too."""
        if not self._stopped:
            self._share.hold(len(self._beginning) + self._count_open())

    def must_shed(self) -> bool:
        """Whether one connection should end with its next answer, because another worker holds fewer.

        Clients come back at once, and to that worker: it may have been started when all had settled.
        """
        now = time.monotonic()
        if self._share.lead < 2 or now < self._next_shed:  # a lead of one would only change hands
            return False
        self._next_shed = now + _SHED_SECONDS
        return True

    async def _accept(self) -> None:
        while True:
            await self._wait_for_connection()
            if self._share.lead:
                await asyncio.sleep(_GIVE_WAY_SECONDS)
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                continue  # another worker has it
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    _log.error("cannot_accept", error=error.strerror)
                    await asyncio.sleep(_BACK_OFF_SECONDS)
                continue  # otherwise the client was gone before we looked
            if len(self._beginning) + self._count_open() >= self._most_connections:
                _reset(connection)
                continue
            task = asyncio.create_task(self._begin(connection))
            self._beginning.add(task)
            task.add_done_callback(self._has_begun)
            self.tell_count()

    async def _wait_for_connection(self) -> None:
        """Returns when there is one, which another worker may be about to take."""
        loop = asyncio.get_running_loop()
        there = asyncio.Event()
        loop.add_reader(self._listener, there.set)
        try:
            await there.wait()
        finally:
            loop.remove_reader(self._listener)

    def _has_begun(self, task: asyncio.Task[None]) -> None:
        self._beginning.discard(task)
        self.tell_count()

    async def _begin(self, connection: socket.socket) -> None:
        """Shakes hands, when it is its turn."""
        loop = asyncio.get_running_loop()
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with self._handshakes:
                tls = self._tls
                await loop.connect_accepted_socket(
                    self._factory,
                    connection,
                    ssl=tls,
                    ssl_handshake_timeout=None if tls is None else _HANDSHAKE_SECONDS,
                )
        except OSError as error:  # ssl.SSLError and TimeoutError are such
            connection.close()
            self._tell(error)
        except asyncio.CancelledError:
            connection.close()
            raise

    def _tell(self, error: OSError) -> None:
        """The client often sees no more than a connection that breaks."""
        now = time.monotonic()
        if isinstance(error, ssl.SSLCertVerificationError) and now >= self._next_warning:
            self._next_warning = now + _WARNING_SECONDS
            _log.warning("client_certificate_refused", reason=error.verify_message)
        else:
            _log.debug("handshake_failed", error=type(error).__name__)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    connection.close()
