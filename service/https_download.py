"""Downloading a module over HTTPS."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import aiohttp
from yarl import URL

from bulkhead.sandbox import format_quantity
from bulkhead.service.fetch_error import NotFetched

_MOST_REDIRECTS = 5
_ATTEMPTS, _PAUSE_SECONDS = 3, 0.3
_CHUNK_BYTES = 1 << 16
# What counts are the bytes of the file, and no others.
_HEADERS = {"Accept-Encoding": "identity"}


class _TryAgain(Exception):
    """The server has trouble of its own, which may pass."""


class _Connector(aiohttp.TCPConnector):
    """Can drop its connections, whatever their servers are about to send or to wait for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._transports: list[asyncio.Transport] = []

    async def connect(self, *arguments: Any, **options: Any) -> aiohttp.connector.Connection:
        connection = await super().connect(*arguments, **options)
        if connection.transport is not None:
            self._transports.append(connection.transport)
        return connection

    def abort(self) -> None:
        for transport in self._transports:
            transport.abort()


async def download(url: str, *, max_bytes: int) -> bytes:
    """Returns what the URL stands for. Takes as long as the server does. Raises NotFetched.

    Proxies come from the environment, credentials from ~/.netrc, authorities from the system or
    $SSL_CERT_FILE.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        # Made here: the library keeps one from its import on, and authorities change.
        connector = _Connector(ssl=ssl.create_default_context())
        try:
            async with aiohttp.ClientSession(
                trust_env=True, connector=connector, auto_decompress=False, headers=_HEADERS
            ) as session:
                try:
                    return await _get(session, URL(url), max_bytes)
                finally:
                    connector.abort()
        except (aiohttp.ClientError, _TryAgain) as error:
            if attempt == _ATTEMPTS or isinstance(error, aiohttp.ClientSSLError | aiohttp.InvalidURL):
                raise NotFetched(_reason(error)) from None
        await asyncio.sleep(_PAUSE_SECONDS)
    raise AssertionError("the last attempt has returned or raised")


async def _get(session: aiohttp.ClientSession, url: URL, max_bytes: int) -> bytes:
    for _ in range(_MOST_REDIRECTS + 1):
        async with session.get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if 300 <= response.status < 400 and location is not None:
                url = _redirected(url, location)
                continue
            if response.status >= 500:
                raise _TryAgain(f"HTTP status {response.status}")
            if response.status != 200:
                raise NotFetched(f"HTTP status {response.status}")
            return await _read(response, max_bytes)
    raise NotFetched(f"more than {_MOST_REDIRECTS} redirects")


def _redirected(url: URL, location: str) -> URL:
    try:
        target = url.join(URL(location))
    except ValueError:
        raise NotFetched("it redirects to what is not a URL") from None
    if target.scheme != "https":
        raise NotFetched(f"it redirects to {target.scheme}://, expected https")
    return target


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        data += chunk
        if len(data) > max_bytes:
            raise NotFetched(f"it has more than {format_quantity(max_bytes)}")
    return bytes(data)


def _reason(error: aiohttp.ClientError | _TryAgain) -> str:
    """In words of our own: the library's name URLs, whose query may hold what is secret."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            return "the certificate cannot be verified; name its authority with SSL_CERT_FILE"
        case aiohttp.InvalidURL():
            return "it, or what it redirects to, is not a URL"
        case aiohttp.ClientHttpProxyError():
            return f"the proxy answers with HTTP status {error.status}"
        case aiohttp.ClientConnectorError():
            return f"no connection to {error.host}:{error.port}: {error.strerror or 'refused'}"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | aiohttp.ClientOSError():
            return "the connection broke off"
        case _TryAgain():
            return str(error)
        case _:
            return f"no answer that can be understood ({type(error).__name__})"
