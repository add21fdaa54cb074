"""The spawner: what a run's process is confined to, what ends it, and that nobody can confuse it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import secrets
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

import bulkhead
from bulkhead.sandbox import spawner_protocol as protocol
from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.memfile import create_memfile, read_memfile, write_memfile
from bulkhead.sandbox.outcome import Way
from bulkhead.sandbox.spawner import Spawner, SpawnerKeeper
from bulkhead.sandbox.spawner_protocol import Bounds, ProcessEnd, Program, Stage, StartFailed
from tests.support import hostile_guests
from tests.support.raw_spawner import UNLIMITED, RawClient, RawSpawner, new_key, raw_spawner, wait_until_gone
from tests.support.sandboxes import eventually, runs_of
from tests.support.wat import wat

SH = "/bin/sh"
WITH_PATH = ("PATH=/usr/bin:/bin",)
BOUNDS = Bounds(
    wall_seconds=30,
    cpu_seconds=20,
    data_bytes=1 << 30,
    address_bytes=1 << 40,
    file_bytes=8 << 20,
    stderr_bytes=1 << 16,
    pinned=False,
)
# Of standard error and output together, that come with the end of a run.
INLINE_OUTPUT_BYTES = protocol.MOST_MESSAGE_BYTES - protocol.ENDED.size
NO_DESCRIPTOR = 1_000_000


@pytest_asyncio.fixture
async def spawner() -> AsyncIterator[Spawner]:
    spawner = await Spawner.start()
    yield spawner
    await spawner.close()


@pytest.fixture
def raw() -> Iterator[RawSpawner]:
    with raw_spawner() as raw:
        yield raw


@contextmanager
def memfile(content: bytes = b"") -> Iterator[int]:
    fd = create_memfile("test")
    try:
        write_memfile(fd, content)
        yield fd
    finally:
        os.close(fd)


class Note:
    """A file that a program writes to while it runs, at descriptor 3."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def text(self) -> str:
        return read_memfile(self.fd, 1 << 20).decode()

    async def line(self) -> str:
        """What was written, as soon as that is a whole line."""
        await eventually(lambda: self.text().endswith("\n"), "a line")
        return self.text().strip()


@pytest.fixture
def note() -> Iterator[Note]:
    with memfile() as fd:
        yield Note(fd)


class Execution:
    """A program that the spawner knows for this run alone."""

    def __init__(
        self,
        spawner: Spawner,
        argv: Sequence[str],
        *,
        environment: Sequence[str] = (),
        bounds: Bounds = BOUNDS,
        stdin: bytes = b"",
        stdin_fd: int | None = None,
        files: Sequence[int] = (),
    ) -> None:
        key = register(spawner, *argv, environment=environment, files=files)
        self.ended, self.kill = spawner.run(key, bounds, stdin=stdin, stdin_fd=stdin_fd)
        spawner.forget(key)

    async def end(self) -> ProcessEnd:
        async with asyncio.timeout(60):
            return await asyncio.shield(self.ended)


def register(
    spawner: Spawner, *argv: str, environment: Sequence[str] = (), files: Sequence[int] = ()
) -> bytes:
    key = secrets.token_bytes(protocol.KEY_BYTES)
    spawner.register(Program(key=key, argv=argv, environment=tuple(environment)), files)
    return key


async def output_of(
    spawner: Spawner, *argv: str, bounds: Bounds = BOUNDS, environment: Sequence[str] = ()
) -> str:
    end = await Execution(spawner, argv, bounds=bounds, environment=environment).end()
    assert end.wait_status == 0, end.stderr
    return end.stdout.decode()


async def status_of(spawner: Spawner, bounds: Bounds = BOUNDS) -> dict[str, str]:
    """/proc/self/status as a run sees it."""
    text = await output_of(spawner, "/bin/cat", "/proc/self/status", bounds=bounds)
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(program)]


