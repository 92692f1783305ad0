"""An engine as a process of its own behind a unix socket, restarted when it dies: one model of several.

The same interface as the mount and, in the child, the same engine class (`worker`). What the process boundary gives: a
crash stays inside one model. What it costs: a hop over a unix socket (`wire`).

  (1) the first start must succeed, or the boot stops
  (2) when the process dies, or says that its engine has failed, its requests end in EngineGone, `healthy` is false,
      and everything below it is ended before anything new begins
  (3) it is started anew after 1 second, doubling to 60, each spread at random by a quarter; a process that has served
      for a minute starts the row afresh
  (4) before each restart the weights are measured again: stage 4 of the boot looked at them hours ago; after it the
      self-test runs again with the measured answers; only then is it healthy
  (5) starts take turns over all engines: an engine measures free memory while it starts, and must not do so while
      another one's changes

A model is served by its own process or not at all: nothing here knows of another one.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

from attestation.errors import VouchsafeError
from enclave import telemetry
from enclave.engine import selftest
from enclave.engine.base import ASGIApp, EngineError, EngineGone, Model, Receive, Scope, Send, Task
from enclave.engine.spawn import WORKER, Child
from enclave.weights import file_list_digest

__all__ = ["Backoff", "ProcessEngine"]

FIRST: Final = 1.0
LONGEST: Final = 60.0
SETTLED: Final = 60.0
"""Seconds of service after which a death is a new story."""
MAX_RETRY_AFTER: Final = 120
"""Clients of OpenAI's give up at once when they are told to wait longer."""

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class Backoff:
    """Seconds to wait before each attempt: *first*, doubling to *longest*, each times 0.75 to 1.25 at random."""

    def __init__(
        self, first: float = FIRST, longest: float = LONGEST, spread: Callable[[], float] = random.random
    ) -> None:
        self._first, self._longest, self._spread = first, longest, spread
        self.attempt = 0

    def next(self) -> float:
        # The exponent is bounded too: a model that never comes back must not end in an overflow.
        base: float = min(self._longest, self._first * 2.0 ** min(self.attempt, 30))
        self.attempt += 1
        return base * (0.75 + 0.5 * self._spread())

    def reset(self) -> None:
        self.attempt = 0


class ProcessEngine:
    """One model in a process of its own. Implements `enclave.engine.base.Engine`."""

    def __init__(
        self, model: Model, runtime: Path, *, program: Sequence[str] = WORKER, backoff: Backoff | None = None
    ) -> None:
        self._model, self._runtime, self._program = model, runtime, program
        self._backoff = backoff or Backoff()
        self._child: Child | None = None
        self._golden: list[dict[str, Any]] | None = None  # Any: JSON values
        self._healthy = False
        self._since = self._again = 0.0
        self._took = 0.0
        self._supervisor: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()

    @property
    def model_id(self) -> str:
        return self._model.id

    @property
    def task(self) -> Task:
        return self._model.task

    @property
    def app(self) -> ASGIApp:
        return self._call

    @property
    def healthy(self) -> bool:
        return self._healthy

    @property
    def retry_after(self) -> int | None:
        if self._failed.is_set() or self._supervisor is None:
            return None
        return max(1, min(MAX_RETRY_AFTER, math.ceil(self._again + self._took - time.monotonic())))

    @property
    def pid(self) -> int | None:
        """Of the process that serves now; None between two."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> None:
        await self._launch()  # (1)
        self._healthy, self._since = True, time.monotonic()
        self._supervisor = asyncio.create_task(self._supervise())

    async def self_test(self, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
        self._golden = golden
        await selftest.run(self, golden)

    async def wait_failed(self) -> str:
        """Not when the process dies, for then it is restarted; only if that itself has failed."""
        await self._failed.wait()
        return "supervision-failed"

    async def stop(self) -> None:
        begun, killed = time.monotonic(), 0
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        self._healthy = False
        child, self._child = self._child, None
        if child is not None:
            killed = await child.end()
            milliseconds = round((time.monotonic() - begun) * 1000)
            telemetry.event("engine.stopped", model=self.model_id, killed=killed, ms=milliseconds)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        child = self._child
        if child is None:
            raise EngineGone
        await child.wire.call(scope, receive, send)

    async def _launch(self) -> None:
        async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):  # (5)
            begun = time.monotonic()
            self._child = await Child.start(self._model, self._runtime, self._program)
            self._took = time.monotonic() - begun
        telemetry.event("engine.started", model=self.model_id, profile=self._model.profile, ms=round(self._took * 1000))

    async def _supervise(self) -> None:
        try:
            while True:
                await self._until_dead()
                await self._revive()
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._healthy = False
            self._failed.set()
            raise

    async def _until_dead(self) -> None:
        """(2)"""
        assert self._child is not None
        reason = await self._child.wait_failed()
        self._healthy = False
        self._again = time.monotonic() + FIRST
        telemetry.event("engine.failed", model=self.model_id, reason=reason)
        await self._bury()
        if time.monotonic() - self._since >= SETTLED:
            self._backoff.reset()

    async def _revive(self) -> None:
        """(3) until it serves again."""
        while not self._healthy:
            delay = self._backoff.next()
            self._again = time.monotonic() + delay
            telemetry.event(
                "engine.restart", model=self.model_id, attempt=self._backoff.attempt, ms=round(delay * 1000)
            )
            await asyncio.sleep(delay)
            try:
                await self._prove()
            except VouchsafeError as err:
                telemetry.event("engine.failed", model=self.model_id, reason=err.code)
            except Exception as err:
                telemetry.event("engine.failed", model=self.model_id, reason=type(err).__name__)
            else:
                self._healthy, self._since = True, time.monotonic()
                return
            await self._bury()

    async def _prove(self) -> None:
        """(4)"""
        found = await asyncio.to_thread(file_list_digest, self._model.path)
        if found != self._model.weights:
            raise EngineError("ENGINE_WEIGHTS", "the model's files have changed since the boot")
        await self._launch()
        if self._golden is not None:
            await selftest.run(self, self._golden)

    async def _bury(self) -> None:
        """End what is left of the process, at once: whatever it still does serves nobody."""
        child, self._child = self._child, None
        if child is not None:
            await child.end(patience=0)
