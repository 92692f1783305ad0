"""Rate limits of one model in one project: how many requests and tokens in any minute and in any day, and how many
requests at a time. Runs in the enclave, in its one process and event loop: no await between check and booking, so the
numbers are exact however many requests come at once.

  (1) A request counts, and its tokens count, from the moment it is admitted until a full window later: an admission at
      t is in the window at now while now - 60 s < t. In no 60 seconds, wherever they begin, is more than the limit
      admitted. (A token bucket lets up to twice the limit through in 60 s, counters that start anew each minute too.)
  (2) `admit` books one request and what it may use at most. `settle` puts the use in place of the estimate: what was
      not used is free again at once; what was used beyond it, which a right estimate rules out, counts from then on.
  (3) A refusal books nothing. Its retry-after is when enough leaves every window, if nothing else happens until then.

The window is a log of admissions. Up to `EXACT` of them are kept one by one, and nothing is ever refused that fits.
Above that, admissions of the same quarter of a second (two minutes for the day) are kept as one, with the time of the
latest: they leave the window up to that much late, so the limit still holds exactly and is strict by less than 0.5 %.
Admission is amortised O(1); a refusal walks over one log at most. One project and model take at most `STATE_BYTES`,
whatever the limits and the traffic, and nothing when idle for a window.

What has no limit is not booked: a limit set later counts from then. A restart forgets the windows; budgets, which must
outlive one, are the ledger's.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Final, Literal

from attestation.errors import VouchsafeError
from enclave.access.records import ModelLimit

__all__ = ["EXACT", "MAX_TOKENS", "STATE_BYTES", "LimitExceeded", "Limiter", "RateLimit", "Ticket", "duration"]

EXACT: Final = 256
"""Admissions per window that are kept one by one."""
MAX_TOKENS: Final = 1 << 31
"""Tokens of one request. No context is near it: callers cut `max_tokens` to the model's context first."""
STATE_BYTES: Final = 262_144
"""The most memory of one project and model (CPython 3.11; held by a test), without its requests under way."""
RETRY_CONCURRENT_MS: Final = 1000
"""Nobody knows when a request under way will end. The one retry-after that is a guess."""

