"""Certificates of clients: who may ask over HTTPS and gRPC, and what happens when certificates change."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from bulkhead.sandbox import Sandbox
from bulkhead.service.config import Config
from bulkhead.service.grpc_server import GrpcServer
from bulkhead.service.https import HttpsServer
from bulkhead.service.names import ModuleNames
from bulkhead.service.review import Reviewer
from bulkhead.service.tls import TlsMaterial
from bulkhead.v1 import modules_pb2, modules_pb2_grpc, reviews_pb2, reviews_pb2_grpc
from tests.support.certificates import DAY, SERVER, Authority, Pair, PrivateKey
from tests.support.sandboxes import Sandboxes
from tests.support.served import Served, command, serve, wait_until
from tests.support.wat import wat

TOKEN_REVIEW = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "x"}}
BODY = json.dumps(TOKEN_REVIEW).encode()
# Of a request with that body, and one more header.
HEAD = (
    b"POST /authn HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%sContent-Length: "
    + str(len(BODY)).encode()
    + b"\r\n\r\n"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The authorities of a cluster, and a server's certificate."""

    folder: Path
    server_ca: Authority = field(default_factory=lambda: Authority("servers"))
    client_ca: Authority = field(default_factory=lambda: Authority("clients"))

    def material(self, **changes: Any) -> TlsMaterial:
        pair = self.server_ca.server()
        material = TlsMaterial(
            pair.certificate, pair.key, client_ca=self.client_ca.pem, allowed_names=("kube-apiserver",)
        )
        return replace(material, **changes)

    def context(self, pair: Pair | None = None) -> ssl.SSLContext:
        """A client's, with the certificate that it shows."""
        context = ssl.create_default_context(cadata=self.server_ca.pem.decode())
        if pair is not None:
            context.load_cert_chain(*pair.write(self.folder, "client"))
        return context


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Loop:
    """An event loop as the service has one, in a thread of its own: clients of every kind may block."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def sandbox(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    stack = AsyncExitStack()
    sandboxes = Sandboxes(tmp_path_factory.mktemp("wasmtime"))
    folder = tmp_path_factory.mktemp("state")
    yield loop.run(stack.enter_async_context(sandboxes.open(folder)))
    loop.run(stack.aclose())


@pytest.fixture(scope="module")
def reviewer(loop: Loop, sandbox: Sandbox) -> Reviewer:
    return loop.run(Reviewer.open(Config(), sandbox))


class Https:
    """An HTTPS server, and what speaks to it."""

    def __init__(self, server: HttpsServer, loop: Loop, world: World) -> None:
        self._server = server
        self._loop = loop
        self._world = world
        self._connections: list[Connection] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        loop.run(self._start(listener, world.material()))

    async def _start(self, listener: socket.socket, tls: TlsMaterial) -> None:
        self._server.start(listener, tls)

    def set_tls(self, tls: TlsMaterial | None) -> None:
        self._loop.run(self._server.set_tls(tls))

    def stop(self) -> None:
        self._loop.run(self._server.stop(10.0))

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.stop()

    def connection(self, pair: Pair | None = None) -> Connection:
        context = self._world.context(pair)
        return self._keep(http.client.HTTPSConnection(*self.address, context=context, timeout=20))

    def plain_connection(self) -> Connection:
        return self._keep(http.client.HTTPConnection(*self.address, timeout=20))

    def _keep(self, connection: http.client.HTTPConnection) -> Connection:
        self._connections.append(Connection(connection))
        return self._connections[-1]

    def raw(self, pair: Pair | None) -> ssl.SSLSocket:
        plain = socket.create_connection(self.address, timeout=20)
        return self._world.context(pair).wrap_socket(plain, server_hostname="127.0.0.1")

    def ask(self, pair: Pair | None = None, path: str = "/authn") -> tuple[int, Any]:
        """One request on a connection of its own."""
        return self.connection(pair).ask(path)


class Connection:
    """One connection, kept open as kube-apiserver does."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self.closes = False
        self.server_certificate: bytes | None = None

    def ask(self, path: str = "/authn") -> tuple[int, Any]:
        """Sends a review, or asks for its health."""
        method, body = ("GET", None) if path.endswith("z") else ("POST", BODY)
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        if isinstance(self._connection.sock, ssl.SSLSocket):
            self.server_certificate = self._connection.sock.getpeercert(binary_form=True)
        response = self._connection.getresponse()
        data = response.read()
        self.closes = (response.getheader("Connection") or "").lower() == "close"
        return response.status, json.loads(data) if data.startswith(b"{") else data

    def ended(self) -> bool:
        """Whether the server closes the connection; waits for that."""
        return bool(self._connection.sock.recv(1) == b"")

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def https(loop: Loop, reviewer: Reviewer, world: World) -> Iterator[Https]:
    """Asks for a certificate of the client authority; allows `kube-apiserver`."""
    https = Https(HttpsServer(reviewer, max_body_bytes=1 << 20, max_in_flight=10), loop, world)
    yield https
    https.close()


