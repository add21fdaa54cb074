"""The HTTPS shim: what kube-apiserver talks to. It checks the envelope, and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
import structlog
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from bulkhead.sandbox import parse_duration
from bulkhead.service.acceptor import MOST_CONNECTIONS, Acceptor
from bulkhead.service.balance import Share
from bulkhead.service.clients import Clients
from bulkhead.service.edge import fault_of
from bulkhead.service.identity import NotAllowed, Unauthenticated
from bulkhead.service.review import Stage
from bulkhead.service.tls import TlsMaterial

_log = structlog.get_logger()

# kube-apiserver keeps its connections; this is also the time to send the headers of a request.
_KEEPALIVE_SECONDS = 75.0
_BODY_SECONDS = 10.0
# After an answer to a request whose body was not read: time for the client to see the answer.
_LINGER_SECONDS = 1.0
_HEADER_BYTES = 16 << 10
# Bodies in memory, being read or answered, counted in largest ones, in all workers together. Honest ones are
# a thousandth of that.
_LARGEST_BODIES = 32
_JSON = "application/json"
_STAGES = {"validate": Stage.VALIDATING, "mutate": Stage.MUTATING}
_PATHS = ("/authn", "/authz", "/validate", "/validate/NAME", "/mutate", "/mutate/NAME")

Answer = Callable[[bytes, float | None], Awaitable[bytes]]


class Reviews(Protocol):
    """What answers: the review layer, here or behind a gRPC connection."""

    async def authenticate(self, body: bytes, *, deadline: float | None) -> bytes: ...
    async def authorize(self, body: bytes, *, deadline: float | None) -> bytes: ...
    async def admit(
        self, body: bytes, *, stage: Stage, module: str | None, deadline: float | None
    ) -> bytes: ...


class _Refused(Exception):
    """A request that no review is made of."""

    def __init__(self, status: HTTPStatus, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class _Held:
    """The bytes of one request's body, as long as they are in memory."""

    def __init__(self, server: HttpsServer) -> None:
        self._server = server
        self._size = 0

    def add(self, size: int) -> None:
        """Raises _Refused where all bodies together would take too much memory."""
        if self._server.held_bytes + size > self._server.most_held_bytes:
            raise _overloaded()
        self._size += size
        self._server.held_bytes += size

    def release(self) -> None:
        self._server.held_bytes -= self._size


def _overloaded() -> _Refused:
    return _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once; try again later")


