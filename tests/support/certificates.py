"""Real authorities and certificates for tests, of any kind that a test needs."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and its key, in PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str = "tls") -> tuple[Path, Path]:
        """Writes `NAME.crt` and `NAME.key`; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
        certificate.write_bytes(self.certificate)
        key.write_bytes(self.key)
        return certificate, key


def pem_of(key: PrivateKey, *, password: bytes | None = None, traditional: bool = False) -> bytes:
    """A private key in PEM: PKCS #8, or the older form of OpenSSL's."""
    form = serialization.PrivateFormat
    return key.private_bytes(
        serialization.Encoding.PEM,
        form.TraditionalOpenSSL if traditional else form.PKCS8,
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
    )


class Authority:
    """Issues certificates. With an `issuer` it is an intermediate authority."""

    def __init__(
        self,
        name: str = "test authority",
        *,
        issuer: Authority | None = None,
        lasting: datetime.timedelta = DAY,
    ) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._issuer = issuer
        above = issuer or self
        self.certificate = (
            _builder(self._name, above._name, self._key, lasting)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_issuing, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(above._key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        common_name: str = "",
        names: Sequence[str] = (),
        *,
        lasting: datetime.timedelta = DAY,
        beginning: datetime.timedelta | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = (CLIENT, SERVER),
        key: PrivateKey | None = None,
        password: bytes | None = None,
    ) -> Pair:
        """Issues a certificate that begins and ends so long from now; negative: it has expired.

        `names` are alternative ones: IP addresses, URIs, e-mail addresses or DNS names, by their looks.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        common = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
        builder = (
            _builder(x509.Name(common), self._name, key, lasting, beginning)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        if purposes:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if names:
            every = x509.SubjectAlternativeName(map(_general_name, names))
            builder = builder.add_extension(every, critical=not common_name)
        certificate = builder.sign(self._key, hashes.SHA256())
        chain = certificate.public_bytes(serialization.Encoding.PEM) + self._intermediates()
        return Pair(chain, pem_of(key, password=password))

    def server(self, *names: str) -> Pair:
        """For a server on loopback, with any other names."""
        return self.issue("server", ("localhost", "127.0.0.1", "::1", *names), purposes=(SERVER,))

    def client(self, common_name: str = "", *names: str) -> Pair:
        """For a client."""
        return self.issue(common_name, names, purposes=(CLIENT,))

    def _intermediates(self) -> bytes:
        return b"" if self._issuer is None else self.pem + self._issuer._intermediates()


_issuing = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: PrivateKey,
    lasting: datetime.timedelta,
    beginning: datetime.timedelta | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begin = min(-DAY, lasting - DAY) if beginning is None else beginning
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begin)
        .not_valid_after(now + lasting)
        .public_key(key.public_key())
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    return x509.RFC822Name(name) if "@" in name else x509.DNSName(name)
