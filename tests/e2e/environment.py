"""Bulkhead and a cluster that asks it, set up with what `bulkhead manifests` writes and nothing else."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kubernetes import client
from ruamel.yaml import YAML

from tests.e2e.cluster import Cluster, free_port, kube_apiserver
from tests.e2e.guests import GROUP, RESOURCES, modules
from tests.e2e.volume import Volume
from tests.support.certificates import Authority, Pair
from tests.support.served import Served, command, recorded, serve, wait_until

Wat = Callable[[str], bytes]
_JSON = {"Content-Type": "application/json"}


@dataclass(slots=True)
class Webhooks:
    """A Bulkhead to be started, stopped and started again at one address, and its manifests."""

    folder: Path
    port: int
    server_ca: Authority
    client_ca: Authority
    _config: Volume
    _tls: Volume
    manifests: Path = field(init=False)

    @classmethod
    def prepare(cls, folder: Path, wat: Wat) -> Webhooks:
        """Certificates for both directions, the configuration, and the manifests for it."""
        folder.mkdir(parents=True)
        server_ca, client_ca = Authority("bulkhead"), Authority("kubernetes clients")
        client_ca.client("kube-apiserver").write(folder, "client")
        (folder / "server-ca.crt").write_bytes(server_ca.pem)
        config, tls = Volume(folder / "config"), Volume(folder / "tls")
        webhooks = cls(folder, free_port(), server_ca, client_ca, config, tls)
        webhooks.renew_certificate()
        https = {
            "certificate": "../tls/tls.crt",
            "key": "../tls/tls.key",
            "clientCA": "../tls/ca.crt",
            "allowedNames": ["kube-apiserver"],
        }
        webhooks.configure(
            {"server": {"https": https, "gracePeriod": "10s"}, **modules(folder / "modules", wat)}
        )
        webhooks.manifests = webhooks.write_manifests()
        return webhooks

    @property
    def config(self) -> Path:
        return self._config.path / "bulkhead.yaml"

    def configuration(self) -> Any:
        """What lies there now, to be changed and given to `configure`."""
        return json.loads(self.config.read_bytes())

    def configure(self, configuration: Any) -> None:
        """Puts another configuration into its place, as an update of a mounted ConfigMap does."""
        text = json.dumps(configuration, indent=1)  # which is YAML, too
        self._config.update({"bulkhead.yaml": text.encode()})

    def renew_certificate(self) -> None:
        """Puts a new server certificate and key into place, as an update of a mounted Secret does."""
        server = self.server_ca.server()
        self._tls.update({"tls.crt": server.certificate, "tls.key": server.key, "ca.crt": self.client_ca.pem})

    def replace_module(self, name: str, data: bytes) -> None:
        """Another module under the name of one of `modules`."""
        path = self.folder / "modules" / f"{name}.wasm"
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(data)
        new.rename(path)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def ask_as(self, client: Pair | None) -> int:
        """Asks directly, as the owner of a certificate or as nobody; returns the HTTP status."""
        context = ssl.create_default_context(cafile=str(self.folder / "server-ca.crt"))
        if client is not None:
            context.load_cert_chain(*client.write(self.folder, "asking"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=30)
        with closing(connection):
            connection.request(
                "POST", "/authn", json.dumps(recorded("tokenreview-v1-wrong-token")["body"]), _JSON
            )
            return connection.getresponse().status

    def write_manifests(self, name: str = "manifests", *options: str) -> Path:
        output = self.folder / name
        line = command("manifests", "--config", str(self.config), "--url", self.url, "--output", str(output))
        line += ["--ca", str(self.folder / "server-ca.crt"), "--apiserver-dir", str(output / "apiserver")]
        line += ["--client-certificate", str(self.folder / "client.crt")]
        line += ["--client-key", str(self.folder / "client.key"), *options]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return output

    @contextmanager
    def serve(self) -> Iterator[Served]:
        address = f"127.0.0.1:{self.port}"
        with serve(
            self.folder / "served", "--config", str(self.config), "--https-address", address
        ) as served:
            yield served

    def documents(self, *kinds: str) -> list[dict[str, Any]]:
        """The manifests of these kinds."""
        every = [
            document
            for path in sorted(self.manifests.glob("cluster/*.yaml"))
            for document in YAML(typ="safe").load_all(path.read_text())
        ]
        return [document for document in every if document and document.get("kind") in kinds]


@dataclass(slots=True)
class Environment:
    """A cluster that asks Bulkhead."""

    cluster: Cluster
    webhooks: Webhooks
    served: Served

    def api(self, token: str | None = None) -> client.ApiClient:
        return self.cluster.api(token) if token else self.cluster.api()

    @property
    def core(self) -> client.CoreV1Api:
        return client.CoreV1Api(self.api())

    @property
    def custom(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self.api())

    def create_custom(self, resource: str, name: str) -> Any:
        return self.create_custom_with_headers(resource, name)[0]

    def create_custom_with_headers(self, resource: str, name: str) -> tuple[Any, Mapping[str, str]]:
        """The object, and the headers that came with it."""
        body = {
            "apiVersion": f"{GROUP}/v1",
            "kind": resource.title(),
            "metadata": {"name": name, "labels": {"made-by": "e2e"}},
        }
        made, _, headers = self.custom.create_namespaced_custom_object_with_http_info(
            GROUP, "v1", "default", resource, body
        )
        return made, headers

    def patch_custom(self, resource: str, name: str, patch: Any) -> Any:
        return self.custom.patch_namespaced_custom_object(GROUP, "v1", "default", resource, name, patch)

    def reviews(self, **wanted: Any) -> list[dict[str, Any]]:
        """What Bulkhead has logged of its decisions."""
        events = (json.loads(line) for line in self.served.log().splitlines() if line.startswith("{"))
        return [
            event for event in events if event.get("event") == "review" and wanted.items() <= event.items()
        ]

    def register_webhooks(self) -> None:
        """Applies the webhook configurations."""
        registration = client.AdmissionregistrationV1Api(self.api())
        for document in self.webhooks.documents("ValidatingWebhookConfiguration"):
            registration.create_validating_webhook_configuration(document)
        for document in self.webhooks.documents("MutatingWebhookConfiguration"):
            registration.create_mutating_webhook_configuration(document)

    def wait_until_webhooks_are_asked(self) -> None:
        """They are cached by kube-apiserver, and used a moment after they were made."""

        def mutated() -> bool:
            body = {"metadata": {"generateName": "probe-"}}
            made = self.core.create_namespaced_config_map("default", body, dry_run="All")
            return bool(made.data)

        wait_until(mutated, "the first mutated object", 30)


def create_custom_resources(api: client.ApiClient) -> None:
    """Defines them, and waits until they can be used."""
    extensions = client.ApiextensionsV1Api(api)
    for resource in RESOURCES:
        anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
        names = {"plural": resource, "kind": resource.title(), "singular": resource}
        spec = {"group": GROUP, "scope": "Namespaced", "versions": [version], "names": names}
        body = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{resource}.{GROUP}"},
            "spec": spec,
        }
        extensions.create_custom_resource_definition(body)

    custom = client.CustomObjectsApi(api)

    def served() -> bool:
        try:
            for resource in RESOURCES:
                custom.list_namespaced_custom_object(GROUP, "v1", "default", resource)
        except client.ApiException:
            return False
        return True

    wait_until(served, "the custom resources", 30)


def structured_flags(manifests: Path) -> list[str]:
    return [
        f"--authentication-token-webhook-config-file={manifests / 'apiserver' / 'authentication.kubeconfig'}",
        "--authentication-token-webhook-version=v1",
        f"--authorization-config={manifests / 'apiserver' / 'authorization.yaml'}",
        f"--admission-control-config-file={manifests / 'apiserver' / 'admission.yaml'}",
    ]


def legacy_flags(manifests: Path, version: str) -> list[str]:
    return [
        f"--authentication-token-webhook-config-file={manifests / 'apiserver' / 'authentication.kubeconfig'}",
        f"--authentication-token-webhook-version={version}",
        "--authorization-mode=RBAC,Webhook",
        f"--authorization-webhook-config-file={manifests / 'apiserver' / 'authorization.kubeconfig'}",
        f"--authorization-webhook-version={version}",
    ]


@contextmanager
def environment(
    built: Path, folder: Path, etcd_url: str, webhooks: Webhooks, served: Served
) -> Iterator[Environment]:
    """A cluster that uses all of the manifests."""
    flags = structured_flags(webhooks.manifests)
    with kube_apiserver(built, folder, etcd_url, *flags, authorization=None) as cluster:
        env = Environment(cluster, webhooks, served)
        create_custom_resources(env.api())
        env.register_webhooks()
        env.wait_until_webhooks_are_asked()
        yield env
