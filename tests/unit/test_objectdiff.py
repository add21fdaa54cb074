"""How the change of an object is shown."""

from __future__ import annotations

import json
from typing import Any

from bulkhead.service.objectdiff import object_diff


def diff(before: Any, after: Any) -> list[str]:
    """The lines that changed."""
    lines = object_diff(json.dumps(before).encode(), json.dumps(after).encode())
    return [line for line in lines[2:] if line[0] in "+-"]


def test_shows_what_changed_whatever_the_order_of_keys() -> None:
    before = {"b": 1, "a": {"x": "1", "y": [1, 2]}}
    assert diff(before, {"a": {"y": [1, 2], "x": "1"}, "b": 1}) == []
    assert diff(before, {"a": {"y": [1, 3], "x": "1"}, "b": 1, "c": True}) == ["-  - 2", "+  - 3", "+c: true"]


def test_texts_of_several_lines_are_compared_line_by_line() -> None:
    before = {"data": {"script": "one\ntwo\nthree\n"}}
    assert diff(before, {"data": {"script": "one\n2\nthree\n"}}) == ["-    two", "+    2"]


def test_numbers_are_shown_as_they_were_written() -> None:
    lines = object_diff(b'{"a":1.10,"b":12345678901234567890}', b'{"a":1.100,"b":1e2}')
    assert [line for line in lines if line.startswith(("-", "+"))][2:] == [
        "-a: 1.10", "-b: 12345678901234567890", "+a: 1.100", "+b: 1e2",
    ]  # fmt: skip


def test_long_lines_are_not_folded() -> None:
    text = "word " * 1000 + "end"
    assert diff({"a": text}, {"a": text + "!"}) == [f"-a: {text}", f"+a: {text}!"]


def test_what_is_secret_is_not_shown_but_that_it_changed() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "data": {"same": "c2FtZQ==", "p": "b25l"}}
    lines = diff(secret, {**secret, "data": {"same": "c2FtZQ==", "p": "dHdv", "new": "eA=="}})
    assert lines == ["-  p: '*** (before)'", "+  new: '***'", "+  p: '*** (after)'"]