class TestConfinement:
    """What holds for every process that a run is made of, whatever code runs in it."""

    async def test_environment_is_what_was_given_and_nothing_else(
        self, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SECRET", "hunter2")
        assert await output_of(spawner, "/usr/bin/env") == ""
        text = await output_of(spawner, "/usr/bin/env", environment=("A=1", "B=two words"))
        assert text == "A=1\nB=two words\n"

    async def test_descriptors_are_those_that_were_listed(self, spawner: Spawner) -> None:
        program = python(
            """
            import json, os
            names = [os.readlink(f"/proc/self/fd/{number}") for number in range(5)]
            others = sum(os.path.lexists(f"/proc/self/fd/{number}") for number in range(5, 4096))
            print(json.dumps([names, others]))
            """
        )
        extra = create_memfile("extra")
        second = create_memfile("second")
        try:
            end = await Execution(spawner, program, files=(extra, second)).end()
        finally:
            os.close(extra)
            os.close(second)
        assert end.wait_status == 0, end.stderr
        names, others = json.loads(end.stdout)
        stdin, stdout, stderr, third, fourth = names
        assert [name.split(":")[1].split()[0] for name in (stdin, stdout, third, fourth)] == [
            "stdin",
            "stdout",
            "extra",
            "second",
        ]
        assert stderr.startswith("pipe:")
        assert others == 0

    async def test_has_no_way_to_new_privileges(self, spawner: Spawner) -> None:
        assert (await status_of(spawner))["NoNewPrivs"] == "1"

    async def test_no_signal_is_blocked_or_ignored(self, spawner: Spawner) -> None:
        """Python ignores SIGPIPE and SIGXFSZ; a run that did so would outlive its output limit."""
        status = await status_of(spawner)
        internal = 0b11 << 31  # 32 and 33 are the C library's own, and it does not let go of them
        blocked, ignored = (int(status[key], 16) & ~internal for key in ("SigBlk", "SigIgn"))
        assert (blocked, ignored) == (0, 0)

    async def test_limits_are_as_asked(self, spawner: Spawner) -> None:
        bounds = Bounds(
            wall_seconds=30,
            cpu_seconds=3.5,
            data_bytes=300 << 20,
            address_bytes=70 << 30,
            file_bytes=12345,
            stderr_bytes=10,
            open_files=33,
        )
        text = await output_of(spawner, "/bin/cat", "/proc/self/limits", bounds=bounds)
        limits = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()[1:]}
        assert limits["Max cpu time"] == ["5", "5"]  # whole seconds, behind the timer
        assert limits["Max file size"] == ["12345"] * 2
        assert limits["Max data size"] == [str(300 << 20)] * 2
        assert limits["Max address space"] == [str(70 << 30)] * 2
        assert limits["Max open files"] == ["33"] * 2
        assert limits["Max core file size"] == ["0"] * 2
        assert limits["Max locked memory"] == ["0"] * 2
        assert limits["Max msgqueue size"] == ["0"] * 2

    async def test_leads_a_process_group_and_dies_with_the_spawner(self, spawner: Spawner) -> None:
        program = python(
            """
            import ctypes, os, signal
            signal_number = ctypes.c_int()
            assert ctypes.CDLL(None).prctl(2, ctypes.byref(signal_number)) == 0  # PR_GET_PDEATHSIG
            print(os.getpgrp() == os.getpid(), os.getppid(), signal_number.value, os.getcwd())
            """
        )
        assert (await output_of(spawner, *program)).split() == ["True", str(spawner.pid), "9", "/"]

    async def test_a_pinned_run_has_one_cpu_and_another_all(self, spawner: Spawner) -> None:
        async def cpus(pinned: bool) -> int:
            status = await status_of(spawner, replace(BOUNDS, pinned=pinned))
            return int(status["Cpus_allowed"].replace(",", ""), 16).bit_count()

        assert await cpus(pinned=True) == 1
        assert await cpus(pinned=False) == len(os.sched_getaffinity(0))

    async def test_is_killed_before_the_service_when_memory_is_short(self, spawner: Spawner) -> None:
        assert int(await output_of(spawner, "/bin/cat", "/proc/self/oom_score_adj")) == 500


