"""More callers than there is room for: the rest is refused at once, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from bulkhead.service.demo import CONFIGURATION
from bulkhead.v1 import modules_pb2, modules_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc
from tests.support.guests import ENDINGS
from tests.support.served import Served, serve, wait_until

MIB = 1 << 20
ROOM = 5  # one run, four waiting
TOKEN_REVIEW = json.dumps(
    {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "magic-token"}}
).encode()
HEAD = b"POST /authn HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo's modules, with room for few."""
    folder = tmp_path_factory.mktemp("small")
    for module in CONFIGURATION.parent.glob("*.wasm"):
        (folder / module.name).write_bytes(module.read_bytes())
    (folder / "bulkhead.yaml").write_text(
        "authentication: {modules: [{module: magic-authn.wasm}]}\n"
        "limits: {maxConcurrentRuns: 1, maxQueuedRuns: 4}\n"
        "server: {maxBodyBytes: 1Mi}\n"
    )
    with serve(folder, "--config", str(folder / "bulkhead.yaml")) as served:
        yield served


def reason(call: Any) -> str:
    status = rpc_status.from_call(call)
    if status is None or not status.details:
        return ""
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason)


def test_health_and_the_module_store_answer_while_runs_fill_the_queue(
    small: Served, wat: Callable[[str], bytes]
) -> None:
    data = wat(ENDINGS)
    store = modules_pb2_grpc.ModuleServiceStub(small.channel())
    digest = store.Put(iter([modules_pb2.PutRequest(chunk=data)])).module.digest
    request = sandbox_pb2.ExecuteRequest(
        module=digest, entry_point="sleep", limits=sandbox_pb2.Limits(wall_time=Duration(seconds=50))
    )
    stub = sandbox_pb2_grpc.SandboxServiceStub(small.channel())
    calls = [stub.Execute.future(request) for _ in range(30)]
    try:
        wait_until(lambda: sum(call.done() for call in calls) == 30 - ROOM, "the rest to be refused")
        for call in filter(lambda call: call.done(), calls):
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason(call) == "OVERLOADED"
        health = health_pb2_grpc.HealthStub(small.channel())
        checked = health.Check(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        assert store.Inspect(modules_pb2.InspectRequest(module=digest)).module.digest == digest
    finally:
        for call in calls:
            call.cancel()


def test_many_cancelled_at_once_leave_room_and_no_errors_in_the_log(
    small: Served, wat: Callable[[str], bytes]
) -> None:
    store = modules_pb2_grpc.ModuleServiceStub(small.channel())
    digest = store.Put(iter([modules_pb2.PutRequest(chunk=wat(ENDINGS))])).module.digest
    request = sandbox_pb2.ExecuteRequest(
        module=digest, entry_point="sleep", limits=sandbox_pb2.Limits(wall_time=Duration(seconds=50))
    )
    stub = sandbox_pb2_grpc.SandboxServiceStub(small.channel())
    for _ in range(20):
        calls = [stub.Execute.future(request) for _ in range(ROOM)]
        wait_until(lambda: small.runs() > 0, "a run")
        for call in calls:
            call.cancel()
        wait_until(lambda: small.runs() == 0, "no run")
    echo = sandbox_pb2.ExecuteRequest(module=digest, entry_point="echo", stdin=b"x")
    assert stub.Execute(echo, timeout=20).stdout == b"x"
    assert "call_failed" not in small.log()


def test_refuses_to_take_more_modules_at_once_than_fit_into_memory(small: Served) -> None:
    done = threading.Event()

    def endless() -> Iterator[modules_pb2.PutRequest]:
        yield modules_pb2.PutRequest(chunk=b"\0asm")
        done.wait()

    store = modules_pb2_grpc.ModuleServiceStub(small.channel())
    puts = [store.Put.future(endless()) for _ in range(9)]
    try:
        wait_until(lambda: any(put.done() for put in puts), "one to be refused")
        (refused,) = [put for put in puts if put.done()]
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(refused) == "OVERLOADED"
    finally:
        done.set()
        for put in puts:
            put.cancel()


@contextlib.contextmanager
def unfinished(served: Served, count: int, body: bytes, length: int) -> Iterator[list[ssl.SSLSocket]]:
    """Connections whose request's body is never sent to its end."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            plain = socket.create_connection(served.https_address, timeout=30)
            secure = stack.enter_context(served.tls().wrap_socket(plain, server_hostname="127.0.0.1"))
            # Refused already: the answer says it.
            with contextlib.suppress(OSError):
                secure.sendall(HEAD % length + body)
            connections.append(secure)
        yield connections


def test_who_sends_slowly_does_not_take_the_place_of_who_asks(small: Served) -> None:
    with unfinished(small, 4 * ROOM, b"{", 100):
        reply = small.request("/authn", TOKEN_REVIEW)
        assert reply.status == 200, reply.body
        assert reply.json["status"]["authenticated"] is True


def test_holds_only_so_many_large_bodies_in_memory(small: Served) -> None:
    refused: set[int] = set()

    def look(connections: list[ssl.SSLSocket]) -> bool:
        for number, connection in enumerate(connections):
            connection.setblocking(False)
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = connection.recv(4096)
                if number not in refused:
                    assert answer.startswith(b"HTTP/1.1 503 ")
                    assert b"retry-after" not in answer.lower()
                refused.add(number)
        return len(refused) >= 40 - 32 - 1

    with unfinished(small, 40, b" " * (MIB - 1), MIB) as connections:
        wait_until(lambda: look(connections), "those that do not fit to be refused", 9)
        assert len(refused) < 40 - 2 * ROOM, "far more are taken than could be answered at once"
    wait_until(lambda: small.request("/authn", TOKEN_REVIEW).status == 200, "room again")
