"""Guest modules for tests, as WebAssembly text."""

from __future__ import annotations

# Standard input read whole into memory at 1024 (up to 60 KiB), its size at 8; writes at any place.
PRELUDE = """
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 4)
  (func $read
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 61440))
    (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func $write (param $fd i32) (param $at i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 12))))
  (func $sleep_an_hour
    (i64.store (i32.const 16) (i64.const 0))
    (i64.store (i32.const 24) (i64.const 0))
    (i32.store (i32.const 32) (i32.const 1))
    (i64.store (i32.const 40) (i64.const 3600000000000))
    (i64.store (i32.const 48) (i64.const 0))
    (i32.store16 (i32.const 56) (i32.const 0))
    (drop (call $poll (i32.const 16) (i32.const 128) (i32.const 1) (i32.const 12))))
"""

ECHO = f"""(module {PRELUDE}
  (func (export "_start")
    (call $read) (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 8)))))"""

# Entry points that end in each way. `words` talks on standard error before it traps.
ENDINGS = f"""(module {PRELUDE}
  (data (i32.const 200) "words of the guest")
  (func (export "echo") (call $read) (call $write (i32.const 1) (i32.const 1024) (i32.load (i32.const 8))))
  (func (export "exit") (call $proc_exit (i32.const 7)))
  (func (export "trap") (unreachable))
  (func (export "words") (call $write (i32.const 2) (i32.const 200) (i32.const 18)) (unreachable))
  (func (export "spin") (loop $again (br $again)))
  (func (export "sleep") (call $sleep_an_hour))
  (func (export "flood")
    (loop $again (call $write (i32.const 1) (i32.const 0) (i32.const 65536)) (br $again))))"""


def printing(entry_point: str, output: str, then: str = "") -> str:
    """A module whose entry point prints a fixed text, and then does `then`."""
    escaped = "".join(f"\\{byte:02x}" for byte in output.encode())
    return f"""(module {PRELUDE}
      (data (i32.const 65536) "{escaped}")
      (func (export "{entry_point}")
        (call $write (i32.const 1) (i32.const 65536) (i32.const {len(output.encode())})) {then}))"""


SLEEPING_VALIDATE = f'(module {PRELUDE} (func (export "validate") (call $sleep_an_hour)))'
TRAPPING_AUTHN = f'(module {PRELUDE} (func (export "authn") (unreachable)))'
TRAPPING_AUTHZ = f'(module {PRELUDE} (func (export "authz") (unreachable)))'
