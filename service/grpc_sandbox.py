"""bulkhead.v1.SandboxService: one run of one module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from google.protobuf.duration_pb2 import Duration

from bulkhead.sandbox import InvalidRequest, Limits, RunResult, Sandbox
from bulkhead.service.grpc_faults import Context, unary
from bulkhead.service.grpc_reviews import deadline_of
from bulkhead.service.names import ModuleNames
from bulkhead.v1 import sandbox_pb2, sandbox_pb2_grpc

_SIZES = ("memory_bytes", "stdout_bytes", "stderr_bytes", "stack_bytes", "table_elements", "fuel")
_NANOS_PER_SECOND = 10**9
_TIMES = {"wall_time": "wall_seconds", "cpu_time": "cpu_seconds"}


class SandboxServicer(sandbox_pb2_grpc.SandboxServiceServicer):
    """Turns messages into runs and results into messages."""

    def __init__(self, sandbox: Sandbox, names: ModuleNames) -> None:
        self._sandbox = sandbox
        self._names = names

    @unary
    async def Execute(
        self, request: sandbox_pb2.ExecuteRequest, context: Context
    ) -> sandbox_pb2.ExecuteResponse:
        digest = self._names.digest(request.module)
        result = await self._sandbox.run(
            digest,
            request.entry_point or "_start",
            stdin=request.stdin,
            arguments=tuple(request.arguments),
            limits=_limits(request.limits, self._sandbox.options.limits),
            deadline=deadline_of(context),
        )
        return _response(digest, result)


def _limits(asked: sandbox_pb2.Limits, defaults: Limits) -> Limits:
    """The defaults with what was asked for. Raises InvalidRequest."""
    changes: dict[str, Any] = {name: getattr(asked, name) for name in _SIZES if asked.HasField(name)}  # type: ignore[arg-type]
    for name, field in _TIMES.items():
        if asked.HasField(name):  # type: ignore[arg-type]
            changes[field] = _seconds(name, getattr(asked, name))
    return replace(defaults, **changes)


def _seconds(name: str, duration: Duration) -> float:
    """Any value that a message can hold; `Limits` knows which make sense. Raises InvalidRequest."""
    if not -_NANOS_PER_SECOND < duration.nanos < _NANOS_PER_SECOND or duration.seconds * duration.nanos < 0:
        raise InvalidRequest(
            f"limits.{name}: expected nanos below 1000000000 and of the same sign as seconds"
        )
    return duration.seconds + duration.nanos / _NANOS_PER_SECOND


def _response(digest: str, result: RunResult) -> sandbox_pb2.ExecuteResponse:
    usage = result.usage
    return sandbox_pb2.ExecuteResponse(
        outcome=sandbox_pb2.Outcome.Value(f"OUTCOME_{result.outcome.name}"),
        exit_code=result.exit_code,
        stdout=result.stdout,
        stderr=result.stderr,
        stderr_truncated=result.stderr_truncated,
        usage=sandbox_pb2.Usage(
            wall_time=_duration(usage.wall_seconds),
            cpu_time=_duration(usage.cpu_seconds),
            peak_memory_bytes=usage.peak_memory_bytes,
            private_memory_bytes=usage.private_memory_bytes,
        ),
        module_digest=digest,
        message=result.message,
    )


def _duration(seconds: float) -> Duration:
    whole, nanos = divmod(int(seconds * _NANOS_PER_SECOND), _NANOS_PER_SECOND)
    return Duration(seconds=whole, nanos=nanos)
