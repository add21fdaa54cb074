"""The gRPC server's certificate, which can be replaced while it listens."""

from __future__ import annotations

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from bulkhead.service.tls import TlsMaterial


class Credentials:
    """What one listening address shows, and by whom clients must be certified."""

    def __init__(self, tls: TlsMaterial) -> None:
        self._needs_certificate = tls.client_ca is not None
        self._trusted = _trusted_by(tls)
        self._configuration = self._taken = _configuration(tls)
        self.credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._take,  # type: ignore[arg-type]  # None is documented, but not in the stubs
            self._needs_certificate,
        )

    def accept(self, tls: TlsMaterial) -> bool:
        """Takes it for handshakes from now on, or returns False.

        False where clients with open connections would have to show their certificate once more: an
        authority is not trusted any more, or certificates begin or cease to be needed.
        """
        trusted = _trusted_by(tls)
        if (tls.client_ca is not None) != self._needs_certificate or not self._trusted <= trusted:
            return False
        self._trusted = trusted
        self._configuration = _configuration(tls)
        return True

    def _take(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC calls it before each handshake, in a thread of its own; None: nothing has changed."""
        current = self._configuration
        if current is self._taken:
            return None
        self._taken = current
        return current


def _trusted_by(tls: TlsMaterial) -> frozenset[bytes]:
    return frozenset(each.public_bytes(Encoding.DER) for each in tls.client_authorities())


def _configuration(tls: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], tls.client_ca)
