"""What happened to an organisation, as events: the only way its state changes, and its audit log at once.

An event is a JSON object in JCS form with a hash of the event before it. State is what replaying all of them gives, so
the log cannot say less than what was done: an action that is not in it had no effect. Reading is strict; an event that
this release does not know stops the replay, because skipping one would forget a revocation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

import rfc8785

from attestation.errors import VouchsafeError

__all__ = ["GENESIS", "TYPES", "Event", "EventError"]

_TAG: Final = b"vouchsafe/audit/v1"
GENESIS: Final = hashlib.sha256(_TAG).digest()
"""What the first event names as the hash before it."""

TYPES: Final = frozenset(
    {
        "project.created", "project.updated", "project.archived",
        "service_account.created", "service_account.updated", "service_account.deleted",
        "api_key.created", "api_key.updated", "api_key.deleted",
        "rate_limit.updated", "rate_limit.deleted",
        "organization.updated",
    }
)  # fmt: skip
"""OpenAI's names of audit log events, as far as there is something of the kind here."""


class EventError(VouchsafeError):
    """An event that cannot be read or does not follow the one before: the state is not trusted. `STATE_EVENT`."""

    def __init__(self, reason: str, *, expected: object = "", actual: object = "") -> None:
        super().__init__(
            "STATE_EVENT", reason, expected=expected, actual=actual,
            hint="was the state written by another release, or changed? see docs/operate.md, \"rollback suspected\"",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """One action.

    number    1, 2, 3, …;  at   unix seconds;  actor   id of the admin key, or "bootstrap"
    subject   id of what it is about;  project   id, "" where none
    data      what changed: JSON of text, integers, booleans, null, lists; digests in hex, never a key's value
    previous  hash of the event before
    """

    number: int
    type: str
    at: int
    actor: str
    subject: str
    project: str
    data: dict[str, Any]  # Any: JSON values
    previous: bytes

    @property
    def id(self) -> str:
        return f"audit_log-{self.number:08d}"

    @property
    def hash(self) -> bytes:
        """SHA-256(tag ‖ bytes): what the next event names."""
        return hashlib.sha256(_TAG + self.encode()).digest()

    def encode(self) -> bytes:
        return rfc8785.dumps(
            {
                "number": self.number, "type": self.type, "at": self.at, "actor": self.actor, "subject": self.subject,
                "project": self.project, "data": self.data, "previous": self.previous.hex(),
            }
        )  # fmt: skip

    @classmethod
    def decode(cls, raw: bytes) -> Event:
        """Strict. Raises `EventError`."""
        try:
            top = json.loads(raw)
            made = cls(**{**top, "previous": bytes.fromhex(top["previous"])})
            same = made.encode() == raw and made.type in TYPES and len(made.previous) == 32
            same = same and type(made.number) is int and type(made.at) is int and isinstance(made.data, dict)
            same = same and all(isinstance(v, str) for v in (made.actor, made.subject, made.project))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, rfc8785.CanonicalizationError):
            same = False
        if not same:
            raise EventError("an event of the state cannot be read", expected="an event of this release")
        return made
