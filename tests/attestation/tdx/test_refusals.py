"""What a genuine vendor never signs for us, told by the development TEE: each lie is refused by the check made for it.

Where the library would accept (tdx facts §4.3), the test also shows that it does: the refusal is ours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import dcap_qvl  # type: ignore[import-untyped]  # ships stubs without py.typed
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from attestation.policy import Skip, TdxPolicy, platform_policy
from attestation.result import Status
from attestation.tdx import CrlNumbers, Registers
from tests.attestation.tdx.dev import DAY, NOW, REPORT_DATA, extended_quote, tee, tell
from tests.devtee.pki import SGX_EXTENSION, Entity, Pki, issue, pem
from tests.devtee.tdx import OLD_TEE_TCB_SVN, CollateralSpec, QuoteForm
from tests.devtee.tee import DevTee

C, F = CollateralSpec, QuoteForm
POLICY = platform_policy(min_tcb_evaluation=19).tdx
WHY = Skip("this test looks at something else")


def library_accepts(quote: bytes, collateral: bytes) -> bool:
    given = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode())
    try:
        return bool(dcap_qvl.verify_with_root_ca(quote, given, tee().roots.intel, NOW).status == "UpToDate")
    except ValueError:
        return False


@pytest.mark.parametrize("form", [F(), F(nul=False), F(version=5), F(version=5, body="1.5")])
def test_honest_machine_is_accepted(form: QuoteForm) -> None:
    verdict = tell(form=form, policy=POLICY)
    assert verdict.accepted, verdict.failed
    assert verdict.facts is not None
    facts, pki = verdict.facts, tee().pki.facts
    assert (facts.ppid, facts.piid, facts.fmspc) == (pki.ppid, pki.piid, pki.fmspc)
    assert (facts.tcb_status, facts.qe_status, facts.advisories, facts.eval_data_number) == (
        "UpToDate", "UpToDate", frozenset(), 20,
    )  # fmt: skip
    assert facts.report.report_data == REPORT_DATA
    assert facts.crl == CrlNumbers(root=1, platform=1, processor=None)


def test_honest_extended_report_is_accepted() -> None:
    verdict = tell(quote=extended_quote(td_id=b"\1" * 32), policy=POLICY)
    assert verdict.accepted, verdict.failed


COLLATERAL: list[tuple[str, CollateralSpec, str, str]] = [
    ("PCK revoked", C(revoked=frozenset({"intel-pck"})), "tdx.revocation", "TDX_REVOKED"),
    ("TCB signer revoked", C(revoked=frozenset({"intel-tcb-signing"})), "tdx.revocation", "TDX_REVOKED"),
    ("PCK CA revoked", C(revoked=frozenset({"intel-platform-ca"})), "tdx.revocation", "TDX_REVOKED"),
    ("CRL expired", C(crl_age=31 * DAY), "tdx.crl", "TDX_CRL"),
    ("CRL from the future", C(crl_age=-3600), "tdx.issue-dates", "TDX_ISSUE_DATES"),
    ("TCB info expired", C(age=31 * DAY), "tdx.collateral-time", "TDX_COLLATERAL_TIME"),
    ("TCB info from the future", C(age=-3600), "tdx.collateral-time", "TDX_COLLATERAL_TIME"),
    ("QE identity expired", C(qe_age=31 * DAY), "tdx.collateral-time", "TDX_COLLATERAL_TIME"),
    ("QE identity from the future", C(qe_age=-3600), "tdx.collateral-time", "TDX_COLLATERAL_TIME"),
    ("old, though valid", C(age=31 * DAY, lifetime=90 * DAY), "tdx.collateral-age", "TDX_COLLATERAL_AGE"),
    ("TCB info signed by a PCK", C(tcb_signer="intel-pck"), "tdx.tcb-info-signer", "TDX_COLLATERAL_ROLE"),
    ("QE identity signed by a PCK", C(qe_signer="intel-pck"), "tdx.qe-identity-signer", "TDX_COLLATERAL_ROLE"),
    ("SGX TCB info", C(tcb_id="SGX"), "tdx.collateral-kind", "TDX_COLLATERAL_KIND"),
    ("TCB info version 2", C(tcb_version=2), "tdx.collateral-kind", "TDX_COLLATERAL_KIND"),
    ("SGX QE identity", C(qe_id="QE"), "tdx.collateral-kind", "TDX_COLLATERAL_KIND"),
    ("tcbType 1", C(tcb_type=1), "tdx.tcb-type", "TDX_TCB_TYPE"),
    ("another PCE", C(pce_id=b"\1\0"), "tdx.pce-id", "TDX_PCE_ID"),
    ("another FMSPC", C(fmspc=b"\x99" * 6), "tdx.fmspc", "TDX_FMSPC"),
    ("another QE signer", C(qe_mrsigner=bytes(32)), "tdx.qe-identity", "TDX_QE_IDENTITY"),
    ("evaluation below the floor", C(evaluation=18), "tdx.tcb-evaluation", "TDX_TCB_EVALUATION"),
    ("QE evaluation below the floor", C(qe_evaluation=18), "tdx.tcb-evaluation", "TDX_TCB_EVALUATION"),
    ("advisory", C(advisories=("INTEL-SA-01192",)), "tdx.advisories", "TDX_ADVISORY"),
    ("QE advisory", C(qe_advisories=("INTEL-SA-01192",)), "tdx.advisories", "TDX_ADVISORY"),
    ("revoked level", C(tcb_status="Revoked"), "tdx.tcb-level", "TDX_TCB_REVOKED"),
    ("revoked module", C(module_status="Revoked"), "tdx.tcb-level", "TDX_TCB_REVOKED"),
    ("revoked QE", C(qe_status="Revoked"), "tdx.tcb-level", "TDX_TCB_REVOKED"),
    ("module OutOfDate", C(module_status="OutOfDate"), "tdx.tcb-status", "TDX_TCB_STATUS"),
    ("QE OutOfDate", C(qe_status="OutOfDate"), "tdx.qe-status", "TDX_QE_STATUS"),
    *(
        (f"platform {s}", C(tcb_status=s), "tdx.tcb-status", "TDX_TCB_STATUS")
        for s in ("SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
                  "OutOfDateConfigurationNeeded")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "id", "code"), [c[1:] for c in COLLATERAL], ids=[c[0] for c in COLLATERAL])
def test_collateral_that_lies_is_refused_by_its_check(spec: CollateralSpec, id: str, code: str) -> None:
    verdict = tell(spec=spec, policy=POLICY)
    assert verdict.failed.get(id) == code, verdict.failed
    assert not verdict.accepted


FORMS: list[tuple[str, QuoteForm, str, str]] = [
    ("padding", F(padding=64), "tdx.quote", "FORMAT_TDX_LENGTH"),
    ("QE signed by another key", F(signer="intel-tcb-signing"), "tdx.qe-signature", "TDX_QE_SIGNATURE"),
    ("second half of QE report data", F(qe_report_tail=b"\1" * 32), "tdx.qe-report-data", "TDX_QE_REPORT_DATA"),
    ("QE MISCSELECT", F(qe_miscselect=1), "tdx.qe-identity", "TDX_QE_IDENTITY"),
    ("QE in debug", F(qe_attributes=b"\x17" + bytes(7) + b"\xe7" + bytes(7)), "tdx.qe-identity", "TDX_QE_IDENTITY"),
    ("QE MRSIGNER", F(qe_mrsigner=bytes(32)), "tdx.qe-identity", "TDX_QE_IDENTITY"),
    ("QE product", F(qe_prod_id=1), "tdx.qe-identity", "TDX_QE_IDENTITY"),
    ("QE below every level", F(qe_svn=0), "tdx.qe-identity", "TDX_QE_IDENTITY"),
    ("QE of an old level", F(qe_svn=1), "tdx.qe-status", "TDX_QE_STATUS"),
    ("chain without root", F(chain=("intel-pck", "intel-platform-ca")), "tdx.quote", "FORMAT_TDX_PCK_CHAIN"),
    (
        "chain out of order",
        F(chain=("intel-platform-ca", "intel-pck", "intel-root")),
        "tdx.pck-role",
        "TDX_PCK_ROLE",
    ),
    (
        "TCB signer in the place of a PCK",
        F(chain=("intel-tcb-signing", "intel-platform-ca", "intel-root"), signer="intel-tcb-signing"),
        "tdx.pck-role",
        "TDX_PCK_ROLE",
    ),
]


@pytest.mark.parametrize(("form", "id", "code"), [c[1:] for c in FORMS], ids=[c[0] for c in FORMS])
def test_quote_that_lies_is_refused_by_its_check(form: QuoteForm, id: str, code: str) -> None:
    verdict = tell(form=form, policy=POLICY)
    assert verdict.failed.get(id) == code, verdict.failed
    assert not verdict.accepted


@pytest.mark.parametrize("bit", [b for b in range(64) if b != 28])
def test_every_further_td_attribute_bit_is_refused(bit: int) -> None:
    """DEBUG, profiling, MIGRATABLE; and what the library lets pass: ICSSD, LASS, PKS, KL, TPA, PERFMON, 18 to 22."""
    td = tee().changed(td_attributes=0x10000000 | 1 << bit)
    verdict = tell(td=td, policy=POLICY)
    assert verdict.failed.get("tdx.td-attributes") == "TDX_ATTRIBUTES"
    lenient = tell(td=td, policy=replace(POLICY, td_attributes=WHY))
    if bit in (16, 18, 19, 20, 21, 22, 27, 30, 31, 62, 63):
        assert lenient.accepted and library_accepts(tee().quote(REPORT_DATA, td=td), tee().collateral(NOW))
    else:
        assert lenient.failed.get("tdx.td-safety") == "TDX_ATTRIBUTES"


def test_td_without_sept_ve_disable_is_refused() -> None:
    verdict = tell(td=tee().changed(td_attributes=0), policy=replace(POLICY, td_attributes=frozenset({0})))
    assert verdict.failed == {"tdx.td-safety": "TDX_ATTRIBUTES"}


@pytest.mark.parametrize("xfam", [0, 0x3, 0x600E6, 0x600E7 | 1 << 9 | 1 << 20, 0xE7, 1 << 63])
def test_xfam_outside_the_list_is_refused_though_the_library_accepts_it(xfam: int) -> None:
    td = tee().changed(xfam=xfam)
    assert library_accepts(tee().quote(REPORT_DATA, td=td), tee().collateral(NOW))
    assert tell(td=td, policy=POLICY).failed == {"tdx.xfam": "TDX_XFAM"}


@pytest.mark.parametrize(
    ("quote", "why"),
    [
        (lambda: tee().quote(REPORT_DATA, version=5, td=tee().changed(mrservicetd=b"\1" * 48)), "bound at build"),
        (lambda: extended_quote(init_servtd_hash=b"\1" * 48), "bound at the start"),
        (lambda: extended_quote(servtd_hash=b"\1" * 48), "bound now"),
    ],
)
def test_service_td_is_refused(quote: Any, why: str) -> None:
    assert tell(quote=quote(), policy=POLICY).failed.get("tdx.service-td") == "TDX_SERVICE_TD", why


def test_module_that_is_not_intels_is_refused() -> None:
    verdict = tell(td=tee().changed(mrsignerseam=b"\1" * 48), policy=POLICY)
    assert verdict.failed == {"tdx.module-identity": "TDX_MODULE", "tdx.mrsignerseam": "TDX_MRSIGNERSEAM"}
    verdict = tell(td=tee().changed(seam_attributes=1), policy=POLICY)
    assert verdict.failed == {"tdx.module-identity": "TDX_MODULE", "tdx.seamattributes": "TDX_SEAMATTRIBUTES"}


def test_module_of_an_unknown_generation_is_refused() -> None:
    verdict = tell(td=tee().changed(tee_tcb_svn=bytes([5, 9, 4]) + bytes(13)), policy=POLICY)
    assert verdict.failed == {"tdx.module-identity": "TDX_MODULE"}


def test_td_that_must_be_relaunched_is_refused() -> None:
    verdict = tell(version=5, td=tee().changed(tee_tcb_svn=OLD_TEE_TCB_SVN), policy=POLICY)
    assert verdict.facts is not None and verdict.facts.tcb_status == "TDRelaunchAdvised"
    assert verdict.failed.get("tdx.tcb-status") == "TDX_TCB_STATUS"


def test_stale_platform_blessed_by_an_extracted_pck_key_is_refused() -> None:
    """The library says UpToDate: any leaf below the root may sign collateral there (tdx facts §4.3.1)."""
    quote = tee().quote(REPORT_DATA)
    collateral = tee().collateral(NOW, C(tcb_signer="intel-pck", qe_signer="intel-pck"))
    assert library_accepts(quote, collateral)
    verdict = tell(quote=quote, collateral=collateral, policy=POLICY)
    assert verdict.failed == {
        "tdx.tcb-info-signer": "TDX_COLLATERAL_ROLE",
        "tdx.qe-identity-signer": "TDX_COLLATERAL_ROLE",
    }
    assert verdict.facts is None


def with_role(entity: Entity, role: str) -> DevTee:
    """The same machine with one more certificate in its PKI."""
    pki = tee().pki
    return DevTee(Pki(pki.facts, pki.entities | {role: entity}, pki.gpus))


def named(cn: str, *organisations: str) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, cn)]
    return x509.Name(parts + [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organisations])


INTEL = "Intel Corporation"
SGX = (x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_EXTENSION), b"\x30\x00"), False)
SIGNERS: list[tuple[str, x509.Name, dict[str, Any]]] = [
    ("another name", named("Intel SGX TCB Signing 2", INTEL), {}),
    ("a PCK's name", named("Intel SGX PCK Certificate", INTEL), {}),
    ("another organisation", named("Intel SGX TCB Signing", "Intel Corp"), {}),
    ("two organisations", named("Intel SGX TCB Signing", INTEL, INTEL), {}),
    ("no organisation", named("Intel SGX TCB Signing"), {}),
    ("a platform's extension", named("Intel SGX TCB Signing", INTEL), {"extra": [SGX]}),
]


@pytest.mark.parametrize(("subject", "how"), [s[1:] for s in SIGNERS], ids=[s[0] for s in SIGNERS])
def test_collateral_signed_under_the_root_by_another_role_is_refused(subject: x509.Name, how: dict[str, Any]) -> None:
    """The library takes any leaf; here the signer must be the TCB signer by name, organisation and extensions."""
    odd = issue(subject, tee().pki["intel-root"], ec.SECP256R1(), ca=False, usage=("digital_signature",), **how)
    collateral = with_role(odd, "odd").collateral(NOW, C(tcb_signer="odd", qe_signer="odd"))
    assert library_accepts(tee().quote(REPORT_DATA), collateral)
    assert tell(collateral=collateral, policy=POLICY).failed == {
        "tdx.tcb-info-signer": "TDX_COLLATERAL_ROLE", "tdx.qe-identity-signer": "TDX_COLLATERAL_ROLE",
    }  # fmt: skip


def test_collateral_signed_by_the_right_role_with_another_certificate_is_accepted() -> None:
    """Intel renews the signer: the role counts, not the certificate."""
    new = issue(named("Intel SGX TCB Signing", INTEL), tee().pki["intel-root"], ec.SECP256R1(), ca=False,
                usage=("digital_signature",))  # fmt: skip
    collateral = with_role(new, "new").collateral(NOW, C(tcb_signer="new", qe_signer="new"))
    assert tell(collateral=collateral, policy=POLICY).accepted


def test_crl_issuer_chain_that_names_another_ca_is_refused() -> None:
    """The library does not read this field: without our check it could say anything."""
    collateral = json.loads(tee().collateral(NOW))
    signer = tee().pki["intel-tcb-signing"].cert
    for chain in ([signer, tee().pki["intel-root"].cert], [tee().pki["intel-platform-ca"].cert], [signer, signer]):
        changed = json.dumps(collateral | {"pck_crl_issuer_chain": pem(chain).decode()}).encode()
        assert tell(collateral=changed, policy=POLICY).failed == {"tdx.pck-crl-issuer": "TDX_COLLATERAL_ROLE"}


def test_pck_chain_beside_the_quote_is_never_used() -> None:
    """The quote names one certificate, the collateral staples another: the library takes the stapled one."""
    quote = tee().quote(REPORT_DATA, form=F(chain=("intel-tcb-signing", "intel-platform-ca", "intel-root")))
    stapled = tee().collateral(NOW, C(pck_chain=True))
    assert "pck_certificate_chain" in json.loads(stapled)
    assert library_accepts(quote, stapled)
    verdict = tell(quote=quote, collateral=stapled, policy=POLICY)
    assert {"tdx.pck-role", "tdx.pck-chain", "tdx.qe-signature"} <= set(verdict.failed) and verdict.facts is None


def test_quote_of_another_machine_is_refused_with_this_machines_collateral() -> None:
    assert not tell(quote=DevTee(Pki.fresh(1)).quote(REPORT_DATA), policy=POLICY).accepted


def test_root_of_the_same_name_with_another_key_is_refused() -> None:
    """A pre-production root carries the genuine names: roots are compared as bytes."""
    verdict = tell(root=DevTee(Pki.fresh(1)).roots.intel, policy=POLICY)
    assert verdict.failed.get("tdx.pck-root") == "TDX_PCK_CHAIN"
    assert verdict.failed.get("tdx.pck-chain") == "TDX_PCK_CHAIN"
    assert verdict.failed.get("tdx.tcb-info-signer") == "TDX_COLLATERAL_ROLE"
    assert verdict.failed.get("tdx.pck-crl-issuer") == "TDX_COLLATERAL_ROLE"
    assert verdict.facts is None


def test_machine_of_the_development_tee_is_refused_under_intels_root() -> None:
    from attestation.roots import INTEL_SGX_ROOT_CA

    verdict = tell(root=INTEL_SGX_ROOT_CA, policy=POLICY)
    assert not verdict.accepted and verdict.facts is None


@pytest.mark.parametrize(
    "floor", [CrlNumbers(root=2), CrlNumbers(platform=2), CrlNumbers(root=1, platform=7, processor=1)]
)
def test_older_crl_than_one_seen_before_is_refused(floor: CrlNumbers) -> None:
    verdict = tell(crl_floor=floor, policy=POLICY)
    assert verdict.failed == {"tdx.crl-number": "TDX_CRL_ROLLBACK"}


def test_crl_numbers_seen_are_the_next_floor() -> None:
    seen = tell(spec=C(crl_number=3), policy=POLICY)
    assert seen.facts is not None
    floor = CrlNumbers(root=1, processor=9).merge(seen.facts.crl)
    assert floor == CrlNumbers(root=3, platform=3, processor=9)
    assert tell(spec=C(crl_number=3), crl_floor=floor, policy=POLICY).accepted
    assert not tell(spec=C(crl_number=2), crl_floor=floor, policy=POLICY).accepted


ONE = frozenset({b"\1" * 48})
POLICIES: list[tuple[str, dict[str, Any], str, str]] = [
    ("tcb_status", {"tcb_status": frozenset({"OutOfDate"})}, "tdx.tcb-status", "TDX_TCB_STATUS"),
    ("td_attributes", {"td_attributes": frozenset({0x30000000})}, "tdx.td-attributes", "TDX_ATTRIBUTES"),
    ("min_tcb_evaluation", {"min_tcb_evaluation": 21}, "tdx.tcb-evaluation", "TDX_TCB_EVALUATION"),
    ("max_collateral_age", {"max_collateral_age": 3599}, "tdx.collateral-age", "TDX_COLLATERAL_AGE"),
    ("xfam", {"xfam": frozenset({0xE7})}, "tdx.xfam", "TDX_XFAM"),
    ("mrseam", {"mrseam": ONE}, "tdx.mrseam", "TDX_MRSEAM"),
    ("mrconfigid", {"mrconfigid": b"\1" * 48}, "tdx.mrconfigid", "TDX_MRCONFIGID"),
    ("mrowner", {"mrowner": b"\1" * 48}, "tdx.mrowner", "TDX_MROWNER"),
    ("mrownerconfig", {"mrownerconfig": b"\1" * 48}, "tdx.mrownerconfig", "TDX_MROWNERCONFIG"),
    ("platforms", {"platforms": frozenset({b"\1" * 16})}, "tdx.platform", "TDX_PLATFORM"),
]


@pytest.mark.parametrize(("change", "id", "code"), [p[1:] for p in POLICIES], ids=[p[0] for p in POLICIES])
def test_each_policy_field_refuses_by_itself(change: dict[str, Any], id: str, code: str) -> None:
    assert tell(policy=replace(POLICY, **change)).failed.get(id) == code


@pytest.mark.parametrize(("change", "id", "code"), [p[1:] for p in POLICIES], ids=[p[0] for p in POLICIES])
def test_skipped_field_is_recorded_with_its_reason_and_is_no_pass(change: dict[str, Any], id: str, code: str) -> None:
    verdict = tell(policy=replace(POLICY, **dict.fromkeys(change, WHY)))
    assert verdict.status(id) is Status.SKIP
    assert WHY.why in next(c.reason for c in verdict.checks if c.id == id)


def test_policy_that_names_the_values_of_this_machine_accepts_it() -> None:
    td, pki = tee().td, tee().pki.facts
    policy: TdxPolicy = replace(
        POLICY, mrseam=frozenset({td.mrseam}), mrconfigid=td.mrconfigid, mrowner=td.mrowner,
        mrownerconfig=td.mrownerconfig, platforms=frozenset({pki.piid}),
    )  # fmt: skip
    values = [frozenset({v}) for v in (td.mrtd, *td.rtmr[:3])]
    registers = Registers(*values)
    verdict = tell(policy=policy, registers=registers)
    assert verdict.accepted, verdict.failed
    assert not [c.id for c in verdict.checks if c.status is Status.SKIP and c.id != "tdx.crl-number"]
    assert tell(policy=replace(policy, platforms=frozenset({pki.ppid}))).accepted
    for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2"):
        assert tell(policy=policy, registers=replace(registers, **{name: ONE})).failed == {
            f"tdx.{name}": f"TDX_{name.upper()}"
        }


@pytest.mark.parametrize("status", ["OutOfDateConfigurationNeeded"])
def test_status_that_no_policy_may_allow_is_refused_under_every_policy(status: str) -> None:
    for allowed in (WHY, frozenset({status})):
        verdict = tell(spec=C(tcb_status=status), policy=replace(POLICY, tcb_status=allowed))
        assert verdict.failed.get("tdx.tcb-status") == "TDX_TCB_STATUS"


def test_every_wrong_thing_is_named_not_only_the_first() -> None:
    quote = bytearray(tee().quote(REPORT_DATA, td=tee().changed(xfam=0, mrsignerseam=b"\1" * 48)))
    quote[636] ^= 1
    verdict = tell(quote=bytes(quote), spec=C(evaluation=3, tcb_type=1, pce_id=b"\1\1"), policy=POLICY)
    assert verdict.codes >= {
        "TDX_QUOTE_SIGNATURE", "TDX_XFAM", "TDX_MRSIGNERSEAM", "TDX_TCB_EVALUATION", "TDX_TCB_TYPE", "TDX_PCE_ID",
    }  # fmt: skip
    assert verdict.facts is None


def test_every_item_of_the_checklist_is_recorded_whatever_happens() -> None:
    """The ids of an accepted and of a refused verdict are the same list: nothing is silently left out."""
    honest = [c.id for c in tell(policy=POLICY).checks]
    broken = bytearray(tee().quote(REPORT_DATA))
    broken[700] ^= 1
    refused = [c.id for c in tell(quote=bytes(broken), policy=POLICY).checks]
    assert set(honest) - set(refused) == {"tdx.readers-agree"} and not set(refused) - set(honest)
    assert all(c.cite for c in tell(policy=POLICY).checks if c.id not in ("tdx.quote", "tdx.collateral"))
