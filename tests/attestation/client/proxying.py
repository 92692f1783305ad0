"""The local proxy without a socket of its own: its application is driven as a server would, against a real service."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from attestation.client.proxy import Guard, Proxy
from attestation.client.proxy_state import ProxyState
from attestation.client.session import AttestedSession
from attestation.client.upstream import Upstream
from tests.attestation.client.enclave import session_for
from tests.attestation.client.ratls_server import Server
from tests.genuine import Genuine

PROMPT = "the user's own prompt"
HEADERS = ((b"host", b"127.0.0.1:8080"), (b"authorization", b"Bearer sk-test"))


@dataclass
class Told:
    """What the local program was answered. `whole`: the answer came to its end."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    pieces: list[bytes] = field(default_factory=list)

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


@dataclass
class Local:
    """A proxy in front of one service."""

    proxy: Proxy
    upstream: Upstream
    state: ProxyState
    session: AttestedSession

    async def ask(
        self,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        body: bytes | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = HEADERS,
        *,
        query: bytes = b"",
        hang_up: asyncio.Event | None = None,
        stream: bool = False,
    ) -> Told:
        """One request of a local program, which hangs up when *hang_up* is set."""
        if body is None:
            body = json.dumps({"model": "parrot", "messages": [{"content": PROMPT}], "stream": stream}).encode()
        told, sent = Told(), False
        over = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await (hang_up or over).wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert told.status == 0
                told.status, told.headers = message["status"], dict(message.get("headers", ()))
                return
            told.pieces.append(message.get("body", b""))
            told.body += told.pieces[-1]
            told.whole = not message.get("more_body", False)

        raw = path.encode()
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": raw, "query_string": query,
            "headers": [*headers],
        }  # fmt: skip
        with contextlib.suppress(Exception):  # a server ends the connection then; `whole` tells
            await self.proxy(scope, receive, send)  # type: ignore[arg-type]  # plain dictionaries are messages
        return told


@contextlib.asynccontextmanager
async def local(
    server: Server, story: Genuine, *, receipts: bool = True, guard: Guard | None = None, max_age: float = 900.0,
    clock: Any = None, **session: Any,
) -> AsyncIterator[Local]:  # fmt: skip
    """A proxy that talks to *server* and asks for what *story*'s client asks for."""
    made = session_for(server, story, **({"clock": clock} if clock else {}), **session)
    upstream = Upstream(made, max_age=max_age, clock=clock or (lambda: story.now))
    state = ProxyState(made.target.origin, made.policy.name, receipts)
    try:
        yield Local(Proxy(upstream, state, guard or Guard(), receipts=receipts), upstream, state, made)
    finally:
        upstream.close()
        await asyncio.sleep(0)
