"""The ledger: reserve before the engine sees a request, settle after it, exactly once, in nano-USD.

Runs in the enclave, in one event loop. All numbers come from one list of records (`enclave.access.entries`) in the
journal; opening replays them through the same code that wrote them. Every change is made in one step of the event loop
and its record takes its place in the journal's order in that same step. So any durable beginning of the journal is a
state that was true, in which every budget held; concurrency and crashes add nothing to what must be proven.

What is durable when:

* An **entry** is durable when `settle` returns. Before that it counts against budgets and shows in sums, but nobody
  may be given its receipt. Entries that nobody waits for are written together, a few hundredths of a second later.
* A **reservation** is not waited for: a write in front of every request would cost milliseconds and bring nothing, for
  after a crash a request without a durable figure is charged 0 with or without a record of it. Reservations bound what
  the living may spend, and a crash ends them all.
* **Figures** of what is being served become durable at every `flush`, which `run` makes once per second. A crash loses
  at most what the engine did since: to the operator's cost, never to a tenant's.

When a ledger is opened, each request that was being served is settled at its last durable figure, outcome
`gateway_restart`, before anything else is done. One ledger has one writer: replicas divide the projects among them.

    LEDGER_BUDGET     does not fit into a spend limit          LEDGER_FULL    too many requests are being served
    LEDGER_DUPLICATE  the request id is being served           LEDGER_FAILED  the journal failed: all is over
    LEDGER_CLOSED     closed                                   LEDGER_VALUE   an id or amount that no record can hold
    LEDGER_RECORD     a record cannot be read                  LEDGER_CHAIN   a record does not follow those before
    LEDGER_TABLE      an entry does not fit its price table    LEDGER_TIME    an entry is older than the one before
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from enclave.access.budgets import Budgets, Spend, Spending
from enclave.access.entries import (
    MINUTE,
    OUTCOMES,
    UNBILLED,
    Entry,
    Held,
    LedgerError,
    Operation,
    Outcome,
    Progress,
    Record,
    Settled,
    check_held,
    decode_record,
    encode_record,
    follows,
    genesis,
)
from enclave.access.prices import ZERO, Lines, Price, PriceTable, Usage
from enclave.access.usage import UsageIndex
from enclave.access.writer import Append, Writer

__all__ = ["LAG_SECONDS", "Ledger", "MakeReceipt", "Reservation"]

LAG_SECONDS: Final = 1.0
MAX_OPEN: Final = 65_536

MakeReceipt = Callable[[Entry], bytes]
"""Given the entry without its receipt, makes and signs the receipt and returns its SHA-256. Must not block."""


class Reservation:
    """A request being served. Made by `Ledger.reserve`; settle it on every way out."""

    def __init__(self, ledger: Ledger, held: Held, table: PriceTable) -> None:
        self._ledger, self.held, self.table = ledger, held, table
        self._usage: Usage | Callable[[], Usage] = ZERO
        self.told: Usage | None = None
        self.entry: Entry | None = None
        self.durable: asyncio.Future[None] | None = None

    @property
    def amount(self) -> int:
        """nano-USD that are reserved: no more than this will be charged."""
        return self.held.amount

    @property
    def usage(self) -> Usage:
        """What it has used by now."""
        return self._usage() if callable(self._usage) else self._usage

    def progress(self, usage: Usage | Callable[[], Usage]) -> None:
        """What it has used by now, all told, or who can say so at any time. The last one given counts; after `settle`
        none does."""
        self._usage = usage

    def finish(self, outcome: Outcome, usage: Usage | None = None, receipt: MakeReceipt | None = None) -> Entry:
        """`settle` without waiting: `wait` returns when the entry is durable. Until then nobody may be given its
        receipt."""
        if self.entry is None:  # exactly once: whoever comes second gets what the first made
            self._ledger._finish(self, outcome, usage, receipt)
        assert self.entry is not None
        return self.entry

    async def settle(self, outcome: Outcome, usage: Usage | None = None, receipt: MakeReceipt | None = None) -> Entry:
        """Charge *usage* (None: the last figure of `progress`), once; returns the durable entry.

        `upstream_error` and `refused` charge nothing. A second call changes nothing and returns the first one's entry.
        Cancelling the caller does not undo it. Raises `LedgerError`: what is durable then, the next opening tells.
        """
        entry = self.finish(outcome, usage, receipt)
        await self.wait()
        return entry

    async def wait(self) -> None:
        """Until the entry is durable; it is written now, if it has been waiting for others. Raises `LedgerError`."""
        if self.durable is not None and not self.durable.done():
            self._ledger._hurry()
            await asyncio.shield(self.durable)
        elif self.durable is not None:
            self.durable.result()


class Ledger:
    """See the module. Make one, `replay` every record of the journal, then `begin`; `open` does all three.

    prices      the table in force;  usage   sums for the usage and cost pages
    recovered   entries that `begin` made for requests that a crash cut off
    overruns    how often an engine used more than was reserved, which the operator pays: an alarm if above 0
    """

    def __init__(self, prices: PriceTable, clock: Callable[[], int]) -> None:
        self.prices, self.usage, self.overruns = prices, UsageIndex(), 0
        self.recovered: tuple[Entry, ...] = ()
        self._clock, self._time = clock, 0
        self._writer: Writer | None = None
        self._closed = False
        self._spending = Spending()
        self._open: dict[str, Reservation] = {}
        self._left: dict[str, Held] = {}
        self._heads: dict[str, tuple[int, bytes]] = {}
        self._tables: dict[bytes, PriceTable] = {}
        self._last_table: bytes | None = None
        self._last_prices: dict[str, Price] = {}

    @classmethod
    async def open(
        cls, records: Iterable[bytes], append: Append, prices: PriceTable, clock: Callable[[], int]
    ) -> Ledger:
        """The ledger whose records so far are *records*, oldest first. *clock* gives unix seconds.

        Raises `LedgerError` for records that cannot be trusted, `InputError` when *prices* jump unconfirmed.
        """
        ledger = cls(prices, clock)
        for raw in records:
            ledger.replay(raw)
        await ledger.begin(append)
        return ledger

    # serving

    async def reserve(
        self, request_id: str, *, project: str, key_id: str, model: str, operation: Operation, amount: int,
        budgets: Budgets,
    ) -> Reservation:  # fmt: skip
        """Let a request in that will cost at most *amount* nano-USD (`PriceTable.ceiling`). Waits for nothing.

        request_id   unique for ever; *budgets* are the limits at this moment

        Raises `BudgetExceeded`, `PriceError`, `LedgerError`; nothing is reserved then.
        """
        self._checked_writer()
        self.prices.price(model)
        held = check_held(Held(request_id, project, key_id, model, operation, self.prices.digest, amount, ZERO))
        if request_id in self._open:
            raise LedgerError("LEDGER_DUPLICATE", "a request with this id is being served")
        if len(self._open) >= MAX_OPEN:
            raise LedgerError("LEDGER_FULL", "too many requests are being served", expected=f"<= {MAX_OPEN}")
        self._spending.reserve(project, amount, budgets, self.now())
        made = self._open[request_id] = Reservation(self, held, self.prices)
        return made

    def spend(self, project: str | None = None) -> Spend:
        """What *project* (None: the organisation) spent this month and has reserved: the numbers of the check."""
        return self._spending.of(project, self.now())

    def now(self) -> int:
        """Unix seconds; never back, or last month's budget could be spent again."""
        self._time = max(self._time, self._clock())
        return self._time

    async def flush(self) -> None:
        """Make the present figure of every open request durable. Raises `LedgerError`."""
        writer = self._checked_writer()
        last: asyncio.Future[None] | None = None
        for r in self._open.values():
            usage = r.usage
            if usage != r.told:
                first = r.told is None
                record: Record = replace(r.held, usage=usage) if first else Progress(r.held.request_id, usage)
                last, r.told = writer.put(encode_record(record)), usage
        if last is not None:
            writer.hurry()
            await asyncio.shield(last)

    async def run(self, lag: float = LAG_SECONDS) -> None:
        """Flush every *lag* seconds until cancelled. Raises `LedgerError` when the journal fails: stop serving then."""
        while True:
            await asyncio.sleep(lag)
            await self.flush()

    async def close(self) -> None:
        """Let nothing more in, settle what is open at its last figure, wait until all is durable. Idempotent."""
        if self._writer is None:
            return
        self._closed = True
        for r in list(self._open.values()):
            self._finish(r, "gateway_restart", None, None)
        await self._writer.idle()
        self._writer.check()

    # settling

    def _finish(self, r: Reservation, outcome: Outcome, usage: Usage | None, receipt: MakeReceipt | None) -> None:
        """In one step: entry, receipt, sums, and the record's place in the journal. All of it, or an exception."""
        assert self._writer is not None  # there are reservations only after `begin`
        self._writer.check()
        if outcome not in OUTCOMES:
            raise ValueError("no such outcome")
        figure = ZERO if outcome in UNBILLED else r.usage if usage is None else usage
        full = r.table.lines(r.held.model, figure)
        entry, lines = self._draft(r.held, figure, outcome, full)
        if receipt is not None:
            entry = replace(entry, receipt=_digest(receipt(entry)))
        r.durable = self._writer.put(encode_record(Settled(r.held.request_id, entry)))
        r.entry = entry
        self.overruns += full.total > r.amount
        self._spending.release(r.held.project, r.amount)
        del self._open[r.held.request_id]
        self._enter(entry, lines)

    def _draft(self, held: Held, usage: Usage, outcome: Outcome, full: Lines) -> tuple[Entry, Lines]:
        """The entry that comes next in the project, without a receipt, and its cost by lines."""
        lines = full.at_most(held.amount)
        seq, head = self._head(held.project)
        entry = Entry(
            seq=seq + 1, time=self.now() // MINUTE * MINUTE, project=held.project, key_id=held.key_id,
            model=held.model, operation=held.operation, usage=usage, outcome=outcome, price_table=held.price_table,
            cost=lines.total, receipt=None, previous=head,
        )  # fmt: skip
        return entry, lines

    def _enter(self, entry: Entry, lines: Lines) -> None:
        """Count *entry* in everything that is a sum of entries. Serving and replay meet here."""
        self._heads[entry.project] = (entry.seq, entry.hash)
        self._spending.charge(entry.project, entry.cost, entry.time)
        self.usage.add(entry, lines)

    def _head(self, project: str) -> tuple[int, bytes]:
        return self._heads.get(project) or (0, genesis(project))

    def _hurry(self) -> None:
        if self._writer is not None:
            self._writer.hurry()

    def _checked_writer(self) -> Writer:
        if self._writer is None or self._closed:
            raise LedgerError("LEDGER_CLOSED", "the ledger is not open")
        self._writer.check()
        return self._writer

    # opening

    def replay(self, raw: bytes) -> None:
        """Take in one record of the journal. Raises `LedgerError`; throw the ledger away then."""
        if self._writer is not None:
            raise LedgerError("LEDGER_CHAIN", "a record comes from elsewhere: a ledger has one writer")
        record = decode_record(raw)
        match record:
            case PriceTable():
                self._in_force(record)
            case Held():
                self._table(record.price_table, record.model)
                if record.request_id in self._left:
                    raise LedgerError("LEDGER_CHAIN", "a request was begun twice")
                self._left[record.request_id] = record
            case Progress():
                if record.request_id not in self._left:
                    raise LedgerError("LEDGER_CHAIN", "a request makes progress that is not being served")
                self._left[record.request_id] = replace(self._left[record.request_id], usage=record.usage)
            case Settled():
                self._replay_entry(record.entry)
                self._left.pop(record.request_id, None)

    def _replay_entry(self, entry: Entry) -> None:
        follows(entry, *self._head(entry.project))
        if entry.time < self._time:
            raise LedgerError("LEDGER_TIME", "an entry is older than the one before", expected=f">= {self._time}",
                              actual=entry.time)  # fmt: skip
        lines = self._table(entry.price_table, entry.model).lines(entry.model, entry.usage)
        if entry.cost > lines.total:
            raise LedgerError("LEDGER_TABLE", "an entry costs more than its price table says")
        self._time = entry.time
        self._enter(entry, lines.at_most(entry.cost))

    def _table(self, digest: bytes, model: str) -> PriceTable:
        table = self._tables.get(digest)
        if table is None or model not in table.models:
            raise LedgerError("LEDGER_TABLE", "a record names a price table that was never in force, or not its model")
        return table

    def _in_force(self, table: PriceTable) -> None:
        self._tables[table.digest] = table
        self._last_table = table.digest
        self._last_prices.update(table.models)

    async def begin(self, append: Append) -> None:
        """Bring the present prices into force, settle what a crash cut off, return when both are durable.

        Raises `LedgerError`, and `InputError` when the prices jump unconfirmed.
        """
        writer = Writer(append)
        waiting: list[asyncio.Future[None]] = []
        if self._last_table != self.prices.digest:
            if self._last_table is not None:
                self.prices.must_follow(self._last_table, self._last_prices)
            self._in_force(self.prices)
            waiting.append(writer.put(encode_record(self.prices)))
        made: list[Entry] = []
        for held in self._left.values():
            full = self._tables[held.price_table].lines(held.model, held.usage)
            entry, lines = self._draft(held, held.usage, "gateway_restart", full)
            waiting.append(writer.put(encode_record(Settled(held.request_id, entry))))
            self._enter(entry, lines)
            made.append(entry)
        self._left.clear()
        self.recovered = tuple(made)
        writer.hurry()
        for done in waiting:
            await asyncio.shield(done)
        self._writer = writer


def _digest(value: bytes) -> bytes:
    if not isinstance(value, bytes) or len(value) != 32:
        raise ValueError("a receipt's digest is 32 bytes")
    return value