def unproven(world: World, fault: str) -> Pair:
    """A certificate that does not prove who its client is."""
    if fault == "another authority":
        return Authority("clients").client("kube-apiserver")
    if fault == "expired":
        return world.client_ca.issue("kube-apiserver", lasting=-DAY)
    if fault == "for servers":
        return world.client_ca.issue("kube-apiserver", purposes=(SERVER,))
    assert fault == "of the server's authority"
    return world.server_ca.client("kube-apiserver")


def message(body: Any, reason: str, code: int) -> str:
    """The message of a Kubernetes Status."""
    assert (body["kind"], body["apiVersion"], body["status"]) == ("Status", "v1", "Failure")
    assert (body["reason"], body["code"]) == (reason, code)
    return str(body["message"])


@pytest.mark.parametrize(
    ("common_name", "names", "allowed"),
    [
        ("kube-apiserver", [], "kube-apiserver"),
        ("", ["apiserver.example"], "apiserver.example"),
        ("another", ["spiffe://cluster.local/apiserver"], "spiffe://cluster.local/apiserver"),
        ("", ["10.0.0.1"], "10.0.0.1"),
        ("", ["fd00::1"], "fd00::1"),
        ("", ["admin@example.org"], "admin@example.org"),
    ],
)
def test_answers_clients_of_allowed_names(
    https: Https, world: World, common_name: str, names: list[str], allowed: str
) -> None:
    https.set_tls(world.material(allowed_names=("someone else", allowed)))
    client = world.client_ca.client(common_name, *names)
    status, body = https.ask(client)
    assert (status, body["status"]) == (200, {"authenticated": False})
    https.set_tls(world.material(allowed_names=("someone else",)))
    status, body = https.ask(client)
    assert message(body, "Forbidden", 403) == "the names in the client certificate are not among allowedNames"


@pytest.mark.parametrize("name", ["Kube-apiserver", "kube-apiserver.example", "kube-apiserve", "*"])
def test_names_have_to_be_equal(https: Https, world: World, name: str) -> None:
    assert (https.ask(world.client_ca.client(name)))[0] == 403


def test_any_client_of_the_authority_may_ask_where_no_names_are_set(https: Https, world: World) -> None:
    https.set_tls(world.material(allowed_names=()))
    assert (https.ask(world.client_ca.client("anybody")))[0] == 200
    assert (https.ask())[0] == 401


def test_clients_without_a_certificate_learn_only_whether_it_is_healthy(https: Https) -> None:
    assert https.ask(path="/healthz") == (200, b"ok\n")
    assert https.ask(path="/readyz") == (200, b"ok\n")
    for path in ("/authn", "/authz", "/validate", "/mutate/x", "/no-such-path", "/healthz/authn"):
        _, body = https.ask(path=path)
        assert "expected a client certificate" in message(body, "Unauthorized", 401), path


