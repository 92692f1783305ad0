"""Journals in real SQLite files, and the host's hands on them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from enclave.state import Backend, Checkpoint, Journal, StateConflict, StateError
from enclave.state.sqlite import SqliteBackend

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
NOW = 1_780_000_000


async def make(path: Path, *appends: Sequence[bytes], key: bytes = KEY) -> Checkpoint:
    """A journal at *path* with these appends, closed."""
    async with await Journal.create(await SqliteBackend.open(path), key, NOW) as journal:
        for records in appends:
            await journal.append(records)
        return journal.checkpoint


async def read(path: Path, key: bytes = KEY, at_least: Checkpoint | None = None) -> list[bytes]:
    """Open the journal at *path*, give its records, close it. Raises as `Journal.open` does."""
    seen: list[tuple[int, bytes]] = []
    backend = await SqliteBackend.open(path)
    try:
        journal = await Journal.open(
            backend, key, at_least=at_least, apply=lambda seq, record: seen.append((seq, record))
        )
        assert [pair async for pair in journal.replay()] == seen
        await journal.close()
    finally:
        await backend.close()
    assert [seq for seq, _ in seen] == list(range(1, len(seen) + 1))
    return [record for _, record in seen]


def refused(path: Path, key: bytes = KEY, at_least: Checkpoint | None = None) -> str:
    """The code with which the journal at *path* is refused; "" when it opens."""
    try:
        asyncio.run(read(path, key, at_least))
    except StateError as err:
        assert err.reason
        return err.code
    return ""


def rows(path: Path) -> list[tuple[int, bytes]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT seq, sealed FROM journal ORDER BY seq").fetchall()


def put(path: Path, stored: Sequence[tuple[int, bytes]]) -> None:
    """The host replaces all rows."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM journal")
        database.executemany("INSERT INTO journal VALUES (?, ?)", stored)


class Faulty:
    """A real backend with a hand between it and the journal: holds writes back, loses answers, counts.

    gate      writes wait for it
    lost      so many writes happen, and are answered with a conflict: what a retry after a lost answer sees
    before    called before each write
    """

    def __init__(self, inner: Backend, *, before: Callable[[int], None] = lambda first: None) -> None:
        self.inner, self.before = inner, before
        self.gate = asyncio.Event()
        self.gate.set()
        self.lost = 0
        self.error: Exception | None = None
        self.writes: list[int] = []

    async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
        await self.gate.wait()
        self.before(first_seq)
        if self.error is not None:
            raise self.error
        await self.inner.append(first_seq, blobs)
        self.writes.append(len(blobs))
        if self.lost:
            self.lost -= 1
            raise StateConflict(first_seq - 1)

    async def read(self, from_seq: int, limit: int) -> list[tuple[int, bytes]]:
        return await self.inner.read(from_seq, limit)

    async def last_seq(self) -> int:
        return await self.inner.last_seq()

    async def close(self) -> None:
        await self.inner.close()
