"""Start one engine process, hear from it, and end it with everything below it.

Runs in the enclave. The child gets an argument list, a clean environment and one descriptor: none of our variables, no
memory of ours (it is executed, not forked), no descriptor besides. What it says is read line by line under a bound and
believed as far as it concerns its own state.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from enclave.engine import processes
from enclave.engine.base import EngineError, Model
from enclave.engine.wire import Wire

__all__ = ["WORKER", "Child", "clean_environment"]

START_SECONDS: Final = 3600.0
"""Loading is slow in confidential mode; longer than this is not loading."""
STOP_SECONDS: Final = 20.0
"""For an orderly end: the worker's own drain, and its engine's patience with its children."""
KILL_SECONDS: Final = 5.0
"""For what a killed worker leaves: its children end with it, and then the tracker that removes their shared memory."""
MAX_LINE: Final = 16 * 1024
_KEPT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
"""Of our environment. What an engine needs besides is in its profile; the last one is the development TEE's."""


def _interpreter() -> tuple[str, ...]:
    """This interpreter, as strict about its import path as it was started here, and writing no byte code."""
    strict = ("-I",) if sys.flags.isolated else ("-P",) if sys.flags.safe_path else ()
    return (sys.executable, "-B", *strict)


WORKER: Final[Sequence[str]] = (*_interpreter(), "-m", "enclave.engine.worker")


def clean_environment(present: Mapping[str, str]) -> dict[str, str]:
    """What a worker is started with: an in-process engine has filled ours with its own variables."""
    return {name: present[name] for name in _KEPT if name in present}


class Child:
    """One worker, after `start`. `wire` reaches it."""

    wire: Wire

    def __init__(
        self, process: asyncio.subprocess.Process, control: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._control, self._writer = process, control, writer
        self._below: dict[int, str] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, model: Model, runtime: Path, program: Sequence[str] = WORKER) -> Child:
        """Start one and wait until it serves. Raises EngineError; nothing is left behind then."""
        path = runtime / "engine.sock"
        if len(os.fsencode(path)) > 107:  # sun_path of unix(7), with its final NUL
            raise EngineError(
                "ENGINE_SOCKET", "the path of the engine's socket is too long", expected="<= 107 bytes", actual=path,
                hint="configure a shorter `runtime`",
            )  # fmt: skip
        spawning = asyncio.ensure_future(cls._spawn(model, runtime, path, program))
        try:
            child = await asyncio.shield(spawning)
        except asyncio.CancelledError:  # in the middle of it: a process may be there that nobody knows yet
            await (await spawning).end(patience=0)
            raise
        try:
            await child._ready()
        except BaseException:
            await child.end(patience=0)
            raise
        child._below = processes.descendants(child.pid)
        child.wire = Wire(path, child.pid)
        return child

    @classmethod
    async def _spawn(cls, model: Model, runtime: Path, path: Path, program: Sequence[str]) -> Child:
        ours, its = socket.socketpair()
        with its:
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                *program,
                *_arguments(model, runtime, path, its.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(its.fileno(),),
                env=clean_environment(os.environ),
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE)
        return cls(process, reader, writer)

    async def _ready(self) -> None:
        try:
            async with asyncio.timeout(START_SECONDS):
                said = await self._hear()
        except TimeoutError:
            raise EngineError(
                "ENGINE_START", f"the engine process was not ready within {START_SECONDS:.0f} seconds"
            ) from None
        if said is None:
            raise EngineError("ENGINE_START", "the engine process ended while it started")
        if said.get("ready") is not True:
            raise _refused(said.get("refused"))

    async def wait_failed(self) -> str:
        """Returns, with a word, when it has ended or said that its engine has failed."""
        said = await self._hear()
        reason = None if said is None else said.get("failed")
        return reason if isinstance(reason, str) else "process-died"

    async def _hear(self) -> dict[str, Any] | None:  # Any: JSON values
        """Its next line; None when it has ended, or says what is no line."""
        try:
            said = json.loads(await self._control.readline() or b"null")
        except (ValueError, OSError):
            return None
        return said if isinstance(said, dict) else None

    async def end(self, *, patience: float = STOP_SECONDS) -> int:
        """Ask it to end, give it *patience* seconds, kill what is left. Returns how many had to be killed.

        Runs to its end even where the caller is cancelled: half an end would leave a process that nobody knows."""
        ending = asyncio.ensure_future(self._end(patience))
        try:
            return await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise

    async def _end(self, patience: float) -> int:
        if hasattr(self, "wire"):
            self.wire.close()
        self._below |= processes.descendants(self.pid)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM if patience else signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience or KILL_SECONDS)
        killed = 0
        if self._process.returncode is None:
            killed = 1
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        killed += await processes.end(self._below, patience=KILL_SECONDS)
        _reap(self._below)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        return killed


def _arguments(model: Model, runtime: Path, path: Path, control: int) -> list[str]:
    values = {
        "control": control, "parent": os.getpid(), "socket": path, "runtime": runtime, "id": model.id,
        "path": model.path, "weights": model.weights, "profile": model.profile, "task": model.task,
        "memory-percent": model.memory_percent, "max-model-len": model.max_model_len,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def _refused(said: object) -> EngineError:
    """The worker's own EngineError, or one that says that it gave none."""
    fields = said if isinstance(said, dict) else {}
    text = {k: v for k, v in fields.items() if isinstance(v, str)}
    return EngineError(
        text.get("code", "ENGINE_START"),
        text.get("reason", "the engine process refused to start"),
        expected=text.get("expected", ""),
        actual=text.get("actual", ""),
        hint=text.get("hint", ""),
    )


def _reap(ended: Mapping[int, str]) -> None:
    """As subreaper we inherit a killed worker's children: take their exit status, or they stay as zombies."""
    for pid in ended:
        with contextlib.suppress(ChildProcessError, PermissionError):
            os.waitpid(pid, os.WNOHANG)
