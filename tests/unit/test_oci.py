"""Where artifacts are asked for, and what their manifests say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bulkhead.service.docker_config import read_docker_config
from bulkhead.service.fetch_error import NotFetched
from bulkhead.service.modulesource import OciSource, parse_source
from bulkhead.service.oci import _Place
from bulkhead.service.oci_manifest import wasm_layer

DIGEST = "sha256:" + "a" * 64
LAYER = {"mediaType": "application/wasm", "digest": DIGEST, "size": 8}


def place(reference: str) -> _Place:
    source = parse_source(f"oci://{reference}@{DIGEST}", Path("/"))
    assert isinstance(source, OciSource)
    return _Place.of(source)


@pytest.mark.parametrize("registry", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_has_many_names(registry: str) -> None:
    found = place(f"{registry}/who:v1")
    assert (found.host, found.repository) == ("registry-1.docker.io", "library/who")
    assert found.names[0] == "https://index.docker.io/v1/"
    assert place(f"{registry}/someone/who").repository == "someone/who"


@pytest.mark.parametrize(
    ("registry", "loopback"),
    [
        ("127.0.0.1:5000", True),
        ("127.0.0.2", True),
        ("localhost", True),
        ("localhost:5000", True),
        ("[::1]:5000", True),
        ("[::1]", True),
        ("localhost.example", False),
        ("127.0.0.1.example:5000", False),
        ("10.0.0.1:5000", False),
        ("registry.example", False),
    ],
)
def test_what_may_go_without_tls(registry: str, loopback: bool) -> None:
    found = place(f"{registry}/a/b")
    assert (found.host, found.is_loopback) == (registry, loopback)


def test_a_manifest_names_one_module() -> None:
    other = {"mediaType": "text/plain", "digest": "sha512:00", "size": 1}
    manifest = {"schemaVersion": 2, "layers": [other, LAYER], "annotations": {"any": "thing"}}
    layer = wasm_layer(json.dumps(manifest).encode())
    assert (layer.digest, layer.size) == (DIGEST, 8)


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (b"<html>", "not one of OCI"),
        (b"[]", "not one of OCI"),
        (b"\xff", "not one of OCI"),
        ({"layers": [{"mediaType": "application/wasm", "size": 8}]}, "not one of OCI"),
        ({"manifests": [LAYER]}, "an index of several artifacts"),
        ({"layers": [LAYER | {"digest": "sha512:00"}]}, "is not sha256"),
        ({"layers": [LAYER | {"digest": f"{DIGEST}/../x"}]}, "is not sha256"),
        ({"layers": [LAYER, LAYER]}, "expected one layer"),
        ({}, "got none"),
    ],
)
def test_manifests_that_name_none(manifest: bytes | dict[str, object], told: str) -> None:
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    with pytest.raises(NotFetched, match=told):
        wasm_layer(data)


def test_dockers_configuration_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    nothing = {"auths": {}, "credHelpers": {}, "credsStore": ""}
    assert read_docker_config().as_read == nothing
    (tmp_path / "config.json").write_text('{"auths": {}, "HttpHeaders": {"User-Agent": "x"}, "psFormat": ""}')
    assert read_docker_config().as_read == nothing


def test_credentials_are_not_shown() -> None:
    assert "auths" not in repr(read_docker_config())
