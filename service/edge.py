"""The one table from what went wrong to what a client sees, over HTTPS and over gRPC."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from http import HTTPStatus

from bulkhead.sandbox import (
    DeadlinePassed,
    InvalidModule,
    InvalidRequest,
    Overloaded,
    StoreFull,
    UnknownModule,
)
from bulkhead.service.errors import BadReview, ModuleFailed, Undecided
from bulkhead.service.identity import NotAdmin, NotAllowed, Unauthenticated


class Code(enum.Enum):
    """The gRPC status codes that we use, by name: the HTTPS worker does not load grpc."""

    INVALID_ARGUMENT = enum.auto()
    UNAUTHENTICATED = enum.auto()
    PERMISSION_DENIED = enum.auto()
    NOT_FOUND = enum.auto()
    FAILED_PRECONDITION = enum.auto()
    RESOURCE_EXHAUSTED = enum.auto()
    DEADLINE_EXCEEDED = enum.auto()
    UNAVAILABLE = enum.auto()
    INTERNAL = enum.auto()


class InUse(Exception):
    """The configuration names the module: it cannot be deleted."""


@dataclass(frozen=True, slots=True)
class Fault:
    """How an error leaves the service."""

    http_status: HTTPStatus
    code: Code
    reason: str
    """One word that programs may rely on."""
    message: str
    """For people. Holds nothing of the host."""
    unexpected: bool = False
    """To be logged with all its details, which the client does not get."""


# Their texts are written for clients. None carries Retry-After: kube-apiserver would wait.
_FAULTS: tuple[tuple[type[Exception], HTTPStatus, Code, str], ...] = (
    (BadReview, HTTPStatus.BAD_REQUEST, Code.INVALID_ARGUMENT, "BAD_REVIEW"),
    (InvalidRequest, HTTPStatus.BAD_REQUEST, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (Unauthenticated, HTTPStatus.UNAUTHORIZED, Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (NotAdmin, HTTPStatus.FORBIDDEN, Code.PERMISSION_DENIED, "NOT_ADMIN"),
    (NotAllowed, HTTPStatus.FORBIDDEN, Code.PERMISSION_DENIED, "NOT_ALLOWED"),
    (UnknownModule, HTTPStatus.NOT_FOUND, Code.NOT_FOUND, "UNKNOWN_MODULE"),
    (InUse, HTTPStatus.CONFLICT, Code.FAILED_PRECONDITION, "MODULE_IN_USE"),
    (Overloaded, HTTPStatus.SERVICE_UNAVAILABLE, Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (StoreFull, HTTPStatus.INSUFFICIENT_STORAGE, Code.RESOURCE_EXHAUSTED, "STORE_FULL"),
    (DeadlinePassed, HTTPStatus.GATEWAY_TIMEOUT, Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    (Undecided, HTTPStatus.SERVICE_UNAVAILABLE, Code.UNAVAILABLE, "UNDECIDED"),
    (ModuleFailed, HTTPStatus.INTERNAL_SERVER_ERROR, Code.INTERNAL, "MODULE_FAILED"),
)


def fault_of(error: Exception) -> Fault:
    """Translates an error. What is not expected becomes a bland internal error."""
    if isinstance(error, InvalidModule):
        return Fault(HTTPStatus.BAD_REQUEST, Code.INVALID_ARGUMENT, error.reason, str(error))
    for kind, http_status, code, reason in _FAULTS:
        if isinstance(error, kind):
            return Fault(http_status, code, reason, str(error))
    return Fault(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        Code.INTERNAL,
        "INTERNAL",
        "an internal error; see the log",
        unexpected=True,
    )
