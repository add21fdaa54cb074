"""Processes killed at random, in the middle of runs: nothing wrong is answered, and nothing is left."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bulkhead.sandbox import Limits, Outcome, RunResult, Sandbox, SandboxError, Way
from tests.support.raw_zygote import GUEST
from tests.support.sandboxes import Leftovers, eventually, runs_of, spawner_process, zygotes_of
from tests.support.served import Served, serve, wait_until

LIMITS = Limits(wall_seconds=20, cpu_seconds=10)
# What a run may come to that was killed from outside, or whose zygote or spawner was.
_KILLED = {Outcome.KILLED, Outcome.START_FAILED}
TOKEN_REVIEW = {
    "apiVersion": "authentication.k8s.io/v1",
    "kind": "TokenReview",
    "spec": {"token": "magic-token"},
}


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


async def _kill_something(sandbox: Sandbox, chance: random.Random) -> str:
    spawner = await spawner_process(sandbox)
    what = chance.choices(["run", "zygote", "spawner"], [6, 3, 1])[0]
    with suppress(psutil.NoSuchProcess):
        choices = [spawner]
        if what != "spawner":
            choices = runs_of(spawner) if what == "run" else zygotes_of(spawner)
        if choices:
            _kill(chance.choice(choices))
            return what
    return "nothing"


async def _ask_until(
    sandbox: Sandbox, digest: str, number: int, stop: asyncio.Event, ends: Counter[str]
) -> None:
    """Runs with inputs of its own, each of which has one right answer."""
    count = 0
    while not stop.is_set():
        count += 1
        stdin = f"{number} {count} ".encode() * (1 + count % 50)
        try:
            result = await sandbox.run(digest, "echo", stdin=stdin, limits=LIMITS)
        except SandboxError:  # the spawner was killed
            ends["spawner gone"] += 1
            continue
        ends[result.outcome] += 1
        if result.ok:
            assert result.stdout == stdin, "an answer to another question, or half of one"
        else:
            assert result.outcome in _KILLED, result


@pytest.mark.parametrize(
    ("kills", "seed"), [(60, 1), pytest.param(600, 2, marks=pytest.mark.slow)], ids=["some", "hundreds"]
)
async def test_killing_runs_zygotes_and_the_spawner(
    sandbox: Sandbox, wat: Callable[[str], bytes], kills: int, seed: int
) -> None:
    digest = (await sandbox.put(wat(GUEST)))[0].digest
    await sandbox.prepare(digest, "echo", limits=LIMITS)
    descriptors = len(os.listdir("/proc/self/fd"))
    chance, stop = random.Random(seed), asyncio.Event()
    ends: Counter[str] = Counter()
    killed: Counter[str] = Counter()
    asking = [asyncio.create_task(_ask_until(sandbox, digest, n, stop, ends)) for n in range(6)]
    for _ in range(kills):
        await asyncio.sleep(chance.random() * 0.03)
        killed[await _kill_something(sandbox, chance)] += 1
    stop.set()
    await asyncio.wait_for(asyncio.gather(*asking), 60)
    assert ends[Outcome.OK] > 0, ends
    assert killed["zygote"] > 0, killed
    assert killed["spawner"] > 0, killed
    assert sum(ends[outcome] for outcome in _KILLED) > 0, (ends, killed)
    result = await sandbox.run(digest, "echo", stdin=b"after all", limits=LIMITS)
    assert (result.outcome, result.stdout) == (Outcome.OK, b"after all")
    spawner = await spawner_process(sandbox)
    await eventually(lambda: not runs_of(spawner), "no run is left")
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "no descriptor is left")


async def test_runs_of_stopped_processes_end_at_their_deadline(
    sandbox: Sandbox, wat: Callable[[str], bytes]
) -> None:
    """SIGSTOP of a run, and of a zygote: other runs of that zygote may fail, and the next one works."""
    digest = (await sandbox.put(wat(GUEST)))[0].digest
    short = Limits(wall_seconds=1, cpu_seconds=1)
    await sandbox.prepare(digest, "sleep", limits=short)
    await sandbox.prepare(digest, "echo", limits=short)
    spawner = await spawner_process(sandbox)
    leftovers = await Leftovers.of(sandbox)
    for stop_zygote in (False, True):
        run = asyncio.create_task(sandbox.run(digest, "sleep", limits=short))
        await eventually(lambda: runs_of(spawner), "the run started")
        (process,) = runs_of(spawner)
        (psutil.Process(process.ppid()) if stop_zygote else process).suspend()
        result = await asyncio.wait_for(run, 30)
        assert result.outcome is Outcome.TIMEOUT
        await leftovers.none()
    result = await sandbox.run(digest, "echo", stdin=b"x", limits=LIMITS)
    assert result.stdout == b"x"


async def test_no_two_of_a_thousand_runs_draw_the_same_random_bytes(
    sandbox: Sandbox, wat: Callable[[str], bytes]
) -> None:
    digest = (await sandbox.put(wat(GUEST)))[0].digest
    await sandbox.prepare(digest, "random", limits=LIMITS)

    async def draw() -> list[RunResult]:
        return [await sandbox.run(digest, "random", limits=LIMITS) for _ in range(125)]

    drawn = [result for part in await asyncio.gather(*(draw() for _ in range(8))) for result in part]
    assert all(result.ok and len(result.stdout) == 16 for result in drawn)
    assert len({result.stdout for result in drawn}) == len(drawn) == 1000
    assert {result.usage.way for result in drawn} == {Way.ZYGOTE}


def _authenticated(served: Served) -> bool | None:
    """None: the connection broke, or the service said that it could not decide."""
    try:
        reply = served.request("/authn", json.dumps(TOKEN_REVIEW).encode())
    except (OSError, http.client.HTTPException):
        return None
    if reply.status != 200:
        return None
    status = reply.json["status"]
    return None if status.get("error") else bool(status.get("authenticated"))


def _victims(served: Served) -> list[psutil.Process]:
    """Workers, the spawner, zygotes and runs; not the service's own process."""
    with suppress(psutil.NoSuchProcess):
        return served.tree()[1:]
    return []


@pytest.mark.parametrize(
    ("kills", "seed"), [(15, 3), pytest.param(150, 4, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_killing_anything_under_a_service(tmp_path: Path, kills: int, seed: int) -> None:
    chance, stop = random.Random(seed), threading.Event()
    answers: Counter[bool | None] = Counter()

    def ask() -> None:
        while not stop.is_set():
            answers[_authenticated(served)] += 1

    with serve(tmp_path, "--workers", "2") as served, ThreadPoolExecutor(3) as callers:
        asking = [callers.submit(ask) for _ in range(3)]
        for _ in range(kills):
            time.sleep(chance.random() * 0.3)
            if victims := _victims(served):
                _kill(chance.choice(victims))
        stop.set()
        for each in asking:
            each.result(timeout=60)
        assert answers[False] == 0, "a token was refused that is good"
        assert answers[True] > 0, answers
        wait_until(lambda: _authenticated(served) is True, "it answers again", 60)
        everything = served.tree()
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        wait_until(lambda: not any(_lives(process) for process in everything), "nothing is left")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
