"""How many CPUs the service may really use: those that it is allowed on, and no more than it is paid for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_PROCESS = Path("/proc/self")


class _Mount(NamedTuple):
    """A cgroup file system."""

    root: PurePosixPath
    """The cgroup that is its top folder."""
    point: Path
    controllers: frozenset[str]
    """Empty for version 2."""


def usable_cpus() -> int:
    """At least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(process: Path = _PROCESS) -> float | None:
    """The CPUs that the process's cgroups give it together, such as 1.5; None for no bound.

    `process` is its folder in /proc. What cannot be read bounds nothing.
    """
    try:
        quotas = list(_quotas(process))
    except (OSError, ValueError):
        return None
    return min(quotas, default=None)


def _quotas(process: Path) -> Iterator[float]:
    """Of its cgroups and of those that these are in: the least one counts."""
    mounts = list(_mounts((process / "mountinfo").read_text()))
    for line in (process / "cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        controllers = frozenset(filter(None, names.split(",")))
        if controllers and "cpu" not in controllers:
            continue
        for mount in mounts:
            if mount.controllers == controllers or "cpu" in mount.controllers & controllers:
                yield from _quotas_on_the_way(mount, PurePosixPath(path))


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            yield _Mount(PurePosixPath(root), Path(point), frozenset())
        elif kind == "cgroup" and "cpu" in options.split(","):
            yield _Mount(PurePosixPath(root), Path(point), frozenset({"cpu"}))


def _quotas_on_the_way(mount: _Mount, path: PurePosixPath) -> Iterator[float]:
    # Where the path is another namespace's, the top folder is all that there is to see.
    below = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath()
    for relative in (below, *below.parents):
        quota = _quota_in(mount.point / relative)
        if quota is not None:
            yield quota


def _quota_in(folder: Path) -> float | None:
    """What is set in one cgroup, be it of version 2 or 1."""
    for read in (_read_version_2, _read_version_1):
        try:
            quota, period = read(folder)
        except OSError:
            continue
        return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def _read_version_2(folder: Path) -> tuple[str, str]:
    quota, period = (folder / "cpu.max").read_text().split()
    return quota, period


def _read_version_1(folder: Path) -> tuple[str, str]:
    quota, period = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    return quota.read_text().strip(), period.read_text().strip()
