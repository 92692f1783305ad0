"""Quotes and collateral are byte-exact: plain dcap-qvl, unmodified, verifies them under the machine's own root."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import dcap_qvl  # type: ignore[import-untyped]  # ships no types
import pytest

from tests.devtee.tdx import OLD_TEE_TCB_SVN, CollateralSpec, QuoteForm, Td
from tests.devtee.tee import DevTee

NOW: Final = 1_795_000_000
DATA: Final = bytes(range(64))
V5: Final = QuoteForm(version=5, body="1.5")
DAY: Final = 86400


@pytest.fixture(scope="module")
def tee(tmp_path_factory: pytest.TempPathFactory) -> DevTee:
    return DevTee.create(tmp_path_factory.mktemp("tee") / "state", gpus=1)


def judge(
    tee: DevTee,
    *,
    td: Td | None = None,
    form: QuoteForm | None = None,
    root: bytes | None = None,
    at: int = NOW,
    **collateral: Any,  # Any: fields of CollateralSpec
) -> dcap_qvl.VerifiedReport:
    stapled = dcap_qvl.QuoteCollateralV3.from_json(tee.collateral(NOW, CollateralSpec(**collateral)).decode())
    quote = tee.quote(DATA, td=td, form=form)
    return dcap_qvl.verify_with_root_ca(quote, stapled, root or tee.roots.intel, at)


@pytest.mark.parametrize(("form", "base"), [
    (QuoteForm(), 48), (QuoteForm(version=5), 54), (V5, 54), (QuoteForm(nul=False), 48),
])  # fmt: skip
def test_quote_verifies_with_plain_dcap_qvl_and_has_its_canonical_length(
    tee: DevTee, form: QuoteForm, base: int
) -> None:
    assert judge(tee, form=form).status == "UpToDate"
    quote = tee.quote(DATA, form=form)
    body = 648 if form.body == "1.5" else 584
    end = base + body
    assert len(quote) == end + 4 + int.from_bytes(quote[end : end + 4], "little")
    assert quote[base + 520 : base + 584] == DATA
    parsed = dcap_qvl.parse_quote(quote)
    assert parsed.is_tdx() and bytes.fromhex(parsed.fmspc()) == tee.pki.facts.fmspc


def test_registers_of_the_td_stand_in_the_quote(tee: DevTee) -> None:
    td = replace(tee.td, mrtd=b"\1" * 48, mrconfigid=b"\2" * 48, mrowner=b"\3" * 48, mrownerconfig=b"\4" * 48)
    quote = tee.quote(DATA, td=td)
    assert quote[48 + 136 : 48 + 328] == b"".join(bytes([n]) * 48 for n in (1, 2, 3, 4))
    assert quote[48 + 328 : 48 + 520] == b"".join(td.rtmr)


@pytest.mark.parametrize("status", [
    "UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
    "OutOfDateConfigurationNeeded",
])  # fmt: skip
def test_every_platform_status_can_be_driven(tee: DevTee, status: str) -> None:
    report = judge(tee, tcb_status=status, advisories=("INTEL-SA-00001",))
    assert (report.status, report.advisory_ids) == (status, ["INTEL-SA-00001"])


def test_td_launched_before_a_module_update_is_told_to_relaunch(tee: DevTee) -> None:
    old = replace(tee.td, tee_tcb_svn=OLD_TEE_TCB_SVN)
    assert judge(tee, td=old, form=V5).status == "TDRelaunchAdvised"
    assert (
        judge(tee, td=old, form=V5, tcb_status="ConfigurationNeeded").status == "TDRelaunchAdvisedConfigurationNeeded"
    )
    assert judge(tee, td=old).status == "OutOfDate"


@pytest.mark.parametrize(("change", "status"), [
    ({"qe_status": "OutOfDate"}, "OutOfDate"),
    ({"module_status": "OutOfDate"}, "OutOfDate"),
    # Accepted by the library; our own checks refuse each (tdx.md §4.3). The machine must be able to ask for it.
    ({"tcb_signer": "intel-pck"}, "UpToDate"),
    ({"qe_signer": "intel-pck"}, "UpToDate"),
    ({"pce_id": b"\1\0"}, "UpToDate"),
    ({"tcb_type": 1}, "UpToDate"),
    ({"evaluation": 3}, "UpToDate"),
    ({"pck_chain": True}, "UpToDate"),
])  # fmt: skip
def test_collateral_that_the_library_accepts_can_be_driven(tee: DevTee, change: dict[str, Any], status: str) -> None:
    assert judge(tee, **change).status == status


@pytest.mark.parametrize(("change", "words"), [
    ({"tcb_status": "Revoked"}, "Revoked"),
    ({"qe_status": "Revoked"}, "Revoked"),
    ({"module_status": "Revoked"}, "Revoked"),
    ({"revoked": frozenset({"intel-pck"})}, "CertRevoked"),
    ({"revoked": frozenset({"intel-platform-ca"})}, "CertRevoked"),
    ({"revoked": frozenset({"intel-tcb-signing"})}, "CertRevoked"),
    ({"age": 31 * DAY}, "TCBInfo expired"),
    ({"qe_age": 31 * DAY}, "QE Identity expired"),
    ({"age": -DAY}, "issue date is in the future"),
    ({"crl_age": 31 * DAY}, "CrlExpired"),
    ({"fmspc": bytes(6)}, "Fmspc mismatch"),
    ({"qe_mrsigner": bytes(32)}, "MRSIGNER"),
    ({"qe_id": "QE"}, "QE Identity id"),
    ({"tcb_id": "SGX"}, "non-TDX TCB info"),
])  # fmt: skip
def test_collateral_that_must_be_refused_is_refused(tee: DevTee, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){words}"):
        judge(tee, **change)


@pytest.mark.parametrize(("td", "form", "words"), [
    ({"td_attributes": 0x10000001}, V5, "Debug"),
    ({"td_attributes": 0x10000010}, V5, "profiling"),
    ({"td_attributes": 0x30000000}, V5, "migration"),
    ({"td_attributes": 0}, V5, "SEPT_VE_DISABLE"),
    ({"mrservicetd": b"\1" * 48}, V5, "service TD"),
    ({}, replace(V5, signer="intel-tcb-signing"), "qe_report"),
    ({}, replace(V5, qe_mrsigner=bytes(32)), "MRSIGNER"),
    ({}, replace(V5, qe_vendor=bytes(16)), "vendor ID"),
    ({}, replace(V5, auth_data=bytes(16)), "auth data length"),
    ({}, replace(V5, chain=("intel-tcb-signing", "intel-root")), "extension not found"),
])  # fmt: skip
def test_quote_that_must_be_refused_is_refused(tee: DevTee, td: dict[str, Any], form: QuoteForm, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){words}"):
        judge(tee, td=replace(tee.td, **td), form=form)


def test_what_the_library_overlooks_can_be_driven(tee: DevTee) -> None:
    for bit in (16, 27, 30, 31, 62, 63):
        td = replace(tee.td, td_attributes=0x10000000 | 1 << bit, xfam=0)
        assert judge(tee, td=td).status == "UpToDate"
    assert judge(tee, form=QuoteForm(padding=70)).status == "UpToDate"
    assert judge(tee, form=QuoteForm(qe_report_tail=b"\1" * 32)).status == "UpToDate"


def test_foreign_root_with_the_same_names_is_refused(tee: DevTee, tmp_path: Path) -> None:
    other = DevTee.create(tmp_path / "other", gpus=1)
    assert other.pki["intel-root"].cert.subject == tee.pki["intel-root"].cert.subject
    with pytest.raises(ValueError, match="InvalidCrlSignature"):
        judge(tee, root=other.roots.intel)


def test_one_flipped_bit_of_what_is_signed_is_refused(tee: DevTee) -> None:
    collateral = dcap_qvl.QuoteCollateralV3.from_json(tee.collateral(NOW).decode())
    quote = tee.quote(DATA)
    for offset in (48, 48 + 136, 48 + 520, 640, 720, 800):
        bad = bytearray(quote)
        bad[offset] ^= 1
        with pytest.raises(ValueError, match=r"."):
            dcap_qvl.verify_with_root_ca(bytes(bad), collateral, tee.roots.intel, NOW)


def test_pki_is_private_fresh_and_survives_a_restart(tmp_path: Path) -> None:
    first = DevTee.create(tmp_path / "a", gpus=2)
    again = DevTee.load(tmp_path / "a")
    other = DevTee.create(tmp_path / "b", gpus=2)
    assert first.roots == again.roots and first.pki.facts == again.pki.facts
    assert len({first.roots.intel, other.roots.intel, first.roots.nvidia_device, other.roots.nvidia_device}) == 4
    assert first.pki.facts.ppid != other.pki.facts.ppid
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "pki.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        DevTee.create(tmp_path / "a")


def test_every_certificate_says_that_it_is_simulated(tee: DevTee) -> None:
    for role, entity in tee.pki.entities.items():
        assert "SIM" in entity.cert.subject.rfc4514_string(), role
