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


class Writer:
    """See the module. For one event loop; the queue is bounded by who puts: the ledger caps what is open."""

    def __init__(self, append: Append) -> None:
        self._append = append
        self._queue: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._failed: str | None = None

    def check(self) -> None:
        """Raise `LedgerError` when nothing can be written any more."""
        if self._failed is not None:
            raise _failure(self._failed)

    def put(self, record: bytes) -> asyncio.Future[None]:
        """Queue *record*; done when it is durable. Await it shielded. Raises `LedgerError`."""
        self.check()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((record, done))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write(), name="ledger writer")
        return done

    async def idle(self) -> None:
        """Return when all that was put is durable, or has failed."""
        if self._task is not None:
            await asyncio.shield(asyncio.wait([self._task]))

    async def _write(self) -> None:
        batch: list[tuple[bytes, asyncio.Future[None]]] = []
        try:
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
                await self._append([record for record, _ in batch])
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)
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
