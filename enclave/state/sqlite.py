"""The journal's blobs in one SQLite file: for one enclave, on a disk of the host's.

The host can put any file there, so SQLite is told to trust none of it: no functions or triggers from the schema, sizes
capped, the schema compared word for word with the one this release makes. One thread owns the connection. Writes are
in the write-ahead log, synced before they count; the file is locked for this process alone for as long as it is open.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from enclave.state.base import MAX_BLOB, StateConflict, StateError, check_batch

__all__ = ["MIGRATIONS", "SqliteBackend"]

T = TypeVar("T")

MIGRATIONS: Final[Sequence[str]] = (
    "CREATE TABLE journal (seq INTEGER PRIMARY KEY NOT NULL, sealed BLOB NOT NULL) STRICT",
)
"""Step n leads from layout n to n + 1. Steps are added at the end and never changed."""

BUSY_S: Final = 5.0
_APPLICATION: Final = 0x76736A31  # "vsj1"
_MAX_SQL: Final = 10_000


class SqliteBackend:
    """See `enclave.state.base.Backend`. Made by `open`."""

    def __init__(self, thread: ThreadPoolExecutor, database: sqlite3.Connection) -> None:
        self._thread, self._database = thread, database
        self._closed = False

    @classmethod
    async def open(cls, path: Path, *, migrations: Sequence[str] = MIGRATIONS) -> SqliteBackend:
        """Open or make the file *path* (mode 0600). Raises `StateError`: LOCKED, SCHEMA or STORAGE.

        An older layout is brought to this release's in one transaction; a newer or foreign one is refused.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="state-sqlite")
        try:
            database = await _in(thread, lambda: _open(path, migrations))
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(thread, database)

    async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
        check_batch(first_seq, blobs)
        await self._run(lambda: _append(self._database, first_seq, blobs))

    async def read(self, from_seq: int, limit: int) -> list[tuple[int, bytes]]:
        def read() -> list[tuple[int, bytes]]:
            query = "SELECT seq, sealed FROM journal WHERE seq >= ? ORDER BY seq LIMIT ?"
            rows = self._database.execute(query, (from_seq, limit)).fetchall()
            if not all(type(seq) is int and type(sealed) is bytes for seq, sealed in rows):
                raise StateError("STATE_STORAGE", "a stored row has values of the wrong type")
            return rows

        return await self._run(read)

    async def last_seq(self) -> int:
        return await self._run(lambda: _last(self._database))

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                await _in(self._thread, self._database.close)
            finally:
                self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise StateError("STATE_CLOSED", "the storage is closed")
        return await _in(self._thread, work)


async def _in(thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Run *work* in *thread*. A caller that is cancelled leaves it running: a write is never cut short."""
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    except sqlite3.Error as err:
        name = getattr(err, "sqlite_errorname", type(err).__name__)
        if name in ("SQLITE_BUSY", "SQLITE_LOCKED"):
            raise StateError(
                "STATE_LOCKED", "another process has the state file open", hint="stop it, or use PostgreSQL for both"
            ) from err
        # SQLite's own words can quote what the host put into the file.
        raise StateError(
            "STATE_STORAGE", "SQLite could not read or write the state file", actual=name,
            hint="is the disk full or damaged? restore the file from a copy",
        ) from None  # fmt: skip
    except OSError as err:
        raise StateError("STATE_STORAGE", "the state file cannot be used", actual=err.strerror) from err


def _open(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    _make(path)
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, cached_statements=16)
    try:
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BLOB + _MAX_SQL)
        database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _MAX_SQL)
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        for pragma in (
            "trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "temp_store = MEMORY",
            "locking_mode = EXCLUSIVE", "synchronous = FULL",
        ):  # fmt: skip
            database.execute(f"PRAGMA {pragma}")
        if database.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StateError("STATE_STORAGE", "SQLite cannot keep a write-ahead log for this file")
        _migrate(database, migrations)
    except BaseException:
        database.close()
        raise
    return database


def _make(path: Path) -> None:
    """A plain file that only we may read, its name on disk before anything is in it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StateError("STATE_STORAGE", "the state file is no plain file")
        os.fchmod(descriptor, 0o600)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        os.close(descriptor)


def _migrate(database: sqlite3.Connection, migrations: Sequence[str]) -> None:
    """Bring the layout to the last one, in one transaction; then it must be exactly what *migrations* make."""
    database.execute("BEGIN IMMEDIATE")  # takes the exclusive lock and keeps it
    try:
        version, application = _pragma(database, "user_version"), _pragma(database, "application_id")
        schema = _schema(database)
        if (version > 0) != (application == _APPLICATION) or (version == 0 and schema):
            raise _layout("is not the state file of an enclave", "", f"application {application:#x}, layout {version}")
        if not 0 <= version <= len(migrations):
            raise _layout("has a layout newer than this release", f"<= {len(migrations)}", version)
        if schema != _made_by(migrations[:version]):
            raise _layout("does not have the tables that its layout says", f"layout {version}", "others")
        for step in migrations[version:]:
            database.execute(step)
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {len(migrations)}")
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _made_by(migrations: Sequence[str]) -> list[tuple[str, ...]]:
    scratch = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for step in migrations:
            scratch.execute(step)
        return _schema(scratch)
    finally:
        scratch.close()


def _schema(database: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Every table, index, view and trigger with its SQL. A file with more than a few is refused before it is read."""
    return database.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name LIMIT 100").fetchall()


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


def _last(database: sqlite3.Connection) -> int:
    last = database.execute("SELECT max(seq) FROM journal").fetchone()[0]
    return -1 if last is None else int(last)


def _append(database: sqlite3.Connection, first_seq: int, blobs: Sequence[bytes]) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        if (last := _last(database)) != first_seq - 1:
            raise StateConflict(first_seq - 1, last)
        database.executemany("INSERT INTO journal (seq, sealed) VALUES (?, ?)", enumerate(blobs, first_seq))
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _layout(what: str, expected: object, actual: object) -> StateError:
    return StateError(
        "STATE_SCHEMA", f"the state file {what}", expected=expected, actual=actual,
        hint="name another file, or start the release that wrote this one",
    )  # fmt: skip
