"""JSON as it must be when decisions hang on it: read in one way only, and kept as it was written.

`check` refuses what two readers could understand differently: duplicate keys, NaN, lone
surrogates, bytes that are not UTF-8, a second document. `read` then picks out typed fields, and
what is not looked at is spliced as bytes, so that numbers and escapes stay as they were written.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

# Kubernetes objects stay well below; what walks a document recursively stays within Python's stack.
MAX_DEPTH = 256

# A call into msgspec holds the interpreter's lock for as long as it takes (1 ms for each 128 KiB
# of a dense document). Larger values are taken apart first, so that other threads get their turn.
_PIECE_BYTES = 256 << 10

_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_WHITESPACE = b" \t\r\n"
# Escapes by which `":` inside a string can be written without these two characters.
_HIDDEN_COLON = re.compile(rb"\\u00(?:22|3[aA])")

_MISMATCH = re.compile(r"Expected `([^`]+)`, got `([^`]+)`(?: - at `\$(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `([^`]+)`(?: - at `\$(.*)`)?", re.DOTALL)
_TYPE_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "object": "an object",
    "array": "a list",
    "null": "null",
}

_T = TypeVar("_T")
_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


class NotStrict(ValueError):
    """Not JSON, or JSON that is not read the same way by everyone. The text is safe to show."""


class Mismatch(ValueError):
    """JSON of another shape than expected. The text says where, what was expected, what there was."""


class Number:
    """A number with a fraction or an exponent, as it was written.

    Kubernetes reads such numbers as binary fractions, other readers do not: the text is kept.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def same_as(self, other: Number) -> bool:
        """Whether both are exactly the same number: 1.10 is 1.1, and 0.1 is not 0.10000000000000001."""
        return self.text == other.text or Decimal(self.text) == Decimal(other.text)

    def __repr__(self) -> str:
        return f"Number({self.text})"


_exact_decoder = msgspec.json.Decoder(float_hook=Number)


def _write_number(value: object) -> Raw:
    if isinstance(value, Number):
        return Raw(value.text.encode())
    raise TypeError(f"{type(value).__name__} has no place in JSON")


_exact_encoder = msgspec.json.Encoder(enc_hook=_write_number)


def check(data: bytes) -> None:
    """Refuses what is not exactly one JSON document that everybody reads alike.

    Raises NotStrict, with a text that tells what is wrong.
    """
    _check_encoding(data)
    try:
        if len(data) <= _PIECE_BYTES:
            canonical = _rewrite(data, 0)
            # Written anew it is the same, so no key was lost: the usual case.
            if canonical == data.strip(_WHITESPACE):
                return
            kept = _count_pairs(canonical)
        else:
            kept = _count_kept_pairs(data, 0)
        written = _count_pairs(msgspec.json.format(data, indent=-1))
    except UnicodeDecodeError:
        raise NotStrict("not UTF-8 text") from None
    except RecursionError:
        raise _too_deep() from None
    except msgspec.MsgspecError as error:
        raise NotStrict(_explain_syntax(error)) from None
    if written != kept or _HIDDEN_COLON.search(data) is not None:
        _check_duplicates(data)


def _check_encoding(data: bytes) -> None:
    if not data.strip(_WHITESPACE):
        raise NotStrict("empty; expected one JSON document")
    if data.startswith(_BYTE_ORDER_MARKS):
        raise NotStrict("begins with a byte-order mark; expected UTF-8 without one")


def _rewrite(data: bytes | Raw, depth: int) -> bytes:
    """Decodes a value of an ordinary size, and writes it anew, compact."""
    value = _decoder.decode(data)
    canonical = _encoder.encode(value)
    # Cannot be deeper than it has brackets; only then is it worth looking.
    if canonical.count(b"{") + canonical.count(b"[") + depth > MAX_DEPTH:
        _check_depth(value, depth)
    return canonical


