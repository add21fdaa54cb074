"""The files that a configuration is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bulkhead.service.config import Config, load_config


@dataclass(frozen=True, slots=True)
class ConfigFiles:
    """What the command line names."""

    bulkhead: Path | None = None
    authentication: Path | None = None
    authorization: Path | None = None
    admission: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those that are given."""
        every = (self.bulkhead, self.authentication, self.authorization, self.admission)
        return tuple(path for path in every if path is not None)

    def load(self, *, insecure: bool = False) -> Config:
        """Raises ConfigError with the problems of all files."""
        assert self.bulkhead is not None
        return load_config(self.bulkhead, insecure=insecure)
