"""Both ends of the spawner's protocol see the same messages."""

from __future__ import annotations

import errno
import re
import struct
import subprocess

import pytest

from bulkhead.sandbox import spawner_protocol as ours
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.outcome import Way
from bulkhead.sandbox.spawner import PROGRAM

_HEADER_FIELDS = ["magic", "version", "type", "run_id"]
_LIMIT_FIELDS = [
    f"limits.{name}" for name in ("cpu_nanoseconds", "data_bytes", "address_bytes", "file_bytes")
]
_MESSAGES: dict[str, tuple[struct.Struct, list[str]]] = {
    "message_header": (ours.HEADER, []),
    "hello_message": (ours.HELLO, ["layers", "reserved"]),
    "program_message": (
        ours.PROGRAM,
        ["key", "idle_nanoseconds", "flags", "layers", "argument_count", "environment_count"],
    ),
    "forget_message": (ours.FORGET, ["key"]),
    "run_message": (
        ours.RUN,
        [
            "key",
            *_LIMIT_FIELDS,
            "limits.open_files",
            "wall_nanoseconds",
            "stderr_bytes",
            "pin_cpu",
            "stdin_bytes",
        ],
    ),
    "output_message": (ours.OUTPUT, ["stream", "bytes"]),
    "ended_message": (
        ours.ENDED,
        [
            "wait_status",
            "reason",
            "wall_nanoseconds",
            "cpu_nanoseconds",
            "peak_resident_bytes",
            "touched_bytes",
            "stdout_bytes",
            "stderr_truncated",
            "way",
            "layers",
            "stderr_here",
            "stdout_here",
            "reserved",
        ],
    ),
    "failed_message": (ours.FAILED, ["stage", "error"]),
    "zygote_message": (ours.ZYGOTE, ["key", "state", "layers", "error", "step"]),
}


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[int]]:
    """What the program says of its own end."""
    done = subprocess.run([PROGRAM, "--protocol"], capture_output=True, text=True, check=True)
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: [int(number) for number in numbers] for name, *numbers in lines}


def _offsets(layout: struct.Struct) -> list[int]:
    """Where each field begins. Bytes ("16s") are one field, padding ("4x") is none."""
    order, offsets, before = layout.format[0], [], ""
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format[1:]):
        if kind not in "sx":
            assert count == ""
        if kind != "x":
            offsets.append(struct.calcsize(order + before))
        before += count + kind
    return offsets


@pytest.mark.parametrize("name", _MESSAGES)
def test_both_ends_lay_out_messages_alike(theirs: dict[str, list[int]], name: str) -> None:
    layout, fields = _MESSAGES[name]
    places = dict(zip([*_HEADER_FIELDS, *fields], _offsets(layout), strict=True))
    assert theirs[name] == [layout.size]
    told = {key.partition(".")[2]: value for key, value in theirs.items() if key.startswith(f"{name}.")}
    limits = told.pop("limits", None)
    if limits is not None:
        assert limits == [places[_LIMIT_FIELDS[0]]]
    expected = {"run_id"} if name == "message_header" else {*fields} - {"reserved"}
    assert told == {field: [places[field]] for field in expected}


def test_every_message_is_compared(theirs: dict[str, list[int]]) -> None:
    assert {name.partition(".")[0] for name in theirs if "_message" in name} == {*_MESSAGES} - {
        "message_header"
    }


def test_both_ends_number_things_alike(theirs: dict[str, list[int]]) -> None:
    assert theirs["magic"] == [ours.MAGIC]
    assert theirs["version"] == [ours.VERSION]
    assert theirs["types"] == list(ours.MessageType)
    assert theirs["reasons"] == [EndReason.BY_ITSELF, EndReason.WALL_TIME, EndReason.KILLED]
    assert theirs["ways"] == [Way.EXEC, Way.ZYGOTE]
    assert theirs["stages"] == list(ours.Stage)
    assert theirs["states"] == list(ours.ZygoteState)
    assert theirs["flags"] == [ours.ProgramFlags.IS_WASMTIME, ours.ProgramFlags.HAS_ZYGOTE]
    assert theirs["maximums"] == [
        ours.MOST_MESSAGE_BYTES,
        ours.MOST_FILES,
        ours.MOST_STRINGS,
        ours.KEY_BYTES,
    ]


