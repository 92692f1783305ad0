"""The one journal: records that only this enclave can read, appended for good, given back in order after a restart.

Runs in the enclave. State lives in the memory of whoever uses the journal; a restart replays it. What is stored is
sealed (`enclave.state.sealing`) and kept by a backend that is not trusted (`enclave.state.base`). The host can refuse
to store, and it can set everything back to an earlier moment: rows dropped from the end leave a shorter journal that is
whole in itself. **Only a checkpoint kept elsewhere tells** (`at_least`), and only about rows up to that checkpoint.
Two enclaves on one database could be shown different ends; their checkpoints differ then. All else is refused:

    STATE_MISSING      there is no journal        STATE_EXISTS    there is one where none should be
    STATE_KEY          not this state key         STATE_HEADER    row 0 is no header, or of another format
    STATE_GAP          a number is missing, repeated or out of order
    STATE_RECORD       a record was changed, moved, or is of another journal
    STATE_TRUNCATED    the last append is not whole
    STATE_ROLLBACK     the journal does not extend the checkpoint, or what this program wrote
    STATE_CONFLICT     somebody else appended first       STATE_TOO_LONG  a record or an append beyond its cap
    STATE_BUSY         the queue is full                  STATE_CLOSED    closed, or stopped by an earlier failure
    STATE_APPLY        another enclave's record could not be applied
    STATE_UNAVAILABLE  the storage did not answer in time: whether it wrote is not known
    STATE_LOCKED, STATE_SCHEMA, STATE_STORAGE             from the backend: in use, of an unknown layout, an error

A journal that failed stays failed: nobody has to reason about half a write. Open it anew, into fresh state.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from enclave.state.base import MAX_BATCH, MAX_BATCH_BYTES, PAGE, Backend, StateConflict, StateError
from enclave.state.sealing import Checkpoint, Header, Sealer, next_head, sealed_size

__all__ = ["Apply", "Journal"]

MAX_QUEUED: Final = 8 * MAX_BATCH
MAX_QUEUED_BYTES: Final = 4 * MAX_BATCH_BYTES

Apply = Callable[[int, bytes], None]
"""Takes one record (its number, its bytes) into memory. Must not block, and raises only for what cannot be."""


@dataclass(frozen=True, slots=True, eq=False)
class _Append:
    """One caller's records, all or none; none at all: just read what others wrote."""

    records: Sequence[bytes]
    size: int
    foreign_seq: int | None
    done: asyncio.Future[Checkpoint]


