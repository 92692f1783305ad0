"""Every real quote and log gives its verdict, for the expected reason, at its own time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from attestation.tdx import EventLog, Quote, canonical_length
from tests.attestation.tdx.judge import Case
from tests.vectors import VECTORS, cases, need_vectors

QUOTES = [p for p in cases("tdx") if (p / "quote.bin").exists()]
LOGS = [p for p in cases("tdx") + cases("measure") if (p / "ccel.bin").exists()]

CODES = {
    "decode": {"FORMAT_TDX_SIZE", "FORMAT_TDX_TEE_TYPE", "FORMAT_TDX_BODY_TYPE", "FORMAT_TDX_VERSION"},
    "framing": {"FORMAT_TDX_LENGTH"},
    "signature": {"TDX_QUOTE_SIGNATURE"},
    "qe-binding": {"TDX_QE_BINDING"},
    "qe-signature": {"TDX_QE_SIGNATURE"},
    "pck-chain": {"TDX_PCK_CHAIN", "FORMAT_TDX_PCK_CHAIN"},
    "crl": {"TDX_CRL"},
    "collateral-signature": {"TDX_COLLATERAL_SIGNATURE"},
    "collateral-time": {"TDX_COLLATERAL_TIME"},
    "collateral-role": {"TDX_COLLATERAL_ROLE"},
    "fmspc": {"TDX_FMSPC"},
    "pce-id": {"TDX_PCE_ID"},
    "tcb-level": {"TDX_TCB_LEVEL"},
    "tcb-status": {"TDX_TCB_STATUS"},
    "eval-floor": {"TDX_TCB_EVALUATION"},
    "td-attributes": {"TDX_ATTRIBUTES"},
    "xfam": {"TDX_XFAM"},
    "service-td": {"TDX_SERVICE_TD"},
    "event-log": {"TDX_EVENT_LOG", "TDX_EVENT_DATA"},
}
"""The vectors' check names, and the codes that answer to them here."""


def test_vectors_are_there_or_said_to_be_absent() -> None:
    need_vectors()
    assert len(QUOTES) == 38 and len(LOGS) >= 10
    print(f"{len(QUOTES)} quotes and {len(LOGS)} event logs of {VECTORS}")


@pytest.mark.parametrize("folder", QUOTES, ids=lambda p: p.name)
def test_real_quote_gives_its_verdict_for_the_expected_reason(folder: Path) -> None:
    case = Case.read(folder)
    verdict = case.judge()
    assert verdict.accepted == (case.about["expect"] == "accept"), verdict.failed
    for name in case.about["fails"]:
        assert verdict.codes & CODES[name], f"{name}: {verdict.failed}"
    if case.about["expect"] == "accept":
        assert verdict.facts is not None
        assert verdict.facts.tcb_status == case.about["tcb_status"] == "UpToDate"
        assert verdict.facts.evaluation == case.about["eval_data_number"]
        assert verdict.facts.fmspc.hex().upper() == case.about["fmspc"]
        assert case.about["window"][1] == verdict.facts.earliest_expiration


@pytest.mark.parametrize("folder", [p for p in QUOTES if (p / "quote.raw.bin").exists()], ids=lambda p: p.name)
def test_platform_padding_is_cut_to_the_canonical_quote(folder: Path) -> None:
    raw, quote = (folder / "quote.raw.bin").read_bytes(), (folder / "quote.bin").read_bytes()
    assert raw[: canonical_length(raw)] == quote


@pytest.mark.parametrize("folder", [p for p in QUOTES if not p.name.startswith("neg-")], ids=lambda p: p.name)
def test_fields_of_a_real_quote_are_read_as_its_manifest_says(folder: Path) -> None:
    case = Case.read(folder)
    quote = Quote.parse(case.quote)
    assert f"0x{quote.body.td_attributes:016x}" == case.about["td_attributes"]
    assert f"0x{quote.body.xfam:x}" == case.about["xfam"]
    assert quote.body.tee_tcb_svn.hex() == case.about["tee_tcb_svn"]
    assert quote.version == case.about["quote_version"]
    assert {2: "1.0", 3: "1.5", 4: "1.5ex"}[quote.body_type] == case.about["td_report_version"]


@pytest.mark.parametrize("folder", LOGS, ids=lambda p: p.name)
def test_real_event_log_replays_and_its_data_hashes_where_a_rule_says_so(folder: Path) -> None:
    about = json.loads((folder / "case.json").read_text())
    log = EventLog.parse((folder / "ccel.bin").read_bytes())
    assert not [e.label for e in log.events if e.authentic is False]
    if "replay" in about:
        assert [v.hex() for v in log.replay()] == [about["replay"][f"rtmr{i}"] for i in range(4)]
        assert (len(log.events), log.used) == (about["events"], about["bytes_used"])
    if isinstance(about.get("expected"), dict) and "rtmr" in about["expected"]:
        assert [v.hex() for v in log.replay()][: len(about["expected"]["rtmr"])] == about["expected"]["rtmr"]


def test_changed_logs_are_told_apart() -> None:
    need_vectors()
    folder = VECTORS / "measure" / "ccel-mutated-direct-boot"
    about = json.loads((folder / "case.json").read_text())
    original = (folder / "ccel.bin").read_bytes()
    honest = EventLog.parse(original)
    for change in about["inputs"]["mutations"]:
        raw = bytearray(original[: change.get("truncate", len(original))])
        for offset, mask in change.get("xor", ()):
            raw[offset] ^= mask
        if change["expect"].startswith("refuse"):
            with pytest.raises(Exception, match="FORMAT_TDX_EVENT_LOG"):
                EventLog.parse(bytes(raw))
            continue
        log = EventLog.parse(bytes(raw))
        if "rtmr0" in change:
            assert log.replay()[0].hex() == change["rtmr0"] and log.replay()[1:] == honest.replay()[1:]
        else:
            assert log.replay() == honest.replay()
            assert [e.type_name for e in log.events if e.authentic is False] == ["EV_EFI_VARIABLE_DRIVER_CONFIG"]


def test_layout_of_the_real_tdreport_agrees_with_the_quote_body() -> None:
    """The TDREPORT's own hashes cover what we take for its fields: the layout is the CPU's."""
    need_vectors()
    raw = (VECTORS / "tdx" / "tdreport-1.5" / "tdreport.bin").read_bytes()
    assert hashlib.sha384(raw[256:495]).digest() == raw[32:80]
    assert hashlib.sha384(raw[512:1024]).digest() == raw[80:128]
