"""Errors of gRPC calls: a status with a google.rpc.ErrorInfo, from the table at the edge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from bulkhead.service.edge import Fault, fault_of

_log = structlog.get_logger()
_DOMAIN = "bulkhead"

Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Servicer = TypeVar("_Servicer")


async def abort(context: Context, fault: Fault) -> NoReturn:
    """Ends a call with the fault's status."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(domain=_DOMAIN, reason=fault.reason))
    code = grpc.StatusCode[fault.code.name]
    number = code.value[0]
    status = rpc_status.to_status(status_pb2.Status(code=number, message=fault.message, details=[detail]))
    await context.abort_with_status(status)
    raise AssertionError("abort_with_status returned")


async def _translate(context: Context, error: Exception, method: str) -> NoReturn:
    fault = fault_of(error)
    if fault.unexpected:
        _log.error("call_failed", method=method, exc_info=error)
    await abort(context, fault)


def unary(
    method: Callable[[_Servicer, _Request, Context], Awaitable[_Response]],
) -> Callable[[_Servicer, _Request, Context], Awaitable[_Response]]:
    """Translates what a method with one response raises."""

    @wraps(method)
    async def call(self: _Servicer, request: _Request, context: Context) -> _Response:
        try:
            return await method(self, request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await _translate(context, error, method.__name__)

    return call


def streaming(
    method: Callable[[_Servicer, _Request, Context], AsyncIterator[_Response]],
) -> Callable[[_Servicer, _Request, Context], AsyncIterator[_Response]]:
    """Translates what a method with a stream of responses raises."""

    @wraps(method)
    async def call(self: _Servicer, request: _Request, context: Context) -> AsyncIterator[_Response]:
        try:
            async for response in method(self, request, context):
                yield response
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await _translate(context, error, method.__name__)

    return call
