"""The journal over a real SQLite file: what is durable when, who shares a write, what a failure leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from enclave.state import MAX_RECORD, Checkpoint, Journal, StateConflict, StateError
from enclave.state.base import MAX_BATCH
from enclave.state.journal import MAX_QUEUED
from enclave.state.sqlite import SqliteBackend
from tests.enclave.state.stored import KEY, NOW, OTHER_KEY, Faulty, put, read, rows


@pytest.fixture
async def faulty(tmp_path: Path) -> Faulty:
    return Faulty(await SqliteBackend.open(tmp_path / "state.db"))


@pytest.fixture
async def journal(faulty: Faulty) -> AsyncIterator[Journal]:
    async with await Journal.create(faulty, KEY, NOW) as made:
        faulty.writes.clear()
        yield made
        faulty.gate.set()  # a test that failed before it did must not hang in `close`


async def settled(*waiting: asyncio.Task[Checkpoint]) -> list[str]:
    """The code each task ended with, "" for success."""
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(e, Checkpoint | StateError) for e in ends), ends
    return [e.code if isinstance(e, StateError) else "" for e in ends]


async def running(*tasks: asyncio.Task[Checkpoint]) -> None:
    """Let *tasks* get as far as they can without the backend."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_append_is_stored_when_it_returns(journal: Journal, tmp_path: Path, faulty: Faulty) -> None:
    before = journal.checkpoint
    point = await journal.append([b"one", b"two"])
    assert (point.seq, point.state_id) == (2, before.state_id)
    assert journal.checkpoint == point != before
    assert [seq for seq, _ in await faulty.read(0, 10)] == [0, 1, 2]
    assert [pair async for pair in journal.replay()] == [(1, b"one"), (2, b"two")]
    await journal.close()
    assert await read(tmp_path / "state.db", at_least=point) == [b"one", b"two"]


async def test_replay_and_open_stream_more_than_a_page(journal: Journal, tmp_path: Path) -> None:
    records = [b"%d" % n for n in range(300)]
    await journal.append(records)
    assert [record async for _, record in journal.replay()] == records
    await journal.close()
    assert await read(tmp_path / "state.db") == records


async def test_callers_that_wait_together_share_a_write(journal: Journal, faulty: Faulty, tmp_path: Path) -> None:
    faulty.gate.clear()
    tasks = [asyncio.create_task(journal.append([b"%d" % n])) for n in range(100)]
    await running(*tasks)
    assert not any(task.done() for task in tasks), "nothing is answered before it is durable"
    assert journal.checkpoint.seq == 0
    faulty.gate.set()
    points = await asyncio.gather(*tasks)
    assert sum(faulty.writes) == 100
    assert len(faulty.writes) <= 2
    assert [p.seq for p in points] == list(range(1, 101)), "the order of calls is the order of records"
    await journal.close()
    assert await read(tmp_path / "state.db", at_least=points[-1]) == [b"%d" % n for n in range(100)]


async def test_caller_that_is_cancelled_loses_and_doubles_nothing(
    journal: Journal, faulty: Faulty, tmp_path: Path
) -> None:
    faulty.gate.clear()
    tasks = [asyncio.create_task(journal.append([b"%d" % n])) for n in range(20)]
    await running(*tasks)
    for task in tasks[::2]:
        task.cancel()
    await running(*tasks)
    assert all(task.cancelled() for task in tasks[::2])
    faulty.gate.set()
    assert [p.seq for p in await asyncio.gather(*tasks[1::2])] == list(range(2, 21, 2))
    await journal.close()
    assert await read(tmp_path / "state.db") == [b"%d" % n for n in range(20)]


async def test_future_of_submit_may_be_dropped_or_cancelled(journal: Journal, faulty: Faulty) -> None:
    faulty.gate.clear()
    journal.submit([b"one"]).cancel()
    journal.submit([b"two"])
    faulty.gate.set()
    assert (await journal.append([b"three"])).seq == 3
    assert [record async for _, record in journal.replay()] == [b"one", b"two", b"three"]


