"""The service's end of the spawner: native/spawner.c starts the processes, native/protocol.h says how."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.outcome import Usage, Way
from bulkhead.sandbox.spawner_protocol import (
    HEADER,
    KEY_BYTES,
    MAGIC,
    MOST_INLINE_STDIN_BYTES,
    MOST_MESSAGE_BYTES,
    VERSION,
    Bounds,
    MessageType,
    ProcessEnd,
    Program,
    StartFailed,
    ZygoteReport,
    decode_ended,
    decode_failed,
    decode_layers,
    decode_output,
    decode_zygote,
    encode_forget,
    encode_plain,
    encode_program,
    encode_run,
)

PROGRAM = Path(__file__).resolve().parent / "native" / "bin" / "bulkhead-spawner"
LIBRARY = PROGRAM.with_name("libbulkhead-zygote.so")
"""What the spawner preloads into wasmtime."""

_CONTROL_FD = 3

_START_SECONDS = 10.0  # to its first word; only a machine in deep trouble needs so long
# A spawner that has not reported a run this long after the run's wall time may be stopped or stuck.
# It then gets the second time: perhaps it was we who were stopped, or both of us.
_ANSWER_SLACK_SECONDS = 2.0
_SECOND_CHANCE_SECONDS = 1.0
# What sending fails with when the other end is gone. All else is the fault of that one request: a bad
# descriptor, too many on their way.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})
# Of descriptors, processes or memory: it passes.
SHORTAGES = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS, errno.ENOSPC}
)

_NEVER_RUN = ProcessEnd(
    wait_status=int(signal.SIGKILL),
    reason=EndReason.KILLED,
    stdout=b"",
    stderr=b"",
    stderr_truncated=False,
    usage=Usage(wall_seconds=0.0, cpu_seconds=0.0, peak_memory_bytes=0, way=Way.EXEC),
    layers=0,
)
"""Of a run that was killed while its request waited to be sent."""


@dataclass(slots=True)
class _Pending:
    ended: asyncio.Future[ProcessEnd]
    backstop: asyncio.TimerHandle | None = None
    output: dict[int, list[bytes]] = field(default_factory=dict)
    """What has come of long output, by stream."""


class Spawner:
    """A connection to a spawner process. When that dies, all its runs fail, and it stays dead.

    Owned by one event loop. `start` one or `attach` to one, `register` programs, `run` them, `close` it.
    """

    def __init__(self, pid: int, control: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        control.setblocking(False)
        self._pid = pid
        self._control = control
        self._loop = loop
        self._pending: dict[int, _Pending] = {}
        self._outbox: deque[tuple[int, bytes, Sequence[int]]] = deque()
        self._buffer = memoryview(bytearray(MOST_MESSAGE_BYTES))
        self._writing = False
        self._last_id = 0
        self._hello: asyncio.Future[int] = loop.create_future()
        self._dead = False
        self.on_zygote: Callable[[ZygoteReport], None] = lambda report: None
        """Called with news of zygotes."""
        loop.add_reader(control.fileno(), self._on_readable)

    @classmethod
    async def start(cls, program: Path = PROGRAM) -> Spawner:
        """Starts the process and waits for its first word. Raises SandboxError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = _spawn(program, theirs.fileno())
            except OSError as error:
                ours.close()
                raise SandboxError(f"cannot start {program}: {error.strerror}; reinstall Bulkhead") from error
        return await cls(pid, ours, asyncio.get_running_loop())._greeted(str(program))

    @classmethod
    async def attach(cls, control: socket.socket) -> Spawner:
        """Becomes a client of a spawner that somebody else has started. Raises SandboxError."""
        return await cls(0, control, asyncio.get_running_loop())._greeted("the shared spawner")

    async def _greeted(self, name: str) -> Spawner:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._hello
        except TimeoutError:
            self._die("it did not start in time")
            raise SandboxError(f"{name} did not start in {_START_SECONDS:g} s") from None
        except BaseException:
            self._die("its start was given up")
            raise
        return self

    @property
    def alive(self) -> bool:
        return not self._dead

    @property
    def pid(self) -> int:
        """0: of a shared spawner, which is nobody's child here."""
        return self._pid

    @property
    def layers(self) -> int:
        """Of isolation that work on this machine; see isolation.py."""
        return self._hello.result()

    def register(self, program: Program, files: Sequence[int] = ()) -> None:
        """Makes a program known. `files` become its runs' descriptors 3 and up.

        Raises StartFailed for what no process can be started with, SandboxError.
        """
        self._require_alive()
        self._send(0, encode_program(program, len(files)), tuple(files))

    def forget(self, key: bytes) -> None:
        """No more runs of it; those that there are go on."""
        if not self._dead:
            self._send(0, encode_forget(key), ())

    def run(
        self, key: bytes, bounds: Bounds, *, stdin: bytes = b"", stdin_fd: int | None = None
    ) -> tuple[asyncio.Future[ProcessEnd], Callable[[], None]]:
        """Runs a registered program; returns its end to come, and a function that kills it.

        Where `stdin` is longer than MOST_INLINE_STDIN_BYTES, `stdin_fd` is to be a file with it, which
        must stay open until the run ended. The future gets a StartFailed, or another SandboxError if the
        spawner dies.
        """
        self._require_alive()
        self._last_id += 1
        run_id = self._last_id
        inline = stdin_fd is None
        assert not inline or len(stdin) <= MOST_INLINE_STDIN_BYTES
        message = encode_run(run_id, key, bounds, stdin if inline else None)
        pending = _Pending(self._loop.create_future())
        self._pending[run_id] = pending
        pending.backstop = self._loop.call_later(
            bounds.wall_seconds + _ANSWER_SLACK_SECONDS, self._on_late, run_id
        )
        self._send(run_id, message, () if stdin_fd is None else (stdin_fd,))
        return pending.ended, lambda: self._kill(run_id)

    async def execute(
        self, argv: Sequence[str], bounds: Bounds, *, stdin: bytes = b"", files: Sequence[int] = ()
    ) -> ProcessEnd:
        """Runs a program once, to its end. Raises StartFailed, SandboxError. Cancelling kills it."""
        key = secrets.token_bytes(KEY_BYTES)
        self.register(Program(key=key, argv=tuple(argv)), files)
        ended, kill = self.run(key, bounds, stdin=stdin)
        self.forget(key)
        try:
            return await ended
        finally:
            kill()

    def connect(self) -> socket.socket:
        """Makes one more client of the process, which shares its zygotes, and returns its socket.

        Only of a spawner that was started here. Raises SandboxError.
        """
        self._require_alive()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._control, [encode_plain(MessageType.CLIENT)], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise SandboxError(f"the spawner takes no more clients: {error.strerror}") from error
        return ours

    async def close(self) -> None:
        """Kills all runs and ends the process."""
        self._die("the sandbox was closed")

    def _require_alive(self) -> None:
        if self._dead:
            raise SandboxError("the spawner is gone")

    # Sending

    def _kill(self, run_id: int) -> None:
        if run_id not in self._pending or self._dead:
            return
        for entry in self._outbox:
            if entry[0] == run_id:  # not even sent: its descriptors may be closed when this returns
                self._outbox.remove(entry)
                self._settle(run_id, _NEVER_RUN)
                return
        self._send(0, encode_plain(MessageType.KILL, run_id), ())

    def _send(self, run_id: int, message: bytes, files: Sequence[int]) -> None:
        self._outbox.append((run_id, message, files))
        if len(self._outbox) == 1:
            self._flush()

    def _flush(self) -> None:
        """Sends what the socket takes, in order; the rest when it takes more."""
        while self._outbox:
            run_id, message, files = self._outbox[0]
            try:
                if files:
                    socket.send_fds(self._control, [message], files)
                else:
                    self._control.send(message)
            except BlockingIOError:
                self._writing = True
                self._loop.add_writer(self._control.fileno(), self._flush)
                return
            except OSError as error:
                if error.errno in _GONE:
                    self._die(f"sending to it failed: {error.strerror}")
                    return
                # A program that is lost so is unknown when it is to be run, which fails that run.
                self._settle(run_id, StartFailed(f"asking for it failed: {error.strerror}", error.errno or 0))
            self._outbox.popleft()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing:
            self._loop.remove_writer(self._control.fileno())
        self._writing = False

    # The ends of runs

    def _on_late(self, run_id: int, *, again: bool = False) -> None:
        """A run is overdue. Before the spawner is given up: perhaps its answer lies here, unread."""
        self._on_readable()
        pending = self._pending.get(run_id)
        if pending is None:
            return
        if again:
            self._die("it does not answer")
        else:
            pending.backstop = self._loop.call_later(
                _SECOND_CHANCE_SECONDS, lambda: self._on_late(run_id, again=True)
            )

    def _settle(self, run_id: int, end: ProcessEnd | SandboxError) -> None:
        """Tells the end of a run to who waits for it. For the id 0, or one that has ended: nothing."""
        pending = self._pending.pop(run_id, None)
        if pending is None:
            return
        if pending.backstop is not None:
            pending.backstop.cancel()
        if pending.ended.done():  # its caller is gone
            return
        if isinstance(end, ProcessEnd):
            pending.ended.set_result(end)
        else:
            pending.ended.set_exception(end)

    # Receiving

    def _on_readable(self) -> None:
        try:
            while not self._dead:
                size = self._control.recv_into(self._buffer)
                if size == 0:
                    self._die("it ended")
                    return
                self._on_reply(self._buffer[:size])
        except BlockingIOError:
            return
        except OSError as error:
            self._die(f"reading from it failed: {error.strerror}")

    def _on_reply(self, message: memoryview) -> None:
        magic, version, kind, run_id = HEADER.unpack_from(message)
        if (magic, version) != (MAGIC, VERSION):
            self._die("it speaks another protocol; reinstall Bulkhead")
        elif kind == MessageType.ENDED:
            pending = self._pending.get(run_id)
            if pending is not None:
                self._settle(run_id, decode_ended(message, pending.output))
        elif kind == MessageType.OUTPUT:
            stream, part = decode_output(message)
            if (pending := self._pending.get(run_id)) is not None:
                pending.output.setdefault(stream, []).append(part)
        elif kind == MessageType.FAILED:
            self._settle(run_id, decode_failed(message))
        elif kind == MessageType.ZYGOTE:
            self.on_zygote(decode_zygote(message))
        elif kind == MessageType.HELLO and not self._hello.done():
            self._hello.set_result(decode_layers(message))

    def _die(self, why: str) -> None:
        """Ends the process for good; every run that it had fails."""
        if self._dead:
            return
        self._dead = True
        self._stop_writing()
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        self._outbox.clear()
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)  # prompt: nothing outlives SIGKILL
        error = SandboxError(f"the spawner is gone: {why}")
        if not self._hello.done():
            self._hello.set_exception(error)
        for run_id in tuple(self._pending):
            self._settle(run_id, error)


