"""The spawner, spoken to over its bare protocol: also with what the service would never send."""

from __future__ import annotations

import itertools
import os
import resource
import select
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bulkhead.sandbox import spawner_protocol as ours
from bulkhead.sandbox.spawner import PROGRAM

WAIT_SECONDS = 30.0
UNLIMITED = 2**64 - 1

_keys = itertools.count(1)


def new_key() -> bytes:
    """Of a program that there was not yet."""
    return next(_keys).to_bytes(ours.KEY_BYTES, "big")


def is_gone(process: psutil.Process) -> bool:
    """Dead, reaped or not: who reaps the orphans of a process that was killed is not ours to say."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(process: psutil.Process) -> None:
    give_up_at = time.monotonic() + WAIT_SECONDS
    while not is_gone(process):
        assert time.monotonic() < give_up_at, "it is still there"
        select.select([], [], [], 0.005)


@dataclass(frozen=True, slots=True)
class Reply:
    """An ENDED (then `status` to `layers` count) or FAILED reply (then `stage` and `error`)."""

    run_id: int
    kind: int
    status: int = 0
    reason: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    way: int = 0
    layers: int = 0
    in_parts: bool = False
    """Output came before, in messages of its own."""
    stage: int = 0
    error: int = 0

    @property
    def ended(self) -> bool:
        return self.kind == ours.MessageType.ENDED


class RawClient:
    """One client's socket."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.reports: deque[ours.ZygoteReport] = deque()
        """What came of zygotes among the replies."""
        self._parts: dict[int, dict[int, list[bytes]]] = {}

    # Messages

    def header(
        self, kind: int, run_id: int, *, magic: int = ours.MAGIC, version: int = ours.VERSION
    ) -> bytes:
        return ours.HEADER.pack(magic, version, kind, run_id)

    def program_message(
        self,
        key: bytes,
        argv: Sequence[bytes],
        environment: Sequence[bytes] = (),
        *,
        flags: int = 0,
        layers: int = 0,
        idle_nanoseconds: int = 0,
        argument_count: int | None = None,
        environment_count: int | None = None,
        tail: bytes | None = None,
    ) -> bytes:
        strings = b"".join(text + b"\0" for text in (*argv, *environment))
        fixed = ours.PROGRAM.pack(
            ours.MAGIC,
            ours.VERSION,
            ours.MessageType.PROGRAM,
            0,
            key,
            idle_nanoseconds,
            flags,
            layers,
            len(argv) if argument_count is None else argument_count,
            len(environment) if environment_count is None else environment_count,
        )
        return fixed + (strings if tail is None else tail)

    def run_message(
        self,
        run_id: int,
        key: bytes,
        stdin: bytes = b"",
        *,
        wall_seconds: float = 60.0,
        cpu_nanoseconds: int = 60 * 10**9,
        data_bytes: int = UNLIMITED,
        address_bytes: int = UNLIMITED,
        file_bytes: int = 1 << 30,
        stderr_bytes: int = 65536,
        open_files: int = 64,
        pinned: int = 0,
        stdin_bytes: int | None = None,
    ) -> bytes:
        fixed = ours.RUN.pack(
            ours.MAGIC,
            ours.VERSION,
            ours.MessageType.RUN,
            run_id,
            key,
            cpu_nanoseconds,
            data_bytes,
            address_bytes,
            file_bytes,
            open_files,
            min(UNLIMITED, int(wall_seconds * 1e9)),
            stderr_bytes,
            pinned,
            len(stdin) if stdin_bytes is None else stdin_bytes,
        )
        return fixed + stdin

    # Sending

    def send(self, message: bytes, files: Sequence[int] = ()) -> None:
        if files:
            socket.send_fds(self.control, [message], list(files))
        else:
            self.control.send(message)

    def register(self, *argv: bytes, key: bytes | None = None, files: Sequence[int] = ()) -> bytes:
        """Makes a plain program known; returns its key."""
        key = new_key() if key is None else key
        self.send(self.program_message(key, argv), files)
        return key

    def forget(self, key: bytes) -> None:
        self.send(ours.encode_forget(key))

    def start(self, run_id: int, key: bytes, stdin: bytes = b"") -> None:
        """Asks for a run of a known program, with generous limits."""
        self.send(self.run_message(run_id, key, stdin))

    def run(self, run_id: int, *argv: bytes, stdin: bytes = b"") -> None:
        """Asks for one run of a program that is known for this run alone."""
        key = self.register(*argv)
        self.start(run_id, key, stdin)
        self.forget(key)

    def kill(self, run_id: int) -> None:
        self.send(self.header(ours.MessageType.KILL, run_id))

    # Receiving

    def reply(self) -> Reply:
        """The next end of a run, for which it waits."""
        while True:
            message = memoryview(self.message())
            assert message, "the spawner is gone"
            magic, version, kind, run_id = ours.HEADER.unpack_from(message)
            assert (magic, version) == (ours.MAGIC, ours.VERSION)
            if kind == ours.MessageType.ZYGOTE:
                self.reports.append(ours.decode_zygote(message))
            elif kind == ours.MessageType.OUTPUT:
                stream, part = ours.decode_output(message)
                self._parts.setdefault(run_id, {}).setdefault(stream, []).append(part)
            elif kind == ours.MessageType.ENDED:
                return self._ended(run_id, message)
            else:
                assert kind == ours.MessageType.FAILED, kind
                failed = ours.decode_failed(message)
                return Reply(run_id, kind, stage=failed.stage, error=failed.error_number)

    def _ended(self, run_id: int, message: memoryview) -> Reply:
        parts = self._parts.pop(run_id, {})
        end = ours.decode_ended(message, parts)
        *_, stdout_bytes, _, _, _, stderr_here, stdout_here, _ = ours.ENDED.unpack_from(message)
        assert len(message) == ours.ENDED.size + stderr_here + stdout_here
        assert len(end.stdout) == stdout_bytes, "output was lost or doubled"
        return Reply(
            run_id,
            ours.MessageType.ENDED,
            status=end.wait_status,
            reason=end.reason,
            stdout=end.stdout,
            stderr=end.stderr,
            truncated=end.stderr_truncated,
            way=end.usage.way,
            layers=end.layers,
            in_parts=bool(parts),
        )

    def message(self) -> bytes:
        """The next message, for which it waits; empty when the other end is closed."""
        readable, _, _ = select.select([self.control], [], [], WAIT_SECONDS)
        assert readable, "the spawner does not answer"
        try:
            return self.control.recv(ours.MOST_MESSAGE_BYTES)
        except ConnectionResetError:  # it left with requests of ours unread
            return b""

    def hello(self) -> int:
        """Takes the first message; returns the layers of isolation that work here."""
        message = self.message()
        assert len(message) == ours.HELLO.size
        assert message[: ours.HEADER.size] == self.header(ours.MessageType.HELLO, 0)
        return ours.decode_layers(memoryview(message))

    def works(self) -> bool:
        """Whether a run of a program that succeeds does so."""
        self.run(UNLIMITED, b"/bin/true")
        reply = self.reply()
        return (reply.run_id, reply.ended, reply.status) == (UNLIMITED, True, 0)


