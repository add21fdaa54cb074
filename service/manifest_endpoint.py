"""Where kube-apiserver finds Bulkhead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bulkhead.service.scalars import Address, require_name

DEFAULT_PORT = 443


@dataclass(frozen=True, slots=True)
class UrlEndpoint:
    """A host and a port, as kube-apiserver's own host resolves and reaches them."""

    address: Address

    @classmethod
    def parse(cls, text: str) -> UrlEndpoint:
        """Reads `https://HOST:PORT`. Raises ValueError."""
        expected = f"expected https://HOST:PORT, got {text!r}"
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ValueError(f"{expected}: {error}") from None
        if "@" in parts.netloc:
            raise ValueError("expected https://HOST:PORT: kube-apiserver takes no user in it")
        if parts.scheme != "https":
            raise ValueError(f"{expected}: kube-apiserver calls webhooks over https only")
        if parts.path.strip("/") or any(mark in text for mark in "?#"):
            raise ValueError(f"{expected}: nothing may follow the port, the paths are Bulkhead's own")
        if port == 0:
            raise ValueError(f"{expected}: port 0 is none that could be reached")
        bracketed = f"[{host}]" if ":" in host else host
        try:
            return cls(Address.parse(f"{bracketed}:{port or DEFAULT_PORT}"))
        except ValueError as error:
            raise ValueError(f"{expected}: {error}") from None

    @property
    def host(self) -> str:
        """What the server's certificate must be for."""
        return self.address.host

    @property
    def host_and_port(self) -> str:
        """What kube-apiserver looks for among the users of its admission kubeconfig."""
        return str(self.address)

    def url(self, path: str) -> str:
        """With the port always: of an IPv6 host without one kube-apiserver makes `[[::1]]:443`."""
        return f"https://{self.address}{path}"

    def client_config(self, path: str) -> dict[str, Any]:
        """The part of a webhook's clientConfig that says where it is."""
        return {"url": self.url(path)}


@dataclass(frozen=True, slots=True)
class ServiceEndpoint:
    """A Service of the cluster."""

    namespace: str
    name: str
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, text: str) -> ServiceEndpoint:
        """Reads `NAMESPACE/NAME` or `NAMESPACE/NAME:PORT`. Raises ValueError."""
        expected = f"expected NAMESPACE/NAME or NAMESPACE/NAME:PORT, got {text!r}"
        namespace, slash, rest = text.partition("/")
        name, colon, port = rest.partition(":")
        if not slash or "." in namespace or "." in name:
            raise ValueError(expected)
        try:
            require_name(namespace)
            require_name(name)
        except ValueError:
            raise ValueError(expected) from None
        if not colon:
            return cls(namespace, name)
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise ValueError(f"{expected}: a port is a number from 1 to 65535")
        return cls(namespace, name, int(port))

    @property
    def host(self) -> str:
        """What the server's certificate must be for."""
        return f"{self.name}.{self.namespace}.svc"

    @property
    def host_and_port(self) -> str:
        """What kube-apiserver looks for among the users of its admission kubeconfig."""
        return f"{self.host}:{self.port}"

    def client_config(self, path: str) -> dict[str, Any]:
        """The part of a webhook's clientConfig that says where it is."""
        reference = {"namespace": self.namespace, "name": self.name, "path": path, "port": self.port}
        return {"service": reference}


AdmissionEndpoint = UrlEndpoint | ServiceEndpoint