_MS: Final = 10**6
_SECOND: Final = 10**9
_MINUTE: Final = (60 * _SECOND, _SECOND // 4)
_DAY: Final = (86_400 * _SECOND, 120 * _SECOND)
"""Span of a window and its grain, nanoseconds."""
_MAX_LIMIT: Final = 2**53 - 1

Kind = Literal[
    "requests_per_1_minute",
    "tokens_per_1_minute",
    "requests_per_1_day",
    "tokens_per_1_day",
    "concurrent_requests",
    "concurrent_requests_per_key",
]


@dataclass(frozen=True, slots=True)
class RateLimit(ModelLimit):
    """What the organisation keeps of one model in one project, and of its requests at a time those with one key.
    Integers from 0 (nothing passes); None: not limited."""

    max_concurrent_requests_per_key: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and (type(value) is not int or not 0 <= value <= _MAX_LIMIT):
                raise ValueError(f"{each.name} is an integer from 0 to {_MAX_LIMIT}, or None")


class LimitExceeded(VouchsafeError):
    """A request that does not fit now; nothing was booked. `ACCESS_LIMIT`.

    kind       the limit that will hold it back for longest, of those it does not fit
    limit, remaining   of that kind
    retry_after_ms   when the request fits every limit if nothing else happens; None: never, it is larger than a limit.
               For requests at a time it is a guess
    """

    def __init__(self, kind: Kind, limit: int, remaining: int, wanted: int, retry_after_ms: int | None) -> None:
        self.kind, self.limit, self.remaining, self.retry_after_ms = kind, limit, remaining, retry_after_ms
        super().__init__(
            "ACCESS_LIMIT",
            f"limit of {kind.replace('_', ' ')} reached",
            expected=f"<= {remaining} of {limit}",
            actual=wanted,
            hint="larger than the limit itself" if retry_after_ms is None else f"try again in {retry_after_ms} ms",
        )


class _Entry:
    """Admissions at one time, or of one grain. `live`: still in its window."""

    __slots__ = ("at", "live", "requests", "tokens")

    def __init__(self, at: int, requests: int, tokens: int) -> None:
        self.at, self.requests, self.tokens, self.live = at, requests, tokens, True


_Booked = tuple[_Entry | None, _Entry | None]
"""Where a request stands in the minute and in the day; None: not limited there."""
_Unit = Literal["requests", "tokens"]


class _Window:
    """The log of one span, oldest first, and its sums."""

    __slots__ = ("_exact", "_grain", "_log", "_span", "requests", "tokens")

    def __init__(self, span_and_grain: tuple[int, int], exact: int) -> None:
        self._span, self._grain = span_and_grain
        self._exact = exact
        self._log: deque[_Entry] = deque()
        self.requests = self.tokens = 0

    def __len__(self) -> int:
        return len(self._log)

    def advance(self, now: int) -> None:
        """Forget what has left the window."""
        log, horizon = self._log, now - self._span
        while log and log[0].at <= horizon:
            gone = log.popleft()
            gone.live = False
            self.requests -= gone.requests
            self.tokens -= gone.tokens

    def add(self, now: int, requests: int, tokens: int) -> _Entry:
        """At most `exact` entries are made while the log is short, and one per grain when it is not: the log is never
        longer than both together."""
        log = self._log
        self.requests += requests
        self.tokens += tokens
        if len(log) >= self._exact and log[-1].at // self._grain == now // self._grain:
            last = log[-1]
            last.at = now  # the later: whatever leaves late is strict, whatever leaves early breaks the limit
            last.requests += requests
            last.tokens += tokens
            return last
        log.append(entry := _Entry(now, requests, tokens))
        return entry

    def give_back(self, entry: _Entry, tokens: int) -> None:
        if entry.live:
            entry.tokens -= tokens
            self.tokens -= tokens

    def used(self, unit: _Unit) -> int:
        return self.requests if unit == "requests" else self.tokens

    def free_at(self, unit: _Unit, amount: int) -> int:
        """When *amount* (at most what is used) will have left the window."""
        at = 0
        for entry in self._log:
            at = entry.at + self._span
            amount -= entry.requests if unit == "requests" else entry.tokens
            if amount <= 0:
                break
        return at

    def empty_at(self, unit: _Unit) -> int:
        """When nothing of *unit* will be left; 0 when nothing is."""
        for entry in reversed(self._log):
            if (entry.requests if unit == "requests" else entry.tokens) > 0:
                return entry.at + self._span
        return 0


class _State:
    """What is booked and under way for one project and model. Keys stand here only while they have a request."""

    __slots__ = ("by_key", "day", "minute", "running")

    def __init__(self, exact: int) -> None:
        self.minute, self.day = _Window(_MINUTE, exact), _Window(_DAY, exact)
        self.running = 0
        self.by_key: dict[str, int] = {}

    def advance(self, now: int) -> None:
        self.minute.advance(now)
        self.day.advance(now)

    @property
    def idle(self) -> bool:
        return not self.running and not self.minute and not self.day


class Ticket:
    """One admitted request. `settle` with what it used and `release` when it has ended, in either order, whatever
    happened; or use it as a context, which releases. Unsettled, the whole estimate stays booked.

    Holding one proves that the request was within the limits when it was admitted."""

    __slots__ = ("_booked", "_limiter", "_released", "_settled", "_where", "key_id", "tokens")

    def __init__(self, limiter: Limiter, where: tuple[str, str], key_id: str, tokens: int, booked: _Booked) -> None:
        self._limiter, self._where, self._booked = limiter, where, booked
        self.key_id, self.tokens = key_id, tokens
        self._settled: int | None = None
        self._released = False

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def settle(self, actual_tokens: int) -> None:
        """Book *actual_tokens* in place of the estimate. Once; the same again changes nothing, another number is an
        error of ours and changes nothing either. Raises ValueError for what no request can use."""
        _check(actual_tokens)
        if self._settled is not None:
            assert self._settled == actual_tokens, "a ticket is settled once"
            return
        self._settled = actual_tokens
        self._limiter._settle(self._where, self._booked, actual_tokens - self.tokens)

    def release(self) -> None:
        """The request has ended. Once; again changes nothing."""
        if not self._released:
            self._released = True
            self._limiter._release(self._where, self.key_id)


class Limiter:
    """All windows of this process. See the module.

    clock   nanoseconds that do not go back (`time.monotonic_ns`)
    exact   see `EXACT`
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, *, exact: int = EXACT) -> None:
        self._clock, self._exact = clock, exact
        self._states: OrderedDict[tuple[str, str], _State] = OrderedDict()
        self._latest = clock()

    def __len__(self) -> int:
        """Projects and models with anything booked or under way, and some that have just become idle."""
        return len(self._states)

    def admit(self, project_id: str, key_id: str, model: str, tokens: int, limit: RateLimit) -> Ticket:
        """Book one request of at most *tokens* (prompt, and `max_tokens` times `n`) under *limit*, all or nothing.

        Raises `LimitExceeded`; ValueError for a number of tokens that no request can have."""
        _check(tokens)
        now = self._now()
        self._sweep(now)
        where = (project_id, model)
        state = self._fitting(where, key_id, tokens, limit, now)
        self._states[where] = state
        state.running += 1
        state.by_key[key_id] = state.by_key.get(key_id, 0) + 1
        minute = limit.max_requests_per_1_minute is not None or limit.max_tokens_per_1_minute is not None
        day = limit.max_requests_per_1_day is not None or limit.max_tokens_per_1_day is not None
        booked = (
            state.minute.add(now, 1, tokens) if minute else None,
            state.day.add(now, 1, tokens) if day else None,
        )
        return Ticket(self, where, key_id, tokens, booked)

    def check(self, project_id: str, key_id: str, model: str, limit: RateLimit) -> None:
        """Raise `LimitExceeded` when not even a request of one token fits; book nothing. For what must be done before
        the tokens of a request are known, and should not be done for one that has no chance."""
        self._fitting((project_id, model), key_id, 1, limit, self._now())

    def _fitting(self, where: tuple[str, str], key_id: str, tokens: int, limit: RateLimit, now: int) -> _State:
        state = self._states.get(where) or _State(self._exact)
        state.advance(now)
        if over := list(_over(state, key_id, tokens, limit, now)):
            raise max(over, key=_longest)
        return state

    def headers(self, project_id: str, model: str, limit: RateLimit) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` from what the next `admit` would look at.

        Of a minute and a day, the one with less remaining is told. *reset* is when all of it remains again. Nothing is
        told of what is not limited."""
        now = self._now()
        state = self._states.get((project_id, model)) or _State(self._exact)
        state.advance(now)
        made: list[tuple[bytes, bytes]] = []
        units: tuple[_Unit, _Unit] = ("requests", "tokens")
        for unit in units:
            told = [
                (max(0, cap - window.used(unit)), -_ms(window.empty_at(unit) - now), cap)
                for of, window, cap, _ in _windows(state, limit)
                if of == unit and cap is not None
            ]
            if told:
                remaining, reset, cap = min(told)
                for name, text in (("limit", str(cap)), ("remaining", str(remaining)), ("reset", duration(-reset))):
                    made.append((f"x-ratelimit-{name}-{unit}".encode("ascii"), text.encode("ascii")))
        return made

    def _settle(self, where: tuple[str, str], booked: _Booked, more: int) -> None:
        if not more:
            return
        state = self._states.get(where)
        if state is None:  # its windows are long over
            if more < 0:
                return
            state = self._states[where] = _State(self._exact)
        now = self._now()
        for entry, window in zip(booked, (state.minute, state.day), strict=True):
            if entry is None:
                continue
            window.advance(now)
            if more < 0:
                window.give_back(entry, -more)
            else:
                window.add(now, 0, more)

    def _release(self, where: tuple[str, str], key_id: str) -> None:
        state = self._states[where]  # not idle, so not dropped
        state.running -= 1
        left = state.by_key.pop(key_id) - 1
        if left:
            state.by_key[key_id] = left

    def _now(self) -> int:
        self._latest = max(self._latest, self._clock())
        return self._latest

    def _sweep(self, now: int) -> None:
        """Look at two states, in turn, and drop those that are idle. An admission makes at most one, so the idle never
        outnumber the others for long."""
        for _ in range(min(2, len(self._states))):
            where, state = self._states.popitem(last=False)
            state.advance(now)
            if not state.idle:
                self._states[where] = state


def duration(ms: int) -> str:
    """Milliseconds as OpenAI writes them, which is as Go does: `0s`, `12ms`, `1s`, `1.5s`, `6m0s`, `24h0m0s`."""
    if 0 < ms < 1000:
        return f"{ms}ms"
    seconds, rest = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{rest:03}".rstrip("0") if rest else ""
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds}{fraction}s"


