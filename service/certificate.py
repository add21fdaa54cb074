"""The certificate that Bulkhead makes for itself, issued by an authority of its own to be trusted."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bulkhead.sandbox import SandboxError
from bulkhead.sandbox.files import make_private_directory, write_atomically
from bulkhead.service.tls import TlsMaterial

_AUTHORITY_DAYS = 3650
_CERTIFICATE_DAYS = 365
_RENEW_BEFORE = datetime.timedelta(days=30)
_BACKDATE = datetime.timedelta(minutes=5)  # the client's clock may be behind ours
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ANY_HOST = ("", "0.0.0.0", "::")  # noqa: S104 - names in no certificate


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files."""

    ca_certificate: Path
    certificate: Path
    key: Path

    def material(self) -> TlsMaterial:
        """What they hold. Raises SandboxError if they cannot be read."""
        try:
            return TlsMaterial(self.certificate.read_bytes(), self.key.read_bytes())
        except OSError as error:
            raise SandboxError(f"cannot read {error.filename}: {error.strerror}") from error


def ensure_certificate(folder: Path, host: str) -> TlsFiles:
    """Makes a certificate for loopback and `host`, or keeps the one there while it is good.

    The authority is made anew together with the certificate, and its key is thrown away: nobody can
    issue another certificate in its name. Raises SandboxError with what to do.
    """
    make_private_directory(folder)
    files = TlsFiles(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")
    names = list(dict.fromkeys((*_LOOPBACK, *(() if host in _ANY_HOST else (host,)))))
    if not _is_good(files, names):
        try:
            _make(files, names)
        except OSError as error:
            raise SandboxError(f"cannot write the certificate in {folder}: {error.strerror}") from error
    return files


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _is_good(files: TlsFiles, names: list[str]) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        authority = x509.load_pem_x509_certificate(files.ca_certificate.read_bytes())
        certificate.verify_directly_issued_by(authority)
        files.material().check()
        covered = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, SandboxError, x509.ExtensionNotFound):
        return False
    lasting = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) > _RENEW_BEFORE
    return lasting and all(_general_name(name) in covered for name in names)


def _make(files: TlsFiles, names: list[str]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # The name tells authorities of several starts apart, where a client keeps old ones.
    issuer = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"Bulkhead authority {now:%Y-%m-%d %H:%M:%S}")]
    )
    authority = _authority(issuer, authority_key, now)
    certificate = _certificate(issuer, authority_key, key, names, now)
    pem = serialization.Encoding.PEM
    write_atomically(
        files.key,
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    write_atomically(files.certificate, certificate.public_bytes(pem))
    write_atomically(files.ca_certificate, authority.public_bytes(pem), mode=0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(name: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    return (
        _builder(name, name, now, _AUTHORITY_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _certificate(
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    names: list[str],
    now: datetime.datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bulkhead")])
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        _builder(subject, issuer, now, _CERTIFICATE_DAYS)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName(map(_general_name, names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
