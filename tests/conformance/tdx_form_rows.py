"""Collateral that has another form than `QuoteCollateralV3`."""

from __future__ import annotations

import json

from tests.attestation.tdx.dev import tee
from tests.conformance.book import Book, b64
from tests.conformance.tdx_machine import honest
from tests.devtee.pki import pem

__all__ = ["form_rows"]

PCS = "Intel PCS API v4"


def form_rows(book: Book) -> None:
    """All rows about its form; the control is `v4`."""
    book.clause = f"{PCS}; QuoteCollateralV3, one spelling"
    true = honest()["collateral"]
    form, chain, signed = "FORMAT_TDX_COLLATERAL", "FORMAT_TDX_COLLATERAL_CHAIN", "TDX_COLLATERAL_SIGNATURE"
    also = {
        "issuer-chain-with-no-certificate-inside": ("TDX_COLLATERAL_ROLE", signed),
        "tcb-info-without-levels": ("TDX_SIGNATURE_LAYER",),
    }

    def inner(member: str, **change: object) -> dict[str, str]:
        edited = json.dumps(json.loads(true[member]) | change, separators=(",", ":"))
        return {**true, member: edited}

    for member in true:
        name = member.replace("_", "-")
        book.refuse(
            f"collateral-without-{name}",
            "v4",
            form,
            "every member is needed",
            collateral={k: v for k, v in true.items() if k != member},
        )
    for name, changed, code, why in (
        (
            "collateral-member-nobody-knows",
            true | {"extra": ""},
            form,
            "an unknown member may change the meaning of known ones",
        ),
        ("collateral-member-a-number", true | {"tcb_info": 1}, form, "text and nothing else"),
        ("crl-hex-in-upper-case", true | {"root_ca_crl": true["root_ca_crl"].upper()}, form, "a second spelling"),
        ("crl-half-a-byte", true | {"pck_crl": true["pck_crl"] + "0"}, form, "not whole bytes"),
        ("crl-empty", true | {"pck_crl": ""}, form, "no list is no good news"),
        (
            "signature-short",
            true | {"tcb_info_signature": true["tcb_info_signature"][:-2]},
            form,
            "64 bytes and no fewer",
        ),
        ("issuer-chain-no-pem", true | {"tcb_info_issuer_chain": "hello"}, chain, "no certificate"),
        ("issuer-chain-empty", true | {"qe_identity_issuer_chain": ""}, chain, "no certificate"),
        (
            "issuer-chain-with-text-before",
            true | {"tcb_info_issuer_chain": "x" + true["tcb_info_issuer_chain"]},
            chain,
            "bytes that nobody accounts for",
        ),
        (
            "issuer-chain-with-no-certificate-inside",
            true | {"tcb_info_issuer_chain": _pem(b"\x30\x00") + pem([tee().pki["intel-root"].cert]).decode()},
            "TDX_COLLATERAL_CHAIN",
            "PEM that holds something else",
        ),
        (
            "tcb-info-without-levels",
            inner("tcb_info", tcbLevels=None),
            signed,
            "a member that the matching needs",
        ),
        (
            "issuer-chain-of-ten",
            true | {"pck_crl_issuer_chain": true["pck_crl_issuer_chain"] * 5},
            chain,
            "numbers are capped",
        ),
        (
            "qe-identity-not-ascii",
            true | {"qe_identity": true["qe_identity"].replace("TD_QE", "TD_QÉ")},
            form,
            "text in two encodings",
        ),
        ("tcb-info-no-json", true | {"tcb_info": "{"}, form, "not JSON"),
        ("tcb-info-a-list", true | {"tcb_info": "[]"}, form, "not an object"),
        (
            "evaluation-number-true",
            inner("tcb_info", tcbEvaluationDataNumber=True),
            form,
            "true counts as 1 in some languages",
        ),
        (
            "evaluation-number-negative",
            inner("qe_identity", tcbEvaluationDataNumber=-1),
            form,
            "below every floor, above some",
        ),
        ("fmspc-of-one-byte", inner("tcb_info", fmspc="00"), form, "six bytes"),
        ("date-without-zone", inner("tcb_info", issueDate="2026-10-08T00:09:46"), form, "whose midnight?"),
        ("date-that-is-none", inner("tcb_info", nextUpdate="2026-02-30T00:00:00Z"), form, "no such day"),
        ("tcb-type-text", inner("tcb_info", tcbType="0"), form, "a number written as text"),
    ):
        book.refuse(name, "v4", code, why, also=also.get(name, ()), collateral=changed)


def _pem(raw: bytes) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{b64(raw)}\n-----END CERTIFICATE-----\n"
