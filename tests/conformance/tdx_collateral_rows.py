"""Collateral: form, signers, dates, revocation, TCB levels."""

from __future__ import annotations

import json
from typing import Any

from cryptography import x509

from tests.attestation.tdx.dev import DAY, NOW, tee
from tests.conformance.book import Book, b64
from tests.conformance.tdx_machine import collateral, honest, named, quote, signed_by, stranger
from tests.devtee.pki import SGX_EXTENSION, pem, utc
from tests.devtee.tdx import CollateralSpec, QuoteForm

__all__ = ["collateral_rows"]

C = CollateralSpec
PCS = "Intel PCS API v4"
TCB = f"{PCS}, TCB Info V3"
QE = f"{PCS}, Enclave Identity V2"
PCK = "Intel SGX PCK Certificate and CRL Profile Specification"
CRL = "RFC 5280 §6.3"
INTEL = "Intel Corporation"


def collateral_rows(book: Book) -> None:
    """All rows about collateral; the control is `v4`."""
    _told(book)
    _signers(book)
    _edited(book)


def _told(book: Book) -> None:
    """What only the holder of Intel's keys could say."""
    status = "TDX_TCB_STATUS"
    rows: list[tuple[str, str, CollateralSpec, str, tuple[str, ...], str]] = [
        (CRL, "pck-revoked", C(revoked=frozenset({"intel-pck"})), "TDX_REVOKED", (), "a platform whose key is out"),
        (
            CRL,
            "tcb-signer-revoked",
            C(revoked=frozenset({"intel-tcb-signing"})),
            "TDX_REVOKED",
            (),
            "the collateral's signer is out",
        ),
        (
            CRL,
            "pck-ca-revoked",
            C(revoked=frozenset({"intel-platform-ca"})),
            "TDX_REVOKED",
            (),
            "the CA of the platform is out",
        ),
        (CRL, "crl-expired", C(crl_age=31 * DAY), "TDX_CRL", (), "an old list hides a revocation"),
        (
            "RFC 5280 §5.1.2.4",
            "crl-of-the-future",
            C(crl_age=-3600),
            "TDX_ISSUE_DATES",
            (),
            "a list dated ahead lives longer",
        ),
        (
            f"{TCB}: nextUpdate",
            "tcb-info-expired",
            C(age=31 * DAY, qe_age=3600),
            "TDX_COLLATERAL_TIME",
            ("TDX_COLLATERAL_AGE",),
            "it has ended",
        ),
        (
            f"{TCB}: issueDate",
            "tcb-info-of-the-future",
            C(age=-3600, qe_age=3600),
            "TDX_COLLATERAL_TIME",
            (),
            "it has not begun",
        ),
        (
            f"{QE}: nextUpdate",
            "qe-identity-expired",
            C(qe_age=31 * DAY),
            "TDX_COLLATERAL_TIME",
            ("TDX_COLLATERAL_AGE",),
            "it has ended",
        ),
        (
            f"{QE}: issueDate",
            "qe-identity-of-the-future",
            C(qe_age=-3600),
            "TDX_COLLATERAL_TIME",
            (),
            "it has not begun",
        ),
        (
            f"{TCB}: issueDate",
            "tcb-info-old-though-valid",
            C(age=31 * DAY, lifetime=90 * DAY, qe_age=3600, qe_lifetime=30 * DAY),
            "TDX_COLLATERAL_AGE",
            (),
            "kept from before a weakness was known",
        ),
        (
            f"{QE}: issueDate",
            "qe-identity-old-though-valid",
            C(qe_age=31 * DAY, qe_lifetime=90 * DAY),
            "TDX_COLLATERAL_AGE",
            (),
            "kept from before a weakness was known",
        ),
        (f"{TCB}: id", "tcb-info-of-sgx", C(tcb_id="SGX"), "TDX_COLLATERAL_KIND", (), "SGX collateral for a TDX quote"),
        (
            f"{TCB}: version",
            "tcb-info-version-2",
            C(tcb_version=2),
            "TDX_COLLATERAL_KIND",
            (),
            "a version without TDX components",
        ),
        (
            f"{QE}: id",
            "qe-identity-of-sgx",
            C(qe_id="QE"),
            "TDX_COLLATERAL_KIND",
            (),
            "the SGX quoting enclave's identity",
        ),
        (f"{TCB}: tcbType", "tcb-type-1", C(tcb_type=1), "TDX_TCB_TYPE", (), "components compared by other rules"),
        (
            f"{TCB}: pceId",
            "pce-id-of-another",
            C(pce_id=b"\1\0"),
            "TDX_PCE_ID",
            (),
            "TCB info for another provisioning enclave",
        ),
        (
            f"{TCB}: fmspc",
            "fmspc-of-another",
            C(fmspc=b"\x99" * 6),
            "TDX_FMSPC",
            (),
            "the TCB info of a healthier model",
        ),
        (
            f"{QE}: mrsigner",
            "qe-identity-of-another-signer",
            C(qe_mrsigner=bytes(32)),
            "TDX_QE_IDENTITY",
            (),
            "an identity for another enclave",
        ),
        (
            f"{TCB}: tcbEvaluationDataNumber",
            "evaluation-below-the-floor",
            C(evaluation=19),
            "TDX_TCB_EVALUATION",
            (),
            "old but still valid collateral",
        ),
        (
            f"{TCB}: tcbEvaluationDataNumber",
            "evaluation-of-the-tcb-info-below",
            C(evaluation=19, qe_evaluation=20),
            "TDX_TCB_EVALUATION",
            (),
            "the lower of both counts",
        ),
        (
            f"{QE}: tcbEvaluationDataNumber",
            "evaluation-of-the-qe-identity-below",
            C(qe_evaluation=19),
            "TDX_TCB_EVALUATION",
            (),
            "the lower of both counts",
        ),
        (
            f"{TCB}: advisoryIDs",
            "advisory",
            C(advisories=("INTEL-SA-01192",)),
            "TDX_ADVISORY",
            (),
            "a weakness that nobody decided to accept",
        ),
        (
            f"{QE}: advisoryIDs",
            "qe-advisory",
            C(qe_advisories=("INTEL-SA-01192",)),
            "TDX_ADVISORY",
            (),
            "a weakness that nobody decided to accept",
        ),
        (
            f"{TCB}: tcbStatus",
            "platform-revoked",
            C(tcb_status="Revoked"),
            "TDX_TCB_REVOKED",
            (),
            "refused under every policy",
        ),
        (
            f"{TCB}: tcbStatus",
            "module-revoked",
            C(module_status="Revoked"),
            "TDX_TCB_REVOKED",
            (),
            "refused under every policy",
        ),
        (f"{QE}: tcbStatus", "qe-revoked", C(qe_status="Revoked"), "TDX_TCB_REVOKED", (), "refused under every policy"),
        (
            f"{TCB}: tcbStatus",
            "module-out-of-date",
            C(module_status="OutOfDate"),
            status,
            (),
            "a module with known weaknesses",
        ),
        (
            f"{QE}: tcbStatus",
            "qe-out-of-date",
            C(qe_status="OutOfDate"),
            "TDX_QE_STATUS",
            (status,),
            "a quoting enclave with known weaknesses",
        ),
        *(
            (f"{TCB}: tcbStatus", f"platform-{s}", C(tcb_status=s), status, (), f"{s} is not UpToDate")
            for s in (
                "SWHardeningNeeded",
                "ConfigurationNeeded",
                "ConfigurationAndSWHardeningNeeded",
                "OutOfDate",
                "OutOfDateConfigurationNeeded",
            )
        ),
        (
            f"{TCB}: tcbStatus",
            "platform-status-nobody-knows",
            C(tcb_status="Splendid"),
            "TDX_SIGNATURE_LAYER",
            (),
            "a word that nobody defined",
        ),
    ]
    for book.clause, name, spec, code, also, why in rows:
        book.refuse(name, "v4", code, why, also=also, collateral=collateral(spec))
    book.clause = f"{TCB}: tcbEvaluationDataNumber"
    book.refuse(
        "floor-above-the-collateral",
        "v4",
        "TDX_TCB_EVALUATION",
        "the relying party asks for more",
        min_tcb_evaluation=21,
    )
    book.clause = f"{TCB}: nextUpdate"
    book.refuse(
        "judged-a-year-later",
        "v4",
        "TDX_COLLATERAL_TIME",
        "everything has its time",
        also=("TDX_COLLATERAL_AGE", "TDX_CRL"),
        at=NOW + 365 * DAY,
    )
    book.refuse("judged-a-year-before", "v4", "TDX_COLLATERAL_TIME", "everything has its time", at=NOW - 365 * DAY)


