"""Who gets an engine's next slot: keys in turn, so that none starves another. Runs in the enclave, one event loop.

  (1) While a slot is free, it is taken at once: a key that is alone has all of them.
  (2) Otherwise requests wait, first come first served within a key, and each slot that is given back goes to the next
      key in the round. It is handed over, never put back first: nobody who comes later is quicker. With w keys waiting,
      a key's first waiter has its slot after at most w are given back, whatever the others send.
  (3) Waiting is bounded, in total and per key. When the total is reached, the key with most waiters gives up its last
      one to a key that would have fewer than it: a key that sends little gets in although others have filled the queue.
  (4) Whoever gives up waiting leaves nothing behind; a slot that reached it in the same moment goes on to the next.

What is shared is turns, not seconds: an answer under way is not interrupted. How much of an engine one key may hold at
a time is a limit (`max_concurrent_requests_per_key` in `limits`).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Final

from attestation.errors import VouchsafeError

__all__ = ["MAX_WAITING", "MAX_WAITING_PER_KEY", "Busy", "FairQueue", "Slot"]

MAX_WAITING: Final = 1024
MAX_WAITING_PER_KEY: Final = 64
FIRST_GUESS_MS: Final = 1000
"""Retry-after before any slot has been given back."""
MAX_RETRY_MS: Final = 60_000
_MS: Final = 10**6

_Turn = asyncio.Future[bool]
"""One who waits. True: has a slot. False: gave way to another key."""


class Busy(VouchsafeError):
    """No room to wait, for this key or at all. `ACCESS_BUSY`.

    retry_after_ms   an estimate, from how long slots were held lately
    """

    def __init__(self, reason: str, most: int, retry_after_ms: int) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__("ACCESS_BUSY", reason, expected=f"<= {most}", hint=f"try again in {retry_after_ms} ms")


class Slot:
    """One slot, once entered. Not a generator: one that is dropped while waiting would keep its place."""

    __slots__ = ("_began", "_key_id", "_queue")

    def __init__(self, queue: FairQueue, key_id: str) -> None:
        self._queue, self._key_id, self._began = queue, key_id, 0

    async def __aenter__(self) -> None:
        await self._queue._take(self._key_id)
        self._began = self._queue._clock()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue._give_back(self._queue._clock() - self._began)


class FairQueue:
    """The slots of one engine. See the module.

    slots      requests that the engine takes at a time, from 1
    clock      nanoseconds that do not go back; for the estimate in `Busy` alone
    """

    def __init__(
        self,
        slots: int,
        *,
        max_waiting: int = MAX_WAITING,
        max_waiting_per_key: int = MAX_WAITING_PER_KEY,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if slots < 1 or max_waiting < 0 or max_waiting_per_key < 0:
            raise ValueError("a queue has at least one slot, and its bounds are not negative")
        self._slots, self._free, self._clock = slots, slots, clock
        self._max_waiting, self._max_per_key = max_waiting, max_waiting_per_key
        # Keys in the order of their turns, and their waiters in the order in which they came. No key without waiters.
        self._keys: OrderedDict[str, OrderedDict[_Turn, None]] = OrderedDict()
        self._waiting = 0
        self._held_ms = float(FIRST_GUESS_MS)

    @property
    def free(self) -> bool:
        """Whether a slot is taken without waiting."""
        return self._free > 0

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return self._slots - self._free

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def keys_waiting(self) -> int:
        return len(self._keys)

    def slot(self, key_id: str) -> Slot:
        """`async with queue.slot(key_id):` holds a slot in the name of that key. Raises `Busy`, at once or after
        waiting for some time (3)."""
        return Slot(self, key_id)

    async def _take(self, key_id: str) -> None:
        if self._free:  # (1) nobody waits then
            self._free -= 1
            return
        self._make_room(key_id)
        turn: _Turn = asyncio.get_running_loop().create_future()
        self._keys.setdefault(key_id, OrderedDict())[turn] = None  # a key that did not wait is last in the round
        self._waiting += 1
        try:
            granted = await turn
        except BaseException:  # (4) cancelled, or closed by a loop that ends
            self._forget(key_id, turn)
            if turn.done() and not turn.cancelled() and turn.result():
                self._pass_on()
            raise
        if not granted:
            raise Busy("the queue is full and another key's turn was due", self._max_waiting, self._retry(1))

    def _give_back(self, held: int) -> None:
        """After *held* nanoseconds."""
        self._held_ms += (max(0, held) / _MS - self._held_ms) / 16
        self._pass_on()

    def _make_room(self, key_id: str) -> None:
        """(3) Raises `Busy`."""
        own = len(self._keys.get(key_id, ()))
        if own >= self._max_per_key:
            raise Busy("too many requests of this key are waiting", self._max_per_key, self._retry(len(self._keys)))
        if self._waiting < self._max_waiting:
            return
        # A walk over the waiting keys, only while the queue is full.
        longest = max(self._keys, key=lambda key: len(self._keys[key]), default=key_id)
        if own + 1 >= len(self._keys.get(longest, ())):
            raise Busy("too many requests are waiting", self._max_waiting, self._retry(1))
        last = next(reversed(self._keys[longest]))
        self._forget(longest, last)
        if not last.done():
            last.set_result(False)

    def _pass_on(self) -> None:
        """(2) One slot has been given back."""
        while self._keys:
            key_id, turns = next(iter(self._keys.items()))
            turn = next(iter(turns))
            self._forget(key_id, turn)
            if turn.done():  # cancelled, and not yet run: it is not this one's turn, nor its key's
                continue
            if key_id in self._keys:
                self._keys.move_to_end(key_id)
            turn.set_result(True)
            return
        self._free += 1

    def _forget(self, key_id: str, turn: _Turn) -> None:
        turns = self._keys.get(key_id)
        if turns is None or turn not in turns:
            return
        del turns[turn]
        self._waiting -= 1
        if not turns:
            del self._keys[key_id]

    def _retry(self, turns: int) -> int:
        """Milliseconds until *turns* slots have probably been given back."""
        return min(MAX_RETRY_MS, max(1, round(self._held_ms * turns / self._slots)))
