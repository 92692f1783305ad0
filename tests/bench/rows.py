"""What a benchmark says: one row per promise, measured side by side, as a table and as JSON."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

__all__ = [
    "Row",
    "adds_at_most",
    "at_least",
    "at_most",
    "fact",
    "interleaved",
    "rate_at_least",
    "ratio_at_most",
    "table",
]


@dataclass(frozen=True)
class Row:
    """One measurement. Units stand in the name.

    ours, peer   medians; peer None without one
    ratio        of the two, as the goal says which way round
    goal         what was promised, in words; empty for a number that is only shown
    holds        whether it was kept here and now; None without a goal
    """

    name: str
    ours: float
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    goal: str = ""
    holds: bool | None = None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def fact(name: str, ours: float) -> Row:
    """A number without a promise."""
    return Row(name, ours)


def at_most(name: str, ours: float, limit: float, unit: str) -> Row:
    return Row(name, ours, goal=f"<= {limit:g} {unit}", holds=ours <= limit)


def adds_at_most(name: str, ours: float, peer: float, peer_name: str, limit: float, unit: str) -> Row:
    """We may take at most *limit* more than the peer."""
    return Row(name, ours, peer, peer_name, ours / peer, f"ours - peer <= {limit:g} {unit}", ours - peer <= limit)


def ratio_at_most(name: str, ours: float, peer: float, peer_name: str, limit: float) -> Row:
    """We may take at most *limit* times the peer's time."""
    ratio = ours / peer
    return Row(name, ours, peer, peer_name, ratio, f"ours / peer <= {limit:g}", ratio <= limit)


def at_least(name: str, ours: float, peer: float, peer_name: str, limit: float) -> Row:
    """The peer takes at least *limit* times our time."""
    ratio = peer / ours
    return Row(name, ours, peer, peer_name, ratio, f"peer / ours >= {limit:g}", ratio >= limit)


def rate_at_least(name: str, ours: float, peer: float, peer_name: str, limit: float) -> Row:
    """Our rate is at least *limit* of the peer's."""
    ratio = ours / peer
    return Row(name, ours, peer, peer_name, ratio, f"ours / peer >= {limit:g}", ratio >= limit)


def interleaved(contestants: Mapping[str, Callable[[], object]], *, rounds: int, cpu: bool = False) -> dict[str, float]:
    """Median milliseconds of each contestant. They take turns, so that what else the machine does hits all alike; the
    first turn is not counted. A contestant that returns a float has measured itself.

    cpu   this process's CPU time instead of the clock's: for work that waits for nothing, on a machine that others use
    """
    clock = time.process_time if cpu else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    for number in range(rounds + 1):
        for name, run in contestants.items():
            started = clock()
            told = run()
            spent = told if isinstance(told, float) else (clock() - started) * 1000
            if number:
                times[name].append(spent)
    return {name: statistics.median(found) for name, found in times.items()}


def table(rows: list[Row]) -> str:
    """The rows for a person, goals that were missed plainly said."""
    head = ("", "ours", "peer", "ratio", "goal", "")
    lines = [head, *(_line(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 4, 5) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(row: Row) -> tuple[str, ...]:
    words = {None: "", True: "holds", False: "MISSED"}
    name = f"{row.name} vs {row.peer_name}" if row.peer_name else row.name
    return name, _number(row.ours), _number(row.peer), _number(row.ratio), row.goal, words[row.holds]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
