"""The host's errors: what a person at the machine must act on, in two lines and without a traceback.

Two roots by who has to act: `UsageError` is a command line that cannot mean anything (exit status 2),
`RunError` is a machine that does not allow what was asked (exit status 1). Nothing here ever carries a
client's address or byte.
"""

from __future__ import annotations

__all__ = ["HostError", "RunError", "UsageError"]


class HostError(Exception):
    """A failure with a stable `code`, one line of what failed, and a `hint` that says what to do."""

    exit_status = 1

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class UsageError(HostError):
    """The command line itself is wrong."""

    exit_status = 2


class RunError(HostError):
    """The command line is fine; the machine refused (port in use, missing directory, descriptor limit)."""
