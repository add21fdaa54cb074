"""How many CPUs the service finds that it may use."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.sandbox.cpus import cpu_quota, usable_cpus


class Machine:
    """Files as Linux shows them to a process."""

    def __init__(self, folder: Path) -> None:
        self.own_groups, self.hierarchies = folder / "cgroup", folder / "cgroups"

    def write(self, path: str, text: str) -> None:
        (self.hierarchies / path).parent.mkdir(parents=True, exist_ok=True)
        (self.hierarchies / path).write_text(text + "\n")

    def quota(self, *groups: str) -> float | None:
        self.own_groups.write_text("".join(f"{line}\n" for line in groups))
        return cpu_quota(self.own_groups, self.hierarchies)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_version_2_in_a_container(machine: Machine) -> None:
    machine.write("cpu.max", "150000 100000")
    assert machine.quota("0::/") == 1.5


def test_the_least_quota_on_the_way_counts(machine: Machine) -> None:
    machine.write("kube.slice/cpu.max", "100000 50000")
    machine.write("kube.slice/pod/cpu.max", "max 100000")
    machine.write("kube.slice/pod/container/cpu.max", "300000 100000")
    assert machine.quota("0::/kube.slice/pod/container") == 2.0
    assert machine.quota("0::/another") is None


def test_no_quota_is_no_bound(machine: Machine) -> None:
    machine.write("cpu.max", "max 100000")
    assert machine.quota("0::/") is None


def test_version_1_beside_version_2(machine: Machine) -> None:
    machine.write("cpu,cpuacct/a/cpu.cfs_quota_us", "25000")
    machine.write("cpu,cpuacct/a/cpu.cfs_period_us", "100000")
    machine.write("cpu,cpuacct/cpu.cfs_quota_us", "-1")
    machine.write("cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert machine.quota("3:memory:/b", "2:cpu,cpuacct:/a", "1:name=systemd:/", "0::/") == 0.25


def test_version_1_in_a_container_that_sees_the_path_of_the_host(machine: Machine) -> None:
    machine.write("cpu/cpu.cfs_quota_us", "400000")
    machine.write("cpu/cpu.cfs_period_us", "100000")
    assert machine.quota("1:cpu:/docker/c0ffee") == 4.0


def test_what_cannot_be_read_bounds_nothing(machine: Machine) -> None:
    assert cpu_quota(machine.own_groups, machine.hierarchies) is None
    machine.write("cpu.max", "gibberish")
    assert machine.quota("0::/") is None


def test_affinity_bounds() -> None:
    cpu = min(os.sched_getaffinity(0))
    line = f"import os; os.sched_setaffinity(0, {{{cpu}}}); import bulkhead.sandbox.cpus as c;"
    line += "print(c.usable_cpus())"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout == "1\n"


@pytest.fixture
def half_a_cpu() -> Iterator[Path]:
    """A real cgroup with a quota, empty again afterwards."""
    name = f"bulkhead-test-{os.getpid()}"
    for parent, files in (
        (Path("/sys/fs/cgroup"), {"cpu.max": "50000 100000"}),
        (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
    ):
        cgroup = parent / name
        try:
            cgroup.mkdir()
        except OSError:
            continue
        try:
            if all((cgroup / file).exists() for file in files):
                for file, text in files.items():
                    (cgroup / file).write_text(text)
                yield cgroup
                return
        finally:
            cgroup.rmdir()
    pytest.skip("no cgroup with a CPU controller can be made here")


def test_a_real_cgroup_bounds(half_a_cpu: Path) -> None:
    line = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
    line += "import bulkhead.sandbox.cpus as c; print(c.cpu_quota(), c.usable_cpus())"
    command = [sys.executable, "-c", line, str(half_a_cpu / "cgroup.procs")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "0.5 1\n", ended.stderr


def test_this_process_may_use_something() -> None:
    quota = cpu_quota()
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))
    assert quota is None or usable_cpus() <= math.ceil(quota)
