"""Files of reviews and of plain objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bulkhead.service.admission import Stage, read_question
from bulkhead.service.plainobject import Request
from bulkhead.service.reviewfile import BadReviewFile, SavedReview, read_reviews
from bulkhead.service.rules import Target
from tests.support.served import REVIEWS

TOKEN = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "t"}}
POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {}}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Reads what a file of this text holds."""

    def reads(content: Any, request: Request | None = None, old: Any = None) -> list[SavedReview]:
        path, old_path = tmp_path / "file", tmp_path / "old"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        if old is not None:
            old_path.write_text(json.dumps(old))
        return read_reviews(path, request, None if old is None else old_path)

    return reads


def request_of(review: SavedReview) -> Any:
    return json.loads(review.body)["request"]


# Reviews


def test_a_review_in_json_stays_as_it_was_written(read: Any) -> None:
    text = (
        ' {"kind":"TokenReview", "apiVersion":"authentication.k8s.io/v1beta1","spec":{"token":"t"},"n":1.10}'
    )
    (review,) = read(text)
    assert review.body == text.encode()
    assert (review.kind, review.stage, review.guess) == ("TokenReview", None, "")


@pytest.mark.parametrize("path", sorted(REVIEWS.glob("*.json")), ids=lambda path: path.stem)
def test_reads_recorded_requests(path: Path) -> None:
    (review,) = read_reviews(path)
    recorded = json.loads(path.read_bytes())
    assert json.loads(review.body) == recorded["body"]
    stages = {"admission-mutate": Stage.MUTATING, "admission-validate": Stage.VALIDATING}
    assert review.stage == next((stages[key] for key in stages if path.stem.startswith(key)), None)


def test_the_path_of_a_recorded_request_says_who_was_asked(read: Any) -> None:
    body = json.loads((REVIEWS / "admission-validate-create-pods.json").read_bytes())["body"]
    (review,) = read({"path": "/validate/no-latest?timeout=10s", "headers": {}, "body": body})
    assert (review.stage, review.module) == (Stage.VALIDATING, "no-latest")


def test_takes_documents_and_lists_apart(read: Any) -> None:
    inner = {"apiVersion": "v1", "kind": "List", "items": [POD]}
    listed = {"apiVersion": "v1", "kind": "List", "items": [POD, TOKEN, inner]}
    reviews = read(f"# two\n---\n{json.dumps(POD)}\n---\n{json.dumps(listed)}\n")
    parts = [(review.where.partition(", ")[2], review.kind) for review in reviews]
    assert parts == [
        ("document 1", "AdmissionReview"),
        ("document 2, item 1", "AdmissionReview"),
        ("document 2, item 2", "TokenReview"),
        ("document 2, item 3, item 1", "AdmissionReview"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a review or a Kubernetes object, got nothing"),
        ("null", "got nothing"),
        ("[]", "expected an object, got a list"),
        ("{}", "apiVersion: expected a value, got nothing"),
        ({"kind": "Pod"}, "apiVersion: expected a value, got nothing"),
        ({"apiVersion": "v1", "kind": ""}, "with apiVersion and kind"),
        ('{"kind":"Pod","kind":"Pod"}', 'the key "kind" is there twice'),
        ('{"apiVersion":"v1"', "not JSON"),
        ("a: [", ":1: not YAML"),
        ("a: 1\na: 2", ":2: the key 'a' is there twice"),
        ({**TOKEN, "spec": {}}, "spec.token: expected a string"),
        ({**TOKEN, "apiVersion": "authentication.k8s.io/v2"}, "got TokenReview of authentication.k8s.io/v2"),
        ({"path": "/validate", "body": POD}, "body: expected a review"),
        ({"path": 5, "body": TOKEN}, "path: expected a string, got an integer"),
        ({"apiVersion": "v1", "kind": "List", "items": 5}, "items: expected a list, got an integer"),
        ({"apiVersion": "v1", "kind": "List", "items": [POD, {}]}, "item 2: expected a Kubernetes object"),
        ({"apiVersion": "v1", "kind": "List", "items": []}, "got nothing"),
    ],
)
def test_says_what_is_wrong_with_a_file(read: Any, content: Any, message: str) -> None:
    with pytest.raises(BadReviewFile) as caught:
        read(content)
    assert message in str(caught.value)


def test_says_that_a_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadReviewFile, match="cannot read the file: No such file"):
        read_reviews(tmp_path / "nothing")
    with pytest.raises(BadReviewFile, match="cannot read the file: Is a directory"):
        read_reviews(tmp_path)


# Plain objects