class RawSpawner(RawClient):
    """One spawner process and its first client."""

    def __init__(self, pid: int, control: socket.socket, words: Path) -> None:
        super().__init__(control)
        self.pid = pid
        self._words = words
        self._status: int | None = None

    @contextmanager
    def client(self) -> Iterator[RawClient]:
        """One more client, which has taken its HELLO."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            with theirs:
                self.send(ours.encode_plain(ours.MessageType.CLIENT), [theirs.fileno()])
            client = RawClient(mine)
            client.hello()
            yield client

    def exit_code(self) -> int:
        """Waits for its end."""
        assert self.message() == b""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)

    def words(self) -> str:
        """What it said on standard error."""
        return self._words.read_text()

    def limit_descriptors(self, most: int) -> None:
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (most, hard))

    def close(self) -> None:
        self.control.close()
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]


@contextmanager
def raw_spawner() -> Iterator[RawSpawner]:
    """Starts a spawner, takes its HELLO, and ends it."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder, "words")
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 100),
            (os.POSIX_SPAWN_DUP2, 100, 3),
            (os.POSIX_SPAWN_CLOSE, 100),
            (os.POSIX_SPAWN_OPEN, 2, str(words), os.O_WRONLY | os.O_CREAT, 0o600),
        ]
        pid = os.posix_spawn(str(PROGRAM), [PROGRAM.name], dict(os.environ), file_actions=actions)
        theirs.close()
        raw = RawSpawner(pid, mine, words)
        try:
            raw.hello()
            yield raw
        finally:
            raw.close()


assert struct.calcsize("P") == 8, "the tests of huge limits are for 64-bit machines"
