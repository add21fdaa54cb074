"""The gRPC API of a running service."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import jsonpatch
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from bulkhead.v1 import (
    modules_pb2,
    modules_pb2_grpc,
    reviews_pb2,
    reviews_pb2_grpc,
    sandbox_pb2,
    sandbox_pb2_grpc,
)
from tests.support.guests import ECHO, ENDINGS
from tests.support.kubernetes_types import check_reply
from tests.support.served import REVIEWS, Served, recorded, wait_until

SERVICES = {"bulkhead.v1.ReviewService", "bulkhead.v1.SandboxService", "bulkhead.v1.ModuleService"}


@pytest.fixture(scope="module")
def reviews(demo: Served) -> reviews_pb2_grpc.ReviewServiceStub:
    return reviews_pb2_grpc.ReviewServiceStub(demo.channel())


@pytest.fixture(scope="module")
def sandbox(demo: Served) -> sandbox_pb2_grpc.SandboxServiceStub:
    return sandbox_pb2_grpc.SandboxServiceStub(demo.channel())


@pytest.fixture(scope="module")
def modules(demo: Served) -> modules_pb2_grpc.ModuleServiceStub:
    return modules_pb2_grpc.ModuleServiceStub(demo.channel())


def put(
    modules: modules_pb2_grpc.ModuleServiceStub, data: bytes, *, digest: str = "", chunk: int = 1 << 16
) -> modules_pb2.PutResponse:
    def parts() -> Iterator[modules_pb2.PutRequest]:
        if digest:
            yield modules_pb2.PutRequest(header=modules_pb2.PutHeader(expected_digest=digest))
        for at in range(0, len(data), chunk):
            yield modules_pb2.PutRequest(chunk=data[at : at + chunk])

    return modules.Put(parts())


@pytest.fixture(scope="module")
def endings(modules: modules_pb2_grpc.ModuleServiceStub, wat: Callable[[str], bytes]) -> str:
    return put(modules, wat(ENDINGS)).module.digest


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str]:
    """The status, the reason of its ErrorInfo, and the message of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    info = error_details_pb2.ErrorInfo()
    detail: any_pb2.Any = status.details[0]
    assert detail.Unpack(info)
    assert info.domain == "bulkhead"
    return caught.value.code(), info.reason, status.message


# Reviews


