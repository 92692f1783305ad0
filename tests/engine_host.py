"""A process of its own that serves real engines behind the real gateway, without TLS: `python -m tests.engine_host`.

It is what the enclave is, less the attested channel: sealed output, one vLLM mounted in process and others as processes
on unix sockets, started one after another and self-tested, our gateway, our store. A
plain uvicorn on loopback and a connection with a receipt key of the test stand where the TLS server stands. What the
test needs to know comes as JSON lines in the report file; stdout and stderr belong to telemetry.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from enclave import engine as engines
from enclave import telemetry
from enclave.engine import processes
from enclave.engine.base import Receive, Scope, Send
from enclave.inputs import golden_answers, private_directory
from tests.enclave.api.client import Connection
from tests.enclave.api.serving import gateway, tenancy_of
from tests.engine_models import Model


class Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling would end the process before the engine's children."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(models: list[Model], runtime: Path, report: Path) -> None:
    def say(**fields: Any) -> None:
        with report.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    served: dict[str, engines.Engine] = {}
    begun = time.monotonic()
    for model in models:
        engine = engines.load(model, private_directory(runtime / model.id))
        try:
            await engine.start()
            if model.golden is not None:
                await engine.self_test(golden_answers(model.golden))
        except engines.EngineError as err:
            say(refused=err.code, reason=str(err))
            return
        served[model.id] = engine
        say(**{f"up:{model.id}": round(time.monotonic() - begun, 1)})
    children = processes.descendants()
    tenancy = await tenancy_of(list(served), slots=engines.slots(models[0]), context=models[0].max_model_len)
    app_of_ours = await gateway(*served.values(), tenancy=tenancy)
    connection = Connection()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["vouchsafe"] = connection
        await app_of_ours(scope, receive, send)

    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
    watch = [asyncio.create_task(_tell(engine, say)) for engine in served.values()]
    say(port=listening.getsockname()[1], pid=os.getpid(), children=children)
    await server.serve(sockets=[listening])
    for task in watch:
        task.cancel()
    await tenancy.close()
    await asyncio.gather(*watch, *(engine.stop() for engine in served.values()), return_exceptions=True)
    say(stopped=True, left=_left(), dropped=dict(telemetry.dropped))


async def _tell(engine: engines.Engine, say: Any) -> None:
    say(failed=await engine.wait_failed())


def _left() -> list[int]:
    """What the engines left running; the resource tracker is this process's own and ends with it."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes.descendants()}
    return [pid for pid, line in lines.items() if b"multiprocessing.resource_tracker" not in line]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("runtime", "report"):
        parser.add_argument(name, type=Path)
    parser.add_argument("models", type=lambda text: [Model.of(m) for m in json.loads(text)])
    parser.add_argument("--say", help="print this before the output is sealed, and once more after")
    options = parser.parse_args()
    print(options.say, "before", flush=True)
    telemetry.seal()
    print(options.say, "after", flush=True)
    asyncio.run(serve(options.models, options.runtime, options.report))


if __name__ == "__main__":
    main()
