"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer, doing its work."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bulkhead.sandbox import spawner as spawner_module
from bulkhead.sandbox.memfile import create_memfile, read_memfile, write_memfile
from bulkhead.sandbox.outcome import Way
from bulkhead.sandbox.spawner import Spawner
from bulkhead.sandbox.spawner_protocol import KEY_BYTES, Bounds, Program, ProgramFlags
from tests.support.raw_zygote import READY_TYPE, RawZygote, zygote_of

ROOT = Path(__file__).resolve().parent.parent.parent
NATIVE = ROOT / "sandbox" / "native"
FLAGS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
UNLIMITED = 2**62
BOUNDS = Bounds(
    wall_seconds=30,
    cpu_seconds=20,
    data_bytes=UNLIMITED,  # the sanitizer's shadow memory is terabytes of address space
    address_bytes=UNLIMITED,
    file_bytes=1 << 24,
    stderr_bytes=1 << 16,
    pinned=True,
)


def _compiler() -> list[str]:
    """A compiler that has the sanitizers' runtimes: zig, which the build falls back to, has not."""
    sys.path.insert(0, str(ROOT / "build_support"))
    import backend  # type: ignore[import-not-found]

    command: list[str] = backend.compiler_command()
    return command


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sanitized spawner, and with a program that becomes a zygote."""
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = _compiler()
    if "ziglang" in compiler:
        pytest.skip("there is no C compiler but zig, which has no AddressSanitizer")
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    probe = [*compiler, *FLAGS, "-o", str(folder / "probe"), str(folder / "probe.c")]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("the C compiler has no AddressSanitizer: install its runtime (Debian: libasan, with gcc)")
    spawner = [str(NATIVE / name) for name in ("spawner.c", "programs.c", "process.c", "runs.c", "zygotes.c")]
    confine = str(NATIVE / "confine.c")
    pretender = [str(ROOT / "tests" / "native" / "pretender.c"), str(NATIVE / "zygote.c"), confine]
    for name, sources in (("bulkhead-spawner", [*spawner, confine]), ("pretender", pretender)):
        command = [*compiler, *FLAGS, f"-I{NATIVE}", "-o", str(folder / name), *sources, "-ldl", "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    # What the spawner preloads has nothing to do: the pretender has the library in itself.
    (folder / "empty.c").write_text("extern int nothing;\nint nothing;\n")
    empty = [
        *compiler,
        "-shared",
        "-fPIC",
        "-o",
        str(folder / "libbulkhead-zygote.so"),
        str(folder / "empty.c"),
    ]
    subprocess.run(empty, check=True)
    return folder


def _start(zygote: RawZygote, run_id: int, stdin: bytes) -> list[int]:
    fds = [create_memfile(name) for name in ("stdin", "stdout", "stderr")]
    write_memfile(fds[0], stdin)
    limits = {"data_bytes": UNLIMITED, "address_bytes": UNLIMITED, "open_files": 64}
    zygote.send(zygote.run_message(run_id, **limits), fds)
    return fds


def _finish(fds: list[int]) -> tuple[bytes, str]:
    try:
        return read_memfile(fds[1], 1 << 20), read_memfile(fds[2], 1 << 20).decode(errors="replace")
    finally:
        for fd in fds:
            os.close(fd)


def test_a_zygote_and_its_runs(programs: Path) -> None:
    """Many runs, one by one and at once; a sanitizer would end any of them with a code of its own."""
    command = ["/usr/bin/env", "-u", "LD_PRELOAD", "ASAN_OPTIONS=detect_leaks=0", str(programs / "pretender")]
    with zygote_of(command) as zygote:
        ready = zygote.message()
        assert ready.kind == READY_TYPE, ready
        for run_id in range(1, 101):
            stdin = secrets.token_hex(run_id * 7).encode()
            fds = _start(zygote, run_id, stdin)
            zygote.started(run_id)
            status = zygote.ended(run_id)
            stdout, stderr = _finish(fds)
            assert (status, stdout) == (0, stdin), stderr
        at_once = {run_id: _start(zygote, run_id, str(run_id).encode()) for run_id in range(200, 240)}
        ends = 0
        while ends < len(at_once):
            message = zygote.message()
            ends += message.kind == 5
            if message.kind == 5:
                assert message.status == 0, _finish(at_once[message.run_id])
        for run_id, fds in at_once.items():
            assert _finish(fds)[0] == str(run_id).encode()
        zygote.send(zygote.run_message(999))  # without its files
        assert zygote.failed(999).error != 0
        zygote.control.close()
        assert zygote.exit_code() == 0


async def test_the_spawner(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spawner = await Spawner.start(programs / "bulkhead-spawner")
    try:
        ends = await asyncio.gather(
            *(spawner.execute(("/bin/cat",), BOUNDS, stdin=str(n).encode() * 500) for n in range(40))
        )
        assert [end.stdout for end in ends] == [str(n).encode() * 500 for n in range(40)]
        long = await spawner.execute(("/usr/bin/head", "-c", "3000000", "/dev/zero"), BOUNDS)
        assert len(long.stdout) == 3_000_000
        late = await spawner.execute(("/bin/sleep", "100"), replace(BOUNDS, wall_seconds=0.1))
        assert late.wait_status == signal.SIGKILL
        await _zygotes(spawner, str(programs / "pretender"))
        assert spawner.alive
    finally:
        pid = spawner.pid
        await spawner.close()
    assert pid > 0
    assert not re.search("Sanitizer|runtime error", capfd.readouterr().err)


async def _zygotes(spawner: Spawner, program: str) -> None:
    """Runs of a zygote, and of a program that cannot become one."""
    for argv, ways in (((program,), {Way.ZYGOTE}), (("/bin/cat",), {Way.EXEC})):
        key = secrets.token_bytes(KEY_BYTES)
        ready = asyncio.Event()
        spawner.on_zygote = lambda report, ready=ready: ready.set()  # type: ignore[misc]
        spawner.register(
            Program(
                key=key,
                argv=argv,
                environment=("ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0",),
                flags=ProgramFlags.HAS_ZYGOTE | ProgramFlags.IS_WASMTIME,
            )
        )
        await asyncio.wait_for(ready.wait(), 30)
        ends = [await spawner.run(key, BOUNDS, stdin=b"x")[0] for _ in range(30)]
        assert [(end.wait_status, end.stdout) for end in ends] == [(0, b"x")] * 30, ends[0].stderr
        assert {end.usage.way for end in ends} == ways
        spawner.forget(key)


def test_the_names_of_the_programs_are_those_of_the_package() -> None:
    assert spawner_module.PROGRAM.name == "bulkhead-spawner"
    assert spawner_module.LIBRARY.name == "libbulkhead-zygote.so"
