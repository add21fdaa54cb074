"""The results as tables. Every row says of how many samples it is."""

from __future__ import annotations

from rich.table import Table

from benchmarks.launching import floor_of
from benchmarks.memory import Footprint
from benchmarks.reviews import COMPARED, Load
from benchmarks.samples import Samples


def runs_table(title: str, results: list[Samples]) -> Table:
    floor = floor_of(results)
    table = _table(title, ("how",), ("runs", "p50 ms", "p99 ms", "CPU ms", "p50 / floor", "CPU / floor"))
    for each in results:
        table.add_row(
            each.name,
            str(each.count),
            f"{each.percentile_ms(0.5):.2f}",
            f"{each.percentile_ms(0.99):.2f}",
            f"{each.cpu_ms:.2f}",
            f"{each.percentile_ms(0.5) / floor.percentile_ms(0.5):.2f}",
            f"{each.cpu_ms / floor.cpu_ms:.2f}",
        )
    return table


def reviews_table(title: str, loads: list[Load]) -> Table:
    numbers = ("callers", "reviews", "reviews/s", "p50 ms", "p99 ms", "CPU ms", "callers' CPU ms")
    table = _table(title, ("server",), numbers)
    for number, load in enumerate(loads):
        samples = load.samples
        last_of_server = number + 1 == len(loads) or loads[number + 1].server != load.server
        table.add_row(
            load.server,
            str(load.callers),
            str(samples.count),
            f"{samples.per_second:.0f}",
            f"{samples.percentile_ms(0.5):.2f}",
            f"{samples.percentile_ms(0.99):.2f}",
            f"{samples.cpu_ms:.2f}",
            f"{load.generator_ms:.2f}",
            end_section=last_of_server,
        )
    return table


def comparison_table(title: str, loads: list[Load]) -> Table | None:
    """Bulkhead's figures divided by those of each other server; None where there is no other."""
    by_server = {(load.server, load.callers): load.samples for load in loads}
    table = _table(title, ("compared with",), ("callers", "reviews/s, times", "p50, times", "p99, times"))
    for (server, callers), other in by_server.items():
        if not server.startswith("wazero"):
            continue
        ours = by_server[COMPARED, callers]
        table.add_row(
            server,
            str(callers),
            f"{ours.per_second / other.per_second:.2f}",
            *(f"{ours.percentile_ms(share) / other.percentile_ms(share):.2f}" for share in (0.5, 0.99)),
        )
    return table if table.row_count else None


def memory_table(title: str, thing: str, footprints: list[Footprint]) -> Table:
    each_thing = (f"private / {thing}", f"proportional / {thing}")
    table = _table(title, ("in MB",), ("processes", "resident", "proportional", "private", *each_thing))
    for each in footprints:
        memory, base = each.memory, each.base
        sizes = [memory.resident, memory.proportional, memory.private]
        if base is not None:
            more = (memory.private - base.private, memory.proportional - base.proportional)
            sizes += [size // each.things for size in more]
        table.add_row(each.when, str(memory.processes), *(f"{size / 1e6:.2f}" for size in sizes))
    return table


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
