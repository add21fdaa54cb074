"""Zygotes: that their runs are each on their own, and that nothing which happens to one is lost or lasts."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import pytest_asyncio

from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.memfile import create_memfile, write_memfile
from bulkhead.sandbox.outcome import Way
from bulkhead.sandbox.spawner import LIBRARY, Spawner
from bulkhead.sandbox.spawner_protocol import (
    KEY_BYTES,
    Bounds,
    ProcessEnd,
    Program,
    ProgramFlags,
    Stage,
    StartFailed,
    ZygoteReport,
    ZygoteState,
)
from tests.support import raw_zygote as raw
from tests.support.raw_spawner import is_gone, wait_until_gone
from tests.support.raw_zygote import ENVIRONMENT, Guest, compile_guest, raw_zygote, zygote_of
from tests.support.sandboxes import eventually

BOUNDS = Bounds(
    wall_seconds=30,
    cpu_seconds=10,
    data_bytes=256 << 20,
    address_bytes=128 << 30,
    file_bytes=16 << 20,
    stderr_bytes=65536,
)
ZYGOTE = ProgramFlags.IS_WASMTIME | ProgramFlags.HAS_ZYGOTE
NEVER_FORKS = 127  # the exit code of what cannot be a zygote


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    return compile_guest(tmp_path_factory.mktemp("guest"))


class Host:
    """A spawner that runs a guest's entry points, and the news of their zygotes."""

    def __init__(self, spawner: Spawner, guest: Guest, artifact: int) -> None:
        self.spawner = spawner
        self.guest = guest
        self.process = psutil.Process(spawner.pid) if spawner.pid else psutil.Process()
        self.news: list[ZygoteReport] = []
        self._artifact = artifact
        spawner.on_zygote = self.news.append

    def program(self, entry_point: str, idle_seconds: float = 0.0) -> Program:
        return Program(
            key=secrets.token_bytes(KEY_BYTES),
            argv=self.guest.commands[entry_point],
            environment=ENVIRONMENT,
            flags=ZYGOTE,
            layers=self.guest.layers,
            idle_seconds=idle_seconds,
        )

    def register(self, program: Program) -> bytes:
        self.spawner.register(program, (self._artifact,))
        return program.key

    async def hear(self, key: bytes, state: ZygoteState, count: int = 1) -> None:
        def told() -> bool:
            return sum((news.key, news.state) == (key, state) for news in self.news) >= count

        await eventually(told, f"{state.name} {count} times")

    async def ready(self, entry_point: str, idle_seconds: float = 0.0) -> bytes:
        """Registers an entry point; returns its key when its zygote is there."""
        key = self.register(self.program(entry_point, idle_seconds))
        await self.hear(key, ZygoteState.READY)
        return key

    def start(
        self, key: bytes, stdin: bytes = b"", bounds: Bounds = BOUNDS
    ) -> tuple[asyncio.Future[ProcessEnd], Callable[[], None]]:
        return self.spawner.run(key, bounds, stdin=stdin)

    async def run(self, key: bytes, stdin: bytes = b"", bounds: Bounds = BOUNDS) -> ProcessEnd:
        async with asyncio.timeout(60):
            return await self.start(key, stdin, bounds)[0]

    def zygote(self) -> psutil.Process:
        """Where there is one, and no run that was executed."""
        (zygote,) = self.process.children()
        return zygote

    async def runs(self, count: int) -> list[psutil.Process]:
        """The processes that the only zygote has forked, when there are so many."""
        zygote = self.zygote()
        await eventually(lambda: len(zygote.children()) == count, f"{count} runs")
        return zygote.children()


@pytest_asyncio.fixture
async def host(guest: Guest) -> AsyncIterator[Host]:
    spawner = await Spawner.start()
    with guest.artifact_file() as artifact:
        yield Host(spawner, guest, artifact)
    await spawner.close()


def killed(end: ProcessEnd) -> tuple[int, EndReason, Way]:
    return end.wait_status, end.reason, end.usage.way


def forked(end: ProcessEnd) -> bool:
    return (end.wait_status, end.usage.way) == (0, Way.ZYGOTE)


async def die_of(process: psutil.Process, number: signal.Signals) -> None:
    """Sends a signal until the process is gone: the first one may only take wasmtime's handler away."""

    def try_again() -> bool:
        if not is_gone(process):
            process.send_signal(number)
        return is_gone(process)

    await eventually(try_again, f"it dies of {number.name}")


