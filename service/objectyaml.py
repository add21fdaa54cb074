"""YAML of Kubernetes objects, read as kubectl reads it.

Not YAML 1.2, as the configuration is: kubectl's reader takes `0644` for an octal number, which matters
for the modes of files, and `yes` and `on` for true. It converts to JSON, so keys become strings.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import BaseResolver
from ruamel.yaml.tag import Tag

from bulkhead.service import strictjson
from bulkhead.service.strictjson import MAX_DEPTH
from bulkhead.service.yamlfile import BadYaml, YamlFile, read_text, told_as_bad_yaml

MOST_VALUES = 1_000_000  # a few aliases of aliases can stand for more than fits into memory

_TAGS = "tag:yaml.org,2002:"
_WORDS: dict[str, bool | None] = {
    **{each: True for word in ("y", "yes", "on", "true") for each in (word, word.title(), word.upper())},
    **{each: False for word in ("n", "no", "off", "false") for each in (word, word.title(), word.upper())},
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
}
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO]?[0-7]+|0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_LEAST_INTEGER, _LARGEST_INTEGER = -(2**63), 2**64 - 1
_LARGEST_PLAIN_FLOAT = 1e21  # from here on JSON is written with an exponent


def read_object_yaml(text: str) -> list[bytes]:
    """The documents that are not empty, as JSON. Raises BadYaml."""
    with told_as_bad_yaml():
        values = [_Reader().value(node) for node in _yaml().compose_all(text)]
        return [strictjson.encode(value) for value in values if value is not None]


def read_object_file(path: Path) -> YamlFile:
    """A file with one document, and where its values stand. Raises BadYaml."""
    text = read_text(path)
    is_json = _is_json(text)
    with told_as_bad_yaml():
        # JSON may be indented with tabs.
        root = _yaml().compose(text.replace("\t", " ") if is_json else text)
        value = None if root is None else _Reader().value(root)
    # YAML does not know that two escapes may be one character.
    return YamlFile(path, json.loads(text) if is_json else value, root)


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False  # a mapping of YAML may begin like that as well
    return True


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _Resolver
    return yaml


class _Resolver(BaseResolver):
    """Says what a value without quotes is."""

    def __init__(self, version: Any = None, loader: Any = None, loadumper: Any = None) -> None:
        super().__init__(loader if loader is not None else loadumper)

    @property
    def processing_version(self) -> tuple[int, int]:
        return 1, 2

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0]:
            return Tag(suffix=_TAGS + _type_of(value))
        return super().resolve(kind, value, implicit)


def _type_of(text: str) -> str:
    if text == "<<":
        return "merge"
    match _scalar(text):
        case None:
            return "null"
        case bool():
            return "bool"
        case int() | float():
            return "float"
        case _:
            return "str"


def _scalar(text: str) -> str | float | bool | None:
    """What a value without quotes is; text that is nothing else is itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_FINITE.fullmatch(text):
        return math.inf
    plain = text.replace("_", "") if text[0] in "+-0123456789" else text
    if _INTEGER.fullmatch(plain):
        number = _integer(plain)
        return number if _LEAST_INTEGER <= number <= _LARGEST_INTEGER else float(plain)
    if _FLOAT.fullmatch(plain):
        return float(plain)
    return text


def _integer(plain: str) -> int:
    sign, digits = (-1, plain[1:]) if plain.startswith("-") else (1, plain.removeprefix("+"))
    # Python wants the o that others may leave out.
    octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
    return sign * int(f"0o{digits[1:]}" if octal else digits, 0)


class _Reader:
    """Makes what JSON can say of what YAML can say."""

    def __init__(self) -> None:
        self._values = 0

    def value(self, node: Node, depth: int = 0) -> Any:
        """Raises BadYaml."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise _bad(node, f"more than {MOST_VALUES} values, counting what aliases stand for")
        if depth > MAX_DEPTH:
            raise _bad(node, f"nested deeper than {MAX_DEPTH} levels")
        match str(node.tag).removeprefix(_TAGS), node:
            case "map", MappingNode():
                return self._members(node, depth)
            case "seq", SequenceNode():
                return [self.value(item, depth + 1) for item in node.value]
            case "str" | "merge", ScalarNode():
                return node.value
            case (("null" | "bool" | "int" | "float"), ScalarNode()):
                return _json_number(node, _scalar(node.value))
            case tag, _:
                raise _bad(node, f"a value of type {tag}, which Kubernetes does not have")

    def _members(self, node: MappingNode, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            value = self.value(value_node, depth + 1)
            if str(key_node.tag) == _TAGS + "merge":
                merged = _merge(key_node, value)
                continue
            key = self._key(key_node)
            if key in own:
                raise _bad(key_node, f"the key {key!r} is there twice in one object")
            own[key] = value
        return {**merged, **own}

    def _key(self, node: Node) -> str:
        key = self.value(node)
        if key is None or isinstance(key, dict | list):
            raise _bad(node, "expected a key that is a string")
        return key if isinstance(key, str) else strictjson.encode(key).decode()


def _merge(node: Node, value: Any) -> dict[str, Any]:
    """The members that `<<` brings: of one object, or of several, the first of which comes first."""
    objects = value if isinstance(value, list) else [value]
    merged: dict[str, Any] = {}
    for each in reversed(objects):
        if not isinstance(each, dict):
            raise _bad(node, "expected an object, or a list of objects, after <<")
        merged |= each
    return merged


def _json_number(node: Node, value: Any) -> Any:
    """Numbers as kubectl's JSON has them: those without a fraction are integers."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise _bad(node, "a number that is not finite, for which JSON has no word")
    return int(value) if value.is_integer() and abs(value) < _LARGEST_PLAIN_FLOAT else value


def _bad(node: Node, message: str) -> BadYaml:
    return BadYaml(node.start_mark.line + 1, message)
