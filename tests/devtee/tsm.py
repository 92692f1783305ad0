"""A directory shaped like configfs-tsm: mkdir an entry, write 64 bytes to `inblob`, read the quote from `outblob`.

What the kernel does at once, this does by looking every few milliseconds. `outblob` is a FIFO, so that a read blocks
until the quote is there, as it does on hardware; one answer per write. A write is noticed by the modification time
of `inblob`, which is set to a mark after each: the same bytes written again are another request.

Runs in the development TEE's own process, in its one loop; never blocks.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["TsmDirectory"]

MARK: Final = 1_000_000_000
"""Modification time (ns) of an inblob that was already served. A write moves it to now."""
MAX_ENTRIES: Final = 64
REPORT_DATA: Final = 64


@dataclass(slots=True)
class _Entry:
    generation: int = 0
    answer: bytes | None = None
    """What the next reader of outblob gets; None when nothing is owed."""


class TsmDirectory:
    """Serves *path*. *make_quote* turns report data into the bytes the platform would return."""

    def __init__(self, path: Path, make_quote: Callable[[bytes], bytes]) -> None:
        self._path, self._make_quote = path, make_quote
        self._entries: dict[str, _Entry] = {}
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)

    def poll(self) -> None:
        """Look once: new and removed entries, new requests, waiting readers."""
        present = {e.name for e in os.scandir(self._path) if e.is_dir(follow_symlinks=False)}
        for name in self._entries.keys() - present:
            del self._entries[name]
        for name in present - self._entries.keys():
            if len(self._entries) < MAX_ENTRIES:
                self._add(name)
        for name, entry in self._entries.items():
            # An entry may be removed between any two of these calls: then there is nobody to serve.
            with suppress(FileNotFoundError):
                self._serve(self._path / name, entry)

    def close(self) -> None:
        """Remove every entry: a reader that still waits on a FIFO is let go with an empty answer first."""
        for name in self._entries:
            with suppress(OSError):
                os.close(os.open(self._path / name / "outblob", os.O_WRONLY | os.O_NONBLOCK))
        shutil.rmtree(self._path, ignore_errors=True)
        self._entries.clear()

    def _add(self, name: str) -> None:
        where = self._path / name
        try:
            os.mkfifo(where / "outblob", 0o600)
            (where / "generation").write_text("0\n")
            (where / "provider").write_text("tdx_guest\n")
            (where / "auxblob").write_bytes(b"")
            (where / "manifestblob").write_bytes(b"")
            # Last, and marked before it appears: whoever sees inblob sees the others.
            fresh = self._path.parent / f".inblob-{name}"
            fresh.write_bytes(b"")
            os.utime(fresh, ns=(MARK, MARK))
            fresh.rename(where / "inblob")
        except FileNotFoundError:
            return
        self._entries[name] = _Entry()

    def _serve(self, where: Path, entry: _Entry) -> None:
        inblob = where / "inblob"
        found = inblob.stat()
        if found.st_mtime_ns != MARK and found.st_size:
            # Mark before reading: a write that comes in between moves the time again and is served next.
            os.utime(inblob, ns=(MARK, MARK))
            asked = inblob.read_bytes()
            entry.generation += 1
            with (where / "generation").open("r+b") as handle:
                handle.write(f"{entry.generation}\n".encode())
            # Another length is EINVAL on hardware; a file cannot say so, an empty outblob does.
            entry.answer = self._make_quote(asked) if len(asked) == REPORT_DATA else b""
        if entry.answer is not None and _hand_over(where / "outblob", entry.answer):
            entry.answer = None


def _hand_over(fifo: Path, answer: bytes) -> bool:
    """Give *answer* to a reader that waits; False when none does yet. A quote fits the FIFO's 64 KiB at once."""
    try:
        handle = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as err:
        if err.errno == errno.ENXIO:
            return False
        raise
    try:
        if answer:
            os.write(handle, answer)
    except BrokenPipeError:
        pass
    finally:
        os.close(handle)
    return True