class TestEnds:
    """What ends a run, and what is said of it."""

    async def test_tells_the_exit_code_and_the_signal(self, spawner: Spawner) -> None:
        for script, status in (("exit 0", 0), ("exit 7", 7 << 8), ("kill -TERM $$", signal.SIGTERM)):
            end = await Execution(spawner, (SH, "-c", script)).end()
            assert (end.wait_status, end.reason, end.usage.way) == (status, EndReason.BY_ITSELF, Way.EXEC)

    async def test_wall_time(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.2)
        end = await Execution(spawner, ("/bin/sleep", "3600"), bounds=bounds).end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.WALL_TIME)
        assert end.usage.wall_seconds >= 0.2

    async def test_wall_time_of_a_stopped_process(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.3)
        end = await Execution(spawner, (SH, "-c", "kill -STOP $$"), bounds=bounds).end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.WALL_TIME)

    async def test_cpu_time(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, cpu_seconds=0.2)
        end = await Execution(spawner, (SH, "-c", "while :; do :; done"), bounds=bounds).end()
        assert (end.wait_status, end.reason) == (signal.SIGPROF, EndReason.BY_ITSELF)
        assert end.usage.cpu_seconds >= 0.15

    @pytest.mark.slow
    async def test_cpu_time_of_a_process_that_ignores_the_timer(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, cpu_seconds=0.1)
        script = "trap '' PROF XCPU; while :; do :; done"
        end = await Execution(spawner, (SH, "-c", script), bounds=bounds).end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.BY_ITSELF)
        assert end.usage.cpu_seconds > 0.1

    async def test_output_beyond_the_limit(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, file_bytes=100_000)
        argv = ("/bin/dd", "if=/dev/zero", "bs=1000", "status=none")
        end = await Execution(spawner, argv, bounds=bounds).end()
        assert end.stdout == bytes(100_000)
        assert (end.wait_status, end.reason) == (signal.SIGXFSZ, EndReason.BY_ITSELF)

    async def test_what_was_written_before_the_end_is_told_whatever_the_end(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.5)
        script = "echo out; echo err >&2; exec sleep 3600"
        end = await Execution(spawner, (SH, "-c", script), bounds=bounds, environment=WITH_PATH).end()
        assert (end.reason, end.stdout, end.stderr) == (EndReason.WALL_TIME, b"out\n", b"err\n")

    async def test_a_kill_and_only_of_that_run(self, spawner: Spawner) -> None:
        one = Execution(spawner, ("/bin/sleep", "3600"))
        two = Execution(spawner, ("/bin/sleep", "3600"))
        one.kill()
        end = await one.end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.KILLED)
        assert not two.ended.done()
        one.kill()  # harmless afterwards
        two.kill()
        two.kill()
        assert (await two.end()).reason is EndReason.KILLED
        assert (await output_of(spawner, "/bin/echo", "still here")) == "still here\n"

    async def test_standard_error_is_cut_and_the_run_goes_on(self, spawner: Spawner) -> None:
        for size, truncated in ((1000, False), (1001, True), (3_000_000, True)):
            bounds = replace(BOUNDS, stderr_bytes=1000)
            script = f"head -c {size} /dev/zero >&2; echo done"
            end = await Execution(spawner, (SH, "-c", script), bounds=bounds, environment=WITH_PATH).end()
            assert (end.wait_status, end.stderr_truncated) == (0, truncated)
            assert (end.stderr, end.stdout) == (bytes(1000), b"done\n")

    async def test_closing_standard_error_early_harms_nobody(self, spawner: Spawner) -> None:
        script = "exec 2>&-; sleep 0.1; echo done"
        end = await Execution(spawner, (SH, "-c", script), environment=WITH_PATH).end()
        assert (end.wait_status, end.stdout) == (0, b"done\n")

    async def test_a_program_that_cannot_be_executed(self, spawner: Spawner, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("not a program")
        (tmp_path / "text").chmod(0o700)
        cases = (
            (tmp_path / "none", errno.ENOENT),
            (tmp_path, errno.EACCES),
            (tmp_path / "text", errno.ENOEXEC),
        )
        for path, error_number in cases:
            with pytest.raises(StartFailed, match="executing the program") as failed:
                await Execution(spawner, (str(path),)).end()
            assert (failed.value.stage, failed.value.error_number) == (Stage.EXEC, error_number)
        assert not psutil.Process(spawner.pid).children()

    async def test_what_it_left_running_in_its_group_is_killed(self, spawner: Spawner) -> None:
        script = "sleep 3600 & echo $!"
        end = await Execution(spawner, (SH, "-c", script), environment=WITH_PATH).end()
        assert end.wait_status == 0
        left = int(end.stdout)
        await eventually(lambda: not psutil.pid_exists(left) or is_zombie(left), "the process is gone")

    async def test_a_process_that_left_its_group_cannot_hold_the_spawner_up(
        self, spawner: Spawner, note: Note
    ) -> None:
        """It keeps the pipe of standard error open, and writes to it without end."""
        program = python(
            """
            import os
            if os.fork() == 0:
                os.setsid()
                os.write(3, f"{os.getpid()}\\n".encode())
                words = bytes(65536)
                while True:
                    os.write(2, words)
            import time
            time.sleep(0.3)
            """
        )
        run = Execution(spawner, program, files=(note.fd,))
        escaped = psutil.Process(int(await note.line()))
        try:
            assert (await run.end()).wait_status == 0
            assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"
        finally:
            escaped.kill()


class TestStreams:
    """What goes in comes in, and what comes out is told: all of it, once, and nobody else's."""

    async def test_input_as_long_as_a_message_takes(self, spawner: Spawner) -> None:
        data = random.Random(1).randbytes(protocol.MOST_INLINE_STDIN_BYTES)
        for size in (0, 1, len(data) - 1, len(data)):
            end = await Execution(spawner, ("/bin/cat",), stdin=data[:size]).end()
            assert end.stdout == data[:size]

    async def test_longer_input_comes_as_a_file(self, spawner: Spawner) -> None:
        data = random.Random(2).randbytes(5 << 20)
        with memfile(data) as fd:
            end = await Execution(spawner, ("/bin/cat",), stdin_fd=fd).end()
        assert end.stdout == data

    async def test_each_run_reads_its_own_input_from_the_start(self, spawner: Spawner) -> None:
        cat = register(spawner, "/bin/cat")
        runs = [spawner.run(cat, BOUNDS, stdin=f"input {n}".encode())[0] for n in range(50)]
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*runs)
        assert [end.stdout.decode() for end in ends] == [f"input {n}" for n in range(50)]

    @pytest.mark.parametrize("difference", [-1, 0, 1])
    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    async def test_output_around_what_fits_into_the_reply(
        self, spawner: Spawner, difference: int, share: float
    ) -> None:
        size = INLINE_OUTPUT_BYTES + difference
        errors = int(size * share)
        bounds = replace(BOUNDS, stderr_bytes=1 << 20)
        program = python(
            f"""
            import os
            os.write(1, b"o" * {size - errors})
            os.write(2, b"e" * {errors})
            """
        )
        end = await Execution(spawner, program, bounds=bounds).end()
        assert (end.wait_status, end.stderr_truncated) == (0, False)
        assert (end.stdout, end.stderr) == (b"o" * (size - errors), b"e" * errors)

    async def test_long_output_of_many_runs_at_once(self, spawner: Spawner) -> None:
        """It comes in parts, those of different runs one among another."""
        inputs = [random.Random(n).randbytes((3 << 20) + n) for n in range(6)]
        fds = []
        try:
            for data in inputs:
                fds.append(create_memfile("input"))
                write_memfile(fds[-1], data)
            cat = register(spawner, "/bin/cat")
            long = [spawner.run(cat, BOUNDS, stdin_fd=fd)[0] for fd in fds]
            short = [spawner.run(cat, BOUNDS, stdin=b"%d" % n)[0] for n in range(60)]
            async with asyncio.timeout(60):
                ends = await asyncio.gather(*long, *short)
        finally:
            for fd in fds:
                os.close(fd)
        assert [end.stdout == data for end, data in zip(ends[:6], inputs, strict=True)] == [True] * 6
        assert [end.stdout for end in ends[6:]] == [b"%d" % n for n in range(60)]

    async def test_standard_error_in_parts(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, stderr_bytes=1 << 20)
        with memfile(random.Random(3).randbytes(300_000)) as fd:
            end = await Execution(
                spawner, (SH, "-c", "/bin/cat >&2; echo done"), stdin_fd=fd, bounds=bounds
            ).end()
            assert (end.stderr == read_memfile(fd, 1 << 20), end.stdout) == (True, b"done\n")

    async def test_a_hole_in_the_output_is_zeros(self, spawner: Spawner) -> None:
        program = python("import os; os.pwrite(1, b'end', 200_000)")
        end = await Execution(spawner, program).end()
        assert end.stdout == bytes(200_000) + b"end"