class SpawnerKeeper:
    """Keeps one spawner alive: starts another when it is needed and the last one died."""

    def __init__(self) -> None:
        self._spawner: Spawner | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def living(self) -> Spawner:
        """Raises SandboxError when none can be started."""
        if self._spawner is not None and self._spawner.alive:
            return self._spawner
        async with self._starting:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            if self._spawner is None or not self._spawner.alive:
                self._spawner = await self._start()
            return self._spawner

    async def _start(self) -> Spawner:
        """Raises SandboxError."""
        return await Spawner.start()

    async def close(self) -> None:
        self._closed = True
        async with self._starting:  # one that is about to start is not to be forgotten
            if self._spawner is not None:
                await self._spawner.close()


def _spawn(program: Path, control_fd: int) -> int:
    """posix_spawn, never fork: the service has threads. Raises OSError."""
    # Above all that the actions below overwrite; and never 3 to 3, which keeps close-on-exec before
    # glibc 2.29.
    control_fd = fcntl.fcntl(control_fd, fcntl.F_DUPFD_CLOEXEC, _CONTROL_FD + 1)
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, control_fd, _CONTROL_FD),
    ]
    try:
        # A session of its own: Ctrl-C at a terminal is for the service, which then drains.
        return os.posix_spawn(str(program), [program.name], {}, file_actions=actions, setsid=True)
    finally:
        os.close(control_fd)
