"""Who may call which gRPC method, checked before the method is."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import structlog
from grpc_health.v1 import health

from bulkhead.service.edge import fault_of
from bulkhead.service.grpc_faults import Context, abort
from bulkhead.service.identity import Access, NotAllowed, Unauthenticated, identity_of_call
from bulkhead.v1 import modules_pb2

_MODULES = modules_pb2.DESCRIPTOR.services_by_name["ModuleService"].full_name
_ADMIN_METHODS = frozenset({f"/{_MODULES}/Put", f"/{_MODULES}/Delete"})
_HEALTH = f"/{health.SERVICE_NAME}/"
_SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")

_log = structlog.get_logger()

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Method = Callable[[Any, Context], Any]


class AccessCheck(grpc.aio.ServerInterceptor):
    """Asks `access` about each call. Health is open to every client that TLS has let in."""

    def __init__(self, access: Access) -> None:
        self.access = access
        """Those who may begin calls from now on."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or not self.access.restricts:
            return handler
        shape = _SHAPES[2 * handler.request_streaming + handler.response_streaming]
        method = self._guarded(handler_call_details.method, getattr(handler, shape))
        make: Callable[..., _Handler] = getattr(grpc, f"{shape}_rpc_method_handler")
        return make(method, handler.request_deserializer, handler.response_serializer)

    def _guarded(self, path: str, method: _Method) -> _Method:
        async def call(request: Any, context: Context) -> Any:
            await self._require(path, context)
            return await method(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._require(path, context)
            async for response in method(request, context):
                yield response

        return stream if inspect.isasyncgenfunction(method) else call

    async def _require(self, path: str, context: Context) -> None:
        identity = identity_of_call(context.auth_context())
        try:
            if path in _ADMIN_METHODS:
                self.access.require_admin(identity)
            elif path.startswith(_HEALTH):
                self.access.require_client(identity)
            else:
                self.access.require_caller(identity)
        except (Unauthenticated, NotAllowed) as error:
            names = sorted(identity.names) if identity else []
            _log.warning("client_refused", method=path, reason=str(error), names=names)
            await abort(context, fault_of(error))
