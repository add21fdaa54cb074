"""`./dev bench`: what a run costs, and what the front ends add. Prints tables and ratios."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import launching, serving
from benchmarks.samples import Samples

_ROOT = Path(__file__).resolve().parent.parent
_REVIEWS = _ROOT / "tests" / "data" / "reviews"


def _recorded(name: str) -> bytes:
    """The body of a request that a real kube-apiserver sent."""
    document = json.loads((_REVIEWS / f"{name}.json").read_bytes())
    return json.dumps(document["body"], separators=(",", ":")).encode()


def _launching_table(results: list[Samples]) -> Table:
    floor = results[-2]
    table = Table(title="One run of one module", title_justify="left")
    for heading in ("how", "runs", "p50 ms", "p99 ms", "CPU ms", "CPU, times the floor"):
        table.add_column(heading, justify="left" if heading == "how" else "right")
    for each in results:
        table.add_row(
            each.name,
            str(len(each.wall_seconds)),
            f"{each.percentile_ms(0.5):.2f}",
            f"{each.percentile_ms(0.99):.2f}",
            f"{each.cpu_ms:.2f}",
            f"{each.cpu_ms / floor.cpu_ms:.2f}",
        )
    return table


def _serving_table(loads: list[serving.Load]) -> Table:
    table = Table(title="Reviews through the front ends; CPU in ms for each review", title_justify="left")
    for heading in (
        "front end",
        "review",
        "callers",
        "reviews/s",
        "p50 ms",
        "p99 ms",
        "runs",
        "spawner",
        "worker",
    ):
        table.add_column(heading, justify="left" if heading in ("front end", "review") else "right")
    for load in loads:
        table.add_row(
            load.kind,
            load.review,
            str(load.callers),
            f"{load.samples.per_second:.0f}",
            f"{load.samples.percentile_ms(0.5):.2f}",
            f"{load.samples.percentile_ms(0.99):.2f}",
            *(f"{load.cpu_ms[who]:.2f}" for who in ("runs", "spawners", "workers")),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs: a look, not a measurement")
    parser.add_argument("--only", choices=("runs", "reviews"), help="one of the two tables")
    arguments = parser.parse_args()
    rounds, count, seconds = (2, 50, 2.0) if arguments.quick else (5, 200, 10.0)
    console = Console(width=120)
    console.print(
        f"{platform.machine()}, Linux {platform.release()}, {len(os.sched_getaffinity(0))} CPUs allowed"
    )
    module = Path(str(files("bulkhead.service.demo") / "magic-validate.wasm"))
    # The demo's rules ask the module about ConfigMaps, and nobody about Pods.
    bodies = {
        "asks one module": _recorded("admission-validate-create-configmaps"),
        "asks none": _recorded("admission-validate-create-pods"),
    }
    request = b'{"request":' + bodies["asks one module"] + b"}"
    console.print(f"module {module.name}, {module.stat().st_size} bytes; input of {len(request)} bytes\n")
    if arguments.only != "reviews":
        with console.status("starting processes"):
            launched = launching.run(module, "validate", request, rounds=rounds, count=count)
        console.print(_launching_table(launched))
    if arguments.only != "runs":
        with console.status("asking reviews"):
            served = serving.run(bodies, callers=(1, 8, 32), seconds=seconds)
        console.print(_serving_table(served))


if __name__ == "__main__":
    main()
