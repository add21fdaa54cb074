"""What was measured, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Samples:
    """Times of many runs, or reviews, of one kind."""

    name: str
    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    """Of all of them together: of the processes that ran, and of whatever started them."""
    elapsed_seconds: float = 0.0

    def add(self, other: Samples) -> None:
        """Takes in what another round measured."""
        self.wall_seconds += other.wall_seconds
        self.cpu_seconds += other.cpu_seconds
        self.elapsed_seconds += other.elapsed_seconds

    @property
    def count(self) -> int:
        return len(self.wall_seconds)

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.wall_seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3

    @property
    def cpu_ms(self) -> float:
        return self.cpu_seconds / self.count * 1e3

    @property
    def per_second(self) -> float:
        return self.count / self.elapsed_seconds if self.elapsed_seconds else 0.0
