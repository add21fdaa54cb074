"""Both ends of the spawner's protocol see the same messages."""

from __future__ import annotations

import struct
import subprocess

import pytest

from bulkhead.sandbox import spawner
from bulkhead.sandbox.launch import EndReason

_HEADER_FIELDS = ["magic", "version", "type", "run_id"]
_MESSAGES: dict[str, tuple[struct.Struct, list[str]]] = {
    "message_header": (spawner._HEADER, _HEADER_FIELDS),
    "run_request": (
        spawner._RUN,
        [
            "wall_nanoseconds",
            "cpu_nanoseconds",
            "data_bytes",
            "address_bytes",
            "file_bytes",
            "stderr_bytes",
            "open_files",
            "pin_cpu",
            "argument_count",
            "environment_count",
        ],
    ),
    "ended_reply": (
        spawner._ENDED,
        [
            "wait_status",
            "reason",
            "wall_nanoseconds",
            "cpu_nanoseconds",
            "peak_resident_bytes",
            "stderr_truncated",
            "reserved",
        ],
    ),
    "failed_reply": (spawner._FAILED, ["stage", "error"]),
}


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[int]]:
    """What the program says of its own end."""
    done = subprocess.run([spawner.PROGRAM, "--protocol"], capture_output=True, text=True, check=True)
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: [int(number) for number in numbers] for name, *numbers in lines}


def _offsets(layout: struct.Struct) -> list[int]:
    """Where each field of a format without repetitions begins."""
    order, kinds = layout.format[0], layout.format[1:].replace(" ", "")
    return [struct.calcsize(order + kinds[:count]) for count in range(len(kinds))]


@pytest.mark.parametrize("name", _MESSAGES)
def test_both_ends_lay_out_messages_alike(theirs: dict[str, list[int]], name: str) -> None:
    layout, fields = _MESSAGES[name]
    all_fields = fields if name == "message_header" else [*_HEADER_FIELDS, *fields]
    ours = dict(zip(all_fields, _offsets(layout), strict=True))
    assert theirs[name] == [layout.size]
    described = {key.partition(".")[2]: value for key, value in theirs.items() if key.startswith(f"{name}.")}
    assert described == {field: [ours[field]] for field in fields}


def test_both_ends_number_things_alike(theirs: dict[str, list[int]]) -> None:
    assert theirs["magic"] == [spawner._MAGIC]
    assert theirs["version"] == [spawner._VERSION]
    assert theirs["types"] == [
        spawner._HELLO_TYPE,
        spawner._RUN_TYPE,
        spawner._KILL_TYPE,
        spawner._ENDED_TYPE,
        spawner._FAILED_TYPE,
    ]
    assert theirs["reasons"] == [EndReason.BY_ITSELF, EndReason.WALL_TIME, EndReason.KILLED]
    assert theirs["stages"] == list(spawner._STAGES)
    assert theirs["maximums"] == [
        spawner._MOST_MESSAGE_BYTES,
        spawner._MOST_FILES,
        spawner._MOST_STRINGS,
    ]


def test_every_reply_fits_the_buffer() -> None:
    assert max(layout.size for layout, _ in _MESSAGES.values()) <= spawner._MOST_REPLY_BYTES