class TestPrograms:
    """What is registered once and run many times."""

    async def test_a_program_runs_as_often_as_one_likes(self, spawner: Spawner) -> None:
        with memfile(b"artifact") as fd:
            key = register(spawner, "/bin/cat", "/proc/self/fd/3", files=(fd,))
        # Our descriptor is closed: the program has its own.
        for _ in range(5):
            assert (await spawner.run(key, BOUNDS)[0]).stdout == b"artifact"

    async def test_runs_go_on_when_their_program_is_forgotten(self, spawner: Spawner) -> None:
        key = register(spawner, "/bin/cat")
        with memfile() as fd:
            read_end, write_end = os.pipe()
            try:
                ended, _ = spawner.run(key, BOUNDS, stdin_fd=read_end)
                spawner.forget(key)
                with pytest.raises(StartFailed) as failed:
                    await spawner.run(key, BOUNDS, stdin_fd=fd)[0]
                assert (failed.value.stage, failed.value.error_number) == (Stage.REQUEST, errno.ENOENT)
                os.write(write_end, b"late")
            finally:
                os.close(write_end)
                os.close(read_end)
        assert (await ended).stdout == b"late"

    async def test_an_unknown_program_fails(self, spawner: Spawner) -> None:
        with pytest.raises(StartFailed) as failed:
            await spawner.run(bytes(protocol.KEY_BYTES), BOUNDS)[0]
        assert (failed.value.stage, failed.value.error_number) == (Stage.REQUEST, errno.ENOENT)

    async def test_a_key_is_known_until_it_was_forgotten_as_often_as_registered(
        self, spawner: Spawner
    ) -> None:
        program = Program(key=secrets.token_bytes(protocol.KEY_BYTES), argv=("/bin/echo", "x"))
        spawner.register(program)
        spawner.register(program)
        spawner.forget(program.key)
        assert (await spawner.run(program.key, BOUNDS)[0]).stdout == b"x\n"
        spawner.forget(program.key)
        spawner.forget(program.key)  # once too often: harmless
        with pytest.raises(StartFailed):
            await spawner.run(program.key, BOUNDS)[0]


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class TestDeath:
    """When the spawner or the service dies, no run is left."""

    async def test_runs_fail_and_die_with_a_spawner_that_is_killed(
        self, spawner: Spawner, note: Note
    ) -> None:
        known = register(spawner, "/bin/true")
        argv = (SH, "-c", "echo $$ >&3; exec sleep 3600")
        run = Execution(spawner, argv, environment=WITH_PATH, files=(note.fd,))
        pid = int(await note.line())
        os.kill(spawner.pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="the spawner is gone"):
            await run.end()
        await eventually(lambda: not psutil.pid_exists(pid) or is_zombie(pid), "the run is gone")
        assert not spawner.alive
        with pytest.raises(SandboxError, match="gone"):
            register(spawner, "/bin/true")
        with pytest.raises(SandboxError, match="gone"):
            spawner.run(known, BOUNDS)
        spawner.forget(known)  # harmless

    @pytest.mark.slow
    async def test_a_stopped_spawner_is_given_up(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.1)
        os.kill(spawner.pid, signal.SIGSTOP)
        with pytest.raises(SandboxError, match="does not answer"):
            await Execution(spawner, ("/bin/sleep", "3600"), bounds=bounds).end()
        assert not spawner.alive
        assert not psutil.pid_exists(spawner.pid)

    @pytest.mark.slow
    async def test_a_spawner_and_service_that_were_both_stopped_go_on(self, spawner: Spawner) -> None:
        """As when a container is frozen: on waking, the overdue run is no reason to give up."""
        bounds = replace(BOUNDS, wall_seconds=0.1)
        run = Execution(spawner, ("/bin/sleep", "3600"), bounds=bounds)
        await eventually(lambda: psutil.Process(spawner.pid).children(), "the run started")
        os.kill(spawner.pid, signal.SIGSTOP)
        # Both stand still for longer than the spawner may be silent: this thread sleeps, too.
        time.sleep(2.5)  # noqa: ASYNC251 - that the loop does not run is the point
        os.kill(spawner.pid, signal.SIGCONT)
        end = await run.end()
        assert end.reason is EndReason.WALL_TIME
        assert spawner.alive

    async def test_no_run_outlives_a_service_that_is_killed(self, tmp_path: Path) -> None:
        program = textwrap.dedent(
            """
            import asyncio, sys
            from pathlib import Path
            from bulkhead.sandbox import Limits, Sandbox, SandboxOptions

            async def main() -> None:
                sandbox = await Sandbox.open(SandboxOptions(state_dir=Path(sys.argv[1])))
                info = await sandbox.load(Path(sys.argv[2]).read_bytes())
                limits = Limits(wall_seconds=60)
                runs = [asyncio.create_task(sandbox.run(info.digest, "run", limits=limits)) for _ in range(3)]
                spawner = await sandbox._spawners.living()
                print(spawner.pid, flush=True)
                await asyncio.gather(*runs)

            asyncio.run(main())
            """
        )
        (tmp_path / "module.wasm").write_bytes(wat(hostile_guests.SLEEP))
        source = str(Path(bulkhead.__path__[0]).parent)
        service = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [
                sys.executable,
                "-c",
                program,
                str(tmp_path / "state"),
                str(tmp_path / "module.wasm"),
            ],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": source, "PATH": os.environ["PATH"]},
        )
        with service:
            assert service.stdout is not None
            spawner = psutil.Process(int(service.stdout.readline()))
            await eventually(lambda: len(runs_of(spawner)) == 3, "three runs")
            processes = [spawner, *spawner.children(recursive=True)]
            await eventually(lambda: all("wasmtime-min" in p.name() for p in processes[1:]), "they execute")
            service.send_signal(signal.SIGKILL)
            await eventually(
                lambda: not any(p.is_running() and not is_zombie(p.pid) for p in processes), "all are gone"
            )

    async def test_a_keeper_starts_another(self) -> None:
        keeper = SpawnerKeeper()
        first = await keeper.living()
        assert await keeper.living() is first
        os.kill(first.pid, signal.SIGKILL)
        await eventually(lambda: not first.alive, "its death is seen")
        one, two = await asyncio.gather(keeper.living(), keeper.living())
        assert one is two
        assert one is not first
        await keeper.close()
        assert not psutil.pid_exists(one.pid)
        with pytest.raises(SandboxError, match="closed"):
            await keeper.living()

    async def test_a_keeper_closed_while_it_starts_one_leaves_none(self) -> None:
        before = set(psutil.Process().children())
        keeper = SpawnerKeeper()
        starting = asyncio.create_task(keeper.living())
        await asyncio.sleep(0)
        await keeper.close()
        await asyncio.wait([starting])
        assert starting.exception() is None or isinstance(starting.exception(), SandboxError)
        assert set(psutil.Process().children()) == before

    async def test_says_what_to_do_when_the_program_is_missing_or_another(self, tmp_path: Path) -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SandboxError, match=r"cannot start .*; reinstall Bulkhead"):
            await Spawner.start(tmp_path / "none")
        with pytest.raises(SandboxError, match="it ended"):
            await Spawner.start(Path("/bin/true"))
        assert len(os.listdir("/proc/self/fd")) <= descriptors


