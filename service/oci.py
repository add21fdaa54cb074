"""Pulling a module from an OCI registry: an artifact of one WebAssembly layer, as Kubewarden publishes it.

The library speaks to the registry and finds credentials. It compares no digests, waits for ever, and
would show credentials to whom the registry names; all that is seen to here.
"""

from __future__ import annotations

import hashlib
import inspect
import ipaddress
import logging
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import oras.auth.token
import oras.provider
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from bulkhead.sandbox import format_quantity
from bulkhead.service.docker_config import DockerConfig, read_docker_config
from bulkhead.service.fetch_error import NotFetched
from bulkhead.service.modulesource import OciSource
from bulkhead.service.oci_manifest import ACCEPTED_TYPES, wasm_layer

_MOST_MANIFEST_BYTES = 4 << 20  # what registries have to take, by the specification
_CHUNK_BYTES = 1 << 16
_SOCKET_SECONDS = 10.0  # without a byte
_MOST_REDIRECTS = 5
# Not after errors while reading: then the time is better left to the caller's next try.
_RETRIES = Retry(
    total=2,
    read=False,
    backoff_factor=0.2,
    status_forcelist=(500, 502, 503, 504),
    raise_on_status=False,
    respect_retry_after_header=False,
)
_DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
# What it says is said again, better, by our own errors; and not all of it is for logs.
logging.getLogger("oras.logger").setLevel(logging.CRITICAL)


def pull(source: OciSource, *, max_bytes: int, timeout_seconds: float) -> bytes:
    """Returns the bytes of the module. Blocks. Raises NotFetched.

    Credentials come from Docker's configuration ($DOCKER_CONFIG, ~/.docker/config.json), authorities from
    $SSL_CERT_FILE, $REQUESTS_CA_BUNDLE or the system. Plain HTTP is spoken to registries on loopback only.
    """
    place = _Place.of(source)
    registry = _Registry(place, read_docker_config(), deadline=time.monotonic() + timeout_seconds)
    try:
        url = f"{registry.prefix}://{place.host}/v2/{place.repository}"
        manifest = registry.read(
            f"{url}/manifests/{source.manifest_digest}",
            "its manifest",
            source.manifest_digest,
            max_bytes=_MOST_MANIFEST_BYTES,
            accept=", ".join(ACCEPTED_TYPES),
        )
        layer = wasm_layer(manifest)
        if layer.size > max_bytes:
            raise NotFetched(f"its module has {layer.size} bytes, more than {format_quantity(max_bytes)}")
        return registry.read(f"{url}/blobs/{layer.digest}", "its module", layer.digest, max_bytes=max_bytes)
    except (requests.RequestException, ValueError, TypeError, AttributeError) as error:
        # The latter three where a server's answer is not of the shape that the libraries expect.
        raise NotFetched(_reason(error)) from None
    finally:
        registry.session.close()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an artifact is asked for, which is elsewhere for Docker Hub."""

    host: str
    repository: str
    names: tuple[str, ...]
    """Of the registry, under which Docker's configuration may have credentials."""

    @classmethod
    def of(cls, source: OciSource) -> _Place:
        if source.registry not in _DOCKER_HUB:
            return cls(source.registry, source.repository, (source.registry,))
        repository = source.repository if "/" in source.repository else f"library/{source.repository}"
        names = ("https://index.docker.io/v1/", "index.docker.io", "docker.io")
        return cls("registry-1.docker.io", repository, names)

    @property
    def is_loopback(self) -> bool:
        return _is_loopback(urlsplit(f"//{self.host}").hostname)

    def speaks_tls(self) -> bool:
        """Asks whoever listens there, without trusting or telling them anything."""
        parts = urlsplit(f"//{self.host}")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            address = (parts.hostname, parts.port or 443)
            with socket.create_connection(address, _SOCKET_SECONDS) as connection:
                context.wrap_socket(connection).close()
        except ssl.SSLError:
            return False
        except OSError:
            pass  # the request will tell what is wrong
        return True


