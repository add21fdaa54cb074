"""One cluster for all tests that do not stop something: its start takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, etcd
from tests.e2e.environment import Environment, Webhooks, environment
from tests.e2e.programs import CannotBuild, programs
from tests.support.served import Served

Wat = Callable[[str], bytes]
_SHOWN_LINES, _SHOWN_CHARACTERS = 40, 500


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the ends of the servers' logs with a failure. Whole, they lie in pytest's temporary folder."""
    report = yield
    if report.failed:
        for path in sorted(_logs(getattr(item, "funcargs", {}))):
            lines = path.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            shown = "\n".join(line[:_SHOWN_CHARACTERS] for line in lines)
            report.sections.append((f"end of {path}", shown))
    return report


def _logs(fixtures: dict[str, object]) -> set[Path]:
    found = set()
    for fixture in fixtures.values():
        if isinstance(fixture, Environment):
            found |= {fixture.cluster.log_path, fixture.served.log_path}
        elif isinstance(fixture, Cluster | Served):
            found.add(fixture.log_path)
    return found


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder with etcd, kube-apiserver and replycheck. Without Go there are none."""
    try:
        return programs()
    except CannotBuild as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def etcd_url(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with etcd(built, tmp_path_factory.mktemp("etcd")) as url:
        yield url


@pytest.fixture(scope="session")
def webhooks(tmp_path_factory: pytest.TempPathFactory, wat: Wat) -> Webhooks:
    return Webhooks.prepare(tmp_path_factory.mktemp("webhooks") / "bulkhead", wat)


@pytest.fixture(scope="session")
def served(webhooks: Webhooks) -> Iterator[Served]:
    """The Bulkhead that `webhooks` describes. Tests leave it running."""
    with webhooks.serve() as served:
        yield served


@pytest.fixture(scope="session")
def env(
    built: Path, etcd_url: str, webhooks: Webhooks, served: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    """A cluster with a structured AuthorizationConfiguration that asks it."""
    folder = tmp_path_factory.mktemp("structured")
    with environment(built, folder, etcd_url, webhooks, served) as env:
        yield env
