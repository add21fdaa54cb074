"""Guests that misbehave, one for each thing that a guest can try, as WebAssembly text.

The entry point of each is `run`. `$at` and `$size` below are places in the guest's memory.
"""

from __future__ import annotations

WASI = "wasi_snapshot_preview1"

_SIGNATURES = {
    "args_get": "i32 i32",
    "args_sizes_get": "i32 i32",
    "clock_time_get": "i32 i64 i32",
    "environ_sizes_get": "i32 i32",
    "fd_close": "i32",
    "fd_prestat_get": "i32 i32",
    "fd_read": "i32 i32 i32 i32",
    "fd_renumber": "i32 i32",
    "fd_write": "i32 i32 i32 i32",
    "path_open": "i32 i32 i32 i32 i32 i64 i64 i32 i32",
    "poll_oneoff": "i32 i32 i32 i32",
    "proc_raise": "i32",
    "random_get": "i32 i32",
    "sched_yield": "",
    "sock_accept": "i32 i32 i32",
}


def guest(body: str, *, imports: str = "", pages: int = 2, fields: str = "", locals_: str = "$i i32") -> str:
    """A module whose `run` does `body`. `imports` names functions of WASI, separated by spaces.

    It always can `(call $write FD AT SIZE)` and `(call $proc_exit CODE)`; the memory below 64 is
    used by `$write`.
    """
    names = sorted({*imports.split(), "fd_write"})
    functions = "\n".join(
        f'(import "{WASI}" "{name}" (func ${name} (param {_SIGNATURES[name]}) (result i32)))'
        for name in names
    )
    declared = "".join(f"(local {each})" for each in locals_.split(",") if each)
    return f"""(module
      {functions}
      (import "{WASI}" "proc_exit" (func $proc_exit (param i32)))
      (memory (export "memory") {pages})
      {fields}
      (func $write (param $fd i32) (param $at i32) (param $size i32)
        (i32.store (i32.const 0) (local.get $at))
        (i32.store (i32.const 4) (local.get $size))
        (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
      (func (export "run") {declared} {body}))"""


def text(at: int, content: bytes) -> str:
    """A data segment."""
    escaped = "".join(f"\\{byte:02x}" for byte in content)
    return f'(data (i32.const {at}) "{escaped}")'


_ANSWER = b'{"response":{"allowed":true}}'
ANSWER = text(1024, _ANSWER)
WRITE_ANSWER = f"(call $write (i32.const 1) (i32.const 1024) (i32.const {len(_ANSWER)}))"
ANSWER_BYTES = _ANSWER

# What wasmtime prints when a guest traps, as far as a guest can imitate it.
TRAP_WORDS = (
    b"Error: failed to run main module `/proc/self/fd/3`\n\nCaused by:\n"
    b"    0: failed to invoke `run`\n    1: wasm trap: wasm `unreachable` instruction executed\n"
)

