"""Modules from elsewhere: HTTPS servers and OCI registries. They have the pinned digest, or are refused.

A module that is in the store already is not fetched again: a restart must not depend on a registry.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Awaitable
from pathlib import Path

import structlog

from bulkhead.sandbox import Sandbox, SandboxError, UnknownModule, parse_digest
from bulkhead.sandbox.files import make_private_directory, write_atomically
from bulkhead.service.daemon_thread import run_in_daemon_thread
from bulkhead.service.fetch_error import NotFetched
from bulkhead.service.https_download import download
from bulkhead.service.modulesource import HttpsSource, OciSource

__all__ = ["NotFetched", "obtain_https", "obtain_oci"]

_TOTAL_SECONDS = 30.0

_log = structlog.get_logger()


async def obtain_https(sandbox: Sandbox, source: HttpsSource, digest: str) -> str:
    """Gets a module into the store; returns its digest.

    Raises NotFetched, InvalidModule, StoreFull, SandboxError.
    """
    if not await _is_stored(sandbox, digest):
        downloading = download(source.url, max_bytes=sandbox.options.max_module_bytes)
        data = await _in_time(source, downloading)
        await sandbox.put(data, expected_digest=digest)
    return digest


async def obtain_oci(sandbox: Sandbox, source: OciSource, digest: str | None) -> str:
    """Gets a module into the store; returns its digest, which is not that of the manifest.

    `digest`, if given, is what it must be. Raises NotFetched, InvalidModule, StoreFull, SandboxError.
    """
    known = _Pulled(sandbox.options.state_dir / "oci")
    stored = await asyncio.to_thread(known.digest, source)
    if stored is not None and digest in (None, stored) and await _is_stored(sandbox, stored):
        return stored
    if importlib.util.find_spec("oras") is None:
        raise NotFetched(
            f"cannot fetch {source.shown}: modules of OCI registries need `pip install 'bulkhead[oci]'`"
        )
    from bulkhead.service.oci import pull

    max_bytes = sandbox.options.max_module_bytes
    pulling = run_in_daemon_thread(lambda: pull(source, max_bytes=max_bytes, timeout_seconds=_TOTAL_SECONDS))
    data = await _in_time(source, pulling)
    info, _ = await sandbox.put(data, expected_digest=digest)
    await asyncio.to_thread(known.remember, source, info.digest)
    return info.digest


async def _is_stored(sandbox: Sandbox, digest: str) -> bool:
    """Whether there is a sound copy: a damaged one is replaced by what is fetched."""
    try:
        await asyncio.to_thread(sandbox.store.read, digest)
    except (UnknownModule, SandboxError):
        return False
    return True


class _Pulled:
    """Which module was found behind the digest of a manifest. In a folder that only its owner can write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, source: OciSource) -> Path:
        return self._folder / source.manifest_digest.removeprefix("sha256:")

    def digest(self, source: OciSource) -> str | None:
        try:
            return parse_digest(self._path(source).read_text().strip())
        except (OSError, ValueError, UnknownModule):
            return None

    def remember(self, source: OciSource, digest: str) -> None:
        """Raises SandboxError."""
        make_private_directory(self._folder)
        try:
            write_atomically(self._path(source), f"{digest}\n".encode())
        except OSError as error:
            raise SandboxError(f"cannot write to the folder {self._folder}: {error.strerror}") from error


async def _in_time(source: HttpsSource | OciSource, fetching: Awaitable[bytes]) -> bytes:
    """With a word in the log before and after. Raises NotFetched, which names the source."""
    start = time.monotonic()
    _log.info("module_fetching", source=source.shown)
    try:
        async with asyncio.timeout(_TOTAL_SECONDS):
            data = await fetching
    except TimeoutError:
        raise NotFetched(f"cannot fetch {source.shown}: it took longer than {_TOTAL_SECONDS:g} s") from None
    except NotFetched as error:
        raise NotFetched(f"cannot fetch {source.shown}: {error}") from None
    seconds = round(time.monotonic() - start, 3)
    _log.info("module_fetched", source=source.shown, size_bytes=len(data), seconds=seconds)
    return data
