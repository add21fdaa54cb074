"""The supervisor's care for one worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bulkhead.sandbox import SpawnerHost
from bulkhead.service import worker_process
from bulkhead.service.config import Config
from bulkhead.service.generation import Generation
from bulkhead.service.worker import WorkerSettings
from bulkhead.service.worker_process import WorkerFailed, WorkerProcess


async def test_a_worker_that_is_slow_to_start_is_given_another_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_ANSWER_SECONDS", 0.001)
    settings = WorkerSettings(
        role="grpc",
        name="grpc",
        share=1,
        state_dir=str(tmp_path),
        wasmtime=None,
        log_level="info",
        log_format="json",
        supervisor_pid=os.getpid(),
        control_fd=-1,
        host="127.0.0.1",
        port=0,
    )
    spawner = SpawnerHost()
    worker = WorkerProcess(settings, spawner)
    with pytest.raises(WorkerFailed, match="did not answer"):
        await worker.start(Generation(number=1, config=Config(), pins={}, https_tls=None, grpc_tls=None))
    await spawner.close()
    assert worker.ended.is_set(), "the slow process is reaped"
    assert not worker.stopping, "nobody asked it to stop: the supervisor may start another"