class TestRuns:
    """What comes out of a run that was forked."""

    async def test_is_forked_within_all_layers(self, host: Host) -> None:
        key = await host.ready("echo")
        assert host.news[0].layers == host.guest.layers
        end = await host.run(key, b"hello")
        assert forked(end)
        assert (end.stdout, end.stderr, end.layers) == (b"hello", b"", host.guest.layers)
        assert end.usage.cpu_seconds > 0
        assert 0 < end.usage.private_memory_bytes < end.usage.peak_memory_bytes

    async def test_fifty_at_once_each_get_their_own_answer(self, host: Host) -> None:
        key = await host.ready("echo")
        inputs = [b"input %d" % n * (n + 1) for n in range(50)]
        ends = await asyncio.gather(*(host.run(key, data) for data in inputs))
        assert [end.stdout for end in ends] == inputs
        assert all(map(forked, ends))
        assert not host.zygote().children()

    async def test_long_input_and_output(self, host: Host) -> None:
        key = await host.ready("echo")
        data = secrets.token_bytes(3_000_000)
        fd = create_memfile("stdin")
        try:
            write_memfile(fd, data)
            async with asyncio.timeout(60):
                end = await host.spawner.run(key, BOUNDS, stdin_fd=fd)[0]
        finally:
            os.close(fd)
        assert forked(end)
        assert end.stdout == data

    async def test_standard_error_is_cut_and_the_run_goes_on(self, host: Host) -> None:
        key = await host.ready("shout")
        end = await host.run(key, b"x" * 50_000, replace(BOUNDS, stderr_bytes=1000))
        assert forked(end)
        assert (end.stderr, end.stderr_truncated, end.stdout) == (b"x" * 1000, True, b"")

    async def test_no_two_draw_the_same_random_bytes(self, host: Host) -> None:
        key = await host.ready("random")
        ends = await asyncio.gather(*(host.run(key) for _ in range(200)))
        assert all(map(forked, ends))
        assert len({end.stdout for end in ends}) == 200

    async def test_limits_of_each_run_are_its_own(self, host: Host) -> None:
        key = await host.ready("echo")
        small = replace(BOUNDS, file_bytes=10)
        ends = await asyncio.gather(
            *(host.run(key, b"x" * 11, small if n % 2 else BOUNDS) for n in range(10))
        )
        assert [(end.wait_status, len(end.stdout)) for end in ends] == [(0, 11), (signal.SIGXFSZ, 10)] * 5

    async def test_cpu_time(self, host: Host) -> None:
        end = await host.run(await host.ready("spin"), bounds=replace(BOUNDS, cpu_seconds=0.1))
        assert killed(end) == (signal.SIGPROF, EndReason.BY_ITSELF, Way.ZYGOTE)
        assert end.usage.cpu_seconds >= 0.05

    async def test_wall_time_and_only_of_that_run(self, host: Host) -> None:
        key = await host.ready("sleep")
        other, kill = host.start(key)
        end = await host.run(key, bounds=replace(BOUNDS, wall_seconds=0.2))
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.ZYGOTE)
        assert not other.done()
        kill()
        assert killed(await other) == (signal.SIGKILL, EndReason.KILLED, Way.ZYGOTE)
        assert [news.state for news in host.news] == [ZygoteState.READY]

    async def test_a_kill_that_comes_before_the_fork(self, host: Host) -> None:
        key = await host.ready("sleep")
        runs = [host.start(key) for _ in range(20)]
        for _, kill in runs:
            kill()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*(ended for ended, _ in runs))
        assert {killed(end)[:2] for end in ends} == {(signal.SIGKILL, EndReason.KILLED)}
        assert not host.zygote().children()

    async def test_a_trap_is_no_crash(self, host: Host) -> None:
        key = await host.ready("trap")
        for _ in range(5):
            end = await host.run(key)
            assert (end.wait_status, end.usage.way) == (134 << 8, Way.ZYGOTE)
        assert [news.state for news in host.news] == [ZygoteState.READY]

    async def test_runs_do_not_wait_for_a_zygote(self, host: Host) -> None:
        key = host.register(host.program("echo"))
        end = await host.run(key, b"early")
        assert (end.stdout, end.usage.way, end.layers) == (b"early", Way.EXEC, host.guest.layers)

    @pytest.mark.slow
    async def test_more_than_a_zygote_takes_are_executed(self, host: Host) -> None:
        key = await host.ready("sleep")
        zygote = host.zygote()
        runs = [host.start(key) for _ in range(raw.MOST_RUNS + 10)]
        await eventually(lambda: len(zygote.children()) == raw.MOST_RUNS, "all that it takes")
        await eventually(lambda: len(host.process.children()) == 11, "the others")
        for _, kill in runs:
            kill()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*(ended for ended, _ in runs))
        assert sum(end.usage.way is Way.EXEC for end in ends) == 10
        assert {end.reason for end in ends} == {EndReason.KILLED}

    async def test_two_thousand_leave_nothing_behind(self, host: Host) -> None:
        """Few descriptors are left to spawner and zygote, so that one lost in fifty runs would show."""
        key = await host.ready("echo")
        zygote = host.zygote()

        async def some(count: int) -> None:
            for n in range(count // 4):
                data = [b"%d %d" % (n, m) for m in range(4)]
                ends = await asyncio.gather(*(host.run(key, each) for each in data))
                assert [end.stdout for end in ends] == data
                assert all(map(forked, ends))

        await some(100)
        before = [process.memory_info().rss for process in (host.process, zygote)]
        for process, most in ((host.process, 64), (zygote, 48)):
            limit_descriptors(process, most)
        await some(2000)
        after = [process.memory_info().rss for process in (host.process, zygote)]
        assert host.zygote() == zygote
        assert not zygote.children()
        for then, now in zip(before, after, strict=True):
            assert now - then < 512 << 10, "memory grows"


class TestDeath:
    """What happens when a zygote or a run of it dies, or stops."""

    async def test_a_killed_zygote_takes_its_runs_along_and_is_replaced(self, host: Host) -> None:
        key = await host.ready("sleep")
        echo = await host.ready("echo")
        runs = [host.start(key)[0] for _ in range(3)]
        await eventually(lambda: any(process.children() for process in host.process.children()), "they run")
        sleeper = next(process for process in host.process.children() if process.children())
        await eventually(lambda: len(sleeper.children()) == 3, "all of them")
        children = sleeper.children()
        sleeper.kill()
        async with asyncio.timeout(30):
            ends = await asyncio.gather(*runs)
        assert [killed(end) for end in ends] == [(signal.SIGKILL, EndReason.BY_ITSELF, Way.ZYGOTE)] * 3
        await eventually(lambda: all(map(is_gone, children)), "its runs are gone")
        end = await host.run(key, bounds=replace(BOUNDS, wall_seconds=0.1))
        assert end.reason is EndReason.WALL_TIME
        assert forked(await host.run(echo, b"of another zygote"))
        await host.hear(key, ZygoteState.DIED)
        await host.hear(key, ZygoteState.READY, 2)
        end = await host.run(key, bounds=replace(BOUNDS, wall_seconds=0.1))
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.ZYGOTE)

    async def test_runs_that_come_while_there_is_no_zygote_are_executed(self, host: Host) -> None:
        key = await host.ready("echo")
        for count in range(1, 4):
            host.zygote().kill()
            ends = await asyncio.gather(*(host.run(key, b"%d" % n) for n in range(10)))
            for n, end in enumerate(ends):
                # Those that it had taken died with it.
                assert (end.wait_status, end.stdout) == (0, b"%d" % n) or killed(end) == (
                    signal.SIGKILL,
                    EndReason.BY_ITSELF,
                    Way.ZYGOTE,
                )
            await host.hear(key, ZygoteState.READY, count + 1)
        assert forked(await host.run(key, b"x"))

    async def test_a_stopped_zygote_is_killed_at_the_deadline_of_a_run(self, host: Host) -> None:
        key = await host.ready("echo")
        stopped = host.zygote()
        stopped.suspend()
        end = await host.run(key, b"x", replace(BOUNDS, wall_seconds=0.3))
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.ZYGOTE)
        await eventually(lambda: is_gone(stopped), "it is killed")
        await host.hear(key, ZygoteState.READY, 2)
        assert forked(await host.run(key, b"x"))

    async def test_runs_of_a_zygote_that_is_stopped_meet_their_deadline(self, host: Host) -> None:
        key = await host.ready("sleep")
        ended, _ = host.start(key, bounds=replace(BOUNDS, wall_seconds=0.5))
        (run,) = await host.runs(1)
        host.zygote().suspend()
        async with asyncio.timeout(30):
            end = await ended
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.ZYGOTE)
        await eventually(lambda: is_gone(run), "it is gone")

    async def test_a_stopped_run_meets_its_deadline_alone(self, host: Host) -> None:
        key = await host.ready("sleep")
        ended, _ = host.start(key, bounds=replace(BOUNDS, wall_seconds=0.5))
        (run,) = await host.runs(1)
        run.suspend()
        other, kill = host.start(key)
        async with asyncio.timeout(30):
            assert killed(await ended) == (signal.SIGKILL, EndReason.WALL_TIME, Way.ZYGOTE)
        assert not other.done()
        kill()
        await other
        assert [news.state for news in host.news] == [ZygoteState.READY]

    async def test_a_killed_run_dies_alone(self, host: Host) -> None:
        key = await host.ready("sleep")
        ended, _ = host.start(key)
        (run,) = await host.runs(1)
        other, kill = host.start(key)
        await host.runs(2)
        run.kill()
        async with asyncio.timeout(30):
            assert killed(await ended) == (signal.SIGKILL, EndReason.BY_ITSELF, Way.ZYGOTE)
        assert not other.done()
        kill()
        await other
        assert [news.state for news in host.news] == [ZygoteState.READY]

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGSYS])
    async def test_after_a_crash_the_next_runs_have_other_addresses(
        self, host: Host, number: signal.Signals
    ) -> None:
        key = await host.ready("sleep")
        first = host.zygote()
        ended, _ = host.start(key)
        (run,) = await host.runs(1)
        other, kill = host.start(key)
        await host.runs(2)
        await die_of(run, number)
        async with asyncio.timeout(30):
            assert killed(await ended) == (number, EndReason.BY_ITSELF, Way.ZYGOTE)
        await host.hear(key, ZygoteState.READY, 2)
        # The old one is there for its last run, and not longer.
        assert not other.done()
        assert len(host.process.children()) == 2
        kill()
        assert killed(await other) == (signal.SIGKILL, EndReason.KILLED, Way.ZYGOTE)
        await eventually(lambda: is_gone(first), "the old one is gone")
        end = await host.run(key, bounds=replace(BOUNDS, wall_seconds=0.1))
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.ZYGOTE)

    async def test_after_three_crashes_each_run_has_addresses_of_its_own(self, host: Host) -> None:
        key = await host.ready("sleep")
        for count in range(1, 4):
            ended, _ = host.start(key)
            (run,) = await host.runs(1)
            await die_of(run, signal.SIGABRT)
            async with asyncio.timeout(30):
                assert killed(await ended)[0] == signal.SIGABRT
            if count < 3:
                await host.hear(key, ZygoteState.READY, count + 1)
        await host.hear(key, ZygoteState.SHUNNED)
        await eventually(lambda: not host.process.children(), "no zygote")
        end = await host.run(key, bounds=replace(BOUNDS, wall_seconds=0.3))
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.EXEC)
        states = [news.state for news in host.news]
        assert states.count(ZygoteState.SHUNNED) == 1
        assert states.count(ZygoteState.READY) == 3

    async def test_dies_with_the_spawner(self, host: Host) -> None:
        key = await host.ready("sleep")
        host.start(key)
        processes = [host.zygote(), *await host.runs(1)]
        host.process.kill()
        await eventually(lambda: all(map(is_gone, processes)), "zygote and run are gone")


