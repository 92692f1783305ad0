"""One engine in a process of its own: the very class that is mounted in process, served on a unix socket.

`python -m enclave.engine.worker`, started by `enclave.engine.spawn` and by nobody else. It ends with its parent (the
kernel sees to it, and so does the end of the control socket), hardens itself as the enclave does, prints nothing but
telemetry's lines, and listens on one socket of mode 0600 that answers its parent's pid alone. No TCP, no signals but
SIGTERM, no key of the enclave: it is executed, not forked.

On the control socket it says, one JSON object a line: `{"ready": …}` or `{"refused": …}`, and later perhaps
`{"failed": reason}`. A worker whose engine has failed ends; starting anew is its parent's business.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from asyncio import BaseTransport
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from enclave import hardening, telemetry
from enclave.engine.base import Engine, EngineError, Task
from enclave.engine.child import die_with_parent
from enclave.engine.wire import peer_pid

__all__ = ["Started", "main", "run"]

KEEP_ALIVE: Final = 24 * 3600
"""Seconds an idle connection of our parent stays open: only its end ends it."""
DRAIN_SECONDS: Final = 5


@dataclass(frozen=True, slots=True)
class Started:
    """What a worker is told on its command line; implements `enclave.engine.base.Model`."""

    control: int
    parent: int
    socket: Path
    runtime: Path
    id: str
    path: Path
    weights: str
    profile: str
    task: Task
    memory_percent: int
    max_model_len: int
    placement: Literal["in-process", "process"] = "in-process"  # what it is here


def main(argv: Sequence[str] | None = None) -> int:
    from enclave.engine import load

    return run(sys.argv[1:] if argv is None else argv, lambda started: load(started, started.runtime))


def run(argv: Sequence[str], load: Callable[[Started], Engine]) -> int:
    """Serve the engine that *load* gives until SIGTERM or the parent's end. Exit status 0, or 1 with a word said."""
    started = _parse(argv)
    die_with_parent(started.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the parent decides what ends when
    hardening.apply()
    telemetry.configure_libraries()
    telemetry.seal()
    with socket.socket(fileno=started.control) as control:
        os.set_inheritable(control.fileno(), False)
        return _loop(_serve(started, control, load))


def _loop(main: Any) -> int:  # Any: a coroutine
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        status: int = runner.run(main)
        return status


async def _serve(started: Started, control: socket.socket, load: Callable[[Started], Engine]) -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    reader, writer = await asyncio.open_unix_connection(sock=control)

    async def say(**fields: object) -> None:
        with contextlib.suppress(OSError):
            writer.write(json.dumps(fields).encode("ascii") + b"\n")
            await writer.drain()

    orphaned = asyncio.create_task(reader.read(1))  # the parent never writes: an answer is its end
    stopping = asyncio.create_task(stop.wait())
    engine = load(started)
    begun = asyncio.create_task(engine.start())
    try:
        await asyncio.wait({begun, stopping, orphaned}, return_when=asyncio.FIRST_COMPLETED)
        if not begun.done():
            return 0
        begun.result()
        server, serving = await _listen(started, engine)
        failed = asyncio.create_task(engine.wait_failed())
        await say(ready=True)
        await asyncio.wait({failed, stopping, orphaned, serving}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            await say(failed=failed.result())
        server.should_exit = True
        await asyncio.wait({serving}, timeout=DRAIN_SECONDS)
        failed.cancel()
        return 1 if failed.done() and not failed.cancelled() else 0
    except EngineError as err:
        fields = {"code": err.code, "reason": err.reason, "expected": err.expected, "actual": err.actual}
        await say(refused=fields | {"hint": err.hint})
        return 1
    finally:
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)
        await engine.stop()
        for task in (orphaned, stopping):
            task.cancel()
        started.socket.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling would end this process before the engine's children."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _listen(started: Started, engine: Engine) -> tuple[_Server, asyncio.Task[None]]:
    started.socket.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(started.socket))  # in a directory of mode 0700, under umask 077
    started.socket.chmod(0o600)
    config = uvicorn.Config(
        engine.app,
        http=_for(started.parent),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        if serving.done():
            await serving
            raise EngineError("ENGINE_SOCKET", "the engine process could not serve on its socket")
        await asyncio.sleep(0.01)
    return server, serving


def _for(parent: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, for connections of *parent* alone."""

    class Guarded(HttpToolsProtocol):
        def connection_made(self, transport: BaseTransport) -> None:
            with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
                if peer_pid(sock) != parent:
                    transport.abort()  # type: ignore[attr-defined]  # every stream transport has it
                    return
            super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn asks for asyncio.Transport

        def connection_lost(self, exc: Exception | None) -> None:
            if self.flow is not None:  # else it was never let in
                super().connection_lost(exc)

    return Guarded


def _parse(argv: Sequence[str]) -> Started:
    parser = argparse.ArgumentParser(prog="python -m enclave.engine.worker", allow_abbrev=False)
    for name, kind in (
        ("control", int), ("parent", int), ("socket", Path), ("runtime", Path), ("id", str), ("path", Path),
        ("weights", str), ("profile", str), ("task", str), ("memory-percent", int), ("max-model-len", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, required=True)
    return Started(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
