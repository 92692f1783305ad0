"""The signature layer: dcap-qvl, exactly pinned, called once; its one sentence of refusal turned into a stable check.

The library stops at the first thing it dislikes and says so in English. Here that sentence becomes a check id and a
code; what it did not get to is judged again by our own code where that is cheap (quote signature, QE binding, QE
signature, chains, dates, FMSPC), otherwise recorded as skipped with the reason. A sentence we do not know refuses as
`TDX_SIGNATURE_LAYER`: no text of the library can turn into a pass.

Pure. Trusts the root it is given, and the library for signatures, CRLs and TCB matching.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import dcap_qvl  # type: ignore[import-untyped]  # ships stubs without py.typed; claims are checked by us

from attestation.errors import FormatError
from attestation.result import Checks
from attestation.tdx.certificates import certificate_key, issued_by, pck_extension, read_certificate, signature_holds
from attestation.tdx.collateral import Collateral
from attestation.tdx.pem import write_chain
from attestation.tdx.quote import Quote

__all__ = ["verify_signatures"]


@dataclass(frozen=True, slots=True)
class _Stage:
    id: str
    code: str
    reason: str
    cite: str


_DCAP: Final = "Intel TDX DCAP Quote Verification"
_CHAIN: Final = "Intel SGX PCK Certificate and CRL Profile Specification"
_TCB: Final = "Intel PCS API v4: TCB Info V3"
_ABI: Final = "Intel TDX Module ABI Reference"
_STAGES: Final = tuple(
    _Stage(f"tdx.{name}", f"TDX_{code}", reason, cite)
    for name, code, reason, cite in (
        ("collateral-chain", "COLLATERAL_CHAIN", "signers of TCB info and QE identity chain to the root", _CHAIN),
        ("collateral-signature", "COLLATERAL_SIGNATURE", "TCB info and QE identity are the signed text", _TCB),
        ("collateral-time", "COLLATERAL_TIME", "issueDate <= now <= nextUpdate of TCB info and QE identity", _TCB),
        ("certificate-time", "CERTIFICATE_TIME", "every certificate is valid now", "RFC 5280 §6.1.3"),
        ("crl", "CRL", "CRLs are signed by their issuers, current, and cover every certificate", "RFC 5280 §6.3"),
        ("revocation", "REVOKED", "no certificate is revoked", "RFC 5280 §6.3"),
        ("pck-chain", "PCK_CHAIN", "the PCK certificate in the quote chains to the root", _CHAIN),
        ("qe-signature", "QE_SIGNATURE", "the PCK key signed the QE report", f"{_DCAP}: QE report"),
        ("qe-binding", "QE_BINDING", "the QE report holds the attestation key's hash", f"{_DCAP}: QE report data"),
        ("qe-identity", "QE_IDENTITY", "the quoting enclave is Intel's", f"{_DCAP}: QE identity"),
        ("quote-signature", "QUOTE_SIGNATURE", "the attestation key signed header and TD report", f"{_DCAP}: quote"),
        ("fmspc", "FMSPC", "TCB info is for this platform's FMSPC", f"{_TCB}: fmspc"),
        ("collateral-kind", "COLLATERAL_KIND", "TCB info is TDX v3, QE identity is TD_QE", f"{_TCB}: id, version"),
        ("module-identity", "MODULE", "the TDX module is one that Intel names", f"{_TCB}: tdxModuleIdentities"),
        ("tcb-level", "TCB_LEVEL", "a TCB level of Intel covers this platform", f"{_TCB}: tcbLevels"),
        ("td-safety", "ATTRIBUTES", "no debug, profiling, migration, reserved bit; SEPT_VE_DISABLE set",
         f"{_ABI}: TDATTRIBUTES"),
        ("service-td", "SERVICE_TD", "no service TD is bound", f"{_ABI}: MRSERVICETD"),
    )
)  # fmt: skip
_IDS: Final = frozenset(stage.id for stage in _STAGES)

_SENTENCES: Final = (
    # part of the library's text, id of the stage, code when it is another than the stage's; the first that fits counts
    ("CertRevoked", "tdx.revocation", ""),
    ("QE report validation failed", "tdx.qe-identity", ""),
    ("in QE Identity", "tdx.qe-identity", ""),
    ("in TDX module identity", "tdx.module-identity", ""),
    ("status is invalid: Revoked", "tdx.tcb-level", "TDX_TCB_REVOKED"),
    ("UnknownRevocationStatus", "tdx.crl", ""),
    ("CrlExpired", "tdx.crl", ""),
    ("revocation list", "tdx.crl", ""),
    ("Crl", "tdx.crl", ""),
    ("CRL", "tdx.crl", ""),
    ("CertExpired", "tdx.certificate-time", ""),
    ("CertNotValidYet", "tdx.certificate-time", ""),
    ("tcb_info in quote_collateral", "tdx.collateral-signature", ""),
    ("qe_identity in quote_collateral", "tdx.collateral-signature", ""),
    ("TCBInfo expired", "tdx.collateral-time", ""),
    ("TCBInfo issue date is in the future", "tdx.collateral-time", ""),
    ("QE Identity expired", "tdx.collateral-time", ""),
    ("QE Identity issue date is in the future", "tdx.collateral-time", ""),
    ("Collateral expired", "tdx.collateral-time", ""),
    ("TCB Info leaf certificate", "tdx.collateral-chain", ""),
    ("QE Identity leaf certificate", "tdx.collateral-chain", ""),
    ("too short for TCB Info", "tdx.collateral-chain", ""),
    ("too short for QE Identity", "tdx.collateral-chain", ""),
    ("Signature is invalid for qe_report", "tdx.qe-signature", ""),
    ("QE report hash mismatch", "tdx.qe-binding", ""),
    ("QE auth data", "tdx.qe-binding", ""),
    ("report signature is invalid", "tdx.quote-signature", ""),
    ("Fmspc mismatch", "tdx.fmspc", ""),
    ("FMSPC", "tdx.fmspc", ""),
    ("Failed to find Fmspc", "tdx.pck-chain", ""),
    ("TCB info in the collateral", "tdx.collateral-kind", ""),
    ("Unsupported QE Identity", "tdx.collateral-kind", ""),
    ("QE Identity id", "tdx.collateral-kind", ""),
    ("No matching TCB level", "tdx.tcb-level", ""),
    ("component count mismatch", "tdx.tcb-level", ""),
    ("No TCB levels found in QE Identity", "tdx.qe-identity", ""),
    ("TDX module", "tdx.module-identity", ""),
    ("tdxModule", "tdx.module-identity", ""),
    ("QE MRSIGNER", "tdx.qe-identity", ""),
    ("QE ISV", "tdx.qe-identity", ""),
    ("QE ATTRIBUTES", "tdx.qe-identity", ""),
    ("QE MISCSELECT", "tdx.qe-identity", ""),
    ("QE vendor", "tdx.qe-identity", ""),
    ("QE TCB", "tdx.qe-identity", ""),
    ("SEPT_VE_DISABLE", "tdx.td-safety", ""),
    ("SERVTD_EXT", "tdx.td-safety", ""),
    ("TD profiling", "tdx.td-safety", ""),
    ("TD migration", "tdx.td-safety", ""),
    ("ebug", "tdx.td-safety", ""),
    ("Reserved bits in TD attributes", "tdx.td-safety", ""),
    ("MR service TD", "tdx.service-td", ""),
    ("mr service td", "tdx.service-td", ""),
    ("PCK cert", "tdx.pck-chain", ""),
    ("certificate chain", "tdx.pck-chain", ""),
    ("Certificate chain", "tdx.pck-chain", ""),
    ("Intel extension", "tdx.pck-chain", ""),
)

_UNSAFE: Final = {
    0: "DEBUG", 4: "profiling", 5: "profiling", 6: "profiling", 17: "SERVTD_EXT", 29: "MIGRATABLE",
} | dict.fromkeys([*range(1, 4), *range(7, 16), *range(23, 27), *range(32, 62)], "reserved bit")  # fmt: skip
_UNSAFE_MASK: Final = sum(1 << bit for bit in _UNSAFE)
_SEPT_VE_DISABLE: Final = 1 << 28


def verify_signatures(
    quote: Quote, collateral: Collateral, *, root: bytes, now: int, checks: Checks
) -> dict[str, Any] | None:  # Any: the library's claims, JSON; every value is checked where it is used
    """Run the library at *now* (unix seconds) under *root* (DER); record one check per stage.

    Returns the library's claims, or None when it refused or one of our own checks on the same question did."""
    claims, refusal = _call(quote, collateral, root, now)
    failed, code = _stage_of(refusal, quote, collateral, root) if refusal is not None else ("", "")
    own = _own_view(quote, collateral, now)
    if refusal is not None:
        own |= _second_look(quote, collateral, root)
    good = True
    for stage in _STAGES:
        expected, ok, actual = own.get(stage.id, ("", None, ""))
        if stage.id == failed:
            checks.require(stage.id, False, code=code or stage.code, reason=f"{stage.reason}: {refusal}",
                           expected=expected, actual=actual or refusal, cite=stage.cite)  # fmt: skip
            good = False
        elif ok is not None or refusal is None:
            good &= checks.require(stage.id, ok is not False, code=stage.code, reason=stage.reason, expected=expected,
                                   actual=actual, cite=stage.cite)  # fmt: skip
        else:
            checks.skip(stage.id, f"not judged: verification stopped at {failed}", cite=stage.cite)
    if refusal is not None and failed not in _IDS:
        checks.require("tdx.signature-layer", False, code="TDX_SIGNATURE_LAYER", reason="dcap-qvl refused the quote",
                       actual=refusal, cite=_DCAP)  # fmt: skip
    return claims if good else None  # none when the library refused