class TestShortage:
    """When descriptors run out, runs fail or end, and the next ones are as good as ever."""

    async def test_of_the_zygotes(self, host: Host) -> None:
        key = await host.ready("echo")
        limit_descriptors(host.zygote(), 3)
        for _ in range(3):
            with pytest.raises(StartFailed) as failed:
                await host.run(key)
            assert (failed.value.stage, failed.value.error_number) == (Stage.PREPARE, errno.EMFILE)
        limit_descriptors(host.zygote(), 64)
        assert forked(await host.run(key, b"x"))
        assert [news.state for news in host.news] == [ZygoteState.READY]

    async def test_of_the_spawners(self, host: Host) -> None:
        key = await host.ready("sleep")
        failures = 0
        for most in range(26, 10, -1):
            limit_descriptors(host.process, most)
            # Where the pidfd of a run does not arrive, its zygote is what can be killed.
            ended, _ = host.start(key, bounds=replace(BOUNDS, wall_seconds=0.1))
            async with asyncio.timeout(60):
                await asyncio.wait([ended])
            if isinstance(error := ended.exception(), StartFailed):
                assert error.error_number == errno.EMFILE
                failures += 1
            else:
                assert killed(ended.result())[:2] == (signal.SIGKILL, EndReason.WALL_TIME)
        assert failures > 3
        limit_descriptors(host.process, 64)
        await eventually(lambda: len(host.process.children()) <= 1, "nothing but a zygote is left")

    async def test_of_the_spawners_that_passes(self, host: Host) -> None:
        key = await host.ready("echo")
        limit_descriptors(host.process, 16)
        short = await asyncio.gather(*(host.run(key, b"%d" % n) for n in range(20)), return_exceptions=True)
        failed = [end for end in short if isinstance(end, BaseException)]
        assert failed
        assert {isinstance(error, StartFailed) and error.error_number for error in failed} == {errno.EMFILE}
        limit_descriptors(host.process, 64)
        ends = await asyncio.gather(*(host.run(key, b"%d" % n) for n in range(10)))
        assert [end.stdout for end in ends] == [b"%d" % n for n in range(10)]
        assert all(map(forked, ends))


