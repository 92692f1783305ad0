"""Killed at any moment: what was acknowledged is there, once, in whole appends, and the chain holds.

SIGKILL ends a process, not a disk: what a power cut may take is SQLite's `synchronous = FULL` (`test_sqlite`).
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from enclave.state import Checkpoint
from tests.enclave.state.stored import make, read

ROUNDS = 10


def crash(url: str, run: int, place: str) -> tuple[list[str], Checkpoint | None]:
    """Let the writer run until it is dead; what it said was durable, and the furthest checkpoint it gave."""
    command = [sys.executable, "-m", "tests.enclave.state.crashing", url, str(run), place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("open")
        if place == "never":
            time.sleep(random.uniform(0.0, 0.25))
            process.kill()
        out = process.stdout.read()
        assert process.wait(60) == -signal.SIGKILL
    acks = [line.split() for line in out.splitlines() if line.startswith("ack")]
    points = [Checkpoint.decode(bytes.fromhex(ack[3])) for ack in acks]
    return [name for ack in acks for name in ack[1:3]], max(points, key=lambda p: p.seq, default=None)


@pytest.mark.parametrize("place", ["never", "written", "committed"])
def test_killed_writer_loses_nothing_acknowledged_and_doubles_nothing(tmp_path: Path, place: str) -> None:
    path = tmp_path / "state.db"
    known: Checkpoint | None = asyncio.run(make(path))
    acknowledged: list[str] = []
    unheard = 0
    for run in range(ROUNDS):
        acks, latest = crash(f"sqlite:{path}", run, place)
        acknowledged += acks
        known = latest or known
        records = [record.decode() for record in asyncio.run(read(path, at_least=known))]
        counts = Counter(records)
        assert max(counts.values(), default=1) == 1, "a record is there twice"
        assert not [name for name in acknowledged if name not in counts], "an acknowledged record is gone"
        assert all(a[:-1] == b[:-1] for a, b in zip(records[::2], records[1::2], strict=True)), "half an append"
        unheard = len(records) - len(acknowledged)
    assert acknowledged or place != "never", "the control: something was written before the end"
    assert unheard > 0 or place != "committed", "the control: the writer died between commit and answer"
