"""The gRPC front end: three services of our own, health and reflection."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bulkhead.sandbox import Sandbox, SandboxError
from bulkhead.service.config import Address
from bulkhead.service.grpc_access import AccessCheck
from bulkhead.service.grpc_credentials import Credentials
from bulkhead.service.grpc_modules import ModuleServicer
from bulkhead.service.grpc_reviews import ReviewServicer
from bulkhead.service.grpc_sandbox import SandboxServicer
from bulkhead.service.identity import Access
from bulkhead.service.listener import listen
from bulkhead.service.names import ModuleNames
from bulkhead.service.review import Reviewer
from bulkhead.service.tls import TlsMaterial
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
# For a client to come back with a certificate that is good by now, after its old one has expired.
_OLDEST_CONNECTION_MS = 3_600_000
# What an address is left in, by a server that has stopped to listen there.
_RELEASE_SECONDS, _RELEASE_STEP_SECONDS = 5.0, 0.005
# For calls in flight on connections that may make no more.
_DRAIN_SECONDS = 60.0


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
        self._most_bytes = max(max_body_bytes, _LEAST_MESSAGE_BYTES) + _ENVELOPE_BYTES
        self._most_calls = max_in_flight + _OTHER_CALLS
        self._reviews = ReviewServicer(reviewer)
        self._sandbox = SandboxServicer(sandbox, names)
        self._modules = ModuleServicer(sandbox, names)
        self._health = health.aio.HealthServicer()
        self._access = AccessCheck(Access(None))
        self._address = Address("", 0)
        self._credentials: Credentials | None = None
        self._server = self._build()
        # Servers that listen no more, with calls in flight.
        self._draining: dict[grpc.aio.Server, asyncio.Task[None]] = {}

    def _build(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[self._access],
            maximum_concurrent_rpcs=self._most_calls,
            options=[
                # Otherwise a port that another process has is shared with it, silently.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._most_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", self._most_calls),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.max_connection_age_ms", _OLDEST_CONNECTION_MS),
            ],
        )
        reviews_pb2_grpc.add_ReviewServiceServicer_to_server(self._reviews, server)
        sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(self._sandbox, server)
        modules_pb2_grpc.add_ModuleServiceServicer_to_server(self._modules, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        served = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(served, server)
        return server

    async def start(self, host: str, port: int, tls: TlsMaterial | None = None) -> int:
        """Begins to accept, in plaintext if `tls` is None; returns the port.

        Raises SandboxError if it cannot listen.
        """
        self._address = Address(host, port)
        # gRPC tells its log, not us, why it cannot listen: ask the kernel first.
        listen(self._address, "--grpc-address").close()
        self._set_access(tls)
        await self._listen(tls)
        for name in ("", *_SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self._address.port

    async def set_tls(self, tls: TlsMaterial | None) -> None:
        """Sets the certificates and names that count from now on.

        Open connections go on, and new names count for them, too. If their clients would have to be
        verified anew, or not at all, or TLS begins or ends, they get GOAWAY, may finish the calls in
        flight, and for some milliseconds nobody listens. Raises SandboxError if the address is lost.
        """
        if tls is None:
            unchanged = self._credentials is None
        else:
            unchanged = self._credentials is not None and self._credentials.accept(tls)
        if unchanged:
            self._set_access(tls)
            return
        self._drain(self._server)
        await self._wait_until_free()
        self._set_access(tls)
        self._server = self._build()
        await self._listen(tls)

    async def stop(self, grace_seconds: float) -> None:
        """Accepts nothing more, lets calls in flight finish, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(each.stop(grace_seconds) for each in (self._server, *self._draining)))

    def _set_access(self, tls: TlsMaterial | None) -> None:
        self._access.access = Access(tls, local=self._address.is_loopback)

    async def _listen(self, tls: TlsMaterial | None) -> None:
        self._credentials = None if tls is None else Credentials(tls)
        address = str(self._address)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials.credentials)
        except RuntimeError:
            raise SandboxError(
                f"cannot listen on {address}: see the log; choose another with --grpc-address"
            ) from None
        await self._server.start()
        self._address = Address(self._address.host, port)

    def _drain(self, server: grpc.aio.Server) -> None:
        task = asyncio.create_task(server.stop(_DRAIN_SECONDS))
        self._draining[server] = task
        task.add_done_callback(lambda _: self._draining.pop(server))

    async def _wait_until_free(self) -> None:
        """gRPC does not tell when it has stopped to listen."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _RELEASE_SECONDS
        while True:
            await asyncio.sleep(_RELEASE_STEP_SECONDS)
            try:
                listen(self._address, "--grpc-address").close()
                return
            except SandboxError:
                if loop.time() > deadline:
                    raise
