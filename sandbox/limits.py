"""Limits of one run, and the quantities in which people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from bulkhead.sandbox.errors import InvalidRequest

WASM_PAGE_BYTES = 65536

_BINARY_SUFFIXES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_DECIMAL_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_QUANTITY = re.compile(r"([0-9]{1,15})(\.[0-9]{1,9})?(Ki|Mi|Gi|Ti|k|M|G|T|)")
_DURATION = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,9})?(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")
_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_quantity(text: str) -> int:
    """Reads a Kubernetes resource quantity of bytes (`64Mi`, `1.5Gi`, `500k`, `65536`).

    Raises ValueError with what was expected.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a quantity; write for example 65536, 64Ki, 64Mi or 1.5Gi")
    whole, fraction, suffix = match.groups()
    factor = {**_BINARY_SUFFIXES, **_DECIMAL_SUFFIXES}[suffix]
    digits = (fraction or ".")[1:]
    value, rest = divmod(int(whole + digits) * factor, int(10 ** len(digits)))
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return value


def parse_duration(text: str) -> float:
    """Reads a Go duration (`2s`, `500ms`, `1m30s`) and returns seconds.

    Raises ValueError with what was expected.
    """
    stripped = text.strip()
    if _DURATION.fullmatch(stripped) is None:
        raise ValueError(f"{text!r} is not a duration; write for example 500ms, 2s or 1m30s")
    return sum(float(n) * _DURATION_UNITS[unit] for n, unit in _DURATION_PART.findall(stripped))


def format_quantity(size_bytes: int) -> str:
    """Writes bytes the way `parse_quantity` reads them, in the largest exact unit."""
    for suffix, factor in reversed(_BINARY_SUFFIXES.items()):
        if size_bytes >= factor and size_bytes % factor == 0:
            return f"{size_bytes // factor}{suffix}"
    return str(size_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use. Each field is enforced by the kernel or the runtime.

    docs/configuration.md says for each who enforces it and what is seen when it is hit.
    """

    memory_bytes: int = 64 << 20
    """Linear memory; a module that asks for more gets -1 from memory.grow."""
    wall_seconds: float = 2.0
    cpu_seconds: float = 1.0
    """User and system time of all threads of the process."""
    stdout_bytes: int = 8 << 20
    stderr_bytes: int = 64 << 10
    """More is dropped, and the run goes on."""
    stack_bytes: int = 512 << 10
    table_elements: int = 100_000
    fuel: int | None = None
    """About one per WebAssembly instruction; None: not counted."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = _BOUNDS[field.name]
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"limit {field.name} is {value}; it must be from {low} to {high}")

    def within(self, maximum: Limits) -> None:
        """Raises InvalidRequest, naming the limit, if one is above `maximum`'s."""
        for field in fields(self):
            value, most = getattr(self, field.name), getattr(maximum, field.name)
            if value is not None and most is not None and value > most:
                raise InvalidRequest(f"limit {field.name} is {value}; this server allows at most {most}")


def largest(every: Sequence[Limits]) -> Limits:
    """The largest value of each limit. Fuel stays unlimited: CPU time bounds it anyway."""
    return Limits(
        **{
            field.name: max(getattr(limits, field.name) for limits in every)
            for field in fields(Limits)
            if field.name != "fuel"
        }
    )


# Below the lower bound nothing can run; above the upper one the mechanism behind the limit
# (a 32-bit memory, a rlimit, the runtime's own stack of 8 MiB) no longer holds.
_BOUNDS: dict[str, tuple[float, float]] = {
    "memory_bytes": (WASM_PAGE_BYTES, 4 << 30),
    "wall_seconds": (0.001, 3600),
    "cpu_seconds": (0.001, 3600),
    "stdout_bytes": (0, 1 << 30),
    "stderr_bytes": (0, 1 << 30),
    "stack_bytes": (4096, 4 << 20),
    "table_elements": (0, 10_000_000),
    "fuel": (1, (1 << 63) - 1),
}
