"""A server of files and OCI artifacts on loopback, as registries are: TLS, tokens, redirects, trouble."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.certificates import Authority

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
# As Kubewarden pushes them.
CONFIG, LAYER = "application/vnd.wasm.config.v1+json", "application/vnd.wasm.content.layer.v1+wasm"
TOKEN, USER, PASSWORD = "registry-token", "reader", "not-for-logs"
LOGIN = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
BASIC = f"Basic {LOGIN}"
_KEYS = {"token": f"Bearer {TOKEN}", "login": f"Bearer {TOKEN}", "basic": BASIC}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(slots=True)
class Registry:
    """What it has, and what it was asked."""

    url: str
    host: str
    files: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    """By path: status, headers, body."""
    asked: list[str] = field(default_factory=list)
    needs: str = ""
    """What to show in order to read: `token`, `login` (a token that only a user gets), `basic`."""
    realm: str = ""
    """Where tokens are said to come from; empty: from here."""
    shown: list[str] = field(default_factory=list)
    """The credentials that came with requests."""
    delay_seconds: float = 0.0

    def put_file(
        self, path: str, data: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> str:
        """Serves a file; returns its URL."""
        self.files[path] = (status, headers or {}, data)
        return self.url + path

    def push(self, repository: str, *layers: tuple[str, bytes], kind: str = MANIFEST) -> str:
        """Publishes an artifact; returns its reference, with the digest of its manifest."""
        described = []
        for media_type, data in layers:
            self.put_file(f"/v2/{repository}/blobs/{digest_of(data)}", data)
            described.append({"mediaType": media_type, "digest": digest_of(data), "size": len(data)})
        config = {"mediaType": CONFIG, "digest": digest_of(b"{}"), "size": 2}
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": config,
            "layers": described,
        }
        body = json.dumps(manifest).encode()
        self.put_file(f"/v2/{repository}/manifests/{digest_of(body)}", body, headers={"Content-Type": kind})
        return f"oci://{self.host}/{repository}:latest@{digest_of(body)}"


def _handler(registry: Registry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, _ = self.path.partition("?")
            registry.asked.append(path)
            time.sleep(registry.delay_seconds)
            if shown := self.headers.get("Authorization"):
                registry.shown.append(shown)
            if path == "/token" and (registry.needs != "login" or shown == BASIC):
                self._reply(200, {}, json.dumps({"token": TOKEN}).encode())
            elif path.startswith("/v2/") and shown != _KEYS.get(registry.needs, shown):
                realm = registry.realm or f"{registry.url}/token"
                bearer = f'Bearer realm="{realm}",service="registry",scope="repository:x:pull"'
                challenge = 'Basic realm="registry"' if registry.needs == "basic" else bearer
                self._reply(401, {"WWW-Authenticate": challenge}, b"{}")
            else:
                self._reply(*registry.files.get(path, (404, {}, b"no such file")))

        def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what tests are about."""


@contextmanager
def registry(folder: Path, *, tls: bool = True) -> Iterator[Registry]:
    """Serves until the block ends; with TLS, `folder` gets the authority to trust, `ca.crt`."""
    scheme = "https" if tls else "http"
    served = Registry("", "")
    server = _Server(("127.0.0.1", 0), _handler(served))
    served.host = f"127.0.0.1:{server.server_port}"
    served.url = f"{scheme}://{served.host}"
    if tls:
        authority = Authority("registry")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.crt").write_bytes(authority.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.server().write(folder, "registry"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
