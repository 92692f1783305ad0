"""Health routes: `live` while the process answers, `ready` only after every boot stage and while it may serve.

Runs in the enclave, public, without content: one word and a status, and a second word while the certificate's renewal
fails. Until the certificate ends that is no reason to send nobody, and every reason to look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from enclave.engine.base import ASGIApp, Receive, Scope, Send

__all__ = ["health_routes"]


def health_routes(
    ready: Callable[[], bool], failing: Callable[[], bool] = lambda: False
) -> Mapping[tuple[str, str], ASGIApp]:
    """The two routes. *ready*, and *failing* (the last renewal did), are asked each time."""

    async def live(scope: Scope, receive: Receive, send: Send) -> None:
        await _say(send, 200, b'{"status":"live"}')

    async def is_ready(scope: Scope, receive: Receive, send: Send) -> None:
        holds = ready()
        more = b',"certificate":"renewal-failing"' if failing() else b""
        await _say(send, 200 if holds else 503, b'{"status":"%s"%s}' % (b"ready" if holds else b"not-ready", more))

    return {("GET", "/health/live"): live, ("GET", "/health/ready"): is_ready}


async def _say(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
