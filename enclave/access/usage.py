"""Sums of ledger entries, kept so that a question about a month does not read a month of entries.

An entry is added once, when it is settled or replayed, to three levels: its minute, its hour and its day (UTC). A level
maps the start of a bucket to one **cell** per (project, key, model, operation); a cell is ten integers. A bucket of any
width is then one look-up, and an answer costs its buckets times the groups that were active in them: a month by days
over a million entries reads at most 31 buckets. Minutes and hours are dropped when they are old, days never; a question
about what was dropped is refused, not answered with less. Entries stay in the journal, for good.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from enclave.access.entries import Entry, Operation
from enclave.access.prices import Lines

__all__ = [
    "CACHED",
    "CHARGES",
    "INPUT",
    "NANOUSD",
    "OUTPUT",
    "REASONING",
    "REQUESTS",
    "SECONDS",
    "Cell",
    "Group",
    "Level",
    "UsageIndex",
    "Width",
]

Width = Literal["1m", "1h", "1d"]
SECONDS: Final[dict[Width, int]] = {"1m": 60, "1h": 3600, "1d": 86_400}
KEEP_SECONDS: Final[dict[Width, int | None]] = {"1m": 8 * 86_400, "1h": 100 * 86_400, "1d": None}


class Group(NamedTuple):
    """What a cell is about."""

    project: str
    key_id: str
    model: str
    operation: Operation


REQUESTS, INPUT, CACHED, OUTPUT, REASONING, CHARGES = range(6)
"""Where a cell has its counts: entries, tokens of four kinds, and entries with a fixed price."""
NANOUSD: Final = slice(6, 10)
"""Where it has its amounts: uncached input, cached input, output, fixed prices."""

Cell = array  # of ten signed 64-bit integers: 9.2 billion USD
_NOTHING: Final[Mapping[Group, Cell[int]]] = {}


class Level:
    """Buckets of one width, oldest first: entries come in the order of their times."""

    def __init__(self, seconds: int, keep: int | None) -> None:
        self.seconds, self._keep = seconds, keep
        self.floor = 0
        """No bucket that starts before this is kept."""
        self._buckets: OrderedDict[int, dict[Group, Cell[int]]] = OrderedDict()

    def add(self, time: int, group: Group, values: tuple[int, ...]) -> None:
        start = time - time % self.seconds
        bucket = self._buckets.get(start)
        if bucket is None:
            bucket = self._buckets[start] = {}
            self._drop(start)
        cell = bucket.get(group)
        if cell is None:
            bucket[group] = array("q", values)
        else:
            for i, value in enumerate(values):
                cell[i] += value

    def bucket(self, start: int) -> Mapping[Group, Cell[int]]:
        """The cells of the bucket that starts at *start*, a multiple of the width."""
        return self._buckets.get(start, _NOTHING)

    def _drop(self, newest: int) -> None:
        while self._keep is not None and (oldest := next(iter(self._buckets))) < newest - self._keep:
            del self._buckets[oldest]
            self.floor = oldest + self.seconds


class UsageIndex:
    """The three levels."""

    def __init__(self) -> None:
        self.levels: dict[Width, Level] = {w: Level(SECONDS[w], KEEP_SECONDS[w]) for w in SECONDS}
        self._groups: dict[Group, Group] = {}

    def add(self, entry: Entry, lines: Lines) -> None:
        """Count *entry*, whose cost is *lines*."""
        made = Group(entry.project, entry.key_id, entry.model, entry.operation)
        group = self._groups.setdefault(made, made)  # one object per group, however many cells name it
        u = entry.usage
        values = (
            1, u.input_tokens, u.cached_tokens, u.output_tokens, u.reasoning_tokens,
            int(lines.request > 0), lines.input, lines.cached_input, lines.output, lines.request,
        )  # fmt: skip
        for level in self.levels.values():
            level.add(entry.time, group, values)
