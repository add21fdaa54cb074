"""The modules of one configuration, ready to be asked: obtained, checked, compiled and tried."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import structlog

from bulkhead.sandbox import InvalidModule, InvalidRequest, Sandbox, StoreFull, UnknownModule
from bulkhead.service import admission, authentication, authorization, strictjson
from bulkhead.service.admission import Admission, AdmissionModule
from bulkhead.service.authentication import Authentication
from bulkhead.service.authorization import Authorization
from bulkhead.service.call import ReviewModule
from bulkhead.service.config import AdmissionModuleConfig, Config, ConfigError, ModuleConfig, Problem
from bulkhead.service.fetching import NotFetched, obtain_https, obtain_oci
from bulkhead.service.modulesource import FileSource, HttpsSource, OciSource, StoredSource
from bulkhead.service.yamlfile import Location

_ENTRY_POINTS = {
    "authentication": authentication.ENTRY_POINT,
    "authorization": authorization.ENTRY_POINT,
    "admission": admission.ENTRY_POINT,
}
SECTIONS = tuple(_ENTRY_POINTS)
_MOST_FETCHES = 4  # at once
_PROGRESS_SECONDS = 2.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Chains:
    """The modules of one configuration, in its order."""

    authentication: Authentication
    authorization: Authorization
    admission: Admission

    @property
    def modules(self) -> tuple[ReviewModule, ...]:
        """All modules, section by section."""
        return (
            *self.authentication.modules,
            *self.authorization.modules,
            *(each.module for each in self.admission.modules),
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """What a configured module was found to be."""

    digest: str
    """Empty for one that cannot be used."""
    broken: str = ""
    """Why it cannot be used."""


Key = tuple[str, str]
"""Section and name of a module."""


def pins_of(chains: Chains) -> dict[Key, Pin]:
    """What `open_chains` needs to open the same modules again, elsewhere."""
    return {(module.section, module.name): Pin(module.digest, module.not_usable) for module in chains.modules}


class _NotUsable(Exception):
    """A configured module cannot be used. `key` is the part of its configuration that is to blame."""

    def __init__(self, key: Location, message: str) -> None:
        super().__init__(message)
        self.key = key


def _nothing_broken(_: Key) -> bool:
    return False


async def find_chains(
    config: Config, sandbox: Sandbox, *, tolerate: Callable[[Key], bool] = _nothing_broken
) -> Chains:
    """Obtains, stores, compiles and tries every module that the configuration names.

    A module that cannot be used is a problem, unless `tolerate` takes it: then it fails whenever it is
    asked. Raises ConfigError with what is wrong with each of them; SandboxError if the host fails us.
    """
    problems: list[Problem] = []
    ready: dict[str, list[ReviewModule]] = {section: [] for section in SECTIONS}
    fetched = await _fetch_all(config, sandbox)
    progress = _Progress(sum(len(modules) for _, modules in config.sections()))
    for section, modules in config.sections():
        for index, module in enumerate(modules):
            try:
                found = await _find(config, sandbox, section, module, fetched.get((section, module.name)))
            except _NotUsable as error:
                location = (section, "modules", index, *error.key)
                problem = config.problem(location, f"module {module.name}: {error}")
                if not tolerate((section, module.name)):
                    problems.append(problem)
                    continue
                _log.error("module_not_usable", section=section, module=module.name, problem=str(problem))
                found = _module(config, section, module, Pin("", str(error)))
            ready[section].append(found)
            progress.step()
    if problems:
        raise ConfigError(problems)
    for each in config.admission.modules:
        if not each.rules:
            _log.warning(
                "module_is_never_asked", section="admission", module=each.name, why="it has no rules"
            )
    return _chains(config, ready)


class _Progress:
    """Says from time to time how far it is: the first start with hundreds of modules compiles them all."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._said_at = time.monotonic()

    def step(self) -> None:
        self._done += 1
        if time.monotonic() - self._said_at > _PROGRESS_SECONDS:
            _log.info("preparing_modules", done=self._done, total=self._total)
            self._said_at = time.monotonic()


