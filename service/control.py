"""What supervisor and worker say to each other, over a socket pair that nobody else has.

The supervisor sends a worker the generation that it is to serve; the worker answers `Ready` or
`Failed`. Later the supervisor sends `Prepare` with a new generation, and `Commit` when every worker
has prepared it. Its end is the end of the other side.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from dataclasses import dataclass

from bulkhead.service.generation import Generation

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker serves its first generation."""

    port: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot do what it was told, and why."""

    error: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load this generation, and go on serving the one before."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Commit:
    """Serve the generation that was prepared."""


@dataclass(frozen=True, slots=True)
class Done:
    """The worker has done what it was told."""


Message = Generation | Ready | Failed | Prepare | Commit | Done


class Channel:
    """One end of the socket pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        return cls(*await asyncio.open_connection(sock=end))

    async def send(self, message: Message) -> None:
        """Raises ConnectionError if the other side is gone."""
        data = pickle.dumps(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)
        await self._writer.drain()

    async def receive(self) -> Message:
        """Raises EOFError if the other side is gone."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            # Both sides are this very program, started one by the other.
            message: Message = pickle.loads(await self._reader.readexactly(length))  # noqa: S301
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError("the other side is gone") from None
        return message

    def close(self) -> None:
        self._writer.close()
