"""The verifying `SSLContext`: hand it to any library that takes one, and it talks to nobody unverified.

Inside `do_handshake` the evidence is appraised and the channel proof made; a refusal is a failed handshake
(`NotAttested`, a subclass of `ssl.SSLCertVerificationError`) before a user's first byte. One context serves one name:
a redirect or a mistyped address to another host is refused before it is dialled further. No setting that a library
can change on an `SSLContext` (verify mode, host name check, trust store, versions, ALPN) weakens it: all of those
belong to the `ssl` module's own machinery, which is not used here.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any

from attestation.client.handshake import Appraiser, Link, NotAttested, client_context, find
from attestation.client.sockets import AttestedObject, AttestedSocket
from attestation.errors import RefusedError, VouchsafeError

__all__ = ["Appraiser", "AttestedContext", "NotAttested", "check_name", "find"]

HANDSHAKE_SECONDS = 30.0


class AttestedContext(ssl.SSLContext):
    """A client context whose every connection is attested by *appraiser*.

    To libraries it says CERT_REQUIRED and check_hostname, which is the truth in other words."""

    def __new__(cls, appraiser: Appraiser, *, deadline: float = HANDSHAKE_SECONDS) -> AttestedContext:
        self = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        self.minimum_version = ssl.TLSVersion.TLSv1_3
        return self

    def __init__(self, appraiser: Appraiser, *, deadline: float = HANDSHAKE_SECONDS) -> None:
        self._appraiser, self._seconds = appraiser, deadline
        self._openssl = client_context()

    def wrap_socket(  # type: ignore[override]  # an AttestedSocket serves where an SSLSocket is asked for
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: Any = None,  # Any: refused unless None
    ) -> AttestedSocket:
        """*sock* connected, blocking or with a timeout. `suppress_ragged_eofs` is not honoured: see `Link.read`."""
        link = self._link(server_side, server_hostname, session)
        wrapped = AttestedSocket(link, self, sock, self._appraiser.name)
        if do_handshake_on_connect:
            if wrapped.gettimeout() == 0.0:
                wrapped.close()
                raise ValueError("do_handshake_on_connect should not be specified for non-blocking sockets")
            wrapped.do_handshake()
        return wrapped

    def wrap_bio(  # type: ignore[override]  # an AttestedObject serves where an SSLObject is asked for
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: Any = None,  # Any: refused unless None
    ) -> AttestedObject:
        """May block while the appraiser fetches what it has not; prepare the session first to avoid that."""
        link = self._link(server_side, server_hostname, session)
        return AttestedObject(link, self, incoming, outgoing, self._appraiser.name)

    def link(self) -> Link:
        """A connection without a socket, for a program that carries ciphertext itself. May block as `wrap_bio` may."""
        return self._link(False, None, None)

    def _link(self, server_side: bool, server_hostname: str | bytes | None, session: object) -> Link:
        if server_side:
            raise ValueError("an AttestedContext is for clients")
        if session is not None:
            raise ValueError("an attested connection never resumes a session")
        link = Link(self._openssl, self._appraiser, self._seconds)
        try:
            check_name(self._appraiser, server_hostname)
            self._appraiser.prepare()
        except (VouchsafeError, NotAttested) as err:
            # Told by the handshake, where every library expects it, and before a byte is sent.
            link.refuse(err)
        return link


def check_name(appraiser: Appraiser, server_hostname: str | bytes | None) -> None:
    """That a library dials the one service that *appraiser* decides about. Raises `RefusedError` (`CLIENT_NAME`)."""
    if isinstance(server_hostname, bytes):
        server_hostname = server_hostname.decode("ascii", "replace")
    if server_hostname is not None and server_hostname.lower().removesuffix(".") != appraiser.name:
        raise RefusedError(
            "CLIENT_NAME",
            "this context is for another name",
            expected=appraiser.name,
            actual=server_hostname,
            hint="make one context per service; to dial an address give the name as server_hostname",
        )