async def open_chains(config: Config, sandbox: Sandbox, pins: Mapping[Key, Pin]) -> Chains:
    """Loads modules that were found before, from the store and the compile cache of the same state.

    Raises UnknownModule if one has gone, SandboxError.
    """
    ready: dict[str, list[ReviewModule]] = {section: [] for section in SECTIONS}
    for section, modules in config.sections():
        for module in modules:
            ready[section].append(_module(config, section, module, pins[section, module.name]))
    usable = [module for modules in ready.values() for module in modules if not module.not_usable]
    # All at once: most of it is waiting for zygotes, which the spawner starts a few at a time.
    for error in await asyncio.gather(*(_prepare(sandbox, each) for each in usable), return_exceptions=True):
        if error is not None:
            raise error
    return _chains(config, ready)


async def _find(
    config: Config, sandbox: Sandbox, section: str, module: ModuleConfig, fetched: str | Exception | None
) -> ReviewModule:
    """Raises _NotUsable, SandboxError."""
    try:
        config.limits_of(module).within(sandbox.options.maximum_limits)
    except InvalidRequest as error:
        raise _NotUsable(("limits",), str(error)) from None
    try:
        if isinstance(fetched, Exception):
            raise fetched
        found = _module(config, section, module, Pin(fetched or await _read(sandbox, module)))
        await _prepare(sandbox, found)
        await sandbox.probe(found.digest, found.entry_point, limits=found.limits)
    except (InvalidModule, StoreFull, UnknownModule, NotFetched) as error:
        raise _NotUsable(("module",), str(error)) from None
    return found


async def _fetch_all(config: Config, sandbox: Sandbox) -> dict[Key, str | Exception]:
    """Gets the modules that come over the network, a few at a time: their digests, or what went wrong."""
    turns = asyncio.Semaphore(_MOST_FETCHES)

    async def fetch(source: HttpsSource | OciSource, digest: str | None) -> str:
        async with turns:
            if isinstance(source, OciSource):
                return await obtain_oci(sandbox, source, digest)
            assert digest is not None  # the configuration has been checked
            return await obtain_https(sandbox, source, digest)

    wanted = {
        (section, module.name): (module.source, module.digest)
        for section, modules in config.sections()
        for module in modules
        if isinstance(module.source, HttpsSource | OciSource)
    }
    once = dict.fromkeys(wanted.values())  # however often it is named
    fetching = {each: fetch(*each) for each in once}
    results = await asyncio.gather(*fetching.values(), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    found = dict(zip(fetching, results, strict=True))
    return {key: found[each] for key, each in wanted.items()}  # type: ignore[misc]  # no others are left


async def _read(sandbox: Sandbox, module: ModuleConfig) -> str:
    """Finds a module of this machine; returns its digest. Raises _NotUsable, InvalidModule, StoreFull."""
    source = module.source
    if isinstance(source, StoredSource):
        if module.digest not in (None, source.digest):
            raise _NotUsable(("digest",), f"expected {source.digest}, got {module.digest}")
        return source.digest
    assert isinstance(source, FileSource)
    try:
        data = await asyncio.to_thread(source.path.read_bytes)
    except OSError as error:
        raise _NotUsable(("module",), f"cannot read {source}: {error.strerror}") from None
    info, _ = await sandbox.put(data, expected_digest=module.digest)
    return info.digest


async def _prepare(sandbox: Sandbox, module: ReviewModule) -> None:
    await sandbox.prepare(module.digest, module.entry_point, limits=module.limits)


def _module(config: Config, section: str, module: ModuleConfig, pin: Pin) -> ReviewModule:
    return ReviewModule(
        section=section,
        name=module.name,
        digest=pin.digest,
        entry_point=_ENTRY_POINTS[section],
        limits=config.limits_of(module),
        settings=strictjson.encode(module.settings) if module.has_settings else None,
        debug=module.debug,
        not_usable=pin.broken,
    )


def _chains(config: Config, ready: Mapping[str, list[ReviewModule]]) -> Chains:
    return Chains(
        Authentication(tuple(ready["authentication"]), config.authentication.audiences),
        Authorization(tuple(ready["authorization"])),
        Admission(tuple(_admission_modules(config.admission.modules, ready["admission"]))),
    )


def _admission_modules(
    configs: tuple[AdmissionModuleConfig, ...], modules: list[ReviewModule]
) -> Iterator[AdmissionModule]:
    for config, module in zip(configs, modules, strict=True):
        yield AdmissionModule(
            module=module,
            mutating=config.mutating,
            rules=tuple(rule.rule() for rule in config.rules),
            failure_policy=config.failure_policy,
        )
