"""References to modules, as they stand in a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from bulkhead.service.modulesource import (
    FileSource,
    HttpsSource,
    OciSource,
    StoredSource,
    default_name,
    parse_source,
)

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("a/My_policy.wasm", FileSource(Path("/etc/a/My_policy.wasm")), "my-policy"),
        (DIGEST, StoredSource(DIGEST), "sha256-0a0a0a0a0a0a"),
        ("https://host:8443/a/who.wasm?v=1", HttpsSource("https://host:8443/a/who.wasm?v=1"), "who"),
        (
            f"oci://registry.example/a/b-c/who@{DIGEST}",
            OciSource("registry.example", "a/b-c/who", "", DIGEST),
            "who",
        ),
        (f"oci://[::1]:5000/who:v1.0@{DIGEST}", OciSource("[::1]:5000", "who", "v1.0", DIGEST), "who"),
        (f"oci://host:5000/a__b/c--d_e@{DIGEST}", OciSource("host:5000", "a__b/c--d_e", "", DIGEST), "c-d-e"),
    ],
)
def test_says_where_a_module_is(text: str, source: object, name: str) -> None:
    found = parse_source(text, Path("/etc"))
    assert found == source
    assert default_name(found) == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected the path"),
        ("sha256:0A", "64 hexadecimal digits in lower case"),
        ("http://host/who.wasm", "expected a path, sha256"),
        ("https://", "expected https://HOST/PATH"),
        ("https://[/who.wasm", "expected https://HOST/PATH"),
        ("https://host:99999/who.wasm", "expected https://HOST/PATH"),
        ("https://host/who .wasm", "expected https://HOST/PATH"),
        ("https://user:password@host/who.wasm", "without user name and password"),
        ("https://@host/who.wasm", "without user name and password"),
        ("oci://registry.example/who:latest", "what a tag names can change"),
        (f"registry://registry.example/who@{DIGEST}", "in place of registry://"),
        (f"oci://registry.example@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://registry.example/Who@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://registry.example/a/../b@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://registry.example/a//b@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://127.0.0.1:99999/a@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://[:::]/a@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://user:password@host/a@{DIGEST}", "expected oci://REGISTRY/REPOSITORY"),
        (f"oci://registry.example/a@{DIGEST}0", "expected oci://REGISTRY/REPOSITORY"),
    ],
)
def test_what_is_no_reference(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_source(text, Path("/etc"))


def test_what_may_be_secret_is_not_shown() -> None:
    assert str(parse_source("https://host/who.wasm?key=secret#secret", Path("/"))) == "https://host/who.wasm"