class TestSending:
    """The service's end, when a request cannot be sent as it is."""

    async def test_a_bad_descriptor_fails_its_own_run_alone(self, spawner: Spawner) -> None:
        other = Execution(spawner, ("/bin/sleep", "3600"))
        with pytest.raises(StartFailed) as failed:
            await Execution(spawner, ("/bin/cat",), stdin_fd=NO_DESCRIPTOR).end()
        assert failed.value.error_number == errno.EBADF
        assert spawner.alive
        assert not other.ended.done()
        other.kill()
        await other.end()

    async def test_a_bad_descriptor_of_a_program_fails_its_runs_alone(self, spawner: Spawner) -> None:
        other = Execution(spawner, ("/bin/sleep", "3600"))
        with pytest.raises(StartFailed) as failed:
            await Execution(spawner, ("/bin/true",), files=(NO_DESCRIPTOR,)).end()
        assert failed.value.stage is Stage.REQUEST
        assert spawner.alive
        assert not other.ended.done()
        other.kill()
        await other.end()

    async def test_a_program_that_is_refused_leaves_no_trace(self, spawner: Spawner) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        try:
            for argv, files in ((("/bin/true", "a\0b"), 0), (("/bin/true",), 6)):
                with pytest.raises(StartFailed):
                    await spawner.execute(argv, BOUNDS, files=[null] * files)
        finally:
            os.close(null)
        assert not spawner._pending
        assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"

    async def test_a_run_killed_before_it_is_sent_never_runs(self, spawner: Spawner, tmp_path: Path) -> None:
        """Its descriptors may be closed then, and their numbers belong to others."""
        touched = tmp_path / "touched"
        true = register(spawner, "/bin/true")
        touch = register(spawner, "/usr/bin/touch", str(touched))
        assert await output_of(spawner, "/bin/echo", "ready") == "ready\n"
        os.kill(spawner.pid, signal.SIGSTOP)
        try:
            sent = []
            while not spawner._outbox:  # until the socket is full
                sent.append(spawner.run(true, BOUNDS, stdin=bytes(60_000))[0])
            ended, kill = spawner.run(touch, BOUNDS)
            kill()
            assert (await ended).reason is EndReason.KILLED
        finally:
            os.kill(spawner.pid, signal.SIGCONT)
        async with asyncio.timeout(60):
            assert {end.wait_status for end in await asyncio.gather(*sent)} == {0}
        assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"
        assert not touched.exists()

    async def test_hundreds_at_once_all_end(self, spawner: Spawner) -> None:
        keys = [register(spawner, SH, "-c", f"exit {n}") for n in range(100)]
        runs = [spawner.run(keys[n % 100], BOUNDS)[0] for n in range(500)]
        async with asyncio.timeout(120):
            ends = await asyncio.gather(*runs)
        assert [os.waitstatus_to_exitcode(end.wait_status) for end in ends] == [n % 100 for n in range(500)]
        assert not psutil.Process(spawner.pid).children()

    async def test_cancelling_an_execution_kills_it(self, spawner: Spawner) -> None:
        task = asyncio.create_task(spawner.execute(("/bin/sleep", "3600"), BOUNDS))
        process = psutil.Process(spawner.pid)
        await eventually(process.children, "it runs")
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await eventually(lambda: not process.children(), "it is gone")


