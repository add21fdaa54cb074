"""Whom kube-apiserver is to trust, and what it shows of itself."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bulkhead.service.certificate import ensure_certificate
from bulkhead.service.config import Config
from bulkhead.service.tls import TlsMaterial

_MOST_BYTES = 1 << 20
_SOON = datetime.timedelta(days=60)

Certificates = tuple[x509.Certificate, ...]


class ManifestError(Exception):
    """The manifests cannot be made as they were asked for. The text says what to do, in one sentence."""


@dataclass(frozen=True, slots=True)
class ClientPair:
    """kube-apiserver's certificate as a client, and its key, in PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def find_authorities(config: Config, given: Path | None, state_dir: Path) -> Certificates:
    """Those that are given, or else those that issue what Bulkhead shows.

    Makes Bulkhead's own certificate if it would make it at its start. Raises ManifestError, SandboxError.
    """
    https = config.server.https
    if given is not None:
        authorities = _read_certificates(given)
    elif https.plaintext:
        raise ManifestError(
            "the configuration has server.https.plaintext, but kube-apiserver speaks TLS: give the CA of "
            "whatever ends TLS before Bulkhead with --ca"
        )
    elif https.certificate is not None:
        authorities = _root_of(https.certificate)
    else:
        authorities = _read_certificates(_generated(config, state_dir))
    if all(each.not_valid_after_utc < _now() for each in authorities):
        raise ManifestError("the CA has expired: give one that is valid with --ca")
    return authorities


def to_pem(certificates: Certificates) -> bytes:
    """Nothing but the certificates, whatever else was in their file."""
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def read_client(certificate: Path, key: Path) -> ClientPair:
    """Raises ManifestError, and TlsError if kube-apiserver could not use them."""
    chain = _read_certificates(certificate)
    pair = ClientPair(to_pem(chain), _read(key))
    TlsMaterial(pair.certificate, pair.key).check()
    purposes = _purposes(chain[0])
    if purposes and not purposes & {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    }:
        raise ManifestError(f"{certificate} is not for clients: it needs the extended key usage clientAuth")
    return pair


def server_notes(
    config: Config, authorities: Certificates, hosts: Sequence[str], state_dir: Path
) -> list[str]:
    """Why kube-apiserver would not talk to the server, as far as that can be seen from here."""
    https = config.server.https
    path = https.certificate or state_dir / "tls" / "tls.crt"
    if https.plaintext or not path.exists():
        return []
    chain = _read_certificates(path)
    notes = []
    for host in hosts:
        if not _is_for(chain[0], host):
            remedy = (
                "give server.https a certificate that has that name"
                if https.certificate is None
                else "name another host, or have it issued anew"
            )
            notes.append(f"the server's certificate, {path}, is not for {host}: {remedy}")
    if not any(each == above or _is_issued_by(each, above) for each in chain for above in authorities):
        notes.append(f"the server's certificate, {path}, was not issued by the CA: kube-apiserver refuses it")
    if chain[0].not_valid_after_utc - _now() < _SOON:
        notes.append(f"the server's certificate, {path}, expires on {chain[0].not_valid_after_utc:%Y-%m-%d}")
    if https.certificate is None:
        notes.append(
            "Bulkhead makes this certificate and its CA anew before a year is over, and then these files "
            "have to be made anew as well; give server.https a certificate of yours to avoid that"
        )
    return notes


def client_notes(config: Config, client: ClientPair | None) -> list[str]:
    """Why Bulkhead would not answer kube-apiserver."""
    https = config.server.https
    if https.client_ca is None:
        if client is None:
            return []
        return ["the configuration has no server.https.clientCA: nobody asks for the client certificate"]
    if client is None:
        return [
            "the configuration has server.https.clientCA, so Bulkhead answers only clients with a "
            "certificate: give --client-certificate and --client-key"
        ]
    chain = x509.load_pem_x509_certificates(client.certificate)
    notes = []
    if not any(_is_issued_by(each, above) for each in chain for above in _read_certificates(https.client_ca)):
        notes.append("the client certificate was not issued by server.https.clientCA: Bulkhead refuses it")
    if https.allowed_names and _names(chain[0]).isdisjoint(https.allowed_names):
        notes.append(
            "none of the names in the client certificate is among server.https.allowedNames: Bulkhead "
            f"refuses it; it has {', '.join(sorted(_names(chain[0]))) or 'no name at all'}"
        )
    return notes


def _generated(config: Config, state_dir: Path) -> Path:
    """One that is there stays: a running service may show its certificate."""
    authority = state_dir / "tls" / "ca.crt"
    if authority.exists():
        return authority
    return ensure_certificate(state_dir / "tls", config.server.https.address.host).ca_certificate


def _root_of(path: Path) -> Certificates:
    last = _read_certificates(path)[-1]
    if not _is_issued_by(last, last):
        raise ManifestError(
            f"give the CA that issued {path} with --ca: the file does not end with a certificate that has "
            "signed itself"
        )
    return (last,)


def _read_certificates(path: Path) -> Certificates:
    data = _read(path)
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError:
        found = []
    if not found:
        raise ManifestError(f"cannot read {path}: expected PEM, with -----BEGIN CERTIFICATE-----")
    return tuple(found)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise ManifestError(f"{path} has more than 1Mi: expected PEM")
    return data


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _alternatives(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _purposes(certificate: x509.Certificate) -> frozenset[x509.ObjectIdentifier]:
    try:
        return frozenset(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()


def _is_for(certificate: x509.Certificate, host: str) -> bool:
    """As Go compares: alternative names only, and `*` stands for one label."""
    alternatives = _alternatives(certificate)
    if alternatives is None:
        return False
    try:
        return ipaddress.ip_address(host) in alternatives.get_values_for_type(x509.IPAddress)
    except ValueError:
        host = host.lower().removesuffix(".")
    names = [name.lower() for name in alternatives.get_values_for_type(x509.DNSName)]
    return host in names or f"*.{host.partition('.')[2]}" in names


def _names(certificate: x509.Certificate) -> frozenset[str]:
    """What Bulkhead compares with allowedNames."""
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[:1]
    alternatives = _alternatives(certificate)
    names = [str(each.value) for each in common]
    if alternatives is not None:
        for kind in (x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name):
            names += alternatives.get_values_for_type(kind)
        names += map(str, alternatives.get_values_for_type(x509.IPAddress))
    return frozenset(names)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
