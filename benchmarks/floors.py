"""What is under any launcher: C programs that start a run again and again, and do nothing else."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.products import c_program
from benchmarks.samples import Samples

NOT_PINNED = -1
STAYS_WHERE_IT_BEGINS = -2
"""As Bulkhead has it; only a zygote can."""
# As Bulkhead sets it for wasmtime.
ENVIRONMENT = {"TOKIO_WORKER_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class ExecFloor:
    """floor.c: executes a command for every run."""

    program: Path
    request: Path

    @classmethod
    def build(cls, request: Path) -> ExecFloor:
        return cls(c_program("floor.c"), request)

    def measure(self, argv: list[str], count: int, cpu: int = NOT_PINNED) -> Samples:
        return _measure([str(self.program), str(count), str(cpu), str(self.request), *argv])


@dataclass(frozen=True, slots=True)
class ZygoteFloor:
    """zygote_floor.c: forks every run from one zygote, with the confinement that Bulkhead gives it."""

    program: Path
    request: Path
    library: Path
    layers: int
    artifact_fd: int
    argv: tuple[str, ...]

    @classmethod
    def build(
        cls, request: Path, library: Path, *, layers: int, artifact_fd: int, argv: tuple[str, ...]
    ) -> ZygoteFloor:
        program = c_program("zygote_floor.c", "process.c", "confine.c")
        return cls(program, request, library, layers, artifact_fd, argv)

    def measure(self, count: int, cpu: int = NOT_PINNED) -> Samples:
        numbers = map(str, (count, cpu, self.layers, self.artifact_fd))
        command = [str(self.program), *numbers, str(self.library), str(self.request), *self.argv]
        return _measure(command, self.artifact_fd)


def _measure(command: list[str], *files: int) -> Samples:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, pass_fds=files)
    if done.returncode != 0:
        raise SystemExit(f"ended with {done.returncode}: {shlex.join(command)}\n{done.stderr}")
    *runs, own = done.stdout.splitlines()
    samples = Samples("")
    for line in runs:
        wall, cpu_time = map(int, line.split())
        samples.wall_seconds.append(wall / 1e9)
        samples.cpu_seconds += cpu_time / 1e9
    samples.cpu_seconds += int(own.split()[1]) / 1e9
    return samples