def _call(quote: Quote, collateral: Collateral, root: bytes, now: int) -> tuple[dict[str, Any] | None, str | None]:
    """The library's claims, or the sentence with which it refused."""
    try:
        given = dcap_qvl.QuoteCollateralV3(
            pck_crl_issuer_chain="",  # not used for verification; checked by us
            root_ca_crl=collateral.root_ca_crl,
            pck_crl=collateral.pck_crl,
            tcb_info_issuer_chain=_pem(collateral.tcb_info_issuer_chain),
            tcb_info=collateral.tcb_info_text,
            tcb_info_signature=collateral.tcb_info_signature,
            qe_identity_issuer_chain=_pem(collateral.qe_identity_issuer_chain),
            qe_identity=collateral.qe_identity_text,
            qe_identity_signature=collateral.qe_identity_signature,
        )
        verifier = dcap_qvl.QuoteVerifier(root_ca_der=root)
        policy = dcap_qvl.QuotePolicy.claims_only(now)
        try:
            claims = json.loads(verifier.verify_with_policy(quote.raw, given, now, policy).to_json())
        except ValueError as err:
            return None, _full_sentence(quote, given, root, now) or _sentence(err)
    except (ValueError, OverflowError) as err:
        return None, _sentence(err)
    return (claims, None) if isinstance(claims, dict) else (None, "claims are not an object")


