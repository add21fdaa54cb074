"""Tokens and contents of Secrets do not get into logs."""

from __future__ import annotations

import base64
import json
from typing import Any

from bulkhead.service.mask import MASKED, NOTHING, WITHHELD, mask_of_objects, mask_of_token

PASSWORD = "correct horse"
ENCODED = base64.b64encode(PASSWORD.encode()).decode()
SECRET: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {
        "name": "s",
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": ENCODED, "other": "kept"},
    },
    "data": {"password": ENCODED},
    "stringData": {"pin": "9876"},
}


def test_masks_a_token_in_any_text() -> None:
    mask = mask_of_token("magic-token")
    assert mask.text("no such token: magic-token!") == f"no such token: {MASKED}!"
    assert mask.value({"a": ["magic-token"], "magic-token": 1}) == {"a": [MASKED], MASKED: 1}


def test_masks_the_values_of_a_secret_however_they_are_written() -> None:
    mask = mask_of_objects([json.dumps(SECRET).encode(), b"null"])
    text = mask.text(f"{ENCODED} {PASSWORD} 9876 rest")
    assert text == f"{MASKED} {MASKED} {MASKED} rest"


def test_keeps_the_names_in_a_secret() -> None:
    shown = mask_of_objects([b"null"]).value({"request": {"object": SECRET}})
    assert shown["request"]["object"] == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "s",
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": MASKED, "other": "kept"},
        },
        "data": {"password": MASKED},
        "stringData": {"pin": MASKED},
    }


def test_masks_a_secret_whose_fields_have_other_types() -> None:
    odds: list[Any] = [None, [], "text", 5, {"a": {"b": 1}}]
    for odd in odds:
        body = {"kind": "Secret", "data": odd, "stringData": odd, "metadata": odd}
        shown = mask_of_objects([json.dumps(body).encode()]).value(body)
        assert shown["data"] == ({"a": MASKED} if isinstance(odd, dict) else MASKED)


def test_masks_tokens_in_reviews_and_token_requests() -> None:
    review = {"kind": "TokenReview", "spec": {"token": "abc", "audiences": ["x"]}}
    request = {"kind": "TokenRequest", "status": {"token": "abc"}}
    assert NOTHING.value(review)["spec"] == {"token": MASKED, "audiences": ["x"]}
    assert NOTHING.value(request)["status"] == {"token": MASKED}
    assert mask_of_objects([json.dumps(request).encode()]).text("an abc") == f"an {MASKED}"


def test_leaves_other_objects_alone() -> None:
    body = {"kind": "ConfigMap", "data": {"a": "b"}}
    assert mask_of_objects([json.dumps(body).encode()]).value(body) == body


def test_withholds_a_text_when_there_is_too_much_to_mask() -> None:
    body = {"kind": "Secret", "stringData": {str(number): f"value-{number}" for number in range(500)}}
    assert mask_of_objects([json.dumps(body).encode()]).text("harmless") == WITHHELD


def test_masks_the_longer_of_two_secrets_first() -> None:
    body = {"kind": "Secret", "stringData": {"a": "pass", "b": "password"}}
    assert mask_of_objects([json.dumps(body).encode()]).text("password") == MASKED
