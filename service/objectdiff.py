"""How an object changed, for people: a unified diff of it as YAML, as `kubectl diff` shows one."""

from __future__ import annotations

import difflib
import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from bulkhead.service import strictjson
from bulkhead.service.mask import MASKED, mask_object
from bulkhead.service.strictjson import Number

_SECRET_PARTS = ("data", "stringData")


def object_diff(before: bytes, after: bytes) -> list[str]:
    """The lines of the diff of two objects, as JSON, with sorted keys; none if they are the same.

    What is secret is masked; where it changed shows.
    """
    old, new = strictjson.decode_exact(before), strictjson.decode_exact(after)
    before_lines = _yaml(_masked(old, new, "before")).splitlines()
    after_lines = _yaml(_masked(new, old, "after")).splitlines()
    names = ("object as it was sent", "object as it is now")
    return list(difflib.unified_diff(before_lines, after_lines, *names, lineterm=""))


def _masked(value: Any, other: Any, when: str) -> Any:
    if not isinstance(value, dict):
        return value
    masked = mask_object(value)
    if value.get("kind") == "Secret":
        for part in _SECRET_PARTS:
            values, others = value.get(part), other.get(part) if isinstance(other, dict) else None
            if isinstance(values, dict):
                masked[part] = {
                    key: f"{MASKED} ({when})" if _differs(each, key, others) else MASKED
                    for key, each in values.items()
                }
    return masked


def _differs(value: Any, key: str, others: Any) -> bool:
    return isinstance(others, dict) and key in others and bool(others[key] != value)


class _Representer(SafeRepresenter):
    """Writes texts of several lines as such, and numbers as they were written."""

    def represent_text(self, text: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    def represent_number(self, number: Number) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:float", number.text)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(Number, _Representer.represent_number)


def _yaml(value: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.width = 1 << 20  # lines are compared: none may be folded
    stream = io.StringIO()
    yaml.dump(_sorted(value), stream)
    return stream.getvalue()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(each) for each in value]
    return value
