"""The SQLite backend: one process, synced writes, a layout known word for word, a file that is not trusted."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enclave.state import StateError
from enclave.state.sqlite import MIGRATIONS, SqliteBackend
from tests.enclave.state.stored import make, read, refused


async def test_file_is_ours_alone_and_so_is_its_log(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.touch(0o666)
    path.chmod(0o666)
    backend = await SqliteBackend.open(path)
    await backend.append(0, [b"x"])
    assert {p.name: p.stat().st_mode & 0o777 for p in (path, tmp_path / "state.db-wal")} == {
        "state.db": 0o600,
        "state.db-wal": 0o600,
    }
    await backend.close()


async def test_writes_are_synced_before_they_count(tmp_path: Path) -> None:
    backend = await SqliteBackend.open(tmp_path / "state.db")
    database = backend._database

    def settings_() -> list[object]:
        names = ("synchronous", "journal_mode", "locking_mode", "trusted_schema", "cell_size_check", "mmap_size")
        return [database.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await backend._run(settings_) == [2, "wal", "exclusive", 0, 1, 0]
    await backend.close()


def test_second_process_is_refused_while_the_file_is_open(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nimport enclave.state.sqlite as s\ns.BUSY_S = 0.1\n"
        "async def main():\n"
        "    try: await s.SqliteBackend.open(Path(sys.argv[1]))\n"
        "    except s.StateError as err: print(err.code)\n"
        "    else: print('open')\n"
        "asyncio.run(main())\n"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    backend = asyncio.run(SqliteBackend.open(path))
    assert other() == "STATE_LOCKED"
    asyncio.run(backend.close())
    assert other() == "open"


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "nowhere"])
async def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.db"
    if kind == "link":
        (tmp_path / "real").touch()
        path.symlink_to(tmp_path / "real")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = tmp_path / "no" / "state.db"
    with pytest.raises(StateError, match="STATE_STORAGE"):
        await SqliteBackend.open(path)


async def test_closed_backend_says_so(tmp_path: Path) -> None:
    backend = await SqliteBackend.open(tmp_path / "state.db")
    await backend.close()
    await backend.close()
    with pytest.raises(StateError, match="STATE_CLOSED"):
        await backend.last_seq()


# layouts


NEXT = "ALTER TABLE journal ADD COLUMN note TEXT"
BAD = "CREATE TABLE journal (seq INTEGER)"


def layout(path: Path) -> tuple[int, str]:
    with closing(sqlite3.connect(path)) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (sql,) = database.execute("SELECT sql FROM sqlite_schema").fetchone()
        return version, sql


async def test_older_layout_is_migrated_and_keeps_its_records(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await make(path, [b"one"], [b"two"])
    assert layout(path)[0] == len(MIGRATIONS)
    backend = await SqliteBackend.open(path, migrations=[*MIGRATIONS, NEXT])
    assert [seq for seq, _ in await backend.read(0, 10)] == [0, 1, 2]
    await backend.close()
    version, sql = layout(path)
    assert version == len(MIGRATIONS) + 1
    assert "note" in sql


async def test_migration_that_fails_leaves_the_old_layout(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await make(path, [b"one"])
    before = layout(path)
    with pytest.raises(StateError, match="STATE_STORAGE"):
        await SqliteBackend.open(path, migrations=[*MIGRATIONS, NEXT, BAD])
    assert layout(path) == before, "the first of the two steps was taken back"
    assert await read(path) == [b"one"]


async def test_newer_layout_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await (await SqliteBackend.open(path, migrations=[*MIGRATIONS, NEXT])).close()
    before = layout(path)
    with pytest.raises(StateError, match="STATE_SCHEMA"):
        await SqliteBackend.open(path)
    assert layout(path) == before


@pytest.mark.parametrize(
    "change",
    [
        ["CREATE TRIGGER t AFTER INSERT ON journal BEGIN DELETE FROM journal WHERE seq = 1; END"],
        ["CREATE TABLE other (x)"],
        ["CREATE INDEX i ON journal (sealed)"],
        ["ALTER TABLE journal RENAME TO real", "CREATE VIEW journal AS SELECT * FROM real"],
        ["PRAGMA application_id = 1"],
        ["PRAGMA user_version = 0"],
        ["PRAGMA user_version = -1"],
        ["PRAGMA user_version = 2"],
    ],
    ids=["trigger", "table", "index", "view", "application", "none", "negative", "newer"],
)
async def test_layout_that_the_host_changed_is_refused(tmp_path: Path, change: Sequence[str]) -> None:
    path = tmp_path / "state.db"
    await make(path, [b"one"])
    with closing(sqlite3.connect(path)) as database, database:
        for statement in change:
            database.execute(statement)
    with pytest.raises(StateError, match="STATE_SCHEMA"):
        await SqliteBackend.open(path)


async def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE journal (seq INTEGER PRIMARY KEY NOT NULL, sealed BLOB NOT NULL) STRICT")
    with pytest.raises(StateError, match="STATE_SCHEMA"):
        await SqliteBackend.open(path)


# bytes of the host's choosing


@pytest.mark.parametrize(
    "values", ["(1, zeroblob(70000000))", "(1, zeroblob(80000))"], ids=["70 MB", "80 KB"]
)  # fmt: skip
async def test_row_too_long_for_any_record_is_not_read_into_memory(tmp_path: Path, values: str) -> None:
    path = tmp_path / "state.db"
    await make(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"INSERT INTO journal VALUES {values}")
    with pytest.raises(StateError, match=r"STATE_STORAGE.*SQLITE_TOOBIG"):
        await read(path)


@pytest.mark.parametrize("content", [b"x" * 4096, b"SQLite format 3\x00" + bytes(4080), bytes(range(256)) * 20])
async def test_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.db"
    await asyncio.to_thread(path.write_bytes, content)
    with pytest.raises(StateError, match=r"STATE_S(TORAGE|CHEMA)"):
        await SqliteBackend.open(path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "state.db"
    asyncio.run(make(path, *([b"%d" % n] for n in range(12))))
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_the_file_is_refused_or_changes_nothing(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "state.db"
    path.write_bytes(raw)
    if refused(path) == "":
        # Without a checkpoint, damage that hides the tail looks like a shorter journal: see test_tampering.
        records = asyncio.run(read(path))
        assert records == [b"%d" % n for n in range(len(records))]


def test_truncated_file_is_refused(original: Path, tmp_path: Path) -> None:
    raw = original.read_bytes()
    for size in range(4096, len(raw), 4096):
        path = tmp_path / f"{size}.db"
        path.write_bytes(raw[:size])
        assert refused(path) in ("STATE_STORAGE", "STATE_SCHEMA"), size
    shutil.copy(original, tmp_path / "whole.db")
    assert refused(tmp_path / "whole.db") == ""