def answer(reviews: reviews_pb2_grpc.ReviewServiceStub, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    body = recorded(name)["body"]
    data = json.dumps(body).encode()
    if name.startswith("tokenreview"):
        reply = reviews.Authenticate(reviews_pb2.AuthenticateRequest(review=data)).review
    elif name.startswith("subjectaccessreview"):
        reply = reviews.Authorize(reviews_pb2.AuthorizeRequest(review=data)).review
    else:
        mutating = name.startswith("admission-mutate")
        stage = reviews_pb2.ADMISSION_STAGE_MUTATING if mutating else reviews_pb2.ADMISSION_STAGE_VALIDATING
        reply = reviews.Admit(reviews_pb2.AdmitRequest(review=data, stage=stage)).review
    document = json.loads(reply)
    assert (document["apiVersion"], document["kind"]) == (body["apiVersion"], body["kind"])
    return body, document


@pytest.mark.parametrize("name", sorted(path.stem for path in REVIEWS.glob("*.json")))
def test_answers_every_recorded_request_as_over_https(
    demo: Served, reviews: reviews_pb2_grpc.ReviewServiceStub, name: str
) -> None:
    request = recorded(name)
    _, over_grpc = answer(reviews, name)
    over_https = demo.review(request["path"], request["body"])
    for reply in (over_grpc, over_https):
        check_reply(request["path"], request["body"], reply)
    assert over_grpc == over_https


def test_answers_the_four_kinds_rightly(reviews: reviews_pb2_grpc.ReviewServiceStub) -> None:
    _, token = answer(reviews, "tokenreview-v1-magic-token")
    assert token["status"]["user"]["username"] == "magic-user"
    _, access = answer(reviews, "subjectaccessreview-v1-create-configmaps")
    assert access["status"]["allowed"] is True
    body, mutated = answer(reviews, "admission-mutate-create-configmaps")
    patch = json.loads(base64.b64decode(mutated["response"]["patch"]))
    assert jsonpatch.apply_patch(body["request"]["object"], patch)["data"]["magic-value"] == "foobar"
    _, validated = answer(reviews, "admission-validate-create-pods")
    assert validated["response"]["allowed"] is True


def test_tells_what_was_expected_of_a_bad_review(reviews: reviews_pb2_grpc.ReviewServiceStub) -> None:
    for review in (b"", b"[]", b'{"kind":"TokenReview"}'):
        request = reviews_pb2.AuthorizeRequest(review=review)
        code, reason, message = refusal(partial(reviews.Authorize, request))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REVIEW")
        assert "expected" in message.lower()


def test_asks_one_module_only_when_it_is_named(reviews: reviews_pb2_grpc.ReviewServiceStub) -> None:
    body = json.dumps(recorded("admission-mutate-create-configmaps")["body"]).encode()
    stage = reviews_pb2.ADMISSION_STAGE_MUTATING
    named = reviews_pb2.AdmitRequest(review=body, stage=stage, module="magic-mutate")
    assert "patch" in json.loads(reviews.Admit(named).review)["response"]
    unknown = reviews_pb2.AdmitRequest(review=body, stage=stage, module="magic-validate")
    assert refusal(partial(reviews.Admit, unknown))[:2] == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODULE")


def test_refuses_an_admission_without_a_stage(reviews: reviews_pb2_grpc.ReviewServiceStub) -> None:
    body = json.dumps(recorded("admission-validate-create-pods")["body"]).encode()
    code, _, message = refusal(lambda: reviews.Admit(reviews_pb2.AdmitRequest(review=body)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "ADMISSION_STAGE_MUTATING" in message


def test_refuses_a_message_over_the_limit(reviews: reviews_pb2_grpc.ReviewServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        reviews.Authenticate(reviews_pb2.AuthenticateRequest(review=b" " * (9 << 20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# Runs


def test_executes_any_wasi_module_with_bytes_in_and_out(
    modules: modules_pb2_grpc.ModuleServiceStub,
    sandbox: sandbox_pb2_grpc.SandboxServiceStub,
    wat: Callable[[str], bytes],
) -> None:
    module = put(modules, wat(ECHO)).module
    stdin = bytes(range(256)) * 20
    response = sandbox.Execute(sandbox_pb2.ExecuteRequest(module=module.digest, stdin=stdin))
    assert response.outcome == sandbox_pb2.OUTCOME_OK
    assert response.stdout == stdin
    assert response.module_digest == module.digest
    assert response.usage.wall_time.ToNanoseconds() > 0
    assert response.usage.cpu_time.ToNanoseconds() > 0
    assert response.usage.peak_memory_bytes > 1 << 20
    assert 0 < response.usage.private_memory_bytes <= response.usage.peak_memory_bytes


def test_executes_a_configured_module_by_its_name(sandbox: sandbox_pb2_grpc.SandboxServiceStub) -> None:
    review = (
        b'{"request":{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{"token":"x"}}}'
    )
    request = sandbox_pb2.ExecuteRequest(module="magic-authn", entry_point="authn", stdin=review)
    response = sandbox.Execute(request)
    assert response.outcome == sandbox_pb2.OUTCOME_OK
    assert json.loads(response.stdout)["response"]["status"]["authenticated"] is False


@pytest.mark.parametrize(
    ("entry_point", "limits", "outcome", "exit_code"),
    [
        ("exit", sandbox_pb2.Limits(), sandbox_pb2.OUTCOME_EXIT_NONZERO, 7),
        ("trap", sandbox_pb2.Limits(), sandbox_pb2.OUTCOME_TRAP, 0),
        ("sleep", sandbox_pb2.Limits(wall_time=Duration(nanos=100_000_000)), sandbox_pb2.OUTCOME_TIMEOUT, 0),
        ("spin", sandbox_pb2.Limits(cpu_time=Duration(nanos=50_000_000)), sandbox_pb2.OUTCOME_CPU_LIMIT, 0),
        ("spin", sandbox_pb2.Limits(fuel=10_000), sandbox_pb2.OUTCOME_TRAP, 0),
        ("flood", sandbox_pb2.Limits(stdout_bytes=1000), sandbox_pb2.OUTCOME_STDOUT_LIMIT, 0),
    ],
)
def test_a_failing_module_is_an_outcome_and_not_an_error(
    sandbox: sandbox_pb2_grpc.SandboxServiceStub,
    endings: str,
    entry_point: str,
    limits: sandbox_pb2.Limits,
    outcome: sandbox_pb2.Outcome.ValueType,
    exit_code: int,
) -> None:
    request = sandbox_pb2.ExecuteRequest(module=endings, entry_point=entry_point, limits=limits)
    response = sandbox.Execute(request)
    assert (response.outcome, response.exit_code) == (outcome, exit_code)
    assert response.message


def test_hands_out_the_guests_words_and_none_of_the_runtimes(
    sandbox: sandbox_pb2_grpc.SandboxServiceStub, endings: str
) -> None:
    response = sandbox.Execute(sandbox_pb2.ExecuteRequest(module=endings, entry_point="words"))
    assert response.outcome == sandbox_pb2.OUTCOME_TRAP
    assert response.stderr == b"words of the guest"


def test_refuses_limits_above_the_servers(sandbox: sandbox_pb2_grpc.SandboxServiceStub, endings: str) -> None:
    for limits in (
        sandbox_pb2.Limits(memory_bytes=1 << 40),
        sandbox_pb2.Limits(wall_time=Duration(seconds=3000)),
        sandbox_pb2.Limits(cpu_time=Duration(seconds=2**62)),
        sandbox_pb2.Limits(wall_time=Duration(seconds=1, nanos=-1)),
        sandbox_pb2.Limits(wall_time=Duration(nanos=2_000_000_000)),
    ):
        request = sandbox_pb2.ExecuteRequest(module=endings, entry_point="echo", limits=limits)
        code, reason, message = refusal(partial(sandbox.Execute, request))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert "limit" in message


@pytest.mark.parametrize("module", ["nobody", "", "sha256:" + "0" * 64, "../../etc/passwd", "x" * 10_000])
def test_knows_no_other_modules(sandbox: sandbox_pb2_grpc.SandboxServiceStub, module: str) -> None:
    code, reason, _ = refusal(lambda: sandbox.Execute(sandbox_pb2.ExecuteRequest(module=module)))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODULE")


def test_refuses_an_entry_point_that_is_not_there(
    sandbox: sandbox_pb2_grpc.SandboxServiceStub, endings: str
) -> None:
    code, reason, message = refusal(
        lambda: sandbox.Execute(sandbox_pb2.ExecuteRequest(module=endings, entry_point="--help"))
    )
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NO_ENTRY_POINT")
    assert "echo" in message


def test_a_deadline_or_a_cancelled_call_ends_the_run(
    demo: Served, sandbox: sandbox_pb2_grpc.SandboxServiceStub, endings: str
) -> None:
    request = sandbox_pb2.ExecuteRequest(
        module=endings, entry_point="sleep", limits=sandbox_pb2.Limits(wall_time=Duration(seconds=50))
    )
    call = sandbox.Execute.future(request)
    wait_until(lambda: demo.runs() == 1, "the run to start")
    call.cancel()
    wait_until(lambda: demo.runs() == 0, "the run to be killed")
    with pytest.raises(grpc.RpcError) as caught:
        sandbox.Execute(request, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: demo.runs() == 0, "the run to be killed")


def test_runs_many_at_once(sandbox: sandbox_pb2_grpc.SandboxServiceStub, endings: str) -> None:
    calls = [
        sandbox.Execute.future(
            sandbox_pb2.ExecuteRequest(module=endings, entry_point="echo", stdin=str(number).encode())
        )
        for number in range(100)
    ]
    assert [int(call.result().stdout) for call in calls] == list(range(100))


# Modules


def test_puts_lists_inspects_gets_and_deletes_a_module(
    modules: modules_pb2_grpc.ModuleServiceStub, wat: Callable[[str], bytes]
) -> None:
    data = wat(
        '(module (memory (export "memory") 1) (func (export "once")) (func (export "two") (param i32)))'
    )
    first = put(modules, data, chunk=10)
    assert first.created
    assert not put(modules, data, digest=first.module.digest).created
    digest = first.module.digest
    assert digest in [module.digest for module in modules.List(modules_pb2.ListRequest()).modules]
    module = modules.Inspect(modules_pb2.InspectRequest(module=digest)).module
    assert (module.size_bytes, module.abi) == (len(data), modules_pb2.ABI_WASI_REACTOR)
    exports = {export.name: (export.signature, export.runnable) for export in module.exports}
    assert exports["once"] == ("() -> ()", True)
    assert exports["two"] == ("(i32) -> ()", False)
    got = b"".join(part.chunk for part in modules.Get(modules_pb2.GetRequest(module=digest)))
    assert got == data
    modules.Delete(modules_pb2.DeleteRequest(digest=digest))
    assert refusal(lambda: modules.Inspect(modules_pb2.InspectRequest(module=digest)))[1] == "UNKNOWN_MODULE"
    assert refusal(lambda: modules.Delete(modules_pb2.DeleteRequest(digest=digest)))[1] == "UNKNOWN_MODULE"


def test_lists_in_pages(modules: modules_pb2_grpc.ModuleServiceStub) -> None:
    everything = [module.digest for module in modules.List(modules_pb2.ListRequest()).modules]
    assert everything == sorted(everything)
    paged, token = [], ""
    while True:
        page = modules.List(modules_pb2.ListRequest(page_size=2, page_token=token))
        paged += [module.digest for module in page.modules]
        token = page.next_page_token
        if not token:
            break
    assert paged == everything


def test_knows_configured_modules_by_name_and_keeps_them(modules: modules_pb2_grpc.ModuleServiceStub) -> None:
    module = modules.Inspect(modules_pb2.InspectRequest(module="magic-authz")).module
    assert module.abi == modules_pb2.ABI_K8S_WASM
    assert list(module.names) == ["authorization/magic-authz"]
    code, reason, _ = refusal(lambda: modules.Delete(modules_pb2.DeleteRequest(digest=module.digest)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODULE_IN_USE")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('(module (func (export "run")))', "NO_MEMORY"),
        ('(module (memory (export "memory") 1))', "NO_ENTRY_POINT"),
        ('(module (memory (export "memory") 1) (func (export "authn") (param i32)))', "WRONG_SIGNATURE"),
        (
            '(module (import "env" "f" (func)) (memory (export "memory") 1) (func (export "run")))',
            "UNKNOWN_IMPORT",
        ),
        ('(module (memory (export "memory") 65536) (func (export "run")))', "LIMIT"),
        ('(module (memory (export "memory") i64 1) (func (export "run")))', "UNSUPPORTED_FEATURE"),
    ],
)
def test_refuses_modules_that_nobody_can_run_and_keeps_nothing(
    modules: modules_pb2_grpc.ModuleServiceStub, wat: Callable[[str], bytes], text: str, reason: str
) -> None:
    before = modules.List(modules_pb2.ListRequest(page_size=1000))
    code, told, _ = refusal(lambda: put(modules, wat(text)))
    assert (code, told) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert modules.List(modules_pb2.ListRequest(page_size=1000)) == before


def test_refuses_what_is_not_a_module_too_large_or_another_one(
    modules: modules_pb2_grpc.ModuleServiceStub, wat: Callable[[str], bytes]
) -> None:
    assert refusal(lambda: put(modules, b"(module)"))[1] == "NOT_WASM"
    assert refusal(lambda: put(modules, b""))[1] == "NOT_WASM"
    assert refusal(lambda: put(modules, b"\0asm\1\0\0\0" + b"\0" * (40 << 20)))[1] == "TOO_LARGE"
    assert refusal(lambda: put(modules, wat(ECHO), digest="sha256:" + "0" * 64))[1] == "DIGEST_MISMATCH"
    invalid = wat('(module (memory (export "memory") 1) (func (export "run")))')[:-1] + b"\x41"
    assert refusal(lambda: put(modules, invalid))[1] == "MALFORMED"


# Companions


def test_reports_its_health_and_reflects_its_services(demo: Served) -> None:
    channel = demo.channel()
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        response = health.Check(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(service=service)
        )
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) >= SERVICES
    assert database.FindFileContainingSymbol("bulkhead.v1.ExecuteRequest").name == "bulkhead/v1/sandbox.proto"


def test_threads_may_share_a_channel(demo: Served, endings: str) -> None:
    stub = sandbox_pb2_grpc.SandboxServiceStub(demo.channel())
    outcomes: list[int] = []

    def call() -> None:
        for _ in range(5):
            outcomes.append(
                stub.Execute(sandbox_pb2.ExecuteRequest(module=endings, entry_point="echo")).outcome
            )

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [sandbox_pb2.OUTCOME_OK] * 40