def test_refuses_before_the_body_is_sent(https: Https, world: World) -> None:
    for pair, expected in ((None, b" 401 "), (world.client_ca.client("another"), b" 403 ")):
        with https.raw(pair) as connection:
            connection.sendall(HEAD % b"")
            assert expected in connection.recv(4096)


@pytest.mark.parametrize(
    "fault", ["another authority", "expired", "for servers", "of the server's authority"]
)
def test_certificates_that_prove_nothing_end_in_the_handshake(https: Https, world: World, fault: str) -> None:
    pair = unproven(world, fault)
    for path in ("/authn", "/healthz"):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            https.ask(pair, path)


def test_verifies_through_intermediate_authorities(https: Https, world: World) -> None:
    intermediate = Authority("intermediate", issuer=world.client_ca)
    assert (https.ask(intermediate.client("kube-apiserver")))[0] == 200
    # The bundle may as well have the intermediate authority only.
    https.set_tls(world.material(client_ca=intermediate.pem))
    assert (https.ask(intermediate.client("kube-apiserver")))[0] == 200
    with pytest.raises((ssl.SSLError, ConnectionError)):
        https.ask(world.client_ca.client("kube-apiserver"))


def test_shows_its_intermediate_authorities(https: Https, world: World) -> None:
    pair = Authority("intermediate", issuer=world.server_ca).server()
    https.set_tls(world.material(certificate=pair.certificate, key=pair.key))
    assert (https.ask(world.client_ca.client("kube-apiserver")))[0] == 200


def test_a_new_certificate_is_for_new_connections_and_open_ones_go_on(https: Https, world: World) -> None:
    client = world.client_ca.client("kube-apiserver")
    old = https.connection(client)
    assert (old.ask())[0] == 200
    shown = old.server_certificate
    https.set_tls(world.material())
    assert (old.ask())[0] == 200
    assert not old.closes
    assert old.server_certificate == shown
    new = https.connection(client)
    assert (new.ask())[0] == 200
    assert new.server_certificate != shown


def test_new_names_are_for_open_connections_too(https: Https, world: World) -> None:
    connection = https.connection(world.client_ca.client("kube-apiserver"))
    assert (connection.ask())[0] == 200
    https.set_tls(world.material(allowed_names=("another",)))
    assert (connection.ask())[0] == 403
    connection.close()
    other = https.connection(world.client_ca.client("kube-apiserver"))
    assert (other.ask())[0] == 403


def test_closes_connections_of_an_authority_that_is_trusted_no_more(https: Https, world: World) -> None:
    new_authority = Authority("new clients")
    old, unknown = https.connection(world.client_ca.client("kube-apiserver")), https.connection()
    assert (old.ask())[0] == 200
    assert (unknown.ask("/healthz"))[0] == 200
    # Both are trusted while clients change over: nobody is disturbed.
    https.set_tls(world.material(client_ca=world.client_ca.pem + new_authority.pem))
    assert (old.ask())[0] == 200
    assert not old.closes
    changed = https.connection(new_authority.client("kube-apiserver"))
    assert (changed.ask())[0] == 200
    https.set_tls(world.material(client_ca=new_authority.pem))
    assert old.ended()
    assert unknown.ended()
    assert (https.ask(new_authority.client("kube-apiserver")))[0] == 200
    with pytest.raises((ssl.SSLError, ConnectionError)):
        https.ask(world.client_ca.client("kube-apiserver"))


def test_a_review_that_has_begun_is_answered_when_its_authority_goes(https: Https, world: World) -> None:
    with https.raw(world.client_ca.client("kube-apiserver")) as connection:
        connection.sendall(HEAD % b"Expect: 100-continue\r\n")
        assert b" 100 " in connection.recv(4096)
        https.set_tls(world.material(client_ca=Authority("new").pem))
        connection.sendall(BODY)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b" 200 OK" in answer
    assert b"Connection: close" in answer


