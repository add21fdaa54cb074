"""The folder that manifests are written into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bulkhead.sandbox.files import write_atomically
from bulkhead.service.manifest_trust import ManifestError

MARK = "# Written by bulkhead manifests. A new run replaces this file.\n"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file, without the mark that it gets."""

    path: str
    """Below the folder."""
    text: str = field(repr=False)
    secret: bool = False
    """It has a private key in it."""

    @property
    def data(self) -> bytes:
        return (MARK + self.text).encode()


def write_files(folder: Path, files: Iterable[ManifestFile], *, force: bool) -> list[Path]:
    """Writes all, or none if a file that was not written by this command is in the way, unless `force`.

    Returns the files of earlier runs that are not among them. Raises ManifestError.
    """
    every = {folder / each.path: each for each in files}
    try:
        foreign = [str(path) for path in every if path.exists() and not _is_ours(path)]
        if foreign and not force:
            raise ManifestError(
                f"{', '.join(foreign)}: not written by this command; choose another --output, or "
                "replace what is there with --force"
            )
        for path, file in every.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, file.data, mode=0o600 if file.secret else 0o644)
        return sorted(
            path
            for path in folder.glob("*/*")
            if path not in every and path.is_file() and _starts_with_mark(path)
        )
    except OSError as error:
        raise ManifestError(f"cannot write {error.filename}: {error.strerror}") from error


def _is_ours(path: Path) -> bool:
    return path.is_file() and _starts_with_mark(path)


def _starts_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK.encode())) == MARK.encode()
