"""JSON patches: what `diff` says is exactly what `apply`, and everybody else's, does."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import jsonpatch
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.service import patch, strictjson
from bulkhead.service.patch import MAX_COPIED_BYTES, MAX_OPERATIONS, BadPatch, apply, diff, same
from bulkhead.service.strictjson import decode_exact, encode_exact

# Few different keys and values, so that documents have something in common.
_KEYS = st.sampled_from(["a", "b", "", "a/b", "~", "~1", "/", "é", "0", "-"])
_SCALARS = st.sampled_from([None, True, False, 0, 1, -1, 1.0, 0.0, 1.5, "", "1", "a", "true", 2**64])
DOCUMENTS = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=25,
)


def exact(value: Any) -> Any:
    return decode_exact(json.dumps(value).encode())


def typed(value: Any) -> Any:
    """A value whose Python equality is that of JSON: 1, 1.0 and true are three things."""
    if isinstance(value, dict):
        return {key: typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [typed(each) for each in value]
    return (type(value).__name__, value)


@given(DOCUMENTS, DOCUMENTS)
def test_applied_by_the_oracle_gives_exactly_the_final_document(original: Any, final: Any) -> None:
    operations = json.loads(encode_exact(diff(exact(original), exact(final))))
    assert typed(jsonpatch.apply_patch(original, operations)) == typed(final)


@given(DOCUMENTS, DOCUMENTS)
def test_applied_by_ourselves_gives_exactly_the_final_document(original: Any, final: Any) -> None:
    operations = encode_exact(diff(exact(original), exact(final)))
    assert typed(json.loads(apply(operations, json.dumps(original).encode()))) == typed(final)


@given(DOCUMENTS)
def test_says_nothing_of_what_is_the_same(document: Any) -> None:
    assert diff(exact(document), exact(document)) == []


@given(DOCUMENTS, DOCUMENTS)
def test_equality_is_that_of_json(left: Any, right: Any) -> None:
    assert same(exact(left), exact(right)) == (typed(left) == typed(right))


@pytest.mark.parametrize(
    ("original", "final", "expected"),
    [
        ({}, {"a": None}, [{"op": "add", "path": "/a", "value": None}]),
        ({"a": None}, {}, [{"op": "remove", "path": "/a"}]),
        ({"a": None}, {"a": {}}, [{"op": "replace", "path": "/a", "value": {}}]),
        ({"a": True}, {"a": 1}, [{"op": "replace", "path": "/a", "value": 1}]),
        ({"a": {}}, {"a": []}, [{"op": "replace", "path": "/a", "value": []}]),
        ({}, {"a/b": {"~": 1}}, [{"op": "add", "path": "/a~1b", "value": {"~": 1}}]),
        ({"a/b": {"~1": 1}}, {"a/b": {"~1": 2}}, [{"op": "replace", "path": "/a~1b/~01", "value": 2}]),
        ({"l": [1, 2]}, {"l": [1, 2, 3]}, [{"op": "add", "path": "/l/2", "value": 3}]),
        ({"l": [1, 2]}, {"l": [0, 1, 2]}, [{"op": "add", "path": "/l/0", "value": 0}]),
        ({"l": [1, 2, 3]}, {"l": [1, 3]}, [{"op": "remove", "path": "/l/1"}]),
        ({"l": [1, 2, 3]}, {"l": [1, 9, 3]}, [{"op": "replace", "path": "/l/1", "value": 9}]),
        ({"l": [1, 2, 3]}, {"l": []}, [{"op": "remove", "path": f"/l/{index}"} for index in (2, 1, 0)]),
        ({"l": [{"a": 1}]}, {"l": [{"a": 1, "b": 2}]}, [{"op": "add", "path": "/l/0/b", "value": 2}]),
        ([], {}, [{"op": "replace", "path": "", "value": {}}]),
    ],
)
def test_the_usual_edits_are_one_small_operation(original: Any, final: Any, expected: Any) -> None:
    assert json.loads(encode_exact(diff(exact(original), exact(final)))) == expected


def test_numbers_go_through_as_they_were_written() -> None:
    original = b'{"big":12345678901234567890,"price":1.10,"same":1.50}'
    final = b'{"big":12345678901234567891,"price":1.20,"same":1.5,"new":[1.10]}'
    operations = encode_exact(diff(decode_exact(original), decode_exact(final)))
    assert b'"value":12345678901234567891' in operations
    assert b'"value":1.20' in operations
    assert b"[1.10]" in operations
    assert b"/same" not in operations
    patched = apply(operations, original)
    assert json.loads(patched, parse_float=Decimal) == {
        "big": 12345678901234567891,
        "price": Decimal("1.20"),
        "same": Decimal("1.50"),
        "new": [Decimal("1.10")],
    }


# Applying

_TOKENS = st.sampled_from(["a", "b", "", "a~1b", "~0", "0", "1", "2", "3", "-", "00", "+1", "~", "~2"])
_POINTERS = st.lists(_TOKENS, max_size=3).map(lambda tokens: "".join("/" + token for token in tokens))
_PATCHES = st.lists(
    st.fixed_dictionaries(
        {"op": st.sampled_from(["add", "remove", "replace", "move", "copy"]), "path": _POINTERS},
        optional={"from": _POINTERS, "value": DOCUMENTS},
    ),
    max_size=4,
)


@given(DOCUMENTS, _PATCHES)
def test_applies_what_the_oracle_applies_and_refuses_the_rest(document: Any, operations: list[Any]) -> None:
    try:
        result = apply(json.dumps(operations).encode(), json.dumps(document).encode())
    except BadPatch:
        return
    # The oracle refuses less: it reads `~2` and `00`, and moves values into themselves.
    assert typed(json.loads(result)) == typed(jsonpatch.apply_patch(document, operations))


@pytest.mark.parametrize(
    ("operations", "document", "expected"),
    [
        ([{"op": "add", "path": "/a", "value": 1}], {}, {"a": 1}),
        ([{"op": "add", "path": "/l/-", "value": 3}], {"l": [1]}, {"l": [1, 3]}),
        ([{"op": "move", "from": "/a", "path": "/b/c"}], {"a": 1, "b": {}}, {"b": {"c": 1}}),
        ([{"op": "move", "from": "/l/0", "path": "/l/1"}], {"l": [1, 2]}, {"l": [2, 1]}),
        (
            [{"op": "copy", "from": "/a", "path": "/b"}, {"op": "add", "path": "/b/x", "value": 1}],
            {"a": {}},
            {"a": {}, "b": {"x": 1}},
        ),
        ([{"op": "test", "path": "/a", "value": 1}, {"op": "remove", "path": "/a"}], {"a": 1}, {}),
        ([{"op": "replace", "path": "", "value": [1]}], {}, [1]),
        ([{"op": "add", "path": "/a", "value": None}], {}, {"a": None}),
        ([], {"a": 1}, {"a": 1}),
    ],
)
def test_applies_every_operation(operations: Any, document: Any, expected: Any) -> None:
    assert json.loads(apply(json.dumps(operations).encode(), json.dumps(document).encode())) == expected


@pytest.mark.parametrize(
    ("operations", "why"),
    [
        ({}, "expected a list, got an object"),
        ([1], "expected an object"),
        ([{"path": "/a"}], "op: expected a value, got nothing"),
        ([{"op": "add"}], "path: expected a value"),
        ([{"op": "merge", "path": "/a"}], "expected one of add, copy"),
        ([{"op": "add", "path": "/a"}], "expected a value"),
        ([{"op": "move", "path": "/a"}], "expected from"),
        ([{"op": "add", "path": "a", "value": 1}], "begins with /"),
        ([{"op": "add", "path": "/~2", "value": 1}], "not ~0 or ~1"),
        ([{"op": "add", "path": "/x/y", "value": 1}], "nothing is at 'x'"),
        ([{"op": "add", "path": "/s/y", "value": 1}], "no members"),
        ([{"op": "add", "path": "/l/3", "value": 1}], "no item 3"),
        ([{"op": "add", "path": "/l/01", "value": 1}], "place of a list's item"),
        ([{"op": "add", "path": "/l/1e0", "value": 1}], "place of a list's item"),
        ([{"op": "replace", "path": "/l/-", "value": 1}], "place of a list's item"),
        ([{"op": "replace", "path": "/l/2", "value": 1}], "no item 2"),
        ([{"op": "replace", "path": "/x", "value": 1}], "nothing is at 'x'"),
        ([{"op": "remove", "path": "/x"}], "nothing is at 'x'"),
        ([{"op": "move", "from": "/o", "path": "/o/p"}], "into itself"),
        ([{"op": "test", "path": "/n", "value": True}], "is another"),
        ([{"op": "test", "path": "/n", "value": 1.0}], "is another"),
    ],
)
def test_refuses_a_patch_that_does_not_fit_and_says_why(operations: Any, why: str) -> None:
    document = b'{"l":[1,2],"s":"text","n":1,"o":{}}'
    with pytest.raises(BadPatch, match=why):
        apply(json.dumps(operations).encode(), document)


def test_refuses_a_patch_that_copies_without_end() -> None:
    doubling = [{"op": "copy", "from": "", "path": f"/{index}"} for index in range(40)]
    with pytest.raises(BadPatch, match=f"copies more than {MAX_COPIED_BYTES} bytes"):
        apply(json.dumps(doubling).encode(), b'{"a":"0123456789"}')


def test_refuses_a_patch_of_too_many_operations() -> None:
    operations = [{"op": "remove", "path": "/a"}] * (MAX_OPERATIONS + 1)
    with pytest.raises(BadPatch, match=f"at most {MAX_OPERATIONS}"):
        apply(json.dumps(operations).encode(), b"{}")


def test_refuses_a_patch_that_nests_without_end() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = {"a": deep}
    operations = [{"op": "add", "path": "/a" * (199 * (index + 1)), "value": deep} for index in range(40)]
    text = json.dumps(operations).encode()
    strictjson.check(text)
    with pytest.raises(BadPatch, match="too deep"):
        apply(text, json.dumps(deep).encode())


def test_the_document_of_a_diff_is_left_as_it_was() -> None:
    original, final = exact({"a": [1]}), exact({"a": [1, {"b": 2}]})
    before = encode_exact(original), encode_exact(final)
    patch.diff(original, final)
    assert (encode_exact(original), encode_exact(final)) == before