def limit_descriptors(process: psutil.Process, most: int) -> None:
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (most, hard))


class TestLife:
    """When there is a zygote, and whose."""

    async def test_an_idle_one_stops_and_comes_back_on_demand(self, host: Host) -> None:
        key = await host.ready("echo", idle_seconds=0.3)
        await eventually(lambda: not host.process.children(), "it stops")
        end = await host.run(key, b"asleep")
        assert (end.stdout, end.usage.way) == (b"asleep", Way.EXEC)
        await host.hear(key, ZygoteState.READY, 2)
        async with asyncio.timeout(30):  # a slow machine may be too late once, or twice
            while (end := await host.run(key, b"awake")).usage.way is Way.EXEC:
                assert end.stdout == b"awake"
        assert end.stdout == b"awake"

    async def test_one_with_runs_is_not_idle(self, host: Host) -> None:
        key = await host.ready("sleep", idle_seconds=1.0)
        ended, kill = host.start(key)
        (run,) = await host.runs(1)
        await asyncio.sleep(1.5)
        assert not is_gone(run)
        assert not ended.done()
        kill()
        assert (await ended).reason is EndReason.KILLED
        await eventually(lambda: not host.process.children(), "now it stops")

    async def test_a_forgotten_one_ends_with_its_last_run(self, host: Host) -> None:
        key = await host.ready("sleep")
        ended, kill = host.start(key)
        (run,) = await host.runs(1)
        host.spawner.forget(key)
        with pytest.raises(StartFailed):
            await host.run(key)
        assert not ended.done()
        assert not is_gone(run)
        kill()
        assert killed(await ended) == (signal.SIGKILL, EndReason.KILLED, Way.ZYGOTE)
        await eventually(lambda: not host.process.children(), "it ends")

    async def test_a_forgotten_one_without_runs_ends_at_once(self, host: Host) -> None:
        key = await host.ready("echo")
        host.spawner.forget(key)
        await eventually(lambda: not host.process.children(), "it ends")
        starting = host.register(host.program("echo"))
        host.spawner.forget(starting)
        await eventually(lambda: not host.process.children(), "one that never was ready, too")

    @pytest.mark.slow
    async def test_a_worn_one_is_replaced_and_no_run_notices(self, host: Host) -> None:
        key = await host.ready("echo")
        first, runs = host.zygote(), 0
        while sum(news.state is ZygoteState.READY for news in host.news) < 2:
            ends = await asyncio.gather(*(host.run(key, b"%d" % n) for n in range(20)))
            assert all(map(forked, ends))
            assert [end.stdout for end in ends] == [b"%d" % n for n in range(20)]
            runs += len(ends)
            assert runs < 30_000, "it is never replaced"
        assert runs >= 20_000
        await eventually(lambda: is_gone(first), "the worn one ends")
        assert {news.state for news in host.news} == {ZygoteState.READY}

    async def test_two_clients_share_one(self, host: Host) -> None:
        program = host.program("echo")
        host.register(program)
        await host.hear(program.key, ZygoteState.READY)
        other = await Spawner.attach(host.spawner.connect())
        try:
            guest = Host(other, host.guest, host._artifact)
            guest.register(program)
            await guest.hear(program.key, ZygoteState.READY)
            ends = await asyncio.gather(
                *(each.run(program.key, b"%d" % n) for n in range(20) for each in (host, guest))
            )
            assert [end.stdout for end in ends] == [b"%d" % n for n in range(20) for _ in range(2)]
            assert all(map(forked, ends))
            zygote = host.zygote()
            host.spawner.forget(program.key)
            assert forked(await guest.run(program.key, b"x"))
            assert host.zygote() == zygote
        finally:
            await other.close()
        await eventually(lambda: not host.process.children(), "with its last client it ends")

    async def test_a_client_that_leaves_takes_its_runs_of_a_shared_one_along(self, host: Host) -> None:
        program = host.program("sleep")
        host.register(program)
        await host.hear(program.key, ZygoteState.READY)
        mine, kill = host.start(program.key)
        (my_run,) = await host.runs(1)
        other = await Spawner.attach(host.spawner.connect())
        guest = Host(other, host.guest, host._artifact)
        guest.register(program)
        theirs = guest.start(program.key)[0]
        await host.runs(2)
        await other.close()
        assert theirs.exception() is not None
        assert await host.runs(1) == [my_run]
        assert not mine.done()
        kill()
        assert killed(await mine) == (signal.SIGKILL, EndReason.KILLED, Way.ZYGOTE)

    async def test_a_program_that_never_forks_is_told_of_and_executed(self, host: Host) -> None:
        program = Program(
            key=secrets.token_bytes(KEY_BYTES), argv=("/bin/true",), flags=ZYGOTE, layers=host.guest.layers
        )
        host.spawner.register(program)
        await host.hear(program.key, ZygoteState.DIED)
        (news,) = host.news
        assert news.reason.startswith("before it was ready")
        for _ in range(3):
            end = await host.run(program.key)
            assert (end.wait_status, end.usage.way) == (0, Way.EXEC)

    @pytest.mark.slow
    async def test_a_program_that_neither_forks_nor_ends_is_killed(self, host: Host) -> None:
        program = Program(key=secrets.token_bytes(KEY_BYTES), argv=("/bin/sleep", "3600"), flags=ZYGOTE)
        host.spawner.register(program)
        end = await host.run(program.key, bounds=replace(BOUNDS, wall_seconds=0.1))
        assert killed(end) == (signal.SIGKILL, EndReason.WALL_TIME, Way.EXEC)
        await host.hear(program.key, ZygoteState.DIED)
        await eventually(lambda: not host.process.children(), "it is gone")

    async def test_a_program_that_cannot_be_forked_is_executed_for_good(self, host: Host) -> None:
        program = Program(
            key=secrets.token_bytes(KEY_BYTES), argv=tuple(two_event_loops()), flags=ZYGOTE, layers=0
        )
        host.spawner.register(program)
        await host.hear(program.key, ZygoteState.UNFIT)
        assert "more than one event loop" in host.news[0].reason
        await eventually(lambda: not host.process.children(), "it is gone")
        other = await Spawner.attach(host.spawner.connect())
        try:
            guest = Host(other, host.guest, host._artifact)
            other.register(program)
            await guest.hear(program.key, ZygoteState.UNFIT)
        finally:
            await other.close()


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(program)]


