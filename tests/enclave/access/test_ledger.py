"""The ledger: exactly once, budgets to the nano-dollar, and a crash at any moment."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import rfc8785

from attestation.errors import InputError
from enclave.access.budgets import BudgetExceeded, Budgets, month_of
from enclave.access.entries import (
    Entry,
    LedgerError,
    Outcome,
    encode_record,
    entries_of,
    genesis,
)
from enclave.access.ledger import Ledger
from enclave.access.prices import CENT, MAX_NANOUSD, Price, PriceError, PriceTable, Usage
from enclave.access.writer import MAX_BATCH as WRITER_BATCH
from enclave.state.base import MAX_BATCH as STATE_BATCH
from tests.enclave.access.money import NOON, PRICES, Crash, World, opened, receipt, some_usage

SOME = Usage(100, 40, 7, 3)
COST = 60 * 150 + 40 * 75 + 7 * 600


# settling


async def test_settled_request_is_charged_by_its_price_table() -> None:
    world = await World().open()
    r = await world.reserve()
    entry = await r.settle("completed", SOME, receipt)
    assert (entry.seq, entry.project, entry.key_id, entry.model) == (1, "proj_a", "key_1", "parrot")
    assert (entry.usage, entry.outcome, entry.cost) == (SOME, "completed", COST)
    assert (entry.price_table, entry.previous) == (PRICES.digest, genesis("proj_a"))
    assert entry.receipt == receipt(replace(entry, receipt=None))
    assert entry.time == NOON
    (record,) = world.stored.settled()
    assert record["id"] == "rcpt-1" and rfc8785.dumps(record["entry"]) == entry.encode()


async def test_time_is_told_to_the_minute_only() -> None:
    world = await World(now=NOON + 59).open()
    assert (await (await world.reserve()).settle("completed", SOME)).time == NOON


async def test_second_settlement_changes_nothing() -> None:
    world = await World().open()
    r = await world.reserve()
    first = await r.settle("completed", SOME)
    assert await r.settle("client_disconnected", Usage(9, 9, 9)) == first
    r.progress(Usage(1000))
    assert await asyncio.gather(r.settle("completed"), r.settle("refused")) == [first, first]
    assert len(world.stored.settled()) == 1
    assert (world.ledger.spend().spent, world.ledger.spend().reserved) == (COST, 0)


async def test_settlements_at_once_make_one_entry() -> None:
    world = await World().open()
    r = await world.reserve()
    made = await asyncio.gather(*(r.settle("completed", Usage(i + 1)) for i in range(20)))
    assert set(made) == {made[0]} and made[0].usage == Usage(1)
    assert len(world.stored.settled()) == 1


@pytest.mark.parametrize("outcome", ["upstream_error", "refused"])
async def test_engine_that_failed_or_refused_is_not_paid(outcome: Outcome) -> None:
    world = await World().open()
    r = await world.reserve(model="magpie")
    r.progress(SOME)
    entry = await r.settle(outcome, SOME)
    assert (entry.cost, entry.usage, entry.outcome) == (0, Usage(), outcome)
    assert world.ledger.spend().reserved == 0


async def test_disconnect_is_charged_at_the_last_figure() -> None:
    world = await World().open()
    r = await world.reserve()
    for tokens in (1, 5, 9):
        r.progress(Usage(100, 40, tokens))
    entry = await r.settle("client_disconnected")
    assert (entry.usage, entry.cost) == (Usage(100, 40, 9), 60 * 150 + 40 * 75 + 9 * 600)


async def test_engine_that_uses_more_than_was_reserved_is_not_paid_for_it() -> None:
    world = await World().open()
    entry = await (await world.reserve(COST - 1)).settle("completed", SOME)
    assert (entry.cost, entry.usage, world.ledger.overruns) == (COST - 1, SOME, 1)
    items = world.results("costs", start_time=NOON - 86_400, group_by="line_item")
    assert sum(round(i["amount"]["value"] * 10**9) for i in items) == COST - 1
    again = await world.again()
    assert again.costs() == COST - 1 == again.ledger.spend().spent


async def test_entry_returns_only_when_it_is_durable() -> None:
    world = await World().open()
    r = await world.reserve()
    world.stored.gate = asyncio.Event()
    task = asyncio.create_task(r.settle("completed", SOME))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done() and not world.stored.settled()
    world.stored.gate.set()
    assert (await task).cost == COST and len(world.stored.settled()) == 1


async def test_caller_that_is_cancelled_does_not_undo_its_settlement() -> None:
    world = await World().open()
    r = await world.reserve()
    task = asyncio.create_task(r.settle("completed", SOME))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await r.settle("refused")).cost == COST
    assert len(world.stored.settled()) == 1


async def test_receipt_that_cannot_be_made_leaves_the_request_open() -> None:
    world = await World().open()
    r = await world.reserve()

    def fails(entry: Entry) -> bytes:
        raise RuntimeError("no key")

    with pytest.raises(RuntimeError):
        await r.settle("completed", SOME, fails)
    with pytest.raises(ValueError, match="32 bytes"):
        await r.settle("completed", SOME, lambda entry: b"short")
    assert world.ledger.spend().reserved == 10**9 and not world.stored.settled()
    assert (await r.settle("completed", SOME, receipt)).seq == 1


async def test_many_settlements_share_writes() -> None:
    world = await World().open()
    before = world.stored.calls
    open_ones = [await world.reserve() for _ in range(1100)]
    await asyncio.gather(*(r.settle("completed", SOME) for r in open_ones))
    assert len(world.stored.settled()) == 1100
    assert world.stored.calls - before <= 4
    assert world.stored.longest <= WRITER_BATCH <= STATE_BATCH, "the journal would refuse it"


# reserving


async def test_what_cannot_be_reserved_is_refused_and_holds_nothing() -> None:
    world = await World().open()
    await world.reserve(5, id="rcpt-x")
    with pytest.raises(LedgerError) as caught:
        await world.reserve(5, id="rcpt-x")
    assert caught.value.code == "LEDGER_DUPLICATE"
    with pytest.raises(PriceError):
        await world.reserve(5, model="unknown")
    for wrong in ({"project": ""}, {"project": "a b"}, {"key": "é"}, {"id": "a/b"}, {"key": "k" * 129}):
        with pytest.raises(LedgerError) as caught:
            await world.reserve(5, **wrong)
        assert caught.value.code == "LEDGER_VALUE"
    for amount in (-1, MAX_NANOUSD + 1, 1.0, True, None):
        with pytest.raises(LedgerError) as caught:
            await world.reserve(amount)  # type: ignore[arg-type]
        assert caught.value.code == "LEDGER_VALUE"
    assert world.ledger.spend().reserved == 5


async def test_too_many_open_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclave.access.ledger.MAX_OPEN", 3)
    world = await World().open()
    held = [await world.reserve() for _ in range(3)]
    with pytest.raises(LedgerError) as caught:
        await world.reserve()
    assert caught.value.code == "LEDGER_FULL"
    await held[0].settle("completed", SOME)
    await world.reserve()


@pytest.mark.parametrize(
    ("budgets", "scope"), [(Budgets(project=1), "project"), (Budgets(organization=1), "organization")]
)
async def test_budget_holds_to_the_nano_dollar(budgets: Budgets, scope: str) -> None:
    world = await World().open()
    first = await world.reserve(CENT - COST, budgets=budgets)
    second = await world.reserve(COST, budgets=budgets)
    with pytest.raises(BudgetExceeded) as caught:
        await world.reserve(1, budgets=budgets)
    assert caught.value.code == "LEDGER_BUDGET" and caught.value.scope == scope
    assert str(CENT) not in str(caught.value)
    await world.reserve(0, budgets=budgets, model="free")  # what costs nothing is always within a budget
    await second.settle("completed", SOME)
    assert world.ledger.spend().spent == COST
    with pytest.raises(BudgetExceeded):
        await world.reserve(1, budgets=budgets)
    await first.settle("refused")
    last = await world.reserve(CENT - COST, budgets=budgets)
    assert world.ledger.spend("proj_a").enforcing(1)
    await last.settle("refused")
    assert not world.ledger.spend("proj_a").enforcing(1)


async def test_project_limit_is_its_own_and_organization_limit_is_for_all() -> None:
    world = await World().open()
    await world.reserve(CENT, project="proj_a", budgets=Budgets(project=1))
    await world.reserve(CENT, project="proj_b", budgets=Budgets(project=1))
    with pytest.raises(BudgetExceeded):
        await world.reserve(1, project="proj_c", budgets=Budgets(organization=2))


async def test_many_at_once_are_let_in_exactly_as_far_as_the_budget_goes() -> None:
    world = await World().open()
    amount, budgets = CENT // 7, Budgets(project=1)

    async def one() -> int:
        await asyncio.sleep(0)
        try:
            r = await world.reserve(amount, budgets=budgets)
        except BudgetExceeded:
            return 0
        await asyncio.sleep(0)
        await r.settle("client_disconnected", Usage(0, 0, amount // 600 + 1))  # more than was reserved
        return 1

    assert sum(await asyncio.gather(*(one() for _ in range(100)))) == 7
    assert world.ledger.spend("proj_a").spent == 7 * amount <= CENT


async def test_number_that_is_shown_is_the_number_of_the_check() -> None:
    world, seed, limit = await World().open(), random.Random(5), 3
    for _ in range(200):
        shown = world.ledger.spend("proj_a")
        left = limit * CENT - shown.spent - shown.reserved
        with pytest.raises(BudgetExceeded):
            await world.reserve(left + 1, budgets=Budgets(project=limit))
        r = await world.reserve(seed.randint(0, left), budgets=Budgets(project=limit))
        if seed.random() < 0.9:
            await r.settle("completed", some_usage(seed))


async def test_lowered_limit_stops_new_requests_only() -> None:
    world = await World().open()
    r = await world.reserve(2 * CENT, budgets=Budgets(project=2))
    with pytest.raises(BudgetExceeded):
        await world.reserve(1, budgets=Budgets(project=1))
    assert (await r.settle("completed", SOME)).cost == COST


# months


@pytest.mark.parametrize(
    ("time", "month", "until"),
    [
        (NOON, "2026-11", "2026-12-01"),
        (1_798_761_599, "2026-12", "2027-01-01"),
        (1_798_761_600, "2027-01", "2027-02-01"),
    ],
)
def test_month_is_a_calendar_month_in_utc(time: int, month: str, until: str) -> None:
    assert month_of(time) == (month, int(datetime.fromisoformat(until).replace(tzinfo=UTC).timestamp()))


async def test_new_month_begins_with_what_is_still_open() -> None:
    world = await World().open()
    budgets = Budgets(project=1)
    await (await world.reserve(CENT // 2, budgets=budgets)).settle("completed", Usage(0, 0, 8000))
    spent = 8000 * 600
    still = await world.reserve(CENT - spent, budgets=budgets)
    with pytest.raises(BudgetExceeded):
        await world.reserve(1, budgets=budgets)
    world.now = month_of(NOON)[1]
    assert (world.ledger.spend("proj_a").spent, world.ledger.spend("proj_a").month) == (0, "2026-12")
    with pytest.raises(BudgetExceeded):
        await world.reserve(spent + 1, budgets=budgets)
    await world.reserve(spent, budgets=budgets)
    entry = await still.settle("completed", SOME)
    assert entry.time == world.now and world.ledger.spend("proj_a").spent == COST
    assert (await world.again()).ledger.spend("proj_a").spent == COST


async def test_clock_set_back_does_not_bring_back_last_months_budget() -> None:
    world = await World(now=month_of(NOON)[1]).open()
    budgets = Budgets(project=1)
    await (await world.reserve(CENT, budgets=budgets)).settle("completed", Usage(0, 0, 10**6))
    for _ in range(2):
        world.now = NOON
        assert world.ledger.spend("proj_a").month == "2026-12"
        with pytest.raises(BudgetExceeded):
            await world.reserve(1, budgets=budgets)
        await world.again()


# crashes


async def test_request_that_a_crash_cut_off_is_settled_once_at_its_last_durable_figure() -> None:
    world = await World().open()
    r = await world.reserve()
    await world.ledger.flush()
    r.progress(SOME)
    await world.ledger.flush()
    r.progress(Usage(100, 40, 5000))
    untouched = await world.reserve(project="proj_b")
    del r, untouched
    await world.again()
    (entry,) = world.ledger.recovered
    assert (entry.outcome, entry.usage, entry.cost, entry.receipt) == ("gateway_restart", SOME, COST, None)
    assert (world.ledger.spend().spent, world.ledger.spend().reserved) == (COST, 0)
    for _ in range(2):
        await world.again()
        assert not world.ledger.recovered and len(world.stored.settled()) == 1


async def test_flush_writes_only_what_is_new() -> None:
    world = await World().open()
    r = await world.reserve()
    await world.ledger.flush()
    calls = world.stored.calls
    await world.ledger.flush()
    assert world.stored.calls == calls
    r.progress(SOME)
    await world.ledger.flush()
    assert [json.loads(x)["record"] for x in world.stored.records] == ["table", "held", "progress"]


async def test_figures_become_durable_while_it_runs() -> None:
    world = await World().open()
    r = await world.reserve()
    world.stored.wrote.clear()
    task = asyncio.create_task(world.ledger.run(0.001))
    r.progress(SOME)
    await world.stored.wrote.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.again()
    assert world.ledger.recovered[0].usage == SOME


@pytest.mark.parametrize("when", ["before", "after"])
async def test_journal_that_fails_stops_the_ledger_and_the_next_opening_tells(when: str) -> None:
    world = await World().open()
    kept, lost, still = await world.reserve(), await world.reserve(), await world.reserve()
    await kept.settle("completed", SOME)
    world.stored.crash_at = when
    with pytest.raises(LedgerError) as caught:
        await lost.settle("completed", SOME)
    assert caught.value.code == "LEDGER_FAILED" and caught.value.actual == "Crash"
    for refused in (world.reserve(), still.settle("completed", SOME), world.ledger.flush(), world.ledger.close()):
        with pytest.raises(LedgerError) as caught:
            await refused
        assert caught.value.code == "LEDGER_FAILED"
    with pytest.raises(LedgerError):
        await lost.settle("completed", SOME)
    await world.again()
    assert world.ledger.spend().spent == (2 if when == "after" else 1) * COST
    assert [e.seq for e in entries_of(world.stored.records, "proj_a")] == ([1, 2] if when == "after" else [1])


@pytest.mark.parametrize("when", ["before", "after"])
async def test_crash_while_opening_settles_nothing_twice(when: str) -> None:
    world = await World().open()
    r = await world.reserve()
    r.progress(SOME)
    await world.ledger.flush()
    world.stored.crash_at = when
    with pytest.raises(LedgerError):
        await Ledger.open(world.stored.records, world.stored.append, PRICES, lambda: world.now)
    await world.again()
    assert world.ledger.spend().spent == COST and len(world.stored.settled()) == 1


async def test_closing_settles_what_is_open_and_lets_nothing_in() -> None:
    world = await World().open()
    r = await world.reserve()
    r.progress(SOME)
    await world.ledger.close()
    await world.ledger.close()
    assert r.entry is not None and (r.entry.outcome, r.entry.cost) == ("gateway_restart", COST)
    with pytest.raises(LedgerError) as caught:
        await world.reserve()
    assert caught.value.code == "LEDGER_CLOSED"
    await world.again()
    assert world.ledger.spend().spent == COST and not world.ledger.recovered


async def test_ledger_that_has_not_begun_lets_nothing_in_and_one_that_has_takes_no_records() -> None:
    world = World()
    world.ledger = Ledger(PRICES, lambda: world.now)
    with pytest.raises(LedgerError) as caught:
        await world.reserve()
    assert caught.value.code == "LEDGER_CLOSED"
    await world.ledger.close()
    await world.open()
    with pytest.raises(LedgerError) as caught:
        world.ledger.replay(encode_record(PRICES))
    assert caught.value.code == "LEDGER_CHAIN"


# price tables over time


async def test_request_is_charged_by_the_table_under_which_it_was_reserved() -> None:
    world = await World().open()
    r = await world.reserve()
    r.progress(SOME)
    await world.ledger.flush()
    old, world.prices = world.prices, PriceTable({"parrot": Price(300_000_000, 75_000_000, 600_000_000)})
    await world.again()
    assert world.ledger.recovered[0].cost == COST and world.ledger.recovered[0].price_table == old.digest
    entry = await (await world.reserve()).settle("completed", SOME)
    assert entry.cost == COST + 60 * 150 and entry.price_table == world.prices.digest
    world.prices = old
    await world.again()
    assert world.ledger.spend().spent == 2 * COST + 60 * 150


async def test_jump_of_a_price_must_be_confirmed_and_taking_a_model_out_is_no_way_around() -> None:
    world = await World().open()
    dear = {"parrot": Price(1_500_000_000, 75_000_000, 600_000_000)}
    stored = list(world.stored.records)
    with pytest.raises(InputError) as caught:
        await opened(stored, PriceTable(dear))
    assert caught.value.code == "INPUT_PRICE_CHANGE"
    without = PriceTable({"magpie": PRICES.models["magpie"]})
    await opened(stored, without)
    with pytest.raises(InputError):
        await opened(stored, PriceTable(dear))
    await opened(stored, PriceTable(dear, without.digest))
    assert len([r for r in stored if json.loads(r)["record"] == "table"]) == 3


async def test_crash_is_what_the_appender_raises() -> None:
    world = await World().open()
    world.stored.crash_at = "before"
    with pytest.raises(Crash):
        await world.stored.append([b"x"])
