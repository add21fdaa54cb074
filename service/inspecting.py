"""`bulkhead inspect`: what a module is, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bulkhead.sandbox import (
    InvalidModule,
    ModuleInfo,
    ModuleStore,
    SandboxError,
    SandboxOptions,
    UnknownModule,
    check_runnable,
    describe,
    format_quantity,
    parse_digest,
)
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.state import state_dir as find_state_dir

_MOST_ROWS = 60


def inspect(module: str, as_json: bool, state_dir: Path | None) -> int:
    """Prints what the module is; returns the exit code."""
    options = SandboxOptions(state_dir=find_state_dir(state_dir))
    try:
        info = describe(_read(module, options), max_bytes=options.max_module_bytes)
    except (InvalidModule, UnknownModule) as error:
        reason = f" ({error.reason})" if isinstance(error, InvalidModule) else ""
        click.echo(f"bulkhead: {module}: {error}{reason}", err=True)
        return EXIT_USAGE
    except OSError as error:
        click.echo(f"bulkhead: {error.filename or 'input'}: {error.strerror}", err=True)
        return EXIT_USAGE
    except SandboxError as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    refusal = _refusal(info, options)
    if as_json:
        click.echo(json.dumps(_document(info, refusal), indent=2))
    else:
        _print_tables(info, refusal)
    return EXIT_USAGE if refusal else 0


def _read(module: str, options: SandboxOptions) -> bytes:
    if module.startswith("sha256:"):
        store = ModuleStore(options.state_dir / "modules", max_total_bytes=options.max_store_bytes)
        return store.read(parse_digest(module))
    with Path(module).open("rb") as file:
        return file.read(options.max_module_bytes + 1)


def _refusal(info: ModuleInfo, options: SandboxOptions) -> InvalidModule | None:
    try:
        check_runnable(info, options.maximum_limits)
    except InvalidModule as error:
        return error
    return None


def _metadata(info: ModuleInfo) -> Any:
    return json.loads(info.kubewarden_metadata) if info.kubewarden_metadata else None


def _document(info: ModuleInfo, refusal: InvalidModule | None) -> dict[str, Any]:
    return {
        "digest": info.digest,
        "sizeBytes": info.size_bytes,
        "abi": info.abi,
        "runnable": refusal is None,
        "refusal": None if refusal is None else {"reason": refusal.reason, "message": str(refusal)},
        "imports": [
            {"module": each.module, "name": each.name, "kind": each.kind, "signature": each.signature}
            for each in info.imports
        ],
        "exports": [
            {"name": each.name, "kind": each.kind, "signature": each.signature, "runnable": each.runnable}
            for each in info.exports
        ],
        "kubewardenMetadata": _metadata(info),
    }


def _print_tables(info: ModuleInfo, refusal: InvalidModule | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    runnable = ", ".join(escape(ascii(each.name)[1:-1]) for each in info.exports if each.runnable)
    console.print(f"[bold]digest[/]   {info.digest}")
    console.print(
        f"[bold]size[/]     {info.size_bytes} bytes (about {format_quantity(info.size_bytes // 1024 * 1024)})"
    )
    console.print(f"[bold]abi[/]      {info.abi}")
    console.print(f"[bold]entries[/]  {runnable or 'none'}")
    if refusal is None:
        console.print("[bold]runs[/]     [green]yes[/]")
    else:
        console.print(f"[bold]runs[/]     [red]no[/]: {escape(str(refusal))} ({refusal.reason})")
    rows = [("import", f"{each.module}.{each.name}", each.kind, each.signature) for each in info.imports]
    rows += [("export", each.name, each.kind, each.signature) for each in info.exports]
    table = Table("", "name", "kind", "type", box=None, padding=(0, 2, 0, 0))
    for what, name, kind, signature in rows[:_MOST_ROWS]:
        # Names are the guest's: control characters and markup in them must not reach the terminal.
        table.add_row(what, escape(ascii(name)[1:-1]), kind, escape(signature))
    console.print(table)
    if len(rows) > _MOST_ROWS:
        console.print(f"… and {len(rows) - _MOST_ROWS} more; --json shows all")
    if info.kubewarden_metadata:
        console.print("[bold]kubewarden metadata[/]")
        console.print(escape(json.dumps(_metadata(info), indent=2)))