def two_event_loops() -> list[str]:
    return python("import os, select; loops = select.epoll(), select.epoll(); os.urandom(32)")


@contextmanager
def files(count: int) -> Iterator[list[int]]:
    with open(os.devnull, "r+b", buffering=0) as null:
        yield [null.fileno()] * count


class TestProtocol:
    """The zygote's own protocol, spoken without a spawner, and what that never says."""

    def test_forks_runs_that_answer_and_are_told_of(self, guest: Guest) -> None:
        with raw_zygote(guest, "echo") as zygote:
            for run_id in (1, 2, 2**64 - 1):
                assert zygote.output(run_id, b"input %d" % run_id) == b"input %d" % run_id
            assert not zygote.children()

    def test_the_pidfd_is_the_runs(self, guest: Guest) -> None:
        with raw_zygote(guest, "sleep") as zygote:
            zygote.start(1)
            zygote.start(2)
            first, second = zygote.started(1), zygote.started(2)
            signal.pidfd_send_signal(second, signal.SIGKILL)
            assert zygote.ended(2) == signal.SIGKILL
            assert select.select([second], [], [], 10)[0]
            assert not select.select([first], [], [], 0)[0]
            assert len(zygote.children()) == 1

    @pytest.mark.parametrize(
        "change",
        [{"magic": 0x44484B42}, {"version": 0}, {"version": 2}, {"kind": raw.STARTED_TYPE}, {"kind": 99}],
    )
    def test_ends_where_the_other_end_speaks_something_else(
        self, guest: Guest, change: dict[str, int]
    ) -> None:
        with raw_zygote(guest, "sleep") as zygote, files(3) as three:
            zygote.start(1)
            zygote.started(1)
            (run,) = zygote.children()
            zygote.send(zygote.run_message(2, **change), three)
            assert zygote.exit_code() == NEVER_FORKS
            wait_until_gone(run)

    @pytest.mark.parametrize("difference", [-raw.RUN.size + 1, -raw.RUN.size + raw.HEADER.size, -1, 1, 4000])
    def test_ends_where_a_request_has_another_size(self, guest: Guest, difference: int) -> None:
        with raw_zygote(guest, "echo") as zygote, files(3) as three:
            message = zygote.run_message(1) + bytes(max(0, difference))
            zygote.send(message[: raw.RUN.size + difference], three)
            assert zygote.exit_code() == NEVER_FORKS

    def test_ends_where_a_run_has_no_number(self, guest: Guest) -> None:
        with raw_zygote(guest, "echo") as zygote, files(3) as three:
            zygote.send(zygote.run_message(0), three)
            assert zygote.exit_code() == NEVER_FORKS

    @pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 100])
    def test_any_other_number_of_descriptors_fails_that_run(self, guest: Guest, count: int) -> None:
        with raw_zygote(guest, "echo") as zygote, files(count) as some:
            zygote.limit_descriptors(32)  # what is left open would be missing soon
            for run_id in range(1, 41):
                zygote.start(run_id, some)
                assert zygote.failed(run_id).error == errno.EMFILE
            assert zygote.output(50, b"still here") == b"still here"

    def test_descriptors_that_do_not_fit_into_its_table_fail_that_run(self, guest: Guest) -> None:
        with raw_zygote(guest, "sleep") as zygote:
            zygote.limit_descriptors(3)
            for run_id in range(1, 4):
                zygote.start(run_id)
                assert zygote.failed(run_id).error == errno.EMFILE
            zygote.limit_descriptors(64)
            zygote.start(5)
            zygote.started(5)

    def test_every_level_of_shortage_fails_cleanly(self, guest: Guest) -> None:
        """Also where the files of a run arrive, and its pidfd cannot be had."""
        with raw_zygote(guest, "echo") as zygote:
            outcomes = []
            for most, run_id in zip(range(40, 2, -1), itertools.count(1), strict=False):
                zygote.limit_descriptors(most)
                zygote.start(run_id)
                message = zygote.message()
                if message.kind == raw.STARTED_TYPE:
                    assert zygote.ended(run_id) == 0
                else:
                    assert (message.kind, message.error) == (raw.FAILED_TYPE, errno.EMFILE)
                outcomes.append(message.step)
                # Back to enough: what was lost on the way would show here.
                zygote.limit_descriptors(40)
                assert zygote.output(1000 + run_id, b"x") == b"x"
            assert {"", "pidfd_open", "receiving its files"} == set(outcomes)
            assert not zygote.children()

    def test_takes_as_many_runs_as_it_promises(self, guest: Guest) -> None:
        with raw_zygote(guest, "sleep") as zygote:
            zygote.limit_descriptors(raw.MOST_RUNS + 100)
            for run_id in range(1, raw.MOST_RUNS + 1):
                zygote.start(run_id)
                zygote.started(run_id)
            zygote.start(1000)
            failed = zygote.failed(1000)
            assert (failed.error, failed.step) == (errno.EAGAIN, "too many runs")
            ended = zygote.kill_all(raw.MOST_RUNS)
            assert sorted(ended) == list(range(1, raw.MOST_RUNS + 1))
            zygote.start(1001)
            zygote.started(1001)

    def test_all_runs_die_when_the_other_end_closes(self, guest: Guest) -> None:
        with raw_zygote(guest, "sleep") as zygote:
            for run_id in range(1, 6):
                zygote.start(run_id)
                zygote.started(run_id)
            runs = zygote.children()
            assert len(runs) == 5
            zygote.control.close()
            assert zygote.exit_code() == 0
            for run in runs:
                wait_until_gone(run)

    def test_all_runs_die_when_it_is_killed(self, guest: Guest) -> None:
        with raw_zygote(guest, "sleep") as zygote:
            for run_id in range(1, 6):
                zygote.start(run_id)
                zygote.started(run_id)
            runs = zygote.children()
            zygote.process.kill()
            for run in runs:
                wait_until_gone(run)

    def test_an_unread_socket_loses_no_reply(self, guest: Guest) -> None:
        """It takes no new runs while nobody reads; all is told once somebody does."""
        with raw_zygote(guest, "echo") as zygote:
            sent = 0
            while sent < 5000 and select.select([], [zygote.control], [], 1)[1]:
                sent += 1
                zygote.start(sent)
            assert 50 < sent < 5000
            started: list[int] = []
            ended: list[int] = []
            while len(ended) < sent:
                message = zygote.message()
                assert message.status == 0
                (started if message.kind == raw.STARTED_TYPE else ended).append(message.run_id)
                assert message.kind in (raw.STARTED_TYPE, raw.ENDED_TYPE)
                assert set(ended) <= set(started)
            assert sorted(started) == sorted(ended) == list(range(1, sent + 1))
            assert zygote.output(10_000, b"still here") == b"still here"
            assert not zygote.children()

    def test_dies_when_the_other_end_closes_with_the_socket_full(self, guest: Guest) -> None:
        with raw_zygote(guest, "sleep") as zygote:
            zygote.limit_descriptors(1000)
            sent = 0
            while sent < 5000 and select.select([], [zygote.control], [], 1)[1]:
                sent += 1
                zygote.start(sent)
            runs = zygote.children()
            assert runs
            zygote.control.close()
            zygote.exit_code()
            for run in runs:
                wait_until_gone(run)

    def test_says_why_it_cannot_be_one(self) -> None:
        with zygote_of(two_event_loops()) as zygote:
            message = zygote.message()
            assert (message.kind, message.step) == (raw.UNFIT_TYPE, "more than one event loop")
            assert zygote.exit_code() == NEVER_FORKS

    def test_a_second_thread_makes_it_unfit(self) -> None:
        """One that no library can prevent: it is there before ours is loaded, or made past it."""
        with zygote_of(python(HIDDEN_THREAD)) as zygote:
            message = zygote.message()
            assert (message.kind, message.step) == (raw.UNFIT_TYPE, "more than one thread")
            assert zygote.exit_code() == NEVER_FORKS


