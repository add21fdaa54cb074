"""What stands in the files of a configuration, before it is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bulkhead.service.problems import Places, Problem
from bulkhead.service.yamlfile import Location


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A configuration, or a part of one, in the form of bulkhead.yaml."""

    value: dict[str, Any]
    folder: Path
    """What paths in it are relative to."""
    places: Places
    files: tuple[Path, ...]
    """The files that it was read from."""
    notes: tuple[Problem, ...] = ()
    """What is no mistake, but should be known."""

    @classmethod
    def empty(cls) -> Document:
        """Nothing but defaults."""
        return cls(value={}, folder=Path.cwd(), places=Places(), files=())

    def problem(self, location: Location, message: str) -> Problem:
        return self.places.problem(location, message)
