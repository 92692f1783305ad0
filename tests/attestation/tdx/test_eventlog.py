"""Event logs: read strictly, replayed, and believed only as far as digests reach."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import FormatError
from attestation.policy import Skip
from attestation.result import Checks, Status
from attestation.tdx import (
    DstackLog,
    EventLog,
    append_records,
    appraise_event_log,
    appraise_rtmr3,
    parse_event_log,
    rtmr3_items,
    rtmr_after,
)
from attestation.tdx.ccel import MAX_LOG
from attestation.tdx.events import EV_EVENT_TAG, extend
from tests.devtee.eventlog import boot_events, ccel_log, replay

Rtmrs = tuple[bytes, bytes, bytes, bytes]
NONE = Skip("no items are expected in this test")
ITEMS = rtmr3_items(b"\1" * 32, b"\2" * 32, [("small", "sha256:" + "ab" * 32), ("große", "verity-sha256:" + "cd" * 32)])


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def area() -> bytes:
    return ccel_log(boot_events())


def records(items: list[bytes]) -> list[tuple[int, int, bytes, bytes]]:
    return [(4, EV_EVENT_TAG, sha384(item), item) for item in items]


def whole() -> bytes:
    """The log as the enclave serves it: firmware events, then ours."""
    return append_records(area(), records(ITEMS))


def appraised(log: bytes, rtmrs: Rtmrs, items: list[bytes] | Skip = NONE) -> Checks:
    checks = Checks()
    result = appraise_event_log(parse_event_log(log), rtmrs, checks, items=items)
    assert result == (not checks.failed)
    return checks


def quoted() -> Rtmrs:
    return (*replay(boot_events())[:3], rtmr_after(ITEMS))


def codes(checks: Checks) -> dict[str, str]:
    return {c.id: c.code for c in checks.failed}


def test_log_replays_to_the_registers_it_was_taken_from() -> None:
    log = EventLog.parse(area())
    assert log.replay() == replay(boot_events())
    assert len(log.events) == len(boot_events())
    assert not codes(appraised(area(), log.replay()))


def test_served_log_replays_all_four_registers_and_holds_the_items() -> None:
    log = EventLog.parse(whole())
    assert log.replay() == quoted() and log.used == len(whole())
    assert [e.data for e in log.events if e.register == 3] == ITEMS
    checks = appraised(whole(), quoted(), ITEMS)
    assert not checks.failed and all(c.status is Status.PASS for c in checks)


def test_items_are_jcs_in_order_and_their_digests_are_of_the_text() -> None:
    assert [
        b'{"item":"release","sha256":"' + b"01" * 32 + b'"}',
        b'{"item":"config","sha256":"' + b"02" * 32 + b'"}',
        b'{"id":"small","item":"weights","root":"sha256:' + b"ab" * 32 + b'"}',
        '{"id":"große","item":"weights","root":"verity-sha256:'.encode() + b"cd" * 32 + b'"}',
        b'{"item":"seal"}',
    ] == ITEMS
    value = bytes(48)
    for item in ITEMS:
        value = sha384(value + sha384(item))
    assert rtmr_after(ITEMS) == value


@pytest.mark.parametrize(
    ("release", "config", "weights"),
    [
        (b"\1" * 31, b"\2" * 32, []),
        (b"\1" * 32, b"\2" * 48, []),
        (b"\1" * 32, b"\2" * 32, [("", "sha256:" + "ab" * 32)]),
        (b"\1" * 32, b"\2" * 32, [("m", "ab" * 32)]),
        (b"\1" * 32, b"\2" * 32, [("m", "sha256:" + "AB" * 32)]),
        (b"\1" * 32, b"\2" * 32, [("m", "sha512:" + "ab" * 32)]),
    ],
)
def test_items_of_another_shape_are_never_measured(release: bytes, config: bytes, weights: Any) -> None:
    with pytest.raises(FormatError):
        rtmr3_items(release, config, weights)


def test_event_extended_after_the_seal_is_refused() -> None:
    extra = b'{"item":"config","sha256":"' + b"03" * 32 + b'"}'
    later = extend(rtmr_after(ITEMS), sha384(extra))
    rtmrs = (*quoted()[:3], later)
    assert codes(appraised(whole(), rtmrs, ITEMS)) == {
        "tdx.event-log-rtmr3": "TDX_EVENT_LOG", "tdx.rtmr3-items": "TDX_RTMR3",
    }  # fmt: skip
    longer = append_records(area(), records([*ITEMS, extra]))
    checks = appraised(longer, rtmrs, ITEMS)
    assert codes(checks) == {"tdx.rtmr3-items": "TDX_RTMR3"}
    assert "stands after the seal" in checks.failed[0].reason


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (ITEMS[:-1], "item 5 is missing"),
        ([ITEMS[1], ITEMS[0], *ITEMS[2:]], "item 1"),
        ([*ITEMS[:2], ITEMS[3], ITEMS[2], ITEMS[4]], "item 3"),
        ([ITEMS[0], *ITEMS[2:]], "item 2"),
        ([*ITEMS[:-1], b'{"item": "seal"}'], "item 5"),
    ],
)
def test_items_missing_reordered_or_reworded_are_refused_and_named(items: list[bytes], says: str) -> None:
    log = append_records(area(), records(items))
    rtmrs = (*quoted()[:3], rtmr_after(items))
    checks = appraised(log, rtmrs, ITEMS)
    assert codes(checks) == {"tdx.rtmr3-items": "TDX_RTMR3"} and says in checks.failed[0].reason


def test_text_beside_the_right_digest_is_refused() -> None:
    """A log that shows a reader another release than the one that was measured."""
    shown = [(4, EV_EVENT_TAG, sha384(ITEMS[0]), ITEMS[0].replace(b"01", b"09")), *records(ITEMS)[1:]]
    checks = appraised(append_records(area(), shown), quoted(), ITEMS)
    assert codes(checks) == {"tdx.event-data": "TDX_EVENT_DATA", "tdx.rtmr3-items": "TDX_RTMR3"}
    assert "text beside the digest" in checks.failed[-1].reason


def test_rtmr3_is_checked_without_a_log_too() -> None:
    for value, good in ((rtmr_after(ITEMS), True), (rtmr_after(ITEMS[:-1]), False), (bytes(48), False)):
        checks = Checks()
        assert appraise_rtmr3(value, ITEMS, checks) is good and bool(checks.failed) is not good


def test_log_without_rtmr3_events_is_refused_where_items_are_expected() -> None:
    assert codes(appraised(area(), quoted(), ITEMS)) == {
        "tdx.event-log-rtmr3": "TDX_EVENT_LOG", "tdx.rtmr3-items": "TDX_RTMR3",
    }  # fmt: skip


@pytest.mark.parametrize("register", range(3))
def test_register_that_does_not_replay_is_named(register: int) -> None:
    rtmrs = list(quoted())
    rtmrs[register] = b"\1" * 48
    checks = appraised(whole(), (rtmrs[0], rtmrs[1], rtmrs[2], rtmrs[3]), ITEMS)
    assert codes(checks) == {f"tdx.event-log-rtmr{register}": "TDX_EVENT_LOG"}
    assert f"RTMR{register} does not replay" in checks.failed[0].reason


def test_event_that_was_never_extended_is_named() -> None:
    """Somebody appends an event to the log alone: the register stops before it, and the result says where."""
    log = append_records(area(), [(2, 0x80000007, sha384(b"x"), b"x"), *records(ITEMS)])
    checks = appraised(log, quoted(), ITEMS)
    assert codes(checks) == {"tdx.event-log-rtmr1": "TDX_EVENT_LOG"}
    assert "rtmr1 event 32 EV_EFI_ACTION: that event was never extended" in checks.failed[0].reason


def test_edited_event_data_is_named_and_edited_hints_are_not_believed() -> None:
    raw = area()
    at = raw.index("SecureBoot".encode("utf-16-le"))
    edited = raw[:at] + b"X" + raw[at + 1 :]
    checks = appraised(edited, replay(boot_events()))
    assert codes(checks) == {"tdx.event-data": "TDX_EVENT_DATA"}
    assert "rtmr0 event 3 EV_EFI_VARIABLE_DRIVER_CONFIG" in checks.failed[0].actual
    at = raw.index(b"ACPI DATA")
    hint = EventLog.parse(raw[:at] + b"X" + raw[at + 1 :])
    assert {e.authentic for e in hint.events if e.type == 0xA} == {None}


def test_edited_digest_names_the_event_that_contradicts_itself() -> None:
    raw = area()
    separator = sha384(bytes(4))
    at = raw.index(separator)
    checks = appraised(raw[:at] + bytes(48) + raw[at + 48 :], replay(boot_events()))
    assert "the first event that contradicts itself is rtmr0 event 8 EV_SEPARATOR" in checks.failed[0].reason


def digests(register: int) -> list[bytes]:
    return [e.digest for e in EventLog.parse(area()).events if e.register == register]


def test_events_of_the_release_are_compared_one_by_one() -> None:
    log = EventLog.parse(whole())
    checks = Checks()
    reference = {i: digests(i) for i in range(3)}
    assert appraise_event_log(log, quoted(), checks, items=ITEMS, reference=reference)
    assert {c.id for c in checks} >= {"tdx.events-rtmr0", "tdx.events-rtmr1", "tdx.events-rtmr2"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: [*d[:7], bytes(48), *d[8:]], "number 8: rtmr0 event 8 EV_SEPARATOR"),
        (lambda d: d[:-1], "number 13: rtmr0 event 13 EV_EFI_VARIABLE_BOOT"),
        (lambda d: [*d, bytes(48)], "number 14: rtmr0 event missing after 13"),
        (lambda d: [d[1], d[0], *d[2:]], "number 1: rtmr0 event 1 EV_EFI_HANDOFF_TABLES2"),
    ],
    ids=["another", "surplus", "missing", "order"],
)
def test_first_event_that_is_not_the_releases_is_named(change: Callable[[Any], Any], says: str) -> None:
    checks = Checks()
    log = EventLog.parse(whole())
    assert not appraise_event_log(log, quoted(), checks, items=ITEMS, reference={0: change(digests(0))})
    assert codes(checks) == {"tdx.events-rtmr0": "TDX_EVENT"} and says in checks.failed[0].reason


HEAD = 65
"""Offset of the first event in a log of one algorithm."""


def cut_at(raw: bytes) -> int:
    return EventLog.parse(raw).used


MALFORMED: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("empty", lambda r: b""),
    ("longer than the cap", lambda r: r + b"\xff" * MAX_LOG),
    ("cut in the header", lambda r: r[:50]),
    ("cut in an event", lambda r: r[: cut_at(r) - 1]),
    ("header of another type", lambda r: r[:4] + b"\4" + r[5:]),
    ("header with a digest", lambda r: r[:8] + b"\1" + r[9:]),
    ("header size beyond the log", lambda r: r[:28] + b"\xff\xff\xff\xff" + r[32:]),
    ("another signature", lambda r: r[:32] + b"X" + r[33:]),
    ("another version", lambda r: r[:53] + b"\1" + r[54:]),
    ("no algorithm", lambda r: r[:56] + bytes(4) + r[60:]),
    ("256 algorithms", lambda r: r[:56] + struct.pack("<I", 256) + r[60:]),
    ("SHA-256 only", lambda r: r[:60] + struct.pack("<HH", 0xB, 32) + r[64:]),
    ("SHA-384 of 47 bytes", lambda r: r[:62] + b"\x2f" + r[63:]),
    ("vendor bytes beyond the header", lambda r: r[:64] + b"\1" + r[65:]),
    ("register 5", lambda r: r[:HEAD] + b"\5" + r[HEAD + 1 :]),
    ("an event for MRTD", lambda r: r[:HEAD] + b"\0" + r[HEAD + 1 :]),
    ("no digest", lambda r: r[: HEAD + 8] + b"\0" + r[HEAD + 9 :]),
    ("255 digests", lambda r: r[: HEAD + 8] + b"\xff" + r[HEAD + 9 :]),
    ("algorithm not in the header", lambda r: r[: HEAD + 12] + b"\x0b" + r[HEAD + 13 :]),
    ("event data beyond the log", lambda r: r[: HEAD + 62] + b"\xff\xff\xff\x7f" + r[HEAD + 66 :]),
    ("something in the fill", lambda r: r[:-1] + b"\0"),
    ("an event in the fill", lambda r: r[: cut_at(r)] + b"\xff" * 8 + r[HEAD : cut_at(r)]),
    ("zero fill that ends", lambda r: r[: cut_at(r)] + bytes(64) + b"\1"),
]


@pytest.mark.parametrize("change", [m[1] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_malformed_log_is_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(FormatError) as caught:
        EventLog.parse(change(area()))
    assert caught.value.code == "FORMAT_TDX_EVENT_LOG"


@pytest.mark.parametrize("fill", [b"", b"\xff" * 4, b"\xff" * 3, b"\0" * 12, b"\0" * 5000, b"\xff" * 5000])
def test_documented_ends_are_read(fill: bytes) -> None:
    log = whole()
    assert EventLog.parse(log + fill).used == len(log)


def test_appending_cuts_at_the_end_marker_and_nothing_unreadable_comes_out() -> None:
    base = area()
    assert whole().startswith(base[: cut_at(base)]) and b"\xff" * 64 not in whole()
    assert append_records(whole(), []) == whole()
    for bad in ((0, 6, bytes(48), b""), (5, 6, bytes(48), b""), (4, 6, bytes(47), b""), (4, -1, bytes(48), b"")):
        with pytest.raises(FormatError):
            append_records(base, [bad])


def two_algorithms(first: int, second: int) -> bytes:
    """A log whose header lists SHA-256 and SHA-384, and one event with two digests."""
    sizes = {0xB: 32, 0xC: 48}
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHHHB", 0, 0, 2, 0, 2, 2, 0xB, 32, 0xC, 48, 0)
    digests = b"".join(struct.pack("<H", a) + bytes([a]) * sizes[a] for a in (first, second))
    event = struct.pack("<III", 1, 0xA, 2) + digests + struct.pack("<I", 4) + b"data"
    return struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec + event


def test_sha384_is_taken_among_several_digests() -> None:
    for order in ((0xB, 0xC), (0xC, 0xB)):
        log = EventLog.parse(two_algorithms(*order))
        assert log.events[0].digest == b"\x0c" * 48
        assert log.replay()[0] == extend(bytes(48), b"\x0c" * 48)


@pytest.mark.parametrize("order", [(0xC, 0xC), (0xB, 0xB)])
def test_event_with_one_algorithm_twice_or_without_sha384_is_refused(order: tuple[int, int]) -> None:
    """Which of two SHA-384 digests counts would be up to the reader."""
    with pytest.raises(FormatError):
        EventLog.parse(two_algorithms(*order))


def test_no_action_extends_nothing() -> None:
    log = EventLog.parse(append_records(area(), [(4, 3, b"\1" * 48, b"StartupLocality")]))
    assert log.replay() == replay(boot_events()) and log.events[-1].register is None


def dstack(**change: Any) -> list[dict[str, Any]]:
    payload = b"\1\2"
    digest = sha384(struct.pack("<I", 0x08000001) + b":compose-hash:" + payload).hex()
    first = {"imr": 0, "event_type": 4, "digest": sha384(bytes(4)).hex(), "event": "", "event_payload": "00" * 4}
    ours = {"imr": 3, "event_type": 0x08000001, "digest": digest, "event": "compose-hash", "event_payload": "0102"}
    return [first, ours | change]


def test_dstack_log_replays_by_its_own_rule() -> None:
    log = parse_event_log(json.dumps(dstack()).encode())
    assert isinstance(log, DstackLog) and [e.authentic for e in log.events] == [True, True]
    assert log.replay()[3] == extend(bytes(48), log.events[1].digest)
    for change in ({"event": "app-id"}, {"event_payload": "0103"}, {"event_type": 1}):
        assert DstackLog.parse(json.dumps(dstack(**change)).encode()).events[1].authentic is False


def test_dstack_event_without_its_payload_is_a_hint() -> None:
    entries = dstack()
    entries[0]["event_payload"] = ""
    assert DstackLog.parse(json.dumps(entries).encode()).events[0].authentic is None


@pytest.mark.parametrize(
    "change",
    [
        {"imr": 4}, {"imr": -1}, {"imr": True}, {"imr": "3"}, {"event_type": -1}, {"event_type": 2**32},
        {"digest": "00" * 32}, {"digest": "AB" * 48}, {"digest": None}, {"event": 1}, {"event": "x" * 5000},
        {"event": "\ud800"}, {"event_payload": "0"}, {"event_payload": "zz"}, {"more": 1},
    ],
)  # fmt: skip
def test_malformed_dstack_log_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        DstackLog.parse(json.dumps(dstack(**change)).encode())


@pytest.mark.parametrize("raw", [b"[]", b"[1]", b"[" * 100_000, b"[{}]", b"[\xff]"])
def test_json_that_is_no_log_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_event_log(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600), st.booleans())
def test_random_bytes_never_crash_a_parser(raw: bytes, with_header: bool) -> None:
    data = area()[:HEAD] + raw if with_header else raw
    try:
        parse_event_log(data)
    except FormatError as err:
        assert err.code == "FORMAT_TDX_EVENT_LOG"
