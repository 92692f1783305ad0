"""A user's request over both roads through the verifying context, and what "refused" must mean for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from attestation.client.handshake import NotAttested
from attestation.client.session import AttestedSession
from tests.attestation.client.ratls_server import Server

SECRET = b"the user's own prompt"


def talk(session: AttestedSession, server: Server) -> bytes:
    """Dial, and send SECRET the moment the connection is accepted, as a library would."""
    sock = socket.create_connection(server.address, 5)
    with session.context().wrap_socket(sock, server_hostname=session.name) as tls:
        tls.sendall(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
        return tls.recv(65536)


def talk_async(session: AttestedSession, server: Server) -> bytes:
    async def main() -> bytes:
        reader, writer = await asyncio.open_connection(
            *server.address, ssl=session.context(), server_hostname=session.name
        )
        try:
            writer.write(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
            return await reader.read(65536)
        finally:
            writer.close()

    return asyncio.run(main())


both_roads = pytest.mark.parametrize("send", [talk, talk_async], ids=["socket", "bio"])
Send = Callable[[AttestedSession, Server], bytes]


def refused(session: AttestedSession, server: Server, code: str, send: Send = talk) -> NotAttested:
    """The connection is refused with *code*, and no byte of the user's request has left."""
    before = len(server.connections)
    with pytest.raises(NotAttested) as caught:
        send(session, server)
    assert caught.value.code == code, caught.value
    server.wait_idle(before + 1)
    assert not any(SECRET in c.app_bytes for c in server.connections[before:])
    return caught.value