def test_a_review_whose_body_arrives_while_the_server_stops_is_answered(https: Https, world: World) -> None:
    client = world.client_ca.client("kube-apiserver")
    idle = https.connection(client)
    assert idle.ask()[0] == 200
    with https.raw(client) as connection:
        connection.sendall(HEAD % b"Expect: 100-continue\r\n")
        assert b" 100 " in connection.recv(4096)
        stopping = threading.Thread(target=https.stop)
        stopping.start()
        assert idle.ended()
        connection.sendall(BODY)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        stopping.join()
    assert b" 200 OK" in answer
    assert b"Connection: close" in answer


def test_an_open_connection_does_not_outlive_its_certificate(https: Https, world: World) -> None:
    expiring = world.client_ca.issue("kube-apiserver", lasting=DAY / 86400 * 3)
    connection = https.connection(expiring)
    assert connection.ask()[0] == 200
    answers: list[tuple[int, Any]] = []
    wait_until(lambda: answers.append(connection.ask()) or answers[-1][0] != 200, "its end")  # type: ignore[func-returns-value]
    assert "has expired" in message(answers[-1][1], "Unauthorized", 401)
    assert connection.closes


def test_a_connection_from_before_certificates_were_asked_for_is_closed(https: Https, world: World) -> None:
    https.set_tls(world.material(client_ca=None, allowed_names=()))
    connection = https.connection()
    assert (connection.ask())[0] == 200
    https.set_tls(world.material())
    assert connection.ended()


def test_from_plaintext_to_tls_and_back(https: Https, world: World) -> None:
    https.set_tls(None)
    plain = https.plain_connection()
    assert (plain.ask())[0] == 200
    https.set_tls(world.material())
    assert plain.ended()
    assert (https.ask(world.client_ca.client("kube-apiserver")))[0] == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_resumed_session_has_its_certificate(https: Https, world: World, version: ssl.TLSVersion) -> None:
    context = world.context(world.client_ca.client("kube-apiserver"))
    context.maximum_version = version
    session = None
    for expected in (b" 200 OK", b" 200 OK", b" 403 Forbidden"):
        if b"403" in expected:
            https.set_tls(world.material(allowed_names=("another",)))
        plain = socket.create_connection(https.address, timeout=20)
        with context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as connection:
            connection.sendall(HEAD % b"" + BODY)
            assert expected in connection.recv(4096)
            # New certificates are never met with an old session.
            assert connection.session_reused is (session is not None and b"200" in expected)
            session = connection.session


class Grpc:
    """A gRPC server, and what speaks to it."""

    def __init__(
        self, server: GrpcServer, loop: Loop, world: World, tls: TlsMaterial | None, host: str = "127.0.0.1"
    ) -> None:
        self._server = server
        self._loop = loop
        self._world = world
        self._channels: list[grpc.Channel] = []
        self.port = loop.run(server.start(host, 0, tls))

    def set_tls(self, tls: TlsMaterial | None) -> None:
        self._loop.run(self._server.set_tls(tls))

    def stop(self) -> None:
        for channel in self._channels:
            channel.close()
        self._loop.run(self._server.stop(1.0))

    def channel(self, pair: Pair | None = None, *, trusting: Authority | None = None) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(
            (trusting or self._world.server_ca).pem,
            None if pair is None else pair.key,
            None if pair is None else pair.certificate,
        )
        return self._keep(grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, OWN_CONNECTION))

    def plain_channel(self) -> grpc.Channel:
        return self._keep(grpc.insecure_channel(f"127.0.0.1:{self.port}", OWN_CONNECTION))

    def _keep(self, channel: grpc.Channel) -> grpc.Channel:
        self._channels.append(channel)
        return channel


# Otherwise channels to one address share a connection.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


@pytest.fixture
def grpc_server(reviewer: Reviewer, sandbox: Sandbox, loop: Loop) -> GrpcServer:
    async def make() -> GrpcServer:
        return GrpcServer(reviewer, sandbox, ModuleNames(()), max_body_bytes=1 << 20, max_in_flight=10)

    return loop.run(make())


