"""The spawner: what a run's process is confined to, what ends it, and that nobody can confuse it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

import bulkhead
from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.memfile import create_memfile, read_memfile
from bulkhead.sandbox.spawner import Bounds, ProcessEnd, Spawner, SpawnerKeeper, StartFailed
from tests.support import hostile_guests
from tests.support.raw_spawner import UNLIMITED, RawSpawner, raw_spawner
from tests.support.sandboxes import eventually
from tests.support.wat import wat

SH = "/bin/sh"
BOUNDS = Bounds(
    wall_seconds=30,
    cpu_seconds=20,
    data_bytes=1 << 30,
    address_bytes=1 << 40,
    file_bytes=1 << 20,
    stderr_bytes=1 << 16,
    pinned=False,
)
STAGE_REQUEST, STAGE_EXEC = 1, 4
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


class Program:
    """A program run by the spawner, with files of its own for input and output."""

    def __init__(
        self,
        spawner: Spawner,
        argv: Sequence[str],
        *,
        environment: Sequence[str] = (),
        bounds: Bounds = BOUNDS,
        more_files: Sequence[int] = (),
    ) -> None:
        self.fds = [create_memfile(name) for name in ("stdin", "stdout", "stderr")]
        try:
            self.ended, self.kill = spawner.run(argv, environment, (*self.fds, *more_files), bounds)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    async def end(self) -> ProcessEnd:
        async with asyncio.timeout(60):
            return await asyncio.shield(self.ended)

    def stdout(self) -> str:
        return read_memfile(self.fds[1], 1 << 20).decode()

    def stderr(self) -> bytes:
        return read_memfile(self.fds[2], 1 << 20)

    async def printed(self) -> str:
        """What it has printed, as soon as that is a whole line."""
        await eventually(lambda: self.stdout().endswith("\n"), "a line")
        return self.stdout().strip()


async def output_of(spawner: Spawner, *argv: str, bounds: Bounds = BOUNDS, **options: Sequence[str]) -> str:
    with Program(spawner, argv, bounds=bounds, **options) as program:  # type: ignore[arg-type]
        end = await program.end()
        assert end.wait_status == 0, program.stderr()
        return program.stdout()


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
            with Program(spawner, program, more_files=(extra, second)) as run:
                assert (await run.end()).wait_status == 0, run.stderr()
                names, others = json.loads(run.stdout())
        finally:
            os.close(extra)
            os.close(second)
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
            with Program(spawner, (SH, "-c", script)) as program:
                end = await program.end()
            assert (end.wait_status, end.reason) == (status, EndReason.BY_ITSELF)

    async def test_wall_time(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.2)
        with Program(spawner, ("/bin/sleep", "3600"), bounds=bounds) as program:
            end = await program.end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.WALL_TIME)
        assert end.usage.wall_seconds >= 0.2

    async def test_wall_time_of_a_stopped_process(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.3)
        with Program(spawner, (SH, "-c", "kill -STOP $$"), bounds=bounds) as program:
            end = await program.end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.WALL_TIME)

    async def test_cpu_time(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, cpu_seconds=0.2)
        with Program(spawner, (SH, "-c", "while :; do :; done"), bounds=bounds) as program:
            end = await program.end()
        assert (end.wait_status, end.reason) == (signal.SIGPROF, EndReason.BY_ITSELF)
        assert end.usage.cpu_seconds >= 0.15

    @pytest.mark.slow
    async def test_cpu_time_of_a_process_that_ignores_the_timer(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, cpu_seconds=0.1)
        with Program(spawner, (SH, "-c", "trap '' PROF XCPU; while :; do :; done"), bounds=bounds) as program:
            end = await program.end()
        assert (end.wait_status, end.reason) == (signal.SIGKILL, EndReason.BY_ITSELF)
        assert end.usage.cpu_seconds > 0.1

    async def test_output_beyond_the_limit(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, file_bytes=100_000)
        argv = ("/bin/dd", "if=/dev/zero", "bs=1000", "status=none")
        with Program(spawner, argv, bounds=bounds) as program:
            end = await program.end()
            assert os.fstat(program.fds[1]).st_size == 100_000
        assert (end.wait_status, end.reason) == (signal.SIGXFSZ, EndReason.BY_ITSELF)

    async def test_a_kill_and_only_of_that_run(self, spawner: Spawner) -> None:
        with (
            Program(spawner, ("/bin/sleep", "3600")) as one,
            Program(spawner, ("/bin/sleep", "3600")) as two,
        ):
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
            with Program(
                spawner, (SH, "-c", script), bounds=bounds, environment=("PATH=/usr/bin:/bin",)
            ) as program:
                end = await program.end()
                assert (end.wait_status, end.stderr_truncated) == (0, truncated)
                assert (program.stderr(), program.stdout()) == (bytes(1000), "done\n")

    async def test_closing_standard_error_early_harms_nobody(self, spawner: Spawner) -> None:
        with Program(
            spawner, (SH, "-c", "exec 2>&-; sleep 0.1; echo done"), environment=("PATH=/usr/bin:/bin",)
        ) as program:
            end = await program.end()
            assert (end.wait_status, program.stdout()) == (0, "done\n")

    async def test_a_program_that_cannot_be_executed(self, spawner: Spawner, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("not a program")
        (tmp_path / "text").chmod(0o700)
        cases = (
            (tmp_path / "none", errno.ENOENT),
            (tmp_path, errno.EACCES),
            (tmp_path / "text", errno.ENOEXEC),
        )
        for path, error_number in cases:
            with Program(spawner, (str(path),)) as program:
                with pytest.raises(StartFailed, match="executing the program") as failed:
                    await program.end()
                assert failed.value.error_number == error_number
        assert not psutil.Process(spawner.pid).children()

    async def test_what_it_left_running_in_its_group_is_killed(self, spawner: Spawner) -> None:
        script = "sleep 3600 & echo $!"
        with Program(spawner, (SH, "-c", script), environment=("PATH=/usr/bin:/bin",)) as program:
            assert (await program.end()).wait_status == 0
            left = int(program.stdout())
        await eventually(lambda: not psutil.pid_exists(left) or is_zombie(left), "the process is gone")

    async def test_a_process_that_left_its_group_cannot_hold_the_spawner_up(self, spawner: Spawner) -> None:
        """It keeps the pipe of standard error open, and writes to it without end."""
        program = python(
            """
            import os
            if os.fork() == 0:
                os.setsid()
                print(os.getpid(), flush=True)
                words = bytes(65536)
                while True:
                    os.write(2, words)
            import time
            time.sleep(0.3)
            """
        )
        with Program(spawner, program) as run:
            escaped = psutil.Process(int(await run.printed()))
            try:
                assert (await run.end()).wait_status == 0
                assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"
            finally:
                escaped.kill()


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class TestDeath:
    """When the spawner or the service dies, no run is left."""

    async def test_runs_fail_and_die_with_a_spawner_that_is_killed(self, spawner: Spawner) -> None:
        with Program(
            spawner, (SH, "-c", "echo $$; exec sleep 3600"), environment=("PATH=/usr/bin:/bin",)
        ) as program:
            pid = int(await program.printed())
            os.kill(spawner.pid, signal.SIGKILL)
            with pytest.raises(SandboxError, match="the spawner is gone"):
                await program.end()
            await eventually(lambda: not psutil.pid_exists(pid) or is_zombie(pid), "the run is gone")
        assert not spawner.alive
        with pytest.raises(SandboxError, match="gone"):
            spawner.run(("/bin/true",), (), (), BOUNDS)

    @pytest.mark.slow
    async def test_a_stopped_spawner_is_given_up(self, spawner: Spawner) -> None:
        bounds = replace(BOUNDS, wall_seconds=0.1)
        os.kill(spawner.pid, signal.SIGSTOP)
        with (
            Program(spawner, ("/bin/sleep", "3600"), bounds=bounds) as program,
            pytest.raises(SandboxError, match="does not answer"),
        ):
            await program.end()
        assert not spawner.alive
        assert not psutil.pid_exists(spawner.pid)

    @pytest.mark.slow
    async def test_a_spawner_and_service_that_were_both_stopped_go_on(self, spawner: Spawner) -> None:
        """As when a container is frozen: on waking, the overdue run is no reason to give up."""
        bounds = replace(BOUNDS, wall_seconds=0.1)
        with Program(spawner, ("/bin/sleep", "3600"), bounds=bounds) as program:
            await eventually(lambda: psutil.Process(spawner.pid).children(), "the run started")
            os.kill(spawner.pid, signal.SIGSTOP)
            # Both stand still for longer than the spawner may be silent: this thread sleeps, too.
            time.sleep(2.5)  # noqa: ASYNC251 - that the loop does not run is the point
            os.kill(spawner.pid, signal.SIGCONT)
            end = await program.end()
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
            await eventually(lambda: len(spawner.children()) == 3, "three runs")
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
        with Program(spawner, ("/bin/sleep", "3600")) as other:
            ended, _ = spawner.run(("/bin/true",), (), (NO_DESCRIPTOR,) * 3, BOUNDS)
            with pytest.raises(StartFailed) as failed:
                await ended
            assert failed.value.error_number == errno.EBADF
            assert spawner.alive
            assert not other.ended.done()
            other.kill()
            await other.end()

    @pytest.mark.parametrize(
        ("argv", "files"),
        [
            (("/bin/true", "a\0b"), 0),
            (("/bin/true", "x" * 70_000), 0),
            (("/bin/true", *["x"] * 600), 0),
            (("/bin/true", "\ud800"), 0),
            (("/bin/true",), 9),
        ],
    )
    async def test_refuses_what_no_process_can_be_given(
        self, spawner: Spawner, argv: tuple[str, ...], files: int
    ) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        try:
            with pytest.raises(StartFailed):
                spawner.run(argv, (), [null] * files, BOUNDS)
        finally:
            os.close(null)
        assert not spawner._pending
        assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"

    async def test_a_run_killed_before_it_is_sent_never_runs(self, spawner: Spawner, tmp_path: Path) -> None:
        """Its descriptors may be closed then, and their numbers belong to others."""
        os.kill(spawner.pid, signal.SIGSTOP)
        null = os.open(os.devnull, os.O_RDWR)
        touched = tmp_path / "touched"
        try:
            sent = []
            while not spawner._outbox:  # until the socket is full
                sent.append(spawner.run(("/bin/true", "x" * 60_000), (), (null, null, null), BOUNDS)[0])
            ended, kill = spawner.run(("/usr/bin/touch", str(touched)), (), (null, null, null), BOUNDS)
            kill()
            assert (await ended).reason is EndReason.KILLED
        finally:
            os.kill(spawner.pid, signal.SIGCONT)
        async with asyncio.timeout(60):
            assert {end.wait_status for end in await asyncio.gather(*sent)} == {0}
        os.close(null)
        assert await output_of(spawner, "/bin/echo", "still here") == "still here\n"
        assert not touched.exists()

    async def test_hundreds_at_once_all_end(self, spawner: Spawner) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        try:
            runs = [
                spawner.run((SH, "-c", f"exit {n % 100}"), (), (null, null, null), BOUNDS)[0]
                for n in range(500)
            ]
            async with asyncio.timeout(120):
                ends = await asyncio.gather(*runs)
        finally:
            os.close(null)
        assert [os.waitstatus_to_exitcode(end.wait_status) for end in ends] == [n % 100 for n in range(500)]
        assert not psutil.Process(spawner.pid).children()


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
        raw.send(raw.header(2, 1, version=2))
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
    def test_refuses_a_malformed_run_and_goes_on(
        self, raw: RawSpawner, change: dict[str, int | bytes], error_number: int
    ) -> None:
        with raw.null() as null:
            raw.send(raw.run_message(5, [b"/bin/true", b"x"], **change), [null] * 3)  # type: ignore[arg-type]
        reply = raw.reply()
        assert (reply.run_id, reply.ended, reply.stage, reply.error) == (
            5,
            False,
            STAGE_REQUEST,
            error_number,
        )
        assert raw.works()

    def test_takes_as_many_strings_as_it_promises(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            raw.send(raw.run_message(5, [b"/bin/true", *[b"x"] * 500], [b"A=1"] * 11), [null] * 3)
        assert raw.reply().status == 0

    def test_refuses_a_run_that_is_cut_short(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            raw.send(raw.run_message(5, [b"/bin/true"])[:60], [null] * 3)
        reply = raw.reply()
        assert (reply.run_id, reply.ended, reply.error) == (5, False, errno.EPROTO)
        assert raw.works()

    @pytest.mark.parametrize(
        ("count", "error_number"),
        [(0, errno.EINVAL), (2, errno.EINVAL), (9, errno.EMFILE), (200, errno.EMFILE)],
    )
    def test_refuses_too_few_and_too_many_descriptors(
        self, raw: RawSpawner, count: int, error_number: int
    ) -> None:
        with raw.null() as null:
            for run_id in range(1, 4):
                raw.send(raw.run_message(run_id, [b"/bin/true"]), [null] * count)
                reply = raw.reply()
                assert (reply.run_id, reply.ended, reply.error) == (run_id, False, error_number)
        assert raw.works()

    def test_takes_eight_descriptors(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            script = b"for n in 0 1 2 3 4 5 6 7; do [ -e /proc/self/fd/$n ] || exit 1; done"
            raw.send(raw.run_message(1, [b"/bin/sh", b"-c", script]), [null] * 8)
        assert raw.reply().status == 0

    def test_ignores_what_it_does_not_know(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            raw.send(raw.header(99, 1), [null] * 3)
        raw.send(raw.header(1, 1))
        raw.send(raw.header(4, 1) + bytes(100))
        for run_id in (0, 1, 12345, UNLIMITED):
            raw.kill(run_id)
        assert raw.works()

    def test_no_wall_time_at_all_ends_a_run_at_once(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            raw.send(raw.run_message(1, [b"/bin/sleep", b"3600"], wall_seconds=0), [null] * 3)
        reply = raw.reply()
        assert (reply.status, reply.reason) == (signal.SIGKILL, EndReason.WALL_TIME)

    def test_no_cpu_time_at_all_is_the_least_there_is(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            raw.send(
                raw.run_message(1, [b"/bin/sh", b"-c", b"while :; do :; done"], cpu_nanoseconds=0), [null] * 3
            )
        assert raw.reply().status == signal.SIGPROF

    def test_the_hugest_limits_are_none(self, raw: RawSpawner) -> None:
        with raw.null() as null:
            message = raw.run_message(
                1,
                [b"/bin/true"],
                wall_seconds=1e30,
                cpu_nanoseconds=UNLIMITED,
                file_bytes=UNLIMITED,
                stderr_bytes=UNLIMITED,
                open_files=2**32 - 1,
                pinned=2**32 - 1,
            )
            raw.send(message, [null] * 3)
        assert raw.reply().status == 0

    def test_two_runs_of_one_id_both_end(self, raw: RawSpawner) -> None:
        raw.run(1, b"/bin/sleep", b"3600")
        raw.run(1, b"/bin/sleep", b"3600")
        for _ in range(2):
            raw.kill(1)
            assert raw.reply().reason == EndReason.KILLED

    def test_an_unread_socket_loses_no_reply(self, raw: RawSpawner) -> None:
        """The spawner takes no new work while nobody reads; all is told once somebody does."""
        sent = 0
        with raw.null() as null:
            raw.control.setblocking(False)
            while sent < 3000:
                _, writable, _ = select.select([], [raw.control], [], 1)
                if not writable:
                    break  # it does not read any more
                raw.send(raw.run_message(sent + 1, [b"/bin/true"]), [null] * 3)
                sent += 1
            raw.control.setblocking(True)
        assert sent < 3000, "the socket never filled"
        # It waits, and does not spin: that would show as CPU time.
        process = psutil.Process(raw.pid)
        before = sum(process.cpu_times()[:2])
        select.select([], [], [], 0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.3
        replies = [raw.reply() for _ in range(sent)]
        assert sorted(reply.run_id for reply in replies) == list(range(1, sent + 1))
        assert {reply.status for reply in replies} == {0}
        assert raw.works()

    def test_running_out_of_descriptors_fails_runs_and_nothing_else(self, raw: RawSpawner) -> None:
        raw.limit_descriptors(40)
        for _ in range(3):  # what errors leak would be missing the second time
            for run_id in range(1, 31):
                raw.run(run_id, b"/bin/sleep", b"3600")
            failed = [raw.reply() for _ in range(30 - self._most_at_once())]
            assert {reply.error for reply in failed} == {errno.EMFILE}
            for run_id in range(1, 31):
                raw.kill(run_id)
            ended = [raw.reply() for _ in range(self._most_at_once())]
            assert {reply.reason for reply in ended} == {EndReason.KILLED}
            assert {reply.run_id for reply in failed} | {reply.run_id for reply in ended} == set(range(1, 31))
            assert raw.works()

    @staticmethod
    def _most_at_once() -> int:
        """Of 40 descriptors: 0 to 7 are reserved, one is epoll; a run keeps three, and a start needs six."""
        return (40 - 9 - 3) // 3

    def test_every_level_of_shortage_fails_cleanly(self, raw: RawSpawner) -> None:
        """With one descriptor less each time, another step of the start is the one that fails."""
        for most in range(16, 8, -1):
            raw.limit_descriptors(most)
            for run_id in range(1, 6):
                raw.run(run_id, b"/bin/true")
                reply = raw.reply()
                assert (reply.run_id, reply.error or reply.status) in ((run_id, 0), (run_id, errno.EMFILE))
            # Back to enough: what was lost on the way would show here.
            raw.limit_descriptors(16)
            assert raw.works()

    def test_hundreds_of_runs_of_every_kind_leak_nothing(self, raw: RawSpawner) -> None:
        raw.limit_descriptors(16)  # enough for one run at a time, and for no leak
        with raw.null() as null:
            for run_id in range(1, 61):
                raw.run(run_id, b"/bin/true")
                assert raw.reply().status == 0
                raw.run(run_id, b"/does/not/exist")
                assert raw.reply().stage == STAGE_EXEC
                raw.send(raw.run_message(run_id, [], argument_count=0), [null] * 3)
                assert raw.reply().stage == STAGE_REQUEST
                raw.send(raw.header(77, run_id), [null] * 3)
                raw.run(run_id, b"/bin/sleep", b"3600")
                raw.kill(run_id)
                assert raw.reply().reason == EndReason.KILLED
        assert raw.works()
        assert not psutil.Process(raw.pid).children()


def wait_for_children(pid: int, count: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    give_up_at = time.monotonic() + 20
    while len(children := process.children()) != count:
        assert time.monotonic() < give_up_at
        select.select([], [], [], 0.005)
    return children


def wait_until_gone(process: psutil.Process) -> None:
    give_up_at = time.monotonic() + 20
    while process.is_running() and not is_zombie(process.pid):
        assert time.monotonic() < give_up_at
        select.select([], [], [], 0.005)
