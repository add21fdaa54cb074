"""The files that a configuration is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bulkhead.service.config import Config, ConfigError, Problem, check_documents, read_document
from bulkhead.service.document import Document
from bulkhead.service.legacy import read_admission, read_modules


@dataclass(frozen=True, slots=True)
class ConfigFiles:
    """What the command line names: a bulkhead.yaml, and the three files of k8s-wasm."""

    bulkhead: Path | None = None
    authentication: Path | None = None
    authorization: Path | None = None
    admission: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those that are given."""
        every = (self.bulkhead, self.authentication, self.authorization, self.admission)
        return tuple(path for path in every if path is not None)

    def load(self, *, insecure: bool = False) -> Config:
        """Reads and checks them all. Raises ConfigError with the problems of all files.

        A section's modules come from the file of k8s-wasm if that is given, and all the rest from
        bulkhead.yaml or the defaults. `insecure` allows addresses that other machines can reach without TLS.
        """
        documents: list[Document] = []
        problems: list[Problem] = []
        if self.bulkhead is None:
            documents.append(Document.empty())
        for read in self._readers():
            try:
                documents.append(read())
            except ConfigError as error:
                problems += error.problems
        return check_documents(documents, insecure=insecure, known=problems)

    def _readers(self) -> Iterator[Callable[[], Document]]:
        if self.bulkhead is not None:
            yield partial(read_document, self.bulkhead)
        if self.authentication is not None:
            yield partial(read_modules, "authentication", self.authentication)
        if self.authorization is not None:
            yield partial(read_modules, "authorization", self.authorization)
        if self.admission is not None:
            yield partial(read_admission, self.admission)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))
