"""The clients of the HTTPS endpoint: who is at the other end of a connection, and whether it may ask."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from bulkhead.service.identity import Access, Identity, NotAllowed, Unauthenticated, identity_of_peer
from bulkhead.service.tls import TlsMaterial, server_context

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Client:
    identity: Identity | None
    may_ask: bool


class Clients:
    """Decides for each request; looks at each connection's certificate once.

    Connections outlive the certificates and names that they were made under. The names that count are
    those of now. A connection is stale if its client was verified by authorities of which one is not
    trusted any more, or was not asked for a certificate where one is needed now.
    """

    def __init__(self, tls: TlsMaterial | None) -> None:
        """Raises TlsError."""
        self.context: ssl.SSLContext | None = None
        """For new connections; None: in plaintext."""
        self._access = Access(None)
        # The authorities that verify the clients of each context, while it or a connection of it lives.
        self._trusted: WeakKeyDictionary[ssl.SSLContext, frozenset[bytes]] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[ssl.SSLObject, _Client] = WeakKeyDictionary()
        self.set_tls(tls)

    def set_tls(self, tls: TlsMaterial | None) -> None:
        """Sets what counts from now on. Raises TlsError, and changes nothing."""
        context = None if tls is None else server_context(tls)
        if tls is not None and context is not None:
            authorities = tls.client_authorities()
            self._trusted[context] = frozenset(each.public_bytes(Encoding.DER) for each in authorities)
        self.context, self._access = context, Access(tls)
        self._known.clear()

    def is_stale(self, transport: asyncio.BaseTransport) -> bool:
        """Whether the connection has to be made anew before its client may ask."""
        if self.context is None:
            return False
        connection: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if connection is None:
            return True
        if connection.context is self.context or not self._access.needs_certificate:
            return False
        verified_by = self._trusted[connection.context]
        return not verified_by or not verified_by <= self._trusted[self.context]

    def require(self, transport: asyncio.BaseTransport) -> None:
        """Raises Unauthenticated or NotAllowed unless the client may ask."""
        if self.is_stale(transport):
            raise Unauthenticated("the connection was made before clientCA changed; connect again")
        if not self._access.needs_certificate:
            return
        connection: ssl.SSLObject = transport.get_extra_info("ssl_object")
        client = self._known.get(connection) or self._meet(connection)
        identity = client.identity
        if identity is not None and identity.expires_at is not None and identity.expires_at < time.time():
            raise Unauthenticated("the client certificate has expired; connect again with another")
        if not client.may_ask:
            self._access.require_caller(identity)

    def _meet(self, connection: ssl.SSLObject) -> _Client:
        identity = identity_of_peer(connection.getpeercert())
        try:
            self._access.require_caller(identity)
            client = _Client(identity, may_ask=True)
        except (Unauthenticated, NotAllowed) as error:
            client = _Client(identity, may_ask=False)
            if identity is not None:
                _log.warning("client_refused", reason=str(error), names=sorted(identity.names))
        self._known[connection] = client
        return client
