"""The certificate that Bulkhead makes for itself, and those that it is given."""

from __future__ import annotations

import itertools
import os
import socket
import ssl
import stat
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bulkhead.sandbox import SandboxError
from bulkhead.service.certificate import TlsFiles, ensure_certificate
from bulkhead.service.configmodel import GrpcConfig, HttpsConfig
from bulkhead.service.tls import TlsError, TlsMaterial, server_context, tls_of
from tests.support.certificates import DAY, Authority, Pair, PrivateKey, pem_of


def handshake(material: TlsMaterial, name: str, authority: bytes) -> None:
    """A client that trusts the authority connects to `name`."""
    ours, theirs = socket.socketpair()
    served: list[BaseException] = []

    def serve() -> None:
        try:
            with server_context(material).wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)
        except (OSError, ssl.SSLError) as error:
            served.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cadata=authority.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            connection.sendall(b"x")
    finally:
        ours.close()
        thread.join()


def handshake_with(files: TlsFiles, name: str) -> None:
    """A client that trusts the generated authority connects to `name`."""
    handshake(files.material(), name, files.ca_certificate.read_bytes())


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "bulkhead.example"])
def test_is_good_for_loopback_and_for_the_host(tmp_path: Path, name: str) -> None:
    files = ensure_certificate(tmp_path / "tls", "bulkhead.example")
    handshake_with(files, name)


