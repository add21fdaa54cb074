"""A zygote, spoken to over its bare protocol, and the guests that it forks runs of."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bulkhead.sandbox import Limits, Sandbox, SandboxOptions
from bulkhead.sandbox.launcher import _command, _Kind
from bulkhead.sandbox.memfile import create_memfile, read_memfile, write_memfile
from bulkhead.sandbox.spawner import LIBRARY
from tests.support.processes import mortal
from tests.support.raw_spawner import UNLIMITED, WAIT_SECONDS
from tests.support.wat import wat

# Exports `echo`, which writes what it reads, `shout`, which writes it to standard error, `random`, which
# writes 16 random bytes, `sleep`, which takes an hour, and `spin` and `trap`.
GUEST = """(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func $copy (param $fd i32) (local $size i32)
    (loop $again
      (i32.store (i32.const 0) (i32.const 1024))
      (i32.store (i32.const 4) (i32.const 65536))
      (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
      (local.set $size (i32.load (i32.const 8)))
      (i32.store (i32.const 4) (local.get $size))
      (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8)))
      (br_if $again (local.get $size))))
  (func (export "echo") (call $copy (i32.const 1)))
  (func (export "shout") (call $copy (i32.const 2)))
  (func (export "random")
    (drop (call $random_get (i32.const 1024) (i32.const 16)))
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 16))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "sleep")
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (i64.const 3600000000000))
    (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192))))
  (func (export "spin") (loop $again (br $again)))
  (func (export "trap") (unreachable)))"""

HEADER = struct.Struct("=IHHQ")
READY = struct.Struct("=IHHQ II")
RUN = struct.Struct("=IHHQ QQQQI4x II")
ENDED = struct.Struct("=IHHQ iI QQQ")
FAILED = struct.Struct("=IHHQ i44s")
MAGIC, VERSION = 0x475A4B42, 1
READY_TYPE, UNFIT_TYPE, RUN_TYPE, STARTED_TYPE, ENDED_TYPE, FAILED_TYPE = range(1, 7)
MOST_RUNS = 256

ENVIRONMENT = ("TOKIO_WORKER_THREADS=1", "MALLOC_ARENA_MAX=1")


@dataclass(frozen=True, slots=True)
class Guest:
    """A module that is compiled, and how wasmtime is called for its entry points."""

    commands: Mapping[str, tuple[str, ...]]
    """By entry point. The artifact is expected at descriptor 3."""
    artifact: bytes = field(repr=False)
    layers: int
    """Of isolation that its runs get here."""

    @contextmanager
    def artifact_file(self) -> Iterator[int]:
        fd = create_memfile("artifact")
        try:
            write_memfile(fd, self.artifact)
            yield fd
        finally:
            os.close(fd)


def compile_guest(state_dir: Path) -> Guest:
    """Compiles GUEST. What runs it lies in `state_dir` afterwards."""
    return asyncio.run(_compile(state_dir))


async def _compile(state_dir: Path) -> Guest:
    async with await Sandbox.open(SandboxOptions(state_dir=state_dir)) as sandbox:
        info = await sandbox.load(wat(GUEST))
        module = sandbox._loaded[info.digest].compiled[False]
        commands = {
            name: _command(sandbox.runtime, _Kind(module, name, (), Limits()), 1 << 20)
            for name in ("echo", "shout", "random", "sleep", "spin", "trap")
        }
        artifact = read_memfile(module.artifact_fd, module.size_bytes)
        return Guest(commands, artifact, int(sandbox.runtime.layers))


@dataclass(frozen=True, slots=True)
class Message:
    """What a zygote says. `pidfd` counts with STARTED, `status` with ENDED, the rest with FAILED, UNFIT."""

    kind: int
    run_id: int
    pidfd: int = -1
    status: int = 0
    error: int = 0
    step: str = ""


class RawZygote:
    """One zygote process and its control socket. The pidfds that it sent are closed with it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process = process
        self.control = control
        self._pidfds: list[int] = []

    def run_message(
        self,
        run_id: int,
        *,
        magic: int = MAGIC,
        version: int = VERSION,
        kind: int = RUN_TYPE,
        cpu_nanoseconds: int = 60 * 10**9,
        data_bytes: int = UNLIMITED,
        address_bytes: int = UNLIMITED,
        file_bytes: int = 1 << 30,
        open_files: int = 3,
        pin_cpu: int = 0,
    ) -> bytes:
        limits = (cpu_nanoseconds, data_bytes, address_bytes, file_bytes, open_files)
        return RUN.pack(magic, version, kind, run_id, *limits, pin_cpu, 0)

    def send(self, message: bytes, files: Sequence[int] = ()) -> None:
        if files:
            socket.send_fds(self.control, [message], list(files))
        else:
            self.control.send(message)

    def start(self, run_id: int, files: Sequence[int] | None = None) -> None:
        """Asks for a run with generous limits; its files are /dev/null unless given."""
        with open(os.devnull, "r+b", buffering=0) as null:
            self.send(self.run_message(run_id), files if files is not None else [null.fileno()] * 3)

    def message(self) -> Message:
        """The next message, for which it waits."""
        readable, _, _ = select.select([self.control], [], [], WAIT_SECONDS)
        assert readable, "the zygote does not answer"
        data, fds, _, _ = socket.recv_fds(self.control, 4096, 4)
        self._pidfds += fds
        assert data, f"the zygote is gone: {self.process.wait(WAIT_SECONDS)}"
        magic, version, kind, run_id = HEADER.unpack_from(data)
        assert (magic, version, len(fds)) == (MAGIC, VERSION, kind == STARTED_TYPE)
        if kind == ENDED_TYPE:
            return Message(kind, run_id, status=ENDED.unpack(data)[4])
        if kind in (FAILED_TYPE, UNFIT_TYPE):
            *_, error, step = FAILED.unpack(data)
            return Message(kind, run_id, error=error, step=step.rstrip(b"\0").decode())
        assert len(data) == (READY.size if kind == READY_TYPE else HEADER.size)
        return Message(kind, run_id, pidfd=fds[0] if fds else -1)

    def started(self, run_id: int) -> int:
        """Takes the message that a run was started; returns its pidfd."""
        message = self.message()
        assert (message.kind, message.run_id) == (STARTED_TYPE, run_id), message
        return message.pidfd

    def ended(self, run_id: int) -> int:
        """Takes the message that a run has ended; returns its wait status."""
        message = self.message()
        assert (message.kind, message.run_id) == (ENDED_TYPE, run_id), message
        return message.status

    def failed(self, run_id: int) -> Message:
        message = self.message()
        assert (message.kind, message.run_id) == (FAILED_TYPE, run_id), message
        return message

    def output(self, run_id: int, stdin: bytes = b"") -> bytes:
        """Runs once, to a good end; returns what the run wrote."""
        fds: list[int] = []
        try:
            for name in ("stdin", "stdout", "stderr"):
                fds.append(create_memfile(name))
            write_memfile(fds[0], stdin)
            self.start(run_id, fds)
            self.started(run_id)
            status = self.ended(run_id)
            assert status == 0, (status, read_memfile(fds[2], 4096))
            return read_memfile(fds[1], 1 << 26)
        finally:
            for fd in fds:
                os.close(fd)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def limit_descriptors(self, most: int) -> None:
        _, hard = resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (most, hard))

    def kill_all(self, count: int) -> list[int]:
        """Kills the runs whose pidfds it got; returns their ids as their ends come."""
        for pidfd in self._pidfds[-count:]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return [message.run_id for message in (self.message() for _ in range(count))]

    def exit_code(self) -> int:
        """Waits for its end."""
        return self.process.wait(WAIT_SECONDS)

    def close(self) -> None:
        self.control.close()
        for pidfd in self._pidfds:
            os.close(pidfd)
        self.process.kill()
        self.process.wait()