class TestClients:
    """Several clients of one spawner."""

    async def test_another_client_runs_programs_of_its_own(self, spawner: Spawner) -> None:
        other = await Spawner.attach(spawner.connect())
        try:
            assert (other.pid, other.layers) == (0, spawner.layers)
            assert await output_of(other, "/bin/echo", "other") == "other\n"
            key = register(other, "/bin/true")
            assert (await other.run(key, BOUNDS)[0]).wait_status == 0
        finally:
            await other.close()
        assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"

    async def test_a_closed_client_takes_its_runs_with_it_and_no_others(self, spawner: Spawner) -> None:
        mine = Execution(spawner, ("/bin/sleep", "3600"))
        process = psutil.Process(spawner.pid)
        await eventually(process.children, "mine runs")
        (my_process,) = process.children()
        other = await Spawner.attach(spawner.connect())
        theirs = Execution(other, ("/bin/sleep", "3600"))
        await eventually(lambda: len(process.children()) == 2, "both run")
        await other.close()
        with pytest.raises(SandboxError, match="closed"):
            await theirs.end()
        await eventually(lambda: process.children() == [my_process], "theirs is gone")
        assert not mine.ended.done()
        mine.kill()
        assert (await mine.end()).reason is EndReason.KILLED

    async def test_all_end_with_the_first(self, spawner: Spawner) -> None:
        other = await Spawner.attach(spawner.connect())
        run = Execution(other, ("/bin/sleep", "3600"))
        await spawner.close()
        with pytest.raises(SandboxError, match="the spawner is gone"):
            await run.end()
        assert not other.alive
        await other.close()

    def test_a_key_is_shared_but_not_the_claim_to_it(self, raw: RawSpawner) -> None:
        key = raw.register(b"/bin/echo", b"x")
        with raw.client() as other:
            other.register(b"/bin/echo", b"not this: the key says that it is the same", key=key)
            other.start(1, key)
            assert other.reply().stdout == b"x\n"
            raw.forget(key)
            other.start(2, key)
            assert other.reply().stdout == b"x\n"
        # With the client its claim is gone, the last.
        deadline_reached = time.monotonic() + 20
        while True:
            raw.start(3, key)
            if not (reply := raw.reply()).ended:
                break
            assert time.monotonic() < deadline_reached
        assert (reply.stage, reply.error) == (Stage.REQUEST, errno.ENOENT)
        assert raw.works()

    def test_ids_are_each_clients_own(self, raw: RawSpawner) -> None:
        with raw.client() as other:
            raw.run(1, b"/bin/sleep", b"3600")
            other.run(1, b"/bin/sleep", b"3600")
            wait_for_children(raw.pid, 2)
            other.kill(1)
            assert other.reply().reason == EndReason.KILLED
            assert len(wait_for_children(raw.pid, 1)) == 1
            raw.kill(1)
            assert raw.reply().reason == EndReason.KILLED

    def test_only_the_first_adds_clients(self, raw: RawSpawner) -> None:
        with raw.client() as other:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with mine:
                with theirs:
                    other.send(other.header(protocol.MessageType.CLIENT, 0), [theirs.fileno()])
                assert RawClient(mine).message() == b""  # closed, without a word
            assert other.works()
        assert raw.works()

    def test_a_client_without_or_with_too_many_sockets_is_none(self, raw: RawSpawner) -> None:
        message = raw.header(protocol.MessageType.CLIENT, 0)
        raw.send(message)
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            with theirs:
                raw.send(message, [theirs.fileno()] * 2)
            assert RawClient(mine).message() == b""
        with open(os.devnull) as file:  # it is not a socket, and cannot be watched
            raw.send(message, [file.fileno()])
        assert raw.works()

    @pytest.mark.parametrize("message", [b"x", b"GET / HTTP/1.1\r\n\r\n"])
    def test_one_that_speaks_something_else_is_dropped_alone(self, raw: RawSpawner, message: bytes) -> None:
        with raw.client() as other:
            other.run(1, b"/bin/sleep", b"3600")
            wait_for_children(raw.pid, 1)
            other.send(message)
            assert other.message() == b""
            wait_for_children(raw.pid, 0)
        assert raw.works()

    def test_one_that_reads_nothing_holds_nobody_else_up(self, raw: RawSpawner) -> None:
        with raw.client() as other:
            sent = fill(other)
            for run_id in range(1, 20):
                raw.run(run_id, b"/bin/true")
                assert raw.reply().status == 0
            replies = [other.reply() for _ in range(sent)]
            assert sorted(reply.run_id for reply in replies) == list(range(1, sent + 1))
            assert other.works()

    def test_one_that_leaves_with_its_socket_full_is_forgotten(self, raw: RawSpawner) -> None:
        with raw.client() as other:
            fill(other)
        assert raw.works()
        wait_for_children(raw.pid, 0)


def fill(client: RawClient, stdin: bytes = b"") -> int:
    """Starts runs until the spawner takes no more of them, as nobody reads its replies. Returns how many.

    Their ids are 1, 2, ...; each writes what it reads.
    """
    sent = 0
    cat = client.register(b"/bin/cat")
    while sent < 5000:
        _, writable, _ = select.select([], [client.control], [], 1)
        if not writable:
            return sent  # it does not read any more
        client.start(sent + 1, cat, stdin)
        sent += 1
    raise AssertionError("the socket never filled")