def _signers(book: Book) -> None:
    role = "TDX_COLLATERAL_ROLE"
    book.clause = f"{PCK}: TCB signing certificate (CVE-2026-22696)"
    book.refuse(
        "tcb-info-signed-by-a-pck",
        "v4",
        role,
        "one extracted PCK key blesses its own platform",
        collateral=collateral(C(tcb_signer="intel-pck")),
    )
    book.refuse(
        "qe-identity-signed-by-a-pck",
        "v4",
        role,
        "one extracted PCK key blesses another enclave",
        collateral=collateral(C(qe_signer="intel-pck")),
    )
    sgx = (x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_EXTENSION), b"\x30\x00"), False)
    right = "Intel SGX TCB Signing"
    subjects: list[tuple[str, x509.Name, dict[str, Any], str]] = [
        ("another-name", named("Intel SGX TCB Signing 2", INTEL), {}, "another role under the same root"),
        ("the-name-of-a-pck", named("Intel SGX PCK Certificate", INTEL), {}, "a platform's name"),
        ("another-organisation", named(right, "Intel Corp"), {}, "another organisation"),
        ("two-organisations", named(right, INTEL, INTEL), {}, "which of two names counts would be up to the reader"),
        ("no-organisation", named(right), {}, "no organisation"),
        ("a-platform-extension", named(right, INTEL), {"extra": [sgx]}, "the SGX extension makes it a platform"),
    ]
    for name, subject, how, why in subjects:
        book.refuse(f"collateral-signer-with-{name}", "v4", role, why, collateral=signed_by(subject, **how))
    book.accept(
        "collateral-signer-renewed",
        "v4",
        "the role counts, not the certificate",
        collateral=signed_by(named(right, INTEL)),
    )
    book.clause = "RFC 5280 §4.1.2.5, validity"
    for name, when in (("expired", {"not_after": utc(NOW - DAY)}), ("of-the-future", {"not_before": utc(NOW + DAY)})):
        told = signed_by(named(right, INTEL), **when)
        book.refuse(
            f"collateral-signer-{name}", "v4", "TDX_CERTIFICATE_TIME", "everything has its time", collateral=told
        )
    foreign = json.loads(stranger().collateral(NOW, C(fmspc=tee().pki.facts.fmspc)))
    book.clause = f"{PCK}: chain of the collateral"
    book.refuse(
        "collateral-of-a-stranger",
        "v4",
        "TDX_COLLATERAL_CHAIN",
        "every chain ends in a root that nobody pinned",
        also=("TDX_COLLATERAL_ROLE", "TDX_CRL"),
        collateral=foreign,
    )
    book.clause = f"{PCK}: CRL issuer"
    true = honest()["collateral"]
    signer, root, ca = (tee().pki[r].cert for r in ("intel-tcb-signing", "intel-root", "intel-platform-ca"))
    for name, chain, why in (
        ("the-tcb-signer", [signer, root], "a CRL by a key that issues no platforms"),
        ("no-root", [ca], "a chain that ends nowhere"),
        ("the-root-alone", [root], "the root issues no platforms"),
    ):
        book.refuse(
            f"pck-crl-issuer-is-{name}",
            "v4",
            role,
            why,
            collateral=true | {"pck_crl_issuer_chain": pem(chain).decode()},
        )
    book.clause = f"{CRL}; {PCK}: CRL"
    other = json.loads(stranger().collateral(NOW))
    for name, changed, why in (
        (
            "crls-exchanged",
            {"root_ca_crl": true["pck_crl"], "pck_crl": true["root_ca_crl"]},
            "each list in the other's place",
        ),
        ("pck-crl-of-a-stranger", {"pck_crl": other["pck_crl"]}, "a list that names nobody here"),
        ("root-crl-of-a-stranger", {"root_ca_crl": other["root_ca_crl"]}, "a list that names nobody here"),
        ("pck-crl-of-the-root", {"pck_crl": true["root_ca_crl"]}, "the root's list instead of the platforms'"),
    ):
        book.refuse(name, "v4", "TDX_CRL", why, collateral=true | changed)
    book.clause = "RA-TLS profile: the PCK chain stands in the quote"
    wrong = QuoteForm(chain=("intel-tcb-signing", "intel-platform-ca", "intel-root"))
    book.refuse(
        "pck-chain-beside-the-quote",
        "v4",
        "TDX_PCK_ROLE",
        "a chain stapled to the collateral replaces the quote's own",
        also=("TDX_FMSPC", "TDX_PCE_ID", "TDX_PCK_CHAIN", "TDX_QE_SIGNATURE"),
        quote=b64(quote(wrong)),
        collateral=collateral(C(pck_chain=True)),
    )


