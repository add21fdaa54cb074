"""Keeps modules on disk under the digest of their bytes.

    ROOT/lock                 held while the store changes; holds the space that is taken
    ROOT/sha256/<64 hex>.wasm

Several processes may share one store. Readers need no lock: a file appears whole by a rename,
and its name says what its bytes must be. Only we may write there (mode 0700), and no path is
made of anything but a checked digest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bulkhead.sandbox.errors import InvalidRequest, SandboxError, UnknownModule
from bulkhead.sandbox.files import make_private_directory, write_atomically
from bulkhead.sandbox.limits import format_quantity
from bulkhead.sandbox.module import digest_of, parse_digest

LOCK_WAIT_SECONDS = 30.0  # far longer than one put takes; then its holder hangs
LOCK_POLL_SECONDS = 0.005

_FILE_NAME = re.compile(r"([0-9a-f]{64})\.wasm")
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{64}\.wasm\.")  # as write_atomically makes them
_BLOCK_BYTES = 4096  # what a small file takes on disk; also bounds how many there can be
_TOTAL_DIGITS = 20
_TOTAL_UNKNOWN = b"?" * _TOTAL_DIGITS
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class StoreFull(Exception):
    """No room for the module, and nothing of it was kept. Delete some, or raise the cap."""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One module in the store."""

    digest: str
    size_bytes: int