class TestProtocol:
    """Requests that the service never sends."""

    @pytest.mark.parametrize(
        "message",
        [
            b"x",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\0" * 16,
        ],
    )
    def test_ends_with_a_message_when_the_other_end_speaks_something_else(
        self, raw: RawSpawner, message: bytes
    ) -> None:
        raw.send(message)
        assert raw.exit_code() == 70
        assert "the service speaks another protocol" in raw.words()

    def test_ends_with_a_message_when_the_version_is_another(self, raw: RawSpawner) -> None:
        raw.send(raw.header(protocol.MessageType.RUN, 1, version=1))
        assert raw.exit_code() == 70
        assert "reinstall Bulkhead" in raw.words()

    def test_ends_when_the_service_closes(self, raw: RawSpawner) -> None:
        raw.run(1, b"/bin/sleep", b"3600")
        (run,) = wait_for_children(raw.pid, 1)
        raw.control.shutdown(socket.SHUT_WR)
        assert raw.exit_code() == 0
        wait_until_gone(run)

    @pytest.mark.parametrize(
        ("change", "error_number"),
        [
            ({"argument_count": 0}, errno.EINVAL),
            ({"argument_count": 3}, errno.EINVAL),
            ({"argument_count": 1}, errno.EINVAL),
            ({"argument_count": 2**32 - 1}, errno.EINVAL),
            ({"environment_count": 1}, errno.EINVAL),
            ({"environment_count": 2**32 - 1}, errno.EINVAL),
            ({"tail": b"/bin/true\0x"}, errno.EINVAL),
            ({"tail": b""}, errno.EINVAL),
            ({"tail": b"/bin/true\0x\0more\0"}, errno.EINVAL),
            ({"tail": b"x\0" * 513, "argument_count": 513}, errno.EINVAL),
            ({"tail": b"x" * 70_000}, errno.E2BIG),
        ],
    )
    def test_refuses_a_malformed_program_and_goes_on(
        self, raw: RawSpawner, change: dict[str, int | bytes], error_number: int
    ) -> None:
        """It shows when the program is to be run."""
        key = new_key()
        raw.send(raw.program_message(key, [b"/bin/true", b"x"], **change))  # type: ignore[arg-type]
        raw.start(5, key)
        reply = raw.reply()
        assert (reply.run_id, reply.ended, reply.stage, reply.error) == (
            5,
            False,
            Stage.REQUEST,
            error_number,
        )
        assert raw.works()

    def test_takes_as_many_strings_as_it_promises(self, raw: RawSpawner) -> None:
        key = new_key()
        raw.send(raw.program_message(key, [b"/bin/true", *[b"x"] * 500], [b"A=1"] * 11))
        raw.start(1, key)
        assert raw.reply().status == 0

    @pytest.mark.parametrize("size", [protocol.HEADER.size, 60, protocol.RUN.size - 1])
    def test_refuses_a_run_that_is_cut_short(self, raw: RawSpawner, size: int) -> None:
        key = raw.register(b"/bin/true")
        raw.send(raw.run_message(5, key)[:size])
        reply = raw.reply()
        assert (reply.run_id, reply.ended, reply.error) == (5, False, errno.EPROTO)
        assert raw.works()

    def test_a_program_that_is_cut_short_is_not_known(self, raw: RawSpawner) -> None:
        key = new_key()
        raw.send(raw.program_message(key, [b"/bin/true"])[: protocol.PROGRAM.size - 1])
        raw.start(5, key)
        assert raw.reply().stage == Stage.REQUEST
        assert raw.works()

    @pytest.mark.parametrize("stdin_bytes", [0, 2, 4, 2**32 - 1])
    def test_refuses_input_of_another_length_than_it_says(self, raw: RawSpawner, stdin_bytes: int) -> None:
        key = raw.register(b"/bin/cat")
        raw.send(raw.run_message(5, key, b"abc", stdin_bytes=stdin_bytes))
        reply = raw.reply()
        assert (reply.ended, reply.stage, reply.error) == (False, Stage.REQUEST, errno.EINVAL)
        assert raw.works()

    @pytest.mark.parametrize(
        ("count", "error_number"), [(2, errno.EINVAL), (9, errno.EMFILE), (200, errno.EMFILE)]
    )
    def test_refuses_a_run_with_too_many_descriptors(
        self, raw: RawSpawner, count: int, error_number: int
    ) -> None:
        key = raw.register(b"/bin/true")
        with open(os.devnull, "r+b", buffering=0) as null:
            for run_id in range(1, 4):
                raw.send(raw.run_message(run_id, key), [null.fileno()] * count)
                reply = raw.reply()
                assert (reply.run_id, reply.ended, reply.error) == (run_id, False, error_number)
        assert raw.works()

    @pytest.mark.parametrize(
        ("count", "error_number"), [(6, errno.EINVAL), (8, errno.EINVAL), (9, errno.EMFILE)]
    )
    def test_refuses_a_program_with_too_many_descriptors(
        self, raw: RawSpawner, count: int, error_number: int
    ) -> None:
        with open(os.devnull, "r+b", buffering=0) as null:
            key = raw.register(b"/bin/true", files=[null.fileno()] * count)
        raw.start(1, key)
        reply = raw.reply()
        assert (reply.ended, reply.stage, reply.error) == (False, Stage.REQUEST, error_number)
        assert raw.works()

    def test_takes_five_descriptors_for_a_program(self, raw: RawSpawner) -> None:
        script = b"for n in 0 1 2 3 4 5 6 7; do [ -e /proc/self/fd/$n ] || exit 1; done"
        with open(os.devnull, "r+b", buffering=0) as null:
            raw.start(1, raw.register(b"/bin/sh", b"-c", script, files=[null.fileno()] * 5))
        assert raw.reply().status == 0

    def test_ignores_what_it_does_not_know(self, raw: RawSpawner) -> None:
        with open(os.devnull, "r+b", buffering=0) as null:
            raw.send(raw.header(99, 1), [null.fileno()] * 3)
        for kind in (0, 1, 6, 7, 8, 9, 65535):
            raw.send(raw.header(kind, 1))
        raw.send(raw.header(protocol.MessageType.ENDED, 1) + bytes(100))
        raw.send(raw.header(protocol.MessageType.FORGET, 0))
        raw.forget(new_key())
        for run_id in (0, 1, 12345, UNLIMITED):
            raw.kill(run_id)
        assert raw.works()

    def test_no_wall_time_at_all_ends_a_run_at_once(self, raw: RawSpawner) -> None:
        key = raw.register(b"/bin/sleep", b"3600")
        raw.send(raw.run_message(1, key, wall_seconds=0))
        reply = raw.reply()
        assert (reply.status, reply.reason) == (signal.SIGKILL, EndReason.WALL_TIME)

    def test_no_cpu_time_at_all_is_the_least_there_is(self, raw: RawSpawner) -> None:
        key = raw.register(b"/bin/sh", b"-c", b"while :; do :; done")
        raw.send(raw.run_message(1, key, cpu_nanoseconds=0))
        assert raw.reply().status == signal.SIGPROF

    def test_the_hugest_limits_are_none(self, raw: RawSpawner) -> None:
        message = raw.run_message(
            1,
            raw.register(b"/bin/true"),
            wall_seconds=1e30,
            cpu_nanoseconds=UNLIMITED,
            file_bytes=UNLIMITED,
            stderr_bytes=UNLIMITED,
            open_files=2**32 - 1,
            pinned=2**32 - 1,
        )
        raw.send(message)
        assert raw.reply().status == 0

    def test_two_runs_of_one_id_both_end(self, raw: RawSpawner) -> None:
        raw.run(1, b"/bin/sleep", b"3600")
        raw.run(1, b"/bin/sleep", b"3600")
        for _ in range(2):
            raw.kill(1)
            assert raw.reply().reason == EndReason.KILLED

    @pytest.mark.parametrize("size", [0, 60_000])
    def test_an_unread_socket_loses_no_reply(self, raw: RawSpawner, size: int) -> None:
        """The spawner takes no new work while nobody reads; all is told once somebody does."""
        stdin = random.Random(size).randbytes(size)
        sent = fill(raw, stdin)
        # It waits, and does not spin: that would show as CPU time.
        process = psutil.Process(raw.pid)
        before = sum(process.cpu_times()[:2])
        select.select([], [], [], 0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.3
        replies = [raw.reply() for _ in range(sent)]
        assert sorted(reply.run_id for reply in replies) == list(range(1, sent + 1))
        assert {(reply.status, reply.stdout) for reply in replies} == {(0, stdin)}
        assert raw.works()

    def test_output_in_parts_waits_for_room_in_the_socket(self, raw: RawSpawner) -> None:
        data = random.Random(4).randbytes(1_500_000)
        runs = 8
        cat = raw.register(b"/bin/cat")
        for run_id in range(1, runs + 1):
            with memfile(data + b"%d" % run_id) as fd:
                raw.send(raw.run_message(run_id, cat), [fd])
        wait_for_children(raw.pid, 0)  # all have ended, and what they wrote does not fit
        replies = {reply.run_id: reply for reply in (raw.reply() for _ in range(runs))}
        assert all(reply.in_parts for reply in replies.values())
        expected = {run_id: data + b"%d" % run_id for run_id in range(1, runs + 1)}
        assert all(replies[run_id].stdout == content for run_id, content in expected.items())
        assert raw.works()

    def test_running_out_of_descriptors_fails_runs_and_nothing_else(self, raw: RawSpawner) -> None:
        raw.limit_descriptors(40)
        sleep = raw.register(b"/bin/sleep", b"3600")
        counts = set()
        for _ in range(3):  # what errors leak would be missing the second time
            for run_id in range(1, 31):
                raw.start(run_id, sleep)
            # A request that fails is answered before the next one is read.
            raw.start(31, new_key())
            failed = []
            while (reply := raw.reply()).run_id != 31:
                failed.append(reply)
            assert {reply.error for reply in failed} == {errno.EMFILE}
            assert {reply.stage for reply in failed} == {Stage.PREPARE}
            running = set(range(1, 31)) - {reply.run_id for reply in failed}
            for run_id in running:
                raw.kill(run_id)
            ended = [raw.reply() for _ in running]
            assert {reply.reason for reply in ended} == {EndReason.KILLED}
            assert {reply.run_id for reply in ended} == running
            counts.add(len(running))
            assert raw.works()
        (most,) = counts
        assert 5 <= most < 30

    def test_every_level_of_shortage_fails_cleanly(self, raw: RawSpawner) -> None:
        """With one descriptor less each time, another step of the start is the one that fails."""
        failures = 0
        true = raw.register(b"/bin/true")
        with memfile(b"input") as fd:
            for most in range(18, 8, -1):
                raw.limit_descriptors(most)
                for run_id in range(1, 6):
                    raw.send(raw.run_message(run_id, true), [fd] if run_id % 2 else [])
                    reply = raw.reply()
                    assert (reply.run_id, reply.error or reply.status) in (
                        (run_id, 0),
                        (run_id, errno.EMFILE),
                    )
                    failures += not reply.ended
                # Back to enough: what was lost on the way would show here.
                raw.limit_descriptors(15)
                assert raw.works()
        assert failures > 10

    def test_a_program_whose_files_did_not_arrive_fails_its_runs_until_it_is_told_again(
        self, raw: RawSpawner
    ) -> None:
        with memfile(b"artifact") as fd:
            raw.limit_descriptors(10)
            key = raw.register(b"/bin/cat", b"/proc/self/fd/3", files=[fd])
            raw.start(1, key)
            reply = raw.reply()
            assert (reply.stage, reply.error) == (Stage.REQUEST, errno.EMFILE)
            raw.limit_descriptors(40)
            raw.register(b"/bin/cat", b"/proc/self/fd/3", key=key, files=[fd])
        raw.start(2, key)
        assert raw.reply().stdout == b"artifact"

    def test_hundreds_of_runs_of_every_kind_leak_nothing(self, raw: RawSpawner) -> None:
        raw.limit_descriptors(16)  # enough for one run at a time, and for no leak
        with open(os.devnull, "r+b", buffering=0) as null:
            nulls = [null.fileno()] * 3
            for run_id in range(1, 61):
                raw.run(run_id, b"/bin/true", stdin=b"x")
                assert raw.reply().status == 0
                raw.run(run_id, b"/does/not/exist")
                assert raw.reply().stage == Stage.EXEC
                key = new_key()
                raw.send(raw.program_message(key, [], argument_count=0), nulls)
                raw.send(raw.run_message(run_id, key), nulls[:1])
                assert raw.reply().stage == Stage.REQUEST
                raw.send(raw.header(77, run_id), nulls)
                key = raw.register(b"/bin/sleep", b"3600", files=nulls[:1])
                raw.register(b"/bin/sleep", b"3600", files=nulls[:1], key=key)
                raw.send(raw.run_message(run_id, key), nulls[:1])
                raw.forget(key)
                raw.kill(run_id)
                assert raw.reply().reason == EndReason.KILLED
                raw.forget(key)
                with raw.client() as other:
                    assert other.works()
        assert raw.works()
        assert not psutil.Process(raw.pid).children()


def wait_for_children(pid: int, count: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    give_up_at = time.monotonic() + 20
    while len(children := process.children()) != count:
        assert time.monotonic() < give_up_at
        select.select([], [], [], 0.005)
    return children
