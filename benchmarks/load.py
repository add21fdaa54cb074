"""Callers who ask reviews: a program of their own, for it must take as little as it can of the CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.products import HERE


class AskingFailed(Exception):
    """An answer did not come, or was wrong."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and what it is asked."""

    address: str
    ca_certificate: Path
    body: Path
    protocol: str = "https"
    """Or grpc, which only the generator written in Python speaks."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of asking."""

    wall_seconds: list[float]
    elapsed_seconds: float
    warm_up: int
    """So many answers came before those that were measured: they took CPU time, too."""
    generator_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Generator:
    """What asks. The same for all servers that are compared."""

    program: Path | None
    """The one written in Go; without it, the one in Python, which takes several times the CPU."""

    @classmethod
    def of(cls, programs: Path | None) -> Generator:
        """The best that there is; `programs` is the folder of those written in Go."""
        return cls(programs / "load" if programs else None)

    def ask(self, target: Target, callers: int, seconds: float) -> Answers:
        """Asks for so long, after a short warm-up. Raises AskingFailed."""
        if self.program is not None and target.protocol == "https":
            command = [str(self.program)]
        else:
            command = [sys.executable, "-m", "benchmarks.pyload", "-protocol", target.protocol]
        command += ["-address", target.address, "-ca", str(target.ca_certificate)]
        command += ["-body", str(target.body), "-callers", str(callers), "-duration", f"{seconds}s"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
        if done.returncode != 0:
            raise AskingFailed(f"{' '.join(command)} failed:\n{done.stderr}")
        told = json.loads(done.stdout)
        return Answers(
            wall_seconds=[each / 1e9 for each in told["latencies"]],
            elapsed_seconds=told["elapsedNanoseconds"] / 1e9,
            warm_up=told["warmUpAnswers"],
            generator_cpu_seconds=told["cpuNanoseconds"] / 1e9,
        )