def _edited(book: Book) -> None:
    """Signed texts changed afterwards."""
    true = honest()["collateral"]
    signature = "TDX_COLLATERAL_SIGNATURE"
    book.clause = f"{PCS}: signature over the exact text"
    for name, member, old, new, why in (
        ("tcb-info-status-edited", "tcb_info", '"OutOfDate"', '"UpToDate"', "an old level made current"),
        (
            "tcb-info-evaluation-edited",
            "tcb_info",
            '"tcbEvaluationDataNumber":20',
            '"tcbEvaluationDataNumber":21',
            "old collateral made newer",
        ),
        ("qe-identity-level-edited", "qe_identity", '"isvsvn":1', '"isvsvn":0', "a level lowered"),
        (
            "qe-identity-mask-edited",
            "qe_identity",
            '"miscselectMask":"FFFFFFFF"',
            '"miscselectMask":"00000000"',
            "a mask that compares nothing",
        ),
    ):
        book.refuse(name, "v4", signature, why, collateral=true | {member: true[member].replace(old, new)})
    book.refuse(
        "tcb-info-with-a-blank",
        "v4",
        signature,
        "another spelling of the same values",
        collateral=true | {"tcb_info": true["tcb_info"].replace(":", ": ", 1)},
    )
    for member in ("tcb_info_signature", "qe_identity_signature"):
        name = member.replace("_", "-")
        book.refuse(
            f"{name}-of-zeros", "v4", signature, "r = s = 0 (CVE-2022-21449)", collateral=true | {member: "00" * 64}
        )
    twice = true["tcb_info"][:-1] + ',"tcbType":0}'
    book.refuse(
        "tcb-info-member-twice",
        "v4",
        signature,
        "which of two counts would be up to the reader",
        also=("TDX_SIGNATURE_LAYER",),
        collateral=true | {"tcb_info": twice},
    )
    exchanged = {
        "tcb_info_signature": true["qe_identity_signature"],
        "qe_identity_signature": true["tcb_info_signature"],
    }
    book.refuse(
        "signatures-exchanged", "v4", signature, "each signature over the other's text", collateral=true | exchanged
    )
