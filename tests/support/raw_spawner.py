"""The spawner, spoken to over its bare protocol: also with what the service would never send."""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bulkhead.sandbox import spawner as ours

WAIT_SECONDS = 30.0
UNLIMITED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Reply:
    """An ENDED (then `status` and `reason` count) or FAILED reply (then `stage` and `error`)."""

    run_id: int
    kind: int
    status: int = 0
    reason: int = 0
    truncated: bool = False
    stage: int = 0
    error: int = 0

    @property
    def ended(self) -> bool:
        return self.kind == ours._ENDED_TYPE


class RawSpawner:
    """One spawner process and its control socket."""

    def __init__(self, pid: int, control: socket.socket, words: Path) -> None:
        self.pid = pid
        self.control = control
        self._words = words
        self._status: int | None = None

    def header(
        self, kind: int, run_id: int, *, magic: int = ours._MAGIC, version: int = ours._VERSION
    ) -> bytes:
        return ours._HEADER.pack(magic, version, kind, run_id)

    def run_message(
        self,
        run_id: int,
        argv: Sequence[bytes],
        environment: Sequence[bytes] = (),
        *,
        wall_seconds: float = 60.0,
        cpu_nanoseconds: int = 60 * 10**9,
        data_bytes: int = UNLIMITED,
        address_bytes: int = UNLIMITED,
        file_bytes: int = 1 << 30,
        stderr_bytes: int = 65536,
        open_files: int = 64,
        pinned: int = 0,
        argument_count: int | None = None,
        environment_count: int | None = None,
        tail: bytes | None = None,
    ) -> bytes:
        strings = b"".join(text + b"\0" for text in (*argv, *environment))
        fixed = ours._RUN.pack(
            ours._MAGIC,
            ours._VERSION,
            ours._RUN_TYPE,
            run_id,
            min(UNLIMITED, int(wall_seconds * 1e9)),
            cpu_nanoseconds,
            data_bytes,
            address_bytes,
            file_bytes,
            stderr_bytes,
            open_files,
            pinned,
            len(argv) if argument_count is None else argument_count,
            len(environment) if environment_count is None else environment_count,
        )
        return fixed + (strings if tail is None else tail)

    def send(self, message: bytes, files: Sequence[int] = ()) -> None:
        socket.send_fds(self.control, [message], list(files))

    def run(self, run_id: int, *argv: bytes, files: Sequence[int] | None = None) -> None:
        """Asks for a run with default limits; its standard files are /dev/null unless given."""
        with self.null() as null:
            self.send(self.run_message(run_id, argv), (null, null, null) if files is None else files)

    @contextmanager
    def null(self) -> Iterator[int]:
        fd = os.open(os.devnull, os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)

    def kill(self, run_id: int) -> None:
        self.send(self.header(ours._KILL_TYPE, run_id))

    def reply(self) -> Reply:
        """The next reply, for which it waits."""
        message = self._receive()
        assert message, f"the spawner is gone: {self.words()}"
        _, _, kind, run_id = ours._HEADER.unpack_from(message)
        if kind == ours._ENDED_TYPE:
            end = ours._ENDED.unpack(message)
            return Reply(run_id, kind, status=end[4], reason=end[5], truncated=bool(end[9]))
        assert kind == ours._FAILED_TYPE
        *_, stage, error = ours._FAILED.unpack(message)
        return Reply(run_id, kind, stage=stage, error=error)

    def _receive(self) -> bytes:
        readable, _, _ = select.select([self.control], [], [], WAIT_SECONDS)
        assert readable, "the spawner does not answer"
        try:
            return self.control.recv(4096)
        except ConnectionResetError:  # it left with requests of ours unread
            return b""

    def works(self) -> bool:
        """Whether a run of a program that succeeds does so."""
        self.run(UNLIMITED, b"/bin/true")
        reply = self.reply()
        return (reply.run_id, reply.ended, reply.status) == (UNLIMITED, True, 0)

    def exit_code(self) -> int:
        """Waits for its end."""
        assert self._receive() == b""
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
        pid = os.posix_spawn(str(ours.PROGRAM), [ours.PROGRAM.name], dict(os.environ), file_actions=actions)
        theirs.close()
        raw = RawSpawner(pid, mine, words)
        try:
            hello = raw._receive()
            assert hello == raw.header(ours._HELLO_TYPE, 0), (hello, raw.words())
            yield raw
        finally:
            raw.close()


assert struct.calcsize("P") == 8, "the tests of huge limits are for 64-bit machines"
