"""`bulkhead check`: whether a configuration would be served, without serving it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from bulkhead.sandbox import Sandbox, SandboxError
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.config import Config, ConfigError, load_config
from bulkhead.service.configured import sandbox_options
from bulkhead.service.review import Reviewer
from bulkhead.service.state import state_dir as find_state_dir


def check(config: Path, state_dir: Path | None, wasmtime: Path | None) -> int:
    """Prints every problem, or the modules; returns the exit code."""
    try:
        loaded = load_config(config)
        modules = asyncio.run(
            _modules(loaded, find_state_dir(state_dir or loaded.server.state_dir), wasmtime)
        )
    except ConfigError as error:
        click.echo(str(error), err=True)
        count = len(error.problems)
        click.echo(f"bulkhead: {config} has {count} problem{'' if count == 1 else 's'}", err=True)
        return EXIT_USAGE
    except SandboxError as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    for section, name, digest in modules:
        click.echo(f"{section:<15} {name:<24} {digest}")
    click.echo(f"{config} is good: {len(modules)} modules")
    return 0


async def _modules(config: Config, state_dir: Path, wasmtime: Path | None) -> list[tuple[str, str, str]]:
    """Loads and compiles every module, as serving would."""
    async with await Sandbox.open(sandbox_options(config, state_dir, wasmtime)) as sandbox:
        reviewer = await Reviewer.open(config, sandbox)
        return [(module.section, module.name, module.digest) for module in reviewer.modules]
