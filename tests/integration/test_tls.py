"""The certificate that Bulkhead makes for itself."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from bulkhead.sandbox import SandboxError
from bulkhead.service.tls import TlsFiles, ensure_certificate, server_context


def handshake(files: TlsFiles, name: str) -> None:
    """A client that trusts the authority connects to `name`."""
    ours, theirs = socket.socketpair()
    served: list[BaseException] = []

    def serve() -> None:
        try:
            with server_context(files).wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)
        except (OSError, ssl.SSLError) as error:
            served.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    client = ssl.create_default_context(cafile=str(files.ca_certificate))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            connection.sendall(b"x")
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "bulkhead.example"])
def test_is_good_for_loopback_and_for_the_host(tmp_path: Path, name: str) -> None:
    files = ensure_certificate(tmp_path / "tls", "bulkhead.example")
    handshake(files, name)


def test_is_not_good_for_other_names(tmp_path: Path) -> None:
    files = ensure_certificate(tmp_path / "tls", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "bulkhead.example")


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
    handshake(ensure_certificate(tmp_path / "tls", host), host)
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
