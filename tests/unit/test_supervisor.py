"""The supervisor's care for one worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bulkhead.service import supervisor
from bulkhead.service.supervisor import WorkerFailed, _Worker
from bulkhead.service.worker import WorkerSettings


async def test_a_worker_that_is_slow_to_start_is_given_another_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_READY_SECONDS", 0.001)
    lifeline_read, lifeline_write = os.pipe()
    settings = WorkerSettings(
        role="grpc",
        config=str(tmp_path / "bulkhead.yaml"),
        state_dir=str(tmp_path),
        wasmtime=None,
        log_level="info",
        log_format="json",
        supervisor_pid=os.getpid(),
        lifeline_fd=lifeline_read,
        ready_fd=-1,
        host="127.0.0.1",
        port=0,
    )
    worker = _Worker(settings)
    try:
        with pytest.raises(WorkerFailed, match="not ready"):
            await worker.start()
        assert worker.ended.is_set(), "the slow process is reaped"
        assert not worker.stopping, "nobody asked it to stop: keep_alive goes on"
    finally:
        os.close(lifeline_read)
        os.close(lifeline_write)
