"""Event logs beside an accepted quote: what replays, what was edited, what is no log."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from attestation.tdx import EventLog, append_records
from tests.attestation.tdx.dev import REPORT_DATA, tee
from tests.conformance.book import Book, b64
from tests.conformance.tdx_machine import honest
from tests.devtee.eventlog import ccel_log
from tests.devtee.tee import DevTee

__all__ = ["log_rows"]

HEAD = 65
"""Offset of the first event in a log of one algorithm."""
PFP = "TCG PC Client Platform Firmware Profile §10"
EXTEND = "Intel TDX Module ABI Reference: TDG.MR.RTMR.EXTEND"


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def area() -> bytes:
    """The firmware's log, 0xff to the end of a small area."""
    return ccel_log(tee().events, area=4096)


def log_rows(book: Book) -> None:
    """All rows about event logs."""
    raw = area()
    used = EventLog.parse(raw).used
    book.clause = PFP
    book.control("event-log", "the log of the boot that the registers come from", honest(event_log=b64(raw)))
    book.accept("event-log-cut-at-its-end", "event-log", "the fill may be left out", event_log=b64(raw[:used]))
    hint = raw.index(b"ACPI DATA")
    book.accept("event-log-hint-edited", "event-log", "data that no rule ties to its digest is a hint, never a claim",
                event_log=b64(raw[:hint] + b"X" + raw[hint + 1 :]))  # fmt: skip
    _replay(book, raw)
    _form(book, raw, used)
    _dstack(book)


def _replay(book: Book, raw: bytes) -> None:
    book.clause = EXTEND
    events = tee().events

    def log(changed: list[Any]) -> str:  # Any: devtee events
        return b64(ccel_log(changed, area=4096))

    for register in range(3):
        first = next(n for n, e in enumerate(events) if e.rtmr == register)
        last = max(n for n, e in enumerate(events) if e.rtmr == register)
        book.refuse(
            f"event-log-rtmr{register}-event-left-out",
            "event-log",
            "TDX_EVENT_LOG",
            "the log tells less than was measured",
            event_log=log(events[:last] + events[last + 1 :]),
        )
        book.refuse(
            f"event-log-rtmr{register}-events-exchanged",
            "event-log",
            "TDX_EVENT_LOG",
            "order is part of the register",
            event_log=log([*events[:first], events[first + 1], events[first], *events[first + 2 :]]),
        )
        book.refuse(
            f"event-log-rtmr{register}-event-made-up",
            "event-log",
            "TDX_EVENT_LOG",
            "an event that was never extended",
            event_log=b64(append_records(raw, [(register + 1, 0x80000007, sha384(b"x"), b"x")])),
        )
    book.refuse(
        "event-log-rtmr3-event-made-up",
        "event-log",
        "TDX_EVENT_LOG",
        "an event that was never extended",
        event_log=b64(append_records(raw, [(4, 6, sha384(b"x"), b"x")])),
    )
    other = DevTee(tee().pki, list(events))
    other.extend(2, sha384(b"later"))
    book.refuse(
        "event-log-register-extended-later",
        "event-log",
        "TDX_EVENT_LOG",
        "more was measured than the log tells",
        quote=b64(other.quote(REPORT_DATA)),
    )
    book.clause = f"{PFP}: digest of the event data"
    for name, old, new, why in (
        (
            "variable",
            "SecureBoot".encode("utf-16-le"),
            "SecureBoat".encode("utf-16-le"),
            "another variable under the true digest",
        ),
        (
            "action",
            b"Exit Boot Services Invocation",
            b"Exit Boot Services Postponed!",
            "another action under the true digest",
        ),
    ):
        book.refuse(
            f"event-log-{name}-data-edited", "event-log", "TDX_EVENT_DATA", why, event_log=b64(raw.replace(old, new, 1))
        )
    digest = raw.index(sha384(bytes(4)))
    book.refuse(
        "event-log-separator-digest-edited",
        "event-log",
        "TDX_EVENT_LOG",
        "an event that contradicts itself",
        also=("TDX_EVENT_DATA",),
        event_log=b64(raw[:digest] + bytes(48) + raw[digest + 48 :]),
    )


