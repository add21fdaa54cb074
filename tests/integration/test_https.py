"""The HTTPS endpoint of a running service, spoken to as kube-apiserver and less friendly clients do."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import pytest

from tests.support.guests import SLEEPING_VALIDATE
from tests.support.kubernetes_types import check_reply
from tests.support.served import REVIEWS, Served, recorded, serve, wait_until

MIB = 1 << 20
TOKEN_REVIEW = {
    "apiVersion": "authentication.k8s.io/v1",
    "kind": "TokenReview",
    "spec": {"token": "magic-token"},
}


def ask(served: Served, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sends a recorded request as it was sent; returns its body and the answer."""
    request = recorded(name)
    body = json.dumps(request["body"]).encode()
    reply = served.request(request["path"], body, headers={"Accept": "application/json, */*"})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/json"
    answer = reply.json
    assert answer["apiVersion"] == request["body"]["apiVersion"]
    assert answer["kind"] == request["body"]["kind"]
    check_reply(request["path"], request["body"], answer)
    return request["body"], answer


def test_authenticates_the_magic_token_with_its_audience(demo: Served) -> None:
    body, answer = ask(demo, "tokenreview-v1-magic-token")
    assert answer["status"] == {
        "authenticated": True,
        "user": {"username": "magic-user", "uid": "0", "groups": ["magic-group"]},
        "audiences": body["spec"]["audiences"],
    }
    assert "magic-token" not in json.dumps(answer)


@pytest.mark.parametrize("name", ["tokenreview-v1-wrong-token", "tokenreview-v1beta1-wrong-token"])
def test_does_not_authenticate_another_token(demo: Served, name: str) -> None:
    _, answer = ask(demo, name)
    assert answer["status"].get("authenticated", False) is False
    assert "error" not in answer["status"]


@pytest.mark.parametrize(
    "path", sorted(REVIEWS.glob("subjectaccessreview-*.json")), ids=lambda path: path.stem
)
def test_allows_configmaps_for_the_magic_group_and_has_no_opinion_otherwise(demo: Served, path: Path) -> None:
    body, answer = ask(demo, path.stem)
    spec = body["spec"]
    groups = spec.get("groups", spec.get("group", []))
    resource = spec.get("resourceAttributes", {}).get("resource")
    expected = resource == "configmaps" and "magic-group" in groups
    assert answer["status"]["allowed"] is expected
    assert not answer["status"].get("denied", False)


@pytest.mark.parametrize(
    "path", sorted(REVIEWS.glob("admission-validate-*.json")), ids=lambda path: path.stem
)
def test_refuses_what_a_config_map_may_not_hold_and_lets_everything_else_pass(
    demo: Served, path: Path
) -> None:
    body, answer = ask(demo, path.stem)
    request, response = body["request"], answer["response"]
    assert response["uid"] == request["uid"]
    assert "patch" not in response
    assert "patchType" not in response
    held = (request.get("object") or {}).get("data", {}) if request["kind"]["kind"] == "ConfigMap" else {}
    assert response["allowed"] is ("not-allowed-value" not in held)
    if not response["allowed"]:
        assert "not-allowed-value" in response["status"]["message"]
        assert response["status"]["code"] >= 400


def test_refuses_a_config_map_with_the_forbidden_key(demo: Served) -> None:
    body = recorded("admission-validate-create-configmaps")["body"]
    body["request"]["object"]["data"]["not-allowed-value"] = "x"
    response = demo.review("/validate", body)["response"]
    assert response["allowed"] is False
    assert "not-allowed-value" in response["status"]["message"]


@pytest.mark.parametrize(
    "name", ["admission-mutate-create-configmaps", "admission-mutate-create-configmaps-dryrun"]
)
def test_patches_a_config_map(demo: Served, name: str) -> None:
    body, answer = ask(demo, name)
    response = answer["response"]
    assert response["allowed"] is True
    assert response["patchType"] == "JSONPatch"
    patch = json.loads(base64.b64decode(response["patch"], validate=True))
    changed = jsonpatch.apply_patch(body["request"]["object"], patch)
    assert changed["data"].pop("magic-value") == "foobar"
    assert changed == body["request"]["object"]


def test_sends_no_patch_for_other_objects(demo: Served) -> None:
    body = recorded("admission-validate-create-pods")["body"]
    response = demo.review("/mutate", body)["response"]
    assert response == {"uid": body["request"]["uid"], "allowed": True}


