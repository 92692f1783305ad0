"""Rate limits and fair turns once more, slow and plain: every admission kept for ever, every sum taken anew."""

from __future__ import annotations

from dataclasses import dataclass, field

from enclave.access.limits import RateLimit

MS = 10**6
SECOND = 10**9
SPANS = {"1_minute": 60 * SECOND, "1_day": 86_400 * SECOND}
UNITS = ("requests", "tokens")
Where = tuple[str, str]


class Clock:
    """Nanoseconds, as told."""

    def __init__(self) -> None:
        self.now = 7 * SECOND + 1

    def __call__(self) -> int:
        return self.now


@dataclass
class Booking:
    at: int
    requests: int
    tokens: int
    spans: frozenset[str]


@dataclass
class Reference:
    """What `Limiter` must answer. *late*: how much longer than its span a booking counts, per span."""

    bookings: dict[Where, list[Booking]] = field(default_factory=dict)
    running: list[tuple[Where, str]] = field(default_factory=list)

    def used(self, where: Where, span: str, unit: str, now: int, late: int = 0) -> int:
        inside = (b for b in self.bookings.get(where, []) if span in b.spans and now - SPANS[span] - late < b.at <= now)
        return sum(getattr(b, unit) for b in inside)

    def empty_at(self, where: Where, span: str, unit: str, now: int) -> int:
        """When the last of it leaves; *now* when nothing is left."""
        ends = (b.at + SPANS[span] for b in self.bookings.get(where, []) if span in b.spans and getattr(b, unit))
        return max(now, max(ends, default=now))

    def broken(self, where: Where, key: str, tokens: int, limit: RateLimit, now: int, late: dict[str, int]) -> set[str]:
        """Kinds of limits that one more request does not fit."""
        wrong = self.windows_broken(where, tokens, limit, now, late)
        most = limit.max_concurrent_requests
        if most is not None and sum(w == where for w, _ in self.running) >= most:
            wrong.add("concurrent_requests")
        most = limit.max_concurrent_requests_per_key
        if most is not None and self.running.count((where, key)) >= most:
            wrong.add("concurrent_requests_per_key")
        return wrong

    def windows_broken(self, where: Where, tokens: int, limit: RateLimit, now: int, late: dict[str, int]) -> set[str]:
        wrong = set()
        for span in SPANS:
            for unit, more in (("requests", 1), ("tokens", tokens)):
                most = getattr(limit, f"max_{unit}_per_{span}")
                if most is not None and self.used(where, span, unit, now, late.get(span, 0)) + more > most:
                    wrong.add(f"{unit}_per_{span}")
        return wrong

    def book(self, where: Where, key: str, tokens: int, limit: RateLimit, now: int) -> Booking:
        made = Booking(now, 1, tokens, limited_spans(limit))
        self.bookings.setdefault(where, []).append(made)
        self.running.append((where, key))
        return made

    def settle(self, where: Where, booking: Booking, actual: int, now: int) -> None:
        if actual <= booking.tokens:
            booking.tokens = actual
        else:
            self.bookings[where].append(Booking(now, 0, actual - booking.tokens, booking.spans))


def limited_spans(limit: RateLimit) -> frozenset[str]:
    return frozenset(
        span for span in SPANS if any(getattr(limit, f"max_{unit}_per_{span}") is not None for unit in UNITS)
    )