@contextmanager
def zygote_of(command: Sequence[str], files: Sequence[int] = (), layers: int = 0) -> Iterator[RawZygote]:
    """Starts a program that is to become a zygote, with no isolation unless `layers` says so."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        environment = {
            **dict(variable.split("=", 1) for variable in ENVIRONMENT),
            "LD_PRELOAD": str(LIBRARY),
            "BULKHEAD_ZYGOTE_FD": str(theirs.fileno()),
            "BULKHEAD_ISOLATION": str(layers),
        }
        # env sets it for the program alone: not for what sees to it that the program does not outlive us.
        process = subprocess.Popen(
            mortal(["/usr/bin/env", *(f"{name}={value}" for name, value in environment.items()), *command]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={},
            pass_fds=(theirs.fileno(), *files),
        )
    zygote = RawZygote(process, mine)
    try:
        yield zygote
    finally:
        zygote.close()


@contextmanager
def raw_zygote(guest: Guest, entry_point: str, layers: int = 0) -> Iterator[RawZygote]:
    """A zygote of a guest's entry point, which is ready."""
    with guest.artifact_file() as artifact:
        path = f"/proc/self/fd/{artifact}"
        command = [path if word == "/proc/self/fd/3" else word for word in guest.commands[entry_point]]
        with zygote_of(command, (artifact,), layers) as zygote:
            ready = zygote.message()
            assert ready.kind == READY_TYPE, ready
            yield zygote
