"""The messages between the service and the spawner: the Python side of native/protocol.h."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.outcome import Usage, Way

MAGIC = 0x44484B42
VERSION = 2
MOST_MESSAGE_BYTES = 65536
MOST_FILES = 8
MOST_STRINGS = 512
KEY_BYTES = 16

# native/protocol.h; its own order of fields.
HEADER = struct.Struct("=IHHQ")
HELLO = struct.Struct("=IHHQ II")
PROGRAM = struct.Struct("=IHHQ 16s Q IIII")
FORGET = struct.Struct("=IHHQ 16s")
RUN = struct.Struct("=IHHQ 16s QQQQI4x QQ II")
OUTPUT = struct.Struct("=IHHQ II")
ENDED = struct.Struct("=IHHQ iI QQQQQ IIIIII")
FAILED = struct.Struct("=IHHQ Ii")
ZYGOTE = struct.Struct("=IHHQ 16s IIi 44s")

MOST_INLINE_STDIN_BYTES = MOST_MESSAGE_BYTES - RUN.size


class MessageType(IntEnum):
    HELLO = 1
    PROGRAM = 2
    FORGET = 3
    RUN = 4
    KILL = 5
    OUTPUT = 6
    ENDED = 7
    FAILED = 8
    ZYGOTE = 9
    CLIENT = 10


class Stage(IntEnum):
    """Where the start of a process failed."""

    REQUEST = 1
    """The program is not known, or the message is malformed."""
    PREPARE = 2
    CONFINE = 3
    EXEC = 4


_STAGE_WORDS = {
    Stage.REQUEST: "the request",
    Stage.PREPARE: "preparing the process",
    Stage.CONFINE: "confining the process",
    Stage.EXEC: "executing the program",
}


class ProgramFlags(IntFlag):
    """What a program is."""

    IS_WASMTIME = 1
    """The library is preloaded, which confines a run when it is loaded."""
    HAS_ZYGOTE = 2


NO_FLAGS = ProgramFlags(0)


class ZygoteState(IntEnum):
    """How it stands with a program's zygote."""

    READY = 1
    UNFIT = 2
    """It cannot be: runs of this program execute it, for good."""
    DIED = 3
    """Another one is started after a pause."""
    SHUNNED = 4
    """Runs crashed again and again: they execute the program for a while."""


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
class Program:
    """Something that can be run many times."""

    key: bytes
    """KEY_BYTES that say all about it: programs with the same key are one."""
    argv: tuple[str, ...]
    environment: tuple[str, ...] = ()
    flags: ProgramFlags = NO_FLAGS
    layers: int = 0
    """Of isolation that its runs get, where they work; see isolation.py."""
    idle_seconds: float = 0.0
    """Then its zygote is stopped until the next run; 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnd:
    """A process that has ended and is reaped."""

    wait_status: int
    reason: EndReason
    stdout: bytes
    """All of it, one byte more than the bound at the most."""
    stderr: bytes
    stderr_truncated: bool
    usage: Usage
    layers: int
    """Of isolation that held."""


@dataclass(frozen=True, slots=True)
class ZygoteReport:
    """News of a program's zygote."""

    key: bytes
    state: ZygoteState
    layers: int
    reason: str
    """Empty when it is well."""


class StartFailed(SandboxError):
    """There never was a process."""

    def __init__(self, message: str, error_number: int, stage: Stage = Stage.PREPARE) -> None:
        super().__init__(message)
        self.stage = stage
        self.error_number = error_number
        """Of the system call that failed."""


def _nanoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


