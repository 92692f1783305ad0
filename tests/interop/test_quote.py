"""The quote out of a served certificate, judged by plain `dcap-qvl` through its own API, with the served collateral.

None of our TDX code has a part: the quote comes from the extension by the independent CBOR decoder, the collateral from
the bundle as it is, the root is the development TEE's. What the library refuses must be refused: a changed bit, a time
at which the collateral has ended, another root.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from functools import cache
from pathlib import Path

import dcap_qvl  # type: ignore[import-untyped]  # ships no types
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.devtee.tee import DevTee
from tests.interop import diagnostic
from tests.interop.leaf import REPORT_DATA, evidence
from tests.interop.service import Recorded

PARTS = {
    "header": range(0, 48, 8),
    "td report": range(48, 632, 8),
    "signature": range(636, 700, 8),
    "attestation key": range(700, 764, 8),
    "qe report": range(770, 1154, 16),
    "qe report signature": range(1154, 1218, 8),
    "qe authentication data": range(1220, 1252, 8),
    "first certificate": range(1258 + 40, 1258 + 60),  # its first line of base64
}
"""Offsets that are tried in a version 4 quote with 32 bytes of authentication data, as the platform makes them."""


@cache
def collateral_json(bundle: bytes) -> str:
    return bytes(diagnostic.read(bundle)["collateral"]).decode()


def root(shown: Recorded) -> bytes:
    return x509.load_pem_x509_certificate(shown.roots["intel"]).public_bytes(Encoding.DER)


def judge(shown: Recorded, quote: bytes, *, at: int, anchor: bytes | None = None) -> dcap_qvl.VerifiedReport:
    collateral = dcap_qvl.QuoteCollateralV3.from_json(collateral_json(shown.bundle))
    return dcap_qvl.verify_with_root_ca(quote, collateral, anchor or root(shown), at)


def issued(shown: Recorded) -> int:
    return int(diagnostic.read(evidence(shown)[1])["not-before"])


def ends(shown: Recorded) -> int:
    """When the TCB info ends, by the collateral's own words."""
    info = json.loads(json.loads(collateral_json(shown.bundle))["tcb_info"])
    return int(datetime.fromisoformat(info["nextUpdate"]).timestamp())


def test_quote_is_accepted_and_says_what_the_certificate_needs(either: Recorded) -> None:
    quote = evidence(either)[0]
    report = judge(either, quote, at=issued(either))
    assert (report.status, list(report.advisory_ids)) == ("UpToDate", [])
    parsed = dcap_qvl.parse_quote(quote)
    assert parsed.is_tdx() and bytes(parsed.report.report_data) == quote[REPORT_DATA] != bytes(64)
    registers = base64.b64decode(json.loads(diagnostic.read(either.bundle)["release"])["payload"]).decode()
    for value in (parsed.report.mr_td, *(getattr(parsed.report, f"rt_mr{i}") for i in range(3))):
        assert bytes(value).hex() in registers, "the release manifest names these registers"
    assert bytes(parsed.report.rt_mr3) != bytes(48), "sealed before the first quote"


def test_quotes_of_the_aci_reports_are_accepted(either: Recorded) -> None:
    for report in either.reports.values():
        quote = bytes.fromhex(json.loads(report)["attestation"]["evidence"]["quote"])
        assert judge(either, quote, at=issued(either)).status == "UpToDate"


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_bit_is_refused(tdx: Recorded, part: str) -> None:
    """In all that a signature covers. The spelling of PEM and the root at the end of the carried chain are not: plain
    dcap-qvl has its root from the caller. Our verifier refuses that too (tests/attestation/tdx/test_sweep.py).
    """
    quote = evidence(tdx)[0]
    accepted = []
    for at in PARTS[part]:
        changed = bytearray(quote)
        changed[at] ^= 1
        try:
            judge(tdx, bytes(changed), at=issued(tdx))
        except ValueError:
            continue
        accepted.append(at)
    assert accepted == []


@pytest.mark.parametrize("late", [1, 86400, 10 * 365 * 86400])
def test_time_past_the_collateral_is_refused(tdx: Recorded, late: int) -> None:
    quote, end = evidence(tdx)[0], ends(tdx)
    assert judge(tdx, quote, at=end - 1).status == "UpToDate"
    with pytest.raises(ValueError, match=r"(?i)expired|valid"):
        judge(tdx, quote, at=end + late)


def test_another_root_is_refused(tdx: Recorded, tmp_path: Path) -> None:
    quote, at = evidence(tdx)[0], issued(tdx)
    other = DevTee.create(tmp_path / "other", gpus=1)
    with pytest.raises(ValueError):
        judge(tdx, quote, at=at, anchor=other.roots.intel)
    collateral = dcap_qvl.QuoteCollateralV3.from_json(collateral_json(tdx.bundle))
    with pytest.raises(ValueError):
        dcap_qvl.verify(quote, collateral, at)  # Intel's, which the library has built in
