"""Listening sockets, and one clear sentence where there can be none."""

from __future__ import annotations

import os
import socket

from bulkhead.sandbox import SandboxError
from bulkhead.service.config import Address

_BACKLOG = 1024


def listen(address: Address, option: str) -> socket.socket:
    """Listens on an address. Raises SandboxError: why it cannot, and that `option` chooses another."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SandboxError(
            f"cannot listen on {address}: {_reason(error)}; choose another with {option}"
        ) from None


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or error.errno is None or error.errno <= 0:
        # create_server appends the address to the text; ours names it already.
        return (error.strerror or "no such host").partition(" (")[0].lower()
    return os.strerror(error.errno).lower()
