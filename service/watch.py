"""Whether the content of files has changed, symbolic links followed.

Kubernetes updates mounted files by swapping a symbolic link above them, of which no file event tells.
So the content is compared, and read only where the file itself looks different.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# A file that was changed so recently may change again within the resolution of its times.
_RACY_NS = 2_000_000_000
_GONE = "gone"

_Stat = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Seen:
    stat: _Stat
    read_at_ns: int
    digest: str

    def still_holds(self, stat: _Stat) -> bool:
        changed_at_ns = stat[-1]
        return stat == self.stat and self.read_at_ns - changed_at_ns > _RACY_NS


class FileWatch:
    """Remembers what files contain."""

    def __init__(self) -> None:
        self._seen: dict[Path, _Seen] = {}

    def look(self, paths: Iterable[Path]) -> dict[Path, str]:
        """A digest of each file's content; files that cannot be read have one of their own. Blocks."""
        found = {path: self._look(path) for path in paths}
        self._seen = {path: seen for path, seen in self._seen.items() if path in found}
        return found

    def _look(self, path: Path) -> str:
        try:
            status = path.stat()
            stat = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            known = self._seen.get(path)
            if known is not None and known.still_holds(stat):
                return known.digest
            now = time.time_ns()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            self._seen.pop(path, None)
            return _GONE
        self._seen[path] = _Seen(stat, now, digest)
        return digest
