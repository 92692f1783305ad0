"""The guest's own event log: TCG2 "crypto agile" records as the CCEL area holds them (TCG PC Client Platform Firmware
Profile §10.2; ACPI CCEL; Intel TDVF design guide: index 1 to 4 is RTMR0 to RTMR3).

    header  index u32 · type u32 = 3 · 20 zero bytes · size u32 · "Spec ID Event03" structure with the algorithms
    event   index u32 · type u32 · count u32 · count × {algorithm u16, digest} · size u32 · data

The area is larger than the log: what follows the last event is filled with 0xff (edk2) or zero (td-shim). One fill byte
all the way to the end is the only thing tolerated.

Pure; trusts nobody. Every size is checked against the buffer and a cap before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NoReturn

from attestation.errors import FormatError
from attestation.tdx.events import EV_NO_ACTION, Event, recompute, replay

__all__ = ["MAX_LOG", "EventLog", "append_records"]

MAX_LOG: Final = 4 * 1024 * 1024
MAX_DATA: Final = 1024 * 1024
MAX_DIGESTS: Final = 8
SHA384: Final = 0x0C
ALGORITHMS: Final = {0x04: 20, 0x0B: 32, SHA384: 48, 0x0D: 64, 0x12: 32}
"""TCG algorithm id → digest size: SHA-1, SHA-256, SHA-384, SHA-512, SM3."""

_SIGNATURE: Final = b"Spec ID Event03\0"


@dataclass(frozen=True, slots=True)
class EventLog:
    """A parsed log. Untrusted until `replay()` equals the registers of an accepted quote.

    used   bytes up to the end marker: `raw[:used]` is the log without fill
    """

    events: tuple[Event, ...]
    used: int
    raw: bytes = field(repr=False)

    @classmethod
    def parse(cls, raw: bytes) -> EventLog:
        """Read a CCEL area or a log cut at its end. Raises `FormatError` `FORMAT_TDX_EVENT_LOG`, naming the offset."""
        if len(raw) > MAX_LOG:
            _bad("the log is too long", 0, f"<= {MAX_LOG} bytes", len(raw))
        raw = bytes(raw)
        algorithms, at = _header(raw)
        events: list[Event] = []
        while at < len(raw) and not _ends(raw, at):
            event, at = _event(raw, at, len(events) + 1, algorithms)
            events.append(event)
        return cls(tuple(events), at, raw)

    def replay(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3 as the log leaves them."""
        return replay(self.events)


def append_records(ccel: bytes, records: Iterable[tuple[int, int, bytes, bytes]]) -> bytes:
    """*ccel* cut at its end marker, then *records* {index 1 to 4, type, SHA-384 digest, data} as TCG_PCR_EVENT2.

    The kernel extends RTMR3 without logging it; the guest writes these records itself. Raises `FormatError`."""
    log = EventLog.parse(ccel)
    out = bytearray(log.raw[: log.used])
    for index, event_type, digest, data in records:
        if not 1 <= index <= 4 or not 0 <= event_type < 2**32 or len(digest) != 48 or len(data) > MAX_DATA:
            _bad("a record to append is out of bounds", len(out), "index 1 to 4, 48 bytes of digest", index)
        out += struct.pack("<IIIH", index, event_type, 1, SHA384) + digest + struct.pack("<I", len(data)) + data
    EventLog.parse(bytes(out))  # what we hand out must be what a verifier reads
    return bytes(out)


def _bad(why: str, at: int, expected: object = "", actual: object = "") -> NoReturn:
    raise FormatError("FORMAT_TDX_EVENT_LOG", f"event log, offset {at}: {why}", expected=expected, actual=actual)


def _take(raw: bytes, form: str, at: int) -> tuple[int, ...]:
    if at + struct.calcsize(form) > len(raw):
        _bad("the log ends inside a record", at, f"{struct.calcsize(form)} bytes", len(raw) - at)
    return struct.unpack_from(form, raw, at)


