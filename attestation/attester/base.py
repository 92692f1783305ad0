"""What the enclave asks of the machine it runs in, as seams: who quotes, who extends, who hands over the event log.

Runs in the enclave. Nothing an attester returns is proof by itself: the enclave verifies its own evidence as a client
would before it serves.
"""

from __future__ import annotations

from typing import Protocol

from attestation.errors import VouchsafeError

__all__ = ["AttesterError", "QuoteProvider", "TeeAttester"]


class AttesterError(VouchsafeError):
    """The machine did not give evidence: no boot, or no channel proof now. Codes are `ATTESTER_…`."""


class QuoteProvider(Protocol):
    """Whoever can have the CPU sign 64 bytes."""

    def quote(self, report_data: bytes) -> bytes:
        """A TDX quote over *report_data* (exactly 64 bytes), cut to its canonical length.

        Blocks while the platform signs (milliseconds to seconds); callers in an event loop use a thread. Serialised.
        Raises `AttesterError`."""
        ...


class TeeAttester(QuoteProvider, Protocol):
    """A TD: quotes, the application's own register, the event log."""

    def extend_rtmr3(self, digest: bytes) -> None:
        """RTMR3 = SHA-384(RTMR3 ‖ *digest*), 48 bytes; returns when the register shows it. Raises `AttesterError`."""
        ...

    def read_rtmr(self, index: int) -> bytes:
        """RTMR *index* (0 to 3), 48 bytes. Raises `AttesterError`."""
        ...

    def event_log(self) -> bytes:
        """The firmware's event log cut at its end marker (2 to 22 KB). Raises `AttesterError`."""
        ...

    def close(self) -> None:
        """Give back what was taken from the system. May be called twice."""
        ...
