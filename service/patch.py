"""JSON patches (RFC 6902): the difference of two documents, and a patch's effect on one.

Documents are what `strictjson.decode_exact` returns. Equality is that of JSON, not of Python:
`true` is not 1, and 1 is not 1.0.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from bulkhead.service import strictjson
from bulkhead.service.strictjson import Mismatch, Number

MAX_OPERATIONS = 10_000
# `copy` can double a document with every operation. kube-apiserver draws the same line.
MAX_COPIED_BYTES = 3 << 20

_OPERATIONS = frozenset({"add", "remove", "replace", "move", "copy", "test"})
_NEED_VALUE = frozenset({"add", "replace", "test"})
_NEED_FROM = frozenset({"move", "copy"})
_PLACE = re.compile(r"0|[1-9][0-9]{0,8}")


class BadPatch(ValueError):
    """The patch is not one, or does not fit its document. The text says which operation and why."""


# Equality


def same(left: Any, right: Any) -> bool:
    """Whether two documents are equal as JSON: same types, same values, same order in lists."""
    if type(left) is not type(right):
        return False
    if type(left) is dict:
        if left.keys() != right.keys():
            return False
        return all(same(value, right[key]) for key, value in left.items())
    if type(left) is list:
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Number):
        return left.same_as(right)
    return bool(left == right)


# Difference


def diff(original: Any, final: Any) -> list[dict[str, Any]]:
    """The operations that turn `original` into `final`; none if they are the same."""
    operations: list[dict[str, Any]] = []
    _diff(original, final, "", operations)
    return operations


def _diff(original: Any, final: Any, path: str, operations: list[dict[str, Any]]) -> None:
    if type(original) is dict and type(final) is dict:
        _diff_objects(original, final, path, operations)
    elif type(original) is list and type(final) is list:
        _diff_lists(original, final, path, operations)
    elif not same(original, final):
        operations.append({"op": "replace", "path": path, "value": final})


def _diff_objects(
    original: dict[str, Any], final: dict[str, Any], path: str, operations: list[dict[str, Any]]
) -> None:
    for key in original:
        if key not in final:
            operations.append({"op": "remove", "path": f"{path}/{_escape(key)}"})
    for key, value in final.items():
        child = f"{path}/{_escape(key)}"
        if key in original:
            _diff(original[key], value, child, operations)
        else:
            operations.append({"op": "add", "path": child, "value": value})


def _diff_lists(original: list[Any], final: list[Any], path: str, operations: list[dict[str, Any]]) -> None:
    """What is the same at both ends stays. In between items change in place; then some go or come.

    So the usual edits, one item added, removed or changed anywhere, are one operation. A true
    minimum would compare each item with each.
    """
    start = 0
    shorter = min(len(original), len(final))
    while start < shorter and same(original[start], final[start]):
        start += 1
    end = 0
    while end < shorter - start and same(original[-1 - end], final[-1 - end]):
        end += 1
    original_stop, final_stop = len(original) - end, len(final) - end
    stop = min(original_stop, final_stop)
    for index in range(start, stop):
        _diff(original[index], final[index], f"{path}/{index}", operations)
    for index in reversed(range(stop, original_stop)):
        operations.append({"op": "remove", "path": f"{path}/{index}"})
    for index in range(stop, final_stop):
        operations.append({"op": "add", "path": f"{path}/{index}", "value": final[index]})


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


# Application


class _Operation(msgspec.Struct):
    op: str
    path: str
    from_: str | UnsetType = msgspec.field(name="from", default=UNSET)
    value: Any = UNSET


_patch_decoder = msgspec.json.Decoder(list[_Operation], float_hook=Number)


def apply(patch: bytes, document: bytes) -> bytes:
    """Applies a patch to a document and returns the new one; both are JSON that `check` has passed.

    The new document can be nested deeper than `check` allows. Raises BadPatch.
    """
    result = strictjson.decode_exact(document)
    copied_bytes = 0
    for index, operation in enumerate(_read(patch)):
        try:
            if operation.op == "copy":
                # Written and read again: the copy must not change with its original.
                written = strictjson.encode_exact(_get(result, _pointer(operation.from_)))
                copied_bytes += len(written)
                if copied_bytes > MAX_COPIED_BYTES:
                    raise BadPatch(f"copies more than {MAX_COPIED_BYTES} bytes")
                operation.value = strictjson.decode_exact(written)
            result = _apply_one(operation, result)
        except BadPatch as error:
            raise BadPatch(f"operation {index} ({operation.op}): {error}") from None
        except RecursionError:
            raise BadPatch(f"operation {index} ({operation.op}): makes a document that is too deep") from None
    try:
        return strictjson.encode_exact(result)
    except RecursionError:
        raise BadPatch("makes a document that is too deep") from None


def _read(patch: bytes) -> list[_Operation]:
    try:
        operations = _patch_decoder.decode(patch)
    except msgspec.ValidationError:
        raise BadPatch(_why_not_a_patch(patch)) from None
    if len(operations) > MAX_OPERATIONS:
        raise BadPatch(f"has {len(operations)} operations; at most {MAX_OPERATIONS} are allowed")
    for index, operation in enumerate(operations):
        if operation.op not in _OPERATIONS:
            raise BadPatch(f"operation {index}: expected one of {', '.join(sorted(_OPERATIONS))}")
        if operation.op in _NEED_VALUE and operation.value is UNSET:
            raise BadPatch(f"operation {index} ({operation.op}): expected a value, got nothing")
        if operation.op in _NEED_FROM and operation.from_ is UNSET:
            raise BadPatch(f"operation {index} ({operation.op}): expected from, got nothing")
    return operations


def _why_not_a_patch(patch: bytes) -> str:
    try:
        strictjson.read(patch, list[_Operation])
    except Mismatch as error:
        return str(error)
    return "expected a list of operations"


def _apply_one(operation: _Operation, document: Any) -> Any:
    path = _pointer(operation.path)
    match operation.op:
        case "add" | "copy":
            return _add(document, path, operation.value)
        case "remove":
            return _remove(document, path)
        case "replace":
            _get(document, path)
            return _set(document, path, operation.value)
        case "move":
            source = _pointer(operation.from_)
            if len(path) > len(source) and path[: len(source)] == source:
                raise BadPatch("moves a value into itself")
            value = _get(document, source)
            return document if path == source else _add(_remove(document, source), path, value)
        case _:
            if not same(_get(document, path), operation.value):
                raise BadPatch(f"the value at {operation.path!r} is another")
            return document


def _pointer(text: str | UnsetType) -> tuple[str, ...]:
    """The tokens of a JSON pointer (RFC 6901)."""
    assert isinstance(text, str)  # _read has seen to it
    if text == "":
        return ()
    if not text.startswith("/"):
        raise BadPatch(f"expected a path that is empty or begins with /, got {text[:64]!r}")
    tokens = text[1:].split("/")
    if any("~" in token.replace("~0", "").replace("~1", "") for token in tokens):
        raise BadPatch(f"the path {text[:64]!r} has a ~ that is not ~0 or ~1")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in tokens)


def _index(text: str, length: int) -> int:
    """A place in a list: digits without a leading zero, at most `length`."""
    if _PLACE.fullmatch(text) is None:
        raise BadPatch(f"expected the place of a list's item, got {text[:64]!r}")
    place = int(text)
    if place > length:
        raise BadPatch(f"the list has no item {place}")
    return place


def _get(document: Any, path: tuple[str, ...]) -> Any:
    here = document
    for token in path:
        if type(here) is dict:
            if token not in here:
                raise BadPatch(f"nothing is at {token[:64]!r}")
            here = here[token]
        elif type(here) is list:
            here = here[_index(token, len(here) - 1)]
        else:
            raise BadPatch(f"{token[:64]!r} is asked of a value that has no members")
    return here


def _add(document: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    if type(parent) is list:
        parent.insert(len(parent) if last == "-" else _index(last, len(parent)), value)
        return document
    return _set(document, path, value)


def _set(document: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    if type(parent) is dict:
        parent[last] = value
    elif type(parent) is list:
        parent[_index(last, len(parent) - 1)] = value
    else:
        raise BadPatch(f"{last[:64]!r} is asked of a value that has no members")
    return document


def _remove(document: Any, path: tuple[str, ...]) -> Any:
    if not path:
        raise BadPatch("removes the whole document")
    _get(document, path)
    parent, last = _get(document, path[:-1]), path[-1]
    del parent[int(last) if type(parent) is list else last]
    return document
