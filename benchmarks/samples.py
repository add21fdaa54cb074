"""What was measured, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Samples:
    """Times of many runs of one kind."""

    name: str
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    """Of all runs together: the process that ran, and whatever started it."""
    elapsed_seconds: float = 0.0

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.wall_seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3

    @property
    def cpu_ms(self) -> float:
        return self.cpu_seconds / len(self.wall_seconds) * 1e3

    @property
    def per_second(self) -> float:
        return len(self.wall_seconds) / self.elapsed_seconds if self.elapsed_seconds else 0.0
