"""An enclave's writer that is killed: appends pairs of records without end and prints what was acknowledged.

    python -m tests.enclave.state.crashing URL RUN PLACE

PLACE is when it kills itself: `never` (the parent does), `written` (SQLite has the rows, the commit has not begun),
`committed` (the commit is over, nobody has been told). Lines on stdout: `ack <record> <record> <checkpoint>`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence

from enclave.state import Backend, Journal, open_backend
from enclave.state.sqlite import SqliteBackend
from tests.enclave.state.stored import KEY, Faulty

CALLERS = 8


class Committed(Faulty):
    """Dies after a write of the real backend, before anybody hears of it."""

    countdown = -1

    async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
        await super().append(first_seq, blobs)
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)


async def main(url: str, run: str, place: str) -> None:
    inner = await open_backend(url)
    backend = Committed(inner)
    seen: list[bytes] = []
    journal = await Journal.open(backend, KEY, apply=lambda _, record: seen.append(record))
    print("open", len(seen), flush=True)
    if place == "committed":
        backend.countdown = random.randint(1, 20)
    elif place == "written":
        await die_before_commit(inner, random.randint(1, 20))
    await asyncio.gather(*(caller(journal, f"{run}.{n}") for n in range(CALLERS)))


async def caller(journal: Journal, name: str) -> None:
    for count in range(10**9):
        pair = [f"{name}.{count}.{half}" for half in "ab"]
        point = await journal.append([text.encode() for text in pair])
        # One write call per line: a line is whole or absent.
        os.write(1, f"ack {pair[0]} {pair[1]} {point.encode().hex()}\n".encode())


async def die_before_commit(backend: Backend, countdown: int) -> None:
    assert isinstance(backend, SqliteBackend)
    left = countdown

    def trace(statement: str) -> None:
        nonlocal left
        left -= statement == "COMMIT"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    database = backend._database
    await backend._run(lambda: database.set_trace_callback(trace))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