def _ends(raw: bytes, at: int) -> bool:
    """Whether the log ends at *at*: nothing but one fill byte, 0xff or zero, follows."""
    fill = raw[at : at + 4]
    if fill == b"\xff" * len(fill):
        byte = b"\xff"
    elif raw[at : at + 12] == bytes(min(12, len(raw) - at)):
        byte = b"\0"
    else:
        return False
    rest = len(raw) - at
    if raw.count(byte, at) != rest:
        _bad("something follows the end marker", at, f"{rest} fill bytes", raw.count(byte, at))
    return True


def _header(raw: bytes) -> tuple[dict[int, int], int]:
    """The first record: algorithms with their sizes, and where the events begin."""
    index, kind = _take(raw, "<II", 0)
    size = _take(raw, "<I", 28)[0]
    if index not in (0, 1) or kind != EV_NO_ACTION or any(raw[8:28]):
        _bad("no Spec ID header", 0, "index 0 or 1, EV_NO_ACTION, zero digest", f"index {index}, type {kind}")
    end = 32 + size
    if not 29 <= size <= 1024 or end > len(raw):
        _bad("size of the header", 28, "29 to 1024, inside the log", size)
    if raw[32:48] != _SIGNATURE or raw[52:54] != b"\0\2":  # errata and UINTN size are informative; td-shim writes 0x69
        _bad("not a Spec ID Event03 structure, version 2.0", 32)
    count = _take(raw, "<I", 56)[0]
    if not 1 <= count <= MAX_DIGESTS:
        _bad("number of algorithms", 56, f"1 to {MAX_DIGESTS}", count)
    algorithms: dict[int, int] = {}
    for i in range(count):
        algorithm, digest_size = _take(raw[:end], "<HH", 60 + 4 * i)
        if ALGORITHMS.get(algorithm) != digest_size or algorithm in algorithms:
            _bad("unknown or repeated algorithm", 60 + 4 * i, "known ones, once", f"0x{algorithm:x} size {digest_size}")
        algorithms[algorithm] = digest_size
    if SHA384 not in algorithms:
        _bad("no SHA-384", 60, "0xc", ", ".join(f"0x{a:x}" for a in algorithms))
    vendor = 60 + 4 * count
    if vendor + 1 + _take(raw[:end], "<B", vendor)[0] != end:
        _bad("vendor information does not fill the header", vendor)
    return algorithms, end


def _event(raw: bytes, at: int, number: int, algorithms: dict[int, int]) -> tuple[Event, int]:
    """One event record at *at*, and the offset behind it."""
    start = at
    index, kind, count = _take(raw, "<III", at)
    at += 12
    if index > 4 or (index == 0 and kind != EV_NO_ACTION):
        _bad("measurement register index", start, "1 to 4 (RTMR0 to RTMR3)", index)
    if not 1 <= count <= len(algorithms):
        _bad("number of digests", start + 8, f"1 to {len(algorithms)}", count)
    found: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = _take(raw, "<H", at)[0]
        size = algorithms.get(algorithm)
        if size is None or algorithm in found:
            _bad("algorithm not in the header, or twice", at, ", ".join(f"0x{a:x}" for a in algorithms), hex(algorithm))
        if at + 2 + size > len(raw):
            _bad("the log ends inside a digest", at)
        found[algorithm] = raw[at + 2 : at + 2 + size]
        at += 2 + size
    if SHA384 not in found:
        _bad("an event without SHA-384", start)
    size = _take(raw, "<I", at)[0]
    at += 4
    if size > min(MAX_DATA, len(raw) - at):
        _bad("size of the event data", at - 4, f"<= {min(MAX_DATA, len(raw) - at)}", size)
    data = raw[at : at + size]
    register = None if kind == EV_NO_ACTION else index - 1
    digest = found[SHA384]
    return Event(number, register, kind, digest, data, recompute(register, kind, digest, data)), at + size
