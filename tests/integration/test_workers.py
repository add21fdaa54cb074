"""Several processes that answer over HTTPS on one port."""

from __future__ import annotations

import http.client
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.guests import SLEEPING_VALIDATE
from tests.support.served import Served, recorded, serve, wait_until

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


class Caller:
    """A client that keeps its connection, as kube-apiserver does, and asks as often as it can."""

    def __init__(self, served: Served, stop: threading.Event) -> None:
        self.answers = 0
        self.wrong: list[object] = []
        self.lost = 0
        self._served = served
        self._stop = stop

    def run(self) -> None:
        connection = self._served.connect()
        body = json.dumps(TOKEN_REVIEW)
        while not self._stop.is_set():
            try:
                connection.request("POST", "/authn", body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                answer = json.loads(reply.read())
            except (OSError, http.client.HTTPException):
                self.lost += 1
                connection.close()
                continue
            if reply.status == 200 and answer["status"].get("authenticated"):
                self.answers += 1
            else:
                self.wrong.append(answer)
        connection.close()


@contextmanager
def calling(served: Served, count: int) -> Iterator[list[Caller]]:
    """So many call in the meantime; afterwards they have stopped."""
    stop = threading.Event()
    callers = [Caller(served, stop) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(caller.run) for caller in callers]
        try:
            yield callers
        finally:
            stop.set()
    for each in running:
        each.result()


def _held(served: Served) -> list[int]:
    """How many connections each worker holds."""
    return [
        sum(connection.status == psutil.CONN_ESTABLISHED for connection in worker.net_connections("tcp"))
        for worker in _workers(served)
    ]


def test_connections_are_spread_over_them(served: Served) -> None:
    connections = []
    try:
        for _ in range(3 * WORKERS):
            connection = served.connect()
            connection.connect()
            connections.append(connection)
        wait_until(lambda: sum(_held(served)) == 3 * WORKERS, "all to be accepted")
        # Nearly: while one is busy another may take what was meant for it.
        assert min(_held(served)) >= 2
    finally:
        for connection in connections:
            connection.close()


def test_one_that_comes_back_gets_connections_though_nobody_opens_any(served: Served) -> None:
    with calling(served, 2 * WORKERS) as callers:
        wait_until(lambda: sum(_held(served)) == 2 * WORKERS, "all to be connected")
        _workers(served)[0].kill()
        wait_until(lambda: "worker_restarted" in served.log(), "another worker")
        lost = sum(caller.lost for caller in callers)
        wait_until(lambda: min(_held(served), default=0) >= 1 and len(_held(served)) == WORKERS, "a share")
    assert sum(caller.lost for caller in callers) == lost, "what moves is not lost"
    assert all(caller.answers for caller in callers)


def test_no_request_fails_while_all_of_them_reload(served: Served, tmp_path: Path) -> None:
    with calling(served, 2 * WORKERS) as callers:
        for number in range(2, 6):
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda n=number: _generation(tmp_path) == n, f"generation {number}")
    assert [(caller.wrong, caller.lost) for caller in callers] == [([], 0)] * len(callers)
    assert all(caller.answers for caller in callers)


def _generation(folder: Path) -> int:
    return int(json.loads((folder / "ready.json").read_bytes())["generation"])


@pytest.mark.slow
def test_twenty_deaths_cost_only_what_each_was_answering(served: Served) -> None:
    chance = random.Random(11)
    with calling(served, 2 * WORKERS) as callers:
        for number in range(20):
            alive = _workers(served)
            while len(alive) < 2:  # with none of them everybody waits, which is another test's
                time.sleep(0.01)
                alive = _workers(served)
            chance.choice(alive).kill()
            wait_until(lambda n=number: served.log().count("worker_died") == n + 1, "the death")
    assert [caller.wrong for caller in callers] == [[]] * len(callers)
    assert sum(caller.lost for caller in callers) <= 20 * len(callers)
    with calling(served, 2 * WORKERS) as callers:
        wait_until(lambda: len(held := _held(served)) == WORKERS and min(held) >= 1, "each to take part", 60)
    assert [caller.lost for caller in callers] == [0] * len(callers)


def test_the_log_says_which_of_them(served: Served) -> None:
    _workers(served)[1].kill()
    wait_until(lambda: "worker_restarted" in served.log(), "another worker")
    assert '"worker": "https-2"' in next(line for line in served.log().splitlines() if "worker_died" in line)


def test_together_they_run_as_many_as_one_would(tmp_path: Path, wat: Callable[[str], bytes]) -> None:
    (tmp_path / "sleep.wasm").write_bytes(wat(SLEEPING_VALIDATE))
    (tmp_path / "bulkhead.yaml").write_text(
        f"""
server: {{workers: {WORKERS}}}
limits: {{timeout: 3s, maxConcurrentRuns: {WORKERS + 1}, maxQueuedRuns: 0}}
admission:
  modules:
    - module: sleep.wasm
      rules: [{{operations: ["*"], apiGroups: ["*"], apiVersions: ["*"], resources: ["*"]}}]
"""
    )
    body = json.dumps(recorded("admission-validate-create-pods")["body"]).encode()
    with serve(tmp_path, "--config", str(tmp_path / "bulkhead.yaml")) as served:
        count = 4 * WORKERS
        with ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(served.request, "/validate", body) for _ in range(count)]
            wait_until(lambda: served.runs() == WORKERS + 1, "the runs")
            statuses = [each.result().status for each in asked]
    assert sorted(statuses) == [200] * (WORKERS + 1) + [503] * (count - WORKERS - 1)


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
