"""The gRPC front end: three services of our own, health and reflection."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bulkhead.sandbox import Sandbox, SandboxError
from bulkhead.service.config import Address
from bulkhead.service.grpc_modules import ModuleServicer
from bulkhead.service.grpc_reviews import ReviewServicer
from bulkhead.service.grpc_sandbox import SandboxServicer
from bulkhead.service.listener import listen
from bulkhead.service.names import ModuleNames
from bulkhead.service.review import Reviewer
from bulkhead.v1 import (
    modules_pb2,
    modules_pb2_grpc,
    reviews_pb2,
    reviews_pb2_grpc,
    sandbox_pb2,
    sandbox_pb2_grpc,
)

_SERVICES = (
    reviews_pb2.DESCRIPTOR.services_by_name["ReviewService"].full_name,
    sandbox_pb2.DESCRIPTOR.services_by_name["SandboxService"].full_name,
    modules_pb2.DESCRIPTOR.services_by_name["ModuleService"].full_name,
)
# A message around the body: names, limits, framing.
_ENVELOPE_BYTES = 64 << 10
_LEAST_MESSAGE_BYTES = 4 << 20
# Calls beyond those that a full queue of runs holds. What does not fit the queue is refused by the
# sandbox, with its reason, and is gone at once; these are for health checks and the module store.
_OTHER_CALLS = 64


class GrpcServer:
    """Serves on one address. Owned by one event loop."""

    def __init__(
        self,
        reviewer: Reviewer,
        sandbox: Sandbox,
        names: ModuleNames,
        *,
        max_body_bytes: int,
        max_in_flight: int,
    ) -> None:
        most = max(max_body_bytes, _LEAST_MESSAGE_BYTES) + _ENVELOPE_BYTES
        most_calls = max_in_flight + _OTHER_CALLS
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=most_calls,
            options=[
                # Otherwise a port that another process has is shared with it, silently.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", most_calls),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        reviews_pb2_grpc.add_ReviewServiceServicer_to_server(ReviewServicer(reviewer), self._server)
        sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(SandboxServicer(sandbox, names), self._server)
        modules_pb2_grpc.add_ModuleServiceServicer_to_server(ModuleServicer(sandbox, names), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        served = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(served, self._server)

    async def start(self, host: str, port: int) -> int:
        """Begins to accept; returns the port. Raises SandboxError if it cannot listen."""
        address = Address(host, port)
        # gRPC tells its log, not us, why it cannot listen: ask the kernel first.
        listen(address, "--grpc-address").close()
        try:
            bound = self._server.add_insecure_port(str(address))
        except RuntimeError:
            raise SandboxError(
                f"cannot listen on {address}: see the log; choose another with --grpc-address"
            ) from None
        await self._server.start()
        for name in ("", *_SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self, grace_seconds: float) -> None:
        """Accepts nothing more, lets calls in flight finish, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)
