"""Health routes: `live` while the process answers, `ready` only after every boot stage and while it may serve.

Runs in the enclave, public, without content: a word, a word for each model (the ids stand in the certificate's claims
anyway), one while the operator has not opened the state, and one more while the certificate's renewal fails. Until the
certificate ends that is no reason to send nobody, and every reason to look. A model that is down does not make the
service unready: its own requests are answered 503 with a time to come back, and those of the others are answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from enclave.engine.base import ASGIApp, Receive, Scope, Send

__all__ = ["health_routes"]


def health_routes(
    ready: Callable[[], bool],
    failing: Callable[[], bool] = lambda: False,
    models: Callable[[], Mapping[str, bool]] = dict,
    state: Callable[[], str] = lambda: "open",
) -> Mapping[tuple[str, str], ASGIApp]:
    """The two routes. *ready*, *failing* (the last renewal did), *models* (id → can it answer), *state* (new, locked,
    open) are asked each time."""

    async def live(scope: Scope, receive: Receive, send: Send) -> None:
        await _say(send, 200, b'{"status":"live"}')

    async def is_ready(scope: Scope, receive: Receive, send: Send) -> None:
        holds = ready()
        said: dict[str, object] = {"status": "ready" if holds else "not-ready"}
        if states := models():
            said["models"] = {id: "ready" if up else "unavailable" for id, up in states.items()}
        if (now := state()) != "open":
            said["state"] = now
        if failing():
            said["certificate"] = "renewal-failing"
        await _say(send, 200 if holds else 503, json.dumps(said, separators=(",", ":")).encode("ascii"))

    return {("GET", "/health/live"): live, ("GET", "/health/ready"): is_ready}


async def _say(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
