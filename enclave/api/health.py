"""Health routes: `live` while the process answers, `ready` only after every boot stage and while it may serve.

Runs in the enclave, public, without content: one word and a status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from enclave.engine.base import ASGIApp, Receive, Scope, Send

__all__ = ["health_routes"]


def health_routes(ready: Callable[[], bool]) -> Mapping[tuple[str, str], ASGIApp]:
    """The two routes. *ready* is asked each time."""

    async def live(scope: Scope, receive: Receive, send: Send) -> None:
        await _say(send, 200, b"live")

    async def is_ready(scope: Scope, receive: Receive, send: Send) -> None:
        await (_say(send, 200, b"ready") if ready() else _say(send, 503, b"not-ready"))

    return {("GET", "/health/live"): live, ("GET", "/health/ready"): is_ready}


async def _say(send: Send, status: int, word: bytes) -> None:
    body = b'{"status":"%s"}' % word
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
