"""One cluster for all tests that do not stop something: its start takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import etcd
from tests.e2e.environment import Environment, Webhooks, environment
from tests.e2e.programs import NotBuilt, programs
from tests.support.served import Served

Wat = Callable[[str], bytes]


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder with etcd, kube-apiserver and replycheck. Without Go there are none."""
    try:
        return programs()
    except NotBuilt as error:
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