class ModuleStore:
    """A content-addressed folder of modules. Every method may block on the disk.

    Methods raise SandboxError if the disk or the folder fails them.
    """

    def __init__(self, root: Path, *, max_total_bytes: int) -> None:
        """Opens the store, making its folders if need be.

        `max_total_bytes` caps the space on disk: every module counts in whole blocks of 4 KiB.
        Raises SandboxError if a folder is not ours, or others may write to it.
        """
        self._max_total_bytes = max_total_bytes
        self._lock_path = root / "lock"
        self._folder = root / "sha256"
        make_private_directory(root)
        make_private_directory(self._folder)
        with self._locked() as fd:
            self._recount(fd)

    def put_bytes(self, data: bytes) -> tuple[str, bool]:
        """Stores a module, and returns its digest and whether anything had to be written.

        A copy that is there already is kept if it is sound, and replaced if it is damaged.
        Raises StoreFull.
        """
        digest = digest_of(data)
        path = self._path(digest)
        with self._locked() as fd:
            try:
                if path.read_bytes() == data:
                    return digest, False
                replaced_bytes = _taken(path.stat().st_size)
            except FileNotFoundError:
                replaced_bytes = 0
            growth = _taken(len(data)) - replaced_bytes
            total = self._room_for(fd, growth)
            with self._changing(fd, total + growth):
                write_atomically(path, data, mode=0o400)
                self._sync_folder()
        return digest, True

    def read(self, digest: str) -> bytes:
        """Returns a module's bytes, which have that digest.

        Raises UnknownModule; and SandboxError if the file is damaged. It then stays where it is,
        to be looked at, is never returned, and is replaced when the module is put again.
        """
        path = self._path(digest)
        with _disk_errors("read a module"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                raise _unknown(digest) from None
        if digest_of(data) != digest:
            raise SandboxError(f"the stored module {path} is damaged; delete it, or put it again")
        return data

    def find(self, digest: str) -> StoredModule:
        """Says what is stored under a digest, without reading it. Raises UnknownModule."""
        path = self._path(digest)
        with _disk_errors("look for a module"):
            try:
                return StoredModule(digest, path.stat().st_size)
            except FileNotFoundError:
                raise _unknown(digest) from None

    def list(self, *, start_after: str | None = None, limit: int = 100) -> tuple[StoredModule, ...]:
        """Returns at most `limit` modules, in the order of their digests.

        `start_after`, the last digest of one page, asks for the next; the module of that digest
        need not exist any more. Raises InvalidRequest if it is not a digest.
        """
        if start_after is not None:
            try:
                parse_digest(start_after)
            except UnknownModule as error:
                raise InvalidRequest(f"bad page token: {error}") from None
        digests = sorted(f"sha256:{hexadecimal}" for hexadecimal, _ in self._scan())
        page: list[StoredModule] = []
        for digest in digests:
            if len(page) >= limit:
                break
            if start_after is None or digest > start_after:
                try:
                    page.append(self.find(digest))
                except UnknownModule:  # deleted since the scan
                    continue
        return tuple(page)

    def delete(self, digest: str) -> None:
        """Deletes a module. Who has read it already may go on using it. Raises UnknownModule."""
        path = self._path(digest)
        with self._locked() as fd:
            try:
                freed_bytes = _taken(path.stat().st_size)
            except FileNotFoundError:
                raise _unknown(digest) from None
            total = self._total(fd)
            with self._changing(fd, max(0, total - freed_bytes)):
                path.unlink()
                self._sync_folder()

    def total_bytes(self) -> int:
        """The space taken, by all processes that share the store."""
        with self._locked() as fd:
            return self._total(fd)

    def _path(self, digest: str) -> Path:
        return self._folder / (parse_digest(digest).removeprefix("sha256:") + ".wasm")

    def _room_for(self, fd: int, growth: int) -> int:
        """The space taken, if `growth` more bytes may be; the caller holds the lock."""
        total = self._total(fd)
        if total + growth > self._max_total_bytes:
            total = self._recount(fd)  # files may have been deleted by hand
        if total + growth > self._max_total_bytes:
            raise StoreFull(
                f"the module needs {growth} bytes, and {max(0, self._max_total_bytes - total)} of "
                f"{format_quantity(self._max_total_bytes)} are free in the module store; delete modules first"
            )
        return total

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Holds the store's lock and gives the lock file; closing it is what unlocks.

        The lock belongs to the opened file, so it also keeps threads of one process apart, and
        the kernel releases it when a holder dies.
        """
        with _disk_errors("use the module store"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self._lock_path, flags, 0o600)
            try:
                self._wait_for_lock(fd)
                yield fd
            finally:
                os.close(fd)

    def _wait_for_lock(self, fd: int) -> None:
        give_up_at = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    raise SandboxError(
                        f"another process has held {self._lock_path} for {LOCK_WAIT_SECONDS:.0f} s; "
                        "find it with `fuser` and end it"
                    ) from None
                time.sleep(LOCK_POLL_SECONDS)
            else:
                return

    @contextmanager
    def _changing(self, fd: int, total_afterwards: int) -> Iterator[None]:
        """Marks the total as unknown during a change, so that a killed process leaves no wrong one."""
        os.pwrite(fd, _TOTAL_UNKNOWN, 0)
        yield
        self._write_total(fd, total_afterwards)

    def _write_total(self, fd: int, total: int) -> None:
        os.pwrite(fd, b"%0*d" % (_TOTAL_DIGITS, total), 0)

    def _total(self, fd: int) -> int:
        written = os.pread(fd, _TOTAL_DIGITS + 1, 0)
        if len(written) == _TOTAL_DIGITS and written.isdigit():
            return int(written)
        return self._recount(fd)

    def _recount(self, fd: int) -> int:
        """Adds up the files and clears away what killed processes left half written.

        We hold the lock, so a temporary file has no living owner.
        """
        for entry in self._folder.iterdir():
            if _TEMPORARY_NAME.match(entry.name):
                entry.unlink(missing_ok=True)
        total = sum(_taken(entry.stat().st_size) for _, entry in self._scan())
        self._write_total(fd, total)
        return total

    def _scan(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Digests, as bare digits, and their files. Files that are not ours are passed over."""
        with _disk_errors("list the module store"), os.scandir(self._folder) as entries:
            for entry in entries:
                match = _FILE_NAME.fullmatch(entry.name)
                if match is not None:
                    yield match[1], entry

    def _sync_folder(self) -> None:
        """Makes the rename itself survive a power cut."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _taken(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _unknown(digest: str) -> UnknownModule:
    return UnknownModule(f"no module {digest} is stored; put it first")


@contextmanager
def _disk_errors(doing: str) -> Iterator[None]:
    """Turns a failing disk into our own errors, a full one into StoreFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StoreFull("the disk of the module store is full; nothing was kept") from error
        raise SandboxError(f"cannot {doing}: {error}") from error
