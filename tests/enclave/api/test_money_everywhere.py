"""One ledger, seen from every side: what the receipts say, what the journal keeps, what the usage and cost pages show,
and what the callers were given are the same number, through the whole gateway.

Random traffic goes in on every route, from several projects with budgets and limits, while engines fail, callers hang
up, keys are revoked in mid-answer, and the machine stops: what is durable then is all that the next boot has.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from enclave.access.entries import Settled, decode_record
from enclave.access.pages import Page, Question, page
from enclave.access.prices import CENT, PriceTable, Usage
from enclave.access.records import ModelLimit
from enclave.api.app import Gateway
from enclave.engine.echo import EchoEngine
from enclave.receipts import ReceiptStore
from enclave.tenancy import Slots, Tenancy
from tests.enclave.api.client import Caller, Reply
from tests.enclave.api.serving import Memory, custody_of, gateway_of, prices

OPERATIONS: Final = 10_000
WORLDS: Final = 4
AT_ONCE: Final = 24
NOON: Final = 1_795_608_000
MODELS: Final = {"parrot": "generate", "second": "generate", "magpie": "embed"}
STATE_KEY: Final = bytes(range(32))
FAULTS: Final = ("reject", "crash", "raise", "error-event", "error-first", "no-done", "no-usage", "no-stream")


class Book(ReceiptStore):
    """Keeps every receipt that was made, with the future that says whether its entry is durable."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[bytes, Any]] = []  # Any: a reservation's `wait`

    def add(self, receipt_id: str, raw: bytes, **how: Any) -> None:
        self.made.append((raw, how.get("durable")))
        super().add(receipt_id, raw, **how)


@dataclass
class Truth:
    """What the world outside knows, over all boots."""

    receipts: list[bytes] = field(default_factory=list)
    delivered: Counter[str] = field(default_factory=Counter)
    """receipt id → output tokens that its caller was given"""
    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    crashes: int = 0