async def test_full_queue_holds_appends_back_and_refuses_submits(journal: Journal, faulty: Faulty) -> None:
    faulty.gate.clear()
    first = asyncio.create_task(journal.append([b"first"]))  # taken by the writer, held at the gate
    await running(first)
    fill = [journal.submit([b"x"] * MAX_BATCH) for _ in range(MAX_QUEUED // MAX_BATCH)]
    with pytest.raises(StateError, match="STATE_BUSY"):
        journal.submit([b"y"])
    with pytest.raises(StateError, match="STATE_BUSY"):
        await journal.catch_up()
    late = [asyncio.create_task(journal.append([b"%d" % n])) for n in range(3)]
    await running(*late)
    late[1].cancel()  # still outside: not written
    faulty.gate.set()
    await asyncio.gather(first, *fill)
    await asyncio.gather(*late, return_exceptions=True)
    records = [record async for _, record in journal.replay()]
    assert len(records) == 1 + MAX_QUEUED + 2
    assert records[-2:] == [b"0", b"2"]
    assert max(faulty.writes) <= MAX_BATCH


async def test_large_records_fill_a_write_by_bytes(journal: Journal, faulty: Faulty) -> None:
    faulty.gate.clear()
    tasks = [asyncio.create_task(journal.append([bytes(MAX_RECORD)] * 20)) for _ in range(6)]
    await running(*tasks)
    faulty.gate.set()
    await asyncio.gather(*tasks)
    assert faulty.writes == [60, 60], "63 of them fit into 4 MiB; an append is never split"


@pytest.mark.parametrize(
    "records", [[], [bytes(MAX_RECORD + 1)], [b"x"] * (MAX_BATCH + 1), [bytes(MAX_RECORD)] * 64],
    ids=["none", "long", "many", "bytes"],
)  # fmt: skip
async def test_append_beyond_a_cap_is_refused_and_hurts_nobody(journal: Journal, records: list[bytes]) -> None:
    with pytest.raises(StateError, match="STATE_TOO_LONG"):
        await journal.append(records)
    with pytest.raises(StateError, match="STATE_TOO_LONG"):
        journal.submit(records)
    assert (await journal.append([b"one"])).seq == 1


async def test_records_are_taken_as_they_are_at_the_call(journal: Journal, faulty: Faulty) -> None:
    record, records = bytearray(b"one"), [b"two"]
    faulty.gate.clear()
    journal.submit([b"held at the gate"])
    await running()
    task = asyncio.create_task(journal.append([record, *records]))  # type: ignore[list-item]  # mutable on purpose
    await running(task)
    record[:] = b"ONE"
    faulty.gate.set()
    await task
    assert [r async for _, r in journal.replay()] == [b"held at the gate", b"one", b"two"]


# lost answers and failures


@pytest.mark.parametrize("count", [1, 3, 200])
async def test_write_whose_answer_was_lost_is_not_made_twice(
    journal: Journal, faulty: Faulty, tmp_path: Path, count: int
) -> None:
    faulty.lost = 2
    records = [b"%d" % n for n in range(count)]
    assert (await journal.append(records)).seq == count
    assert (await journal.append([b"more"])).seq == count + 1
    assert journal.foreign_seq == 0
    await journal.close()
    assert await read(tmp_path / "state.db") == [*records, b"more"]


async def test_part_of_an_own_write_is_not_taken_for_somebody_elses(journal: Journal, faulty: Faulty) -> None:
    """A host that answers 'conflict' and shows half of the write would have the other half, and then all, written."""

    class Half(Faulty):
        async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
            part = blobs[:1] if not self.writes else blobs
            await self.inner.append(first_seq, part)
            self.writes.append(len(part))
            if part != blobs:
                raise StateConflict(first_seq - 1)

    journal._backend = Half(faulty.inner)
    assert await settled(*(asyncio.create_task(journal.append([b"a"])) for _ in range(2))) == ["STATE_ROLLBACK"] * 2
    assert [seq for seq, _ in await faulty.read(0, 10)] == [0, 1]


async def test_journal_that_failed_stays_failed_and_says_why(journal: Journal, faulty: Faulty) -> None:
    await journal.append([b"one"])
    faulty.gate.clear()
    tasks = [asyncio.create_task(journal.append([b"%d" % n])) for n in range(10)]
    await running(*tasks)
    faulty.error = StateError("STATE_STORAGE", "the disk is full")
    faulty.gate.set()
    assert await settled(*tasks) == ["STATE_STORAGE"] * 10
    faulty.error = None
    with pytest.raises(StateError, match=r"STATE_CLOSED: .*STATE_STORAGE"):
        await journal.append([b"x"])
    with pytest.raises(StateError, match="STATE_CLOSED"):
        await journal.catch_up()
    assert journal.failure is not None
    assert journal.failure.code == "STATE_STORAGE"
    assert journal.checkpoint.seq == 1


async def test_error_nobody_foresaw_stops_the_journal_too(journal: Journal, faulty: Faulty) -> None:
    faulty.error = RuntimeError("canary")
    assert await settled(asyncio.create_task(journal.append([b"one"]))) == ["STATE_CLOSED"]
    assert journal.failure is not None
    assert isinstance(journal.failure.__cause__, RuntimeError)
    assert "canary" not in str(journal.failure)


async def test_failure_reaches_those_who_wait_for_room(journal: Journal, faulty: Faulty) -> None:
    faulty.gate.clear()
    tasks = [asyncio.create_task(journal.append([b"x"] * MAX_BATCH)) for _ in range(MAX_QUEUED // MAX_BATCH + 4)]
    await running(*tasks)
    faulty.error = StateError("STATE_STORAGE", "the disk is full")
    faulty.gate.set()
    codes = await settled(*tasks)
    assert set(codes) == {"STATE_STORAGE", "STATE_CLOSED"}


async def test_writer_cancelled_with_its_loop_leaves_nobody_waiting(journal: Journal, faulty: Faulty) -> None:
    faulty.gate.clear()
    task = asyncio.create_task(journal.append([b"one"]))
    await running(task)
    assert journal._writer is not None
    journal._writer.cancel()
    assert await settled(task) == ["STATE_CLOSED"]


async def test_close_writes_what_was_accepted(journal: Journal, faulty: Faulty, tmp_path: Path) -> None:
    faulty.gate.clear()
    done = [journal.submit([b"0"])]
    await running()
    done += [journal.submit([b"%d" % n]) for n in range(1, 5)]  # these wait while the first is written
    closing = asyncio.create_task(journal.close())
    await asyncio.sleep(0)
    with pytest.raises(StateError, match="STATE_CLOSED"):
        journal.submit([b"late"])
    faulty.gate.set()
    await closing
    await journal.close()
    assert [f.result().seq for f in done] == [1, 2, 3, 4, 5]
    assert await read(tmp_path / "state.db") == [b"%d" % n for n in range(5)]


# beginning


async def test_journal_is_made_only_in_empty_storage_and_opened_only_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    backend = await SqliteBackend.open(path)
    with pytest.raises(StateError, match="STATE_MISSING"):
        await Journal.open(backend, KEY)
    async with await Journal.create(backend, KEY, NOW) as journal:
        assert journal.created == NOW
        with pytest.raises(StateError, match="STATE_EXISTS"):
            await Journal.create(backend, KEY, NOW)
    backend = await SqliteBackend.open(path)
    with pytest.raises(StateError, match="STATE_KEY"):
        await Journal.open(backend, OTHER_KEY)
    async with await Journal.open(backend, KEY) as again:
        assert (again.created, again.checkpoint) == (NOW, journal.checkpoint)


async def test_header_whose_answer_was_lost_is_ours(faulty: Faulty) -> None:
    faulty.lost = 1
    async with await Journal.create(faulty, KEY, NOW) as journal:
        assert (await journal.append([b"one"])).seq == 1


async def test_error_of_apply_at_open_is_the_callers_own(journal: Journal, tmp_path: Path) -> None:
    await journal.append([b"one"])
    await journal.close()

    def apply(seq: int, record: bytes) -> None:
        raise LookupError(seq)

    backend = await SqliteBackend.open(tmp_path / "state.db")
    with pytest.raises(LookupError):
        await Journal.open(backend, KEY, apply=apply)
    await backend.close()


# the host, while the journal is open (SQLite's own lock keeps others out: the rows are changed in its connection)


async def test_rows_that_vanish_under_an_open_journal_stop_it(journal: Journal, faulty: Faulty) -> None:
    await journal.append([b"one"])
    await journal.append([b"two"])
    assert isinstance(faulty.inner, SqliteBackend)
    database = faulty.inner._database
    await faulty.inner._run(lambda: database.execute("DELETE FROM journal WHERE seq = 2"))
    with pytest.raises(StateError, match="STATE_ROLLBACK"):
        _ = [pair async for pair in journal.replay()]
    assert await settled(asyncio.create_task(journal.append([b"three"]))) == ["STATE_ROLLBACK"]
    assert await faulty.last_seq() == 1


async def test_vanished_rows_are_seen_by_catch_up(journal: Journal, faulty: Faulty) -> None:
    await journal.append([b"one"])
    assert (await journal.catch_up()).seq == 1
    assert isinstance(faulty.inner, SqliteBackend)
    database = faulty.inner._database
    await faulty.inner._run(lambda: database.execute("DELETE FROM journal WHERE seq = 1"))
    with pytest.raises(StateError, match="STATE_ROLLBACK"):
        await journal.catch_up()


async def test_garbage_behind_an_open_journal_stops_it(journal: Journal, faulty: Faulty) -> None:
    await journal.append([b"one"])
    await faulty.inner.append(2, [bytes(545)])
    assert await settled(asyncio.create_task(journal.append([b"two"]))) == ["STATE_RECORD"]


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def test_sealed_rows_are_all_the_host_can_see(journal: Journal, tmp_path: Path) -> None:
    await journal.append([b"an API key of a customer", b"a ledger entry" * 20])
    await journal.close()
    stored = rows(tmp_path / "state.db")
    assert [len(blob) for _, blob in stored] == [74, 545, 545]
    raw = everything(tmp_path)
    assert b"vouchsafe/state" in raw, "the control: the header is in clear"
    assert b"customer" not in raw
    assert b"ledger" not in raw
    assert KEY not in raw
    put(tmp_path / "state.db", stored)
    assert len(await read(tmp_path / "state.db")) == 2
