"""Reviews per second and latency over HTTPS: Bulkhead, and a server that runs modules inside itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import AskingFailed, Generator, Target
from benchmarks.samples import Samples
from benchmarks.servers import Certificate, Server, admission_module, bulkhead, wazero
from benchmarks.subjects import Subject, pod_review, recorded

_WORKERS = (1, 2)
_WAZERO = {
    "wazero, no deadline": (),
    "wazero, deadline": ("-close-on-done",),
    "wazero, deadline, a run per CPU": ("-close-on-done", "-slots", str(len(os.sched_getaffinity(0)))),
}
"""What it is asked with: the first cannot stop a module, the second lets any number run at a time."""
_GRPC = "Bulkhead, gRPC"
_UNASKED = "Bulkhead, 1 worker, no module asked"
"""No rule names the object: what is left is the front end."""


def bulkhead_row(workers: int) -> str:
    return f"Bulkhead, {workers} worker{'s' if workers > 1 else ''}"


COMPARED = bulkhead_row(max(_WORKERS))
"""The row of Bulkhead's that other servers are compared with."""


@dataclass(slots=True)
class Load:
    """One measurement: so many callers, of one server, about one thing."""

    server: str
    callers: int
    samples: Samples = field(default_factory=lambda: Samples(""))
    generator_seconds: float = 0.0
    """CPU time that asking took, on the same CPUs."""

    @property
    def generator_ms(self) -> float:
        return self.generator_seconds / self.samples.count * 1e3


@dataclass(frozen=True, slots=True)
class _Case:
    """What is asked of which server."""

    row: str
    server: Server
    target: Target


def run(
    subject: Subject,
    programs: Path | None,
    *,
    rounds: int,
    seconds: float,
    callers: tuple[int, ...],
    front_ends: bool,
) -> list[Load]:
    """All servers live at once, and are asked in turn; idle ones take no CPU.

    `programs` is the folder of those written in Go, if there is one. `front_ends` adds what tells of
    Bulkhead's front ends rather than of the module.
    """
    with TemporaryDirectory() as name, _servers(Path(name), subject, programs, front_ends) as cases:
        loads = {(case.row, count): Load(case.row, count) for case in cases for count in callers}
        for number, count in product(range(rounds), callers):
            _say(f"{subject.name}, round {number + 1} of {rounds}, {count} callers")
            for case in cases:
                _take(loads[case.row, count], Generator.of(programs), case, seconds)
        return list(loads.values())


def _take(load: Load, generator: Generator, case: _Case, seconds: float) -> None:
    before = case.server.cpu_seconds()
    try:
        answers = generator.ask(case.target, load.callers, seconds)
    except AskingFailed as failed:
        raise SystemExit(f"{case.row}: {failed}\n{case.server.words()}") from failed
    used = case.server.cpu_seconds() - before
    measured = len(answers.wall_seconds)
    part = Samples(
        "",
        answers.wall_seconds,
        cpu_seconds=used * measured / (measured + answers.warm_up),
        elapsed_seconds=answers.elapsed_seconds,
    )
    load.samples.add(part)
    load.generator_seconds += answers.generator_cpu_seconds


@contextmanager
def _servers(
    folder: Path, subject: Subject, programs: Path | None, front_ends: bool
) -> Iterator[list[_Case]]:
    """Starts all servers for one module."""
    state, body = folder / "state", folder / "pod.json"
    certificate = Certificate(state / "tls")
    body.write_bytes(pod_review())
    cases = []
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for workers in _WORKERS:
            modules = [admission_module(subject.name, subject.file)]
            place = folder / f"workers-{workers}"
            server = bulkhead(place, state, {"admission": {"modules": modules}}, "--workers", str(workers))
            stack.callback(server.stop)
            servers[bulkhead_row(workers)] = server
        for row, options in _WAZERO.items():
            if programs is None:
                break
            server = wazero(programs / "wazeroserver", certificate, subject.file, *options)
            stack.callback(server.stop)
            servers[row] = server
        for row, server in servers.items():
            target = Target(server.address, certificate.authority, body)
            cases.append(_Case(row, server, target))
        if front_ends:
            cases += _front_ends(cases[0], folder)
        yield cases


def _front_ends(case: _Case, folder: Path) -> list[_Case]:
    unasked = folder / "configmap.json"
    unasked.write_bytes(recorded("admission-validate-create-configmaps"))
    grpc = replace(case.target, address=case.server.grpc_address, protocol="grpc")
    return [
        replace(case, row=_UNASKED, target=replace(case.target, body=unasked)),
        replace(case, row=_GRPC, target=grpc),
    ]


def _say(text: str) -> None:
    print(f"bench: reviews: {text}", file=sys.stderr, flush=True)
