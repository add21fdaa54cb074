"""A YAML file that remembers where each of its values stands, so that mistakes can be pointed at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 16 << 20  # settings of modules are in it; more is some other file

Location = tuple[str | int, ...]
"""The keys and indices that lead to a value."""


class BadYaml(ValueError):
    """The file cannot be read as YAML. `line` counts from 1; None if none is to blame."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class YamlFile:
    """One document, as plain Python values, and its lines."""

    path: Path
    value: Any
    _root: Node | None

    def line_of(self, location: Sequence[str | int]) -> int | None:
        """The line of a value, or of the closest thing around it that is in the file."""
        node, line = self._root, None if self._root is None else self._root.start_mark.line + 1
        for step in location:
            found = _child(node, step)
            if found is None:
                return line
            node, line = found
        return line


def read_yaml(path: Path) -> YamlFile:
    """Reads YAML 1.2 with plain types only; a key that is there twice is a mistake.

    Raises BadYaml.
    """
    return parse_yaml(path, read_text(path))


def parse_yaml(path: Path, text: str) -> YamlFile:
    """Like `read_yaml`, of text that was read before. Raises BadYaml."""
    yaml = YAML(typ="safe", pure=True)
    with told_as_bad_yaml():
        return YamlFile(path, yaml.load(text), yaml.compose(text))


@contextmanager
def told_as_bad_yaml() -> Iterator[None]:
    """Turns what the library raises into BadYaml."""
    try:
        yield
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadYaml(None if mark is None else mark.line + 1, _explain(error)) from None
    except YAMLError as error:
        raise BadYaml(None, f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadYaml(None, "nested too deep") from None
    except UnicodeEncodeError:
        raise BadYaml(None, "holds half of a surrogate pair, which is no character") from None
    except BadYaml:
        raise
    except ValueError as error:
        # A value that has the form of a date or a number, and is none.
        raise BadYaml(None, f"not YAML: {error}") from None


def read_text(path: Path) -> str:
    """The whole file. Raises BadYaml."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadYaml(None, f"cannot read the file: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise BadYaml(None, f"the file has more than {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadYaml(line, "expected UTF-8 text") from None


def _explain(error: MarkedYAMLError) -> str:
    """What the parser found, in one sentence."""
    problem = " ".join(str(error.problem or error.context or "cannot be read").split())
    if "duplicate key" in problem:
        return problem.split(" with value ")[0].replace("found duplicate key", "duplicate key")
    if problem == "but found another document":
        return "expected one document, found another"
    return f"not YAML: {problem}"


def _child(node: Node | None, step: str | int) -> tuple[Node, int] | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value == str(step):
                return value, key.start_mark.line + 1
    if isinstance(node, SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
        child = node.value[step]
        return child, child.start_mark.line + 1
    return None
