"""The load generator for where there is no Go, and for gRPC: the options and output of go/load."""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

_WARM_UP_SECONDS = 0.3

Ask = Callable[[], Awaitable[bytes]]
Connect = Callable[[], AbstractAsyncContextManager[Ask]]


def _https(address: str, ca: str, body: bytes) -> Connect:
    """HTTP/1.1 with keep-alive over TLS: a connection for each caller, as kube-apiserver has them."""
    context = ssl.create_default_context(cafile=ca)
    host, _, port = address.rpartition(":")
    head = f"POST /validate?timeout=10s HTTP/1.1\r\nHost: {address}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    message = head.encode() + body

    @asynccontextmanager
    async def connect() -> AsyncIterator[Ask]:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)

        async def ask() -> bytes:
            writer.write(message)
            headers = await reader.readuntil(b"\r\n\r\n")
            if not headers.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected answer: {headers[:100]!r}")
            length = int(headers.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            return await reader.readexactly(length)

        yield ask
        writer.close()

    return connect


def _grpc(address: str, ca: str, body: bytes) -> Connect:
    """Plain gRPC: one connection for all callers, as programs have it."""
    import grpc

    from bulkhead.v1 import reviews_pb2, reviews_pb2_grpc

    request = reviews_pb2.AdmitRequest(review=body, stage=reviews_pb2.ADMISSION_STAGE_VALIDATING)

    @asynccontextmanager
    async def connect() -> AsyncIterator[Ask]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = reviews_pb2_grpc.ReviewServiceStub(channel)

            async def ask() -> bytes:
                answer: bytes = (await stub.Admit(request, timeout=10)).review
                return answer

            yield ask

    return connect


async def _caller(connect: Connect, begin: float, end: float, latencies: list[int]) -> int:
    """Asks until the end; returns how many answers came before the beginning."""
    warm_ups = 0
    async with connect() as ask:
        while (start := time.perf_counter()) < end:
            answer = await ask()
            if start >= begin:
                latencies.append(int((time.perf_counter() - start) * 1e9))
            else:
                warm_ups += 1
            if b'"allowed":true' not in answer.replace(b" ", b""):
                raise SystemExit(f"unexpected answer: {answer[:300]!r}")
    return warm_ups


async def _measure(connect: Connect, callers: int, seconds: float) -> dict[str, object]:
    begin = time.perf_counter() + _WARM_UP_SECONDS
    latencies: list[int] = []
    async with asyncio.TaskGroup() as group:
        asking = [
            group.create_task(_caller(connect, begin, begin + seconds, latencies)) for _ in range(callers)
        ]
        await asyncio.sleep(_WARM_UP_SECONDS)
        cpu = time.process_time_ns()
    return {
        "elapsedNanoseconds": int((time.perf_counter() - begin) * 1e9),
        "cpuNanoseconds": time.process_time_ns() - cpu,
        "warmUpAnswers": sum(each.result() for each in asking),
        "latencies": latencies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-protocol", choices=("https", "grpc"), default="https")
    parser.add_argument("-address", required=True)
    parser.add_argument("-ca", required=True)
    parser.add_argument("-body", type=Path, required=True)
    parser.add_argument("-callers", type=int, default=1)
    parser.add_argument("-duration", default="5s", help="seconds, with their unit")
    arguments = parser.parse_args()
    make = _https if arguments.protocol == "https" else _grpc
    connect = make(arguments.address, arguments.ca, arguments.body.read_bytes())
    seconds = float(arguments.duration.removesuffix("s"))
    json.dump(asyncio.run(_measure(connect, arguments.callers, seconds)), sys.stdout)


if __name__ == "__main__":
    main()
