"""JSON is read in one way only, and kept as it was written."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.service import strictjson
from bulkhead.service.strictjson import (
    MAX_DEPTH,
    Mismatch,
    NotStrict,
    Number,
    check,
    decode_exact,
    encode_exact,
    read,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=5)
    ),
    max_leaves=30,
)


@pytest.fixture(params=[256 << 10, 8], ids=["whole", "in-pieces"])
def _piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test as for small documents, and as for those that are taken apart."""
    monkeypatch.setattr(strictjson, "_PIECE_BYTES", request.param)


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b"\xff\xfe{\x00}\x00", "byte-order mark"),
        (b"{\x00}\x00", "not JSON"),
        (b'{"a": "\xff\xff\xff\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80 surrogate"}', "UTF-8"),
        (b'{"a": "\xc0\x80 overlong"}', "UTF-8"),
        (b'{"a": "\\ud800 alone"}', "not JSON"),
        (b'{"a": "\\udc00 alone"}', "not JSON"),
        (b'{"a": "\\ud800\\u0041"}', "not JSON"),
        (b'{"a": NaN, "b": 12345}', "not JSON"),
        (b'{"a": Infinity, "b": 1}', "not JSON"),
        (b'{"a": -Infinity, "b": 1}', "not JSON"),
        (b'{"a": 1e999999, "b": 1}', "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too large"),
        (b'{"a": "\x00 control"}', "not JSON"),
        (b'{"a": 01, "b": 12345}', "not JSON"),
        (b'{"a": 1, "b": 12345,}', "not JSON"),
        (b"{'a': 1, 'b': 12345}", "not JSON"),
        (b'{"a": 1} // comment', "more than one"),
        (b'{"a": 1, "b": 12345', "too early"),
        (b'{"a": 1, "b": 1} {}', "more than one"),
        (b'{"a": 1, "b": 1}]', "more than one"),
        (b'{"a": 1}\x00', "more than one"),
    ],
)
def test_refuses_what_is_not_one_json_document(text: bytes, why: str) -> None:
    with pytest.raises(NotStrict, match=why):
        check(text)


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":1}',
        b'{"a" :1, "a"\t:2}',
        b'{"a":1,"\\u0061":2}',
        b'{"x":[{"y":{"a":1,"b":2,"a":3}}]}',
        # As many `":` as without the duplicate, by way of escapes.
        b'{"a":1,"a":"\\u0022:"}',
        b'{"a":1,"a":"\\"\\u003a"}',
        b'{"a":1,"a":"\\"\\u003A"}',
        b'{"\\u0022:":1,"a":1,"a":2}',
    ],
)
def test_refuses_duplicate_keys_and_names_them(text: bytes) -> None:
    with pytest.raises(NotStrict, match='the key "a" is there twice'):
        check(text)


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'  {"a": [1, 2.5, null, true, "x"]}\n',
        b'{"a":"\\u003c\\u0022:\\u003a\\"","\\":":"\\\\\\":"}',
        b'{"a":{"a":{"a":1}},"b":{"a":1}}',
        b'"\\ud83d\\ude00"',
        b"12345678901234567890123",
        b"-0.0",
        b'{"":{"":""}}',
    ],
)
def test_takes_every_json_document(text: bytes) -> None:
    check(text)
    assert strictjson.decode(text) == json.loads(text)


@pytest.mark.usefixtures("_piece_bytes")
@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"abc":', b"}]")])
def test_refuses_what_is_nested_too_deep(left: bytes, right: bytes) -> None:
    levels = left.count(b"[") + left.count(b"{")
    check(left * (MAX_DEPTH // levels) + b"1" + right * (MAX_DEPTH // levels))
    for count in (MAX_DEPTH // levels + 1, 10_000, 100_000):
        with pytest.raises(NotStrict, match="nested deeper"):
            check(left * count + b"1" + right * count)


def test_counts_brackets_in_strings_as_text() -> None:
    check(json.dumps({"a": "[{" * 1000}).encode())


@given(JSON, st.sampled_from([8, 64, 256 << 10]))
def test_takes_what_any_writer_writes(value: Any, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strictjson, "_PIECE_BYTES", piece_bytes)
        check(json.dumps(value).encode())
        check(json.dumps(value, ensure_ascii=False, indent=2).encode())
        check(msgspec.json.encode(value))


@given(
    st.lists(st.tuples(st.text(st.sampled_from('a":\\ <'), max_size=3), JSON), min_size=1, max_size=6),
    st.data(),
)
def test_finds_a_duplicate_wherever_it_is(pairs: list[tuple[str, Any]], data: st.DataObject) -> None:
    members = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in dict(pairs).items()]
    repeated = data.draw(st.sampled_from(list(dict(pairs))))
    members.insert(data.draw(st.integers(0, len(members))), f"{json.dumps(repeated)}: 1")
    text = f'[{{"x": {{{", ".join(members)}}}}}]'.encode()
    for piece_bytes in (8, 256 << 10):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strictjson, "_PIECE_BYTES", piece_bytes)
            with pytest.raises(NotStrict, match="twice"):
                check(text)


@pytest.mark.parametrize(
    "text", ["12345678901234567890", "1.10", "1e5", "1E+05", "0.1000000000000000055", "-0.0"]
)
def test_keeps_numbers_as_they_were_written(text: str) -> None:
    document = f'{{"a":[{text}]}}'.encode()
    assert encode_exact(decode_exact(document)) == document


def test_compares_numbers_exactly() -> None:
    assert Number("1.10").same_as(Number("1.1"))
    assert Number("1e2").same_as(Number("100.0"))
    assert not Number("0.1").same_as(Number("0.1000000000000000055"))


class _Inner(msgspec.Struct):
    uid: str
    count: int | None = None
    names: list[str] | None = None


class _Outer(msgspec.Struct):
    request: _Inner
    flag: bool = False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "expected an object, got a list"),
        (b"{}", "request: expected a value, got nothing"),
        (b'{"request":null}', "request: expected an object, got null"),
        (b'{"request":{}}', "request.uid: expected a value, got nothing"),
        (b'{"request":{"uid":7}}', "request.uid: expected a string, got an integer"),
        (b'{"request":{"uid":"","count":"x"}}', "request.count: expected an integer or null, got a string"),
        (b'{"request":{"uid":"","names":["a",true]}}', "request.names[1]: expected a string, got a boolean"),
        (b'{"request":{"uid":""},"flag":1.5}', "flag: expected a boolean, got a number"),
    ],
)
def test_says_which_field_is_wrong_and_what_was_expected(text: bytes, message: str) -> None:
    with pytest.raises(Mismatch) as caught:
        read(text, _Outer)
    assert str(caught.value) == message


def test_names_the_place_that_a_part_was_taken_from() -> None:
    with pytest.raises(Mismatch, match=r"^response\.request\.uid: expected a string, got an integer$"):
        read(b'{"request":{"uid":7}}', _Outer, "response")