def test_is_not_good_for_other_names(tmp_path: Path) -> None:
    files = ensure_certificate(tmp_path / "tls", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake_with(files, "bulkhead.example")


def test_keeps_a_certificate_that_is_still_good(tmp_path: Path) -> None:
    files = ensure_certificate(tmp_path / "tls", "127.0.0.1")
    before = files.certificate.read_bytes()
    assert ensure_certificate(tmp_path / "tls", "127.0.0.1") == files
    assert files.certificate.read_bytes() == before


@pytest.mark.parametrize("damage", ["another host", "no key", "another key", "damaged", "another authority"])
def test_makes_a_new_certificate_when_the_old_one_will_not_do(tmp_path: Path, damage: str) -> None:
    files = ensure_certificate(tmp_path / "tls", "127.0.0.1")
    other = ensure_certificate(tmp_path / "other", "127.0.0.1")
    if damage == "no key":
        files.key.unlink()
    elif damage == "another key":
        files.key.write_bytes(other.key.read_bytes())
    elif damage == "damaged":
        files.certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    elif damage == "another authority":
        files.ca_certificate.write_bytes(other.ca_certificate.read_bytes())
    host = "10.1.2.3" if damage == "another host" else "127.0.0.1"
    before = files.certificate.read_bytes()
    handshake_with(ensure_certificate(tmp_path / "tls", host), host)
    assert files.certificate.read_bytes() != before


def test_only_the_owner_can_read_the_key(tmp_path: Path) -> None:
    files = ensure_certificate(tmp_path / "tls", "127.0.0.1")
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


def test_refuses_a_folder_that_others_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls").chmod(0o777)
    with pytest.raises(SandboxError, match="others may write"):
        ensure_certificate(tmp_path / "tls", "127.0.0.1")


def section(folder: Path, pair: Pair, **more: object) -> HttpsConfig:
    """A section of a configuration that names a pair of files."""
    certificate, key = pair.write(folder)
    return HttpsConfig.model_validate({"certificate": str(certificate), "key": str(key), **more})


def test_takes_what_the_configuration_names(tmp_path: Path) -> None:
    authority = Authority()
    pair = authority.server()
    (tmp_path / "ca.crt").write_bytes(b"# the authority: \xc3\xa9\n" + authority.pem)
    config = section(tmp_path, pair, clientCA=str(tmp_path / "ca.crt"), allowedNames=["a", "b"])
    material = tls_of(config, None)
    assert material is not None
    assert (material.certificate, material.key) == (pair.certificate, pair.key)
    assert material.allowed_names == ("a", "b")
    assert material.client_authorities() == (authority.certificate,)
    assert pair.key not in repr(material).encode()
    assert "PRIVATE" not in repr(material)
    assert msgspec.json.decode(msgspec.json.encode(material), type=TlsMaterial) == material


def test_without_a_certificate_the_generated_one_is_shown_to_clients_with_one(tmp_path: Path) -> None:
    generated = ensure_certificate(tmp_path / "tls", "127.0.0.1").material()
    assert tls_of(HttpsConfig(), generated) == generated
    (tmp_path / "ca.crt").write_bytes(Authority().pem)
    config = HttpsConfig.model_validate({"clientCA": str(tmp_path / "ca.crt")})
    assert tls_of(config, generated) == replace(generated, client_ca=(tmp_path / "ca.crt").read_bytes())


def test_no_tls_where_the_configuration_wants_none() -> None:
    assert tls_of(HttpsConfig(plaintext=True), None) is None
    assert tls_of(GrpcConfig(), None) is None


@pytest.mark.parametrize("form", ["rsa", "traditional", "with parameters", "in one file", "crlf"])
def test_takes_keys_in_any_form(tmp_path: Path, form: str) -> None:
    authority = Authority()
    key = rsa.generate_private_key(65537, 2048) if form == "rsa" else ec.generate_private_key(ec.SECP384R1())
    pair = authority.issue("x", ["127.0.0.1"], key=key)
    if form == "traditional":
        pair = replace(pair, key=pem_of(key, traditional=True))
    elif form == "with parameters":  # as `openssl ecparam -genkey` writes them
        parameters = b"-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n"
        pair = replace(pair, key=parameters + pem_of(key, traditional=True))
    elif form == "in one file":
        pair = Pair(pair.key + pair.certificate, pair.key + pair.certificate)
    elif form == "crlf":
        pair = Pair(pair.certificate.replace(b"\n", b"\r\n"), pair.key.replace(b"\n", b"\r\n"))
    material = tls_of(section(tmp_path, pair), None)
    assert material is not None
    handshake(material, "127.0.0.1", authority.pem)


@pytest.mark.parametrize(
    ("fault", "key", "text"),
    [
        ("another key", "key", "the key does not fit the certificate"),
        ("encrypted key", "key", "the key is encrypted"),
        ("no key", "key", "cannot read the key: expected PEM"),
        ("no certificate", "certificate", "cannot read the certificate: expected PEM"),
        ("damaged certificate", "certificate", "cannot read the certificate: expected PEM"),
        ("expired", "certificate", "the certificate expired on 20"),
        ("not yet valid", "certificate", "the certificate is not valid before 20"),
        ("weak key", "certificate", "OpenSSL does not accept the certificate with its key: EE_KEY_TOO_SMALL"),
        ("authority first", "key", "the key does not fit the certificate: expected the key of its first"),
        ("empty bundle", "clientCA", "cannot read the bundle of client authorities: expected PEM"),
        ("bundle of clients", "clientCA", "but CN=client may not issue any"),
        ("expired authorities", "clientCA", "the certificates of all client authorities have expired"),
        ("large bundle", "clientCA", "has more than 1Mi"),
        ("unreadable", "key", "cannot read "),
    ],
)
def test_refuses_what_no_client_could_connect_with(tmp_path: Path, fault: str, key: str, text: str) -> None:
    authority = Authority()
    pair = authority.server()
    bundle = authority.pem
    if fault == "another key":
        pair = Pair(pair.certificate, authority.server().key)
    elif fault == "encrypted key":
        pair = authority.issue("x", password=b"secret")
    elif fault == "no key":
        pair = Pair(pair.certificate, pair.certificate)
    elif fault == "no certificate":
        pair = Pair(pair.key, pair.key)
    elif fault == "damaged certificate":
        pair = Pair(pair.certificate.replace(b"M", b"N", 5), pair.key)
    elif fault == "expired":
        pair = authority.issue("x", lasting=-DAY)
    elif fault == "not yet valid":
        pair = authority.issue("x", lasting=3 * DAY, beginning=2 * DAY)
    elif fault == "weak key":
        pair = authority.issue("x", key=rsa.generate_private_key(65537, 1024))
    elif fault == "authority first":
        pair = Pair(authority.pem + pair.certificate, pair.key)
    elif fault == "empty bundle":
        bundle = b"\n"
    elif fault == "bundle of clients":
        bundle += authority.client("client").certificate
    elif fault == "expired authorities":
        bundle = Authority(lasting=-DAY).pem
    elif fault == "large bundle":
        bundle += b"\n" * (1 << 20)
    (tmp_path / "ca.crt").write_bytes(bundle)
    config = section(tmp_path, pair, clientCA=str(tmp_path / "ca.crt"))
    if fault == "unreadable":
        assert config.key is not None
        config.key.unlink()
        config.key.mkdir()
    with pytest.raises(TlsError) as caught:
        tls_of(config, None)
    assert caught.value.key == key
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP521R1()), ed25519.Ed25519PrivateKey.generate()],
    ids=["P-521", "Ed25519"],
)
def test_keys_that_only_https_knows_are_refused_for_grpc(tmp_path: Path, key: PrivateKey) -> None:
    authority = Authority()
    config = section(tmp_path, authority.issue("x", ["127.0.0.1"], key=key))
    material = tls_of(config, None)
    assert material is not None
    handshake(material, "127.0.0.1", authority.pem)
    grpc = GrpcConfig.model_validate({"certificate": str(config.certificate), "key": str(config.key)})
    with pytest.raises(TlsError, match="expected an RSA key, or an elliptic one on P-256 or P-384"):
        tls_of(grpc, None)


def test_reads_a_pair_that_is_being_swapped(tmp_path: Path) -> None:
    """As the kubelet swaps it: a link to a folder, behind our back."""
    authority = Authority()
    pairs = [authority.server() for _ in range(2)]
    for number, pair in enumerate(pairs):
        pair.write(tmp_path / str(number))
    link = tmp_path / "..data"
    link.symlink_to("0")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    config = HttpsConfig.model_validate(
        {"certificate": str(tmp_path / "tls.crt"), "key": str(tmp_path / "tls.key")}
    )
    done = threading.Event()

    def swap() -> None:
        for number in itertools.cycle((1, 0)):
            (tmp_path / "..next").symlink_to(str(number))
            (tmp_path / "..next").rename(link)
            if done.wait(0.002):
                return

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(100):
            material = tls_of(config, None)
            assert material is not None
            assert Pair(material.certificate, material.key) in pairs
    finally:
        done.set()
        thread.join()


def test_leaves_no_key_on_the_disk_and_no_descriptor_open(tmp_path: Path) -> None:
    material = ensure_certificate(tmp_path / "tls", "127.0.0.1").material()
    before = set(os.listdir("/proc/self/fd"))
    context = server_context(material)
    assert set(os.listdir("/proc/self/fd")) == before
    assert context.get_ca_certs() == []