class _Connections(web.Server):
    """aiohttp's server, which knows how many connections are open, and tells when one ends."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], **options: Any):
        super().__init__(handler, **options)
        self.open: set[web.RequestHandler] = set()
        self.on_end: Callable[[], None] = lambda: None

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.open.add(handler)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self.open.discard(handler)
        self.on_end()


class HttpsServer:
    """Serves reviews on one listening socket. Owned by one event loop."""

    def __init__(
        self,
        reviews: Reviews,
        *,
        max_body_bytes: int,
        max_in_flight: int,
        workers: int = 1,
        share: Share | None = None,
    ) -> None:
        """`workers` serve the same socket; each holds its part of all connections and bodies."""
        self._reviews = reviews
        self._max_body_bytes = max_body_bytes
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self.held_bytes = 0
        self.most_held_bytes = max(1, _LARGEST_BODIES // workers) * max_body_bytes
        self._most_connections = MOST_CONNECTIONS // workers
        self._share = share
        self._acceptor: Acceptor | None = None
        self._protocol: _Connections | None = None
        self._clients = Clients(None)
        # Connections with a request that is being read or answered.
        self._busy: set[web.RequestHandler] = set()
        # There from when it stops.
        self._last_answer: asyncio.Event | None = None

    def start(self, listener: socket.socket, tls: TlsMaterial | None) -> None:
        """Begins to accept; in plaintext if `tls` is None. Raises TlsError."""
        self._clients.set_tls(tls)
        self._protocol = protocol = _Connections(
            self._handle,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            lingering_time=_LINGER_SECONDS,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
            auto_decompress=False,
            handler_cancellation=True,  # a client that goes away ends its runs
        )
        self._acceptor = Acceptor(
            listener,
            self._clients.context,
            protocol,
            lambda: len(protocol.open),
            most_connections=self._most_connections,
            share=self._share,
        )
        protocol.on_end = self._acceptor.tell_count
        self._acceptor.start()

    async def set_tls(self, tls: TlsMaterial | None) -> None:
        """Sets the certificates and names that count from now on. Raises TlsError, and changes nothing.

        Open connections go on, and new names count for them, too. Those whose clients would have to be
        verified anew are closed: idle ones at once, others after their response.
        """
        self._clients.set_tls(tls)
        if self._acceptor is None or self._protocol is None:
            return
        self._acceptor.set_context(self._clients.context)
        self._close_idle(self._protocol)

    def _close_idle(self, protocol: web.Server) -> None:
        """Closes those that no request may come by any more."""
        for connection in protocol.connections:
            transport = connection.transport
            if connection not in self._busy and transport is not None and self._must_end(transport):
                connection.force_close()  # its close() would leave an idle one open

    def _must_end(self, transport: asyncio.BaseTransport) -> bool:
        return self._last_answer is not None or self._clients.is_stale(transport)

    async def stop(self, grace_seconds: float) -> None:
        """Accepts nothing more, lets requests in flight finish, then closes all connections."""
        if self._acceptor is None or self._protocol is None:
            return
        deadline = time.monotonic() + grace_seconds
        self._last_answer = asyncio.Event()
        await self._acceptor.stop()
        self._close_idle(self._protocol)
        if self._busy:
            # Not web.Server's own way: from the first moment on it reads no bytes of bodies any more.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._last_answer.wait(), grace_seconds)
        await self._protocol.shutdown(max(deadline - time.monotonic(), 0.0))

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        start = time.monotonic()
        self._busy.add(request.protocol)
        try:
            response = await self._respond(request, start)
            if self._is_last(response, request.transport):
                response.force_close()
        except asyncio.CancelledError:
            _log.info(
                "request_cancelled", path=request.path[:100], seconds=round(time.monotonic() - start, 6)
            )
            raise
        finally:
            self._busy.discard(request.protocol)
            if self._last_answer is not None and not self._busy:
                self._last_answer.set()
        _log.debug(
            "request",
            path=request.path[:100],
            status=response.status,
            seconds=round(time.monotonic() - start, 6),
        )
        return response

    def _is_last(self, response: web.StreamResponse, transport: asyncio.BaseTransport | None) -> bool:
        """Whether the connection ends with this response."""
        if response.status == HTTPStatus.UNAUTHORIZED:
            return True  # another certificate of the client's needs another connection
        if transport is not None and self._must_end(transport):
            return True
        return self._acceptor is not None and self._acceptor.must_shed()

    async def _respond(self, request: web.BaseRequest, start: float) -> web.Response:
        try:
            if request.path in ("/healthz", "/readyz"):
                return _health(request)
            self._require_client(request)
            answer, deadline = self._check_head(request, start)
            return await self._answer(request, answer, deadline)
        except _Refused as refusal:
            return _status(request, refusal.status, "", str(refusal), refusal.headers)
        except (HttpProcessingError, ConnectionError) as error:
            return _status(
                request, HTTPStatus.BAD_REQUEST, "", f"the request could not be read: {type(error).__name__}"
            )
        except Exception as error:
            fault = fault_of(error)
            if fault.unexpected:
                _log.exception("request_failed", path=request.path)
            return _status(request, fault.http_status, fault.reason, fault.message)

    async def _answer(self, request: web.BaseRequest, answer: Answer, deadline: float | None) -> web.Response:
        self._require_room()
        held = _Held(self)
        try:
            body = await self._read_body(request, held)
            # Only now does it count: who sends slowly must not take the place of who asks.
            self._require_room()
            self._in_flight += 1
            try:
                return web.Response(body=await answer(body, deadline), content_type=_JSON)
            finally:
                self._in_flight -= 1
        finally:
            held.release()

    def _require_room(self) -> None:
        if self._in_flight >= self._max_in_flight:
            raise _overloaded()

    def _require_client(self, request: web.BaseRequest) -> None:
        if request.transport is None:
            raise ConnectionResetError
        try:
            self._clients.require(request.transport)
        except Unauthenticated as error:
            raise _Refused(HTTPStatus.UNAUTHORIZED, str(error)) from None
        except NotAllowed as error:
            raise _Refused(HTTPStatus.FORBIDDEN, str(error)) from None

    def _check_head(self, request: web.BaseRequest, start: float) -> tuple[Answer, float | None]:
        """All that can be refused before the body is read."""
        answer = self._answer_for(request.path)
        if answer is None:
            raise _Refused(HTTPStatus.NOT_FOUND, f"no such path; expected one of {', '.join(_PATHS)}")
        if request.method != hdrs.METH_POST:
            raise _Refused(
                HTTPStatus.METHOD_NOT_ALLOWED, "expected method POST", {hdrs.ALLOW: hdrs.METH_POST}
            )
        if request.content_type != _JSON or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"expected Content-Type: {_JSON}, in UTF-8")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected no Content-Encoding")
        if (request.content_length or 0) > self._max_body_bytes:
            raise self._too_large()
        return answer, _deadline(request, start)

    def _answer_for(self, path: str) -> Answer | None:
        """What answers at a path: /validate asks all modules whose rules match, /validate/NAME one."""
        reviews = self._reviews
        if path == "/authn":
            return lambda body, deadline: reviews.authenticate(body, deadline=deadline)
        if path == "/authz":
            return lambda body, deadline: reviews.authorize(body, deadline=deadline)
        base, _, module = path[1:].partition("/")
        if (stage := _STAGES.get(base)) is None or path.endswith("/"):
            return None
        return lambda body, deadline: reviews.admit(
            body, stage=stage, module=module or None, deadline=deadline
        )

    def _too_large(self) -> _Refused:
        return _Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is too large; at most {self._max_body_bytes} bytes (server.maxBodyBytes) are read",
        )

    async def _read_body(self, request: web.BaseRequest, held: _Held) -> bytes:
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.content.iter_any():
                    size += len(part)
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    held.add(len(part))
                    parts.append(part)
        except TimeoutError:
            raise _Refused(
                HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive in {_BODY_SECONDS:g} s"
            ) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _deadline(request: web.BaseRequest, start: float) -> float | None:
    timeout = request.query.get("timeout")
    if timeout is None:
        return None
    try:
        return start + parse_duration(timeout)
    except ValueError as error:
        raise _Refused(HTTPStatus.BAD_REQUEST, f"query parameter timeout: {error}") from None


def _health(request: web.BaseRequest) -> web.Response:
    if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
        allow: dict[str, str] = {hdrs.ALLOW: "GET, HEAD"}
        return _status(request, HTTPStatus.METHOD_NOT_ALLOWED, "", "expected method GET", allow)
    return web.Response(text="ok\n")


def _status(
    request: web.BaseRequest,
    status: HTTPStatus,
    reason: str,
    message: str,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """A Kubernetes Status, which kube-apiserver logs with its message and kubectl shows."""
    body: dict[str, object] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason or status.phrase.title().replace(" ", ""),
        "code": status.value,
    }
    response = web.Response(
        body=msgspec.json.encode(body), status=status.value, content_type=_JSON, headers=headers
    )
    if not request.content.is_eof():
        response.force_close()  # the rest of the body is not worth reading
    return response