SPIN = guest("(loop $again (br $again))")
SPIN_AT_START = guest("", fields="(func $spin (loop $again (br $again))) (start $spin)")
YIELD = guest("(loop $again (drop (call $sched_yield)) (br $again))", imports="sched_yield")
READ_FOR_EVER = guest(
    """(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const 1024))
    (loop $again
      (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))) (br $again))""",
    imports="fd_read",
)
SLEEP = guest(
    """(i32.store (i32.const 80) (i32.const 1)) (i64.store (i32.const 88) (i64.const 3600000000000))
    (drop (call $poll_oneoff (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 8)))""",
    imports="poll_oneoff",
)
# A subscription has 48 bytes, an event 32; all are clocks of an hour.
MILLION_SUBSCRIPTIONS = guest(
    """(loop $again
      (i32.store (i32.add (i32.mul (local.get $i) (i32.const 48)) (i32.const 80)) (i32.const 1))
      (i64.store (i32.add (i32.mul (local.get $i) (i32.const 48)) (i32.const 88)) (i64.const 3600000000000))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $i) (i32.const 1000000))))
    (call $proc_exit (i32.ne (i32.const 0)
      (call $poll_oneoff (i32.const 64) (i32.const 50000000) (i32.const 1000000) (i32.const 8))))""",
    imports="poll_oneoff",
    pages=1280,
)
GROW_UNTIL_REFUSED = guest(
    """(loop $again
      (br_if $again (i32.ge_s (memory.grow (i32.const 1)) (i32.const 0))))
    (call $proc_exit (i32.const 7))"""
)
GROW_AND_TOUCH = guest(
    """(loop $again
      (local.set $i (memory.grow (i32.const 1)))
      (if (i32.lt_s (local.get $i) (i32.const 0)) (then unreachable))
      (memory.fill (i32.mul (local.get $i) (i32.const 65536)) (i32.const 1) (i32.const 65536))
      (br $again))"""
)
GROW_TABLE = guest(
    """(loop $again
      (br_if $again (i32.ge_s (table.grow 0 (ref.null func) (i32.const 1000)) (i32.const 0))))
    (call $proc_exit (i32.const 7))""",
    fields="(table 1 funcref)",
)
FLOOD_STDOUT = guest("(loop $again (call $write (i32.const 1) (i32.const 0) (i32.const 65536)) (br $again))")
FLOOD_STDERR = guest(
    f"""(loop $again (call $write (i32.const 2) (i32.const 0) (i32.const 65536))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $i) (i32.const 100))))
    {WRITE_ANSWER}""",
    fields=ANSWER,
)
ONE_HUGE_WRITE = guest("(call $write (i32.const 1) (i32.const 0) (i32.const 67108864))", pages=1025)
# 65,536 vectors of the same MiB: 64 GiB are asked for.
OVERLAPPING_VECTORS = guest(
    """(loop $again
      (i32.store (i32.add (i32.mul (local.get $i) (i32.const 8)) (i32.const 2097152)) (i32.const 0))
      (i32.store (i32.add (i32.mul (local.get $i) (i32.const 8)) (i32.const 2097156)) (i32.const 1048576))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $i) (i32.const 65536))))
    (loop $write
      (drop (call $fd_write (i32.const 1) (i32.const 2097152) (i32.const 65536) (i32.const 64)))
      (br $write))""",
    pages=64,
)
CLOSE_STDIO = guest(
    f"""(drop (call $fd_close (i32.const 0))) (drop (call $fd_close (i32.const 1)))
    (drop (call $fd_close (i32.const 2))) {WRITE_ANSWER}""",
    imports="fd_close",
    fields=ANSWER,
)
RENUMBER = guest(
    f"""(loop $again
      (drop (call $fd_renumber (i32.const 2) (i32.const 1)))
      {WRITE_ANSWER}
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $i) (i32.const 10000))))""",
    imports="fd_renumber",
    fields=ANSWER,
)
RECURSE = guest("(call $deep)", fields="(func $deep (call $deep) (call $deep))")
# Every local lives across the call, so each frame holds them all.
RECURSE_IN_LARGE_FRAMES = guest(
    "(drop (call $deep (i64.const 1)))",
    fields="(func $deep (param $x i64) (result i64) (local "
    + " ".join(["i64"] * 5000)
    + ")"
    + "".join(f"(local.set {i} (i64.add (local.get {i - 1}) (local.get $x)))" for i in range(1, 5001))
    + "(local.set $x (call $deep (local.get 5000)))"
    + "".join(f"(local.set $x (i64.xor (local.get $x) (local.get {i})))" for i in range(1, 5001))
    + "(local.get $x))",
)
UNREACHABLE = guest("(unreachable)")
DIVISION_BY_ZERO = guest("(drop (i32.div_s (i32.const 1) (local.get $i)))")
OUT_OF_BOUNDS = guest("(drop (i32.load (i32.const 2000000000)))")
NULL_CALL = guest("(call_indirect (type $t) (i32.const 0))", fields="(type $t (func)) (table 1 funcref)")
OUT_OF_BOUNDS_DATA = guest("", fields='(data (i32.const 131072) "x")')


