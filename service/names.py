"""The names under which the configuration knows modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bulkhead.sandbox import UnknownModule, parse_digest


class NamedModule(Protocol):
    """A module of the configuration."""

    @property
    def section(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


class ModuleNames:
    """Turns what a client calls a module into its digest. No path is ever made of it."""

    def __init__(self, modules: Iterable[NamedModule]) -> None:
        """A module is known as SECTION/NAME, and as NAME alone where that means one digest only."""
        self._digests: dict[str, str] = {}
        self.replace(modules)

    def replace(self, modules: Iterable[NamedModule]) -> None:
        """Knows these modules from now on, and no others."""
        digests: dict[str, str] = {}
        ambiguous = set()
        for module in modules:
            if not module.digest:
                continue  # it cannot be used
            digests[f"{module.section}/{module.name}"] = module.digest
            if digests.setdefault(module.name, module.digest) != module.digest:
                ambiguous.add(module.name)
        for name in ambiguous:
            del digests[name]
        self._digests = digests

    def digest(self, name_or_digest: str) -> str:
        """Raises UnknownModule."""
        if (digest := self._digests.get(name_or_digest)) is not None:
            return digest
        if not name_or_digest.startswith("sha256:"):
            raise UnknownModule(
                "no configured module has that name; a digest is sha256: and 64 hexadecimal digits"
            )
        return parse_digest(name_or_digest)

    def of(self, digest: str) -> list[str]:
        """Names of a digest, as SECTION/NAME, in the configuration's order."""
        return [name for name, known in self._digests.items() if known == digest and "/" in name]
