"""Quantities, durations, and what no run can have."""

from __future__ import annotations

import pytest

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
