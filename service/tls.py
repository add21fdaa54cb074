"""What a front end needs to speak TLS: its certificate, its key, and which clients it takes."""

from __future__ import annotations

import datetime
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from bulkhead.sandbox import SandboxError
from bulkhead.service.configmodel import GrpcConfig, HttpsConfig, TlsConfig

_MOST_BYTES = 1 << 20  # of one file; a bundle of all public authorities is a fifth of that
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.1
_PEM = serialization.Encoding.PEM

Key = Literal["certificate", "key", "clientCA"]


class TlsError(SandboxError):
    """A certificate, a key or a bundle of authorities cannot be used; says why, in one sentence."""

    def __init__(self, key: Key, message: str) -> None:
        super().__init__(message)
        self.key = key
        """The key of the configuration that it is about."""


class _DoNotFit(TlsError):
    """Certificate and key are each good. They may have been read while they were being replaced."""


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """All that a front end needs, in memory, so that it can be handed to another process."""

    certificate: bytes
    """PEM: the server's own, then its intermediate authorities'."""
    key: bytes = field(repr=False)
    """PEM, not encrypted."""
    client_ca: bytes | None = None
    """PEM: clients must have a certificate of one of these authorities. None: clients have none."""
    allowed_names: tuple[str, ...] = ()
    """Names of clients that may call; empty: all that have a certificate."""
    admin_names: tuple[str, ...] = ()
    """Names of clients that may change the module store as well."""

    def check(self) -> None:
        """Raises TlsError if no client could ever connect."""
        chain = _certificates(self.certificate, "certificate", "the certificate")
        key = _private_key(self.key)
        if not _fits(chain[0], key):
            raise _DoNotFit(
                "key",
                "the key does not fit the certificate: expected the key of its first certificate, "
                f"{chain[0].subject.rfc4514_string() or 'which has no subject'}",
            )
        _require_valid_now(chain[0])
        if self.client_ca is not None:
            _require_authorities(self.client_authorities())
        server_context(self)

    def client_authorities(self) -> tuple[x509.Certificate, ...]:
        """The certificates of `client_ca`; none if clients need none. Raises TlsError."""
        if self.client_ca is None:
            return ()
        return _certificates(self.client_ca, "clientCA", "the bundle of client authorities")


def tls_of(section: HttpsConfig | GrpcConfig, generated: TlsMaterial | None) -> TlsMaterial | None:
    """What a section of the configuration asks for; None: no TLS.

    Reads the files that it names, and where it names no certificate takes `generated`. Files that are
    being replaced may be met in the middle: then it tries again, for less than half a second. Raises
    TlsError.
    """
    if section.plaintext:
        return None
    for _ in range(_ATTEMPTS - 1):
        try:
            return _read(section, generated)
        except _DoNotFit:
            time.sleep(_PAUSE_SECONDS)
    return _read(section, generated)


def _read(section: HttpsConfig | GrpcConfig, generated: TlsMaterial | None) -> TlsMaterial:
    base = _read_pair(section) or generated
    if base is None:
        raise TlsError("certificate", "expected a certificate and its key, got none")
    material = replace(
        base,
        client_ca=None if section.client_ca is None else _read_file(section.client_ca, "clientCA"),
        allowed_names=section.allowed_names,
        admin_names=section.admin_names if isinstance(section, GrpcConfig) else (),
    )
    material.check()
    if isinstance(section, GrpcConfig):
        _require_known_to_grpc(_private_key(material.key))
    return material


def _read_pair(section: TlsConfig) -> TlsMaterial | None:
    if section.certificate is None or section.key is None:
        return None
    return TlsMaterial(_read_file(section.certificate, "certificate"), _read_file(section.key, "key"))


def _read_file(path: Path, key: Key) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise TlsError(key, f"cannot read {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise TlsError(key, f"{path} has more than 1Mi: expected PEM")
    return data


def server_context(material: TlsMaterial) -> ssl.SSLContext:
    """What the HTTPS server needs. Raises TlsError.

    With client authorities, a client may still show no certificate: the kubelet's probes have none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, material)
    if material.client_ca is not None:
        authorities = material.client_authorities()
        context.load_verify_locations(
            cadata=b"".join(each.public_bytes(serialization.Encoding.DER) for each in authorities)
        )
        context.verify_mode = ssl.CERT_OPTIONAL
        # An intermediate authority may stand in the bundle without the one above it, as with Go.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _load_pair(context: ssl.SSLContext, material: TlsMaterial) -> None:
    """ssl loads them from files only: they are given ones that are in memory, and nowhere else."""
    certificate, key = _memory_file(material.certificate), _memory_file(material.key)
    try:
        context.load_cert_chain(
            f"/proc/self/fd/{certificate}",
            f"/proc/self/fd/{key}",
            password=b"",  # else OpenSSL asks for it, on the terminal
        )
    except (OSError, ValueError) as error:
        raise TlsError(
            "certificate",
            "OpenSSL does not accept the certificate with its key: "
            f"{getattr(error, 'reason', None) or error}",
        ) from error
    finally:
        os.close(certificate)
        os.close(key)


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd


def _certificates(pem: bytes, key: Key, what: str) -> tuple[x509.Certificate, ...]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError:
        certificates = []
    if not certificates:
        raise TlsError(key, f"cannot read {what}: expected PEM, with -----BEGIN CERTIFICATE-----")
    return tuple(certificates)


def _private_key(pem: bytes) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise TlsError("key", "the key is encrypted: expected one without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise TlsError(
            "key", "cannot read the key: expected PEM, with -----BEGIN PRIVATE KEY----- or the like"
        ) from None


def _fits(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    theirs = certificate.public_key().public_bytes(_PEM, spki)
    return key.public_key().public_bytes(_PEM, spki) == theirs


def _require_known_to_grpc(key: PrivateKeyTypes) -> None:
    """With others its server starts, and fails in every handshake."""
    elliptic = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1
    )
    if not elliptic and not isinstance(key, rsa.RSAPrivateKey):
        raise TlsError("key", "expected an RSA key, or an elliptic one on P-256 or P-384, which gRPC knows")


def _require_valid_now(certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc < now:
        raise TlsError(
            "certificate", f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    if certificate.not_valid_before_utc > now:
        raise TlsError(
            "certificate",
            f"the certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
        )


def _require_authorities(certificates: Sequence[x509.Certificate]) -> None:
    for each in certificates:
        if not _may_issue(each):
            name = each.subject.rfc4514_string() or "without a subject"
            raise TlsError("clientCA", f"expected certificates of authorities, but {name} may not issue any")
    now = datetime.datetime.now(datetime.UTC)
    if all(each.not_valid_after_utc < now for each in certificates):
        raise TlsError("clientCA", "the certificates of all client authorities have expired")


def _may_issue(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False
