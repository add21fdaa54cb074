"""Several processes that answer over HTTPS on one port."""

from __future__ import annotations

import http.client
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.served import Served, serve, wait_until

WORKERS = 3
TOKEN_REVIEW = {
    "apiVersion": "authentication.k8s.io/v1",
    "kind": "TokenReview",
    "spec": {"token": "magic-token"},
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, "--workers", str(WORKERS)) as served:
        yield served


def _workers(served: Served) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(served.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if '"role": "https"' in " ".join(child.cmdline()):
                found.append(child)
    return found


def _authenticated(served: Served) -> bool:
    return bool(served.review("/authn", TOKEN_REVIEW)["status"].get("authenticated"))


def test_each_of_them_answers(served: Served) -> None:
    workers = _workers(served)
    assert len(workers) == WORKERS
    for chosen in workers:
        others = [worker for worker in workers if worker != chosen]
        for other in others:
            other.suspend()
        try:
            assert _authenticated(served)
        finally:
            for other in others:
                other.resume()


def test_they_share_one_spawner_and_its_zygotes(served: Served) -> None:
    for _ in range(20):
        assert _authenticated(served)
    zygotes = served.spawner().children()
    assert len(zygotes) == 4, "one for each module of the demo, whoever runs it"


def test_one_that_is_killed_costs_only_what_it_was_answering(served: Served) -> None:
    chance = random.Random(7)
    wrong, lost, right = [], 0, 0
    stop = threading.Event()

    def ask() -> tuple[int, int]:
        good = gone = 0
        while not stop.is_set():
            try:
                if _authenticated(served):
                    good += 1
                else:
                    wrong.append("refused")
            except (OSError, http.client.HTTPException):
                gone += 1
        return good, gone

    with ThreadPoolExecutor(4) as callers:
        asking = [callers.submit(ask) for _ in range(4)]
        for _ in range(6):
            chance.choice(_workers(served)).send_signal(signal.SIGKILL)
            time.sleep(0.3)
        stop.set()
        for each in asking:
            good, gone = each.result(timeout=60)
            right, lost = right + good, lost + gone
    assert not wrong
    assert right > 0
    assert lost <= 6 * 4, "no more than each kill could find being answered"
    wait_until(lambda: len(_workers(served)) == WORKERS, "all are back")
    assert "worker_restarted" in served.log()
    assert _authenticated(served)


def test_all_of_them_end(served: Served) -> None:
    processes = served.tree()
    assert len(processes) > WORKERS
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=30) == 0
    wait_until(lambda: not any(process.is_running() for process in processes), "all are gone")