@pytest.fixture
def service(grpc_server: GrpcServer, loop: Loop, world: World) -> Iterator[Grpc]:
    """Asks for a certificate of the client authority; allows `kube-apiserver`, and `admin` as admin."""
    service = Grpc(grpc_server, loop, world, world.material(admin_names=("admin",)))
    yield service
    service.stop()


def review(channel: grpc.Channel) -> bool:
    stub = reviews_pb2_grpc.ReviewServiceStub(channel)
    answer = stub.Authenticate(reviews_pb2.AuthenticateRequest(review=BODY), timeout=20)
    return b'"authenticated":false' in answer.review


def healthy(channel: grpc.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def put(channel: grpc.Channel) -> str:
    stub = modules_pb2_grpc.ModuleServiceStub(channel)
    module = wat('(module (memory (export "memory") 1) (func (export "_start")))')
    return str(stub.Put(iter([modules_pb2.PutRequest(chunk=module)]), timeout=20).module.digest)


def delete(channel: grpc.Channel, digest: str) -> None:
    stub = modules_pb2_grpc.ModuleServiceStub(channel)
    stub.Delete(modules_pb2.DeleteRequest(digest=digest), timeout=20)


def refusal(call: Callable[[], object]) -> tuple[str, str, str]:
    """Status, reason and message of a call that the server refuses."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    info = error_details_pb2.ErrorInfo()
    detail: any_pb2.Any = status.details[0]
    assert detail.Unpack(info)
    assert info.domain == "bulkhead"
    return caught.value.code().name, info.reason, status.message


def unavailable(call: Callable[[], object]) -> bool:
    """Whether there is no connection to make the call on."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return bool(caught.value.code() is grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("common_name", "names"),
    [
        ("kube-apiserver", []),
        ("", ["kube-apiserver"]),
        ("another", ["spiffe://cluster.local/client"]),
        ("", ["10.0.0.1"]),
        ("", ["fd00::1"]),
        ("", ["someone@example.org"]),
        ("admin", []),
    ],
)
def test_grpc_answers_clients_of_allowed_names(
    service: Grpc, world: World, common_name: str, names: list[str]
) -> None:
    channel = service.channel(world.client_ca.client(common_name, *names))
    service.set_tls(world.material(allowed_names=(common_name or "x", *names), admin_names=("admin",)))
    assert review(channel)
    service.set_tls(world.material(allowed_names=("another one",)))
    code, reason, text = refusal(lambda: review(channel))
    assert (code, reason) == ("PERMISSION_DENIED", "NOT_ALLOWED")
    assert text == "the names in the client certificate are not among allowedNames"


def test_grpc_health_is_for_every_client_of_the_authority_and_reflection_is_not(
    service: Grpc, world: World
) -> None:
    channel = service.channel(world.client_ca.client("somebody"))
    assert healthy(channel)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()

    def reflect(channel: grpc.Channel) -> list[Any]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        return list(stub.ServerReflectionInfo(iter([request]), timeout=20))

    assert refusal(lambda: reflect(channel))[1] == "NOT_ALLOWED"
    assert reflect(service.channel(world.client_ca.client("kube-apiserver")))


@pytest.mark.parametrize("fault", ["none", "another authority", "expired", "for servers"])
def test_grpc_clients_without_a_good_certificate_do_not_connect(
    service: Grpc, world: World, fault: str
) -> None:
    pair = None if fault == "none" else unproven(world, fault)
    channel = service.channel(pair)
    assert unavailable(lambda: healthy(channel))
    assert unavailable(lambda: review(channel))


def test_grpc_verifies_through_intermediate_authorities(service: Grpc, world: World) -> None:
    intermediate = Authority("intermediate", issuer=world.client_ca)
    assert review(service.channel(intermediate.client("kube-apiserver")))
    service.set_tls(world.material(client_ca=intermediate.pem))
    assert review(service.channel(intermediate.client("kube-apiserver")))
    direct = service.channel(world.client_ca.client("kube-apiserver"))
    assert unavailable(lambda: review(direct))


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())],
    ids=["RSA", "P-384"],
)
def test_grpc_knows_these_keys(service: Grpc, world: World, key: PrivateKey) -> None:
    pair = world.server_ca.issue("x", ["127.0.0.1"], key=key)
    service.set_tls(world.material(certificate=pair.certificate, key=pair.key))
    assert review(service.channel(world.client_ca.issue("kube-apiserver", key=key)))


