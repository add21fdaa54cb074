"""The launcher that executes the wasmtime binary anew for every job."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from bulkhead.sandbox.errors import Overloaded, SandboxError
from bulkhead.sandbox.launch import Exit, Job, Run
from bulkhead.sandbox.limits import Limits
from bulkhead.sandbox.memfile import create_memfile, read_memfile, write_memfile
from bulkhead.sandbox.spawner import SHORTAGES, Bounds, ProcessEnd, SpawnerKeeper
from bulkhead.sandbox.wasmtime import Runtime

_ARTIFACT_FD = 3
# One of tokio's threads is enough for a run, and starting more costs 15 % of it. The guest does
# not see this environment.
_ENVIRONMENT = ("TOKIO_WORKER_THREADS=1",)
# The runtime's own data: heap, thread stacks, tables, the instance. Measured: 11 MiB with wasmtime-min.
_RUNTIME_DATA_BYTES = 64 << 20
_TABLE_ELEMENT_BYTES = 16
# Address space is only reserved, not used: 4 GiB and guard pages for one linear memory.
_RUNTIME_ADDRESS_BYTES = 64 << 30


@dataclass(slots=True)
class _Files:
    """A run's standard files, open until the process has ended."""

    stdin: int = -1
    stdout: int = -1
    stderr: int = -1

    @classmethod
    def create(cls, stdin: bytes) -> _Files:
        files = cls()
        try:
            files.stdin = create_memfile("stdin")
            files.stdout = create_memfile("stdout")
            files.stderr = create_memfile("stderr")
            write_memfile(files.stdin, stdin)
        except OSError as error:
            files.close()
            if error.errno in SHORTAGES:
                raise Overloaded("the host is short of descriptors or memory; try again later") from error
            raise SandboxError(f"cannot make the files of a run: {error.strerror}") from error
        return files

    def close(self) -> None:
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = -1


@dataclass(frozen=True, slots=True)
class ExecLauncher:
    """Stateless: the spawner has the processes, a job's files live as long as its process."""

    runtime: Runtime
    spawners: SpawnerKeeper

    async def start(self, job: Job) -> Run:
        spawner = await self.spawners.living()
        files = _Files.create(job.stdin)
        try:
            ended, kill = spawner.run(
                _command(self.runtime, job),
                _ENVIRONMENT,
                (files.stdin, files.stdout, files.stderr, job.module.artifact_fd),
                _bounds(job),
            )
        except BaseException:
            files.close()
            raise
        result: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        # The artifact is mapped and read as far as the guest needs its code: no more than all of it.
        overhead_bytes = self.runtime.resident_bytes + job.module.size_bytes
        ended.add_done_callback(lambda end: _finish(end, result, files, job, overhead_bytes))
        return Run(result, kill)


def _finish(
    ended: asyncio.Future[ProcessEnd],
    result: asyncio.Future[Exit],
    files: _Files,
    job: Job,
    overhead_bytes: int,
) -> None:
    """Collects what a process left. `job` is here to keep the artifact open until now."""
    try:
        if result.done():
            ended.exception()
            return
        error = ended.exception()
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(_collect(ended.result(), files, job.limits, overhead_bytes))
    except OSError as error:
        result.set_exception(SandboxError(f"cannot read what a run wrote: {error.strerror}"))
    finally:
        files.close()


def _collect(end: ProcessEnd, files: _Files, limits: Limits, overhead_bytes: int) -> Exit:
    exceeded = os.fstat(files.stdout).st_size > limits.stdout_bytes
    return Exit(
        wait_status=end.wait_status,
        reason=end.reason,
        stdout=read_memfile(files.stdout, limits.stdout_bytes),
        stdout_exceeded=exceeded,
        stderr=read_memfile(files.stderr, limits.stderr_bytes),
        stderr_truncated=end.stderr_truncated,
        usage=end.usage,
        overhead_bytes=overhead_bytes,
    )


def _bounds(job: Job) -> Bounds:
    limits = job.limits
    return Bounds(
        wall_seconds=job.wall_seconds,
        cpu_seconds=limits.cpu_seconds,
        data_bytes=limits.memory_bytes + limits.table_elements * _TABLE_ELEMENT_BYTES + _RUNTIME_DATA_BYTES,
        address_bytes=limits.memory_bytes + _RUNTIME_ADDRESS_BYTES,
        # One more than allowed, so that too much can be told from just enough.
        file_bytes=limits.stdout_bytes + 1,
        stderr_bytes=limits.stderr_bytes,
    )


def _command(runtime: Runtime, job: Job) -> tuple[str, ...]:
    return (
        str(runtime.runner),
        "run",
        *runtime.flags,
        *runtime.limit_flags(job.limits, stdin_bytes=len(job.stdin)),
        "--allow-precompiled",
        "--argv0",
        "module.wasm",
        # One word: a name that begins with a hyphen stays a name. Also for _start: without it, an
        # export with an empty name would run instead.
        f"--invoke={job.entry_point}",
        f"/proc/self/fd/{_ARTIFACT_FD}",
        *job.arguments,
    )