def test_the_longest_inline_input_fills_a_message() -> None:
    bounds = ours.Bounds(
        wall_seconds=1, cpu_seconds=1, data_bytes=1, address_bytes=1, file_bytes=1, stderr_bytes=1
    )
    stdin = bytes(ours.MOST_INLINE_STDIN_BYTES)
    assert len(ours.encode_run(1, bytes(ours.KEY_BYTES), bounds, stdin)) == ours.MOST_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("change", "files", "error_number"),
    [
        ({"argv": ("/bin/true", "a\0b")}, 0, errno.EINVAL),
        ({"environment": ("A=\0",)}, 0, errno.EINVAL),
        ({"argv": ("/bin/true", "\ud800")}, 0, errno.EILSEQ),
        ({"argv": ("/bin/true", "x" * 70_000)}, 0, errno.E2BIG),
        ({"argv": ("x",) * (ours.MOST_STRINGS + 1)}, 0, errno.E2BIG),
        ({"argv": ("x",) * ours.MOST_STRINGS, "environment": ("A=1",)}, 0, errno.E2BIG),
        ({}, ours.MOST_FILES - 2, errno.E2BIG),
    ],
)
def test_refuses_a_program_that_no_process_can_be_started_with(
    change: dict[str, tuple[str, ...]], files: int, error_number: int
) -> None:
    parts: dict[str, tuple[str, ...]] = {"argv": ("/bin/true",), **change}
    program = ours.Program(
        key=bytes(ours.KEY_BYTES), argv=parts["argv"], environment=parts.get("environment", ())
    )
    with pytest.raises(ours.StartFailed) as failed:
        ours.encode_program(program, files)
    assert failed.value.error_number == error_number


def test_bytes_that_are_not_utf8_pass_as_they_are() -> None:
    program = ours.Program(key=bytes(ours.KEY_BYTES), argv=("/bin/\udcff",))
    assert ours.encode_program(program, 0).endswith(b"/bin/\xff\0")


def _ended(**fields: int) -> bytes:
    """All others are 0."""
    layout, names = _MESSAGES["ended_message"]
    assert fields.keys() <= {*names}
    return layout.pack(
        ours.MAGIC, ours.VERSION, ours.MessageType.ENDED, 1, *(fields.get(name, 0) for name in names)
    )


def test_output_that_came_in_parts_is_put_together() -> None:
    message = _ended(
        wall_nanoseconds=10**9,
        peak_resident_bytes=9,
        touched_bytes=4,
        stdout_bytes=6,
        stderr_truncated=1,
        way=1,
        layers=5,
    )
    end = ours.decode_ended(memoryview(message), {1: [b"abc", b"def"], 2: [b"x", b"y"]})
    assert (end.stdout, end.stderr, end.stderr_truncated) == (b"abcdef", b"xy", True)
    assert (end.usage.way, end.layers, end.usage.wall_seconds) == (Way.ZYGOTE, 5, 1.0)
    assert (end.usage.peak_memory_bytes, end.usage.private_memory_bytes) == (9, 4)


def test_output_within_the_message_is_standard_error_first() -> None:
    message = _ended(wait_status=7 << 8, reason=1, stdout_bytes=3, stderr_here=2, stdout_here=3)
    end = ours.decode_ended(memoryview(message + b"eeoooXX"), {})
    assert (end.stdout, end.stderr, end.stderr_truncated) == (b"ooo", b"ee", False)
    assert (end.wait_status, end.reason, end.usage.way) == (7 << 8, EndReason.WALL_TIME, Way.EXEC)


def test_zygote_news_say_what_failed() -> None:
    def reason(error: int, step: bytes) -> str:
        key = bytes(ours.KEY_BYTES)
        message = ours.ZYGOTE.pack(
            ours.MAGIC, ours.VERSION, ours.MessageType.ZYGOTE, 0, key, 2, 0, error, step
        )
        return ours.decode_zygote(memoryview(message)).reason

    assert reason(0, b"") == ""
    assert reason(0, b"more than one thread") == "more than one thread"
    assert reason(errno.EPERM, b"chroot") == "chroot: Operation not permitted"
    assert reason(0, b"\xff" * 44) == "\ufffd" * 44
