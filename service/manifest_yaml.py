"""YAML that Kubernetes reads as it was meant.

kube-apiserver and kubectl read YAML 1.1, for which `no` is a boolean and `22:22` a number. So all text
is in quotes that is not clearly a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

Document = Mapping[str, Any]

_CLEARLY_A_WORD = re.compile(r"[A-Za-z/](?:[-A-Za-z0-9._/+=]|:(?=[^ ]))*")
_MEANS_SOMETHING_ELSE = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


def to_yaml(document: Document) -> str:
    """One document, in the order of its keys, with a line end and no separator."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1 << 30  # certificates in base64 stay in one line
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = StringIO()
    yaml.dump(_quoted(document), text)
    return text.getvalue()


def _quoted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_quoted(key): _quoted(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(child) for child in value]
    if not isinstance(value, str):
        return value
    is_word = _CLEARLY_A_WORD.fullmatch(value) and value.lower() not in _MEANS_SOMETHING_ELSE
    return str(value) if is_word else DoubleQuotedScalarString(value)
