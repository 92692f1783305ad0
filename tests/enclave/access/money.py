"""A ledger in its world: a journal that keeps what was appended and can crash, a clock, prices, and ways to ask."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from enclave.access.budgets import Budgets
from enclave.access.entries import Entry
from enclave.access.ledger import Ledger, Reservation
from enclave.access.pages import Question, page
from enclave.access.prices import Price, PriceTable, Usage

NOON = 1_795_608_000
"""2026-11-25 12:00:00 UTC."""
PRICES = PriceTable(
    {
        "parrot": Price(150_000_000, 75_000_000, 600_000_000),
        "magpie": Price(12_300_001, 7_700_001, 0, 1000),
        "free": Price(0, 0, 0),
    }
)


class Crash(Exception):
    """The machine stopped."""


class Stored:
    """What is durable, and an appender that can stop before, in the middle of, or after making it so."""

    def __init__(self, records: Sequence[bytes] = ()) -> None:
        self.records = list(records)
        self.calls = self.longest = 0
        self.crash_at: str | None = None
        """`before`, `after`: the next append ends in a Crash."""
        self.gate: asyncio.Event | None = None
        self.wrote = asyncio.Event()

    async def append(self, records: Sequence[bytes]) -> None:
        self.calls, self.longest = self.calls + 1, max(self.longest, len(records))
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.crash_at != "before":
            self.records += records
            self.wrote.set()
        if self.crash_at is not None:
            raise Crash
        await asyncio.sleep(0)

    def settled(self) -> list[dict[str, Any]]:
        """The `settled` records, read without the code under test."""
        read = [json.loads(raw) for raw in self.records]
        return [r for r in read if r["record"] == "settled"]


class World:
    """Open with `await World().open()`; `await world.again()` after a crash."""

    def __init__(self, now: int = NOON, prices: PriceTable = PRICES) -> None:
        self.now, self.prices, self.stored = now, prices, Stored()
        self.ledger: Ledger
        self.requests = 0

    async def open(self) -> World:
        self.ledger = await Ledger.open(self.stored.records, self.stored.append, self.prices, lambda: self.now)
        return self

    async def again(self) -> World:
        """The next process: only what is durable is left."""
        self.stored = Stored(self.stored.records)
        return await self.open()

    async def reserve(
        self, amount: int = 10**9, *, project: str = "proj_a", key: str = "key_1", model: str = "parrot",
        budgets: Budgets | None = None, id: str | None = None,
    ) -> Reservation:  # fmt: skip
        self.requests += 1
        return await self.ledger.reserve(
            id or f"rcpt-{self.requests}", project=project, key_id=key, model=model,
            operation="embeddings" if model == "magpie" else "completions", amount=amount, budgets=budgets or Budgets(),
        )  # fmt: skip

    def ask(self, kind: Any, **how: Any) -> dict[str, Any]:
        """One page. *how*: query parameters; lists as lists."""
        pairs = [(n, str(v)) for n, value in how.items() for v in (value if isinstance(value, list) else [value])]
        return page(self.ledger.usage, Question.parse(kind, pairs, now=self.ledger.now()))

    def results(self, kind: Any, **how: Any) -> list[dict[str, Any]]:
        """The results of all pages, bucket by bucket."""
        found, cursor = [], {}
        while True:
            answer = self.ask(kind, **how, **cursor)
            for bucket in answer["data"]:
                found += [{**r, "at": bucket["start_time"]} for r in bucket["results"]]
            if not answer["has_more"]:
                return found
            cursor = {"page": answer["next_page"]}

    def costs(self, **how: Any) -> int:
        """nano-USD of the costs page from the first day of *NOON*'s year on."""
        how = {"start_time": self.now - 400 * 86_400, "limit": 180, **how}
        return sum(nano(r) for r in self.results("costs", **how))


async def opened(records: list[bytes], prices: PriceTable = PRICES) -> Ledger:
    """A ledger over *records*, which grow."""
    world = World(prices=prices)
    world.stored.records = records
    return (await world.open()).ledger


def nano(result: dict[str, Any]) -> int:
    """The integer behind a result of the costs page."""
    return round(result["amount"]["value"] * 10**9)


def receipt(entry: Entry) -> bytes:
    """What stands for a receipt's digest."""
    return hashlib.sha256(b"receipt" + entry.encode()).digest()


def some_usage(seed: random.Random, most: int = 200) -> Usage:
    inputs, outputs = seed.randrange(most), seed.randrange(most)
    return Usage(inputs, seed.randint(0, inputs), outputs, seed.randint(0, outputs))
