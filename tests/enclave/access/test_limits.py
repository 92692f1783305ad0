from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from dataclasses import dataclass, fields

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from enclave.access.limits import (
    EXACT,
    MAX_TOKENS,
    STATE_BYTES,
    Limiter,
    LimitExceeded,
    RateLimit,
    Ticket,
    duration,
)
from tests.enclave.access.reference import MS, SECOND, SPANS, UNITS, Booking, Clock, Reference, Where

GRAIN = {"1_minute": SECOND // 4, "1_day": 120 * SECOND}
MINUTE, DAY = SPANS["1_minute"], SPANS["1_day"]


def refused(limiter: Limiter, tokens: int, limit: RateLimit, *, key: str = "k") -> LimitExceeded:
    with pytest.raises(LimitExceeded) as caught:
        limiter.admit("p", key, "m", tokens, limit)
    return caught.value


# against the reference model


@dataclass
class Open:
    where: Where
    key: str
    ticket: Ticket
    booking: Booking
    settled: bool = False
    released: bool = False


counts = st.none() | st.integers(0, 6)
amounts = st.none() | st.integers(0, 60)
limits = st.builds(
    RateLimit, counts, amounts, st.none() | st.integers(0, 20), st.none() | st.integers(0, 300), counts, counts
)
times = st.sampled_from(
    [0, 1, MS - 1, 7 * MS, 100 * MS, 249 * MS, SECOND, 30 * SECOND, MINUTE - 1, MINUTE, DAY - 1]
) | (st.integers(0, 90 * SECOND))


class AgainstReference(RuleBasedStateMachine):
    """Every admission, refusal, retry-after and header is what the reference says.

    late   how much longer than its span a booking may count"""

    exact = EXACT
    late: dict[str, int] = {}  # noqa: RUF012 - never changed

    @initialize(limits=st.lists(limits, min_size=1, max_size=3))
    def begin(self, limits: list[RateLimit]) -> None:
        self.clock = Clock()
        self.limiter = Limiter(self.clock, exact=self.exact)
        self.reference = Reference()
        self.limits = limits
        self.open: list[Open] = []

    @rule(passed=times)
    def wait(self, passed: int) -> None:
        self.clock.now += passed

    @rule(project=st.sampled_from("pq"), key=st.sampled_from("abc"), tokens=st.integers(0, 70), which=st.integers(0, 2))
    def admit(self, project: str, key: str, tokens: int, which: int) -> None:
        where, limit, now = (project, "m"), self.limits[which % len(self.limits)], self.clock.now
        broken = self.reference.broken(where, key, tokens, limit, now, {})
        try:
            ticket = self.limiter.admit(project, key, "m", tokens, limit)
        except LimitExceeded as err:
            broken = self.reference.broken(where, key, tokens, limit, now, self.late)
            assert err.kind in broken
            self.explained(err, where, tokens, limit)
        else:
            assert not broken
            self.open.append(Open(where, key, ticket, self.reference.book(where, key, tokens, limit, now)))

    def explained(self, err: LimitExceeded, where: Where, tokens: int, limit: RateLimit) -> None:
        assert err.limit == getattr(limit, f"max_{err.kind}")
        own = {each.name: getattr(limit, each.name) for each in fields(limit)}
        never = [name for name, most in own.items() if most is not None and most < (tokens if "tokens" in name else 1)]
        assert (err.retry_after_ms is None) == bool(never)
        if err.retry_after_ms is None or err.kind.startswith("concurrent"):
            return
        then = self.clock.now + err.retry_after_ms * MS
        assert not self.reference.windows_broken(where, tokens, limit, then, {})
        assert self.reference.windows_broken(where, tokens, limit, then - MS, self.late)
        if not self.late:
            span, unit = err.kind.partition("_per_")[2], err.kind.partition("_per_")[0]
            assert err.remaining == max(0, err.limit - self.reference.used(where, span, unit, self.clock.now))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 50), actual=st.integers(0, 80))
    def settle(self, which: int, actual: int) -> None:
        one = self.open[which % len(self.open)]
        if one.settled:
            used = one.ticket._settled
            assert used is not None
            one.ticket.settle(used)
            return
        one.ticket.settle(actual)
        self.reference.settle(one.where, one.booking, actual, self.clock.now)
        one.settled = True

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 50))
    def release(self, which: int) -> None:
        one = self.open[which % len(self.open)]
        one.ticket.release()
        if not one.released:
            self.reference.running.remove((one.where, one.key))
            one.released = True

    @rule(project=st.sampled_from("pq"), which=st.integers(0, 2))
    def tell(self, project: str, which: int) -> None:
        limit, now = self.limits[which % len(self.limits)], self.clock.now
        told = dict(self.limiter.headers(project, "m", limit))
        if self.late:
            return
        wanted: dict[bytes, bytes] = {}
        for unit in UNITS:
            rows = []
            for span in SPANS:
                most = getattr(limit, f"max_{unit}_per_{span}")
                if most is not None:
                    left = max(0, most - self.reference.used((project, "m"), span, unit, now))
                    reset = self.reference.empty_at((project, "m"), span, unit, now) - now
                    rows.append((left, (reset + MS - 1) // MS, most))
            if rows:
                left, reset, most = min(rows, key=lambda row: (row[0], -row[1], row[2]))
                for name, text in (("limit", str(most)), ("remaining", str(left)), ("reset", duration(reset))):
                    wanted[f"x-ratelimit-{name}-{unit}".encode()] = text.encode()
        assert told == wanted


class AgainstReferenceInGrains(AgainstReference):
    """The same with nearly all bookings kept together: still never more than the limit, and strict by a grain."""

    exact = 2
    late = GRAIN


TestAgainstReference = AgainstReference.TestCase
TestAgainstReference.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAgainstReferenceInGrains = AgainstReferenceInGrains.TestCase
TestAgainstReferenceInGrains.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("exact", [EXACT, 3])
@pytest.mark.parametrize("seed", range(4))
def test_in_no_minute_is_more_than_the_limit_admitted(seed: int, exact: int) -> None:
    """Bursts, silence and settlements at random; then every window that ends with an admission is summed."""
    rng, clock = random.Random(seed), Clock()
    limiter = Limiter(clock, exact=exact)
    limit = RateLimit(max_requests_per_1_minute=40, max_tokens_per_1_minute=3000)
    admitted: list[list[int]] = []
    unsettled: list[tuple[Ticket, list[int]]] = []
    refusals = 0
    for _ in range(6000):
        clock.now += rng.choice([0, 0, 0, 1, 40 * MS, 400 * MS, 9 * SECOND])
        tokens = rng.randrange(200)
        try:
            ticket = limiter.admit("p", "k", "m", tokens, limit)
        except LimitExceeded:
            refusals += 1
        else:
            admitted.append([clock.now, tokens])
            unsettled.append((ticket, admitted[-1]))
        if unsettled and rng.random() < 0.5:
            ticket, row = unsettled.pop(rng.randrange(len(unsettled)))
            row[1] = rng.randrange(row[1] + 1)
            ticket.settle(row[1])
            ticket.release()
    first = requests = tokens = most = 0
    for last, (at, used) in enumerate(admitted):
        requests, tokens = requests + 1, tokens + used
        while admitted[first][0] <= at - MINUTE:
            requests, tokens = requests - 1, tokens - admitted[first][1]
            first += 1
        assert (requests, last - first + 1) <= (40, 40)
        assert tokens <= 3000
        most = max(most, requests)
    assert refusals > 500
    assert most == 40


@pytest.mark.parametrize("exact", [EXACT, 3])
def test_a_refused_request_fits_after_retry_after_and_not_a_millisecond_before(exact: int) -> None:
    rng, clock = random.Random(exact), Clock()
    limiter = Limiter(clock, exact=exact)
    limit = RateLimit(20, 1000, 300, 20_000)
    tried = 0
    for _ in range(2000):
        clock.now += rng.randrange(300 * MS)
        tokens = rng.randrange(150)
        try:
            limiter.admit("p", "k", "m", tokens, limit).release()
        except LimitExceeded as err:
            assert err.retry_after_ms is not None
            assert err.retry_after_ms > 0
            clock.now += (err.retry_after_ms - 1) * MS
            again = refused(limiter, tokens, limit)
            assert again.retry_after_ms == 1
            clock.now += MS
            limiter.admit("p", "k", "m", tokens, limit).release()
            tried += 1
    assert tried > 100


@pytest.mark.parametrize(("span", "unit"), [(s, u) for s in SPANS for u in UNITS])
def test_an_admission_counts_for_its_window_to_the_nanosecond(span: str, unit: str) -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(**{f"max_{unit}_per_{span}": 1})
    limiter.admit("p", "k", "m", 1, limit)
    clock.now += SPANS[span] - 1
    assert refused(limiter, 1, limit).retry_after_ms == 1
    clock.now += 1
    limiter.admit("p", "k", "m", 1, limit)


async def test_of_a_thousand_requests_at_once_exactly_as_many_pass_as_are_allowed() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    limit = RateLimit(max_requests_per_1_minute=500, max_tokens_per_1_minute=3000, max_concurrent_requests=50)
    running = most = passed = 0

    async def ask(number: int) -> None:
        nonlocal running, most, passed
        await asyncio.sleep(0)
        try:
            ticket = limiter.admit("p", f"k{number % 7}", "m", 10, limit)
        except LimitExceeded:
            return
        with ticket:
            running, passed = running + 1, passed + 1
            most = max(most, running)
            for _ in range(1 + number % 5):
                await asyncio.sleep(0)
            running -= 1

    for _ in range(20):
        await asyncio.gather(*(ask(number) for number in range(50 + 1)))
    assert most == 50
    assert passed == 300  # 3000 tokens


# settling and releasing


def test_remaining_falls_by_exactly_the_use() -> None:
    limiter, limit = Limiter(Clock()), RateLimit(max_requests_per_1_minute=10, max_tokens_per_1_minute=1000)

    def remaining() -> tuple[int, int]:
        told = dict(limiter.headers("p", "m", limit))
        return int(told[b"x-ratelimit-remaining-requests"]), int(told[b"x-ratelimit-remaining-tokens"])

    assert remaining() == (10, 1000)
    ticket = limiter.admit("p", "k", "m", 600, limit)
    assert remaining() == (9, 400)
    assert refused(limiter, 401, limit).remaining == 400
    assert remaining() == (9, 400)  # a refusal books nothing
    ticket.settle(123)
    assert remaining() == (9, 877)
    limiter.admit("p", "k", "m", 877, limit).settle(877)
    assert remaining() == (8, 0)


def test_use_beyond_the_estimate_counts_from_when_it_is_known() -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(max_tokens_per_1_minute=100)
    ticket = limiter.admit("p", "k", "m", 60, limit)
    ticket.release()
    clock.now += 2 * MINUTE  # its estimate has left the window, and its state with it
    for _ in range(3):
        limiter.admit("q", "k", "m", 0, RateLimit())
    ticket.settle(160)
    assert refused(limiter, 1, limit).retry_after_ms == 60_000
    clock.now += MINUTE
    limiter.admit("p", "k", "m", 100, limit)


def test_what_is_given_back_after_its_minute_is_not_given_twice() -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(max_tokens_per_1_minute=100)
    late = limiter.admit("p", "k", "m", 100, limit)
    clock.now += MINUTE
    limiter.admit("p", "k", "m", 100, limit)
    late.settle(0)
    assert refused(limiter, 1, limit).remaining == 0


def test_settling_and_releasing_twice_changes_nothing() -> None:
    limiter, limit = Limiter(Clock()), RateLimit(max_tokens_per_1_minute=100, max_concurrent_requests=1)
    ticket = limiter.admit("p", "k", "m", 100, limit)
    ticket.settle(40)
    ticket.settle(40)
    with pytest.raises(AssertionError, match="settled once"):
        ticket.settle(0)
    ticket.release()
    ticket.release()
    limiter.admit("p", "k", "m", 60, limit)
    assert refused(limiter, 0, limit).kind == "concurrent_requests"


def test_a_request_that_fails_releases_and_keeps_its_booking_until_settled() -> None:
    limiter, limit = Limiter(Clock()), RateLimit(max_tokens_per_1_minute=100, max_concurrent_requests_per_key=1)
    with pytest.raises(RuntimeError), limiter.admit("p", "k", "m", 70, limit) as ticket:
        assert refused(limiter, 1, limit).kind == "concurrent_requests_per_key"
        limiter.admit("p", "other", "m", 1, limit)  # another key is not held back by it
        raise RuntimeError
    assert refused(limiter, 70, limit).kind == "tokens_per_1_minute"
    ticket.settle(0)
    limiter.admit("p", "k", "m", 70, limit)


def test_projects_and_models_do_not_share() -> None:
    limiter, limit = Limiter(Clock()), RateLimit(max_requests_per_1_minute=1)
    for project, model in (("p", "m"), ("p", "n"), ("q", "m")):
        limiter.admit(project, "k", model, 1, limit)
    assert refused(limiter, 1, limit).kind == "requests_per_1_minute"


# what a refusal says


def test_what_can_never_fit_has_no_retry_after() -> None:
    limiter = Limiter(Clock())
    assert refused(limiter, 101, RateLimit(max_tokens_per_1_minute=100)).retry_after_ms is None
    for name in ("requests_per_1_minute", "requests_per_1_day", "concurrent_requests", "concurrent_requests_per_key"):
        err = refused(limiter, 1, RateLimit(**{f"max_{name}": 0}))
        assert (err.kind, err.limit, err.remaining, err.retry_after_ms) == (name, 0, 0, None)
    assert len(limiter) == 0


def test_the_limit_that_holds_longest_is_told() -> None:
    limiter, limit = Limiter(Clock()), RateLimit(max_requests_per_1_minute=1, max_tokens_per_1_day=100)
    limiter.admit("p", "k", "m", 50, limit)
    assert refused(limiter, 50, limit).kind == "requests_per_1_minute"
    err = refused(limiter, 60, limit)
    assert (err.kind, err.remaining, err.retry_after_ms) == ("tokens_per_1_day", 50, 86_400_000)
    assert str(err) == ("ACCESS_LIMIT: limit of tokens per 1 day reached (expected <= 50 of 100, got 60)")


def test_a_lowered_limit_holds_at_once_and_a_clock_that_steps_back_frees_nothing() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    for _ in range(5):
        limiter.admit("p", "k", "m", 1, RateLimit(max_requests_per_1_minute=9))
    err = refused(limiter, 1, RateLimit(max_requests_per_1_minute=3))
    assert (err.remaining, err.retry_after_ms) == (0, 60_000)
    clock.now -= 5 * SECOND
    assert refused(limiter, 1, RateLimit(max_requests_per_1_minute=3)).retry_after_ms == 60_000


def test_headers_tell_the_tighter_window_and_nothing_of_what_is_unlimited() -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(max_requests_per_1_minute=10, max_requests_per_1_day=12)

    def told() -> list[bytes]:
        return [value for _, value in limiter.headers("p", "m", limit)]

    assert limiter.headers("p", "m", RateLimit(max_concurrent_requests=1)) == []
    assert told() == [b"10", b"10", b"0s"]
    limiter.admit("p", "k", "m", 1, limit)
    clock.now += 400 * MS
    assert told() == [b"10", b"9", b"59.6s"]
    for _ in range(8):
        limiter.admit("p", "k", "m", 1, limit)
    clock.now += MINUTE
    assert told() == [b"12", b"3", b"23h59m0s"]
    assert [name for name, _ in limiter.headers("p", "m", limit)] == [
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
    ]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0s"), (1, "1ms"), (12, "12ms"), (999, "999ms"), (1000, "1s"), (1500, "1.5s"), (8640, "8.64s"),
        (59_999, "59.999s"), (60_000, "1m0s"), (86_400, "1m26.4s"), (360_000, "6m0s"), (3_600_000, "1h0m0s"),
        (86_400_000, "24h0m0s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(ms: int, text: str) -> None:
    assert duration(ms) == text


# bad input


@pytest.mark.parametrize("tokens", [-1, MAX_TOKENS + 1, 10**30, True, 1.0, None, "1"])
def test_a_number_of_tokens_that_cannot_be_is_refused_and_books_nothing(tokens: object) -> None:
    limiter, limit = Limiter(Clock()), RateLimit(max_tokens_per_1_minute=100)
    with pytest.raises(ValueError, match="tokens"):
        limiter.admit("p", "k", "m", tokens, limit)  # type: ignore[arg-type]
    assert len(limiter) == 0
    ticket = limiter.admit("p", "k", "m", 100, limit)
    with pytest.raises(ValueError, match="tokens"):
        ticket.settle(tokens)  # type: ignore[arg-type]
    assert refused(limiter, 1, limit).remaining == 0
    ticket.settle(99)
    limiter.admit("p", "k", "m", 1, limit)


@pytest.mark.parametrize("value", [-1, True, 1.5, "1", 2**53])
@pytest.mark.parametrize("name", [each.name for each in fields(RateLimit)])
def test_a_limit_is_a_whole_number_from_zero(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        RateLimit(**{name: value})  # type: ignore[arg-type]


# memory


def test_one_project_and_model_take_a_bounded_number_of_bytes() -> None:
    """The worst there is: both logs with as many single admissions as they keep, and one in every grain after that."""
    limit = RateLimit(2**53 - 1, 2**53 - 1, 2**53 - 1, 2**53 - 1)
    clock = Clock()
    clock.now = 2**62  # a number of the largest size that a clock of nanoseconds gives
    limiter = Limiter(clock)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]

        def ask(passed: int) -> None:
            clock.now += passed
            ticket = limiter.admit("p", "k", "m", MAX_TOKENS, limit)
            ticket.settle(MAX_TOKENS - 1)
            ticket.release()

        for passed in [1] * 5000 + [GRAIN["1_day"]] * 719 + [1] * 5000 + [GRAIN["1_minute"]] * 239 + [1] * 1000:
            ask(passed)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    state = limiter._states["p", "m"]
    assert len(state.minute) >= EXACT + 239
    assert len(state.day) >= EXACT + 719
    assert STATE_BYTES // 2 < taken <= STATE_BYTES


def test_a_hundred_thousand_idle_projects_are_forgotten() -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(max_requests_per_1_minute=5)
    most = 0
    for number in range(100_000):
        clock.now += 60 * MS  # a thousand in any minute
        limiter.admit(f"p{number}", f"k{number}", "m", 1, limit).release()
        most = max(most, len(limiter))
    assert most <= 2 * 1000 + 2
    clock.now += MINUTE
    for _ in range(most):
        limiter.admit("p", "k", "m", 1, RateLimit()).release()
    assert len(limiter) == 1


def test_a_hundred_thousand_keys_of_one_project_leave_nothing_behind() -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(max_requests_per_1_day=10**6, max_concurrent_requests_per_key=1)
    for number in range(100_000):
        clock.now += MS
        limiter.admit("p", f"k{number}", "m", 1, limit).release()
    state = limiter._states["p", "m"]
    assert (state.by_key, state.running, len(limiter)) == ({}, 0, 1)
    assert len(state.day) <= EXACT + 2


def test_what_is_under_way_is_not_forgotten() -> None:
    clock = Clock()
    limiter, limit = Limiter(clock), RateLimit(max_requests_per_1_minute=9, max_concurrent_requests=1)
    ticket = limiter.admit("p", "k", "m", 1, limit)
    clock.now += DAY
    for number in range(10):
        limiter.admit(f"other{number}", "k", "m", 1, limit).release()
    assert refused(limiter, 1, limit).kind == "concurrent_requests"
    ticket.release()
    limiter.admit("p", "k", "m", 1, limit)
