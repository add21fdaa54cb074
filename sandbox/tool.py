"""Running a program of our own choice, within limits: the compiler, and the runtime when it is probed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.sandbox.errors import SandboxError
from bulkhead.sandbox.launch import EndReason
from bulkhead.sandbox.outcome import Usage
from bulkhead.sandbox.spawner import Spawner
from bulkhead.sandbox.spawner_protocol import Bounds, StartFailed

_MOST_OUTPUT_BYTES = 1 << 20
TOOL_BOUNDS = Bounds(
    wall_seconds=30,
    cpu_seconds=20,
    data_bytes=1 << 30,
    address_bytes=1 << 40,
    file_bytes=_MOST_OUTPUT_BYTES,
    stderr_bytes=64 << 10,
    pinned=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolEnd:
    """How a tool ended."""

    wait_status: int
    reason: EndReason
    stdout: bytes
    stderr: str
    usage: Usage

    @property
    def exit_code(self) -> int | None:
        """None: ended by a signal."""
        return os.WEXITSTATUS(self.wait_status) if os.WIFEXITED(self.wait_status) else None


async def execute_tool(
    spawner: Spawner,
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    files: Sequence[int] = (),
    bounds: Bounds = TOOL_BOUNDS,
) -> ToolEnd:
    """Runs a program to its end. `files` become its descriptors 3 and up. Raises SandboxError.

    Cancelling kills it.
    """
    try:
        end = await spawner.execute(argv, bounds, stdin=stdin, files=files)
    except StartFailed as error:
        raise SandboxError(f"cannot run {argv[0]}: {error}") from error
    return ToolEnd(
        wait_status=end.wait_status,
        reason=end.reason,
        stdout=end.stdout,
        stderr=end.stderr.decode(errors="replace"),
        usage=end.usage,
    )


async def run_tool(spawner: Spawner, argv: Sequence[str]) -> str:
    """Runs a program that is expected to succeed, and returns what it printed. Raises SandboxError."""
    end = await execute_tool(spawner, argv)
    if end.exit_code != 0:
        ended = f"exit code {end.exit_code}" if end.exit_code is not None else f"status {end.wait_status:#x}"
        raise SandboxError(f"{' '.join(argv)} failed with {ended}: {end.stderr.strip()[:500]}")
    return end.stdout.decode(errors="replace")
