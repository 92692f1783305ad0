"""The money property: whatever happens, ledger, receipts, usage page and costs page say the same to the nano-dollar.

Thousands of random operations (reserve, progress, settle, disconnect, engine failure, crash and reopen, time passing
over the ends of months) on many projects and keys, against a model that knows only what it was told and what is
durable. The journal is read without the code under test. A second test takes the defences out and wants the property
to break.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from enclave.access.budgets import BudgetExceeded, Budgets, Spending
from enclave.access.entries import Entry, LedgerError, Outcome
from enclave.access.ledger import Ledger, Reservation
from enclave.access.prices import CENT, ZERO, Usage
from enclave.access.writer import Append
from tests.enclave.access.money import World, nano, receipt, some_usage

OPERATIONS: Final = 10_000
WORLDS: Final = 5
SEED: Final = 20_261_125
PROJECTS: Final = ("proj_a", "proj_b", "proj_c", "proj_d")
LIMITS: Final = {"proj_a": 12, "proj_b": 6, "proj_c": None, "proj_d": 4}
ORGANIZATION_LIMIT: Final = 25
MODELS: Final = ("parrot", "parrot", "magpie", "free")
FINISHES: Final[tuple[Outcome, ...]] = (
    "completed", "completed", "completed", "client_disconnected", "upstream_error", "refused",
)  # fmt: skip


@dataclass
class Told:
    """What the test knows of one request."""

    reservation: Reservation
    flushed: Usage | None = None
    settling: bool = False
    returned: Entry | None = None


@dataclass
class Traffic:
    """Random operations, and what must come out of them."""

    world: World
    seed: random.Random
    requests: dict[str, Told] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    receipts: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    refused: int = 0
    recovered: int = 0

    async def step(self) -> None:
        roll, seed = self.seed.random(), self.seed
        if roll < 0.42:
            await self.reserve()
        elif roll < 0.64 and self.open:
            self.requests[seed.choice(self.open)].reservation.progress(some_usage(seed, 30_000))
        elif roll < 0.84 and self.open:
            await self.settle(seed.randint(1, 3))
        elif roll < 0.94:
            await self.world.ledger.flush()
            for id in self.open:
                self.requests[id].flushed = self.requests[id].reservation.usage
        elif roll < 0.989:
            self.world.now += seed.choice((1, 59, 3600, 86_400, 3 * 86_400, -86_400))
        elif roll < 0.991:
            await self.close()
        else:
            await self.crash()

    async def reserve(self) -> None:
        world, seed = self.world, self.seed
        project, model = seed.choice(PROJECTS), seed.choice(MODELS)
        most = seed.choice((200, 8000, 30_000))
        amount = world.prices.ceiling(model, most, most)
        budgets = Budgets(ORGANIZATION_LIMIT, LIMITS[project])
        shown = [world.ledger.spend(None), world.ledger.spend(project)]
        fits = all(
            limit is None or s.spent + s.reserved + amount <= limit * CENT
            for s, limit in zip(shown, (budgets.organization, budgets.project), strict=True)
        )
        try:
            made = await world.reserve(
                amount, project=project, key=f"key_{seed.randrange(3)}", model=model, budgets=budgets
            )
        except BudgetExceeded:
            assert not fits, "refused, though the numbers shown had room"
            self.refused += 1
            return
        assert fits, "let in, though the numbers shown had no room"
        self.requests[made.held.request_id] = Told(made)
        self.open.append(made.held.request_id)

    async def settle(self, count: int) -> None:
        """Several at once, some of them twice."""
        chosen = self.seed.sample(self.open, min(count, len(self.open)))
        await asyncio.gather(*(self.finish(id) for id in chosen for _ in range(self.seed.choice((1, 1, 2)))))

    async def finish(self, id: str) -> None:
        told, outcome = self.requests[id], self.seed.choice(FINISHES)
        usage = None if outcome == "client_disconnected" else some_usage(self.seed, 30_000)

        def sign(entry: Entry) -> bytes:
            self.receipts[id] += entry.cost
            return receipt(entry)

        told.settling = True
        if id in self.open:
            self.open.remove(id)
        try:
            entry = await told.reservation.settle(outcome, usage, sign)
        except LedgerError as err:
            assert err.code == "LEDGER_FAILED", err
            return
        assert told.returned in (None, entry), "two answers for one request"
        told.returned = entry

    async def close(self) -> None:
        """An orderly stop: every open request is settled, durably."""
        await self.world.ledger.close()
        for id in self.open:
            told = self.requests[id]
            told.settling, told.returned = True, told.reservation.entry
        self.open.clear()
        await self.again()

    async def crash(self) -> None:
        self.crashes += 1
        self.world.stored.crash_at = self.seed.choice(("before", "after"))
        for id in self.seed.sample(self.open, min(5, len(self.open))):
            await self.finish(id)
        await self.again()
        self.open.clear()

    async def again(self) -> None:
        """Open anew; sometimes the machine stops while it opens."""
        while self.seed.random() < 0.3:
            stored = self.world.stored = type(self.world.stored)(self.world.stored.records)
            stored.crash_at = self.seed.choice(("before", "after"))
            try:
                await Ledger.open(stored.records, stored.append, self.world.prices, lambda: self.world.now)
            except LedgerError:
                continue
        await self.world.again()

    def check(self) -> None:
        """Everything that must hold, at this moment, when nothing is on its way."""
        settled = self.world.stored.settled()
        by_id = {r["id"]: r["entry"] for r in settled}
        assert len(by_id) == len(settled), "a request was settled twice"
        durable = {id: told for id, told in self.requests.items() if id in by_id}
        for id, told in self.requests.items():
            if told.returned is not None:
                assert by_id.get(id) == told.returned.document(), "an entry that was returned is lost or changed"
                assert self.receipts[id] == told.returned.cost or told.returned.receipt is None
            elif told.flushed is not None and id not in self.open:
                assert id in by_id, "a request with a durable figure was forgotten"
        self.recovered = 0
        for id, told in durable.items():
            if by_id[id]["outcome"] == "gateway_restart" and told.returned is None:
                self.recovered += 1
                assert _usage(by_id[id]) == told.flushed, "not the last durable figure"
            elif told.returned is None:
                assert told.settling and by_id[id]["cost_nanousd"] == self.receipts[id]
        self.check_sums([r["entry"] for r in settled])

    def check_sums(self, entries: list[dict[str, Any]]) -> None:
        world, total = self.world, sum(e["cost_nanousd"] for e in entries)
        since = {"start_time": 1_790_000_000}
        assert world.costs(**since, limit=180) == total
        months: Counter[tuple[str, str]] = Counter()
        projects: Counter[str] = Counter()
        for e in entries:
            month = datetime.fromtimestamp(e["time"], UTC).strftime("%Y-%m")
            months[month, e["project"]] += e["cost_nanousd"]
            months[month, ""] += e["cost_nanousd"]
            projects[e["project"]] += e["cost_nanousd"]
        for (month, project), cost in months.items():
            limit = LIMITS[project] if project else ORGANIZATION_LIMIT
            assert limit is None or cost <= limit * CENT, f"a budget is exceeded in {month}"
        this = world.ledger.spend().month
        for project in ("", *PROJECTS):
            spend = world.ledger.spend(project or None)
            held = [self.requests[id].reservation for id in self.open]
            assert spend.spent == months[this, project], "what is shown is not what was spent"
            reserved = sum(r.amount for r in held if project in ("", r.held.project))
            assert spend.reserved == reserved, "what is shown is not what is reserved"
        by_project = {p: 0 for p in PROJECTS} | {
            p: sum(
                nano(r)
                for r in world.results("costs", **since, limit=180, group_by="project_id")
                if r["project_id"] == p
            )
            for p in PROJECTS
        }
        assert by_project == {p: projects[p] for p in PROJECTS}
        lines = world.results("costs", **since, limit=180, group_by=["line_item", "api_key_id"])
        assert sum(nano(r) for r in lines) == total
        self.check_tokens(entries, since)

    def check_tokens(self, entries: list[dict[str, Any]], since: dict[str, int]) -> None:
        for kind in ("completions", "embeddings"):
            mine = [e for e in entries if e["operation"] == kind]
            found = self.world.results(kind, **since, limit=31, group_by=["api_key_id", "model"])
            for ours, theirs in (
                ("input_tokens", "input_tokens"),
                ("output_tokens", "output_tokens"),
                ("input_cached_tokens", "cached_input_tokens"),
            ):
                if kind == "completions" or ours == "input_tokens":
                    assert sum(r[ours] for r in found) == sum(e[theirs] for e in mine)
            assert sum(r["num_model_requests"] for r in found) == len(mine)


def _usage(entry: dict[str, Any]) -> Usage:
    return Usage(entry["input_tokens"], entry["cached_input_tokens"], entry["output_tokens"], entry["reasoning_tokens"])


async def drive(number: int, operations: int) -> Traffic:
    traffic = Traffic(await World().open(), random.Random(number))
    for i in range(operations):
        await traffic.step()
        if i % 250 == 0:
            traffic.check()
    await traffic.close()
    traffic.check()
    return traffic


async def test_ledger_receipts_usage_and_costs_agree_to_the_nano_dollar() -> None:
    outcomes: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for number in range(WORLDS):
        traffic = await drive(SEED + number, OPERATIONS // WORLDS)
        settled = [r["entry"] for r in traffic.world.stored.settled()]
        outcomes.update(e["outcome"] for e in settled)
        months = {datetime.fromtimestamp(e["time"], UTC).strftime("%Y-%m") for e in settled}
        seen.update(
            crashes=traffic.crashes, refused=traffic.refused, recovered=traffic.recovered, turns=len(months) - 1,
            requests=len(traffic.requests), nanousd=sum(e["cost_nanousd"] for e in settled),
        )  # fmt: skip
    # That everything happened, and often: otherwise the property says nothing.
    assert set(outcomes) == {"completed", "client_disconnected", "upstream_error", "refused", "gateway_restart"}
    assert min(outcomes.values()) > 200 and seen["requests"] > 3000, outcomes
    assert seen["crashes"] > 50 and seen["refused"] > 200 and seen["recovered"] > 100 and seen["turns"] >= WORLDS, seen


def _settle_again(patch: pytest.MonkeyPatch) -> None:
    """Exactly once, taken out."""
    honest = Reservation.finish

    def finish(self: Reservation, *how: Any) -> Entry:
        if self.entry is not None:
            self.entry, self._ledger._open[self.held.request_id] = None, self
        return honest(self, *how)

    patch.setattr(Reservation, "finish", finish)


def _no_check(patch: pytest.MonkeyPatch) -> None:
    """The check of the budgets, taken out."""
    honest = Spending.reserve
    patch.setattr(Spending, "reserve", lambda self, p, amount, b, t: honest(self, p, amount, Budgets(), t))


def _forget_reserved(patch: pytest.MonkeyPatch) -> None:
    """The check looks at what is settled only: what streams can spend the budget many times over."""
    honest = Spending.reserve
    patch.setattr(Spending, "reserve", lambda self, p, amount, b, t: honest(self, p, 0, b, t))
    patch.setattr(Spending, "release", lambda self, p, amount: None)


def _forget_unfinished(patch: pytest.MonkeyPatch) -> None:
    """The replay of what a crash cut off, taken out."""
    honest = Ledger.begin

    async def begin(self: Ledger, append: Append) -> None:
        self._left.clear()
        await honest(self, append)

    patch.setattr(Ledger, "begin", begin)


def _keep_unfinished(patch: pytest.MonkeyPatch) -> None:
    """What was cut off is settled, though it had been settled before."""
    honest = Ledger._replay_entry

    def replay(self: Ledger, entry: Entry) -> None:
        honest(self, entry)
        self._left = _Sticky(self._left)

    patch.setattr(Ledger, "_replay_entry", replay)


class _Sticky(dict[str, Any]):
    def pop(self, key: str, default: Any = None) -> Any:
        return self.get(key, default)


def _return_early(patch: pytest.MonkeyPatch) -> None:
    """Settle does not wait until the entry is durable."""

    async def settle(self: Reservation, *how: Any) -> Entry:
        return self.finish(*how)

    patch.setattr(Reservation, "settle", settle)


def _charge_the_failed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("enclave.access.ledger.UNBILLED", frozenset())


def _charge_over_the_reservation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("enclave.access.prices.Lines.at_most", lambda self, most: self)


def _charge_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Spending, "charge", lambda self, project, cost, time: None)


@pytest.mark.parametrize(
    ("sabotage", "seen"),
    [
        (_settle_again, "two answers for one request|settled twice"),
        (_no_check, "let in, though"),
        (_forget_reserved, "not what is reserved"),
        (_forget_unfinished, "was forgotten"),
        (_keep_unfinished, "settled twice"),
        (_return_early, "lost or changed"),
        (_charge_over_the_reservation, "a budget is exceeded"),
        (_charge_nothing, "not what was spent"),
    ],
)
async def test_property_breaks_when_a_defence_is_taken_out(
    sabotage: Any, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match=seen):
        await drive(SEED, OPERATIONS // WORLDS)


async def test_entry_of_a_failed_engine_is_free_only_because_the_ledger_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = await World().open()
    assert (await (await world.reserve()).settle("upstream_error", Usage(5, 0, 5))).usage == ZERO
    _charge_the_failed(monkeypatch)
    assert (await (await world.reserve()).settle("upstream_error", Usage(5, 0, 5))).usage != ZERO


def test_stored_settlements_are_read_without_the_code_under_test() -> None:
    world = World()
    world.stored.records = [json.dumps({"record": "settled", "id": "x"}).encode(), b'{"record":"held"}']
    assert world.stored.settled() == [{"record": "settled", "id": "x"}]