class _Auth(oras.auth.token.TokenAuth):  # type: ignore[misc]
    """Tokens, and for registries that have none the credentials themselves."""

    def __init__(self, config: DockerConfig, names: tuple[str, ...]) -> None:
        super().__init__()
        self._name = names[-1]
        # The library would not look at $DOCKER_CONFIG.
        self._auth_config = config.as_read
        try:
            any(self._load_auth(name) for name in names)  # up to the first that is known
        except (OSError, ValueError, KeyError, TypeError):  # texts and all may hold what is secret
            raise NotFetched(f"Docker's credential helper fails for {names[-1]}") from None

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str] | None, refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        """Raises NotFetched where there is nothing to show."""
        original.close()
        headers = headers or {}
        challenge = original.headers.get("WWW-Authenticate", "")
        if challenge.lower().startswith("basic") and self._has_password:
            return {**headers, "Authorization": f"Basic {self._basic_auth}"}, True
        if challenge.lower().startswith("bearer") and 'realm="' in challenge:
            answer: tuple[dict[str, str], bool] = super().authenticate_request(original, headers, refresh)
            if answer[1]:
                return answer
        raise self.refused()

    def refused(self) -> NotFetched:
        known = "takes none of ours" if self._has_password else "we have none"
        return NotFetched(f"the registry wants credentials and {known}; run: docker login {self._name}")

    @property
    def _has_password(self) -> bool:
        return hasattr(self, "_basic_auth")


class _Registry(oras.provider.Registry):  # type: ignore[misc]
    # Without the library's own retries, which sleep for two minutes, also where no retry can help.
    do_request = inspect.unwrap(oras.provider.Registry.do_request)

    def __init__(self, place: _Place, config: DockerConfig, *, deadline: float) -> None:
        plain = place.is_loopback and not place.speaks_tls()
        super().__init__(place.host, insecure=plain, tls_verify=_authorities())
        self._deadline = deadline
        self.session.max_redirects = _MOST_REDIRECTS
        # For tokens' servers and redirects as well.
        self.session.mount("https://", _Adapter(deadline))
        self.session.mount("http://", _Adapter(deadline) if plain else _Unencrypted())
        # Or else what ~/.netrc has takes the place of tokens.
        self.session.auth = _unchanged
        self.auth = _Auth(config, place.names)
        self.auth.session, self.auth.prefix, self.auth._tls_verify = (
            self.session,
            self.prefix,
            self._tls_verify,
        )

    def read(self, url: str, what: str, digest: str, *, max_bytes: int, accept: str = "*/*") -> bytes:
        """Returns bytes that have the digest. Raises NotFetched, requests.RequestException."""
        # Digests are those of the bytes on the wire.
        headers = {"Accept": accept, "Accept-Encoding": "identity"}
        response = self.do_request(url, headers=headers, stream=True)
        with response:
            if response.status_code in (401, 403):
                raise self.auth.refused()
            if response.status_code != 200:
                raise NotFetched(f"HTTP status {response.status_code} for {what}")
            data = bytearray()
            for chunk in self._chunks(response):
                data += chunk
                if len(data) > max_bytes:
                    raise NotFetched(f"{what} has more than {format_quantity(max_bytes)}")
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if found != digest:
            raise NotFetched(f"{what} has digest {found}, expected {digest}")
        return bytes(data)

    def _chunks(self, response: requests.Response) -> Iterator[bytes]:
        for chunk in response.iter_content(_CHUNK_BYTES):
            if time.monotonic() > self._deadline:
                raise requests.Timeout
            yield chunk


class _Adapter(HTTPAdapter):
    """Gives up where the library would wait for ever."""

    def __init__(self, deadline: float) -> None:
        super().__init__(max_retries=_RETRIES)
        self._deadline = deadline

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        url = urlsplit(request.url or "")
        if url.scheme != "https" and not _is_loopback(str(url.hostname)):
            raise NotFetched(f"it leads to http://{url.hostname}, expected https")
        left_seconds = self._deadline - time.monotonic()
        if left_seconds <= 0:
            raise requests.Timeout
        options["timeout"] = min(left_seconds, _SOCKET_SECONDS)
        return super().send(request, *arguments, **options)


class _Unencrypted(HTTPAdapter):
    """Sends nothing: neither credentials nor questions are for everyone on the way."""

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        raise NotFetched(f"it leads to http://{urlsplit(request.url or '').hostname}, expected https")


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _authorities() -> bool | str:
    """Those of the system, and not those that the library brings along, if the system has any.

    $SSL_CERT_FILE comes first, as it holds for HTTPS servers, too.
    """
    named = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if named and not os.path.exists(named):
        raise NotFetched(f"the file of authorities {named} does not exist")
    paths = ssl.get_default_verify_paths()
    return named or paths.cafile or paths.capath or True


def _is_loopback(host: str | None) -> bool:
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: Exception) -> str:
    """Without the addresses and objects that these texts are full of."""
    if isinstance(error, requests.exceptions.SSLError):
        return "the certificate cannot be verified; name its authority with SSL_CERT_FILE"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be used"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.TooManyRedirects):
        return f"more than {_MOST_REDIRECTS} redirects"
    if isinstance(error, requests.ConnectionError):
        return "no connection, or one that broke off"
    return f"no answer that can be understood ({type(error).__name__})"
