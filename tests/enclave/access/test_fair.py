"""Turns at an engine. Time is turns of the event loop: a slot is held until the test gives it back."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enclave.access.fair import MAX_RETRY_MS, Busy, FairQueue

MS = 10**6


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


class Visitor:
    """One request: a task that waits for a slot and holds it until `leave`."""

    def __init__(self, queue: FairQueue, key: str, served: list[Visitor], loop: asyncio.AbstractEventLoop) -> None:
        self.key, self.busy, self._served = key, False, served
        self.hold: AbstractAsyncContextManager[None] = queue.slot(key)
        self.task = loop.create_task(self._enter())

    async def _enter(self) -> None:
        try:
            await self.hold.__aenter__()
        except Busy:
            self.busy = True
        else:
            self._served.append(self)

    @property
    def inside(self) -> bool:
        return self in self._served

    def leave(self) -> None:
        """At once: the event loop does not turn."""
        with pytest.raises(StopIteration):
            self.hold.__aexit__(None, None, None).__await__().__next__()


class Floor:
    """A queue, who was served in which order, and who is inside."""

    def __init__(self, slots: int, **bounds: int) -> None:
        self.queue = FairQueue(slots, **bounds)
        self.served: list[Visitor] = []
        self.inside: list[Visitor] = []
        self._seen = 0

    async def come(self, *keys: str) -> list[Visitor]:
        made = []
        for key in keys:
            made.append(Visitor(self.queue, key, self.served, asyncio.get_running_loop()))
            await self.turn()
        return made

    async def turn(self) -> None:
        await turns(6)
        self.inside += self.served[self._seen :]
        self._seen = len(self.served)

    async def go(self, which: int = 0) -> Visitor:
        one = self.inside.pop(which)
        one.leave()
        await self.turn()
        return one

    @property
    def order(self) -> str:
        return "".join(one.key for one in self.served)

    async def empty(self) -> None:
        """Let everybody in and out; nothing is left then."""
        while self.inside:
            await self.go()
        assert (self.queue.running, self.queue.waiting, self.queue.keys_waiting) == (0, 0, 0)


async def test_a_key_that_is_alone_gets_all_slots() -> None:
    floor = Floor(5)
    await floor.come(*"aaaaaaa")
    assert (floor.queue.running, floor.queue.waiting) == (5, 2)
    await floor.empty()
    assert floor.order == "a" * 7


async def test_waiting_keys_are_served_in_turn_and_first_come_first_served_within_a_key() -> None:
    floor = Floor(1)
    visitors = await floor.come(*"xaaaabbc")
    while floor.inside:
        await floor.go()
    assert floor.order == "xabcabaa"
    for key in "ab":
        assert [v for v in floor.served if v.key == key] == [v for v in visitors if v.key == key]


async def test_who_comes_later_does_not_take_a_slot_that_was_handed_over() -> None:
    floor = Floor(1)
    await floor.come(*"ab")
    floor.inside.pop().leave()
    late = Visitor(floor.queue, "c", floor.served, asyncio.get_running_loop())
    await floor.turn()
    assert floor.order == "ab"
    assert not late.inside
    await floor.empty()


@pytest.mark.parametrize(("slots", "keys"), [(1, 2), (4, 20), (8, 3)])
async def test_keys_that_always_wait_get_equal_shares_however_much_they_send(slots: int, keys: int) -> None:
    """The first key has ten times as many requests waiting as the others, and slots are given back in any order."""
    rng, floor = random.Random(slots * keys), Floor(slots, max_waiting_per_key=100)
    names = [chr(ord("a") + number) for number in range(keys)]
    for name in names:
        await floor.come(*name * (slots + (90 if name == "a" else 9)))
    start = len(floor.served)
    for _ in range(50 * keys):
        gone = await floor.go(rng.randrange(slots))
        await floor.come(gone.key)
        assert floor.queue.running == slots
    shares = Counter(v.key for v in floor.served[start:])
    assert shares.total() == 50 * keys
    assert set(shares) == set(names)
    assert max(shares.values()) - min(shares.values()) <= 1
    await floor.empty()


async def test_one_that_sends_little_is_next_but_the_others_once_among_a_thousand_requests_of_nine_keys() -> None:
    floor = Floor(2, max_waiting_per_key=200)
    await floor.come(*("abcdefghi" * 112))
    for _ in range(5):
        before = len(floor.served)
        (little,) = await floor.come("z")
        while not little.inside:
            await floor.go()
        assert len(floor.served) - before <= 10
        floor.inside.remove(little)
        little.leave()
        await floor.turn()
    await floor.empty()


async def test_other_keys_that_come_later_do_not_pass_who_waits() -> None:
    """Each request with a key of its own: they join the round behind."""
    floor = Floor(1)
    await floor.come("a", "b", "z")
    for number in range(500):
        await floor.come(f"n{number}")
    await floor.go()
    await floor.go()
    assert floor.served[-1].key == "z"
    await floor.empty()


# bounds


async def test_a_key_has_a_bounded_number_waiting_and_a_full_queue_is_full() -> None:
    floor = Floor(1, max_waiting=4, max_waiting_per_key=2)
    visitors = await floor.come(*"xaaa")
    assert [v.busy for v in visitors] == [False, False, False, True]
    assert [v.busy for v in await floor.come(*"bb")] == [False, False]
    assert floor.queue.waiting == 4
    assert [v.busy for v in await floor.come("c")] == [False]
    assert visitors[2].busy  # c came in for the last of a
    assert [v.busy for v in await floor.come(*"bd")] == [True, False]
    assert floor.queue.waiting == 4
    assert [v.busy for v in await floor.come(*"e")] == [True]  # everybody has one waiting
    while floor.inside:
        await floor.go()
    assert floor.order == "xabcd"
    await floor.empty()


async def test_a_newcomer_takes_the_place_of_the_newest_request_of_the_key_with_most() -> None:
    floor = Floor(1, max_waiting=6, max_waiting_per_key=4)
    visitors = await floor.come(*"xaaaabb")
    (newcomer,) = await floor.come("c")
    assert [v.key for v in visitors if v.busy] == ["a"]
    assert visitors[4].busy
    assert not newcomer.busy
    assert floor.queue.waiting == 6
    await floor.empty()
    assert floor.order == "xabcaba"


async def test_no_waiting_at_all_is_a_bound_too() -> None:
    floor = Floor(1, max_waiting=0)
    assert [v.busy for v in await floor.come(*"ab")] == [False, True]
    await floor.empty()


@pytest.mark.parametrize(
    "bounds", [{"slots": 0}, {"slots": 1, "max_waiting": -1}, {"slots": 1, "max_waiting_per_key": -1}]
)
def test_bounds_that_make_no_sense_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="slot"):
        FairQueue(**bounds)


async def test_busy_says_how_long_slots_have_been_held_lately() -> None:
    now = 0
    queue = FairQueue(2, max_waiting=0, clock=lambda: now)

    async def busy() -> int:
        async with queue.slot("a"), queue.slot("b"):
            with pytest.raises(Busy) as caught:
                await queue.slot("c").__aenter__()
            assert str(caught.value).startswith("ACCESS_BUSY: too many requests are waiting (expected <= 0, got -)")
            return caught.value.retry_after_ms

    async def hold(ms: int, times: int) -> None:
        nonlocal now
        for _ in range(times):
            async with queue.slot("a"):
                now += ms * MS

    assert await busy() == 500  # a guess: a second each, two slots
    await hold(4000, 200)
    assert await busy() == 2000
    await hold(3_600_000, 200)
    assert await busy() == MAX_RETRY_MS
    await hold(0, 1000)
    assert await busy() == 1


async def test_a_key_with_too_many_waiting_is_told_to_wait_for_its_turn() -> None:
    floor = Floor(1, max_waiting_per_key=1)
    await floor.come(*"xabc")
    with pytest.raises(Busy) as caught:
        await floor.queue.slot("a").__aenter__()
    assert caught.value.retry_after_ms == 3000  # three keys in the round, a second each
    await floor.empty()


# leaving


@pytest.mark.parametrize("which", [1, 2, 3])
async def test_one_that_gives_up_waiting_leaves_nothing_behind(which: int) -> None:
    floor = Floor(1)
    visitors = await floor.come(*"xaab")
    visitors[which].task.cancel()
    await floor.turn()
    assert (floor.queue.running, floor.queue.waiting) == (1, 2)
    await floor.empty()
    assert len(floor.served) == 3
    assert visitors[which].task.cancelled()


async def test_one_that_gives_up_in_the_moment_of_its_turn_passes_the_slot_on() -> None:
    floor = Floor(1)
    visitors = await floor.come(*"xab")
    floor.inside.pop().leave()
    visitors[1].task.cancel()  # has the slot, and has not run
    await floor.turn()
    assert floor.order == "xb"
    await floor.empty()


async def test_a_slot_does_not_go_to_one_that_has_given_up() -> None:
    floor = Floor(1)
    visitors = await floor.come(*"xab")
    visitors[1].task.cancel()  # has not run
    floor.inside.pop().leave()
    await floor.turn()
    assert floor.order == "xb"
    await floor.empty()


async def test_one_that_gives_up_in_the_moment_of_giving_way_has_no_slot_to_pass_on() -> None:
    floor = Floor(1, max_waiting=2)
    visitors = await floor.come(*"xaa")
    newcomer = Visitor(floor.queue, "b", floor.served, asyncio.get_running_loop())
    await asyncio.sleep(0)
    visitors[2].task.cancel()
    await floor.turn()
    assert (floor.queue.running, floor.queue.waiting, newcomer.busy) == (1, 2, False)
    await floor.empty()


async def test_a_newcomer_gets_the_place_of_one_that_gives_up_in_the_same_moment() -> None:
    floor = Floor(1, max_waiting=2)
    visitors = await floor.come(*"xaa")
    newcomer = Visitor(floor.queue, "b", floor.served, asyncio.get_running_loop())
    visitors[2].task.cancel()  # runs after the newcomer
    await floor.turn()
    assert (floor.queue.waiting, visitors[2].task.cancelled(), newcomer.task.done()) == (2, True, False)
    await floor.empty()
    assert floor.order == "xab"


async def test_a_waiter_whose_loop_ends_leaves_nothing_behind() -> None:
    queue = FairQueue(1)
    async with queue.slot("a"):
        waiter = queue.slot("b").__aenter__()
        waiter.send(None)  # type: ignore[attr-defined]  # a coroutine, waiting now
        assert queue.waiting == 1
        waiter.close()  # type: ignore[attr-defined]
        assert queue.waiting == 0
    assert queue.running == 0


async def test_a_slot_comes_back_after_an_error_and_after_a_cancellation_inside() -> None:
    queue = FairQueue(1)
    with pytest.raises(RuntimeError):
        async with queue.slot("a"):
            raise RuntimeError

    async def stay() -> None:
        async with queue.slot("a"):
            await asyncio.get_running_loop().create_future()

    task = asyncio.ensure_future(stay())
    await asyncio.sleep(0)
    assert queue.running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert queue.running == 0


async def test_a_hundred_thousand_keys_leave_nothing_behind() -> None:
    queue = FairQueue(1)

    async def ask(number: int) -> None:
        async with queue.slot(f"k{number}"):
            pass

    for start in range(0, 100_000, 1000):
        async with queue.slot("first"):
            tasks = [asyncio.ensure_future(ask(number)) for number in range(start, start + 1000)]
            await asyncio.sleep(0)
            assert queue.keys_waiting == 1000
        await asyncio.gather(*tasks)
    assert (queue.running, queue.waiting, queue.keys_waiting, len(queue._keys)) == (0, 0, 0, 0)


# against a reference


class AgainstReference(RuleBasedStateMachine):
    """Any order of coming, leaving and giving up, also within one turn of the loop."""

    SLOTS, MOST, PER_KEY = 2, 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.queue = FairQueue(self.SLOTS, max_waiting=self.MOST, max_waiting_per_key=self.PER_KEY)
        self.served: list[Visitor] = []
        self.everybody: list[Visitor] = []
        # the reference: who is inside, in which order slots were given, the round, and who waits for which key
        self.inside: list[Visitor] = []
        self.order: list[Visitor] = []
        self.round: list[str] = []
        self.lines: dict[str, list[Visitor]] = {}
        self.chosen: list[Visitor] = []  # given a slot, and not yet run
        self.leaving: list[Visitor] = []  # of those, who gave up
        self.turned_away: list[Visitor] = []
        self.handed = 0
        self.due: dict[Visitor, int] = {}

    def teardown(self) -> None:
        self.turn()
        while self.inside:
            self.leave(0)
            self.turn()
        assert (self.queue.running, self.queue.waiting, self.queue.keys_waiting) == (0, 0, 0)
        assert all(v.task.done() for v in self.everybody)
        self.loop.close()

    @rule(key=st.sampled_from("aaabcd"))
    def come(self, key: str) -> None:
        self.turn()
        one = Visitor(self.queue, key, self.served, self.loop)
        self.everybody.append(one)
        line = self.lines.get(key, [])
        if len(self.inside) < self.SLOTS:
            self.inside.append(one)
            self.order.append(one)
        elif len(line) >= self.PER_KEY or (self.total() >= self.MOST and not self.gives_way(len(line) + 1)):
            self.turned_away.append(one)
        else:
            if key not in self.round:
                self.round.append(key)
            if not line:
                self.due[one] = self.handed + len(self.round)
            self.lines[key] = [*line, one]
        self.turn()

    @precondition(lambda self: self.inside)
    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        done = [v for v in self.inside if v not in self.chosen]
        if not done:
            return
        one = done[which % len(done)]
        self.inside.remove(one)
        one.leave()
        self.hand_over()

    @precondition(lambda self: self.round or self.chosen)
    @rule(which=st.integers(0, 9))
    def give_up(self, which: int) -> None:
        waiting = [v for key in self.round for v in self.lines[key]] + [v for v in self.chosen if v not in self.leaving]
        if not waiting:
            return
        one = waiting[which % len(waiting)]
        one.task.cancel()
        if one in self.chosen:
            self.leaving.append(one)
        else:
            self.remove(one)

    @rule()
    def turn(self) -> None:
        while self.chosen:
            now, self.chosen = self.chosen, []
            for one in now:
                if one in self.leaving:
                    self.leaving.remove(one)
                    self.inside.remove(one)
                    self.order.remove(one)
                    self.hand_over()
        self.loop.run_until_complete(turns(12))
        assert self.served == self.order
        assert [v for v in self.everybody if v.busy] == [v for v in self.everybody if v in self.turned_away]
        assert self.queue.waiting == self.total()
        assert self.queue.keys_waiting == len(self.round)
        assert all(v.task.done() == (v not in self.queued()) for v in self.everybody)

    @invariant()
    def slots_are_neither_lost_nor_made(self) -> None:
        assert self.queue.running == len(self.inside) <= self.SLOTS
        assert not self.round or len(self.inside) == self.SLOTS

    def hand_over(self) -> None:
        self.handed += 1
        if not self.round:
            return
        key = self.round.pop(0)
        one = self.lines[key].pop(0)
        if self.lines[key]:
            self.round.append(key)
        self.chosen.append(one)
        self.inside.append(one)
        self.order.append(one)
        assert self.handed <= self.due.get(one, self.handed)  # no later than its place in the round when it came

    def gives_way(self, others: int) -> bool:
        longest = max(self.round, key=lambda key: len(self.lines[key]))
        if len(self.lines[longest]) <= others:
            return False
        one = self.lines[longest][-1]
        self.turned_away.append(one)
        self.remove(one)
        return True

    def remove(self, one: Visitor) -> None:
        self.lines[one.key].remove(one)
        if not self.lines[one.key]:
            self.round.remove(one.key)

    def queued(self) -> list[Visitor]:
        return [v for key in self.round for v in self.lines[key]]

    def total(self) -> int:
        return len(self.queued())


TestAgainstReference = AgainstReference.TestCase
TestAgainstReference.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
