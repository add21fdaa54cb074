"""The compile cache: native code on disk, believed only with our own seal on it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import platform
import secrets
from pathlib import Path

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.files import make_private_directory, write_atomically

_SEAL_BYTES = hashlib.sha256().digest_size
_SECRET_BYTES = 32
_FORMAT = b"bulkhead-artifact-1"


class CompileCache:
    """Artifacts by key, in one folder that only its owner can write.

    An artifact is native code: a few changed bytes make it do as they please, and wasmtime refuses
    only some of the damaged ones. So each carries an HMAC over its key and bytes, with a secret
    that lies outside of the folder. Absent is a miss; damaged is deleted and a miss.

    The disk is a convenience: when it is full or read-only, everything is compiled anew.
    """

    def __init__(self, root: Path, secret_file: Path) -> None:
        """Raises SandboxError if the folder is not private, or the secret cannot be made or read."""
        make_private_directory(root)
        self._root = root
        self._secret = _read_secret(secret_file)

    def load(self, key: str) -> bytes | None:
        """The artifact, or None."""
        path = self._path(key)
        try:
            sealed = path.read_bytes()
        except OSError:
            return None
        seal, artifact = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        if artifact and hmac.compare_digest(seal, self._seal(key, artifact)):
            return artifact
        self.discard(key)
        return None

    def save(self, key: str, artifact: bytes) -> bool:
        """Keeps an artifact. False if the disk did not take it, which costs time and nothing else."""
        try:
            write_atomically(self._path(key), self._seal(key, artifact) + artifact)
        except OSError:
            return False
        return True

    def discard(self, key: str) -> None:
        """Forgets an artifact."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._root / f"{key}.cwasm"

    def _seal(self, key: str, artifact: bytes) -> bytes:
        return hmac.digest(self._secret, b"\0".join((_FORMAT, key.encode(), artifact)), "sha256")


def cache_key(module_digest: str, runtime_identity: str, flags: tuple[str, ...]) -> str:
    """Names all that changes the artifact: module, both binaries, flags, processor."""
    parts = (module_digest, runtime_identity, *flags, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _processor() -> str:
    """The architecture and features: wasmtime compiles for the processor that it sees."""
    features = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith(("flags", "Features", "isa")):
                features = line.partition(":")[2].strip()
                break
    return f"{platform.machine()} {features}"


def _read_secret(path: Path) -> bytes:
    try:
        with contextlib.suppress(FileExistsError):
            _create_secret(path)
        secret = path.read_bytes()
        private = not path.stat().st_mode & 0o077
    except OSError as error:
        raise SandboxError(f"cannot read or make {path}: {error.strerror}") from error
    if len(secret) != _SECRET_BYTES or not private:
        raise SandboxError(
            f"{path} is damaged or readable for others; delete it, and modules are compiled anew"
        )
    return secret


def _create_secret(path: Path) -> None:
    """Makes the file whole or not at all; of two processes at once, the first wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    if path.exists():
        raise FileExistsError
    write_atomically(temporary, secrets.token_bytes(_SECRET_BYTES))
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
