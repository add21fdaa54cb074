"""A worker as the supervisor sees it: a process that is started, told things, and replaced when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

from bulkhead.sandbox import SpawnerHost
from bulkhead.service.control import Channel, Commit, Done, Failed, Message, Prepare, Ready
from bulkhead.service.generation import Generation
from bulkhead.service.worker import WorkerSettings

# To start, or to prepare another generation: modules may have to be compiled.
_ANSWER_SECONDS = 60.0


class WorkerFailed(Exception):
    """A worker did not do what it was told. The text is its own complaint."""


class WorkerProcess:
    """A process of one front end. Owned by one event loop."""

    def __init__(self, settings: WorkerSettings, spawner: SpawnerHost) -> None:
        """`control_fd` and `spawner_fd` of the settings are filled in at each start."""
        self.settings = settings
        self._spawner = spawner
        self.stopping = False
        self.ended = asyncio.Event()
        self.status: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    async def start(self, generation: Generation) -> int:
        """Starts the process and waits until it serves; returns its port. Raises WorkerFailed."""
        ours, theirs = socket.socketpair()
        spawner = self._spawner.offer()
        settings = replace(self.settings, control_fd=theirs.fileno(), spawner_fd=spawner.fileno())
        command = [sys.executable, "-m", "bulkhead.service.worker", settings.to_json()]
        self.ended = asyncio.Event()
        try:
            # No preexec_fn: Popen then uses vfork, and the child is never a copy of this process.
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                command, pass_fds=settings.fds, stdin=subprocess.DEVNULL
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            spawner.close()
        self._watch(self._process)
        self._channel = await Channel.open(ours)
        try:
            ready = await self._ask(generation)
        except WorkerFailed:
            self.abandon()
            await self.ended.wait()
            raise
        assert isinstance(ready, Ready)
        self.settings = replace(self.settings, port=ready.port)
        return ready.port

    async def prepare(self, generation: Generation) -> None:
        """Has it load a generation beside the one that it serves. Raises WorkerFailed."""
        assert isinstance(await self._ask(Prepare(generation)), Done)

    async def commit(self) -> None:
        """Has it serve what it has prepared, or end and be replaced. Raises WorkerFailed."""
        try:
            assert isinstance(await self._ask(Commit()), Done)
        except WorkerFailed:
            self.abandon()
            raise

    async def _ask(self, message: Message) -> Message:
        assert self._channel is not None
        name = self.settings.name
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._channel.send(message)
                answer = await self._channel.receive()
        except TimeoutError:
            self.abandon()  # its answer, should it come, would be taken for that to the next question
            raise WorkerFailed(f"the {name} worker did not answer in {_ANSWER_SECONDS:g} s") from None
        except (EOFError, ConnectionError):
            await self.ended.wait()
            raise WorkerFailed(f"the {name} worker died (status {self.status})") from None
        if isinstance(answer, Failed):
            raise WorkerFailed(answer.error)
        return answer

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Sets `ended` when the process has ended and is reaped."""
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(process.pid)
        ended = self.ended

        def on_end() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self.status = process.wait()
            if self._channel is not None:
                self._channel.close()
            ended.set()

        loop.add_reader(pidfd, on_end)

    def terminate(self) -> None:
        self.stopping = True
        if self._process is not None and not self.ended.is_set():
            self._process.send_signal(signal.SIGTERM)

    def abandon(self) -> None:
        """Ends it, to be replaced."""
        if self._process is not None and not self.ended.is_set():
            self._process.kill()

    def kill(self) -> None:
        self.stopping = True
        self.abandon()

    async def wait_ended(self) -> None:
        """Returns when no process is left."""
        if self._process is not None:
            await self.ended.wait()
