"""The service's end of the spawner: native/spawner.c starts the processes, native/protocol.h says how."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.outcome import Usage

PROGRAM = Path(__file__).resolve().parent / "native" / "bin" / "bulkhead-spawner"

# native/protocol.h; its own order of fields.
_MAGIC = 0x44484B42
_VERSION = 1
_HEADER = struct.Struct("=IHHQ")
_RUN = struct.Struct("=IHHQ QQQQQQ IIII")
_ENDED = struct.Struct("=IHHQ iIQQQII")
_FAILED = struct.Struct("=IHHQ Ii")
_HELLO_TYPE, _RUN_TYPE, _KILL_TYPE, _ENDED_TYPE, _FAILED_TYPE = 1, 2, 3, 4, 5
_STAGES = {
    1: "the request",
    2: "preparing the process",
    3: "confining the process",
    4: "executing the program",
}
_MOST_REPLY_BYTES = 256
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
_MOST_MESSAGE_BYTES = 65536
_MOST_STRINGS = 512
_MOST_FILES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the kernel enforces on one process."""

    wall_seconds: float
    cpu_seconds: float
    data_bytes: int
    address_bytes: int
    file_bytes: int
    """The most that any file can hold to which it writes, its standard output for one."""
    stderr_bytes: int
    open_files: int = 64
    pinned: bool = True
    """Keep all its threads on one CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnd:
    """A process that has ended and is reaped."""

    wait_status: int
    reason: EndReason
    stderr_truncated: bool
    usage: Usage


_NEVER_RUN = ProcessEnd(
    wait_status=int(signal.SIGKILL),
    reason=EndReason.KILLED,
    stderr_truncated=False,
    usage=Usage(wall_seconds=0.0, cpu_seconds=0.0, peak_memory_bytes=0),
)
"""Of a run that was killed while its request waited to be sent."""


class StartFailed(SandboxError):
    """There never was a process."""

    def __init__(self, message: str, error_number: int) -> None:
        super().__init__(message)
        self.error_number = error_number
        """Of the system call that failed."""


@dataclass(slots=True)
class _Pending:
    ended: asyncio.Future[ProcessEnd]
    backstop: asyncio.TimerHandle | None = None


class Spawner:
    """One spawner process. When it dies, all its runs die with it and fail, and it stays dead.

    Owned by one event loop. `start` it, `run` processes, `close` it.
    """

    def __init__(self, pid: int, control: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._pid = pid
        self._control = control
        self._loop = loop
        self._pending: dict[int, _Pending] = {}
        self._outbox: deque[tuple[int, bytes, Sequence[int]]] = deque()
        self._writing = False
        self._last_id = 0
        self._hello: asyncio.Future[None] = loop.create_future()
        self._dead = False
        loop.add_reader(control.fileno(), self._on_readable)

    @classmethod
    async def start(cls, program: Path = PROGRAM) -> Spawner:
        """Starts the process and waits for its first word. Raises SandboxError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                pid = _spawn(program, theirs.fileno())
            except OSError as error:
                ours.close()
                raise SandboxError(f"cannot start {program}: {error.strerror}; reinstall Bulkhead") from error
        spawner = cls(pid, ours, asyncio.get_running_loop())
        try:
            async with asyncio.timeout(_START_SECONDS):
                await spawner._hello
        except TimeoutError:
            spawner._die("it did not start in time")
            raise SandboxError(f"{program} did not start in {_START_SECONDS:g} s") from None
        except BaseException:
            spawner._die("its start was given up")
            raise
        return spawner

    @property
    def alive(self) -> bool:
        return not self._dead

    @property
    def pid(self) -> int:
        return self._pid

    def run(
        self, argv: Sequence[str], environment: Sequence[str], files: Sequence[int], bounds: Bounds
    ) -> tuple[asyncio.Future[ProcessEnd], Callable[[], None]]:
        """Starts a process; returns its end to come, and a function that kills it.

        `files` become its descriptors 0, 1, 2 and so on, and must stay open until it ended or was
        killed. The future gets a StartFailed, or another SandboxError if the spawner dies.
        """
        if self._dead:
            raise SandboxError("the spawner is gone")
        self._last_id += 1
        run_id = self._last_id
        message = _encode_run(run_id, argv, environment, files, bounds)
        pending = _Pending(self._loop.create_future())
        self._pending[run_id] = pending
        pending.backstop = self._loop.call_later(
            bounds.wall_seconds + _ANSWER_SLACK_SECONDS, self._on_late, run_id
        )
        self._send(run_id, message, files)
        return pending.ended, lambda: self._kill(run_id)

    async def close(self) -> None:
        """Kills all runs and ends the process."""
        self._die("the sandbox was closed")

    def _kill(self, run_id: int) -> None:
        if run_id not in self._pending or self._dead:
            return
        for entry in self._outbox:
            if entry[0] == run_id:  # not even sent: its descriptors may be closed when this returns
                self._outbox.remove(entry)
                self._settle(run_id, _NEVER_RUN)
                return
        self._send(0, _HEADER.pack(_MAGIC, _VERSION, _KILL_TYPE, run_id), ())

    def _send(self, run_id: int, message: bytes, files: Sequence[int]) -> None:
        self._outbox.append((run_id, message, files))
        if len(self._outbox) == 1:
            self._flush()

    def _flush(self) -> None:
        """Sends what the socket takes, in order; the rest when it takes more."""
        while self._outbox:
            run_id, message, files = self._outbox[0]
            try:
                socket.send_fds(self._control, [message], files)
            except BlockingIOError:
                self._writing = True
                self._loop.add_writer(self._control.fileno(), self._flush)
                return
            except OSError as error:
                if error.errno in _GONE or run_id == 0:
                    self._die(f"sending to it failed: {error.strerror}")
                    return
                self._settle(run_id, StartFailed(f"asking for it failed: {error.strerror}", error.errno or 0))
            self._outbox.popleft()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing:
            self._loop.remove_writer(self._control.fileno())
        self._writing = False

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

    def _on_readable(self) -> None:
        try:
            while not self._dead:
                message = self._control.recv(_MOST_REPLY_BYTES)
                if not message:
                    self._die("it ended")
                    return
                self._on_reply(message)
        except BlockingIOError:
            return
        except OSError as error:
            self._die(f"reading from it failed: {error.strerror}")

    def _on_reply(self, message: bytes) -> None:
        magic, version, kind, run_id = _HEADER.unpack_from(message)
        if (magic, version) != (_MAGIC, _VERSION):
            self._die("it speaks another protocol; reinstall Bulkhead")
        elif kind == _HELLO_TYPE:
            if not self._hello.done():
                self._hello.set_result(None)
        else:
            self._settle(run_id, _decode_end(message) if kind == _ENDED_TYPE else _decode_failure(message))

    def _die(self, why: str) -> None:
        """Ends the process for good; every run that it had fails."""
        if self._dead:
            return
        self._dead = True
        self._stop_writing()
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        self._outbox.clear()
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
                self._spawner = await Spawner.start()
            return self._spawner

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


