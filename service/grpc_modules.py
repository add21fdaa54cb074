"""bulkhead.v1.ModuleService: the module store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from bulkhead.sandbox import (
    Abi,
    DeadlinePassed,
    InvalidModule,
    InvalidModuleReason,
    InvalidRequest,
    ModuleInfo,
    Overloaded,
    Sandbox,
    SandboxError,
    format_quantity,
    parse_digest,
)
from bulkhead.service.edge import InUse
from bulkhead.service.grpc_faults import Context, streaming, unary
from bulkhead.service.names import ModuleNames
from bulkhead.v1 import modules_pb2, modules_pb2_grpc

_CHUNK_BYTES = 1 << 20
_PAGE_SIZE, _LARGEST_PAGE = 100, 1000
# A module is in memory while it arrives, and they are compiled one at a time anyway.
_MOST_PUTS = 8
# Else a client that stops in the middle would keep its place for ever.
_PUT_SECONDS = 120.0


class ModuleServicer(modules_pb2_grpc.ModuleServiceServicer):
    """Who may put and delete is checked before (grpc_access.py)."""

    def __init__(self, sandbox: Sandbox, names: ModuleNames) -> None:
        self._sandbox = sandbox
        self._names = names
        self._puts = 0

    @unary
    async def Put(
        self, request: AsyncIterator[modules_pb2.PutRequest], context: Context
    ) -> modules_pb2.PutResponse:
        if self._puts >= _MOST_PUTS:
            raise Overloaded(f"{_MOST_PUTS} modules are being put; try again later")
        self._puts += 1
        try:
            expected, data = await self._receive_in_time(request)
            info, created = await self._sandbox.put(data, expected_digest=expected or None)
        finally:
            self._puts -= 1
        return modules_pb2.PutResponse(module=self._message(info), created=created)

    async def _receive_in_time(self, parts: AsyncIterator[modules_pb2.PutRequest]) -> tuple[str, bytes]:
        try:
            async with asyncio.timeout(_PUT_SECONDS):
                return await self._receive(parts)
        except TimeoutError:
            raise DeadlinePassed(f"the module did not arrive in {_PUT_SECONDS:g} s") from None

    async def _receive(self, parts: AsyncIterator[modules_pb2.PutRequest]) -> tuple[str, bytes]:
        """The expected digest and the bytes. Stops reading where they are too many."""
        expected, chunks, size, first = "", [], 0, True
        most = self._sandbox.options.max_module_bytes
        async for part in parts:
            if part.WhichOneof("part") == "header":
                if not first:
                    raise InvalidRequest("header: only the first message may carry it")
                expected = part.header.expected_digest
            size += len(part.chunk)
            if size > most:
                raise InvalidModule(
                    InvalidModuleReason.TOO_LARGE, f"the module has more than {format_quantity(most)}"
                )
            chunks.append(part.chunk)
            first = False
        return expected, b"".join(chunks)

    @streaming
    async def Get(
        self, request: modules_pb2.GetRequest, context: Context
    ) -> AsyncIterator[modules_pb2.GetResponse]:
        data = await asyncio.to_thread(self._sandbox.store.read, self._names.digest(request.module))
        for at in range(0, len(data), _CHUNK_BYTES):
            yield modules_pb2.GetResponse(chunk=data[at : at + _CHUNK_BYTES])

    @unary
    async def List(self, request: modules_pb2.ListRequest, context: Context) -> modules_pb2.ListResponse:
        size = min(request.page_size or _PAGE_SIZE, _LARGEST_PAGE)
        if size < 0:
            raise InvalidRequest("page_size: expected 0 or more")
        listing = partial(self._sandbox.store.list, start_after=request.page_token or None, limit=size + 1)
        stored = await asyncio.to_thread(listing)
        page = stored[:size]
        modules = [await asyncio.to_thread(self._summary, each.digest, each.size_bytes) for each in page]
        more = len(stored) > size
        return modules_pb2.ListResponse(modules=modules, next_page_token=page[-1].digest if more else "")

    def _summary(self, digest: str, size_bytes: int) -> modules_pb2.Module:
        try:
            abi = _abi(self._sandbox.inspect(digest).abi)
        except (LookupError, SandboxError):  # deleted or damaged meanwhile: Inspect tells
            abi = modules_pb2.ABI_UNSPECIFIED
        return modules_pb2.Module(digest=digest, size_bytes=size_bytes, abi=abi, names=self._names.of(digest))

    @unary
    async def Delete(
        self, request: modules_pb2.DeleteRequest, context: Context
    ) -> modules_pb2.DeleteResponse:
        digest = parse_digest(request.digest)
        if names := self._names.of(digest):
            raise InUse(f"the configuration names the module: {', '.join(names)}")
        await asyncio.to_thread(self._sandbox.delete, digest)
        return modules_pb2.DeleteResponse()

    @unary
    async def Inspect(
        self, request: modules_pb2.InspectRequest, context: Context
    ) -> modules_pb2.InspectResponse:
        info = await asyncio.to_thread(self._sandbox.inspect, self._names.digest(request.module))
        return modules_pb2.InspectResponse(module=self._message(info))

    def _message(self, info: ModuleInfo) -> modules_pb2.Module:
        return modules_pb2.Module(
            digest=info.digest,
            size_bytes=info.size_bytes,
            abi=_abi(info.abi),
            imports=[
                modules_pb2.ModuleImport(
                    module=each.module, name=each.name, kind=each.kind, signature=each.signature
                )
                for each in info.imports
            ],
            exports=[
                modules_pb2.ModuleExport(
                    name=each.name, kind=each.kind, signature=each.signature, runnable=each.runnable
                )
                for each in info.exports
            ],
            kubewarden_metadata_json=info.kubewarden_metadata or b"",
            names=self._names.of(info.digest),
        )


def _abi(abi: Abi) -> modules_pb2.Abi.ValueType:
    return modules_pb2.Abi.Value(f"ABI_{abi.name}")
