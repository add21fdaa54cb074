"""TokenReviews: what is read, how answers are folded, what goes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from bulkhead.service.authentication import (
    TokenAnswer,
    TokenVerdict,
    User,
    accept,
    accepted_audiences,
    read_answer,
    read_question,
    refuse,
    write_reply,
)
from bulkhead.service.call import Failure, Unreadable
from bulkhead.service.errors import BadReview
from bulkhead.service.mask import NOTHING, mask_of_token
from bulkhead.service.strictjson import Mismatch

OWN = ("https://kubernetes.default.svc",)
ANN = TokenAnswer(User(username="ann"))
UNKNOWN = TokenAnswer(None)


def review(version: str = "v1", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": f"authentication.k8s.io/{version}", "kind": "TokenReview", "spec": spec}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def response(**status: Any) -> Raw:
    return Raw(encoded({**review(token="t"), "status": status}))


def test_a_v1_review_reaches_modules_as_it_was_sent() -> None:
    body = b'{ "apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{"token":"t","x":1.10} }'
    assert read_question(body).review_v1 is body


def test_a_v1beta1_review_reaches_modules_as_v1() -> None:
    sent = review("v1beta1", token="t", audiences=["a"], unknown=12345678901234567890)
    question = read_question(encoded(sent))
    assert question.api_version == "authentication.k8s.io/v1beta1"
    assert json.loads(question.review_v1) == {**sent, "apiVersion": "authentication.k8s.io/v1"}
    assert b"12345678901234567890" in question.review_v1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a review as JSON: empty; expected one JSON document"),
        (b"token", "expected a review as JSON: not JSON"),
        (b"[]", "expected an object, got a list"),
        (
            b"{}",
            "expected a TokenReview of authentication.k8s.io/v1 or authentication.k8s.io/v1beta1, "
            "got an object without kind and apiVersion",
        ),
        (
            encoded({**review(token="t"), "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"}),
            "expected a TokenReview .* got AdmissionReview of admission.k8s.io/v1",
        ),
        (encoded(review("v2", token="t")), "got TokenReview of authentication.k8s.io/v2"),
        (encoded({**review(token="t"), "apiVersion": "v1"}), "got TokenReview of v1"),
        (encoded({**review(token="t"), "kind": 5}), "kind: expected a string, got an integer"),
        (
            b'{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview"}',
            "spec: expected a value, got nothing",
        ),
        (encoded({**review(), "spec": None}), "spec: expected an object, got null"),
        (encoded(review()), "spec.token: expected a string that is not empty"),
        (encoded(review(token="")), "spec.token: expected a string that is not empty"),
        (encoded(review(token=5)), "spec.token: expected a string, got an integer"),
        (encoded(review(token="t", audiences="a")), "spec.audiences: expected a list or null, got a string"),
        (
            encoded(review(token="t", audiences=["a", 1])),
            r"spec.audiences\[1\]: expected a string, got an integer",
        ),
        (
            b'{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","spec":{"token":"a","token":"b"}}',
            'the key "token" is there twice',
        ),
    ],
)
def test_refuses_what_is_no_token_review_and_says_what_was_expected(body: bytes, message: str) -> None:
    with pytest.raises(BadReview, match=message):
        read_question(body)


def test_a_question_does_not_show_its_token() -> None:
    assert "sesame" not in repr(read_question(encoded(review(token="sesame"))))


def test_reads_who_it_is() -> None:
    user = {"username": "ann", "uid": "7", "groups": ["g"], "extra": {"k": ["v"]}}
    answer = read_answer(response(authenticated=True, user=user, audiences=["a"]))
    assert answer == TokenAnswer(User("ann", "7", ["g"], {"k": ["v"]}), ("a",))


@pytest.mark.parametrize(
    "status", [{}, {"authenticated": False}, {"authenticated": None, "user": {"username": "x"}}]
)
def test_anything_but_authenticated_is_not(status: dict[str, Any]) -> None:
    assert read_answer(response(**status)) == UNKNOWN


def test_reads_why_a_module_could_not_tell() -> None:
    assert read_answer(response(error="key\nserver down")).error == "key server down"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response(authenticated=True), "username: expected a string that is not empty"),
        (response(authenticated=True, user={"uid": "1"}), "username: expected a string that is not empty"),
        (
            response(authenticated=True, user={"username": 1}),
            "response.status.user.username: expected a string",
        ),
        (
            response(authenticated="true"),
            "response.status.authenticated: expected a boolean or null, got a string",
        ),
        (response(authenticated=1), "expected a boolean or null, got an integer"),
        (
            Raw(encoded({**review(token="t"), "status": None})),
            "response.status: expected an object, got null",
        ),
        (Raw(encoded(review(token="t"))), "response.status: expected a value, got nothing"),
        (
            Raw(encoded({**review("v1beta1"), "status": {}})),
            "expected a TokenReview of authentication.k8s.io/v1, got",
        ),
        (Raw(b'{"status":{"authenticated":true,"user":{"username":"x"}}}'), "got an object without kind"),
        (Raw(b'"yes"'), "response: expected an object, got a string"),
    ],
)
def test_an_answer_that_is_not_as_asked_is_a_failure(answer: Raw, message: str) -> None:
    with pytest.raises((Unreadable, Mismatch), match=message):
        read_answer(answer)


@pytest.mark.parametrize(
    ("wanted", "answered", "accepted"),
    [
        ((), (), ()),
        ((), ("a",), ("a",)),
        (("a", "b"), ("b", "c"), ("b",)),
        (("b", "a"), ("a", "b"), ("b", "a")),
        (("a",), ("b",), None),
        (OWN, (), OWN),
        (("other", *OWN), (), OWN),
        (("other",), (), None),
    ],
)
def test_a_token_is_good_for_audiences_that_were_wanted(
    wanted: tuple[str, ...], answered: tuple[str, ...], accepted: tuple[str, ...] | None
) -> None:
    assert accepted_audiences(wanted, answered, OWN) == accepted


def test_a_module_that_knows_the_token_decides() -> None:
    assert accept("m", ANN, OWN, OWN) == TokenVerdict(ANN.user, OWN, by="m")


@pytest.mark.parametrize(
    "answer", [UNKNOWN, Failure("timeout"), TokenAnswer(User(username="ann"), ("other",))]
)
def test_the_next_module_is_asked_otherwise(answer: TokenAnswer | Failure) -> None:
    assert accept("m", answer, OWN, OWN) is None


def test_a_refusal_tells_which_modules_could_not_tell_and_nothing_more() -> None:
    answers: list[tuple[str, TokenAnswer | Failure]] = [
        ("a", UNKNOWN),
        ("b", Failure("trap")),
        ("c", TokenAnswer(None, error="no key")),
        ("d", TokenAnswer(User(username="ann"), ("other",))),
    ]
    assert refuse(answers) == TokenVerdict(None, error="module b failed: trap; module c: no key")
    assert refuse([]) == TokenVerdict(None)


def test_the_reply_has_the_version_that_was_sent_and_not_the_token() -> None:
    question = read_question(encoded(review("v1beta1", token="sesame", audiences=["a"])))
    verdict = TokenVerdict(User("ann", groups=[]), ("a",))
    assert json.loads(write_reply(question, verdict, NOTHING)) == {
        "apiVersion": "authentication.k8s.io/v1beta1",
        "kind": "TokenReview",
        "metadata": {},
        "spec": {},
        "status": {"authenticated": True, "user": {"username": "ann", "groups": []}, "audiences": ["a"]},
    }


def test_a_refusal_is_said_and_not_left_out() -> None:
    question = read_question(encoded(review(token="sesame")))
    verdict = TokenVerdict(None, error="module m: no user for sesame")
    status = json.loads(write_reply(question, verdict, mask_of_token("sesame")))["status"]
    assert status == {"authenticated": False, "error": "module m: no user for ***"}


@given(
    st.dictionaries(st.text(st.characters(codec="ascii"), max_size=5), st.integers() | st.text(max_size=5))
)
def test_translation_keeps_all_but_the_version(extra: dict[str, Any]) -> None:
    sent = review("v1beta1", **{**extra, "token": "t", "audiences": []})
    translated = json.loads(read_question(encoded(sent)).review_v1)
    assert {**translated, "apiVersion": sent["apiVersion"]} == sent
