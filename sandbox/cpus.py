"""How many CPUs this process may really use: its affinity, and the quotas of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_OWN_GROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """At least 1. A quota of one and a half CPUs counts as two: runs overlap with waiting."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(own_groups: Path = _OWN_GROUPS, hierarchies: Path = _HIERARCHIES) -> float | None:
    """CPUs that the kernel lets us have in each period; None: as many as there are.

    Of version 2 and version 1 control groups, of our own group and those around it: the least counts.
    """
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += [_quota_v2(folder) for folder in _folders(hierarchies, path)]
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu"):
                quotas += [_quota_v1(folder) for folder in _folders(hierarchies / mount, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(hierarchy: Path, path: str) -> Iterator[Path]:
    """Of a group and all groups around it. In a container the path may be one of the host's."""
    own = PurePosixPath(path)
    for group in (own, *own.parents):
        yield hierarchy / str(group).lstrip("/")


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return None if quota < 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
