"""Mistakes in a configuration: where each is, and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Place:
    """A value in a file."""

    file: YamlFile
    location: Location = ()


class Places:
    """Where the parts of a configuration stand, which may be several files."""

    def __init__(self, starts: Mapping[Location, Place] | None = None) -> None:
        """Each place holds for what is below its location as well, unless that has one of its own."""
        self._starts = dict(starts or {})

    def __or__(self, other: Places) -> Places:
        """Both; of what both know, the place of `other`."""
        return Places({**self._starts, **other._starts})

    def find(self, location: Location) -> Place | None:
        """Where a value stands; None if that is not known."""
        for length in range(len(location), -1, -1):
            start = self._starts.get(location[:length])
            if start is not None:
                return Place(start.file, start.location + location[length:])
        return None

    def problem(self, location: Location, message: str) -> Problem:
        """The mistake at a value, in the words of the file that it stands in."""
        place = self.find(location)
        return Problem(key_path(location), None, message) if place is None else problem_at(place, message)


def problem_at(place: Place, message: str) -> Problem:
    """The mistake at a value of a file."""
    line = place.file.line_of(place.location)
    return Problem(key_path(place.location), line, message, str(place.file.path))


def key_path(location: Location) -> str:
    """`admission.modules[0].name`"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(
        "."
    )
