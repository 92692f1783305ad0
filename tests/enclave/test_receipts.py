"""The receipt store is bounded in count, bytes and time, and gives a receipt to its credential only."""

from __future__ import annotations

import asyncio

import pytest

from enclave.receipts import ReceiptStore, new_receipt_id

MINE, YOURS = "key_mine", "key_yours"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_receipt_is_found_by_both_ids_and_by_its_credential_only() -> None:
    store = ReceiptStore()
    store.add("rcpt-1", b"{}", owner=MINE, chat_id="chat-1")
    assert await store.get("rcpt-1", MINE) == await store.get("chat-1", MINE) == b"{}"
    for id in ("rcpt-1", "chat-1"):
        assert await store.get(id, YOURS) is None
        assert await store.get(id, None) is None
    assert await store.get("rcpt-2", MINE) is None
    assert await store.get("", MINE) is None


async def test_receipt_ends_after_its_time() -> None:
    clock = Clock()
    store = ReceiptStore(keep_seconds=10, clock=clock)
    store.add("a", b"{}", owner=MINE, chat_id="c")
    clock.now = 9.9
    assert await store.get("a", MINE)
    clock.now = 10
    assert await store.get("a", MINE) is None
    assert await store.get("c", MINE) is None
    assert len(store) == 0


async def test_idle_store_forgets_by_itself() -> None:
    store = ReceiptStore(keep_seconds=0.05)
    store.add("a", b"{}", owner=MINE)
    await asyncio.sleep(0.2)
    assert len(store) == 0


@pytest.mark.parametrize("bounds", [{"max_count": 100}, {"max_bytes": 100 * 50}])
async def test_pressure_drops_the_oldest_and_never_grows(bounds: dict[str, int]) -> None:
    store = ReceiptStore(**bounds)  # type: ignore[arg-type]  # either bound, by name
    for n in range(1000):
        store.add(f"r{n}", b"x" * 50, owner=MINE, chat_id=f"c{n}")
        assert len(store) <= 100
    assert await store.get("r999", MINE)
    assert await store.get("r900", MINE)
    assert await store.get("r899", MINE) is None
    assert await store.get("c899", MINE) is None


async def test_flood_of_refused_strangers_does_not_push_out_a_customer() -> None:
    store = ReceiptStore(max_public=8)
    store.add("mine", b"{}", owner=MINE)
    for n in range(10_000):
        store.add(f"s{n}", b"{}", owner=None)
    assert await store.get("mine", MINE)
    assert len(store) == 9
    assert await store.get("s9999", None) == b"{}"


def test_receipt_larger_than_the_store_is_not_kept() -> None:
    store = ReceiptStore(max_bytes=100)
    store.add("a", b"x" * 101, owner=MINE)
    assert len(store) == 0


async def test_same_chat_id_twice_means_the_later_one() -> None:
    store = ReceiptStore(max_count=1)
    store.add("a", b"1", owner=MINE, chat_id="c")
    store.add("b", b"2", owner=MINE, chat_id="c")
    assert await store.get("c", MINE) == b"2"


async def test_receipt_is_given_out_when_its_entry_is_durable_and_never_when_it_cannot_be() -> None:
    store, loop = ReceiptStore(), asyncio.get_running_loop()
    durable, lost = loop.create_future(), loop.create_future()

    async def kept() -> None:
        await durable

    async def gone() -> None:
        await lost

    store.add("a", b"1", owner=MINE, durable=kept)
    store.add("b", b"2", owner=MINE, durable=gone)
    asked = asyncio.create_task(store.get("a", MINE))
    await asyncio.sleep(0.01)
    assert not asked.done()
    durable.set_result(None)
    assert await asked == await store.get("a", MINE) == b"1"
    lost.set_exception(OSError("the disk is full"))
    assert await store.get("b", MINE) is None


def test_ids_are_random() -> None:
    assert len({new_receipt_id() for _ in range(1000)}) == 1000