def _full_sentence(quote: Quote, given: Any, root: bytes, now: int) -> str:  # Any: the library ships no types
    """The older call says the same with its cause, which `verify_with_policy` leaves out. Empty when it accepts."""
    try:
        dcap_qvl.verify_with_root_ca(quote.raw, given, root, now)
    except ValueError as err:
        return _sentence(err)
    return ""


def _sentence(err: Exception) -> str:
    return " ".join(str(err).split()).removeprefix("Verification failed: ") or "no reason given"


def _pem(chain: tuple[bytes, ...]) -> str:
    return write_chain(chain).decode("ascii")


def _stage_of(refusal: str, quote: Quote, collateral: Collateral, root: bytes) -> tuple[str, str]:
    """Which stage a sentence belongs to; empty when it is not known."""
    for part, stage, code in _SENTENCES:
        if part in refusal:
            if stage == "tdx.pck-chain" and "chain" in refusal and _chained(quote.pck_chain, root):
                return "tdx.collateral-chain", ""  # the library does not say which chain it means
            return stage, code
    return "", ""


def _chained(chain: tuple[bytes, ...], root: bytes) -> bool:
    return chain[-1] == root and all(issued_by(a, b) for a, b in pairwise(chain))


_View = dict[str, tuple[object, bool | None, object]]
"""Stage id → expected, our own answer (None: no opinion), actual."""


