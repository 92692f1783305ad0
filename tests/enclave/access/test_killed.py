"""The ledger on the real journal, its process killed again and again while it serves."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from enclave.access.entries import Settled, decode_record, entries_of
from enclave.access.ledger import Ledger
from enclave.access.prices import CENT, Usage
from enclave.state import Journal, open_backend
from tests.enclave.access.money import PRICES, World, receipt
from tests.enclave.access.spending import KEY, LIMIT

ROUNDS = 8


@pytest.fixture
async def url(tmp_path: Path) -> str:
    made = f"sqlite:{tmp_path / 'state.db'}"
    await (await Journal.create(await open_backend(made), KEY, int(time.time()))).close()
    return made


def serve_until_killed(url: str) -> tuple[int, dict[str, int]]:
    """How many requests its opening settled for the process before, and what it said was paid."""
    command = [sys.executable, "-m", "tests.enclave.access.spending", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        recovered = int(process.stdout.readline().removeprefix("open"))
        time.sleep(random.uniform(0.05, 0.3))
        process.kill()
        out = process.stdout.read()
        assert process.wait(60) == -signal.SIGKILL
    return recovered, {id: int(cost) for _, id, cost in (line.split() for line in out.splitlines())}


async def stored(url: str) -> list[bytes]:
    records: list[bytes] = []
    journal = await Journal.open(await open_backend(url), KEY, apply=lambda _, record: records.append(record))
    await journal.close()
    return records


async def test_killed_process_loses_no_payment_makes_none_twice_and_exceeds_no_budget(url: str) -> None:
    paid: dict[str, int] = {}
    recovered = 0
    for _ in range(ROUNDS):
        count, said = await asyncio.to_thread(serve_until_killed, url)
        recovered, paid = recovered + count, {**paid, **said}
    records = await stored(url)
    settled = [r for r in map(decode_record, records) if isinstance(r, Settled)]
    costs = {s.request_id: s.entry.cost for s in settled}
    assert len(costs) == len(settled), "a request was settled twice"
    assert {id: costs.get(id) for id in paid} == paid, "an entry that was returned is lost or changed"
    restarts = [s.entry for s in settled if s.entry.outcome == "gateway_restart"]
    assert len(restarts) == recovered > 0, "the control: requests were cut off"
    assert paid, "the control: requests were settled"
    months: Counter[tuple[str, str]] = Counter()
    for project in ("proj_0", "proj_1", "proj_2"):
        for entry in entries_of(records, project):
            months[project, datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m")] += entry.cost
    assert sum(months.values()) == sum(costs.values()) and max(months.values()) <= LIMIT * CENT


async def test_ledger_works_on_the_sealed_journal(url: str) -> None:
    world = World(now=int(time.time()))
    journal = await Journal.open(await open_backend(url), KEY)
    world.ledger = await Ledger.open([], journal.append, PRICES, lambda: world.now)
    open_ones = [await world.reserve() for _ in range(50)]
    for r in open_ones:
        r.progress(Usage(100, 40, 7))
    await world.ledger.flush()
    done = await asyncio.gather(*(r.settle("completed", Usage(1), receipt) for r in open_ones[:30]))
    await journal.close()
    ledger = Ledger(PRICES, lambda: world.now)
    again = await Journal.open(await open_backend(url), KEY, apply=lambda _, record: ledger.replay(record))
    await ledger.begin(again.append)
    assert len(ledger.recovered) == 20 and {e.usage for e in ledger.recovered} == {Usage(100, 40, 7)}
    assert ledger.spend().spent == sum(e.cost for e in (*done, *ledger.recovered))
    await again.close()