def exits(code: int) -> str:
    return guest(f"(call $proc_exit (i32.const {code}))")


ANSWER_THEN_TRAP = guest(f"{WRITE_ANSWER} (unreachable)", fields=ANSWER)
ANSWER_THEN_EXIT = guest(f"{WRITE_ANSWER} (call $proc_exit (i32.const 1))", fields=ANSWER)
ANSWER_THEN_SPIN = guest(f"{WRITE_ANSWER} (loop $again (br $again))", fields=ANSWER)


def says(words: bytes, then: str = "") -> str:
    """Prints on standard error, then does `then`."""
    return guest(
        f"(call $write (i32.const 2) (i32.const 1024) (i32.const {len(words)})) {then}",
        fields=text(1024, words),
    )


RANDOM_IN_A_LOOP = guest(
    """(loop $again (drop (call $random_get (i32.const 0) (i32.const 67108864))) (br $again))""",
    imports="random_get",
    pages=1024,
)
RANDOM_HUGE = guest("(drop (call $random_get (i32.const 0) (i32.const 2147483647)))", imports="random_get")
RANDOM_SMALL_IN_A_LOOP = guest(
    "(loop $again (drop (call $random_get (i32.const 0) (i32.const 65536))) (br $again))",
    imports="random_get",
)


def clocks(first: int, last: int) -> str:
    """Asks clocks of these numbers for the time, then answers."""
    return guest(
        f"""(local.set $i (i32.const {first}))
        (loop $again
          (drop (call $clock_time_get (local.get $i) (i64.const 1) (i32.const 64)))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.le_u (local.get $i) (i32.const {last}))))
        {WRITE_ANSWER}""",
        imports="clock_time_get",
        fields=ANSWER,
    )


SPIN_ON_THE_CLOCK = guest(
    "(loop $again (drop (call $clock_time_get (i32.const 1) (i64.const 1) (i32.const 64))) (br $again))",
    imports="clock_time_get",
)
# Exits with the number of descriptors (at most 99) that are anything but bad (EBADF, 8).
OPEN_FILES = guest(
    """(local.set $i (i32.const 3))
    (loop $again
      (local.set $bad (i32.add (local.get $bad)
        (i32.ne (i32.const 8) (call $fd_prestat_get (local.get $i) (i32.const 64)))))
      (local.set $bad (i32.add (local.get $bad) (i32.ne (i32.const 8)
        (call $path_open (local.get $i) (i32.const 1) (i32.const 1024) (i32.const 11) (i32.const 0)
          (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 64)))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $i) (i32.const 2000))))
    (if (i32.gt_u (local.get $bad) (i32.const 99)) (then (local.set $bad (i32.const 99))))
    (call $proc_exit (local.get $bad))""",
    imports="fd_prestat_get path_open",
    fields=text(1024, b"/etc/passwd"),
    locals_="$i i32,$bad i32",
)
# Writes the counts of arguments and of environment variables, then the arguments themselves.
ARGUMENTS = guest(
    """(drop (call $args_sizes_get (i32.const 64) (i32.const 68)))
    (drop (call $environ_sizes_get (i32.const 72) (i32.const 76)))
    (drop (call $args_get (i32.const 128) (i32.const 1024)))
    (call $write (i32.const 1) (i32.const 64) (i32.const 16))
    (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 68)))""",
    imports="args_sizes_get args_get environ_sizes_get",
)
# Exits with 0 if both calls are refused with an error number.
SOCKETS_AND_SIGNALS = guest(
    """(call $proc_exit (i32.or
      (i32.eqz (call $sock_accept (i32.const 0) (i32.const 0) (i32.const 64)))
      (i32.eqz (call $sock_accept (i32.const 3) (i32.const 0) (i32.const 64)))))""",
    imports="sock_accept",
)
RAISE = guest("(call $proc_exit (i32.eqz (call $proc_raise (i32.const 9))))", imports="proc_raise")