def _own_view(quote: Quote, collateral: Collateral, now: int) -> _View:
    """Questions that our own code answers beside the library, each time."""
    tcb, qe = collateral.tcb_info, collateral.qe_identity
    bits = quote.body.td_attributes
    unsafe = [_UNSAFE[b] + f" ({b})" for b in sorted(_UNSAFE) if bits >> b & 1]
    if not bits & _SEPT_VE_DISABLE:
        unsafe.append("SEPT_VE_DISABLE not set")
    bound = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    in_time = all(v.issue_date <= now <= v.next_update for v in (tcb, qe))
    service = (quote.body.mrservicetd, quote.body.init_servtd_hash, quote.body.servtd_hash)
    return {
        "tdx.qe-binding": (bound, quote.qe_report.report_data[:32] == bound, quote.qe_report.report_data[:32]),
        "tdx.collateral-time": (
            f"{max(tcb.issue_date, qe.issue_date)} <= now <= {min(tcb.next_update, qe.next_update)}", in_time, now,
        ),
        "tdx.collateral-kind": (
            "TDX 3, TD_QE 2", (tcb.id, tcb.version, qe.id) == ("TDX", 3, "TD_QE"),
            f"{tcb.id} {tcb.version}, {qe.id} {qe.version}",
        ),
        "tdx.td-safety": ("", not unsafe, ", ".join(unsafe)),
        "tdx.service-td": (
            "zero", not any(any(s) for s in service if s is not None),
            quote.body.mrservicetd if quote.body.mrservicetd is not None else "no such field in TD report 1.0",
        ),
        "tdx.fmspc": _fmspc(quote, collateral),
    }  # fmt: skip


def _fmspc(quote: Quote, collateral: Collateral) -> tuple[object, bool | None, object]:
    try:
        sgx = read_certificate(quote.pck_chain[0]).sgx
        found = pck_extension(sgx).fmspc if sgx is not None else b""
    except FormatError:
        return collateral.tcb_info.fmspc, False, "unreadable"
    return collateral.tcb_info.fmspc, found == collateral.tcb_info.fmspc, found


def _second_look(quote: Quote, collateral: Collateral, root: bytes) -> _View:
    """After a refusal: signatures that the library may not have come to, so that a result names all that is wrong."""
    pck_key = certificate_key(quote.pck_chain[0])
    tcb_chain, qe_chain = collateral.tcb_info_issuer_chain, collateral.qe_identity_issuer_chain
    tcb_key, qe_key = certificate_key(tcb_chain[0]), certificate_key(qe_chain[0])
    chains = _chained(tcb_chain, root) and _chained(qe_chain, root)
    texts = (
        tcb_key is not None
        and signature_holds(tcb_key, collateral.tcb_info_signature, collateral.tcb_info_text.encode())
        and qe_key is not None
        and signature_holds(qe_key, collateral.qe_identity_signature, collateral.qe_identity_text.encode())
    )
    qe_signed = pck_key is not None and signature_holds(pck_key, quote.qe_report_signature, quote.qe_report.raw)
    return {
        "tdx.quote-signature": ("", signature_holds(quote.attestation_key, quote.signature, quote.signed), ""),
        "tdx.qe-signature": ("", qe_signed, ""),
        "tdx.pck-chain": ("", _chained(quote.pck_chain, root), ""),
        "tdx.collateral-chain": ("", chains, ""),
        "tdx.collateral-signature": ("", texts, ""),
    }
