"""A generation: one configuration with all that it names, found good, and served as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bulkhead.sandbox import Runtime, Sandbox
from bulkhead.service.certificate import ensure_certificate
from bulkhead.service.chains import Key, Pin, find_chains, pins_of
from bulkhead.service.config import Address, Config, ConfigError
from bulkhead.service.configfiles import ConfigFiles
from bulkhead.service.configured import sandbox_options
from bulkhead.service.log import Format
from bulkhead.service.modulesource import FileSource, HttpsSource, OciSource
from bulkhead.service.tls import TlsError, TlsMaterial, tls_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line and the first configuration say together; holds until the end."""

    files: ConfigFiles
    state_dir: Path
    wasmtime: Path | None
    https: Address
    grpc: Address
    workers: int
    """Of them that answer over HTTPS."""
    insecure: bool
    allow_broken_modules: bool
    log_level: str
    log_format: Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What workers serve. Goes to them as a whole, secrets included."""

    number: int
    config: Config
    pins: Mapping[Key, Pin]
    https_tls: TlsMaterial | None
    grpc_tls: TlsMaterial | None

    @property
    def broken(self) -> frozenset[Key]:
        """The modules that cannot be used, and fail when they are asked."""
        return frozenset(key for key, pin in self.pins.items() if pin.broken)

    def __repr__(self) -> str:
        return f"Generation({self.number})"


class Generations:
    """Makes generations, one after the other, from the files as they are by then."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._generated: TlsMaterial | None = None
        """Made anew at a start only: clients that trust its authority must not lose it at any moment."""

    async def make(
        self, config: Config, number: int, *, tolerate: Callable[[Key], bool]
    ) -> tuple[Generation, Runtime]:
        """Reads all that the configuration names, and makes sure that all modules can be run.

        Raises ConfigError with every problem, SandboxError. `tolerate`: see `find_chains`.
        """
        https_tls, grpc_tls = await self._certificates(config)
        chosen = sandbox_options(config, self._options.state_dir, self._options.wasmtime)
        # Each module is run once here, if that: a zygote would not be worth its start.
        async with await Sandbox.open(replace(chosen, zygotes=False)) as sandbox:
            chains = await find_chains(config, sandbox, tolerate=tolerate)
            runtime = sandbox.runtime
        generation = Generation(
            number=number,
            config=config.without_sources(),
            pins=pins_of(chains),
            https_tls=https_tls,
            grpc_tls=grpc_tls,
        )
        return generation, runtime

    async def with_fresh_certificates(self, generation: Generation) -> Generation | None:
        """The same with its certificates as they are by now; None if nothing has changed.

        Raises ConfigError, SandboxError.
        """
        https_tls, grpc_tls = await self._certificates(generation.config)
        if (https_tls, grpc_tls) == (generation.https_tls, generation.grpc_tls):
            return None
        return replace(generation, number=generation.number + 1, https_tls=https_tls, grpc_tls=grpc_tls)

    async def _certificates(self, config: Config) -> tuple[TlsMaterial | None, TlsMaterial | None]:
        if self._generated is None:
            self._generated = generated_certificate(config, self._options.state_dir, self._options.https.host)
        return await read_certificates(config, self._generated)


def generated_certificate(config: Config, state_dir: Path, host: str) -> TlsMaterial | None:
    """One of our own for HTTPS, where the configuration asks for none other. Raises SandboxError."""
    https = config.server.https
    if https.certificate is not None or https.plaintext:
        return None
    return ensure_certificate(state_dir / "tls", host).material()


async def read_certificates(
    config: Config, generated: TlsMaterial | None
) -> tuple[TlsMaterial | None, TlsMaterial | None]:
    """What HTTPS and gRPC show and ask for; None for plain text. Raises ConfigError with every problem."""
    found: list[TlsMaterial | None] = []
    problems = []
    for name, section, made in (
        ("https", config.server.https, generated),
        ("grpc", config.server.grpc, None),
    ):
        try:
            # In a thread: it waits for files that are just being swapped.
            found.append(await asyncio.to_thread(tls_of, section, made))
        except TlsError as error:
            problems.append(config.problem(("server", name, error.key), str(error)))
    if problems:
        raise ConfigError(problems)
    https_tls, grpc_tls = found
    return https_tls, grpc_tls


def files_of(config: Config) -> frozenset[Path]:
    """All files whose content makes a generation."""
    files = set(config.files)
    for _, modules in config.sections():
        files.update(module.source.path for module in modules if isinstance(module.source, FileSource))
    for front_end in (config.server.https, config.server.grpc):
        files.update(
            path for path in (front_end.certificate, front_end.key, front_end.client_ca) if path is not None
        )
    return frozenset(files)


def uses_network(config: Config) -> bool:
    """Whether a module comes from elsewhere, so that trying again may help."""
    return any(
        isinstance(module.source, HttpsSource | OciSource)
        for _, modules in config.sections()
        for module in modules
    )


def needs_restart(running: Config, new: Config) -> list[str]:
    """The keys that have changed and that only a restart puts to use."""
    return [key for key, value in _FIXED if value(running) != value(new)]


_FIXED: tuple[tuple[str, Callable[[Config], object]], ...] = (
    ("server.https.address", lambda config: config.server.https.address),
    ("server.grpc.address", lambda config: config.server.grpc.address),
    ("server.maxBodyBytes", lambda config: config.server.max_body_bytes),
    ("server.workers", lambda config: config.server.workers),
    ("server.stateDir", lambda config: config.server.state_dir),
    ("server.wasmtime", lambda config: config.server.wasmtime),
    ("isolation", lambda config: config.isolation),
    ("limits.maxConcurrentRuns", lambda config: config.limits.max_concurrent_runs),
    ("limits.maxQueuedRuns", lambda config: config.limits.max_queued_runs),
)