def _nanoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


def _encode_run(
    run_id: int, argv: Sequence[str], environment: Sequence[str], files: Sequence[int], bounds: Bounds
) -> bytes:
    """Raises StartFailed for what no process can be started with."""
    count = len(argv) + len(environment)
    try:
        strings = os.fsencode("".join([f"{text}\0" for text in (*argv, *environment)]))
    except UnicodeEncodeError as error:
        raise StartFailed(f"an argument cannot be encoded: {error.reason}", errno.EILSEQ) from None
    if strings.count(b"\0") != count:
        raise StartFailed("an argument holds a NUL character", errno.EINVAL)
    if _RUN.size + len(strings) > _MOST_MESSAGE_BYTES or count > _MOST_STRINGS or len(files) > _MOST_FILES:
        raise StartFailed("it has too many arguments or files", errno.E2BIG)
    fixed = _RUN.pack(
        _MAGIC,
        _VERSION,
        _RUN_TYPE,
        run_id,
        _nanoseconds(bounds.wall_seconds),
        _nanoseconds(bounds.cpu_seconds),
        bounds.data_bytes,
        bounds.address_bytes,
        bounds.file_bytes,
        bounds.stderr_bytes,
        bounds.open_files,
        int(bounds.pinned),
        len(argv),
        len(environment),
    )
    return fixed + strings


def _decode_end(message: bytes) -> ProcessEnd:
    *_, status, reason, wall, cpu, peak, truncated, _reserved = _ENDED.unpack(message)
    return ProcessEnd(
        wait_status=status,
        reason=EndReason(reason),
        stderr_truncated=bool(truncated),
        usage=Usage(wall_seconds=wall / 1e9, cpu_seconds=cpu / 1e9, peak_memory_bytes=peak),
    )


def _decode_failure(message: bytes) -> StartFailed:
    *_, stage, error = _FAILED.unpack(message)
    return StartFailed(f"{_STAGES.get(stage, f'stage {stage}')} failed: {os.strerror(error)}", error)