def _count_kept_pairs(data: bytes | Raw, depth: int) -> int:
    """How often `":` is in the value when it is read and written anew, a large one piece by piece.

    That is once for each pair that reading it keeps, and the same number for those inside strings
    as in the original, unless that hides one of the two characters in an escape.
    """
    first = (
        bytes(memoryview(data)[:_PIECE_BYTES]).lstrip(_WHITESPACE)[:1] if len(data) > _PIECE_BYTES else b""
    )
    if first not in (b"{", b"["):
        return _count_pairs(_rewrite(data, depth))
    if depth >= MAX_DEPTH:
        raise _too_deep()
    if first == b"[":
        items = msgspec.json.decode(data, type=list[Raw])
        return sum(_count_kept_pairs(item, depth + 1) for item in items)
    members = msgspec.json.decode(data, type=dict[str, Raw])
    inside_keys = sum(_count_pairs(_encoder.encode(key)) for key in members)
    values = sum(_count_kept_pairs(member, depth + 1) for member in members.values())
    return len(members) + inside_keys + values


def _count_pairs(compact: bytes) -> int:
    return compact.count(b'":')


def _check_depth(value: object, depth: int) -> None:
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]


def _check_duplicates(data: bytes) -> None:
    """The slow and exact way, which also knows the key. Only for JSON that was decoded before."""
    json.loads(data, object_pairs_hook=_refuse_duplicates)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            shown = key if len(key) <= 64 else key[:63] + "…"
            raise NotStrict(f"the key {json.dumps(shown)} is there twice in one object")
        seen.add(key)


def _too_deep() -> NotStrict:
    return NotStrict(f"nested deeper than {MAX_DEPTH} levels")


def _explain_syntax(error: msgspec.MsgspecError) -> str:
    text = str(error)
    if "truncated" in text:
        return "not JSON: it ends too early"
    if "trailing characters" in text:
        return f"more than one JSON document: {text.removeprefix('JSON is malformed: ')}"
    if "out of range" in text:
        return "holds a number that is too large"
    return f"not JSON: {text.removeprefix('JSON is malformed: ')}"


def read(data: bytes | Raw, shape: type[_T], where: str = "") -> _T:
    """Reads JSON that `check` has passed into `shape`; `where` is the path of `data` itself.

    Raises Mismatch: `request.uid: expected a string, got an integer`.
    """
    try:
        return msgspec.json.decode(data, type=shape)
    except msgspec.ValidationError as error:
        raise Mismatch(_explain_mismatch(str(error), where)) from None


def _explain_mismatch(text: str, where: str) -> str:
    if (match := _MISSING.fullmatch(text)) is not None:
        field, at = match.groups()
        return _at(where, f"{at or ''}.{field}", "expected a value, got nothing")
    if (match := _MISMATCH.fullmatch(text)) is not None:
        expected, got, at = match.groups()
        return _at(where, at or "", f"expected {_type_name(expected)}, got {_type_name(got)}")
    return _at(where, "", text)


def _at(where: str, path: str, message: str) -> str:
    full = (where + path).removeprefix(".")
    return f"{full}: {message}" if full else message


def _type_name(text: str) -> str:
    return " or ".join(_TYPE_NAMES.get(part, part) for part in text.split(" | "))


def decode(data: bytes | Raw) -> Any:
    """Decodes JSON that `check` has passed, numbers as Python has them."""
    return _decoder.decode(data)


def decode_exact(data: bytes | Raw) -> Any:
    """Decodes JSON that `check` has passed; numbers with a fraction or exponent become `Number`."""
    return _exact_decoder.decode(data)


def encode_exact(value: object) -> bytes:
    """Writes what `decode_exact` returned."""
    return _exact_encoder.encode(value)


def encode(value: object) -> bytes:
    """Writes compact JSON; `msgspec.Raw` inside goes out as it is."""
    return _encoder.encode(value)


def join(members: dict[str, Raw]) -> bytes:
    """Writes an object from members that are JSON already."""
    return _encoder.encode(members)


def split(data: bytes | Raw) -> dict[str, Raw]:
    """The members of an object, not decoded. Only for JSON that `check` has passed."""
    return msgspec.json.decode(data, type=dict[str, Raw])
