"""The memory of `bulkhead serve`: by configured modules, and by runs in flight."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.load import Generator, Target
from benchmarks.servers import Certificate, Server, admission_module, bulkhead
from benchmarks.subjects import Subject, pod_review

_SETTLE_SECONDS = 2.0
_SLEEP_SECONDS = 6


@dataclass(frozen=True, slots=True)
class Memory:
    """Of some processes together, in bytes."""

    processes: int
    resident: int
    """What processes share is counted for each of them."""
    proportional: int
    """What n processes share is counted as an nth for each: together it is what they take."""
    private: int
    """What no other process has, of each of them."""


NOTHING = Memory(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a service takes when something was done with it."""

    when: str
    memory: Memory
    base: Memory | None = None
    """Of a service that differs in the things alone; None where there is nothing to compare with."""
    things: int = 0
    """So many modules, or runs."""


def by_modules(subject: Subject, counts: tuple[int, ...], generator: Generator) -> list[Footprint]:
    """Services with so many different modules: after the start, and after each module has been asked."""
    found = []
    bases: dict[str, Memory] = {}
    for count in counts:
        _say(f"{count} modules")
        with TemporaryDirectory() as name:
            modules = [admission_module(file.stem, file) for file in _copies(subject, Path(name), count)]
            with _service(Path(name), modules) as (server, target):
                for when in ("started", "asked"):
                    if when == "asked":
                        generator.ask(target, callers=1, seconds=0.1)
                    time.sleep(_SETTLE_SECONDS)
                    memory = measure(server.pids())
                    bases.setdefault(when, memory)
                    base = bases[when] if count else None
                    found.append(Footprint(f"{count} modules, {when}", memory, base, count))
    return found


def in_flight(subject: Subject, counts: tuple[int, ...], generator: Generator) -> list[Footprint]:
    """The processes of so many runs at once, that hold all they need and sleep.

    Theirs alone: what a zygote shares with its runs is no longer private to it, so that what the whole
    service has of its own may even shrink by a run.
    """
    found = []
    settings = {"sleepMilliseconds": _SLEEP_SECONDS * 1000}
    module = admission_module(
        subject.name, subject.file, settings=settings, limits={"timeout": f"{2 * _SLEEP_SECONDS}s"}
    )
    with TemporaryDirectory() as name, _service(Path(name), [module]) as (server, target):
        generator.ask(target, callers=1, seconds=0.1)
        others = server.pids()
        for count in counts:
            _say(f"{count} runs in flight")
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(generator.ask, target, count, 0.1)
                time.sleep(_SLEEP_SECONDS / 2)
                memory = measure(server.pids() - others)
                found.append(Footprint(f"{count} in flight", memory, NOTHING, count))
                asking.result()
    return found


def measure(pids: set[int]) -> Memory:
    """Sums over processes. Raises PermissionError where the kernel does not tell."""
    sums = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    processes = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        processes += 1
        for line in lines:
            name, _, size = line.partition(":")
            if name in sums:
                sums[name] += int(size.split()[0]) * 1024
    return Memory(processes, sums["Rss"], sums["Pss"], sums["Private_Clean"] + sums["Private_Dirty"])


def _copies(subject: Subject, folder: Path, count: int) -> Iterator[Path]:
    """Different modules that do the same: each has a custom section of its own."""
    code = subject.file.read_bytes()
    for number in range(count):
        content = b"\x04copy" + number.to_bytes(4, "little")
        file = folder / f"{subject.name}-{number}.wasm"
        file.write_bytes(code + bytes([0, len(content)]) + content)
        yield file


@contextmanager
def _service(folder: Path, modules: list[dict[str, object]]) -> Iterator[tuple[Server, Target]]:
    state, body = folder / "state", folder / "body.json"
    body.write_bytes(pod_review())
    server = bulkhead(folder / "service", state, {"admission": {"modules": modules}}, "--workers", "1")
    try:
        yield server, Target(server.address, Certificate(state / "tls").authority, body)
    finally:
        server.stop()


def _say(text: str) -> None:
    print(f"bench: memory: {text}", file=sys.stderr, flush=True)
