"""A forwarder that exchanges keys: suites of others bring fixed ones, and ours are made when a service begins.

    python -m tests.interop.keys TO THEIRS=OURS …     prints `keys: listening on 127.0.0.1:PORT`

Plain HTTP on loopback, for tests; a bearer token that it does not know passes as it is.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import httpx2
import uvicorn

_KEPT = (b"authorization", b"content-type", b"x-api-key", b"accept")


async def main(to: str, pairs: list[str]) -> None:
    ours = {
        f"Bearer {theirs}".encode(): f"Bearer {own}".encode() for theirs, _, own in (p.partition("=") for p in pairs)
    }
    onward = httpx2.AsyncClient(base_url=to, trust_env=False, timeout=60)

    async def app(scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        head = [(n, ours.get(v, v)) for n, v in scope["headers"] if n in _KEPT]
        url = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        try:
            answer = await onward.request(scope["method"], url.decode("ascii"), headers=head, content=body)
        except httpx2.TransportError:
            await send({"type": "http.response.start", "status": 502, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        skip = (b"content-length", b"transfer-encoding", b"connection")
        headers = [(n, v) for n, v in answer.headers.raw if n.lower() not in skip]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": answer.content})

    listening = socket.create_server(("127.0.0.1", 0))
    print(f"keys: listening on 127.0.0.1:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
    await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
