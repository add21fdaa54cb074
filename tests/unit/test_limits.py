"""Quantities, durations, and what no run can have."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bulkhead.sandbox import InvalidRequest, Limits, format_quantity, parse_duration, parse_quantity


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64Ki", 65536),
        ("64Mi", 64 << 20),
        ("1.5Gi", 3 << 29),
        ("500k", 500_000),
        ("2M", 2_000_000),
        (" 1Mi ", 1 << 20),
    ],
)
def test_reads_kubernetes_quantities(text: str, size_bytes: int) -> None:
    assert parse_quantity(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "Mi", "-1", "64MB", "64 Mi", "1e3", "0.3", "1.0001Ki", "９", "1" * 40, "64mi"]
)
def test_refuses_what_is_no_quantity_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("2s", 2.0),
        ("1m30s", 90.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        ("30us", 3e-5),
        ("30µs", 3e-5),
    ],
)
def test_reads_go_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "2", "s", "2 s", "-2s", "2sec", "1d", "1e3s", "９s"])
def test_refuses_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("size_bytes", [0, 1, 1023, 1024, 65536, 64 << 20, (64 << 20) + 1, 3 << 40])
def test_writes_quantities_as_it_reads_them(size_bytes: int) -> None:
    assert parse_quantity(format_quantity(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes": 0},
        {"memory_bytes": (4 << 30) + 1},
        {"wall_seconds": 0.0},
        {"wall_seconds": float("nan")},
        {"cpu_seconds": -1.0},
        {"stdout_bytes": -1},
        {"fuel": 0},
        {"stack_bytes": 1},
    ],
)
def test_refuses_limits_that_no_run_can_have(change: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(change))):
        Limits(**change)  # type: ignore[arg-type]


def test_names_the_limit_that_is_above_the_maximum() -> None:
    with pytest.raises(InvalidRequest, match="stdout_bytes"):
        Limits(stdout_bytes=2000).within(Limits(stdout_bytes=1000))
    Limits(stdout_bytes=1000).within(Limits(stdout_bytes=1000))
    Limits(fuel=10).within(Limits())


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("memory_bytes", 65536, 4 << 30),
        ("wall_seconds", 0.001, 3600),
        ("cpu_seconds", 0.001, 3600),
        ("stdout_bytes", 0, 1 << 30),
        ("stderr_bytes", 0, 1 << 30),
        ("stack_bytes", 4096, 4 << 20),
        ("table_elements", 0, 10_000_000),
        ("fuel", 1, (1 << 63) - 1),
    ],
)
def test_the_bounds_themselves_are_allowed_and_nothing_beyond(
    name: str, lowest: float, highest: float
) -> None:
    for value in (lowest, highest):
        assert getattr(Limits(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (lowest - 1, highest + 1):
        with pytest.raises(InvalidRequest, match=name):
            Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["wall_seconds", "cpu_seconds"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_refuses_times_that_are_no_numbers(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]


@given(st.integers(0, 1 << 60))
def test_every_size_survives_being_written_and_read(size_bytes: int) -> None:
    assume(len(format_quantity(size_bytes).rstrip("KMGTi")) <= 15)
    assert parse_quantity(format_quantity(size_bytes)) == size_bytes


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_clear_error(text: str) -> None:
    for parse, noun in ((parse_quantity, "quantity|whole number"), (parse_duration, "duration")):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert re.search(noun, str(error))  # noqa: PT017 - one of two good ends