class Journal:
    """A journal that is open. Made by `create` and `open`; used in one event loop; `close` it, or use `async with`.

    Everything it gave to `apply` was written under the state key, in this order, with nothing left out in between.
    """

    def __init__(self, backend: Backend, header: Header, sealer: Sealer, head: bytes, apply: Apply | None) -> None:
        self._backend, self._header, self._sealer, self._apply = backend, header, sealer, apply
        self._first_head = self._head = head
        self._seq = self._foreign = 0
        self._queue: deque[_Append] = deque()
        self._queued = self._queued_bytes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()  # for room in the queue
        self._wake = asyncio.Event()
        self._closing = False
        self._failure: StateError | None = None
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    async def create(cls, backend: Backend, state_key: bytes, now: int, *, apply: Apply | None = None) -> Journal:
        """Begin a journal in empty storage, at *now* (unix seconds), under *state_key* (32 bytes).

        Raises `StateError`; `STATE_EXISTS` when anything is stored there. Never call it where a journal should be:
        a host that deleted everything would look like a first boot.
        """
        header = Header(os.urandom(16), now)
        row = header.seal(state_key)
        try:
            await backend.append(0, [row])
        except StateConflict as err:
            # An answer that was lost on the way leaves our own row; its id is random, so it is ours or not.
            if await backend.read(0, 2) != [(0, row)]:
                raise StateError(
                    "STATE_EXISTS", "there is state already", hint="open it with its key, or name empty storage"
                ) from err
        journal = cls(backend, header, Sealer(state_key, header.state_id), next_head(bytes(32), row), apply)
        journal._start()
        return journal

    @classmethod
    async def open(
        cls, backend: Backend, state_key: bytes, *, at_least: Checkpoint | None = None, apply: Apply | None = None
    ) -> Journal:
        """Read and check all that is stored; *apply* gets every record in order, and later those of other enclaves.

        at_least   the journal must be this one and extend this point: otherwise `STATE_ROLLBACK`

        Raises `StateError`. *apply* may have seen records by then: throw away what it made.
        """
        rows = await backend.read(0, 1)
        if not rows:
            raise StateError(
                "STATE_ROLLBACK" if at_least else "STATE_MISSING",
                "there is no state in this storage",
                hint="name the storage that holds it; if it is lost, restore a copy",
            )
        number, row = rows[0]
        if number != 0:
            raise StateError("STATE_HEADER", "the journal has no header", expected="row 0", actual=f"row {number}")
        header = Header.open(state_key, row)
        journal = cls(backend, header, Sealer(state_key, header.state_id), next_head(bytes(32), row), apply)
        if at_least is not None:
            journal._must_extend(at_least)
        await journal._read_on(at_least)
        if at_least is not None and journal._seq < at_least.seq:
            raise _rolled_back("ends before the checkpoint", at_least.seq, journal._seq)
        journal._start()
        return journal

    # what there is

    @property
    def checkpoint(self) -> Checkpoint:
        """The end of what is known to be durable."""
        return Checkpoint(self._header.state_id, self._seq, self._head)

    @property
    def created(self) -> int:
        """Unix seconds by the clock of the enclave that made the journal."""
        return self._header.created

    @property
    def foreign_seq(self) -> int:
        """The number of the last record given to `apply`: what a decision made now has taken into account."""
        return self._foreign

    @property
    def failure(self) -> StateError | None:
        """Why the journal stopped, None while it works."""
        return self._failure

    async def replay(self) -> AsyncIterator[tuple[int, bytes]]:
        """Every record up to now, read and checked again, in pages: (number, record). Raises `StateError`."""
        end, head, seq = self.checkpoint, self._first_head, 0
        async with aclosing(self._rows(0, head)) as rows:
            while seq < end.seq and (row := await anext(rows, None)) is not None:
                seq, record, head, _ = row
                yield seq, record
        if seq != end.seq or head != end.head:
            raise _rolled_back("is not what this program read and wrote", end.seq, seq)

    # appending

    async def append(self, records: Sequence[bytes], *, foreign_seq: int | None = None) -> Checkpoint:
        """Store *records* together and return, once they are durable, the checkpoint behind the last of them.

        foreign_seq   `Journal.foreign_seq` when the caller decided to write this. If another enclave's record came
                      in since, nothing is written and `STATE_CONFLICT` tells to decide again; None: write anyhow.

        Waits for room in the queue. A caller cancelled there wrote nothing; a caller cancelled later wrote all.
        A crash keeps all or none. Raises `StateError`; after `STATE_UNAVAILABLE` either can be true.
        """
        size = _size(records)
        while not self._fits(len(records), size) and self._failure is None and not self._closing:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        return await self.submit(records, foreign_seq=foreign_seq)

    def submit(self, records: Sequence[bytes], *, foreign_seq: int | None = None) -> asyncio.Future[Checkpoint]:
        """As `append`, without waiting: the order of calls is the order of records. `STATE_BUSY` when there's no room.

        Once this has returned, the records will be written, whatever becomes of the future.
        """
        size = _size(records)
        if self._failure is not None or self._closing:
            raise self._closed()
        if not self._fits(len(records), size):
            raise _busy()
        return self._enqueue(tuple(bytes(r) for r in records), size, foreign_seq)

    async def catch_up(self) -> Checkpoint:
        """Give `apply` what other enclaves wrote up to now. Raises `StateError`."""
        if self._failure is not None or self._closing:
            raise self._closed()
        if not self._fits(1, 0):
            raise _busy()
        return await self._enqueue((), 0, None)

    async def close(self) -> None:
        """Write what was accepted, then let go of the backend. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._writer is not None:
            await asyncio.wait([self._writer])
        await self._backend.close()

    async def __aenter__(self) -> Journal:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # inside

    def _start(self) -> None:
        self._foreign = self._seq
        self._writer = asyncio.get_running_loop().create_task(self._write_all(), name="state journal")

    def _fits(self, records: int, size: int) -> bool:
        return self._queued + records <= MAX_QUEUED and self._queued_bytes + size <= MAX_QUEUED_BYTES

    def _enqueue(self, records: Sequence[bytes], size: int, foreign_seq: int | None) -> asyncio.Future[Checkpoint]:
        done: asyncio.Future[Checkpoint] = asyncio.get_running_loop().create_future()
        self._queue.append(_Append(records, size, foreign_seq, done))
        self._queued += max(1, len(records))
        self._queued_bytes += size
        self._wake.set()
        return done

    async def _write_all(self) -> None:
        """The writer: one write at a time, each with all that waits by then."""
        batch: list[_Append] = []
        try:
            while self._queue or not self._closing:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                batch = self._take()
                await self._write(batch)
                batch = []
        except StateError as err:
            self._fail(err, batch)
        except Exception as err:
            self._fail(StateError("STATE_CLOSED", "the journal's writer failed", actual=type(err).__name__), batch)
            assert self._failure is not None
            self._failure.__cause__ = err
        except asyncio.CancelledError:
            self._fail(StateError("STATE_CLOSED", "the journal's writer was cancelled"), batch)
            raise
        finally:
            self._let_in()

    def _take(self) -> list[_Append]:
        """As many whole appends as one write may hold, oldest first."""
        batch, rows, size = [self._queue.popleft()], 0, 0
        rows, size = len(batch[0].records), batch[0].size
        while self._queue:
            rows, size = rows + len(self._queue[0].records), size + self._queue[0].size
            if rows > MAX_BATCH or size > MAX_BATCH_BYTES:
                break
            batch.append(self._queue.popleft())
        self._queued -= sum(max(1, len(a.records)) for a in batch)
        self._queued_bytes -= sum(a.size for a in batch)
        self._let_in()
        return batch

    def _let_in(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def _write(self, batch: list[_Append]) -> None:
        if any(not a.records for a in batch):
            await self._read_on()
        while True:
            for old in [a for a in batch if a.foreign_seq is not None and a.foreign_seq < self._foreign]:
                batch.remove(old)
                _refuse(old.done, StateConflict(old.foreign_seq or 0, self._foreign))
            rows, ends = self._seal(batch)
            if not rows or await self._store(rows):
                break
        # Heads first, answers after: whoever wakes sees the journal as it is.
        for append, end in zip(batch, ends, strict=True):
            self._seq, self._head = end.seq, end.head
            if not append.done.done():
                append.done.set_result(end)
        batch.clear()

    def _seal(self, batch: list[_Append]) -> tuple[list[bytes], list[Checkpoint]]:
        """The rows of *batch* behind the present end, and the end of each append."""
        rows, ends, seq, head = list[bytes](), list[Checkpoint](), self._seq, self._head
        for append in batch:
            left = len(append.records)
            for record in append.records:
                seq, left = seq + 1, left - 1
                rows.append(self._sealer.seal(seq, head, record, more=left > 0))
                head = next_head(head, rows[-1])
            ends.append(Checkpoint(self._header.state_id, seq, head))
        return rows, ends

    async def _store(self, rows: Sequence[bytes]) -> bool:
        """Whether *rows* stand behind the present end. If not, what stands there has been applied."""
        first = self._seq + 1
        try:
            await self._backend.append(first, rows)
        except StateConflict:
            if await self._stands(first, rows):
                return True
            if await self._read_on() == 0:
                raise _rolled_back(
                    "does not end where this program left it, and nothing follows", first - 1, ""
                ) from None
            return False
        return True

    async def _stands(self, first: int, rows: Sequence[bytes]) -> bool:
        """Whether *rows* are stored from *first* on: a write whose answer was lost. Nonces make every row unique."""
        for done in range(0, len(rows), PAGE):
            part = rows[done : done + PAGE]
            stored = await self._backend.read(first + done, len(part))
            if stored != [(first + done + i, row) for i, row in enumerate(part)]:
                if done == 0 and (not stored or stored[0][1] != part[0]):
                    return False
                # Half of one write: taken for another enclave's, its records would be written twice.
                raise _rolled_back("holds a part of what this program wrote at once", first + len(rows) - 1, "less")
        return True

    async def _read_on(self, at_least: Checkpoint | None = None) -> int:
        """Check and apply what stands behind the present end; how many records that was."""
        count, more = 0, False
        async with aclosing(self._rows(self._seq, self._head)) as rows:
            async for seq, record, head, goes_on in rows:
                self._seq, self._head, self._foreign, more, count = seq, head, seq, goes_on, count + 1
                if at_least is not None:
                    self._must_extend(at_least)
                if self._apply is not None:
                    self._apply_foreign(seq, record) if self._writer else self._apply(seq, record)
        if more:
            raise StateError(
                "STATE_TRUNCATED",
                f"the append that ends with record {self._seq} is not whole",
                hint="rows were dropped from the end: restore the stored state from a copy",
            )
        if count == 0 and (last := await self._backend.last_seq()) < self._seq:
            raise _rolled_back("ends before what this program wrote", self._seq, last)
        return count

    def _apply_foreign(self, seq: int, record: bytes) -> None:
        assert self._apply is not None
        try:
            self._apply(seq, record)
        except Exception as err:
            what = f"record {seq}, written by another enclave, could not be applied"
            raise StateError("STATE_APPLY", what, actual=type(err).__name__) from err

    async def _rows(self, seq: int, head: bytes) -> AsyncGenerator[tuple[int, bytes, bytes, bool]]:
        """Rows behind (*seq*, *head*), opened: number, record, head there, whether the append goes on."""
        while page := await self._backend.read(seq + 1, PAGE):
            for number, blob in page:
                seq += 1
                if number != seq:
                    raise StateError(
                        "STATE_GAP",
                        "the journal's numbers do not follow one another",
                        expected=seq,
                        actual=number,
                        hint="rows were removed, repeated or reordered: restore the stored state from a copy",
                    )
                record, more = self._sealer.open(seq, head, blob)
                head = next_head(head, blob)
                yield seq, record, head, more

    def _must_extend(self, at_least: Checkpoint) -> None:
        if at_least.state_id != self._header.state_id:
            raise _rolled_back("is another one than the checkpoint's", at_least.state_id, self._header.state_id)
        if at_least.seq == self._seq and at_least.head != self._head:
            raise _rolled_back(f"took another course before record {self._seq}", at_least.head, self._head)

    def _fail(self, err: StateError, batch: list[_Append]) -> None:
        self._failure = err
        for append in (*batch, *self._queue):
            _refuse(
                append.done, StateError(err.code, err.reason, expected=err.expected, actual=err.actual, hint=err.hint)
            )
        self._queue.clear()
        self._queued = self._queued_bytes = 0

    def _closed(self) -> StateError:
        why = f"stopped earlier: {self._failure.code}" if self._failure is not None else "is closed"
        return StateError("STATE_CLOSED", f"the journal {why}", hint="open it again, into fresh state")


def _size(records: Sequence[bytes]) -> int:
    """Sealed bytes of an append. `STATE_TOO_LONG` beyond the caps of one write."""
    size = sum(sealed_size(len(r)) for r in records)
    if not 0 < len(records) <= MAX_BATCH or size > MAX_BATCH_BYTES:
        raise StateError(
            "STATE_TOO_LONG",
            "an append has no records, or too many",
            expected=f"1..{MAX_BATCH} records, <= {MAX_BATCH_BYTES} bytes sealed",
            actual=f"{len(records)} records, {size} bytes",
        )
    return size


def _busy() -> StateError:
    return StateError("STATE_BUSY", "too much waits to be stored", hint="try again in a moment")


def _refuse(done: asyncio.Future[Checkpoint], err: StateError) -> None:
    """Answer with *err*; a caller who no longer listens is no news for the event loop's log."""
    if not done.done():
        done.set_exception(err)
        done.exception()


def _rolled_back(what: str, expected: object, actual: object) -> StateError:
    return StateError(
        "STATE_ROLLBACK",
        f"the stored journal {what}",
        expected=expected,
        actual=actual,
        hint="the host set the state back or replaced it; see docs/operate.md, rollback suspected",
    )
