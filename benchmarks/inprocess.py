"""The other way to run a module: an instance inside the process that asks, with the `wasmtime` package.

The module is compiled once. Every run gets a store, WASI and an instance of its own, as untrusted
modules must: fresh memory, input from a memory file, output into a list, and a deadline by epochs,
without which a module that loops would never be stopped.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path

import wasmtime

from benchmarks.samples import Samples

NAME = f"in this process, wasmtime {version('wasmtime')} for Python"
_MEMORY_BYTES = 64 << 20


class Instances:
    """Runs one module in this process, as often as one likes."""

    def __init__(self, module: Path, entry_point: str, request: bytes) -> None:
        config = wasmtime.Config()
        config.epoch_interruption = True
        self._engine = wasmtime.Engine(config)
        self._module = wasmtime.Module(self._engine, module.read_bytes())
        self._linker = wasmtime.Linker(self._engine)
        self._linker.define_wasi()
        self._entry_point = entry_point
        self._request = request

    def measure(self, count: int) -> Samples:
        samples = Samples(NAME)
        before = time.process_time()
        for _ in range(count):
            start = time.perf_counter()
            output = self.run()
            samples.wall_seconds.append(time.perf_counter() - start)
            if b'"allowed":true' not in output:
                raise SystemExit(f"the module in this process said {output[:200]!r}")
        samples.cpu_seconds = time.process_time() - before
        return samples

    def run(self) -> bytes:
        """One run of the module on its own; what it printed."""
        output: list[bytes] = []
        stdin = os.memfd_create("stdin")
        try:
            os.write(stdin, self._request)
            wasi = wasmtime.WasiConfig()
            wasi.stdin_file = f"/proc/self/fd/{stdin}"
            wasi.stdout_custom = output.append  # None: it took all
            with wasmtime.Store(self._engine) as store:
                store.set_wasi(wasi)
                store.set_limits(memory_size=_MEMORY_BYTES)
                store.set_epoch_deadline(1)
                exports = self._linker.instantiate(store, self._module).exports(store)
                for name in ("_initialize", self._entry_point):
                    if isinstance(function := exports.get(name), wasmtime.Func):
                        function(store)
        finally:
            os.close(stdin)
        return b"".join(output)