# The C library's own pthread_create, which the preloaded one hides.
HIDDEN_THREAD = """
    import ctypes, os
    libc = ctypes.CDLL("libc.so.6")
    hidden = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    create = hidden(ctypes.cast(libc.pthread_create, ctypes.c_void_p).value)
    thread = ctypes.c_ulong()
    pause = ctypes.cast(libc.pause, ctypes.c_void_p)
    assert create(ctypes.addressof(thread), None, pause, None) == 0
    os.urandom(32)
"""


class TestChild:
    """What a run has that was forked."""

    async def test_is_threads_limits_and_nothing_else(self, host: Host) -> None:
        key = await host.ready("sleep")
        bounds = replace(BOUNDS, cpu_seconds=3.5, file_bytes=12345, pinned=True)
        _, kill = host.start(key, bounds=bounds)
        (run,) = await host.runs(1)
        await eventually(lambda: run.num_threads() > 1, "its threads")
        limits = limits_of(run.pid)
        assert limits["Max cpu time"] == ["5", "5"]
        assert limits["Max file size"] == ["12345"] * 2
        assert limits["Max data size"] == [str(BOUNDS.data_bytes)] * 2
        assert limits["Max address space"] == [str(BOUNDS.address_bytes)] * 2
        assert limits["Max open files"] == ["3"] * 2
        assert limits["Max core file size"] == ["0"] * 2
        assert limits["Max locked memory"] == ["0"] * 2
        assert limits["Max msgqueue size"] == ["0"] * 2
        assert len(os.sched_getaffinity(run.pid)) == 1
        status = status_of(run.pid)
        assert status["NoNewPrivs"] == "1"
        internal = 0b11 << 31  # 32 and 33 are the C library's own
        # wasmtime itself ignores SIGPIPE; whatever else a run ignored could outlive its limits.
        assert int(status["SigIgn"], 16) & ~internal & ~(1 << (signal.SIGPIPE - 1)) == 0
        assert int(status["SigBlk"], 16) & ~internal == 0
        if os.geteuid() == 0:  # others may not look at what is not dumpable
            await eventually(lambda: len(descriptors_of(run.pid)) == 3, "the artifact is closed")
            stdin, stdout, stderr = descriptors_of(run.pid)
            assert [stdin, stdout] == ["/memfd:stdin (deleted)", "/memfd:stdout (deleted)"]
            assert stderr.startswith("pipe:")
        kill()

    async def test_an_unpinned_run_has_all_cpus(self, host: Host) -> None:
        key = await host.ready("sleep")
        for pinned, count in ((True, 1), (False, len(os.sched_getaffinity(0)))):
            ended, kill = host.start(key, bounds=replace(BOUNDS, pinned=pinned))
            (run,) = await host.runs(1)
            await eventually(has_cpus(run, count), f"{count} CPUs")
            kill()
            await ended

    def test_a_run_has_its_files_and_no_other_descriptor(self) -> None:
        """Seen from within: what is at the end of each number up to a thousand."""
        program = """
            import _socket, os, select
            loop, pair, pipe = select.epoll(), _socket.socketpair(), os.pipe()
            os.urandom(32)
            seen = []
            for number in range(1000):
                try:
                    os.fstat(number)
                except OSError:
                    continue
                seen.append(str(number))
            os.write(1, " ".join(seen).encode())
            """
        with zygote_of(python(program)) as zygote:
            assert zygote.message().kind == raw.READY_TYPE
            for run_id in range(1, 4):
                assert zygote.output(run_id) == b"0 1 2"

    def test_threads_that_were_asked_for_before_the_fork_run_in_each_run(self) -> None:
        program = """
            import _thread, os
            done = _thread.allocate_lock()
            done.acquire()
            _thread.start_new_thread(done.release, ())
            os.urandom(32)
            assert done.acquire(timeout=20)
            os.write(1, b"it ran")
            """
        with zygote_of(python(program)) as zygote:
            assert zygote.message().kind == raw.READY_TYPE
            assert psutil.Process(zygote.process.pid).num_threads() == 1
            for run_id in range(1, 4):
                assert zygote.output(run_id) == b"it ran"


