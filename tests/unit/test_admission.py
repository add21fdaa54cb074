"""AdmissionReviews: what is read, how answers are folded, what goes back."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from bulkhead.service.admission import read_question
from bulkhead.service.admission_answer import AdmissionAnswer, read_answer
from bulkhead.service.admission_verdict import (
    MOST_KEY_CHARACTERS,
    MOST_WARNING_CHARACTERS,
    MOST_WARNINGS_BYTES,
    AdmissionVerdict,
    Told,
    ends_chain,
    fold,
    write_patch,
    write_reply,
)
from bulkhead.service.call import Failure, Unreadable
from bulkhead.service.config import FailurePolicy
from bulkhead.service.errors import BadReview, ModuleFailed
from bulkhead.service.rules import Target
from bulkhead.service.strictjson import Mismatch

UID = "f86bef2b-c547-4a72-ac37-6d79ed2b340e"
OBJECT = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "c", "namespace": "n"},
    "data": {"a": "b"},
}
TIMEOUT = Failure("timeout")


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def review(version: str = "v1", **changes: Any) -> dict[str, Any]:
    """A review; a change to None leaves a field of the request out."""
    request = {
        "uid": UID,
        "operation": "CREATE",
        "resource": {"group": "", "version": "v1", "resource": "configmaps"},
        "namespace": "n",
        "object": OBJECT,
        **changes,
    }
    kept = {key: value for key, value in request.items() if value is not None}
    return {"apiVersion": f"admission.k8s.io/{version}", "kind": "AdmissionReview", "request": kept}


def test_a_v1_review_reaches_modules_as_it_was_sent() -> None:
    body = encoded(review())
    assert read_question(body).review_v1 is body


def test_a_v1beta1_review_reaches_modules_as_v1() -> None:
    sent = review("v1beta1", unknown=1.5)
    question = read_question(encoded(sent))
    assert question.api_version == "admission.k8s.io/v1beta1"
    assert json.loads(question.review_v1) == {**sent, "apiVersion": "admission.k8s.io/v1"}


def test_reads_what_the_rules_look_at() -> None:
    question = read_question(
        encoded(
            review(operation="CONNECT", subResource="exec", resource={"version": "v1", "resource": "pods"})
        )
    )
    assert question.target == Target(
        operation="CONNECT", group="", version="v1", resource="pods", subresource="exec", namespace="n"
    )


def test_a_changed_object_takes_the_place_of_the_one_that_was_sent() -> None:
    body = (
        b'{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","operation":"CREATE",'
        b'"resource":{"version":"v1","resource":"x"},"object":{"a":1},"options":{"n":1.10}}}'
    )
    changed = read_question(body).with_object(b'{"a":12345678901234567890}')
    assert changed == body.replace(b'{"a":1}', b'{"a":12345678901234567890}')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"kind":"\xff"}', "expected a review as JSON: not UTF-8"),
        (b"null", "expected an object, got null"),
        (
            encoded({"apiVersion": "v1", "kind": "ConfigMap"}),
            "expected an AdmissionReview .* got ConfigMap of v1",
        ),
        (encoded(review("v2")), "got AdmissionReview of admission.k8s.io/v2"),
        (
            encoded({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}),
            "request: expected a value",
        ),
        (encoded({**review(), "request": None}), "request: expected an object, got null"),
        (encoded({**review(), "request": []}), "request: expected an object, got a list"),
        (encoded(review(uid=None)), "request.uid: expected a string of 1 to 256 characters, got 0"),
        (encoded(review(uid="")), "request.uid: expected a string of 1 to 256 characters, got 0"),
        (encoded(review(uid="u" * 1_000_000)), "request.uid: .* got 1000000"),
        (encoded(review(uid=7)), "request.uid: expected a string, got an integer"),
        (
            encoded(review(operation=None)),
            "request.operation: expected one of CREATE, UPDATE, DELETE, CONNECT, got nothing",
        ),
        (encoded(review(operation="create")), "request.operation: .* got 'create'"),
        (
            encoded(review(resource=None)),
            "request.resource: expected an object with group, version and resource",
        ),
        (encoded(review(resource={"resource": "pods"})), "request.resource: expected"),
        (encoded(review(resource="pods")), "request.resource: expected an object or null, got a string"),
        (encoded(review(object=[1])), "request.object: expected an object or null"),
        (encoded(review(oldObject="x")), "request.oldObject: expected an object or null"),
        (encoded(review(namespace=["n"])), "request.namespace: expected a string or null, got a list"),
    ],
)
def test_refuses_what_is_no_admission_review_and_says_what_was_expected(body: bytes, message: str) -> None:
    with pytest.raises(BadReview, match=message):
        read_question(body)


# What a module answers


def answered(mutating: bool = False, current: Any = OBJECT, **said: Any) -> AdmissionAnswer:
    body = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": said}
    return read_answer(Raw(encoded(body)), uid=UID, current=encoded(current), mutating=mutating)


def patched(value: Any, patch_type: str | None = "Full", current: Any = OBJECT) -> AdmissionAnswer:
    text = value if isinstance(value, str) else base64.b64encode(encoded(value)).decode()
    return answered(True, current, uid=UID, allowed=True, patch=text, patchType=patch_type)


def test_reads_what_a_module_says() -> None:
    answer = answered(
        uid=UID,
        allowed=False,
        status={"code": 403, "message": "not\nallowed", "reason": "Forbidden", "metadata": {}},
        warnings=["w"],
        auditAnnotations={"k": "v"},
    )
    assert answer == AdmissionAnswer(
        allowed=False,
        code=403,
        message="not allowed",
        reason="Forbidden",
        warnings=("w",),
        annotations=(("k", "v"),),
    )


@pytest.mark.parametrize("uid", [{}, {"uid": None}, {"uid": UID}])
def test_a_missing_uid_is_taken_for_the_right_one(uid: dict[str, Any]) -> None:
    assert answered(allowed=True, **uid).allowed


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "response.response.allowed: expected a value, got nothing"),
        ({"allowed": None}, "response.response.allowed: expected a boolean, got null"),
        ({"allowed": 1}, "response.response.allowed: expected a boolean, got an integer"),
        ({"allowed": "true"}, "response.response.allowed: expected a boolean, got a string"),
        ({"allowed": True, "uid": "another"}, "expected the uid of the request, got another"),
        ({"allowed": True, "uid": ""}, "expected the uid of the request, got another"),
        (
            {"allowed": True, "warnings": "w"},
            "response.response.warnings: expected a list or null, got a string",
        ),
        (
            {"allowed": False, "status": {"code": "403"}},
            "response.response.status.code: expected an integer or null",
        ),
        (
            {"allowed": True, "patch": "e30="},
            "expected none from a module that is not configured as mutating",
        ),
        (
            {"allowed": False, "patch": "e30="},
            "expected none from a module that is not configured as mutating",
        ),
    ],
)
def test_an_answer_that_is_not_as_asked_is_a_failure(said: dict[str, Any], message: str) -> None:
    with pytest.raises((Unreadable, Mismatch), match=message):
        answered(**said)


@pytest.mark.parametrize(
    "body",
    [
        {"response": {"allowed": True}},
        {"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "response": {"allowed": True}},
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionResponse", "response": {"allowed": True}},
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"},
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": None},
    ],
)
def test_an_answer_of_another_kind_or_version_is_a_failure(body: dict[str, Any]) -> None:
    with pytest.raises((Unreadable, Mismatch)):
        read_answer(Raw(encoded(body)), uid=UID, current=b"null", mutating=False)


def test_a_full_patch_is_the_whole_object() -> None:
    changed = {**OBJECT, "data": {"a": "b", "c": "d"}}
    answer = patched(changed)
    assert answer.changed is not None
    assert json.loads(answer.changed) == changed


def test_a_json_patch_is_applied_to_the_object_that_the_module_saw() -> None:
    answer = patched([{"op": "add", "path": "/data/c", "value": "d"}], "JSONPatch")
    assert answer.changed is not None
    assert json.loads(answer.changed) == {**OBJECT, "data": {"a": "b", "c": "d"}}


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_empty_patch_changes_nothing(nothing: str | None) -> None:
    assert answered(True, allowed=True, patch=nothing, patchType="Full").changed is None


def test_the_patch_of_a_refusal_is_not_looked_at() -> None:
    assert answered(True, allowed=False, patch="?", patchType="?").changed is None


@pytest.mark.parametrize(
    ("value", "patch_type", "current", "message"),
    [
        ("not base64!", "Full", OBJECT, "patch: expected base64"),
        ("e30", "Full", OBJECT, "patch: expected base64"),
        (OBJECT, None, OBJECT, "patchType: expected Full or JSONPatch, got nothing"),
        (OBJECT, "MergePatch", OBJECT, "patchType: expected Full or JSONPatch, got 'MergePatch'"),
        (OBJECT, "Full", None, "as the request has no object to change"),
        ([], "JSONPatch", None, "as the request has no object to change"),
        ("eyJhIjoxLCJhIjoyfQ==", "Full", OBJECT, 'the key "a" is there twice'),
        ([OBJECT], "Full", OBJECT, "patch: expected an object, got a list"),
        (None, "Full", OBJECT, "patch: expected an object, got null"),
        ({**OBJECT, "kind": "Secret"}, "Full", OBJECT, "expected the object to keep its kind"),
        ({**OBJECT, "apiVersion": "v2"}, "Full", OBJECT, "expected the object to keep its apiVersion"),
        ({**OBJECT, "metadata": {"name": "d", "namespace": "n"}}, "Full", OBJECT, "keep its metadata.name"),
        ({**OBJECT, "metadata": {"name": "c"}}, "Full", OBJECT, "keep its metadata.namespace"),
        (
            {**OBJECT, "metadata": 5},
            "Full",
            OBJECT,
            "patch.metadata: expected an object or null, got an integer",
        ),
        ([{"op": "remove", "path": "/x"}], "JSONPatch", OBJECT, r"operation 0 \(remove\): nothing is at 'x'"),
        ([{"op": "replace", "path": "/kind", "value": "Secret"}], "JSONPatch", OBJECT, "keep its kind"),
        (
            [{"op": "replace", "path": "", "value": 1}],
            "JSONPatch",
            OBJECT,
            "expected an object, got an integer",
        ),
        ({}, "JSONPatch", OBJECT, "expected a list, got an object"),
    ],
)
def test_a_patch_that_cannot_be_used_is_a_failure(
    value: Any, patch_type: str | None, current: Any, message: str
) -> None:
    with pytest.raises((Unreadable, Mismatch), match=message):
        patched(value, patch_type, current)


def test_a_patch_may_name_an_object_that_has_no_name_yet() -> None:
    unnamed = {**OBJECT, "metadata": {"generateName": "c-"}}
    assert (
        patched({**OBJECT, "metadata": {"name": "c-1", "namespace": "n"}}, current=unnamed).changed
        is not None
    )


# Folding


def told(
    answer: AdmissionAnswer | Failure, name: str = "m", policy: FailurePolicy = FailurePolicy.FAIL
) -> Told:
    return Told(name, answer, policy)


def denying(message: str = "no", code: int = 403, reason: str = "") -> AdmissionAnswer:
    return AdmissionAnswer(allowed=False, message=message, code=code, reason=reason)


ALLOWING = AdmissionAnswer(allowed=True)


def test_nobody_asked_is_allowed() -> None:
    assert fold([]) == AdmissionVerdict(True)


def test_all_denials_are_told_in_order_with_the_first_ones_code() -> None:
    verdict = fold(
        [told(ALLOWING, "a"), told(denying("x", 422, "Invalid"), "b"), told(denying("y", 403), "c")]
    )
    assert verdict == AdmissionVerdict(False, 422, "b: x; c: y", "Invalid")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, 400),
        (200, 400),
        (399, 400),
        (-1, 400),
        (400, 400),
        (403, 403),
        (599, 599),
        (600, 400),
        (99999, 400),
    ],
)
def test_a_denial_has_the_code_of_an_error(code: int, expected: int) -> None:
    assert fold([told(denying(code=code))]).code == expected


def test_a_denial_without_words_says_who_denied() -> None:
    assert fold([told(denying(""))]).message == "m: denied without a reason"


def test_a_failure_denies_without_saying_more_than_which() -> None:
    assert fold([told(TIMEOUT)]) == AdmissionVerdict(False, 500, "module m failed: timeout", "InternalError")


def test_an_ignored_failure_allows_with_a_warning() -> None:
    verdict = fold([told(TIMEOUT, policy=FailurePolicy.IGNORE)])
    assert verdict == AdmissionVerdict(True, warnings=("module m failed: timeout; ignored",))


def test_a_failure_with_policy_error_is_left_to_the_cluster() -> None:
    with pytest.raises(ModuleFailed, match=r"^module m failed: timeout$"):
        fold([told(ALLOWING, "a"), told(TIMEOUT, policy=FailurePolicy.ERROR)])


def test_a_denial_is_not_lost_to_another_modules_failure() -> None:
    verdict = fold([told(TIMEOUT, "a", FailurePolicy.ERROR), told(denying("x"), "b")])
    assert (verdict.allowed, verdict.message) == (False, "b: x")


@pytest.mark.parametrize(
    ("answer", "policy", "ends"),
    [
        (ALLOWING, FailurePolicy.FAIL, False),
        (denying(), FailurePolicy.IGNORE, True),
        (TIMEOUT, FailurePolicy.FAIL, True),
        (TIMEOUT, FailurePolicy.ERROR, True),
        (TIMEOUT, FailurePolicy.IGNORE, False),
    ],
)
def test_a_chain_of_mutators_ends_where_the_object_does_not_pass(
    answer: AdmissionAnswer | Failure, policy: FailurePolicy, ends: bool
) -> None:
    assert ends_chain(told(answer, policy=policy)) is ends


_ANSWERS = st.sampled_from([ALLOWING, denying(), TIMEOUT])


@given(st.lists(st.tuples(_ANSWERS, st.sampled_from(FailurePolicy)), max_size=5))
def test_what_fails_or_denies_never_allows_unless_configured(given_answers: list[Any]) -> None:
    every = [told(answer, str(index), policy) for index, (answer, policy) in enumerate(given_answers)]
    try:
        allowed = fold(every).allowed
    except ModuleFailed:
        allowed = False
    harmless = all(
        answer == ALLOWING or (answer == TIMEOUT and policy is FailurePolicy.IGNORE)
        for answer, policy in given_answers
    )
    assert allowed == harmless


def warning(*texts: str) -> AdmissionAnswer:
    return AdmissionAnswer(allowed=True, warnings=texts)


def test_warnings_carry_the_name_of_their_module() -> None:
    every = [told(warning("old", " ", "b: forged\r\nx"), "a"), told(warning("older"), "b")]
    assert fold(every).warnings == ("a: old", "a: b: forged  x", "b: older")


@given(st.lists(st.text(max_size=200), max_size=80))
def test_warnings_fit_into_headers(texts: list[str]) -> None:
    warnings = fold([told(warning(*texts))]).warnings
    assert all(each.isprintable() and len(each) <= MOST_WARNING_CHARACTERS for each in warnings)
    assert sum(len(each.encode()) for each in warnings) <= MOST_WARNINGS_BYTES


def annotating(**annotations: str) -> AdmissionAnswer:
    return AdmissionAnswer(allowed=True, annotations=tuple(annotations.items()))


def test_audit_annotations_carry_the_name_of_their_module() -> None:
    every = [told(annotating(reason="x"), "a"), told(annotating(reason="y\nz"), "a.b")]
    assert fold(every).annotations == {"a_reason": "x", "a.b_reason": "y z"}


def test_audit_annotations_that_would_share_a_key_are_all_kept() -> None:
    annotations = fold([told(annotating(**{"a/b": "1", "a-b": "2", "a b": "3"}))]).annotations
    assert annotations["m_a-b"] == "1"
    assert sorted(annotations.values()) == ["1", "2", "3"]


_QUALIFIED = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"


@given(
    st.lists(st.tuples(st.text(max_size=80), st.text(max_size=5)), max_size=10),
    st.sampled_from(["m", "n" * 63]),
)
def test_audit_annotations_have_qualified_names(pairs: list[tuple[str, str]], name: str) -> None:
    unique = dict(pairs)
    annotations = fold(
        [told(AdmissionAnswer(allowed=True, annotations=tuple(unique.items())), name)]
    ).annotations
    assert len(annotations) == len(unique)
    for key in annotations:
        assert re.fullmatch(_QUALIFIED, key)
        assert len(key) <= MOST_KEY_CHARACTERS


# The reply


def test_a_patch_leads_from_the_object_that_was_sent_to_the_last_one() -> None:
    operations = json.loads(write_patch(encoded(OBJECT), encoded({**OBJECT, "data": {"a": 1.10}})))
    assert operations == [{"op": "replace", "path": "/data/a", "value": 1.1}]


def test_an_object_written_otherwise_but_the_same_needs_no_patch() -> None:
    assert write_patch(b'{"a":"<","b":1.10}', b'{ "b": 1.1, "a": "\\u003c" }') == b""


def test_the_reply_has_neither_patch_nor_patch_type_when_nothing_changes() -> None:
    reply = json.loads(write_reply("admission.k8s.io/v1", UID, AdmissionVerdict(True), b""))
    assert reply == {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": UID, "allowed": True},
    }


def test_the_reply_has_both_patch_and_patch_type_when_something_changes() -> None:
    reply = json.loads(write_reply("admission.k8s.io/v1beta1", UID, AdmissionVerdict(True), b"[]"))
    assert reply["apiVersion"] == "admission.k8s.io/v1beta1"
    assert reply["response"] == {"uid": UID, "allowed": True, "patch": "W10=", "patchType": "JSONPatch"}


def test_the_reply_to_a_denial_says_why() -> None:
    verdict = AdmissionVerdict(False, 403, "m: no", "Forbidden", ("m: w",), {"m_k": "v"})
    assert json.loads(write_reply("admission.k8s.io/v1", UID, verdict, b""))["response"] == {
        "uid": UID,
        "allowed": False,
        "status": {"code": 403, "message": "m: no", "reason": "Forbidden", "status": "Failure"},
        "warnings": ["m: w"],
        "auditAnnotations": {"m_k": "v"},
    }
