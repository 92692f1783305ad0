"""TDX: read a quote, judge it. Pure functions of bytes, policy and time; see `appraise` for the list of checks."""

from attestation.tdx.appraise import CrlNumbers, Registers, TdxFacts, appraise
from attestation.tdx.collateral import Collateral, QeIdentity, TcbInfo
from attestation.tdx.eventlog import (
    DstackLog,
    Event,
    EventLog,
    append_records,
    appraise_event_log,
    appraise_rtmr3,
    parse_event_log,
    rtmr3_items,
    rtmr_after,
)
from attestation.tdx.quote import QeReport, Quote, TdReport, canonical_length

__all__ = [
    "Collateral",
    "CrlNumbers",
    "DstackLog",
    "Event",
    "EventLog",
    "QeIdentity",
    "QeReport",
    "Quote",
    "Registers",
    "TcbInfo",
    "TdReport",
    "TdxFacts",
    "append_records",
    "appraise",
    "appraise_event_log",
    "appraise_rtmr3",
    "canonical_length",
    "parse_event_log",
    "rtmr3_items",
    "rtmr_after",
]
