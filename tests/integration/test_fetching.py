"""Modules by digest, from HTTPS servers and from OCI registries: real servers, on loopback."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from bulkhead.sandbox import Sandbox
from bulkhead.service import fetching
from bulkhead.service.chains import Chains, find_chains
from bulkhead.service.config import ConfigError, load_config
from tests.support.guests import printing
from tests.support.registry import (
    BASIC,
    CONFIG,
    INDEX,
    LAYER,
    LOGIN,
    MANIFEST,
    PASSWORD,
    USER,
    Registry,
    digest_of,
    registry,
)
from tests.support.sandboxes import Sandboxes
from tests.support.served import command

Wat = Callable[[str], bytes]

REPOSITORY = "kubewarden/policies/who"


@pytest.fixture(scope="module")
def module(wat: Wat) -> bytes:
    return wat(printing("authn", "{}"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Trusted, as an operator would have it trusted."""
    with registry(tmp_path / "registry") as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "registry" / "ca.crt"))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        yield server


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Sandboxes:
    return Sandboxes(tmp_path_factory.mktemp("wasmtime"))


@pytest.fixture
async def sandbox(sandboxes: Sandboxes, tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with sandboxes.open(tmp_path / "state") as sandbox:
        yield sandbox


async def load(sandbox: Sandbox, folder: Path, source: str, digest: str = "") -> Chains:
    pin = f", digest: '{digest}'" if digest else ""
    path = folder / "bulkhead.yaml"
    path.write_text(f"authentication: {{modules: [{{name: who, module: '{source}'{pin}}}]}}")
    return await find_chains(load_config(path), sandbox)


async def problem(sandbox: Sandbox, folder: Path, source: str, digest: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        await load(sandbox, folder, source, digest)
    (found,) = caught.value.problems
    assert found.where == "authentication.modules[0].module"
    return found.message


# The store


async def test_a_module_of_the_store(sandbox: Sandbox, tmp_path: Path, module: bytes) -> None:
    info, _ = await sandbox.put(module)
    (found,) = (await load(sandbox, tmp_path, info.digest)).modules
    assert found.digest == info.digest
    assert "no module" in await problem(sandbox, tmp_path, "sha256:" + "0" * 64)


async def test_a_file_may_be_pinned(sandbox: Sandbox, tmp_path: Path, module: bytes) -> None:
    (tmp_path / "who.wasm").write_bytes(module)
    await load(sandbox, tmp_path, "who.wasm", digest_of(module))
    told = await problem(sandbox, tmp_path, "who.wasm", digest_of(b"another"))
    assert f"has digest {digest_of(module)}, not {digest_of(b'another')}" in told


# HTTPS


async def test_from_an_https_server(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    url = server.put_file("/who.wasm", module)
    (found,) = (await load(sandbox, tmp_path, url, digest_of(module))).modules
    assert found.digest == digest_of(module)
    assert found.name == "who"
    await load(sandbox, tmp_path, url, digest_of(module))
    assert server.asked == ["/who.wasm"], "what is in the store is not fetched again"


async def test_no_connection_to_an_https_server(sandbox: Sandbox, tmp_path: Path) -> None:
    told = await problem(sandbox, tmp_path, "https://127.0.0.1:1/who.wasm?key=secret", digest_of(b"x"))
    assert "cannot fetch https://127.0.0.1:1/who.wasm: no connection to 127.0.0.1:1" in told


async def test_redirects_are_followed_within_https(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    server.put_file("/who.wasm", module)
    moved = server.put_file("/moved.wasm", b"", 302, {"Location": "/who.wasm"})
    await load(sandbox, tmp_path, moved, digest_of(module))
    insecure = server.put_file("/insecure.wasm", b"", 302, {"Location": "http://127.0.0.1:1/who.wasm"})
    assert "it redirects to http://" in await problem(sandbox, tmp_path, insecure, digest_of(b"x"))
    nonsense = server.put_file("/nonsense.wasm", b"", 302, {"Location": "https://[?key=secret"})
    told = await problem(sandbox, tmp_path, nonsense, digest_of(b"x"))
    assert "is not a URL" in told or "what is not a URL" in told
    assert "secret" not in told
    for_ever = server.put_file("/round.wasm", b"", 302, {"Location": "/round.wasm"})
    assert "more than 5 redirects" in await problem(sandbox, tmp_path, for_ever, digest_of(b"x"))


async def test_what_arrives_must_have_the_digest(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, wat: Wat
) -> None:
    url = server.put_file("/who.wasm", wat(printing("authn", '{"other": 1}')))
    told = await problem(sandbox, tmp_path, url, digest_of(module))
    assert f"not {digest_of(module)}" in told


async def test_https_servers_that_have_it_not(
    sandbox: Sandbox, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = digest_of(b"x")
    assert "HTTP status 404" in await problem(sandbox, tmp_path, f"{server.url}/no.wasm?key=secret", pin)
    assert "secret" not in await problem(sandbox, tmp_path, f"{server.url}/no.wasm?key=secret", pin)
    server.asked.clear()
    trouble = server.put_file("/trouble.wasm", b"", 503)
    assert "HTTP status 503" in await problem(sandbox, tmp_path, trouble, pin)
    assert len(server.asked) == 3, "it may pass"
    big = server.put_file("/big.wasm", bytes(33 << 20))
    assert "more than 32Mi" in await problem(sandbox, tmp_path, big, pin)
    monkeypatch.setattr(fetching, "_TOTAL_SECONDS", 0.2)
    server.delay_seconds = 1.0
    assert "longer than 0.2 s" in await problem(sandbox, tmp_path, f"{server.url}/big.wasm", pin)


async def test_https_servers_that_nobody_vouches_for(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    url = server.put_file("/who.wasm", module)
    assert "certificate" in (await problem(sandbox, tmp_path, url, digest_of(module))).lower()


# OCI


async def test_from_a_registry(sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes) -> None:
    reference = server.push(REPOSITORY, (LAYER, module))
    (found,) = (await load(sandbox, tmp_path, reference)).modules
    assert found.digest == digest_of(module)
    server.files.clear()
    await load(sandbox, tmp_path, reference)
    assert len(server.asked) == 2, "a restart needs no registry"


async def test_a_registry_without_tls_on_this_machine(
    sandbox: Sandbox, tmp_path: Path, module: bytes
) -> None:
    with registry(tmp_path / "plain", tls=False) as server:
        (found,) = (await load(sandbox, tmp_path, server.push(REPOSITORY, (LAYER, module)))).modules
        assert found.digest == digest_of(module)


def log_in(folder: Path, config: object) -> None:
    (folder / "docker").mkdir(exist_ok=True)
    (folder / "docker" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["{}", "https://{}", "https://{}/v1/"])
@pytest.mark.parametrize("needs", ["token", "login", "basic"])
async def test_credentials_are_those_of_docker(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, needs: str, name: str
) -> None:
    server.needs = needs
    reference = server.push(REPOSITORY, (LAYER, module))
    log_in(tmp_path, {"auths": {name.format(server.host): {"auth": LOGIN}}})
    (found,) = (await load(sandbox, tmp_path, reference)).modules
    assert found.digest == digest_of(module)


async def test_public_artifacts_need_no_credentials(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    server.needs = "token"
    (found,) = (await load(sandbox, tmp_path, server.push(REPOSITORY, (LAYER, module)))).modules
    assert found.digest == digest_of(module)


@pytest.mark.parametrize("needs", ["login", "basic"])
async def test_credentials_that_are_missing_or_wrong(
    sandbox: Sandbox,
    server: Registry,
    tmp_path: Path,
    module: bytes,
    needs: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.needs = needs
    reference = server.push(REPOSITORY, (LAYER, module))
    hint = f"run: docker login {server.host}"
    assert f"we have none; {hint}" in await problem(sandbox, tmp_path, reference)
    wrong = base64.b64encode(b"reader:another-secret").decode()
    log_in(tmp_path, {"auths": {server.host: {"auth": wrong}}})
    assert f"takes none of ours; {hint}" in await problem(sandbox, tmp_path, reference)
    (tmp_path / "docker" / "config.json").write_text(f'{{"auths": "{LOGIN}')
    told = await problem(sandbox, tmp_path, reference)
    assert "config.json, which may have credentials, is not as Docker writes it" in told
    out = "".join(capfd.readouterr())
    assert not any(secret in out + told for secret in (LOGIN, wrong, PASSWORD, "another-secret"))


async def test_credentials_of_a_helper(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.needs = "basic"
    reference = server.push(REPOSITORY, (LAYER, module))
    log_in(tmp_path, {"credHelpers": {server.host: "test"}})
    helper = tmp_path / "docker-credential-test"
    helper.write_text("#!/bin/sh\necho nonsense\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = await problem(sandbox, tmp_path, reference)
    assert f"Docker's credential helper fails for {server.host}" in told
    answer = json.dumps({"Username": USER, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\n[ \"$(cat)\" = {server.host} ] && echo '{answer}'\n")
    await load(sandbox, tmp_path, reference)


async def test_the_folder_in_docker_config_comes_in_place_of_home(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.needs = "basic"
    reference = server.push(REPOSITORY, (LAYER, module))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".docker").mkdir(parents=True)
    (tmp_path / "home" / ".docker" / "config.json").write_text(
        json.dumps({"auths": {server.host: {"auth": LOGIN}}})
    )
    log_in(tmp_path, {})
    assert "we have none" in await problem(sandbox, tmp_path, reference)
    monkeypatch.delenv("DOCKER_CONFIG")
    await load(sandbox, tmp_path, reference)


async def test_netrc_is_for_https_servers_and_not_for_registries(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.needs = "token"
    await load(sandbox, tmp_path, server.push(REPOSITORY, (LAYER, module)))
    assert BASIC not in server.shown
    await problem(sandbox, tmp_path, server.put_file("/other.wasm", b"x"), digest_of(b"y"))
    assert server.shown[-1] == BASIC


async def test_nothing_is_sent_unencrypted(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    """Neither to a server of tokens nor to one of layers, whoever names it."""
    reference = server.push(REPOSITORY, (LAYER, module))
    log_in(tmp_path, {"auths": {server.host: {"auth": LOGIN}}})
    with registry(tmp_path / "plain", tls=False) as plain:
        server.needs, server.realm = "login", f"{plain.url}/token"
        assert "it leads to http://127.0.0.1, expected https" in await problem(sandbox, tmp_path, reference)
        server.needs = ""
        blob_path = next(path for path in server.files if "/blobs/" in path)
        server.files[blob_path] = (307, {"Location": plain.put_file("/blob", module)}, b"")
        assert "it leads to http://127.0.0.1, expected https" in await problem(sandbox, tmp_path, reference)
        assert plain.asked == []


async def test_servers_of_tokens_that_have_none(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    server.needs = "token"
    reference = server.push(REPOSITORY, (LAYER, module))
    for body, told in (
        (b"[]", "no answer that can be understood"),
        (b"<html>", "no answer that can be understood"),
        (b"{}", "the registry wants credentials and we have none"),
    ):
        server.realm = server.put_file("/tokens", body)
        assert told in await problem(sandbox, tmp_path, reference)
    server.realm = "https://127.0.0.1:1/tokens"
    assert "no connection" in await problem(sandbox, tmp_path, reference)


async def test_redirects_of_a_registry_that_lead_nowhere(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    reference = server.push(REPOSITORY, (LAYER, module))
    blob_path = next(path for path in server.files if "/blobs/" in path)
    for location, told in (
        ("https://[?key=secret", "no answer that can be understood"),
        (blob_path, "more than 5 redirects"),
    ):
        server.files[blob_path] = (307, {"Location": location}, b"")
        found = await problem(sandbox, tmp_path, reference)
        assert told in found
        assert "secret" not in found


async def test_layers_may_lie_elsewhere(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    server.needs = "token"
    reference = server.push(REPOSITORY, (LAYER, module))
    blob_path = next(path for path in server.files if "/blobs/" in path)
    # Another name of the same server: another host, to a client.
    elsewhere = server.put_file("/blob", module).replace("127.0.0.1", "localhost")
    server.files[blob_path] = (307, {"Location": elsewhere}, b"")
    await load(sandbox, tmp_path, reference)
    tokens_seen = len(server.shown)
    assert server.asked[-1] == "/blob"
    assert tokens_seen == 2, "manifest and layer are asked for with the token, and the other host is not"


async def test_manifest_and_layer_must_have_their_digests(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, wat: Wat
) -> None:
    reference = server.push(REPOSITORY, (LAYER, module))
    manifest_path = next(path for path in server.files if "/manifests/" in path)
    good = server.files[manifest_path]
    server.files[manifest_path] = (200, {}, good[2] + b" ")
    assert "its manifest has digest" in await problem(sandbox, tmp_path, reference)
    server.files[manifest_path] = good
    blob_path = next(path for path in server.files if "/blobs/" in path)
    server.files[blob_path] = (200, {}, wat(printing("authn", '{"evil": 1}')))
    assert "its module has digest" in await problem(sandbox, tmp_path, reference)
    server.files[blob_path] = (200, {}, module)
    told = await problem(sandbox, tmp_path, reference, digest_of(b"another"))
    assert f"not {digest_of(b'another')}" in told
    await load(sandbox, tmp_path, reference, digest_of(module))
    told = await problem(sandbox, tmp_path, reference, digest_of(b"another"))
    assert f"not {digest_of(b'another')}" in told, "nor does what is stored count as another"


@pytest.mark.parametrize(
    ("layers", "kind", "told"),
    [
        ([], None, "expected one layer of WebAssembly, got none"),
        ([(LAYER, b"a"), (LAYER, b"b")], None, "expected one layer of WebAssembly, got"),
        ([("application/x-tar", b"a")], None, "got application/x-tar"),
        ([(LAYER, b"a")], INDEX, "an index of several artifacts"),
        ([(LAYER, bytes(33 << 20))], None, "its module has 34603008 bytes, more than 32Mi"),
        ([(LAYER, b"not wasm")], None, "module who: "),
    ],
    ids=["none", "two", "tar", "index", "big", "no module"],
)
async def test_artifacts_that_hold_no_module(
    sandbox: Sandbox,
    server: Registry,
    tmp_path: Path,
    layers: list[tuple[str, bytes]],
    kind: str | None,
    told: str,
) -> None:
    reference = server.push(REPOSITORY, *layers, kind=kind or MANIFEST)
    assert told in await problem(sandbox, tmp_path, reference)


@pytest.mark.parametrize(
    "kind", [LAYER, "application/vnd.module.wasm.content.layer.v1+wasm", "application/wasm"]
)
async def test_other_layers_beside_the_module_do_not_matter(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, kind: str
) -> None:
    (found,) = (
        await load(sandbox, tmp_path, server.push(REPOSITORY, (CONFIG, b"{}"), (kind, module)))
    ).modules
    assert found.digest == digest_of(module)


async def test_a_layer_that_is_larger_than_its_manifest_says(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    reference = server.push(REPOSITORY, (LAYER, module))
    blob_path = next(path for path in server.files if "/blobs/" in path)
    server.files[blob_path] = (200, {}, bytes(33 << 20))
    assert "its module has more than" in await problem(sandbox, tmp_path, reference)


async def test_registries_that_have_it_not(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(b"x")
    missing = f"oci://{server.host}/a/b@{digest}"
    assert "HTTP status 404 for its manifest" in await problem(sandbox, tmp_path, missing)
    server.asked.clear()
    server.put_file(f"/v2/a/b/manifests/{digest}", b"", 503)
    assert "HTTP status 503 for its manifest" in await problem(sandbox, tmp_path, missing)
    assert len(server.asked) == 3, "it may pass"
    assert "no connection" in await problem(sandbox, tmp_path, f"oci://127.0.0.1:1/a/b@{digest}")
    monkeypatch.setattr(fetching, "_TOTAL_SECONDS", 0.2)
    server.delay_seconds = 1.0
    told = await problem(sandbox, tmp_path, server.push(REPOSITORY, (LAYER, module)))
    assert "longer than 0.2 s" in told or "no answer in time" in told


async def test_registries_that_nobody_vouches_for(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    reference = server.push(REPOSITORY, (LAYER, module))
    told = await problem(sandbox, tmp_path, reference)
    assert "the certificate cannot be verified; name its authority with SSL_CERT_FILE" in told
    assert server.asked == []
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    assert "none does not exist" in await problem(sandbox, tmp_path, reference)


async def test_without_the_library(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = server.push(REPOSITORY, (LAYER, module))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "oras", None)
        assert "pip install 'bulkhead[oci]'" in await problem(sandbox, tmp_path, reference)
        assert server.asked == []
    await load(sandbox, tmp_path, reference)
    monkeypatch.setitem(sys.modules, "oras", None)
    await load(sandbox, tmp_path, reference)


# What is there already


async def test_a_restart_needs_no_server(
    sandboxes: Sandboxes, tmp_path: Path, module: bytes, wat: Wat, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = wat(printing("authn", '{"other": 1}'))
    with registry(tmp_path / "registry") as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "registry" / "ca.crt"))
        url, reference = server.put_file("/who.wasm", module), server.push(REPOSITORY, (LAYER, other))
        async with sandboxes.open(tmp_path / "state") as sandbox:
            await load(sandbox, tmp_path, url, digest_of(module))
            await load(sandbox, tmp_path, reference)
    async with sandboxes.open(tmp_path / "state") as sandbox:
        await load(sandbox, tmp_path, url, digest_of(module))
        (found,) = (await load(sandbox, tmp_path, reference)).modules
        assert found.digest == digest_of(other)


async def test_damaged_copies_are_replaced(
    sandboxes: Sandboxes, server: Registry, tmp_path: Path, module: bytes
) -> None:
    state = tmp_path / "state"
    url, reference = server.put_file("/who.wasm", module), server.push(REPOSITORY, (LAYER, module))
    for source, digest in ((url, digest_of(module)), (reference, "")):
        async with sandboxes.open(state) as sandbox:
            await load(sandbox, tmp_path, source, digest)
        stored = state / "modules" / "sha256" / f"{digest_of(module).removeprefix('sha256:')}.wasm"
        stored.chmod(0o600)
        stored.write_bytes(b"damaged")
        async with sandboxes.open(state) as sandbox:
            await load(sandbox, tmp_path, source, digest)
        assert stored.read_bytes() == module
    (remembered,) = (state / "oci").iterdir()
    remembered.write_text("sha256:nonsense")
    async with sandboxes.open(state) as sandbox:
        await load(sandbox, tmp_path, reference)
    assert remembered.read_text() == f"{digest_of(module)}\n"


async def test_what_several_modules_share_is_fetched_once(
    sandbox: Sandbox, server: Registry, tmp_path: Path, module: bytes
) -> None:
    url = server.put_file("/who.wasm", module)
    digest = digest_of(module)
    modules = ", ".join(
        f"{{name: m{n}, module: '{url}', digest: '{digest}', settings: {n}}}" for n in range(9)
    )
    path = tmp_path / "bulkhead.yaml"
    path.write_text(f"authentication: {{modules: [{modules}]}}")
    found = await find_chains(load_config(path), sandbox)
    assert [module.digest for module in found.modules] == [digest] * 9
    assert server.asked == ["/who.wasm"]


@pytest.mark.parametrize("kind", ["https", "oci"])
async def test_proxies_of_the_environment_are_used(
    sandbox: Sandbox,
    server: Registry,
    tmp_path: Path,
    module: bytes,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    if kind == "https":
        told = await problem(sandbox, tmp_path, server.put_file("/who.wasm", module), digest_of(module))
        assert "no connection to 127.0.0.1:1" in told
    else:
        told = await problem(sandbox, tmp_path, server.push(REPOSITORY, (LAYER, module)))
        assert "the proxy cannot be used" in told
    assert server.asked == []


# The command line


def test_check_fetches_and_says_what_it_found(server: Registry, tmp_path: Path, module: bytes) -> None:
    url, reference = server.put_file("/who.wasm", module), server.push(REPOSITORY, (LAYER, module))
    (tmp_path / "bulkhead.yaml").write_text(
        f"authentication: {{modules: [{{module: '{url}', digest: '{digest_of(module)}'}},"
        f" {{name: from-registry, module: '{reference}'}},"
        f" {{name: gone, module: 'oci://{server.host}/gone@{digest_of(b'')}'}}]}}"
    )
    line = command(
        "check", "--config", str(tmp_path / "bulkhead.yaml"), "--state-dir", str(tmp_path / "state")
    )
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 2
    assert "module gone: cannot fetch" in done.stderr
    assert "1 problem" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_lists_what_it_has_fetched(server: Registry, tmp_path: Path, module: bytes) -> None:
    url, reference = server.put_file("/who.wasm", module), server.push(REPOSITORY, (LAYER, module))
    (tmp_path / "bulkhead.yaml").write_text(
        f"authentication: {{modules: [{{module: '{url}', digest: '{digest_of(module)}'}},"
        f" {{name: from-registry, module: '{reference}'}}]}}"
    )
    line = command(
        "check", "--config", str(tmp_path / "bulkhead.yaml"), "--state-dir", str(tmp_path / "state")
    )
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(digest_of(module)) == 2
