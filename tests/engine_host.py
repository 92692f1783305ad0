"""A process of its own that serves the real engine behind the real gateway, without TLS: `python -m tests.engine_host`.

It is what the enclave is, less the attested channel: sealed output, vLLM mounted in process, our gateway, our store. A
plain uvicorn on loopback and a connection with a receipt key of the test stand where the TLS server stands. What the
test needs to know comes as JSON lines in the report file; stdout and stderr belong to telemetry.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn

from enclave import engine as engines
from enclave import telemetry
from enclave.access import KeyCheck
from enclave.api.app import Gateway
from enclave.engine import processes
from enclave.engine.base import Receive, Scope, Send, Task
from enclave.receipts import ReceiptStore
from tests.enclave.api.client import API_KEY, Connection


@dataclass(frozen=True)
class Model:
    """As `[[models]]` of the configuration gives it."""

    path: Path
    id: str = "parrot"
    weights: str = ""
    profile: str = "cpu"
    placement: Literal["in-process", "process"] = "in-process"
    task: Task = "generate"
    memory_percent: int = 10
    max_model_len: int = 2048


class Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling would end the process before the engine's children."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(model: Model, runtime: Path, report: Path) -> None:
    def say(**fields: Any) -> None:
        with report.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    engine = engines.load(model, runtime)
    try:
        await engine.start()
    except engines.EngineError as err:
        say(refused=err.code, reason=str(err))
        return
    children = processes.descendants()
    gateway = Gateway(
        engines={engine.model_id: engine},
        access=KeyCheck(hashlib.sha256(API_KEY.encode()).hexdigest()),
        receipts=ReceiptStore(),
        public={},
        ready=lambda: True,
    )
    connection = Connection()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["vouchsafe"] = connection
        await gateway(scope, receive, send)

    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
    watch = asyncio.create_task(_tell(engine, say))
    say(port=listening.getsockname()[1], pid=os.getpid(), children=children)
    await server.serve(sockets=[listening])
    watch.cancel()
    await engine.stop()
    say(stopped=True, left=processes.alive(children), dropped=dict(telemetry.dropped))


async def _tell(engine: engines.Engine, say: Any) -> None:
    say(failed=await engine.wait_failed())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "runtime", "report"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--say", help="print this before the output is sealed, and once more after")
    options = parser.parse_args()
    print(options.say, "before", flush=True)
    telemetry.seal()
    print(options.say, "after", flush=True)
    asyncio.run(serve(Model(options.model), options.runtime, options.report))


if __name__ == "__main__":
    main()
