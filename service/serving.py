"""`bulkhead serve`: from the command line to a supervisor that runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import click
import structlog

from bulkhead.sandbox import SandboxError
from bulkhead.sandbox.files import write_atomically
from bulkhead.service.banner import banner
from bulkhead.service.cli import EXIT_FAILED, EXIT_USAGE
from bulkhead.service.config import Address, Config, ConfigError, GrpcConfig, HttpsConfig, exposed
from bulkhead.service.configfiles import ConfigFiles
from bulkhead.service.configmodel import MOST_WORKERS
from bulkhead.service.demo import CONFIGURATION
from bulkhead.service.generation import ServeOptions
from bulkhead.service.log import Format, configure_logging
from bulkhead.service.state import state_dir as find_state_dir
from bulkhead.service.supervisor import Serving, Supervisor
from bulkhead.service.worker_process import WorkerFailed
from bulkhead.service.workers import automatic_workers

_log = structlog.get_logger()


def serve(
    files: ConfigFiles,
    state_dir: Path | None,
    wasmtime: Path | None,
    https_address: str | None,
    grpc_address: str | None,
    workers: str | None,
    insecure: bool,
    allow_broken_modules: bool,
    log_level: str,
    log_format: Format | None,
    ready_file: Path | None,
) -> int:
    """Serves until it is told to stop; returns the exit code."""
    chosen_format: Format = log_format or ("text" if sys.stderr.isatty() else "json")
    configure_logging(log_level, chosen_format)
    demo = not files.paths
    if demo:
        files = ConfigFiles(bulkhead=CONFIGURATION)
    try:
        loaded = files.load(insecure=insecure)
        https = _address(https_address, loaded.server.https, "--https-address", insecure=insecure)
        grpc = _address(grpc_address, loaded.server.grpc, "--grpc-address", insecure=insecure)
        options = ServeOptions(
            files=files,
            state_dir=find_state_dir(state_dir or loaded.server.state_dir),
            wasmtime=wasmtime or loaded.server.wasmtime,
            https=https,
            grpc=grpc,
            workers=_workers(workers, loaded),
            insecure=insecure,
            allow_broken_modules=allow_broken_modules,
            log_level=log_level,
            log_format=chosen_format,
        )
        asyncio.run(_serve(options, ready_file, demo=demo))
    except (ConfigError, click.UsageError) as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_USAGE
    except (SandboxError, WorkerFailed) as error:
        click.echo(f"bulkhead: {error}", err=True)
        return EXIT_FAILED
    return 0


def _address(given: str | None, section: HttpsConfig | GrpcConfig, option: str, *, insecure: bool) -> Address:
    address = section.address
    if given is not None:
        try:
            address = Address.parse(given)
        except ValueError as error:
            raise click.UsageError(f"{option}: {error}") from None
    if section.plaintext and not address.is_loopback:
        if not insecure:
            raise click.UsageError(f"{option}: {exposed(address)}")
        _log.warning("INSECURE", address=str(address), why="others can read and change what is said there")
    return address


def _workers(given: str | None, config: Config) -> int:
    """How many processes answer over HTTPS."""
    chosen = config.server.workers if given is None else given
    if chosen == "auto":
        # Each of them has its part of the runs.
        return min(automatic_workers(), config.sandbox_options(Path()).max_concurrent_runs)
    try:
        number = int(chosen)
    except ValueError:
        raise click.UsageError(f"--workers: expected a number or auto, got {chosen!r}") from None
    if not 1 <= number <= MOST_WORKERS:
        raise click.UsageError(f"--workers: expected 1 to {MOST_WORKERS}, got {number}")
    return number


async def _serve(options: ServeOptions, ready_file: Path | None, *, demo: bool) -> None:
    stop, stop_now = asyncio.Event(), asyncio.Event()
    supervisor = Supervisor(options)
    starting = asyncio.create_task(supervisor.start())

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()
        starting.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    terminal = _terminal()
    loop.add_signal_handler(
        signal.SIGHUP, lambda: on_signal() if _is_gone(terminal) else supervisor.ask_reload()
    )
    try:
        serving = await starting
        _announce(serving, ready_file, demo=demo)
        await supervisor.run(stop, stop_now, partial(_write_ready_file, ready_file))
        _log.info("stopped")
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        _log.info("stopped", when="before it was ready")
    finally:
        await supervisor.close()
        _forget(ready_file)


def _terminal() -> int | None:
    """The descriptor of the terminal that it was started from, if any."""
    return next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)


def _is_gone(terminal: int | None) -> bool:
    """Whether SIGHUP means what it once meant: that the terminal was closed."""
    return terminal is not None and not os.isatty(terminal)


def _announce(serving: Serving, ready_file: Path | None, *, demo: bool) -> None:
    click.echo(banner(serving, demo=demo))
    sys.stdout.flush()
    _write_ready_file(ready_file, serving)
    _log.info("ready", https=serving.https_address, grpc=serving.grpc_address, pid=os.getpid())


def _write_ready_file(ready_file: Path | None, serving: Serving) -> None:
    if ready_file is not None:
        write_atomically(ready_file.absolute(), json.dumps(_document(serving), indent=2).encode() + b"\n")


def _forget(ready_file: Path | None) -> None:
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)


def _document(serving: Serving) -> dict[str, object]:
    authority = serving.ca_certificate
    return {
        "httpsAddress": serving.https_address,
        "grpcAddress": serving.grpc_address,
        "caCertificate": str(authority) if authority else None,
        "stateDir": str(serving.options.state_dir),
        "wasmtime": serving.runtime.version,
        "pid": os.getpid(),
        "generation": serving.generation.number,
        "modules": [
            {"section": each.section, "name": each.name, "digest": each.digest} for each in serving.modules
        ],
    }