def test_only_admins_put_and_delete_modules(service: Grpc, world: World) -> None:
    admin = service.channel(world.client_ca.client("admin"))
    other = service.channel(world.client_ca.client("kube-apiserver"))
    digest = put(admin)
    text = "only clients that adminNames in the section server.grpc names may do this"
    assert refusal(lambda: put(other)) == ("PERMISSION_DENIED", "NOT_ADMIN", text)
    assert refusal(lambda: delete(other, digest)) == ("PERMISSION_DENIED", "NOT_ADMIN", text)
    stub = modules_pb2_grpc.ModuleServiceStub(other)
    assert stub.Inspect(modules_pb2.InspectRequest(module=digest)).module.digest == digest
    delete(admin, digest)


def test_nobody_is_admin_where_clients_have_no_names(service: Grpc, world: World) -> None:
    service.set_tls(world.material(client_ca=None, allowed_names=()))
    channel = service.channel()
    assert review(channel)
    code, reason, text = refusal(lambda: put(channel))
    assert (code, reason) == ("PERMISSION_DENIED", "NOT_ADMIN")
    assert "set clientCA and adminNames" in text


def test_in_plaintext_everybody_on_this_machine_is_admin_and_nobody_elsewhere(
    reviewer: Reviewer, sandbox: Sandbox, loop: Loop, world: World, service: Grpc, grpc_server: GrpcServer
) -> None:
    service.set_tls(None)
    channel = service.plain_channel()
    assert review(channel)
    delete(channel, put(channel))
    service.stop()

    async def make() -> GrpcServer:
        return GrpcServer(reviewer, sandbox, ModuleNames(()), max_body_bytes=1 << 20, max_in_flight=10)

    everywhere = Grpc(loop.run(make()), loop, world, None, host="0.0.0.0")
    channel = everywhere.plain_channel()
    assert review(channel)
    assert refusal(lambda: put(channel))[1] == "NOT_ADMIN"
    everywhere.stop()


def test_grpc_shows_a_new_certificate_to_new_connections_and_open_ones_go_on(
    service: Grpc, world: World
) -> None:
    client = world.client_ca.client("kube-apiserver")
    new_authority = Authority("new servers")
    old = service.channel(client)
    assert review(old)
    pair = new_authority.server()
    for _ in range(2):
        service.set_tls(world.material(certificate=pair.certificate, key=pair.key))
    assert review(old)
    assert review(service.channel(client, trusting=new_authority))
    stranger = service.channel(client)
    assert unavailable(lambda: review(stranger))
    assert review(old)


def test_grpc_clients_of_an_authority_that_is_trusted_no_more_are_cut_off(
    service: Grpc, world: World
) -> None:
    new_authority = Authority("new clients")
    old = service.channel(world.client_ca.client("kube-apiserver"))
    assert review(old)
    service.set_tls(world.material(client_ca=world.client_ca.pem + new_authority.pem))
    changed = service.channel(new_authority.client("kube-apiserver"))
    assert review(old)
    assert review(changed)
    port = service.port
    service.set_tls(world.material(client_ca=new_authority.pem))
    assert unavailable(lambda: review(old))
    assert review(changed), "it connects again"
    assert service.port == port
    assert review(service.channel(new_authority.client("kube-apiserver")))


def test_grpc_from_plaintext_to_tls_and_back(service: Grpc, world: World) -> None:
    client = world.client_ca.client("kube-apiserver")
    for _ in range(3):
        service.set_tls(None)
        assert review(service.plain_channel())
        service.set_tls(world.material())
        assert review(service.channel(client))


