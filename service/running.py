"""`bulkhead run`: one module, once, from the shell."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bulkhead.sandbox import (
    InvalidModule,
    InvalidRequest,
    Limits,
    ModuleInfo,
    Outcome,
    RunResult,
    Sandbox,
    SandboxError,
    SandboxOptions,
    UnknownModule,
    format_quantity,
    parse_digest,
    parse_duration,
    parse_quantity,
)
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.state import state_dir as find_state_dir

EXIT_CODES = {
    Outcome.OK: 0,
    Outcome.EXIT_NONZERO: 10,
    Outcome.TRAP: 11,
    Outcome.TIMEOUT: 12,
    Outcome.CPU_LIMIT: 13,
    Outcome.MEMORY_LIMIT: 14,
    Outcome.STDOUT_LIMIT: 15,
    Outcome.CANCELLED: 16,
    Outcome.KILLED: 16,
    Outcome.SANDBOX_CRASH: 17,
    Outcome.SANDBOX_VIOLATION: 17,
    Outcome.START_FAILED: 18,
}
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_REVIEW_ENTRY_POINTS = frozenset({"authn", "authz", "validate"})
_QUANTITIES = {
    "memory": "memory_bytes",
    "stdout": "stdout_bytes",
    "stderr": "stderr_bytes",
    "stack": "stack_bytes",
}
_DURATIONS = {"timeout": "wall_seconds", "cpu": "cpu_seconds"}
_COUNTS = ("table_elements", "fuel")


def run(
    module: str,
    arguments: Sequence[str],
    entry_point: str | None,
    settings: str | None,
    state_dir: Path | None,
    wasmtime: Path | None,
    **limits: Any,
) -> int:
    """Runs a module with standard input; returns the exit code, which says the outcome."""
    try:
        chosen = _limits(limits)
        options = SandboxOptions(
            state_dir=find_state_dir(state_dir),
            wasmtime=wasmtime,
            limits=chosen,
            maximum_limits=_larger(chosen),
        )
        result = asyncio.run(_run(options, module, arguments, entry_point, settings))
    except (InvalidModule, InvalidRequest, UnknownModule, ValueError) as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        click.echo("cancelled: interrupted", err=True)
        return EXIT_CODES[Outcome.CANCELLED]
    except OSError as error:
        click.echo(f"bulkhead: {error.filename or 'input'}: {error.strerror}", err=True)
        return EXIT_USAGE
    except SandboxError as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    _print(result)
    return EXIT_CODES[result.outcome]


async def _run(
    options: SandboxOptions,
    module: str,
    arguments: Sequence[str],
    entry_point: str | None,
    settings: str | None,
) -> RunResult:
    async with await Sandbox.open(options) as sandbox:
        info = await _load(sandbox, module)
        entry_point = entry_point or _only_entry_point(info)
        info.require_entry_point(entry_point)
        stdin = _input(entry_point, settings)
        return await sandbox.run(info.digest, entry_point, stdin=stdin, arguments=arguments)


async def _load(sandbox: Sandbox, module: str) -> ModuleInfo:
    if module.startswith("sha256:"):
        return await asyncio.to_thread(sandbox.inspect, parse_digest(module))
    return await sandbox.load(await asyncio.to_thread(Path(module).read_bytes))


def _only_entry_point(info: ModuleInfo) -> str:
    names = [export.name for export in info.exports if export.runnable]
    if "_start" in names:
        return "_start"
    if len(names) == 1:
        return names[0]
    raise InvalidRequest(
        f"choose an entry point with --entry; the module exports {', '.join(map(repr, names))}"
    )


def _input(entry_point: str, settings: str | None) -> bytes:
    stdin = _read_stdin()
    if entry_point not in _REVIEW_ENTRY_POINTS:
        if settings is not None:
            raise InvalidRequest(
                f"--settings: the entry point {entry_point!r} takes none; put them into the input"
            )
        return stdin
    return _wrap(stdin, settings)


def _read_stdin() -> bytes:
    if sys.stdin is None:  # closed by who started us
        return b""
    if sys.stdin.isatty():
        click.echo("bulkhead: reading the module's input from the terminal; end it with Ctrl-D", err=True)
    return sys.stdin.buffer.read()


def _settings(given: str) -> Any:
    text = Path(given[1:]).read_text() if given.startswith("@") else given
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(
            f"--settings: expected JSON, or @ and the path of a JSON file: {error}"
        ) from None


def _wrap(stdin: bytes, settings: str | None) -> bytes:
    """A review becomes {"request": review}; what is wrapped already, or no JSON at all, stays as it is."""
    try:
        document = json.loads(stdin)
    except ValueError:
        if settings is not None:
            raise InvalidRequest("--settings: the input is not JSON, so they cannot be added to it") from None
        return stdin
    if isinstance(document, dict) and "kind" in document:
        document = {"request": document}
    elif settings is None or not isinstance(document, dict):
        return stdin
    if settings is not None:
        document["settings"] = _settings(settings)
    return json.dumps(document, separators=(",", ":")).encode()


def _limits(given: dict[str, Any]) -> Limits:
    changes: dict[str, Any] = {}
    for table, read in ((_QUANTITIES, parse_quantity), (_DURATIONS, parse_duration)):
        for option, field in table.items():
            if (text := given[option]) is not None:
                try:
                    changes[field] = read(text)
                except ValueError as error:
                    raise InvalidRequest(f"--{option}: {error}") from None
    changes |= {name: given[name] for name in _COUNTS if given[name] is not None}
    return replace(Limits(), **changes)


def _larger(chosen: Limits) -> Limits:
    """Who has a shell on the machine may set any limit."""
    return replace(chosen, fuel=None)


def _harmless(text: bytes) -> bytes:
    """What a guest wrote, with control characters (line ends and tabs apart) spelled out."""
    shown = text.decode(errors="backslashreplace")
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], shown).encode()


def _print(result: RunResult) -> None:
    if sys.stdout is not None:  # else closed by who started us
        sys.stdout.buffer.write(result.stdout)
        sys.stdout.buffer.flush()
    # On a terminal the guest's escape sequences would be obeyed.
    on_terminal = sys.stderr.isatty()
    sys.stderr.buffer.write(_harmless(result.stderr) if on_terminal else result.stderr)
    if result.stderr and not result.stderr.endswith(b"\n"):
        sys.stderr.buffer.write(b"\n")
    if result.stderr_truncated:
        click.echo("bulkhead: more was written to standard error than is kept (--stderr)", err=True)
    sys.stderr.buffer.flush()
    if result.diagnostics:  # for whoever debugs the module; clients of the service never see it
        words = result.diagnostics.rstrip()  # they quote names that the guest chose
        click.echo(_harmless(words.encode()) if on_terminal else words, err=True)
    usage = result.usage
    peak = format_quantity(usage.peak_memory_bytes // 1024 * 1024)
    click.echo(
        f"{result.outcome}: {result.message}  wall {usage.wall_seconds * 1e3:.1f}ms  "
        f"cpu {usage.cpu_seconds * 1e3:.1f}ms  peak {peak}",
        err=True,
    )
