"""Fixtures for hostile guests: one sandbox for all of them, as a service would have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from bulkhead.sandbox import Sandbox
from tests.support.sandboxes import Sandboxes


@pytest.fixture(scope="session")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Sandboxes:
    return Sandboxes(tmp_path_factory.mktemp("wasmtime"))


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that no guest is compiled twice."""
    return tmp_path_factory.mktemp("hostile") / "state"


@pytest_asyncio.fixture
async def sandbox(sandboxes: Sandboxes, state_dir: Path) -> AsyncIterator[Sandbox]:
    async with sandboxes.open(state_dir) as sandbox:
        yield sandbox