@dataclass(frozen=True, slots=True)
class Files:
    """A configuration of both front ends with certificates of clients, as it lies in a folder."""

    folder: Path
    server_ca: Authority = field(default_factory=lambda: Authority("servers"))
    client_ca: Authority = field(default_factory=lambda: Authority("clients"))

    def write(self) -> Path:
        """Writes it, with a new certificate of the server; returns the configuration's path."""
        self.server_ca.server().write(self.folder)
        (self.folder / "client-ca.crt").write_bytes(self.client_ca.pem)
        tls = "certificate: tls.crt, key: tls.key, clientCA: client-ca.crt"
        (self.folder / "bulkhead.yaml").write_text(
            f"server:\n"
            f"  https: {{{tls}, allowedNames: [kube-apiserver]}}\n"
            f"  grpc: {{{tls}, allowedNames: [kube-apiserver], adminNames: [admin]}}\n"
        )
        return self.folder / "bulkhead.yaml"

    def context(self, pair: Pair | None) -> ssl.SSLContext:
        return World(self.folder, self.server_ca, self.client_ca).context(pair)

    def status(self, served: Served, pair: Pair | None) -> tuple[int, bytes]:
        """The status of a review, and the server's certificate."""
        address = served.https_address
        connection = http.client.HTTPSConnection(*address, context=self.context(pair), timeout=20)
        client = Connection(connection)
        try:
            status, _ = client.ask()
        finally:
            client.close()
        assert client.server_certificate is not None
        return status, client.server_certificate

    def channel(self, served: Served, pair: Pair) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self.server_ca.pem, pair.key, pair.certificate)
        return grpc.secure_channel(served.ready["grpcAddress"], credentials, OWN_CONNECTION)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def served(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), "--config", str(files.write())) as served:
        yield served


def test_serve_asks_for_certificates_as_it_is_configured(served: Served, files: Files) -> None:
    assert files.status(served, None)[0] == 401
    assert files.status(served, files.client_ca.client("another"))[0] == 403
    assert files.status(served, files.client_ca.client("kube-apiserver"))[0] == 200
    with files.channel(served, files.client_ca.client("kube-apiserver")) as channel:
        assert review(channel)
        assert refusal(lambda: put(channel))[1] == "NOT_ADMIN"
    with files.channel(served, files.client_ca.client("admin")) as channel:
        delete(channel, put(channel))
    with files.channel(served, files.client_ca.client("another")) as channel:
        assert refusal(lambda: review(channel))[1] == "NOT_ALLOWED"


def test_serve_takes_new_certificates_as_soon_as_they_are_there(served: Served, files: Files) -> None:
    client = files.client_ca.client("kube-apiserver")
    _, before = files.status(served, client)
    with files.channel(served, client) as channel:
        assert review(channel)
        files.server_ca.server().write(files.folder)
        wait_until(lambda: files.status(served, client)[1] != before, "the new certificate")
        assert review(channel)
    assert files.status(served, client)[0] == 200


def test_serve_keeps_its_certificate_when_the_new_one_is_no_good(served: Served, files: Files) -> None:
    client = files.client_ca.client("kube-apiserver")
    _, before = files.status(served, client)
    key = (files.folder / "tls.key").read_bytes()
    (files.folder / "tls.key").write_bytes(files.server_ca.server().key)
    wait_until(lambda: "the key does not fit the certificate" in served.log(), "the complaint")
    assert files.status(served, client) == (200, before)
    (files.folder / "tls.key").write_bytes(key)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("tls.key", "bulkhead.yaml:2: server.https.key: cannot read the key: expected PEM"),
        ("tls.crt", "bulkhead.yaml:2: server.https.certificate: cannot read the certificate: expected PEM"),
        ("client-ca.crt", "bulkhead.yaml:2: server.https.clientCA: cannot read the bundle"),
    ],
)
def test_serve_refuses_certificates_that_are_no_good(tmp_path: Path, damage: str, complaint: str) -> None:
    files = Files(tmp_path)
    config = files.write()
    (tmp_path / damage).write_text("nothing")
    line = command("serve", "--config", str(config), "--state-dir", str(tmp_path / "state"))
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr
