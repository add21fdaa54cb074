"""What hostile modules get, one by one and a hundred at a time.

Three kinds of them end in another way than one might expect, and why:

- Writes on descriptors that were closed or moved away fail, too. Such a guest succeeds with an empty
  standard output, which no reviewer takes for an answer; that is for the layer above to say.
- A clock with an unknown number, or too many random bytes at once, is an error of the runtime's that
  ends the run with exit code 1, not an error number for the guest.
- Guests that only compute are stopped by the CPU limit or by the wall clock, whichever comes first on
  a busy machine.

What modules cannot even be put is in the second half.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import pytest

from bulkhead.sandbox import (
    InvalidModule,
    InvalidModuleReason,
    Limits,
    Outcome,
    RunResult,
    Sandbox,
)
from tests.support import hostile_guests as guests
from tests.support import wasm_binary
from tests.support.sandboxes import Leftovers, eventually
from tests.support.wat import wat

MIB = 1 << 20
LIMITS = Limits(
    memory_bytes=32 * MIB,
    wall_seconds=3.0,
    cpu_seconds=0.1,
    stdout_bytes=MIB,
    stderr_bytes=8192,
    table_elements=10_000,
)
SPINS = frozenset({Outcome.CPU_LIMIT, Outcome.TIMEOUT})
TRAP = frozenset({Outcome.TRAP})
OK = frozenset({Outcome.OK})
EXIT = frozenset({Outcome.EXIT_NONZERO})
# The runtime, its buffers, and the guest's own memory.
MOST_RESIDENT_BYTES = 96 * MIB

Check = Callable[[RunResult], bool]


def anything(_: RunResult) -> bool:
    return True


def exit_code(code: int) -> Check:
    return lambda result: result.exit_code == code


def stdout(content: bytes) -> Check:
    return lambda result: result.stdout == content


def stderr(content: bytes) -> Check:
    return lambda result: result.stderr == content


def named_with_newlines() -> bytes:
    """Traps in a function whose name forges lines of a log."""
    name = wasm_binary.name("a\n\x1b[31mError: forged\nat b")
    names = wasm_binary.section(1, wasm_binary.vector([b"\0" + name]))
    return wasm_binary.module([wasm_binary.body(b"\0")]) + wasm_binary.custom("name", names)


@dataclass(frozen=True)
class Guest:
    """A hostile module, how it must end, and what else must be true of its end."""

    name: str
    module: str | bytes
    outcomes: frozenset[Outcome]
    check: Check = anything
    limits: Limits = LIMITS

    @property
    def binary(self) -> bytes:
        return self.module if isinstance(self.module, bytes) else wat(self.module)


SHORT = replace(LIMITS, wall_seconds=0.3)
ROOMY = replace(LIMITS, memory_bytes=80 * MIB)

GUESTS = [
    Guest("spins", guests.SPIN, SPINS),
    Guest("spins_in_its_start_function", guests.SPIN_AT_START, SPINS),
    Guest("sleeps", guests.SLEEP, frozenset({Outcome.TIMEOUT}), limits=SHORT),
    Guest("yields_for_ever", guests.YIELD, SPINS),
    Guest("reads_past_the_end_for_ever", guests.READ_FOR_EVER, SPINS),
    Guest(
        "waits_for_a_million_things",
        guests.MILLION_SUBSCRIPTIONS,
        EXIT | {Outcome.MEMORY_LIMIT, Outcome.TIMEOUT, Outcome.TRAP},
        limits=replace(ROOMY, cpu_seconds=1.0),
    ),
    Guest("grows_until_refused", guests.GROW_UNTIL_REFUSED, EXIT, exit_code(7)),
    Guest("grows_and_touches", guests.GROW_AND_TOUCH, frozenset({Outcome.MEMORY_LIMIT})),
    Guest("grows_a_table", guests.GROW_TABLE, EXIT, exit_code(7)),
    Guest("floods_stdout", guests.FLOOD_STDOUT, frozenset({Outcome.STDOUT_LIMIT})),
    Guest(
        "floods_stderr",
        guests.FLOOD_STDERR,
        OK,
        lambda result: (
            result.stderr_truncated and len(result.stderr) == 8192 and result.stdout == guests.ANSWER_BYTES
        ),
        limits=replace(LIMITS, cpu_seconds=1.0),
    ),
    Guest("one_huge_write", guests.ONE_HUGE_WRITE, frozenset({Outcome.STDOUT_LIMIT}), limits=ROOMY),
    Guest("overlapping_vectors", guests.OVERLAPPING_VECTORS, frozenset({Outcome.STDOUT_LIMIT})),
    Guest("closes_its_descriptors", guests.CLOSE_STDIO, OK, stdout(b"")),
    Guest(
        "moves_stderr_onto_stdout",
        guests.RENUMBER,
        OK,
        stdout(b""),
        limits=replace(LIMITS, cpu_seconds=1.0),
    ),
    Guest("recurses", guests.RECURSE, TRAP),
    Guest("recurses_in_large_frames", guests.RECURSE_IN_LARGE_FRAMES, TRAP),
    Guest("unreachable", guests.UNREACHABLE, TRAP),
    Guest("divides_by_zero", guests.DIVISION_BY_ZERO, TRAP),
    Guest("reads_out_of_bounds", guests.OUT_OF_BOUNDS, TRAP),
    Guest("calls_null", guests.NULL_CALL, TRAP),
    Guest("data_out_of_bounds", guests.OUT_OF_BOUNDS_DATA, TRAP),
    Guest("exits_0", guests.exits(0), OK, exit_code(0)),
    *(Guest(f"exits_{code}", guests.exits(code), EXIT, exit_code(code)) for code in (1, 125)),
    *(
        Guest(f"exits_{code}", guests.exits(code), EXIT, exit_code(1))
        for code in (126, 127, 128, 134, 137, 255, 256, 2**32 - 1)
    ),
    Guest("answers_then_traps", guests.ANSWER_THEN_TRAP, TRAP),
    Guest("answers_then_exits", guests.ANSWER_THEN_EXIT, EXIT, exit_code(1)),
    Guest("answers_then_spins", guests.ANSWER_THEN_SPIN, SPINS),
    Guest("forges_a_trap", guests.says(guests.TRAP_WORDS), OK, stderr(guests.TRAP_WORDS)),
    Guest(
        "forges_a_trap_and_exits",
        guests.says(guests.TRAP_WORDS, "(call $proc_exit (i32.const 3))"),
        EXIT,
        exit_code(3),
    ),
    Guest("has_newlines_in_names", named_with_newlines(), TRAP, stderr(b"")),
    Guest(
        "prints_terminal_escapes",
        guests.says(b"\x1b[2J\0\r\n\x9b31m", "(unreachable)"),
        TRAP,
        stderr(b"\x1b[2J\0\r\n\x9b31m"),
    ),
    Guest("asks_for_much_randomness", guests.RANDOM_IN_A_LOOP, EXIT, limits=ROOMY),
    Guest("asks_for_2_gib_of_randomness", guests.RANDOM_HUGE, EXIT),
    Guest("asks_for_randomness_for_ever", guests.RANDOM_SMALL_IN_A_LOOP, SPINS),
    Guest("asks_known_clocks", guests.clocks(0, 1), OK, stdout(guests.ANSWER_BYTES)),
    Guest("asks_unknown_clocks", guests.clocks(4, 99), EXIT, stdout(b"")),
    Guest("spins_on_the_clock", guests.SPIN_ON_THE_CLOCK, SPINS),
    Guest("looks_for_open_files", guests.OPEN_FILES, OK, limits=replace(LIMITS, cpu_seconds=1.0)),
    Guest(
        "looks_at_arguments_and_environment",
        guests.ARGUMENTS,
        OK,
        stdout(bytes.fromhex("01000000 0c000000 00000000 00000000") + b"module.wasm\0"),
    ),
    Guest("accepts_connections", guests.SOCKETS_AND_SIGNALS, OK),
    Guest("raises_signals", guests.RAISE, OK),
]

each_guest = pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)

HONEST = guests.guest(
    """(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 60000))
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 8)))""",
    imports="fd_read",
)
PATIENT = Limits(wall_seconds=60, cpu_seconds=10)


async def honest_run(sandbox: Sandbox, digest: str) -> None:
    """A run of a module that echoes its input is right."""
    words = os.urandom(500)
    result = await sandbox.run(digest, "run", stdin=words, limits=PATIENT)
    assert (result.outcome, result.stdout, result.stderr) == (Outcome.OK, words, b"")


def judge(guest: Guest, result: RunResult) -> None:
    assert result.outcome in guest.outcomes, (result.outcome, result.message, result.diagnostics)
    assert guest.check(result), result
    assert result.ok is (result.outcome is Outcome.OK)
    assert len(result.stdout) <= guest.limits.stdout_bytes
    assert len(result.stderr) <= guest.limits.stderr_bytes
    assert result.usage.peak_memory_bytes < MOST_RESIDENT_BYTES
    assert result.message.isprintable()
    # What the runtime says names its files and addresses: that is for logs only.
    forged = guest.name.startswith("forges")
    assert forged or b"/proc" not in result.stderr


@each_guest
async def test_a_hostile_guest_harms_only_itself(sandbox: Sandbox, guest: Guest) -> None:
    digests = [(await sandbox.put(module))[0].digest for module in (guest.binary, wat(HONEST))]
    await honest_run(sandbox, digests[1])
    leftovers = await Leftovers.of(sandbox)
    judge(guest, await sandbox.run(digests[0], "run", limits=guest.limits))
    await honest_run(sandbox, digests[1])
    await leftovers.none()


@pytest.mark.slow
@each_guest
async def test_a_hundred_hostile_guests_harm_no_honest_one(sandbox: Sandbox, guest: Guest) -> None:
    digests = [(await sandbox.put(module))[0].digest for module in (guest.binary, wat(HONEST))]
    await honest_run(sandbox, digests[1])
    leftovers = await Leftovers.of(sandbox)
    # All at once, in turn hostile and honest; the queue takes what the slots do not.
    hostile = [sandbox.run(digests[0], "run", limits=guest.limits) for _ in range(100)]
    honest = [honest_run(sandbox, digests[1]) for _ in range(100)]
    mixed = [run for pair in zip(hostile, honest, strict=True) for run in pair]
    results = await asyncio.gather(*mixed)
    for result in results[::2]:
        assert isinstance(result, RunResult)
        if guest.outcomes & SPINS == frozenset() and result.outcome is Outcome.TIMEOUT:
            continue  # it got no CPU in time, among two hundred
        judge(guest, result)
    await honest_run(sandbox, digests[1])
    await leftovers.none()


async def test_a_sleeping_guest_uses_no_cpu(sandbox: Sandbox) -> None:
    info, _ = await sandbox.put(wat(guests.SLEEP))
    result = await sandbox.run(info.digest, "run", limits=replace(LIMITS, wall_seconds=1.0))
    assert result.outcome is Outcome.TIMEOUT
    assert result.usage.cpu_seconds < 0.3


async def test_a_guest_gets_none_of_the_hosts_environment(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in the process around it: native code in its place would find nothing, either."""
    monkeypatch.setenv("BULKHEAD_TEST_SECRET", "hunter2")
    info, _ = await sandbox.put(wat(guests.SLEEP))
    leftovers = await Leftovers.of(sandbox)
    run = asyncio.create_task(sandbox.run(info.digest, "run", limits=PATIENT))
    spawner = psutil.Process((await sandbox._spawners.living()).pid)
    await eventually(lambda: spawner.children() and spawner.children()[0].environ(), "the run started")
    (process,) = spawner.children()
    ours = {"TOKIO_WORKER_THREADS", "MALLOC_ARENA_MAX", "LD_PRELOAD", "BULKHEAD_ISOLATION"}
    assert set(process.environ()) == ours
    assert "hunter2" not in " ".join(process.cmdline())
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await leftovers.none()


async def test_fuel_ends_a_guest_at_the_same_point_every_time(sandbox: Sandbox) -> None:
    info, _ = await sandbox.put(wat(guests.SPIN))
    for _ in range(3):
        result = await sandbox.run(info.digest, "run", limits=replace(PATIENT, fuel=100_000))
        assert result.outcome is Outcome.TRAP
        assert "fuel" in result.diagnostics


# Modules that are refused when they are put.

MEMORY = '(memory (export "memory") 1)'
RUN = '(func (export "run"))'


def module_of(fields: str) -> Callable[[], bytes]:
    return lambda: wat(f"(module {fields})")


def constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def shared_memory() -> bytes:
    return wat(f'(module (memory (export "memory") 1 1 shared) {RUN})')


Reason = InvalidModuleReason
UNSUPPORTED = {Reason.UNSUPPORTED_FEATURE, Reason.MALFORMED}
REFUSED: dict[str, tuple[Callable[[], bytes], set[Reason]]] = {
    "a_memory_of_4_gib": (module_of(f'(memory (export "memory") 65536) {RUN}'), {Reason.LIMIT}),
    "a_table_of_ten_million": (module_of(f"{MEMORY} {RUN} (table 10000000 funcref)"), {Reason.LIMIT}),
    "90_tables": (module_of(f"{MEMORY} {RUN} {'(table 1 funcref)' * 90}"), {Reason.LIMIT}),
    "90_memories": (module_of(f"{MEMORY} {RUN} {'(memory 1)' * 89}"), {Reason.UNSUPPORTED_FEATURE}),
    "thread_spawn": (
        module_of(f'(import "wasi" "thread-spawn" (func (param i32) (result i32))) {MEMORY} {RUN}'),
        {Reason.UNKNOWN_IMPORT},
    ),
    "preview_0": (
        module_of(f'(import "wasi_unstable" "proc_exit" (func (param i32))) {MEMORY} {RUN}'),
        {Reason.UNKNOWN_IMPORT},
    ),
    "an_unknown_function": (module_of(f'(import "env" "f" (func)) {MEMORY} {RUN}'), {Reason.UNKNOWN_IMPORT}),
    "a_wasi_function_of_another_type": (
        module_of(f'(import "{guests.WASI}" "proc_exit" (func)) {MEMORY} {RUN}'),
        {Reason.UNKNOWN_IMPORT},
    ),
    "shared_memory": (shared_memory, UNSUPPORTED),
    "memory64": (module_of(f'(memory (export "memory") i64 1) {RUN}'), UNSUPPORTED),
    "gc_types": (module_of(f"(type (struct (field i32))) {MEMORY} {RUN}"), UNSUPPORTED),
    "exceptions": (module_of(f"(tag) {MEMORY} {RUN}"), UNSUPPORTED),
    "tail_calls": (module_of(f"(func $a) (func return_call $a) {MEMORY} {RUN}"), UNSUPPORTED),
    "function_references": (
        module_of(f"(type $t (func)) (func (param (ref $t)) (call_ref $t (local.get 0))) {MEMORY} {RUN}"),
        UNSUPPORTED,
    ),
    "relaxed_simd": (
        module_of(
            f"""(func (param v128 v128) (result v128)
            (i8x16.relaxed_swizzle (local.get 0) (local.get 1))) {MEMORY} {RUN}"""
        ),
        UNSUPPORTED,
    ),
    "a_component": (lambda: wat("(component)"), {Reason.NOT_WASM}),
    "no_entry_point": (module_of(MEMORY), {Reason.NO_ENTRY_POINT}),
    "an_entry_point_with_a_result": (
        module_of(f'{MEMORY} (func (export "validate") (result i32) (i32.const 1))'),
        {Reason.WRONG_SIGNATURE},
    ),
    "no_memory_export": (module_of(f"(memory 1) {RUN}"), {Reason.NO_MEMORY}),
    "no_memory": (module_of(RUN), {Reason.NO_MEMORY}),
    "nothing": (constant(b""), {Reason.NOT_WASM}),
    "bad_magic": (constant(b"\0asn\x01\0\0\0"), {Reason.NOT_WASM}),
    "text": (constant(b'(module (memory (export "memory") 1))'), {Reason.NOT_WASM}),
    "an_elf_program": (constant(b"\x7fELF" + bytes(100)), {Reason.NOT_WASM}),
    "a_module_cut_short": (lambda: wat(HONEST)[:-10], {Reason.MALFORMED}),
    "a_bad_length": (constant(wasm_binary.HEADER + b"\x01\xff\xff\xff\xff\xff\xff"), {Reason.MALFORMED}),
    "a_name_that_is_not_utf8": (
        constant(wasm_binary.HEADER + wasm_binary.section(0, b"\x02\xff\xfe")),
        {Reason.MALFORMED},
    ),
    "a_custom_section_of_300_mb_that_is_not_there": (
        constant(wasm_binary.HEADER + b"\0" + wasm_binary.leb(300_000_000) + b"\x01x"),
        {Reason.MALFORMED},
    ),
    "a_custom_section_of_33_mib": (
        lambda: wat(HONEST) + wasm_binary.custom("x", bytes(33 * MIB)),
        {Reason.TOO_LARGE},
    ),
    "60_mb_of_data": (
        lambda: wasm_binary.module(
            [wasm_binary.body(b"")],
            pages=1000,
            data=[wasm_binary.data_segment(0, bytes(60_000_000))],
        ),
        {Reason.TOO_LARGE},
    ),
    "50_million_locals": (lambda: wasm_binary.many_locals(50_000_000), {Reason.MALFORMED}),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refuses_a_module_with(sandbox: Sandbox, name: str) -> None:
    make, reasons = REFUSED[name]
    before = sandbox.store.total_bytes()
    leftovers = await Leftovers.of(sandbox)
    with pytest.raises(InvalidModule) as refused:
        await sandbox.put(make())
    assert refused.value.reason in reasons
    words = str(refused.value)
    assert words.isprintable()
    assert "/proc" not in words
    assert "/tmp" not in words
    assert sandbox.store.total_bytes() == before
    await leftovers.none()


# Modules that are large in one dimension: they run, or are refused within the compiler's limits.

LARGE: dict[str, Callable[[], bytes]] = {
    "100_000_functions": lambda: wasm_binary.many_functions(100_000),
    "blocks_50_000_deep": lambda: wasm_binary.deep_blocks(50_000),
    "a_branch_of_a_million_targets": lambda: wasm_binary.wide_branch(1_000_000),
    "50_000_locals": lambda: wasm_binary.many_locals(50_000),
    "100_000_segments": lambda: wasm_binary.module(
        [wasm_binary.body(b"")], data=[wasm_binary.data_segment(0, b"x")] * 100_000
    ),
    "20_mib_of_data": lambda: wasm_binary.module(
        [wasm_binary.body(b"")], pages=400, data=[wasm_binary.data_segment(0, bytes(20 * MIB))]
    ),
}
SLOW_TO_COMPILE: dict[str, Callable[[], bytes]] = {
    "a_million_functions": lambda: wasm_binary.many_functions(1_000_000),
    "a_register_allocation_bomb_of_a_megabyte": lambda: wasm_binary.register_bomb(60_000),
}


async def put_or_refuse(sandbox: Sandbox, module: bytes) -> bool:
    """Whether the module is taken and runs; if not, it must have been refused for its cost."""
    leftovers = await Leftovers.of(sandbox)
    try:
        info, _ = await sandbox.put(module)
    except InvalidModule as error:
        assert error.reason is Reason.COMPILE_LIMIT, error  # noqa: PT017 - one of two good ends
        await leftovers.none()
        return False
    result = await sandbox.run(info.digest, "run", limits=replace(PATIENT, memory_bytes=64 * MIB))
    assert result.outcome is Outcome.OK, result
    sandbox.delete(info.digest)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
async def test_takes_or_refuses_a_module_with(sandbox: Sandbox, name: str) -> None:
    # It must end within the compiler's wall time (40 s); the rest is for the encoder.
    async with asyncio.timeout(90):
        await put_or_refuse(sandbox, LARGE[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_TO_COMPILE)
async def test_refuses_for_its_cost_a_module_with(sandbox: Sandbox, name: str) -> None:
    async with asyncio.timeout(90):
        assert not await put_or_refuse(sandbox, SLOW_TO_COMPILE[name]())