def test_asks_one_module_only_at_its_own_path(demo: Served) -> None:
    body = recorded("admission-validate-create-configmaps")["body"]
    body["request"]["object"]["data"]["not-allowed-value"] = "x"
    assert demo.review("/validate/magic-validate", body)["response"]["allowed"] is False
    unchanged = recorded("admission-mutate-create-configmaps")["body"]
    assert "patch" in demo.review("/mutate/magic-mutate", unchanged)["response"]
    pod = recorded("admission-validate-create-pods")["body"]
    assert demo.review("/validate/magic-validate", pod)["response"]["allowed"] is True


@pytest.mark.parametrize(
    "path",
    [
        "/validate/magic-mutate",
        "/mutate/magic-validate",
        "/validate/",
        "/validate/a/b",
        "/validate/..",
        "/authn/x",
    ],
)
def test_knows_no_other_modules(demo: Served, path: str) -> None:
    body = json.dumps(recorded("admission-validate-create-pods")["body"]).encode()
    assert demo.request(path, body).status == 404


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/authn", b"", "JSON"),
        ("/authn", b"{", "JSON"),
        ("/authn", b"[]", "object"),
        ("/authn", b'{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview"} x', "JSON"),
        ("/authn", b'{"kind":"TokenReview"}', "apiVersion"),
        ("/authn", b'{"apiVersion":"authentication.k8s.io/v9","kind":"TokenReview","spec":{}}', "v1"),
        ("/authz", json.dumps(TOKEN_REVIEW).encode(), "SubjectAccessReview"),
        ("/validate", b'{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}', "request"),
        ("/validate", b'{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{}}', "uid"),
        ("/authn", b'{"kind":"\xff"}', "UTF-8"),
        ("/authn", b'{"a":1,"a":2}', "a"),
        ("/authn", b'{"a":NaN}', "JSON"),
        ("/authn", b"[" * 100_000, "JSON"),
    ],
)
def test_tells_what_was_expected_of_a_bad_review(demo: Served, path: str, body: bytes, expected: str) -> None:
    reply = demo.request(path, body)
    assert reply.status == 400, reply.body
    assert reply.json["kind"] == "Status"
    assert reply.json["code"] == 400
    assert expected in reply.json["message"]


def test_refuses_other_paths_methods_and_content_types(demo: Served) -> None:
    assert demo.request("/authn/../authz", b"{}").status == 404
    assert demo.request("/", b"{}").status == 404
    assert demo.request("/authn" + "x" * 10_000, b"{}").status in (400, 404, 414)
    wrong_method = demo.request("/authn", None, method="GET")
    assert (wrong_method.status, wrong_method.headers["allow"]) == (405, "POST")
    for content_type in (
        "text/plain",
        "application/json; charset=utf-16",
        "application/x-www-form-urlencoded",
    ):
        assert demo.request("/authn", b"{}", headers={"Content-Type": content_type}).status == 415
    charset = {"Content-Type": "application/json; charset=utf-8"}
    assert demo.request("/authn", json.dumps(TOKEN_REVIEW).encode(), headers=charset).status == 200


def test_never_inflates_a_body(demo: Served) -> None:
    squeezed = gzip.compress(json.dumps(TOKEN_REVIEW).encode())
    reply = demo.request("/authn", squeezed, headers={"Content-Encoding": "gzip"})
    assert reply.status == 415
    assert "Content-Encoding" in reply.json["message"]


def test_refuses_a_timeout_that_is_no_duration(demo: Served) -> None:
    reply = demo.request("/authn?timeout=soon", json.dumps(TOKEN_REVIEW).encode())
    assert reply.status == 400
    assert "timeout" in reply.json["message"]


def test_answers_health_probes(demo: Served) -> None:
    for path in ("/healthz", "/readyz"):
        assert demo.request(path, None, method="GET").status == 200
    assert demo.request("/healthz", b"").status == 405


def test_never_asks_the_client_to_come_back_later(demo: Served) -> None:
    for path, body in (("/authn", b"{"), ("/nowhere", b""), ("/authz", b"{}")):
        assert "retry-after" not in demo.request(path, body).headers


