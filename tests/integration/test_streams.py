"""What `bulkhead run` does with its standard streams when they are not what it would like."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guests import ECHO, PRELUDE
from tests.support.served import command

# Sets the terminal's title, then carriage return: both could hide what really happened.
RUDE = f"""(module {PRELUDE} (data (i32.const 200) "\\1b]0;owned\\07rude\\0d")
  (func (export "_start") (call $write (i32.const 2) (i32.const 200) (i32.const 15))))"""


@pytest.fixture
def run(tmp_path: Path, wat: Callable[[str], bytes]) -> Callable[[str], list[str]]:
    """The command line that runs a module, written as text."""

    def line(text: str) -> list[str]:
        (tmp_path / "guest.wasm").write_bytes(wat(text))
        return command("run", str(tmp_path / "guest.wasm"), "--state-dir", str(tmp_path / "state"))

    return line


def read_all(terminal: int) -> bytes:
    output = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # a terminal without a program ends so
            return output
        if not part:
            return output
        output += part


NAMED_RUDELY = """(module (memory (export "memory") 1)
  (func (@name "\\1b]0;owned\\07") (export "_start") unreachable))"""


@pytest.mark.parametrize(("guest", "exit_code"), [(RUDE, 0), (NAMED_RUDELY, 11)])
def test_a_guest_cannot_command_the_terminal(
    run: Callable[[str], list[str]], guest: str, exit_code: int
) -> None:
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(run(guest), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        os.close(theirs)
        output = read_all(ours)
        assert process.wait() == exit_code
    finally:
        os.close(ours)
    assert b"\x1b]" not in output
    assert rb"\x1b]0;owned\x07" in output


def test_hands_a_guests_bytes_to_a_program_as_they_are(run: Callable[[str], list[str]]) -> None:
    done = subprocess.run(run(RUDE), stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stderr.startswith(b"\x1b]0;owned\x07rude\r\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_works_with_a_closed_stream(run: Callable[[str], list[str]], closed: str) -> None:
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", *run(ECHO)]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ok")


def test_names_the_option_whose_value_is_no_json(run: Callable[[str], list[str]]) -> None:
    authn = f'(module {PRELUDE} (func (export "authn")))'
    line = [*run(authn), "--entry", "authn", "--settings", "{"]
    done = subprocess.run(line, input='{"kind":"TokenReview"}', capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("bulkhead: --settings: expected JSON")
