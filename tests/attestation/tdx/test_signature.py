"""The library speaks English and stops early; a verdict here never depends on understanding it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import dcap_qvl  # type: ignore[import-untyped]  # ships stubs without py.typed
import pytest

from attestation.result import Status
from attestation.tdx import signature
from attestation.tdx.certificates import pck_extension, read_certificate
from tests.attestation.tdx.dev import DAY, NOW, REPORT_DATA, tee, tell
from tests.devtee.tdx import CollateralSpec


def refuse_with(monkeypatch: pytest.MonkeyPatch, sentence: str) -> None:
    """The library, refusing with *sentence*: the one thing that is replaced, because it cannot be made to say it."""

    class Verifier:
        def __init__(self, **_: Any) -> None: ...

        def verify_with_policy(self, *_: Any) -> Any:
            raise ValueError(sentence)

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Verifier)


@pytest.mark.parametrize("sentence", ["", "everything is fine", "OK", "UpToDate", "a sentence of a later release"])
def test_sentence_nobody_knows_is_a_refusal(monkeypatch: pytest.MonkeyPatch, sentence: str) -> None:
    refuse_with(monkeypatch, sentence)
    verdict = tell()
    assert verdict.failed == {"tdx.signature-layer": "TDX_SIGNATURE_LAYER"} and verdict.facts is None


@pytest.mark.parametrize("part", [s[0] for s in signature._SENTENCES])
def test_every_known_sentence_is_a_refusal_by_a_named_check(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    refuse_with(monkeypatch, f"Verification failed: {part}")
    verdict = tell()
    assert len(verdict.failed) == 1 and not verdict.accepted and verdict.facts is None
    assert "TDX_SIGNATURE_LAYER" not in verdict.codes


def test_stage_that_was_not_reached_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_with(monkeypatch, "No matching TCB level found")
    verdict = tell()
    assert verdict.failed == {"tdx.tcb-level": "TDX_TCB_LEVEL"}
    assert verdict.status("tdx.qe-identity") is Status.SKIP
    assert verdict.status("tdx.quote-signature") is Status.PASS  # judged again by our own code


def test_library_that_reads_other_values_than_we_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parsers that disagree about one quote are an attack on whoever trusts the other one."""
    honest = dcap_qvl.QuoteVerifier

    class Verifier:
        def __init__(self, **how: Any) -> None:
            self._real = honest(**how)

        def verify_with_policy(self, *arguments: Any) -> Any:
            text = self._real.verify_with_policy(*arguments).to_json()

            class Claims:
                def to_json(self) -> str:
                    return str(text.replace(tee().td.mrtd.hex(), "00" * 48))

            return Claims()

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Verifier)
    verdict = tell()
    assert verdict.failed == {"tdx.readers-agree": "TDX_READERS_DIFFER"} and verdict.facts is None


def accept_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """A library that accepts whatever it is shown, with the claims of the honest machine after *change*."""
    honest = json.dumps(honest_claims())

    class Claims:
        def to_json(self) -> str:
            return change(honest)

    class Verifier:
        def __init__(self, **_: Any) -> None: ...

        def verify_with_policy(self, *_: Any) -> Any:
            return Claims()

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Verifier)


def honest_claims() -> Any:
    verifier = dcap_qvl.QuoteVerifier(root_ca_der=tee().roots.intel)
    given = dcap_qvl.QuoteCollateralV3.from_json(tee().collateral(NOW).decode())
    policy = dcap_qvl.QuotePolicy.claims_only(NOW)
    return json.loads(verifier.verify_with_policy(tee().quote(REPORT_DATA), given, NOW, policy).to_json())


def test_what_we_judge_ourselves_is_refused_though_the_library_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library once did not look at the QE at all (CVE-2026-22696): cheap questions are asked twice."""
    accept_as(monkeypatch, lambda claims: claims)
    assert tell().accepted  # the stand-in itself is believed
    raw = bytearray(tee().quote(REPORT_DATA))
    raw[636 + 584] ^= 1  # QE authentication data
    assert tell(quote=bytes(raw)).failed == {"tdx.qe-binding": "TDX_QE_BINDING"}
    assert tell(spec=CollateralSpec(age=31 * DAY, lifetime=30 * DAY)).failed.get("tdx.collateral-time")
    assert tell(spec=CollateralSpec(fmspc=b"\x99" * 6)).failed == {"tdx.fmspc": "TDX_FMSPC"}
    assert tell(spec=CollateralSpec(tcb_id="SGX")).failed == {"tdx.collateral-kind": "TDX_COLLATERAL_KIND"}
    accept_as(monkeypatch, lambda claims: claims.replace("0000001000000000", "0100001000000000"))
    debug = tell(td=tee().changed(td_attributes=0x10000001))
    assert debug.failed == {"tdx.td-safety": "TDX_ATTRIBUTES", "tdx.td-attributes": "TDX_ATTRIBUTES"}
    assert debug.facts is None


@pytest.mark.parametrize("claims", ["[]", "{}", '{"platform": null}', "not json"])
def test_claims_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch, claims: str) -> None:
    class Claims:
        def to_json(self) -> str:
            return claims

    class Verifier:
        def __init__(self, **_: Any) -> None: ...

        def verify_with_policy(self, *_: Any) -> Any:
            return Claims()

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", Verifier)
    verdict = tell()
    assert not verdict.accepted and verdict.facts is None


def test_root_that_is_no_certificate_is_refused() -> None:
    for root in (b"", b"\x30\x00", bytes(700)):
        assert not tell(root=root).accepted


def test_time_out_of_range_is_refused() -> None:
    for now in (-1, 2**64, 0):
        assert not tell(now=now).accepted


def test_our_reader_of_the_pck_extension_agrees_with_the_library() -> None:
    chain = tee().quote(REPORT_DATA)
    theirs = dcap_qvl.parse_quote(chain).pck_extension()
    sgx = read_certificate(tee().pki["intel-pck"].der).sgx
    assert sgx is not None
    ours = pck_extension(sgx)
    assert (ours.ppid, ours.fmspc, ours.pce_id, ours.platform_instance_id) == (
        theirs.ppid, theirs.fmspc, theirs.pce_id, theirs.platform_instance_id,
    )  # fmt: skip
