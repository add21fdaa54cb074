"""YAML of objects, read as kubectl reads it. The expectations are what sigs.k8s.io/yaml made of the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bulkhead.service.objectyaml import MOST_VALUES, read_object_yaml
from bulkhead.service.yamlfile import BadYaml


def read(text: str) -> list[Any]:
    return [json.loads(document) for document in read_object_yaml(text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0644, 0o17, 0x1F, 0b101, -0b11, +5, -0777]", [420, 15, 31, 5, -3, 5, -511]),
        ("[089, 1_000, 0x_1f, 0_7, 1__0]", [89, 1000, 31, 7, 10]),
        ("[12345678901234567890, 99999999999999999999999]", [12345678901234567890, 1e23]),
        ("[1.10, 1.0, 1e3, .5, 1., 1e25, 1.5e-9, +.5]", [1.1, 1, 1000, 0.5, 1, 1e25, 1.5e-9, 0.5]),
        ("[yes, No, ON, off, y, n, True]", [True, False, True, False, True, False, True]),
        ("[yEs, tRue, nUll, 'no', \"yes\"]", ["yEs", "tRue", "nUll", "no", "yes"]),
        ("[~, null, NULL, '']", [None, None, None, ""]),
        ("[22:22, 2020-01-01, 1.2.3, 0x, 0b2, 0o8, 1e, +, ., ._5]",
         ["22:22", "2020-01-01", "1.2.3", "0x", "0b2", "0o8", "1e", "+", ".", "._5"]),
        ("{1: a, true: b, 1.5: c}", {"1": "a", "true": "b", "1.5": "c"}),
        ("[!!str 5, !!str yes, !!int '7']", ["5", "yes", 7]),
        ("{base: &b {x: 1, z: 2}, merged: {<<: *b, x: 3}}",
         {"base": {"x": 1, "z": 2}, "merged": {"x": 3, "z": 2}}),
        ("a: |\n  x\n  y\nb:\n", {"a": "x\ny\n", "b": None}),
    ],
)  # fmt: skip
def test_reads_values_as_kubectl_does(text: str, value: Any) -> None:
    (document,) = read(text)
    assert document == value
    assert repr(document) == repr(value)  # 1 is not True, and not 1.0


def test_reads_every_document_that_is_not_empty() -> None:
    assert read("a: 1\n---\n# nothing\n---\nb: 2\n...\n") == [{"a": 1}, {"b": 2}]
    assert read("") == []


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\na: 2", 2, "the key 'a' is there twice"),
        ("x: {1: a, '1': b}", 1, "the key '1' is there twice"),
        ("a: [1", 1, "not YAML"),
        ("\na: .inf", 2, "not finite"),
        ("a: !!binary eA==", 1, "a value of type binary"),
        ("a: !mine x", 1, "a value of type !mine"),
        ("? [a]\n: b", 1, "expected a key that is a string"),
        ("<<: 5", 1, "after <<"),
        ("a: &x [*x]", 1, "nested deeper than"),
        ('a: "\\ud800"', None, "surrogate"),
    ],
)
def test_says_what_kubernetes_cannot_have(text: str, line: int | None, message: str) -> None:
    with pytest.raises(BadYaml, match=message) as caught:
        read_object_yaml(text)
    assert caught.value.line == line


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(BadYaml, match=f"more than {MOST_VALUES} values"):
        read_object_yaml("\n".join(lines))
