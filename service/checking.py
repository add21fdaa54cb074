"""`bulkhead check`: whether a configuration would be served, without serving it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click

from bulkhead.sandbox import Sandbox, SandboxError
from bulkhead.service.chains import find_chains
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.config import Config, ConfigError, Problem
from bulkhead.service.configfiles import ConfigFiles
from bulkhead.service.configured import sandbox_options
from bulkhead.service.generation import generated_certificate, read_certificates
from bulkhead.service.log import configure_logging
from bulkhead.service.state import state_dir as find_state_dir
from bulkhead.service.words import counted


class _Module(NamedTuple):
    section: str
    name: str
    digest: str


def check(files: ConfigFiles, state_dir: Path | None, wasmtime: Path | None) -> int:
    """Prints every problem, or the modules; returns the exit code."""
    configure_logging("error")  # what there is to say is printed
    try:
        config = files.load()
        for note in (*config.notes, *_never_asked(config)):
            click.echo(f"note: {note}", err=True)
        modules = asyncio.run(
            _modules(config, find_state_dir(state_dir or config.server.state_dir), wasmtime)
        )
    except ConfigError as error:
        click.echo(str(error), err=True)
        where = str(files) if len(files.paths) == 1 else "the configuration"
        click.echo(f"bulkhead: {where} has {counted(len(error.problems), 'problem')}", err=True)
        return EXIT_USAGE
    except SandboxError as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    for module in modules:
        click.echo(_line(module, config))
    verb = "is" if len(files.paths) == 1 else "are"
    click.echo(f"{files} {verb} good: {counted(len(modules), 'module')}")
    return 0


def _never_asked(config: Config) -> Iterator[Problem]:
    for index, module in enumerate(config.admission.modules):
        if not module.rules:
            message = f"module {module.name} is never asked: it has no rules"
            yield config.problem(("admission", "modules", index), message)


async def _modules(config: Config, state_dir: Path, wasmtime: Path | None) -> list[_Module]:
    """Reads certificates, and loads and compiles every module, as serving would. Raises ConfigError."""
    problems: list[Problem] = []
    try:
        generated = generated_certificate(config, state_dir, config.server.https.address.host)
        await read_certificates(config, generated)
    except ConfigError as error:
        problems += error.problems
    # Each module is run once: a zygote would not be worth its start.
    options = replace(sandbox_options(config, state_dir, wasmtime), zygotes=False)
    async with await Sandbox.open(options) as sandbox:
        try:
            chains = await find_chains(config, sandbox)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return [_Module(module.section, module.name, module.digest) for module in chains.modules]


def _line(module: _Module, config: Config) -> str:
    """With the file that names it, where there are several."""
    line = f"{module.section:<15} {module.name:<24} {module.digest}"
    file = config.file_of((module.section, "modules")) if len(config.files) > 1 else None
    return line if file is None else f"{line}  {file}"