def _form(book: Book, raw: bytes, used: int) -> None:
    for clause, name, changed, why in (
        ("§10: header record", "empty", b"", "there is no log"),
        ("§10: header record", "cut-in-the-header", raw[:50], "the header ends early"),
        ("§10: header record", "header-of-another-type", raw[:4] + b"\4" + raw[5:], "no EV_NO_ACTION"),
        ("§10: header record", "header-with-a-digest", raw[:8] + b"\1" + raw[9:], "the SHA-1 field is zero"),
        (
            "§10: header record",
            "header-size-beyond-the-log",
            raw[:28] + b"\xff" * 4 + raw[32:],
            "a size of the host's choice",
        ),
        ("§10: Spec ID Event03", "another-signature", raw[:32] + b"X" + raw[33:], "not a crypto agile log"),
        ("§10: Spec ID Event03", "another-version", raw[:53] + b"\1" + raw[54:], "a version nobody knows"),
        ("§10: Spec ID Event03", "no-algorithm", raw[:56] + bytes(4) + raw[60:], "digests of no size"),
        (
            "§10: Spec ID Event03",
            "256-algorithms",
            raw[:56] + struct.pack("<I", 256) + raw[60:],
            "numbers are capped",
        ),
        (
            "§10: Spec ID Event03",
            "sha-256-alone",
            raw[:60] + struct.pack("<HH", 0xB, 32) + raw[64:],
            "registers are SHA-384",
        ),
        (
            "§10: Spec ID Event03",
            "sha-384-of-47-bytes",
            raw[:62] + b"\x2f" + raw[63:],
            "algorithm and size disagree",
        ),
        (
            "§10: Spec ID Event03",
            "vendor-bytes-beyond-the-header",
            raw[:64] + b"\1" + raw[65:],
            "sizes that disagree",
        ),
        ("§10: TCG_PCR_EVENT2", "cut-in-an-event", raw[: used - 1], "the last event ends early"),
        ("§10: TCG_PCR_EVENT2", "register-5", raw[:HEAD] + b"\5" + raw[HEAD + 1 :], "there are four registers"),
        (
            "§10: TCG_PCR_EVENT2",
            "event-for-mrtd",
            raw[:HEAD] + b"\0" + raw[HEAD + 1 :],
            "MRTD is not extended by events",
        ),
        (
            "§10: TCG_PCR_EVENT2",
            "no-digest",
            raw[: HEAD + 8] + b"\0" + raw[HEAD + 9 :],
            "an event without a digest",
        ),
        (
            "§10: TCG_PCR_EVENT2",
            "255-digests",
            raw[: HEAD + 8] + b"\xff" + raw[HEAD + 9 :],
            "more digests than algorithms",
        ),
        (
            "§10: TCG_PCR_EVENT2",
            "algorithm-not-in-the-header",
            raw[: HEAD + 12] + b"\x0b" + raw[HEAD + 13 :],
            "a digest of unknown size",
        ),
        (
            "§10: TCG_PCR_EVENT2",
            "data-beyond-the-log",
            raw[: HEAD + 62] + b"\xff\xff\xff\x7f" + raw[HEAD + 66 :],
            "a size of the host's choice",
        ),
        ("§10: TCG_PCR_EVENT2", "something-in-the-fill", raw[:-1] + b"\0", "bytes that nobody accounts for"),
        (
            "§10: TCG_PCR_EVENT2",
            "an-event-in-the-fill",
            raw[:used] + b"\xff" * 8 + raw[HEAD:used],
            "a second reader may go on reading",
        ),
        (
            "§10: TCG_PCR_EVENT2",
            "zero-fill-that-ends",
            raw[:used] + bytes(64) + b"\1",
            "bytes that nobody accounts for",
        ),
    ):
        book.clause = f"TCG PC Client Platform Firmware Profile {clause}"
        book.refuse(f"event-log-{name}", "event-log", "FORMAT_TDX_EVENT_LOG", why, event_log=b64(changed))


def _dstack(book: Book) -> None:
    """dstack's JSON log over the same boot, and one event of its own in RTMR3."""
    payload, kind = b"\1\2", 0x08000001
    digest = sha384(struct.pack("<I", kind) + b":compose-hash:" + payload)
    machine = DevTee(tee().pki, list(tee().events))
    machine.extend(3, digest)
    entries = [
        {"imr": e.rtmr, "event_type": e.kind, "digest": e.digest.hex(), "event": "", "event_payload": e.data.hex()}
        for e in tee().events
    ]
    own = {
        "imr": 3,
        "event_type": kind,
        "digest": digest.hex(),
        "event": "compose-hash",
        "event_payload": payload.hex(),
    }

    def log(**change: object) -> str:
        return b64(json.dumps([*entries, own | change]).encode())

    book.clause = "dstack event log: digest = SHA-384(type ‖ : ‖ name ‖ : ‖ payload)"
    book.control(
        "dstack-log",
        "dstack's JSON log of the same boot, with an event in RTMR3",
        honest(machine.quote(REPORT_DATA), event_log=log()),
    )
    book.refuse(
        "dstack-log-name-edited",
        "dstack-log",
        "TDX_EVENT_DATA",
        "another name under the true digest",
        event_log=log(event="app-id"),
    )
    book.refuse(
        "dstack-log-payload-edited",
        "dstack-log",
        "TDX_EVENT_DATA",
        "another payload under the true digest",
        event_log=log(event_payload="0103"),
    )
    book.refuse(
        "dstack-log-digest-edited",
        "dstack-log",
        "TDX_EVENT_LOG",
        "a digest that was not measured",
        also=("TDX_EVENT_DATA",),
        event_log=log(digest="00" * 48),
    )
    book.refuse(
        "dstack-log-event-left-out",
        "dstack-log",
        "TDX_EVENT_LOG",
        "the log tells less than was measured",
        event_log=b64(json.dumps([*entries[1:], own]).encode()),
    )
    for name, change, why in (
        ("register-4", {"imr": 4}, "there are four registers"),
        ("register-true", {"imr": True}, "true counts as 1 in some languages"),
        ("digest-of-32-bytes", {"digest": "00" * 32}, "SHA-384 has 48"),
        ("digest-in-upper-case", {"digest": digest.hex().upper()}, "a second spelling"),
        ("payload-of-half-a-byte", {"event_payload": "0"}, "not whole bytes"),
        ("member-nobody-knows", {"more": 1}, "an unknown member may change the meaning of known ones"),
    ):
        book.refuse(f"dstack-log-{name}", "dstack-log", "FORMAT_TDX_EVENT_LOG", why, event_log=log(**change))
    book.refuse("dstack-log-empty", "dstack-log", "FORMAT_TDX_EVENT_LOG", "no event", event_log=b64(b"[]"))
