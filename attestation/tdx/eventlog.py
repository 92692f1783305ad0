"""Event logs: parse, replay, compare with a quote (TDX facts §2, measurement facts §3).

    (1) the log is read to its end, strictly: `EventLog.parse` (CCEL) or `DstackLog.parse`
    (2) its replay equals RTMR0, 1 and 2, and RTMR3 where the log names it
    (3) event data whose digest a rule defines hashes to that digest; other data is a hint and nothing more
    (4) RTMR3 holds exactly the expected items, in order, the seal last
    (5) where a release lists its events, the first that differs is named

Pure. Holding a log that passed says which digests were measured, not that they are good ones: registers are compared
with a release in `appraise`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from attestation.policy import Skip
from attestation.result import Checks
from attestation.tdx.ccel import MAX_LOG, EventLog, append_records
from attestation.tdx.dstack import DstackLog
from attestation.tdx.events import EV_EVENT_TAG, EV_NO_ACTION, Event, extend
from attestation.tdx.rtmr3 import rtmr3_items, rtmr_after

__all__ = [
    "EV_EVENT_TAG",
    "EV_NO_ACTION",
    "MAX_LOG",
    "DstackLog",
    "Event",
    "EventLog",
    "append_records",
    "appraise_event_log",
    "appraise_rtmr3",
    "parse_event_log",
    "rtmr3_items",
    "rtmr_after",
]

_CITE: Final = "TCG PC Client Platform Firmware Profile §10; Intel TDX Module ABI: TDG.MR.RTMR.EXTEND"


def parse_event_log(raw: bytes) -> EventLog | DstackLog:
    """Either kind of log, by its first byte: dstack's JSON list begins with `[`, a CCEL with index 0 or 1."""
    return DstackLog.parse(raw) if raw.lstrip()[:1] == b"[" else EventLog.parse(raw)


def appraise_event_log(
    log: EventLog | DstackLog,
    rtmrs: tuple[bytes, bytes, bytes, bytes],
    checks: Checks,
    *,
    items: Sequence[bytes] | Skip,
    reference: Mapping[int, Sequence[bytes]] | None = None,
) -> bool:
    """Steps (2) to (5): compare *log* with the *rtmrs* of a quote. Returns whether all of it holds.

    items      expected contents of RTMR3 (`rtmr3_items`), or the reason why none are known
    reference  register (0 to 2) → digests of its events in order, as a release manifest lists them, if it does
    """
    good = True
    named = {event.register for event in log.events}
    for i, value in enumerate(log.replay()):
        id = f"tdx.event-log-rtmr{i}"
        if i == 3 and 3 not in named and isinstance(items, Skip):
            checks.skip(id, "the log names no event of RTMR3", cite=_CITE)
            continue
        good &= checks.require(
            id, value == rtmrs[i], code="TDX_EVENT_LOG",
            reason=f"the log replays to RTMR{i}" if value == rtmrs[i] else _first_difference(log, i, rtmrs[i]),
            expected=rtmrs[i], actual=value, cite=_CITE,
        )  # fmt: skip
    edited = [event.label for event in log.events if event.authentic is False]
    known = sum(event.authentic is True for event in log.events)
    good &= checks.require(
        "tdx.event-data", not edited, code="TDX_EVENT_DATA",
        reason=f"event data hashes to its digest where a rule says so ({known} of {len(log.events)}, the rest hints)",
        actual=f"{edited[0]} differs" if edited else "", cite=_CITE,
    )  # fmt: skip
    for register, digests in sorted((reference or {}).items()):
        good &= _compare_events(log, register, digests, checks)
    if isinstance(items, Skip):
        checks.skip("tdx.rtmr3-items", items.why, cite=_CITE)
        return good
    return appraise_rtmr3(rtmrs[3], items, checks, log) and good


def appraise_rtmr3(
    rtmr3: bytes, items: Sequence[bytes], checks: Checks, log: EventLog | DstackLog | None = None
) -> bool:
    """Step (4): RTMR3 of the quote is exactly *items*; so is the *log*, which also names the first difference."""
    found = [] if log is None else [event for event in log.events if event.register == 3]
    held = rtmr_after(items) == rtmr3
    listed = log is None or [event.data for event in found] == list(items)
    why = "RTMR3 holds the expected items and nothing after the seal"
    if not (held and listed):
        why = f"{why}: {_items_difference(found, items)}"
    return checks.require("tdx.rtmr3-items", held and listed, code="TDX_RTMR3", reason=why, expected=rtmr_after(items),
                          actual=rtmr3, cite="measured items: release, config, weights, seal")  # fmt: skip


def _compare_events(log: EventLog | DstackLog, register: int, digests: Sequence[bytes], checks: Checks) -> bool:
    """Step (5): the first event of *register* that is not the release's, by name and digest."""
    found = [event for event in log.events if event.register == register]
    reason, expected, actual = f"RTMR{register} holds the {len(digests)} events of the release", b"", b""
    same = [event.digest for event in found] == list(digests)
    if not same:
        at = next((i for i, (e, d) in enumerate(zip(found, digests, strict=False)) if e.digest != d), None)
        at = min(len(found), len(digests)) if at is None else at
        expected = digests[at] if at < len(digests) else b""
        actual = found[at].digest if at < len(found) else b""
        what = found[at].label if at < len(found) else f"rtmr{register} event missing after {len(found)}"
        reason = f"{reason}; the first that differs is number {at + 1}: {what}"
    return checks.require(f"tdx.events-rtmr{register}", same, code="TDX_EVENT", reason=reason,
                          expected=expected or f"{len(digests)} events", actual=actual or f"{len(found)} events",
                          cite=_CITE)  # fmt: skip


def _first_difference(log: EventLog | DstackLog, register: int, wanted: bytes) -> str:
    """What can be said about a register that does not replay: from the log alone, without reference events."""
    events = [event for event in log.events if event.register == register]
    value = bytes(48)
    for event in events:
        if value == wanted:
            return f"RTMR{register} ends before {event.label}: that event was never extended"
        value = extend(value, event.digest)
    edited = next((event for event in events if event.authentic is False), None)
    if edited is not None:
        return f"RTMR{register} does not replay; the first event that contradicts itself is {edited.label}"
    if not events:
        return f"RTMR{register} was extended, and the log names no event of it"
    last = events[-1].label
    return f"RTMR{register} does not replay over {len(events)} events: one differs, or more came after {last}"


def _items_difference(found: list[Event], items: Sequence[bytes]) -> str:
    for i, item in enumerate(items):
        if i >= len(found):
            return f"item {i + 1} is missing from the log" if found else "no log of RTMR3"
        if hashlib.sha384(item).digest() != found[i].digest:
            return f"item {i + 1} ({found[i].label}) differs"
        if found[i].data != item:
            return f"item {i + 1} ({found[i].label}): the text beside the digest differs"
    if len(found) > len(items):
        return f"{found[len(items)].label} stands after the seal"
    return "the register was extended beyond what the log says"
