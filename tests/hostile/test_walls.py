"""What stands behind WebAssembly: native code in the guest's place hits a wall, and is told which."""

from __future__ import annotations

import platform
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from bulkhead.sandbox import Layer, Limits, Outcome, Sandbox, SandboxOptions, Way
from tests.support.native_guest import attempts, plant
from tests.support.sandboxes import Leftovers, Sandboxes

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the attempts are written for x86-64 machines"
)

LIMITS = Limits(memory_bytes=16 << 20, wall_seconds=20, cpu_seconds=5, stdout_bytes=100_000)
REFUSED = 77
# Calls that honest runs make as well, or that merely say no: an error instead of the end.
REFUSALS = {
    "look_at_a_path",
    "look_at_a_path_with_statx",
    "look_into_the_root_directory",
    "find_another_descriptor",
    "read_from_another_descriptor",
    "copy_a_descriptor_with_fcntl",
    "own_a_descriptors_signals",
    "type_into_a_terminal",
    "fork_with_clone3",
}
ENDS = {
    "use_cpu_time_for_ever": (Outcome.CPU_LIMIT,),
    "use_cpu_time_with_all_signals_blocked": (Outcome.CPU_LIMIT,),
    "sleep_for_ever": (Outcome.TIMEOUT,),
    "write_without_end": (Outcome.STDOUT_LIMIT,),
    # Refused by the kernel, and it gives up; or its memory is so short that it is ended.
    "take_memory_without_end": (Outcome.EXIT_NONZERO, Outcome.MEMORY_LIMIT, Outcome.SANDBOX_CRASH),
    "start_threads_without_end": (Outcome.EXIT_NONZERO, Outcome.CPU_LIMIT),
}
SHORT = {
    "use_cpu_time_for_ever": replace(LIMITS, cpu_seconds=0.1),
    "use_cpu_time_with_all_signals_blocked": replace(LIMITS, cpu_seconds=0.1),
    "sleep_for_ever": replace(LIMITS, wall_seconds=0.3),
}
# Seconds of CPU: RLIMIT_CPU counts whole ones, behind the timer.
SLOW = {"use_cpu_time_with_all_signals_blocked"}
NAMES = attempts()


@pytest.fixture(scope="module")
def planted_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest_asyncio.fixture(params=[True, False], ids=["zygote", "exec"])
async def planted(
    request: pytest.FixtureRequest, sandboxes: Sandboxes, planted_state: Path
) -> AsyncIterator[tuple[Sandbox, str]]:
    """A sandbox with the attempts in it, and their digest."""
    state_dir = planted_state / "state"
    if not (planted_state / "module.wasm").exists():
        async with sandboxes.open(state_dir) as sandbox:
            (planted_state / "module.wasm").write_bytes(await plant(sandbox, planted_state))
    options = SandboxOptions(state_dir=state_dir, zygotes=request.param)
    async with sandboxes.open(state_dir, options) as sandbox:
        info = await sandbox.load((planted_state / "module.wasm").read_bytes())
        yield sandbox, info.digest


def expected(name: str) -> tuple[Outcome, ...]:
    if name in REFUSALS:
        return (Outcome.EXIT_NONZERO,)
    return ENDS.get(name, (Outcome.SANDBOX_VIOLATION,))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
async def test_native_code_hits_a_wall(planted: tuple[Sandbox, str], name: str) -> None:
    sandbox, digest = planted
    limits = SHORT.get(name, LIMITS)
    leftovers = await Leftovers.of(sandbox)
    if sandbox.options.zygotes:
        await sandbox.prepare(digest, "run", limits=limits)
    result = await sandbox.run(digest, "run", stdin=str(NAMES.index(name)).encode(), limits=limits)
    assert b"escaped" not in result.stdout, "it succeeded"
    assert result.outcome in expected(name), (result.outcome, result.exit_code, result.stderr)
    if result.outcome is Outcome.EXIT_NONZERO:
        assert result.exit_code == REFUSED
    assert result.usage.way is (Way.ZYGOTE if sandbox.options.zygotes else Way.EXEC)
    await leftovers.none()


async def test_the_walls_are_all_there(planted: tuple[Sandbox, str]) -> None:
    """Of this machine, on which the tests above mean something only then."""
    sandbox, _ = planted
    assert sandbox.runtime.layers == Layer(sum(Layer))
    assert sandbox.runtime.zygote_obstacle == ""


def test_expectations_are_of_attempts_that_there_are() -> None:
    assert len(NAMES) == len(set(NAMES)) > 90
    assert (REFUSALS | set(ENDS) | set(SHORT) | SLOW) <= set(NAMES)
