"""A compiled module, loaded: native code in a sealed file that nobody can change any more."""

from __future__ import annotations

import fcntl
import os
import weakref
from dataclasses import dataclass, field

from bulkhead.sandbox.memfile import create_memfile, write_memfile

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, eq=False)
class CompiledModule:
    """An artifact that wasmtime made, held open for runs.

    It is native code: who could change it would run outside of all WebAssembly limits. So a run
    gets this very descriptor and not a path, and the seals outlast even a mistake of ours.
    """

    digest: str
    """Of the module that it was compiled from."""
    metered: bool
    """Compiled to count fuel; it can only run with a fuel limit, and the others only without."""
    artifact_fd: int = field(repr=False)
    size_bytes: int

    @classmethod
    def load(cls, digest: str, artifact: bytes, *, metered: bool) -> CompiledModule:
        """Puts an artifact that was checked into a sealed file, which is closed with the last reference."""
        fd = create_memfile("bulkhead-module")
        try:
            write_memfile(fd, artifact)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        module = cls(digest, metered, fd, len(artifact))
        weakref.finalize(module, os.close, fd)
        return module
