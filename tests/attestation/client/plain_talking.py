"""The roads of `talking` over the plain, key-bound context, and what a careless library does to an `ssl.SSLContext`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop

from attestation.client.plain import PlainAttestedContext
from attestation.client.session import AttestedSession
from tests.attestation.client.enclave import session_for
from tests.attestation.client.ratls_server import Server
from tests.attestation.client.talking import SECRET, talk, talk_async
from tests.genuine import NAME, Genuine, genuine


@dataclass
class Plain:
    """*session* as `talk` takes it, with the plain context in place of the other."""

    session: AttestedSession
    made: PlainAttestedContext | None = None

    @property
    def name(self) -> str:
        return self.session.name

    @property
    def last_result(self) -> Any:
        return self.session.last_result

    def context(self) -> PlainAttestedContext:
        self.made = self.made or PlainAttestedContext(self.session, deadline=self.session._seconds)
        return self.made


def plain(server: Server, story: Genuine, **changes: Any) -> Any:  # Any: a Plain, where `talk` is typed for sessions
    return Plain(session_for(server, story, **changes))


def talk_uvloop(session: Any, server: Server) -> bytes:
    async def main() -> bytes:
        reader, writer = await asyncio.open_connection(*server.address, ssl=session.context(), server_hostname=NAME)
        try:
            writer.write(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
            return await reader.read(65536)
        finally:
            writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


Send = Callable[[Any, Server], bytes]
all_roads = pytest.mark.parametrize("send", [talk, talk_async, talk_uvloop], ids=["socket", "asyncio", "uvloop"])


def key_bound(**changes: Any) -> Genuine:
    """An honest enclave, and a client whose policy takes a key-bound proof."""
    return genuine(policy={"channel.proof": "key"}, **changes)


def weakened(context: Any) -> None:
    """What a library sets on a context that it takes for an ordinary one, and what a careless one would."""
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0) | ssl.OP_NO_TLSv1_3
    context.verify_flags = 0
    context.sslsocket_class, context.sslobject_class = ssl.SSLSocket, ssl.SSLObject
    context.set_alpn_protocols(["h2"])
    context.load_default_certs()
