"""Requests that keep coming while something changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.served import wait_until

_CALLERS = 4


@dataclass(slots=True)
class Load:
    """What became of the requests."""

    answers: list[Any] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    def wait_for_more(self, count: int = 40) -> None:
        """Waits until so many more requests have been answered."""
        before = len(self.answers)
        try:
            wait_until(lambda: len(self.answers) >= before + count, f"{count} more answers", 60)
        except AssertionError as error:
            if not self.failures:
                raise
            raise error from self.failures[-1]


@contextmanager
def load(request: Callable[[], Any]) -> Iterator[Load]:
    """Calls `request` from several threads until the block ends."""
    result, stop = Load(), threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                result.answers.append(request())
            except Exception as error:
                result.failures.append(error)

    with ThreadPoolExecutor(_CALLERS) as pool:
        asking = [pool.submit(keep_asking) for _ in range(_CALLERS)]
        try:
            yield result
        finally:
            stop.set()
    for each in asking:
        each.result()
