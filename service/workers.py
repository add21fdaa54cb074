"""How many processes answer over HTTPS, where nobody says."""

from __future__ import annotations

from bulkhead.sandbox import usable_cpus

# Beyond that the one spawner is what limits, and each takes 70 MB.
_MOST_AUTOMATIC_WORKERS = 8


def automatic_workers(cpus: int | None = None) -> int:
    """For so many CPUs, or those that may be used.

    A review takes a quarter to a third of its CPU time in a worker, the rest in runs.
    """
    cpus = usable_cpus() if cpus is None else cpus
    return max(1, min(_MOST_AUTOMATIC_WORKERS, -(-cpus // 3)))
