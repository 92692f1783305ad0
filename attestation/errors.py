"""What can go wrong in attestation, for the person who must act.

One root per package, one subclass per kind of answer. Every error carries a stable `code` for machines, what was
expected and what was seen for people, and a `hint` that says what to do. No error ever carries a prompt, a
completion or a key: parsers report lengths, offsets and digests, never the bytes of a message.

This file does no I/O and runs everywhere.
"""

from __future__ import annotations

__all__ = [
    "FormatError",
    "InputError",
    "PolicyError",
    "RefusedError",
    "TransportError",
    "VouchsafeError",
]


class VouchsafeError(Exception):
    """Root of every error this package raises on purpose.

    code      stable, upper case, `AREA_WHAT`
    reason    one sentence, no newline: what failed
    expected, actual   short text, empty when they make no sense
    hint      what the reader can do about it, empty when nothing
    """

    def __init__(self, code: str, reason: str, *, expected: object = "", actual: object = "", hint: str = "") -> None:
        self.code = code
        self.reason = reason
        self.expected = _text(expected)
        self.actual = _text(actual)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        detail = ""
        if self.expected or self.actual:
            detail = f" (expected {self.expected or '-'}, got {self.actual or '-'})"
        return f"{self.code}: {self.reason}{detail}"


class FormatError(VouchsafeError):
    """Bytes that are not what their format says. Malformed evidence is a refusal: codes begin with `FORMAT_`."""


class PolicyError(VouchsafeError):
    """A policy, manifest or statement that cannot be used: the user's own input, exit status 2. `POLICY_…`."""


class InputError(VouchsafeError):
    """A command line, file or configuration that cannot be used: the user's own input, exit status 2. `INPUT_…`."""


class RefusedError(VouchsafeError):
    """A check failed: the other end is not what the policy asks for. The code is that of the first failed check."""


class TransportError(VouchsafeError):
    """The other end could not be reached, or stopped answering: nothing was proven or disproven. `TRANSPORT_…`."""


def _text(value: object) -> str:
    """Render *value* for a person: bytes as hex, long text cut at 200 characters."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…({len(text)} characters)"