def _windows(state: _State, limit: RateLimit) -> tuple[tuple[_Unit, _Window, int | None, Kind], ...]:
    return (
        ("requests", state.minute, limit.max_requests_per_1_minute, "requests_per_1_minute"),
        ("tokens", state.minute, limit.max_tokens_per_1_minute, "tokens_per_1_minute"),
        ("requests", state.day, limit.max_requests_per_1_day, "requests_per_1_day"),
        ("tokens", state.day, limit.max_tokens_per_1_day, "tokens_per_1_day"),
    )


def _over(state: _State, key_id: str, tokens: int, limit: RateLimit, now: int) -> Iterator[LimitExceeded]:
    """Every limit that one more request of *tokens* does not fit."""
    for unit, window, cap, kind in _windows(state, limit):
        if cap is None:
            continue
        used, wanted = window.used(unit), 1 if unit == "requests" else tokens
        if wanted > cap:
            yield LimitExceeded(kind, cap, max(0, cap - used), wanted, None)
        elif used + wanted > cap:
            wait = _ms(window.free_at(unit, used + wanted - cap) - now)
            yield LimitExceeded(kind, cap, max(0, cap - used), wanted, wait)
    at_a_time: tuple[tuple[Kind, int | None, int], ...] = (
        ("concurrent_requests", limit.max_concurrent_requests, state.running),
        ("concurrent_requests_per_key", limit.max_concurrent_requests_per_key, state.by_key.get(key_id, 0)),
    )
    for kind, cap, running in at_a_time:
        if cap is not None and running >= cap:
            yield LimitExceeded(kind, cap, 0, 1, RETRY_CONCURRENT_MS if cap else None)


def _longest(over: LimitExceeded) -> float:
    return float("inf") if over.retry_after_ms is None else over.retry_after_ms


def _ms(nanoseconds: int) -> int:
    """Rounded up: whoever waits so long has waited long enough."""
    return max(0, -(-nanoseconds // _MS))


def _check(tokens: int) -> None:
    if type(tokens) is not int or not 0 <= tokens <= MAX_TOKENS:
        raise ValueError(f"a request has from 0 to {MAX_TOKENS} tokens")
