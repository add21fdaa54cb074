"""SubjectAccessReviews: what is read, how answers are folded, what goes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from bulkhead.service.authorization import (
    AccessAnswer,
    AccessVerdict,
    decides,
    fold,
    read_answer,
    read_question,
    write_reply,
)
from bulkhead.service.call import Failure, Unreadable
from bulkhead.service.errors import BadReview, Undecided
from bulkhead.service.strictjson import Mismatch

ALLOW = AccessAnswer(True, False, "member")
DENY = AccessAnswer(False, True, "banned")
NOTHING = AccessAnswer(False, False)
BROKEN = Failure("trap")
RESOURCE = {"verb": "get", "resource": "pods", "namespace": "default"}


def review(version: str = "v1", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": f"authorization.k8s.io/{version}", "kind": "SubjectAccessReview", "spec": spec}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def response(**status: Any) -> Raw:
    return Raw(encoded({**review(resourceAttributes=RESOURCE), "status": status}))


def test_a_v1_review_reaches_modules_as_it_was_sent() -> None:
    body = encoded(
        review(user="u", groups=["g"], resourceAttributes={**RESOURCE, "labelSelector": {"x": 1.10}})
    )
    assert read_question(body).review_v1 is body


def test_the_group_list_of_v1beta1_is_called_groups_in_v1() -> None:
    sent = review(
        "v1beta1", user="u", group=["g", "h"], resourceAttributes=RESOURCE, extra={"k": ["v"]}, other=1
    )
    translated = json.loads(read_question(encoded(sent)).review_v1)
    spec = {key: value for key, value in sent["spec"].items() if key != "group"}
    assert translated == {
        **sent,
        "apiVersion": "authorization.k8s.io/v1",
        "spec": {**spec, "groups": ["g", "h"]},
    }


def test_a_v1beta1_review_without_groups_gets_none() -> None:
    sent = review("v1beta1", user="u", nonResourceAttributes={"path": "/metrics", "verb": "get"})
    assert "groups" not in json.loads(read_question(encoded(sent)).review_v1)["spec"]


@given(
    st.dictionaries(st.sampled_from(["user", "uid", "unknown", "x y"]), st.text(max_size=5), max_size=4),
    st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=3),
)
def test_translation_there_and_back_is_the_same(spec: dict[str, Any], groups: list[str] | None) -> None:
    given_groups = {} if groups is None else {"group": groups}
    sent = review("v1beta1", **spec, **given_groups, resourceAttributes=RESOURCE)
    translated = json.loads(read_question(encoded(sent)).review_v1)
    back = {("group" if key == "groups" else key): value for key, value in translated["spec"].items()}
    assert {**translated, "apiVersion": sent["apiVersion"], "spec": back} == sent


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b'"x"', "expected an object, got a string"),
        (
            encoded({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}),
            "expected a SubjectAccessReview .* got TokenReview of authentication.k8s.io/v1",
        ),
        (
            b'{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview"}',
            "spec: expected a value, got nothing",
        ),
        (encoded(review(user="u")), "either resourceAttributes or nonResourceAttributes, got neither"),
        (encoded(review(resourceAttributes={}, nonResourceAttributes={})), "got both"),
        (
            encoded(review(user=1, resourceAttributes={})),
            "spec.user: expected a string or null, got an integer",
        ),
        (
            encoded(review(groups="g", resourceAttributes={})),
            "spec.groups: expected a list or null, got a string",
        ),
        (encoded(review("v1beta1", group="g", resourceAttributes={})), "spec.group: expected a list or null"),
        (encoded(review("v1beta1", groups=["g"], resourceAttributes={})), "spec.groups: expected spec.group"),
        (
            encoded(review(resourceAttributes={"verb": 1})),
            "spec.resourceAttributes.verb: expected a string or null",
        ),
        (
            encoded(review(resourceAttributes=[])),
            "spec.resourceAttributes: expected an object or null, got a list",
        ),
    ],
)
def test_refuses_what_is_no_access_review_and_says_what_was_expected(body: bytes, message: str) -> None:
    with pytest.raises(BadReview, match=message):
        read_question(body)


def test_reads_what_a_module_says() -> None:
    answer = read_answer(response(allowed=False, denied=True, reason="no\tentry", evaluationError="e" * 300))
    assert answer == AccessAnswer(False, True, "no entry", "e" * 255 + "…")
    assert read_answer(response()) == NOTHING


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response(allowed="yes"), "response.status.allowed: expected a boolean or null, got a string"),
        (response(denied=1), "response.status.denied: expected a boolean or null, got an integer"),
        (Raw(encoded(review())), "response.status: expected a value, got nothing"),
        (Raw(encoded({**review("v1beta1"), "status": {"allowed": True}})), "of authorization.k8s.io/v1, got"),
        (Raw(b'{"status":{"allowed":true}}'), "got an object without kind and apiVersion"),
    ],
)
def test_an_answer_that_is_not_as_asked_is_a_failure(answer: Raw, message: str) -> None:
    with pytest.raises((Unreadable, Mismatch), match=message):
        read_answer(answer)


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([], AccessVerdict(False)),
        ([NOTHING], AccessVerdict(False)),
        ([ALLOW], AccessVerdict(True, reason="member")),
        ([DENY], AccessVerdict(False, True, "banned")),
        ([NOTHING, ALLOW], AccessVerdict(True, reason="member")),
        ([BROKEN, ALLOW], AccessVerdict(True, reason="member", evaluation_error="module m0 failed: trap")),
        ([BROKEN, DENY], AccessVerdict(False, True, "banned", "module m0 failed: trap")),
        (
            [AccessAnswer(True, True)],
            AccessVerdict(False, True, "", "module m0 both allowed and denied: denied"),
        ),
        (
            [AccessAnswer(False, False, "r", "e"), AccessAnswer(False, False, "s")],
            AccessVerdict(False, False, "r; s", "module m0: e"),
        ),
        ([AccessAnswer(False, False, "not mine"), ALLOW], AccessVerdict(True, reason="member")),
    ],
)
def test_the_first_module_that_allows_or_denies_decides(
    answers: list[AccessAnswer | Failure], verdict: AccessVerdict
) -> None:
    assert fold([(f"m{index}", answer) for index, answer in enumerate(answers)]) == verdict


@pytest.mark.parametrize("answers", [[BROKEN], [NOTHING, BROKEN], [BROKEN, NOTHING], [BROKEN, BROKEN]])
def test_nobody_decides_if_none_did_and_one_failed(answers: list[AccessAnswer | Failure]) -> None:
    with pytest.raises(Undecided, match=r"^no module decided: module m\d failed: trap"):
        fold([(f"m{index}", answer) for index, answer in enumerate(answers)])


@given(st.lists(st.sampled_from([ALLOW, DENY, NOTHING, BROKEN, AccessAnswer(True, True)])))
def test_only_a_module_that_allows_allows(answers: list[AccessAnswer | Failure]) -> None:
    asked = []
    for index, answer in enumerate(answers):
        asked.append((str(index), answer))
        if decides(answer):
            break
    try:
        verdict = fold(asked)
    except Undecided:
        assert BROKEN in answers
        return
    assert not (verdict.allowed and verdict.denied)
    assert verdict.allowed == (bool(asked) and asked[-1][1] == ALLOW)


def test_the_reply_has_the_version_that_was_sent() -> None:
    question = read_question(encoded(review("v1beta1", user="u", resourceAttributes=RESOURCE)))
    assert json.loads(write_reply(question, AccessVerdict(False, True, "banned", "broken"))) == {
        "apiVersion": "authorization.k8s.io/v1beta1",
        "kind": "SubjectAccessReview",
        "metadata": {},
        "spec": {},
        "status": {"allowed": False, "denied": True, "reason": "banned", "evaluationError": "broken"},
    }
    assert json.loads(write_reply(question, AccessVerdict(False)))["status"] == {"allowed": False}
