"""Addresses to listen on: as they are told to people, and where there is nothing to listen on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.served import command, serve


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "localhost"])
def test_what_is_to_be_pasted_works_whatever_it_listens_on(tmp_path: Path, host: str) -> None:
    with serve(tmp_path, "--https-address", f"{host}:0") as served:
        log = served.log()
        snippet = log[log.index("curl --cacert") : log.index("or over gRPC:")]
        environment = {"PATH": os.environ["PATH"]}
        pasted = subprocess.run(["sh", "-c", snippet], capture_output=True, text=True, env=environment)
        assert pasted.returncode == 0, pasted.stderr
        assert json.loads(pasted.stdout)["status"]["authenticated"] is True


@pytest.mark.parametrize("option", ["--https-address", "--grpc-address"])
def test_says_nothing_but_one_line_when_a_port_is_taken(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = command("serve", "--state-dir", str(tmp_path / "state"), "--https-address", "127.0.0.1:0")
        line += ["--grpc-address", "127.0.0.1:0", option, address]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    expected = f"bulkhead: cannot listen on {address}: address already in use; choose another with {option}\n"
    assert done.stderr == expected


def test_says_nothing_but_one_line_when_a_host_is_unknown(tmp_path: Path) -> None:
    line = command("serve", "--state-dir", str(tmp_path), "--https-address", "nobody.invalid:8443")
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("bulkhead: cannot listen on nobody.invalid:8443: ")
    assert "Errno" not in done.stderr
    assert done.stderr.count("\n") == 1
