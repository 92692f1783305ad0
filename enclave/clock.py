"""Time inside the guest, which the host provides: never backwards, never before what has been verified.

TD wall time comes from the host. Setting it back would make an expired certificate or status list look current, so
this clock does not step back, and it refuses to be earlier than the newest signed object that the enclave verified
(`raise_floor`). Between readings it advances by the TSC-backed monotonic clock. Setting it *forward* only ends things
early. The client's own clock decides every validity that the client checks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Unix seconds that never decrease. One per process; safe to read from any thread."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic, self._lock = wall, monotonic, threading.Lock()
        self._seen, self._at = wall(), monotonic()

    def now(self) -> int:
        """The latest of the wall clock and what has passed since the last reading, in whole seconds."""
        with self._lock:
            ticks = self._monotonic()
            self._seen = max(self._wall(), self._seen + max(0.0, ticks - self._at))
            self._at = ticks
            return int(self._seen)

    def raise_floor(self, verified: int) -> None:
        """No reading may be before *verified*: the issue time of a signed object whose signature has been checked."""
        with self._lock:
            if verified > self._seen:
                self._seen, self._at = float(verified), self._monotonic()
