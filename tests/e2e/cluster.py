"""A control plane for tests: etcd, and kube-apiserver with the flags that a test asks for."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from kubernetes import client

from tests.support.certificates import Authority, pem_of
from tests.support.processes import mortal

START_SECONDS = 90.0
# Of somebody who may do anything without being asked about, and of one whom nobody has allowed anything.
ADMIN_TOKEN, OPERATOR_TOKEN = "admin-token", "operator-token"
STATIC_TOKENS = f'{ADMIN_TOKEN},admin,admin-uid,"system:masters"\n{OPERATOR_TOKEN},operator,operator-uid\n'
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "verbs": ["create", "update", "patch", "delete"]}, {"level": "None"}],
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(command: Sequence[str], log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ended afterwards."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            mortal(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=log_path.parent
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@contextmanager
def etcd(programs: Path, folder: Path) -> Iterator[str]:
    """An etcd of its own; yields its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    command = [str(programs / "etcd"), "--data-dir", str(folder / "data"), "--unsafe-no-fsync"]
    command += ["--listen-client-urls", url, "--advertise-client-urls", url]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"default={peer}"]
    with running(command, folder / "etcd.log"):
        yield url


@dataclass(slots=True)
class Cluster:
    """A kube-apiserver that answers."""

    port: int
    ca_path: Path
    log_path: Path
    _clients: dict[str, client.ApiClient] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def api(self, token: str = ADMIN_TOKEN) -> client.ApiClient:
        """A client with a bearer token; threads may share it."""
        if token in self._clients:
            return self._clients[token]
        configuration = client.Configuration()
        configuration.host = self.url
        configuration.ssl_ca_cert = str(self.ca_path)
        configuration.api_key = {"authorization": f"Bearer {token}"}
        configuration.retries = False
        configuration.connection_pool_maxsize = 16
        return self._clients.setdefault(token, client.ApiClient(configuration))

    def audited(self, name: str) -> list[dict[str, Any]]:
        """The annotations of the audit events about objects of this name, in their order."""
        log = (self.log_path.parent / "audit.log").read_text()
        events = [json.loads(line) for line in log.splitlines(keepends=True) if line.endswith("\n")]
        return [
            event.get("annotations", {}) for event in events if event.get("objectRef", {}).get("name") == name
        ]

    def close(self) -> None:
        for each in self._clients.values():
            each.rest_client.pool_manager.clear()
            each.close()


@contextmanager
def kube_apiserver(
    programs: Path, folder: Path, etcd_url: str, *flags: str, authorization: str | None = "Node,RBAC"
) -> Iterator[Cluster]:
    """A kube-apiserver on a clean cluster; `authorization` None: the flags say it."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority("kubernetes")
    certificate, key = authority.server("kubernetes", "kubernetes.default.svc").write(folder, "apiserver")
    (folder / "ca.crt").write_bytes(authority.pem)
    (folder / "sa.key").write_bytes(pem_of(rsa.generate_private_key(65537, 2048)))
    (folder / "tokens.csv").write_text(STATIC_TOKENS)
    (folder / "audit.yaml").write_text(json.dumps(_AUDIT_POLICY))
    port = free_port()
    command = [str(programs / "kube-apiserver"), f"--etcd-servers={etcd_url}"]
    command += [f"--etcd-prefix=/{folder.name}", "--bind-address=127.0.0.1", f"--secure-port={port}"]
    command += [f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}"]
    command += ["--service-account-issuer=https://kubernetes.default.svc"]
    command += [f"--service-account-signing-key-file={folder / 'sa.key'}"]
    command += [f"--service-account-key-file={folder / 'sa.key'}", "--service-cluster-ip-range=10.0.0.0/24"]
    command += [f"--token-auth-file={folder / 'tokens.csv'}", "--disable-admission-plugins=ServiceAccount"]
    command += [f"--audit-policy-file={folder / 'audit.yaml'}", f"--audit-log-path={folder / 'audit.log'}"]
    command += [f"--authorization-mode={authorization}"] if authorization else []
    command += flags
    log_path = folder / "kube-apiserver.log"
    with running(command, log_path) as process:
        cluster = Cluster(port, folder / "ca.crt", log_path)
        try:
            _wait_until_ready(cluster, process)
            yield cluster
        finally:
            cluster.close()


def _wait_until_ready(cluster: Cluster, process: subprocess.Popen[bytes]) -> None:
    context = ssl.create_default_context(cafile=str(cluster.ca_path))
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        connection = http.client.HTTPSConnection("127.0.0.1", cluster.port, context=context, timeout=5)
        with suppress(OSError), closing(connection):
            connection.request("GET", "/readyz", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"kube-apiserver is not ready\n{cluster.log_path.read_text()[-4000:]}")
