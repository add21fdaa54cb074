"""Mistakes in a configuration: where each is, and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.service.yamlfile import Location, YamlFile


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration."""

    where: str
    """Path of the key: `admission.modules[0].rules[0].operations`; empty for the file as a whole."""
    line: int | None
    message: str
    file: str = ""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part)
        return ": ".join(part for part in (place, self.where, self.message) if part)


class ConfigError(Exception):
    """The configuration cannot be used. Says everything that is wrong with it, a line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def problem_at(source: YamlFile | None, location: Location, message: str) -> Problem:
    """The mistake at a key, with its line if the file is known."""
    if source is None:
        return Problem(key_path(location), None, message)
    return Problem(key_path(location), source.line_of(location), message, str(source.path))


def key_path(location: Location) -> str:
    """`admission.modules[0].name`"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(
        "."
    )
