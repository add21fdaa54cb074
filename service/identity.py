"""Who a client is, by the certificate it has shown, and what it may do."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bulkhead.service.tls import TlsMaterial

_COMMON_NAME = "x509_common_name"
_ALTERNATIVE_NAME = "x509_subject_alternative_name"
_NAMED_KINDS = frozenset({"DNS", "URI", "email"})
_ADDRESS_KIND = "IP Address"


class Unauthenticated(Exception):
    """The client has shown no certificate that counts. The text is for the client."""


class NotAllowed(Exception):
    """The client's certificate is good, but it may not do this. The text is for the client."""


class NotAdmin(NotAllowed):
    """The client may call, but not change the module store."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The names in one verified certificate: its common name and its alternative names."""

    names: frozenset[str]
    expires_at: float | None = None
    """Unix seconds, where it is known."""


def identity_of_peer(certificate: Mapping[str, Any] | None) -> Identity | None:
    """The identity in what `SSLObject.getpeercert` returns; None if the client has shown no certificate."""
    if not certificate:
        return None
    # The first common name, as gRPC takes it.
    attributes = (attribute for part in certificate.get("subject", ()) for attribute in part)
    common = next((value for kind, value in attributes if kind == "commonName"), "")
    names = {common, *_alternative_names(certificate.get("subjectAltName", ()))} - {""}
    return Identity(frozenset(names), ssl.cert_time_to_seconds(certificate["notAfter"]))


def _alternative_names(every: Iterable[tuple[str, str]]) -> Iterable[str]:
    for kind, value in every:
        if kind in _NAMED_KINDS:
            yield value
        elif kind == _ADDRESS_KIND:
            try:
                yield str(ipaddress.ip_address(value.strip()))  # OpenSSL writes IPv6 in its own way
            except ValueError:
                continue


def identity_of_call(auth_context: Mapping[str, Iterable[bytes]]) -> Identity | None:
    """The identity in the authentication context of a gRPC call; None where there is no certificate."""
    if "x509_pem_cert" not in auth_context:
        return None
    names = (*auth_context.get(_COMMON_NAME, ()), *auth_context.get(_ALTERNATIVE_NAME, ()))
    return Identity(frozenset(name.decode("utf-8", "replace") for name in names) - {""})


class Access:
    """Which clients may call a front end, and which may change the module store. Immutable."""

    def __init__(self, tls: TlsMaterial | None, *, local: bool = True) -> None:
        """`local`: only this machine can connect. It counts where there is no TLS."""
        self._plaintext = tls is None
        self._local = local
        self.needs_certificate = tls is not None and tls.client_ca is not None
        """Whether clients must show a certificate."""
        self._admins = frozenset(tls.admin_names) if tls else frozenset()
        self._allowed = frozenset(tls.allowed_names) if tls else frozenset()

    @property
    def restricts(self) -> bool:
        """Whether there is anything that somebody may not do."""
        return not (self._plaintext and self._local)

    def require_client(self, identity: Identity | None) -> None:
        """Raises Unauthenticated without a certificate where one is needed."""
        if self.needs_certificate and identity is None:
            raise Unauthenticated("expected a client certificate, issued by an authority of clientCA")

    def require_caller(self, identity: Identity | None) -> None:
        """Raises Unauthenticated, or NotAllowed for a client that may not call."""
        self.require_client(identity)
        if identity is None or not self._allowed:
            return
        if self._allowed.isdisjoint(identity.names) and self._admins.isdisjoint(identity.names):
            raise NotAllowed("the names in the client certificate are not among allowedNames")

    def require_admin(self, identity: Identity | None) -> None:
        """Raises NotAdmin for a client that may not change the module store.

        In plaintext there are no names: everybody on this machine may, nobody on others.
        """
        self.require_caller(identity)
        if not self.restricts:
            return
        if not self.needs_certificate:
            raise NotAdmin(
                "nobody may put or delete modules here, because clients have no names without "
                "certificates; set clientCA and adminNames in the section server.grpc"
            )
        if identity is None or self._admins.isdisjoint(identity.names):
            raise NotAdmin("only clients that adminNames in the section server.grpc names may do this")
