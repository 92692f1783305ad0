"""What stores the journal: a list of sealed blobs numbered from 0, appended at the end and nowhere else.

A backend runs in the enclave and keeps its bytes where the host can read, change and delete them. It is trusted with
nothing but to say, when `append` returns, that the bytes are on disk; `enclave.state.journal` checks all it reads.
Implementations: `sqlite` (one enclave), `postgres` (several that serve the same tenants).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from attestation.errors import VouchsafeError

__all__ = ["MAX_BATCH", "MAX_BATCH_BYTES", "MAX_BLOB", "MAX_SEQ", "PAGE", "Backend", "StateConflict", "StateError"]

MAX_BATCH: Final = 1024
"""Blobs in one write."""
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
"""Sealed bytes in one write."""
MAX_BLOB: Final = 64 * 1024 + 64
"""Bytes of the longest blob: a record of 64 KiB, sealed."""
MAX_SEQ: Final = 2**62
PAGE: Final = 64
"""Blobs that `read` is asked for at a time: at most 4 MiB of the host's choosing in memory."""


class StateError(VouchsafeError):
    """State that cannot be used as it is stored, or cannot be stored. `STATE_…`, listed in `enclave.state.journal`."""


class StateConflict(StateError):
    """`STATE_CONFLICT`: the stored journal does not end where the caller thought it ends."""

    def __init__(self, expected: int, actual: int | None = None) -> None:
        super().__init__(
            "STATE_CONFLICT",
            "the stored journal does not end where this program left it",
            expected=f"last sequence number {expected}",
            actual="" if actual is None else actual,
            hint="another enclave appended first: read what it wrote, decide again, append again",
        )


class Backend(Protocol):
    """One journal's blobs. Calls raise `StateError`, may overlap, and over a network have a bound in time."""

    async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
        """Store *blobs* as rows *first_seq*, *first_seq* + 1, …: all or none, durable when this returns.

        `StateConflict` when the last row is not *first_seq* - 1. Trap: after a lost connection the rows that stand
        in the way can be these very blobs, written by an attempt whose answer never came; the caller compares.
        """

    async def read(self, from_seq: int, limit: int) -> list[tuple[int, bytes]]:
        """At most *limit* rows (number, blob) from *from_seq* on, lowest first. Whatever the host left there."""

    async def last_seq(self) -> int:
        """The number of the last row, -1 when there is none."""

    async def close(self) -> None:
        """Let go of file, thread and connection. Idempotent."""


def check_batch(first_seq: int, blobs: Sequence[bytes]) -> None:
    """Raise `StateError` for a write beyond the caps. Every backend calls it first."""
    if not 0 <= first_seq <= MAX_SEQ:
        raise StateError("STATE_TOO_LONG", "a sequence number is out of bounds", actual=first_seq)
    if not 0 < len(blobs) <= MAX_BATCH:
        raise StateError(
            "STATE_TOO_LONG", "a write has too many records", expected=f"1..{MAX_BATCH}", actual=len(blobs)
        )
    if sum(map(len, blobs)) > MAX_BATCH_BYTES or max(map(len, blobs)) > MAX_BLOB:
        raise StateError("STATE_TOO_LONG", "a write has too many bytes", expected=f"<= {MAX_BATCH_BYTES}")