def test_a_plain_object_becomes_the_review_of_its_creation(read: Any) -> None:
    (review,) = read(POD)
    request = request_of(review)
    uid = request.pop("uid")
    assert len(uid) == 36
    pods = {"group": "", "version": "v1", "resource": "pods"}
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    assert request == {
        "kind": kind,
        "resource": pods,
        "requestKind": kind,
        "requestResource": pods,
        "name": "p",
        "namespace": "default",
        "operation": "CREATE",
        "userInfo": {"username": "bulkhead-review", "groups": ["system:authenticated"]},
        "object": {**POD, "metadata": {"name": "p", "namespace": "default"}},
        "oldObject": None,
        "dryRun": False,
        "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    }
    assert review.guess == "resource pods, in namespace default, user bulkhead-review"
    (other,) = read(POD)
    assert request_of(other)["uid"] != uid


def test_what_is_in_an_object_stays_as_it_was_written(read: Any) -> None:
    text = '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c","namespace":"n"},"n":[1.10,1e2]}'
    (review,) = read(text)
    assert text.encode() in review.body


def target(read: Any, content: Any, **request: Any) -> Target:
    (review,) = read(content, Request(**request) if request else None)
    found: Target = read_question(review.body).target
    return found


@pytest.mark.parametrize(
    ("content", "request_", "expected"),
    [
        ({**POD, "metadata": {"name": "p", "namespace": "n"}}, {}, ("pods", "", "n")),
        (POD, {"namespace": "n"}, ("pods", "", "n")),
        (POD, {"cluster_scoped": True}, ("pods", "", "")),
        (POD, {"subresource": "status"}, ("pods", "status", "default")),
        (POD, {"resource": "podz"}, ("podz", "", "default")),
        ({**POD, "kind": "Node"}, {}, ("nodes", "", "")),
        ({**POD, "kind": "Namespace"}, {}, ("namespaces", "", "p")),  # as kube-apiserver sends it
        (
            {"apiVersion": "v1", "kind": "PodExecOptions"},
            {"operation": "CONNECT"},
            ("pods", "exec", "default"),
        ),
    ],
)
def test_options_come_before_guesses(
    read: Any, content: Any, request_: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    found = target(read, content, **request_)
    assert (found.resource, found.subresource, found.namespace) == expected


def test_a_resource_may_be_of_another_group_than_the_object(read: Any) -> None:
    scale = {"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "d"}}
    found = target(read, scale, resource="deployments.v1.apps", subresource="scale")
    assert (found.group, found.version, found.resource, found.subresource) == (
        "apps", "v1", "deployments", "scale",
    )  # fmt: skip


def test_the_user_has_the_group_that_everybody_has(read: Any) -> None:
    (review,) = read(POD, Request(user="ann", groups=("a", "b")))
    assert request_of(review)["userInfo"] == {"username": "ann", "groups": ["a", "b", "system:authenticated"]}
    (review,) = read(POD, Request(user="system:anonymous"))
    assert request_of(review)["userInfo"]["groups"] == ["system:unauthenticated"]


def test_a_deletion_has_the_object_as_the_old_one(read: Any) -> None:
    (review,) = read(POD, Request(operation="DELETE"))
    request = request_of(review)
    assert request["object"] is None
    assert request["oldObject"]["metadata"]["name"] == "p"
    assert request["options"]["kind"] == "DeleteOptions"


def test_an_update_has_both(read: Any) -> None:
    old = {"apiVersion": "v1", "kind": "List", "items": [{**POD, "metadata": {"name": "q"}}, {**POD, "x": 1}]}
    (review,) = read(POD, Request(operation="UPDATE"), old)
    request = request_of(review)
    assert (request["object"].get("x"), request["oldObject"]["x"]) == (None, 1)
    assert request["oldObject"]["metadata"]["namespace"] == "default"


@pytest.mark.parametrize(
    ("content", "request_", "old", "message"),
    [
        (POD, {"operation": "UPDATE"}, None, "needs --old"),
        (POD, {}, POD, "--old: is for --operation UPDATE"),
        (POD, {"operation": "UPDATE"}, {**POD, "metadata": {"name": "q"}}, "has no Pod 'p' of v1"),
        (POD, {"resource": "Pods"}, None, "--resource: expected a plural"),
        ({**POD, "metadata": {"namespace": "n"}}, {"namespace": "m"}, None, "says that it is in 'n'"),
        ({**POD, "kind": "Node"}, {"namespace": "m"}, None, "a Node is in no namespace"),
        (TOKEN, {"user": "ann"}, None, "holds no plain object"),
    ],
)
def test_says_why_no_request_can_be_made(
    read: Any, content: Any, request_: dict[str, Any], old: Any, message: str
) -> None:
    with pytest.raises(BadReviewFile) as caught:
        read(content, Request(**request_), old)
    assert message in str(caught.value)
