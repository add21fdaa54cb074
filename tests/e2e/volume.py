"""Files as Kubernetes mounts a ConfigMap or a Secret."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path


class Volume:
    """A folder of symbolic links through `..data`, which an update swaps: all files change at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = 0
        path.mkdir(parents=True)

    def update(self, files: Mapping[str, bytes]) -> None:
        """Puts these files in the place of those that were there."""
        before, self._version = f"..{self._version}", self._version + 1
        version = self.path / f"..{self._version}"
        version.mkdir()
        for name, data in files.items():
            (version / name).write_bytes(data)
        link = self.path / "..data_tmp"
        link.symlink_to(version.name)
        link.rename(self.path / "..data")
        for name in files:
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        shutil.rmtree(self.path / before, ignore_errors=True)
