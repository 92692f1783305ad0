"""One request to an engine's app from inside: used by the self-test, never for a user's request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from enclave.engine.base import ASGIApp, Message, Scope

__all__ = ["inner_scope", "post"]


def inner_scope(path: str, body: bytes, accept: bytes = b"application/json") -> Scope:
    """The ASGI scope an engine is called with: made anew from three headers, so nothing of a client's reaches it.

    Spec version 2.3 makes Starlette watch `receive` for a disconnect instead of waiting for a failing `send`."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("ascii"),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"accept", accept),
        ],
        "client": None,
        "server": None,
        "state": {},
    }


async def post(app: ASGIApp, path: str, document: Any) -> tuple[int, bytes]:  # Any: JSON values
    """Status and body of POST *path* with *document* as JSON."""
    body = json.dumps(document).encode("utf-8")
    given = False
    status = 0
    parts: list[bytes] = []
    hang_up = asyncio.Event()

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        # An early disconnect would cancel the request, and an answer at once would be polled in a busy loop.
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(inner_scope(path, body), receive, send)
    return status, b"".join(parts)
