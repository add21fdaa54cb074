"""`./dev bench`: what a run costs, what the service adds, what it all takes. Prints tables and ratios."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks import launching, memory, reviews, tables
from benchmarks.load import Generator
from benchmarks.products import Missing, go_programs
from benchmarks.subjects import Subject, subjects

_PARTS = ("runs", "reviews", "memory")


@dataclass(frozen=True, slots=True)
class _Effort:
    """How much is measured."""

    review_rounds: int
    run_rounds: int
    """Many and short: the ratios are of what ran side by side."""
    runs: int
    """In a round, of each way of running."""
    seconds: float
    """In a round, of each server and number of callers."""
    callers: tuple[int, ...]
    modules: tuple[int, ...]
    in_flight: tuple[int, ...]


_THOROUGH = _Effort(4, 20, 40, 1.0, (1, 8, 32, 128), (0, 10, 50), (1, 4, 8))
_QUICK = _Effort(2, 4, 20, 0.5, (1, 32), (0, 10), (4,))


@dataclass(slots=True)
class _Bench:
    effort: _Effort
    console: Console
    skipped: list[str] = field(default_factory=list)

    def run(self, parts: tuple[str, ...]) -> None:
        found = subjects(self.skipped)
        programs = self._programs() if parts != ("runs",) else None
        self.console.print(
            f"{platform.machine()}, Linux {platform.release()}, {len(os.sched_getaffinity(0))} CPUs allowed;"
            f" {os.getloadavg()[0]:.1f} processes ran in the last minute"
        )
        for subject in found:
            self.console.print(str(subject))
        for subject in found if "runs" in parts else ():
            self._runs(subject)
        for subject in found if "reviews" in parts else ():
            self._reviews(subject, programs, front_ends=subject is found[0])
        if "memory" in parts:
            self._memory(found, Generator.of(programs))
        for reason in self.skipped:
            self.console.print(f"Skipped: {reason}")

    def _programs(self) -> Path | None:
        try:
            return go_programs()
        except Missing as missing:
            self.skipped.append(f"wazero, and callers that take little CPU: {missing}")
            return None

    def _runs(self, subject: Subject) -> None:
        rounds, count = self.effort.run_rounds, self.effort.runs
        results = launching.run(subject, rounds=rounds, count=count, skipped=self.skipped)
        self.console.print(tables.runs_table(f"One run of {subject.name}", results))

    def _reviews(self, subject: Subject, programs: Path | None, *, front_ends: bool) -> None:
        effort = self.effort
        loads = reviews.run(
            subject,
            programs,
            rounds=effort.review_rounds,
            seconds=effort.seconds,
            callers=effort.callers,
            front_ends=front_ends,
        )
        self.console.print(tables.reviews_table(f"Reviews, answered by {subject.name}", loads))
        compared = tables.comparison_table(f"{reviews.COMPARED}, {subject.name}", loads)
        if compared is not None:
            self.console.print(compared)

    def _memory(self, found: list[Subject], generator: Generator) -> None:
        subject = next((each for each in found if each.sleeps), found[0])
        try:
            modules = memory.by_modules(subject, self.effort.modules, generator)
            self.console.print(
                tables.memory_table(f"Memory of the service, by copies of {subject.name}", "module", modules)
            )
            if not subject.sleeps:
                self.skipped.append(f"memory of runs in flight: {subject.name} cannot sleep")
                return
            runs = memory.in_flight(subject, self.effort.in_flight, generator)
            self.console.print(tables.memory_table(f"Memory of the runs, of {subject.name}", "run", runs))
        except PermissionError as error:
            self.skipped.append(f"memory: {error}; only root may look at confined processes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs: a look, not a measurement")
    parser.add_argument("--only", choices=_PARTS, help="one of the parts")
    arguments = parser.parse_args()
    bench = _Bench(_QUICK if arguments.quick else _THOROUGH, Console(width=120))
    bench.run((arguments.only,) if arguments.only else _PARTS)


if __name__ == "__main__":
    main()
