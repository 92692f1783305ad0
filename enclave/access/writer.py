"""Records on their way to the journal: in the order in which they were given, many to one write.

Whoever changes state gives its records at the same moment, so what is durable is always the beginning of what happened:
never an effect without its cause. A failed write stops the writer for good, because nobody can know what it left.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from enclave.access.entries import LedgerError

__all__ = ["Append", "Writer"]

Append = Callable[[Sequence[bytes]], Awaitable[object]]
"""Stores records behind all earlier ones; durable when it returns. One call at a time is made."""

MAX_BATCH: Final = 512
LINGER_SECONDS: Final = 0.025
"""How long a record may wait for others when nobody waits for it: a write costs more than all that it writes."""


class Writer:
    """See the module. For one event loop; the queue is bounded by who puts: the ledger caps what is open."""

    def __init__(self, append: Append) -> None:
        self._append = append
        self._queue: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._again = False
        self._failed: str | None = None

    def check(self) -> None:
        """Raise `LedgerError` when nothing can be written any more."""
        if self._failed is not None:
            raise _failure(self._failed)

    def put(self, record: bytes) -> asyncio.Future[None]:
        """Queue *record*; done when it is durable. Await it shielded, after `hurry`. Raises `LedgerError`."""
        self.check()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._queue.append((record, done))
        if len(self._queue) >= MAX_BATCH:
            self.hurry()
        elif self._timer is None:
            self._timer = loop.call_later(LINGER_SECONDS, self.hurry)
        return done

    def hurry(self) -> None:
        """Write what is queued now; what a write is under way with, then the rest."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None and not self._task.done():
            self._again = True
        elif self._queue:
            self._task = asyncio.get_running_loop().create_task(self._write(), name="ledger writer")

    async def idle(self) -> None:
        """Return when all that was put is durable, or has failed."""
        self.hurry()
        while self._task is not None and not self._task.done():
            await asyncio.shield(asyncio.wait([self._task]))
            self.hurry()

    async def _write(self) -> None:
        batch: list[tuple[bytes, asyncio.Future[None]]] = []
        try:
            self._again = True
            while self._queue and self._again:
                self._again = len(self._queue) > MAX_BATCH
                batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
                await self._append([record for record, _ in batch])
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)
            if self._queue and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.hurry)
        except Exception as err:
            self._fail(getattr(err, "code", type(err).__name__), batch)
        except asyncio.CancelledError:
            self._fail("cancelled", batch)
            raise

    def _fail(self, why: str, batch: list[tuple[bytes, asyncio.Future[None]]]) -> None:
        self._failed = why
        for _, done in (*batch, *self._queue):
            if not done.done():
                done.set_exception(_failure(why))
                done.exception()  # nobody may be waiting: no news for the event loop's log
        self._queue.clear()


def _failure(why: str) -> LedgerError:
    return LedgerError(
        "LEDGER_FAILED", "the journal does not take the ledger's records", expected="durable records", actual=why,
        hint="mend the storage and start again: what was not durable is not in the ledger then",
    )  # fmt: skip