class World:
    """Boots of one enclave over one storage; `crash` is a power failure."""

    def __init__(self, seed: int) -> None:
        self.random, self.truth, self.storage = random.Random(seed), Truth(), Memory()
        self.now = NOON
        self.table: PriceTable = prices(*MODELS, input=7_234_567_891, cached=77_777_777, output=49_876_543_211)
        self.keys: list[tuple[str, str]] = []
        self.tenancy: Tenancy
        self.gateway: Gateway
        self.engines: dict[str, EchoEngine] = {}
        self.records: list[bytes] = []
        self.book = Book()

    async def boot(self, *, first: bool = False) -> None:
        how = (STATE_KEY, self.table, {id: Slots(8, 64) for id in MODELS}, lambda: self.now)
        if first:
            self.tenancy = await Tenancy.create(self.storage, *how)
            for number in range(4):
                await self._project(number)
        else:
            self.tenancy = await Tenancy.open(self.storage, how[0], None, *how[1:])
        self.engines = {}
        for id, task in MODELS.items():
            self.engines[id] = EchoEngine(id, "embed" if task == "embed" else "generate")
            await self.engines[id].start()
        self.book = Book()
        self.gateway = gateway_of(custody_of(self.tenancy), list(self.engines.values()), receipts=self.book)

    async def _project(self, number: int) -> None:
        organization = self.tenancy.organization
        project = await organization.create_project("test", f"project {number}")
        if number:
            await organization.update_project("test", project.id, spend_limit_cents=number * 3)
        if number == 2:
            await organization.set_limit("test", project.id, "parrot", ModelLimit(max_tokens_per_1_minute=200))
        account = await organization.create_account("test", project.id, "account")
        for name in ("a", "b"):
            key, made = await organization.create_key("test", account.id, name)
            self.keys.append((key.id, made.value))

    async def crash(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """Nothing that is not stored is left. What was being served ends without a word."""
        rows = list(self.storage.rows)
        self._collect()
        self.storage.broken = True
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        self.book.made.clear()
        old, self.storage = self.tenancy, Memory()
        self.storage.rows = rows
        self.truth.crashes += 1
        with contextlib.suppress(Exception):
            await old.close()
        await self.boot()

    def _collect(self) -> None:
        """Receipts that could have been given to somebody: those whose entry is durable."""
        for raw, wait in self.book.made:
            durable = None if wait is None else wait.__self__.durable
            if durable is not None and durable.done() and not durable.cancelled() and durable.exception() is None:
                self.truth.receipts.append(raw)
        self.book.made.clear()

    async def one(self) -> None:
        """One request, whatever becomes of it."""
        r = self.random
        id, value = r.choice(self.keys)
        words = " ".join(f"w{n}" for n in range(r.randint(1, 12)))
        path, document = _request(r, words)
        engine = self.engines[document["model"]]
        engine.fault = r.choice(FAULTS) if r.random() < 0.12 else ""  # type: ignore[assignment]  # one of FAULTS
        engine.delay = 0.0005 if r.random() < 0.2 else 0.0
        caller = Caller(self.gateway, key=value)
        leaves = r.randint(1, 4) if r.random() < 0.15 else None
        reply = await caller.post(path, document, hang_up_after=leaves)
        if reply.status >= 400:
            self.truth.refused[json.loads(reply.body)["error"]["code"] or ""] += 1
        self._note(path, reply)
        if r.random() < 0.01:
            with contextlib.suppress(Exception):  # another request may have done the same
                await self.tenancy.organization.revoke_key("test", id)
                self.keys.remove((id, value))
        if len(self.keys) < 6:
            account = r.choice(list(self.tenancy.organization.accounts.values()))
            key, made = await self.tenancy.organization.create_key("test", account.id, "more")
            self.keys.append((key.id, made.value))

    def _note(self, path: str, reply: Reply) -> None:
        """What the caller of a plain stream can count for itself: one token of the echo per event with text."""
        streamed = reply.headers.get("content-type", "").startswith("text/event-stream")
        if streamed and path in ("/v1/chat/completions", "/v1/completions"):
            self.truth.delivered[reply.headers["x-receipt-id"]] = reply.body.count(b'"choices":[{')

    async def run(self, operations: int) -> None:
        left, every = operations, operations // 12
        while left > 0:
            batch = min(left, every)
            left -= batch
            todo = iter(range(batch))

            async def work(todo: Any = todo) -> None:
                for _ in todo:
                    await self.one()

            workers = [asyncio.create_task(work()) for _ in range(AT_ONCE)]
            if left and self.random.random() < 0.7:
                await asyncio.sleep(self.random.random() * 0.2)
                if self.random.random() < 0.5:
                    await self.tenancy.ledger.flush()
                await self.crash(workers)
                left += sum(1 for _ in todo)
            else:
                await asyncio.gather(*workers)
            self.check_budgets()
            self.now += self.random.randint(0, 50_000)
        await self.settled()

    async def settled(self) -> None:
        await asyncio.sleep(0)
        for queue in self.tenancy.queues.values():
            assert (queue.running, queue.waiting) == (0, 0), "a turn was lost"
        await self.tenancy.ledger.close()
        self._collect()

    # what must hold

    def check_budgets(self) -> None:
        for project in self.tenancy.organization.projects.values():
            spend = self.tenancy.ledger.spend(project.id)
            if project.spend_limit_cents is not None:
                assert spend.spent + spend.reserved <= project.spend_limit_cents * CENT, "a budget is exceeded"

    def entries(self) -> list[Any]:
        """From what is stored, opened with the key and read as the next boot would."""
        seen: list[Any] = []
        for record in self.records:
            if record[:1] == b"l":
                decoded = decode_record(record[1:])
                if isinstance(decoded, Settled):
                    seen.append(decoded.entry)
        return seen

    async def read_back(self) -> None:
        self.records = [record async for _, record in self.tenancy._journal.replay()]

    def check(self) -> None:
        entries = self.entries()
        total = sum(e.cost for e in entries)
        by_digest = {e.receipt: e for e in entries if e.receipt is not None}
        assert len(by_digest) == sum(e.receipt is not None for e in entries)
        told = 0
        for raw in self.truth.receipts:
            entry = by_digest.pop(hashlib.sha256(raw).digest())  # every receipt given out has its entry, and one
            document = json.loads(raw)
            (metered,) = [e for e in document["event_log"] if e["type"] == "x.usage.metered"]
            usage = Usage(
                *(metered[n] for n in ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens"))
            )
            assert (usage, metered["cost_nanousd"]) == (entry.usage, entry.cost), "a receipt says something else"
            assert metered["cost_nanousd"] == self.table.lines(document["model"], usage).total
            assert metered["ledger_seq"] == entry.seq and metered["outcome"] == entry.outcome
            self.truth.outcomes[entry.outcome] += 1
            self._delivered(document, metered)
            told += entry.cost
        silent = [e for e in entries if e.receipt is None or e.receipt in by_digest]
        assert told + sum(e.cost for e in silent) == total
        odd = [e for e in silent if e.receipt is None and e.outcome != "gateway_restart"]
        assert not odd, odd
        self._pages(entries, total)

    def _delivered(self, document: dict[str, Any], metered: dict[str, Any]) -> None:
        given = self.truth.delivered.pop(document["receipt_id"], None)
        if given is not None and metered["outcome"] not in ("upstream_error", "refused"):
            assert metered["output_tokens"] == given, "charged for what was not delivered, or not for what was"

    def _pages(self, entries: list[Any], total: int) -> None:
        day, usage = NOON - 86_400, self.tenancy.ledger.usage
        costs = sum(
            round(r["amount"]["value"] * 10**9) for r in self._results("costs", day, ["line_item", "api_key_id"])
        )
        assert costs == total == sum(e.cost for e in entries), "the cost pages say something else"
        for kind in ("completions", "embeddings"):
            rows = self._results(kind, day, ["project_id", "model"])  # type: ignore[arg-type]  # one of Page
            of = [e for e in entries if e.operation == kind]
            assert sum(r["num_model_requests"] for r in rows) == len(of)
            assert sum(r["input_tokens"] for r in rows) == sum(e.usage.input_tokens for e in of)
            if kind == "completions":
                assert sum(r["output_tokens"] for r in rows) == sum(e.usage.output_tokens for e in of)
        assert usage is self.tenancy.ledger.usage

    def _results(self, kind: Page, start: int, groups: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        more: list[tuple[str, str]] = []
        while True:
            pairs = [("start_time", str(start)), *(("group_by", g) for g in groups), *more]
            answer = page(self.tenancy.ledger.usage, Question.parse(kind, pairs, now=self.tenancy.ledger.now()))
            found += [r for bucket in answer["data"] for r in bucket["results"]]
            if not answer["has_more"]:
                return found
            more = [("page", answer["next_page"])]


def _request(r: random.Random, words: str) -> tuple[str, dict[str, Any]]:
    stream = r.random() < 0.5
    model = r.choice(("parrot", "second"))
    most = r.choice((None, 1, 3, 20))
    kind = r.random()
    if kind < 0.15:
        return "/v1/embeddings", {"model": "magpie", "input": r.choice((words, [words, "x y"], [1, 2, 3]))}
    document: dict[str, Any] = {"model": model, "stream": stream}
    if stream and r.random() < 0.5:
        document["stream_options"] = {"include_usage": True}
    if most is not None:
        document["max_tokens"] = most
    if r.random() < 0.2:
        document["n"] = r.randint(1, 3)
    if kind < 0.35:
        return "/v1/completions", {**document, "prompt": words}
    return "/v1/chat/completions", {**document, "messages": [{"role": "user", "content": words}]}


async def drive(seed: int, operations: int) -> World:
    world = World(seed)
    await world.boot(first=True)
    await world.run(operations)
    await world.read_back()
    world.check()
    await world.tenancy.close()
    return world


@pytest.mark.timeout(300)
async def test_not_one_nano_dollar_of_difference() -> None:
    outcomes, refused, crashes = Counter[str](), Counter[str](), 0
    for number in range(WORLDS):
        world = await drive(1000 + number, OPERATIONS // WORLDS)
        outcomes += world.truth.outcomes
        refused += world.truth.refused
        crashes += world.truth.crashes
    # The traffic was what it should be: nothing below is rare.
    assert crashes >= WORLDS
    assert {"completed", "client_disconnected", "upstream_error", "refused"} <= outcomes.keys()
    assert min(refused["insufficient_quota"], refused["rate_limit_exceeded"], refused["invalid_api_key"]) > 0, refused