def test_refuses_a_declared_body_over_the_limit_without_reading_it(demo: Served) -> None:
    head = b"POST /authn HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with raw_connection(demo) as connection:
        connection.sendall(head % (8 * MIB + 1))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_refuses_a_chunked_body_as_soon_as_it_is_too_long(demo: Served) -> None:
    head = b"POST /authn HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%s\r\n" % (MIB, b" " * MIB)
    with raw_connection(demo) as connection:
        connection.sendall(head)
        for _ in range(9):  # and it never ends
            connection.sendall(chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_takes_a_body_at_the_limit(demo: Served) -> None:
    body = json.dumps(TOKEN_REVIEW).encode()
    padded = body + b" " * (8 * MIB - len(body))
    assert demo.request("/authn", padded).json["status"]["authenticated"] is True
    assert demo.request("/authn", padded + b" ").status == 413


def test_continues_a_request_that_expects_it(demo: Served) -> None:
    body = json.dumps(TOKEN_REVIEW).encode()
    head = b"POST /authn HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    with raw_connection(demo) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_keeps_a_connection_for_the_next_request(demo: Served) -> None:
    connection = demo.connect()
    body = json.dumps(TOKEN_REVIEW).encode()
    for _ in range(3):
        connection.request("POST", "/authn", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["status"]["authenticated"] is True
    first = connection.sock
    connection.request("POST", "/authn", body, {"Content-Type": "application/json"})
    assert connection.getresponse().read()
    assert connection.sock is first
    connection.close()


def test_refuses_smuggled_lengths(demo: Served) -> None:
    head = b"POST /authn HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with raw_connection(demo) as connection:
        connection.sendall(head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert connection.recv(4096).split()[1] == b"400"


def test_speaks_tls_1_2_and_later_only_and_shows_a_certificate_of_its_authority(demo: Served) -> None:
    with raw_connection(demo) as connection:
        assert connection.version() in ("TLSv1.2", "TLSv1.3")
    stranger = ssl.create_default_context()
    with socket.create_connection(demo.https_address) as plain, pytest.raises(ssl.SSLCertVerificationError):
        stranger.wrap_socket(plain, server_hostname="127.0.0.1")


def raw_connection(served: Served) -> ssl.SSLSocket:
    plain = socket.create_connection(served.https_address, timeout=30)
    return served.tls().wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.fixture(scope="module")
def sleepy(tmp_path_factory: pytest.TempPathFactory, wat: Callable[[str], bytes]) -> Iterator[Served]:
    """A service whose validating module sleeps until it is killed."""
    folder = tmp_path_factory.mktemp("sleepy")
    (folder / "sleep.wasm").write_bytes(wat(SLEEPING_VALIDATE))
    (folder / "bulkhead.yaml").write_text(
        """
admission:
  modules:
    - name: sleeper
      module: sleep.wasm
      rules: [{operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*"]}]
limits: {timeout: 30s}
"""
    )
    with serve(folder, "--config", str(folder / "bulkhead.yaml")) as served:
        yield served


def test_kills_the_run_of_a_client_that_goes_away(sleepy: Served) -> None:
    body = json.dumps(recorded("admission-validate-create-pods")["body"]).encode()
    connection = sleepy.connect()
    connection.request("POST", "/validate", body, {"Content-Type": "application/json"})
    wait_until(lambda: sleepy.runs() == 1, "the run to start")
    connection.close()
    wait_until(lambda: sleepy.runs() == 0, "the run to be killed")
    assert sleepy.request("/healthz", None, method="GET").status == 200


def test_answers_before_the_clients_timeout(sleepy: Served) -> None:
    review = recorded("admission-validate-create-pods")["body"]
    response = sleepy.review("/validate?timeout=1s", review)["response"]
    assert response["allowed"] is False
    assert response["status"]["code"] == 500
    assert "timeout" in response["status"]["message"]
    wait_until(lambda: sleepy.runs() == 0, "the run to be killed")


def test_a_flood_of_connections_does_not_starve_those_that_proceed(demo: Served) -> None:
    """Clients that connect and say nothing hold places, and others are still served."""
    silent = [socket.create_connection(demo.https_address, timeout=30) for _ in range(200)]
    try:
        assert demo.review("/authn", TOKEN_REVIEW)["status"]["authenticated"] is True
    finally:
        for connection in silent:
            connection.close()
    assert demo.request("/healthz", None, method="GET").status == 200


def test_closes_a_connection_whose_handshake_stalls(demo: Served) -> None:
    with socket.create_connection(demo.https_address, timeout=30) as silent:
        assert silent.recv(1) == b""
