"""Reviews per second and latency through the front ends of a real `bulkhead serve`."""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.samples import Samples

_START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a front end listens."""

    address: str
    ca_certificate: str


@dataclass(slots=True)
class Service:
    """A running `bulkhead serve`."""

    process: subprocess.Popen[bytes]
    https: Endpoint
    grpc: Endpoint

    @classmethod
    def start(cls, folder: Path) -> Service:
        ready = folder / "ready.json"
        command = [
            sys.executable,
            "-m",
            "bulkhead.service.cli",
            "serve",
            "--state-dir",
            str(folder / "state"),
        ]
        command += [
            "--https-address",
            "127.0.0.1:0",
            "--grpc-address",
            "127.0.0.1:0",
            "--ready-file",
            str(ready),
        ]
        process = subprocess.Popen(
            [*command, "--log-level", "warning"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        give_up_at = time.monotonic() + _START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > give_up_at:
                process.kill()
                raise SystemExit(f"bulkhead serve did not start: {' '.join(command)}")
            time.sleep(0.05)
        told: dict[str, Any] = json.loads(ready.read_text())
        ca = told["caCertificate"]
        return cls(process, Endpoint(told["httpsAddress"], ca), Endpoint(told["grpcAddress"], ca))

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far: of the workers themselves, of the spawners, of the runs."""
        used = {"workers": 0.0, "spawners": 0.0, "runs": 0.0}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                times, name = child.cpu_times(), child.name()
            except psutil.NoSuchProcess:
                continue
            if name.startswith("bulkhead-spawne"):
                used["spawners"] += times.user + times.system
                used["runs"] += times.children_user + times.children_system
            elif not name.startswith("wasmtime"):
                used["workers"] += times.user + times.system
        return used

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


async def _ask_https(endpoint: Endpoint, body: bytes, callers: int, seconds: float) -> Samples:
    """HTTP/1.1 with keep-alive, as kube-apiserver sends it; a connection for each caller."""
    context = ssl.create_default_context(cafile=endpoint.ca_certificate)
    host, _, port = endpoint.address.rpartition(":")
    head = f"POST /validate?timeout=10s HTTP/1.1\r\nHost: {endpoint.address}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    message = head.encode() + body
    samples = Samples("HTTPS")
    end_at = time.perf_counter() + seconds

    async def caller() -> None:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        while (start := time.perf_counter()) < end_at:
            writer.write(message)
            headers = await reader.readuntil(b"\r\n\r\n")
            if not headers.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected answer: {headers[:100]!r}")
            length = int(headers.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            answer = await reader.readexactly(length)
            if b'"allowed":true' not in answer.replace(b" ", b""):
                raise SystemExit(f"unexpected answer: {answer[:200]!r}")
            samples.wall_seconds.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(caller() for _ in range(callers)))
    return samples


async def _ask_grpc(endpoint: Endpoint, body: bytes, callers: int, seconds: float) -> Samples:
    import grpc

    from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc

    samples = Samples("gRPC")
    request = reviews_pb2.AdmitRequest(review=body, stage=reviews_pb2.ADMISSION_STAGE_VALIDATING)
    end_at = time.perf_counter() + seconds
    async with grpc.aio.insecure_channel(endpoint.address) as channel:
        stub = reviews_pb2_grpc.ReviewServiceStub(channel)

        async def caller() -> None:
            while (start := time.perf_counter()) < end_at:
                answer = await stub.Admit(request, timeout=10)
                if b'"allowed":true' not in answer.review.replace(b" ", b""):
                    raise SystemExit(f"unexpected answer: {answer.review[:200]!r}")
                samples.wall_seconds.append(time.perf_counter() - start)

        await asyncio.gather(*(caller() for _ in range(callers)))
    return samples


def _client(kind: str, endpoint: Endpoint, body: bytes, callers: int, seconds: float) -> Samples:
    ask = _ask_https if kind == "HTTPS" else _ask_grpc
    start = time.perf_counter()
    samples = asyncio.run(ask(endpoint, body, callers, seconds))
    samples.elapsed_seconds = time.perf_counter() - start
    return samples


@dataclass(frozen=True, slots=True)
class Load:
    """One measurement: so many callers through one front end."""

    kind: str
    review: str
    callers: int
    samples: Samples
    cpu_ms: dict[str, float]
    """For each review: of the workers, the spawners, the runs."""


def _load(
    service: Service, client: tuple[str, Endpoint, bytes, int], seconds: float
) -> tuple[Samples, dict[str, float]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_client, (*client, 0.3))  # warm up
        before = service.cpu_seconds()
        samples = pool.apply(_client, (*client, seconds))
        after = service.cpu_seconds()
    return samples, {who: (after[who] - before[who]) / len(samples.wall_seconds) * 1e3 for who in after}


def run(bodies: dict[str, bytes], *, callers: tuple[int, ...], seconds: float) -> list[Load]:
    """Asks validating reviews of both front ends, from a process of its own."""
    loads = []
    with tempfile.TemporaryDirectory() as name:
        service = Service.start(Path(name))
        try:
            for (review, body), count, (kind, endpoint) in itertools.product(
                bodies.items(), callers, (("HTTPS", service.https), ("gRPC", service.grpc))
            ):
                samples, cpu_ms = _load(service, (kind, endpoint, body, count), seconds)
                loads.append(Load(kind, review, count, samples, cpu_ms))
        finally:
            service.stop()
    return loads
