"""Fixtures for tests that speak to a running service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import Served, serve


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`bulkhead serve` on its demo configuration. Shared: tests leave it as they find it."""
    with serve(tmp_path_factory.mktemp("demo")) as served:
        yield served