class TestWithoutZygote:
    """The library in a process that is a run itself, or none of ours."""

    @staticmethod
    def _run(
        guest: Guest, entry_point: str, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[bytes]:
        with guest.artifact_file() as artifact:
            path = f"/proc/self/fd/{artifact}"
            command = [path if word == "/proc/self/fd/3" else word for word in guest.commands[entry_point]]
            return subprocess.run(
                command,
                input=b"hello",
                capture_output=True,
                env={"LD_PRELOAD": str(LIBRARY), **environment},
                pass_fds=(artifact,),
                timeout=60,
                check=False,
            )

    def test_does_nothing_unless_it_is_told_to(self, guest: Guest) -> None:
        done = self._run(guest, "echo", {"BULKHEAD_ANNOUNCE": "1"})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"hello", b"")

    def test_confines_the_process_that_it_is_in(self, guest: Guest) -> None:
        done = self._run(guest, "echo", {"BULKHEAD_ISOLATION": "0", "BULKHEAD_ANNOUNCE": "1"})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"hello", b"bulkhead: confined\n")


def has_cpus(run: psutil.Process, count: int) -> Callable[[], bool]:
    return lambda: len(os.sched_getaffinity(run.pid)) == count


def limits_of(pid: int) -> dict[str, list[str]]:
    with open(f"/proc/{pid}/limits") as file:
        return {line[:26].strip(): line[26:].split()[:2] for line in file.readlines()[1:]}


def status_of(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def descriptors_of(pid: int) -> Sequence[str]:
    numbers = sorted(os.listdir(f"/proc/{pid}/fd"), key=int)
    return [os.readlink(f"/proc/{pid}/fd/{number}") for number in numbers]
