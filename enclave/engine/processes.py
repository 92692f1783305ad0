"""Child processes of this process: found by pid, ended by pid, never by name."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

__all__ = ["alive", "descendants", "end"]


def descendants(root: int | None = None) -> dict[int, str]:
    """pid → start time of every living process below *root* (this process): the pair names a process for good."""
    parents: dict[int, int] = {}
    starts: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = stat.rpartition(")")[2].split()
        if fields[0] not in "ZX":
            parents[int(entry.name)] = int(fields[1])
            starts[int(entry.name)] = fields[19]
    found: dict[int, str] = {}
    grown = {os.getpid() if root is None else root}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown and pid not in found}
        found.update({pid: starts[pid] for pid in grown})
    return found


def alive(processes: dict[int, str]) -> dict[int, str]:
    """Those of *processes* that still run, recognised by pid and start time."""
    still: dict[int, str] = {}
    for pid, start in processes.items():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = stat.rpartition(")")[2].split()
        if fields[0] not in "ZX" and fields[19] == start:
            still[pid] = start
    return still


async def end(processes: dict[int, str], *, patience: float) -> int:
    """Wait *patience* seconds for *processes* to end, then kill those that have not. Returns how many were killed."""
    left = await _wait(processes, patience)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    await _wait(left, 5)
    return len(left)


async def _wait(processes: dict[int, str], patience: float) -> dict[int, str]:
    """Those of *processes* that still run after *patience* seconds at most."""
    for _ in range(round(patience / 0.05)):
        if not alive(processes):
            break
        await asyncio.sleep(0.05)
    return alive(processes)
