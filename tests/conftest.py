"""Fixtures that any test may use."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.support import wat as wat_support


@pytest.fixture(scope="session")
def wat() -> Callable[[str], bytes]:
    """Assembles WebAssembly text: `wat("(module)")` returns the binary module."""
    return wat_support.wat


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked `slow`, too")
    parser.addoption("--e2e", action="store_true", help="run the tests marked `e2e`, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves slow and e2e tests out, unless asked. Left out is not skipped: nothing may be skipped in CI."""
    out = [marker for marker in ("slow", "e2e") if not config.getoption(f"--{marker}")]
    left_out = [item for item in items if any(map(item.get_closest_marker, out))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing may be skipped: what the test guards would go unguarded without a word."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
