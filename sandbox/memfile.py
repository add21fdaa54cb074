"""Anonymous files in memory (memfd): how bytes get into a run and out of it."""

from __future__ import annotations

import os

_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3: nobody can execute the file, ever; some hosts insist on it


def _create_flags() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        os.close(os.memfd_create("bulkhead-probe", flags | _MFD_NOEXEC_SEAL))
    except OSError:  # the kernel does not know the flag; another cause shows at the first real use
        return flags
    return flags | _MFD_NOEXEC_SEAL


_FLAGS = _create_flags()


def create_memfile(name: str) -> int:
    """Returns the descriptor of a new empty file, close-on-exec. Raises OSError."""
    return os.memfd_create(name, _FLAGS)


def write_memfile(fd: int, data: bytes) -> None:
    """Writes all of `data` at the start, and leaves the offset there for the reader. Raises OSError."""
    view, offset = memoryview(data), 0
    while offset < len(view):
        offset += os.pwrite(fd, view[offset:], offset)


def read_memfile(fd: int, most_bytes: int) -> bytes:
    """Returns up to `most_bytes` from the start of the file. Raises OSError."""
    size = min(os.fstat(fd).st_size, most_bytes)
    if size == 0:
        return b""
    data = os.pread(fd, size, 0)
    while len(data) < size and (more := os.pread(fd, size - len(data), len(data))):
        data += more
    return data
