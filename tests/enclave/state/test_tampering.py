"""What the host can do to a stored journal, and the code that refuses it. Dropping the tail needs a checkpoint."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enclave.state import Checkpoint, Journal
from enclave.state.sqlite import SqliteBackend
from tests.enclave.state.stored import KEY, OTHER_KEY, make, put, read, refused, rows

APPENDS = [[b"one"], [b"two", b"three"], [b"four" * 400], [b""], [b"six"]]
RECORDS = [record for records in APPENDS for record in records]

Row = tuple[int, bytes]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    path = tmp_path_factory.mktemp("journal") / "state.db"
    return path, asyncio.run(make(path, *APPENDS))


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows of another journal with the same records under the same key."""
    path = tmp_path_factory.mktemp("another") / "state.db"
    asyncio.run(make(path, *APPENDS))
    return rows(path)


def changed(original: tuple[Path, Checkpoint], folder: Path, stored: list[Row]) -> Path:
    path = folder / "changed.db"
    shutil.copy(original[0], path)
    put(path, stored)
    return path


def flipped(stored: list[Row], row: int, offset: int, mask: int) -> list[Row]:
    seq, blob = stored[row]
    raw = bytearray(blob)
    raw[offset] ^= mask
    return [*stored[:row], (seq, bytes(raw)), *stored[row + 1 :]]


def test_untouched_journal_opens(original: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    """The control of everything below."""
    path = changed(original, tmp_path, rows(original[0]))
    assert asyncio.run(read(path, at_least=original[1])) == RECORDS


def test_every_byte_of_the_header_counts(original: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    stored = rows(original[0])
    codes = [refused(changed(original, tmp_path, flipped(stored, 0, i, 1 << i % 8))) for i in range(len(stored[0][1]))]
    assert codes == ["STATE_HEADER"] * 18 + ["STATE_KEY"] * 56


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_byte_of_any_record_counts(
    original: tuple[Path, Checkpoint], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    stored = rows(original[0])
    row = data.draw(st.integers(1, len(stored) - 1))
    offset, mask = data.draw(st.integers(0, len(stored[row][1]) - 1)), data.draw(st.integers(1, 255))
    path = changed(original, tmp_path_factory.mktemp("flip"), flipped(stored, row, offset, mask))
    assert refused(path) == "STATE_RECORD"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_other_order_or_choice_of_rows_is_refused(
    original: tuple[Path, Checkpoint], another: list[Row], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Blobs of this and another journal under any numbers: only what was written, or a beginning of it, opens."""
    stored = rows(original[0])
    pool = [blob for _, blob in (*stored, *another[1:])]
    kept = data.draw(st.integers(0, len(stored)))
    blobs = pool[:kept] + data.draw(st.lists(st.sampled_from(pool), max_size=3))
    first = data.draw(st.sampled_from([0, 0, 0, 1]))
    path = changed(original, tmp_path_factory.mktemp("order"), list(enumerate(blobs, first)))
    # Rows 2 and 3 are one append: the journal cannot end between them.
    whole = [[blob for _, blob in stored[:n]] for n in (1, 2, 4, 5, 6, 7)]
    assert len(whole[-1]) == len(stored)
    assert (refused(path) == "") == (first == 0 and blobs in whole)
    assert (refused(path, at_least=original[1]) == "") == (first == 0 and blobs == whole[-1])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda r, _: r[:2] + r[3:], "STATE_GAP"),
        (lambda r, _: [(n, b) for n, (_, b) in enumerate(r[:2] + r[3:])], "STATE_RECORD"),
        (lambda r, _: r[1:], "STATE_HEADER"),
        (lambda r, _: [(n, b) for n, (_, b) in enumerate(r[1:])], "STATE_HEADER"),
        (lambda r, _: [*r, (len(r), r[-1][1])], "STATE_RECORD"),
        (lambda r, _: [*r, (len(r) + 1, r[-1][1])], "STATE_GAP"),
        (lambda r, _: [r[0], (1, r[2][1]), (2, r[1][1]), *r[3:]], "STATE_RECORD"),
        (lambda r, o: [*r[:3], o[3], *r[4:]], "STATE_RECORD"),
        (lambda r, o: [*r, (len(r), o[-1][1])], "STATE_RECORD"),
        (lambda r, o: [o[0], *r[1:]], "STATE_RECORD"),
        (lambda r, _: [*r[:2], (2, r[2][1][:-1]), *r[3:]], "STATE_RECORD"),
        (lambda r, _: [*r[:2], (2, b""), *r[3:]], "STATE_RECORD"),
        (lambda r, _: r[:3], "STATE_TRUNCATED"),
        (lambda r, _: [], "STATE_MISSING"),
    ],
    ids=[
        "missing", "missing-renumbered", "no-header", "no-header-renumbered", "duplicated", "duplicated-gap", "swapped",
        "foreign", "foreign-tail", "foreign-header", "cut", "empty", "within-an-append", "everything",
    ],
)  # fmt: skip
def test_changed_journal_is_refused(
    original: tuple[Path, Checkpoint],
    another: list[Row],
    tmp_path: Path,
    change: Callable[[list[Row], list[Row]], list[Row]],
    code: str,
) -> None:
    path = changed(original, tmp_path, change(rows(original[0]), another))
    assert refused(path) == code


def test_dropped_tail_is_seen_with_a_checkpoint_and_only_so(original: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    """The limit, written down: a shorter journal is whole in itself."""
    path = changed(original, tmp_path, rows(original[0])[:-1])
    assert asyncio.run(read(path)) == RECORDS[:-1]
    assert refused(path, at_least=original[1]) == "STATE_ROLLBACK"


def test_emptied_storage_is_a_rollback_to_whoever_has_a_checkpoint(
    original: tuple[Path, Checkpoint], tmp_path: Path
) -> None:
    path = changed(original, tmp_path, [])
    assert refused(path, at_least=original[1]) == "STATE_ROLLBACK"


def test_another_journal_under_the_same_key_is_a_rollback(
    original: tuple[Path, Checkpoint], another: list[Row], tmp_path: Path
) -> None:
    path = changed(original, tmp_path, another)
    assert refused(path) == ""
    assert refused(path, at_least=original[1]) == "STATE_ROLLBACK"
    assert refused(original[0], at_least=replace(original[1], state_id=bytes(16))) == "STATE_ROLLBACK"


def test_journal_that_took_another_course_is_a_rollback(original: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    """Set back by one record and run on: as long as before, and longer, but not an extension."""
    path = changed(original, tmp_path, rows(original[0])[:-1])

    async def go_on() -> Checkpoint:
        async with await Journal.open(await SqliteBackend.open(path), KEY) as journal:
            await journal.append([b"another six"])
            return await journal.append([b"seven"])

    later = asyncio.run(go_on())
    assert refused(path, at_least=original[1]) == "STATE_ROLLBACK"
    assert refused(path, at_least=later) == ""


def test_journal_may_have_grown_since_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    early = asyncio.run(make(path))

    async def grow() -> None:
        async with await Journal.open(await SqliteBackend.open(path), KEY) as journal:
            await journal.append([b"one"])

    asyncio.run(grow())
    assert asyncio.run(read(path, at_least=early)) == [b"one"]


def test_wrong_key_is_told_before_anything_else_is_read(original: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    stored = rows(original[0])
    path = changed(original, tmp_path, [stored[0], (5, b"garbage")])
    assert refused(path, OTHER_KEY) == "STATE_KEY"
    assert refused(path, KEY) == "STATE_GAP"