def encode_program(program: Program, file_count: int) -> bytes:
    """Raises StartFailed for what no process can be started with."""
    strings = (*program.argv, *program.environment)
    try:
        encoded = os.fsencode("".join([f"{text}\0" for text in strings]))
    except UnicodeEncodeError as error:
        raise StartFailed(f"an argument cannot be encoded: {error.reason}", errno.EILSEQ) from None
    if encoded.count(b"\0") != len(strings):
        raise StartFailed("an argument holds a NUL character", errno.EINVAL)
    size = PROGRAM.size + len(encoded)
    if size > MOST_MESSAGE_BYTES or len(strings) > MOST_STRINGS or file_count > MOST_FILES - 3:
        raise StartFailed("it has too many arguments or files", errno.E2BIG)
    fixed = PROGRAM.pack(
        MAGIC,
        VERSION,
        MessageType.PROGRAM,
        0,
        program.key,
        int(program.idle_seconds * 1e9),
        program.flags,
        program.layers,
        len(program.argv),
        len(program.environment),
    )
    return fixed + encoded


def encode_run(run_id: int, key: bytes, bounds: Bounds, stdin: bytes | None) -> bytes:
    """`stdin` None: it is passed as a descriptor."""
    fixed = RUN.pack(
        MAGIC,
        VERSION,
        MessageType.RUN,
        run_id,
        key,
        _nanoseconds(bounds.cpu_seconds),
        bounds.data_bytes,
        bounds.address_bytes,
        bounds.file_bytes,
        bounds.open_files,
        _nanoseconds(bounds.wall_seconds),
        bounds.stderr_bytes,
        bounds.pinned,
        len(stdin) if stdin is not None else 0,
    )
    return fixed + stdin if stdin else fixed


def encode_forget(key: bytes) -> bytes:
    return FORGET.pack(MAGIC, VERSION, MessageType.FORGET, 0, key)


def encode_plain(kind: MessageType, run_id: int = 0) -> bytes:
    """A message that is nothing but its header: KILL, CLIENT."""
    return HEADER.pack(MAGIC, VERSION, kind, run_id)


def decode_ended(message: memoryview, parts: dict[int, list[bytes]]) -> ProcessEnd:
    """`parts` is what came of each stream in OUTPUT messages before."""
    fields = ENDED.unpack_from(message)
    status, reason, wall, cpu, peak, touched, _stdout_bytes = fields[4:11]
    truncated, way, layers, stderr_here, stdout_here, _reserved = fields[11:]
    at = ENDED.size
    stderr = bytes(message[at : at + stderr_here])
    stdout = bytes(message[at + stderr_here : at + stderr_here + stdout_here])
    if parts:
        stderr, stdout = b"".join([*parts.get(2, ()), stderr]), b"".join([*parts.get(1, ()), stdout])
    return ProcessEnd(
        wait_status=status,
        reason=EndReason(reason),
        stdout=stdout,
        stderr=stderr,
        stderr_truncated=bool(truncated),
        usage=Usage(
            wall_seconds=wall / 1e9,
            cpu_seconds=cpu / 1e9,
            peak_memory_bytes=peak,
            private_memory_bytes=min(peak, touched),
            way=Way(way),
        ),
        layers=layers,
    )


def decode_failed(message: memoryview) -> StartFailed:
    *_, stage, error = FAILED.unpack_from(message)
    return StartFailed(f"{_STAGE_WORDS[Stage(stage)]} failed: {os.strerror(error)}", error, Stage(stage))


def decode_output(message: memoryview) -> tuple[int, bytes]:
    """The stream (1 or 2) and a part of what was written to it."""
    *_, stream, size = OUTPUT.unpack_from(message)
    return stream, bytes(message[OUTPUT.size : OUTPUT.size + size])


def decode_zygote(message: memoryview) -> ZygoteReport:
    *_, key, state, layers, error, step = ZYGOTE.unpack_from(message)
    words = step.rstrip(b"\0").decode(errors="replace")
    reason = f"{words}: {os.strerror(error)}" if words and error else words
    return ZygoteReport(key, ZygoteState(state), layers, reason)


def decode_layers(message: memoryview) -> int:
    """Of a HELLO: the layers of isolation that work here."""
    return int(HELLO.unpack_from(message)[4])
