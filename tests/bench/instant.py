"""An engine that answers at once, for measurements of what stands in front of it: `python -m tests.bench.instant`.

It serves the echo's HTTP on loopback, so that another gateway can stand in front of the same answers.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from enclave.engine.echo import EchoEngine


async def serve() -> None:
    engine = EchoEngine("parrot")
    await engine.start()
    engine.calls.clear()

    async def app(scope: dict, receive: object, send: object) -> None:  # type: ignore[type-arg]  # ASGI's own shape
        if scope["type"] == "http":
            await engine.app(scope, receive, send)  # type: ignore[arg-type]  # the same shape
            engine.calls.clear()

    listening = socket.create_server(("127.0.0.1", 0))
    print(f"instant: listening on 127.0.0.1:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")  # type: ignore[arg-type]
    await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(serve())
