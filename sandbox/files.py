"""Files and folders that only we may write: compiled code lies in them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError


def make_private_directory(path: Path) -> None:
    """Makes a folder that only its owner can enter, or checks the one that is there.

    Raises SandboxError, with what to do, if it is not ours or others may write to it: who can
    write there can make us run native code.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise SandboxError(f"cannot make the folder {path}: {error.strerror}") from error
    if info.st_uid != os.geteuid():
        raise SandboxError(f"the folder {path} belongs to another user; choose another state directory")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SandboxError(f"others may write to the folder {path}; run: chmod go-w {path}")


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Writes a whole file or nothing: temporary file, sync, rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
