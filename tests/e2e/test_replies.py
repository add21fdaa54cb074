"""Replies, read by Kubernetes' own code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc
from tests.support.served import REVIEWS, Served, recorded, serve

pytestmark = pytest.mark.e2e

NAMES = sorted(path.stem for path in REVIEWS.glob("*.json"))


def check(built: Path, exchanges: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What Kubernetes' types and checks find wrong."""
    lines = "".join(json.dumps(exchange) + "\n" for exchange in exchanges)
    done = subprocess.run([built / "replycheck"], input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def over_grpc(served: Served, path: str, body: bytes) -> bytes:
    stub = reviews_pb2_grpc.ReviewServiceStub(served.channel())
    if path.startswith("/authn"):
        return bytes(stub.Authenticate(reviews_pb2.AuthenticateRequest(review=body)).review)
    if path.startswith("/authz"):
        return bytes(stub.Authorize(reviews_pb2.AuthorizeRequest(review=body)).review)
    stage = "MUTATING" if path.startswith("/mutate") else "VALIDATING"
    number = reviews_pb2.AdmissionStage.Value(f"ADMISSION_STAGE_{stage}")
    return bytes(stub.Admit(reviews_pb2.AdmitRequest(review=body, stage=number)).review)


def test_every_recorded_request_gets_a_reply_that_kube_apiserver_takes(built: Path, tmp_path: Path) -> None:
    exchanges = []
    with serve(tmp_path) as served:
        for name in NAMES:
            document = recorded(name)
            path, body = document["path"], json.dumps(document["body"]).encode()
            reply = served.request(path, body)
            assert reply.status == 200
            for transport, answer in (("https", reply.body), ("grpc", over_grpc(served, path, body))):
                exchanges.append(
                    {
                        "name": f"{name} {transport}",
                        "path": path,
                        "request": document["body"],
                        "reply": answer.decode(),
                    }
                )
    assert len(exchanges) == 2 * len(NAMES) > 20
    assert check(built, exchanges) == []


GOOD = {"uid": "1", "allowed": True}


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ({**GOOD, "uid": "2"}, "uid"),
        ({**GOOD, "extra": 1}, "unknown field"),
        ({**GOOD, "allowed": "yes"}, "cannot be read"),
        ({**GOOD, "patchType": "JSONPatch", "patch": "W10="}, "patch"),
    ],
)
def test_the_check_finds_what_is_wrong(built: Path, response: dict[str, Any], problem: str) -> None:
    head = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
    exchange = {
        "name": "bad",
        "path": "/validate",
        "request": {**head, "request": {"uid": "1"}},
        "reply": json.dumps({**head, "response": response}),
    }
    (found,) = check(built, [exchange])
    assert problem in found["problem"]
