"""Words of modules cannot do harm where they are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.service.words import clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ünïcode, 漢字", "plain, ünïcode, 漢字"),
        ("\x1b[31mred\x1b[0m", " [31mred [0m"),
        ("two\r\nlines\0", "two  lines "),
        ("\u202eright to left", " right to left"),
        ("\ud800", " "),
        ("", ""),
    ],
)
def test_replaces_what_is_not_printable(text: str, expected: str) -> None:
    assert clean(text, 100) == expected


@given(st.text(), st.integers(1, 50))
def test_is_printable_and_never_too_long(text: str, most: int) -> None:
    cleaned = clean(text, most)
    assert len(cleaned) <= most
    assert cleaned.isprintable()
    assert len(cleaned) == min(len(text), most)


def test_shows_that_something_was_cut() -> None:
    assert clean("abcdef", 4) == "abc…"
