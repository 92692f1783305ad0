"""dstack's event log: a JSON list of {imr, event_type, digest, event, event_payload}.

The same events as a CCEL for registers 0 to 2, with the event data as hex or left out; for its own events in RTMR3 the
digest covers type, name and payload: SHA-384(u32le(event_type) ‖ ":" ‖ event ‖ ":" ‖ payload).

Pure; trusts nobody.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any, Final

from attestation.errors import FormatError
from attestation.tdx.ccel import MAX_DATA, MAX_LOG
from attestation.tdx.events import EV_NO_ACTION, Event, recompute, replay

__all__ = ["DstackLog"]

MAX_EVENTS: Final = 4096
_KEYS: Final = frozenset({"imr", "event_type", "digest", "event", "event_payload"})


@dataclass(frozen=True, slots=True)
class DstackLog:
    """A parsed log. Untrusted until `replay()` equals the registers of an accepted quote."""

    events: tuple[Event, ...]

    @classmethod
    def parse(cls, raw: bytes) -> DstackLog:
        """Read the JSON list. Raises `FormatError` `FORMAT_TDX_EVENT_LOG`."""
        if len(raw) > MAX_LOG:
            raise _bad("the log is too long", f"<= {MAX_LOG} bytes", len(raw))
        try:
            entries = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as err:
            raise _bad("not JSON in UTF-8") from err
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_EVENTS:
            raise _bad("not a list of events", f"1 to {MAX_EVENTS}", type(entries).__name__)
        return cls(tuple(_event(entry, number) for number, entry in enumerate(entries, 1)))

    def replay(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3 as the log leaves them."""
        return replay(self.events)


def _bad(why: str, expected: object = "", actual: object = "") -> FormatError:
    return FormatError("FORMAT_TDX_EVENT_LOG", f"dstack event log: {why}", expected=expected, actual=actual)


def _event(entry: Any, number: int) -> Event:  # Any: a JSON value, checked here
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        raise _bad(f"event {number} has other keys", ", ".join(sorted(_KEYS)))
    imr, kind, name = entry["imr"], entry["event_type"], entry["event"]
    if type(imr) is not int or not 0 <= imr <= 3:
        raise _bad(f"event {number}: imr", "0 to 3", str(imr)[:20])
    if type(kind) is not int or not 0 <= kind < 2**32:
        raise _bad(f"event {number}: event_type", "a 32-bit number", str(kind)[:20])
    if not isinstance(name, str) or len(name) > 4096:
        raise _bad(f"event {number}: event", "text of at most 4096 characters")
    digest, payload = (_hex(entry[key], number, key) for key in ("digest", "event_payload"))
    if len(digest) != 48 or len(payload) > MAX_DATA:
        raise _bad(f"event {number}: sizes", "48 bytes of digest", len(digest))
    if imr == 3:
        try:
            covered = struct.pack("<I", kind) + b":" + name.encode("utf-8") + b":" + payload
        except UnicodeEncodeError as err:
            raise _bad(f"event {number}: event is not Unicode text") from err
        return Event(number, 3, kind, digest, covered, hashlib.sha384(covered).digest() == digest)
    register = None if kind == EV_NO_ACTION else imr
    # Some writers leave the firmware's event data out: then there is nothing to recompute.
    authentic = recompute(register, kind, digest, payload) if payload else None
    return Event(number, register, kind, digest, payload, authentic)


def _hex(value: Any, number: int, key: str) -> bytes:  # Any: a JSON value, checked here
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.hex() != value:
        raise _bad(f"event {number}: {key}", "lower-case hex", type(value).__name__)
    return found
