"""The ledger's records: one form, one order, one chain per project."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
import rfc8785

from enclave.access.entries import (
    Entry,
    Held,
    LedgerError,
    Progress,
    Settled,
    decode_record,
    encode_record,
    entries_of,
    genesis,
)
from enclave.access.prices import Usage
from tests.enclave.access.money import NOON, PRICES, World, opened, receipt

SOME = Usage(100, 40, 7, 3)
COST = PRICES.cost("parrot", SOME)


async def test_entries_of_a_project_are_numbered_and_chained_by_themselves() -> None:
    world = await World().open()
    for project in ("proj_a", "proj_b", "proj_a", "proj_a", "proj_b"):
        await (await world.reserve(project=project)).settle("completed", SOME)
    for project, count in (("proj_a", 3), ("proj_b", 2), ("proj_c", 0)):
        chain = list(entries_of(world.stored.records, project))
        assert [e.seq for e in chain] == list(range(1, count + 1))
        for before, after in pairwise(chain):
            assert after.previous == before.hash
    await world.again()
    entry = await (await world.reserve(project="proj_b")).settle("completed", SOME)
    assert entry.seq == 3 and entry.previous == list(entries_of(world.stored.records, "proj_b"))[1].hash


def test_projects_begin_with_different_hashes() -> None:
    assert genesis("proj_a") != genesis("proj_b")


async def settled_records() -> list[bytes]:
    world = await World().open()
    for _ in range(3):
        r = await world.reserve()
        r.progress(SOME)
        await world.ledger.flush()
        await r.settle("completed", SOME, receipt)
    return world.stored.records


def edited(raw: bytes, **changes: Any) -> bytes:
    record = json.loads(raw)
    return rfc8785.dumps({**record, "entry": {**record["entry"], **changes}})


async def test_records_that_do_not_follow_are_refused() -> None:
    records = await settled_records()
    kinds = [json.loads(r)["record"] for r in records]
    assert kinds == ["table"] + ["held", "settled"] * 3
    assert (await opened(records)).spend().spent == 3 * COST
    first, second = records[2], records[4]
    held, other = records[1], Progress("rcpt-other", SOME)
    for wrong, code in (
        ([*records, second], "LEDGER_CHAIN"),
        ([*records[:2], *records[3:]], "LEDGER_CHAIN"),
        ([records[0], *records[3:5], *records[1:3]], "LEDGER_CHAIN"),
        ([*records[:2], held, first], "LEDGER_CHAIN"),
        ([records[0], encode_record(other)], "LEDGER_CHAIN"),
        (records[1:], "LEDGER_TABLE"),
        ([*records[:2], edited(first, cost_nanousd=COST + 1)], "LEDGER_TABLE"),
        ([*records[:2], edited(first, model="unknown")], "LEDGER_TABLE"),
        ([*records[:3], edited(second, time=NOON - 60)], "LEDGER_TIME"),
        ([*records[:2], edited(first, project="proj_b")], "LEDGER_CHAIN"),
        ([*records[:3], edited(second, seq=3)], "LEDGER_CHAIN"),
        ([*records, b"{}"], "LEDGER_RECORD"),
    ):
        with pytest.raises(LedgerError) as caught:
            await opened(list(wrong))
        assert caught.value.code == code
    # What is changed without breaking the first link breaks the next one.
    with pytest.raises(LedgerError, match="LEDGER_CHAIN"):
        list(entries_of([records[0], edited(first, cost_nanousd=COST - 1), second], "proj_a"))


async def test_every_record_has_one_form() -> None:
    entry = decode_record((await settled_records())[2])
    assert isinstance(entry, Settled)
    held = Held("rcpt-1", "proj_a", "key_1", "parrot", "completions", PRICES.digest, 6, SOME)
    for record in (PRICES, held, Progress("rcpt-1", SOME), entry):
        raw = encode_record(record)
        assert decode_record(raw) == record and rfc8785.dumps(json.loads(raw)) == raw
        document = json.loads(raw)
        wrong = [raw + b" ", raw[:-1], json.dumps(document, indent=1).encode()]
        wrong += [rfc8785.dumps({k: v for k, v in document.items() if k != name}) for name in document]
        wrong += [rfc8785.dumps({**document, name: v}) for name in document for v in (None, 5.5, "x y", [], {}, True)]
        wrong.append(rfc8785.dumps({**document, "more": 1}))
        for other in wrong:
            with pytest.raises(LedgerError) as caught:
                decode_record(other)
            assert caught.value.code == "LEDGER_RECORD"
    assert Entry.decode(entry.entry.encode()) == entry.entry
    for name in entry.entry.document():
        for value in (None, -1, "x y", [], True, 2**60):
            if name == "receipt" and value is None:
                continue
            with pytest.raises(LedgerError):
                Entry.decode(json.dumps({**entry.entry.document(), name: value}).encode())


def test_random_bytes_are_no_record() -> None:
    seed = random.Random(3)
    for _ in range(500):
        with pytest.raises(LedgerError):
            decode_record(seed.randbytes(seed.randrange(80)))
