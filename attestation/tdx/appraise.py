"""Appraisal of a TDX quote against collateral, policy and reference values: the checklist of the TDX facts, §5.

    (1)  form of the quote: `Quote.parse`, done by the caller before
    (2)  roles: collateral signed by "Intel SGX TCB Signing" directly under the pinned root; PCK by a PCK CA
    (3)  signatures, CRLs, QE identity, TCB matching: `signature.verify_signatures`
    (4)  pceId, tcbType
    (5)  floor of the TCB evaluation data number
    (6)  age of TCB info and QE identity; CRL numbers never decrease
    (7)  status of platform and QE, advisories
    (8)  TDATTRIBUTES, whole value
    (9)  XFAM, whole value
    (10) MRSIGNERSEAM and SEAMATTRIBUTES zero
    (11) MRSEAM
    (12) MRTD, RTMR0 to 2 (RTMR3 by replay, done by the caller)
    (13) MRCONFIGID, MROWNER, MROWNERCONFIG
    (14) MRSERVICETD zero: stage `tdx.service-td` of (3)
    (15) REPORTDATA: by the caller, who knows what it must bind
    (16) platform allow list

Every item is recorded, whatever failed before it: a refusal names all that is wrong. When (3) failed, what later items
say about the quote's values is about bytes nobody signed; the verdict is refused anyway.

Pure: time is an argument. Trusts the root it is given, the policy, the reference values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from attestation.errors import FormatError
from attestation.policy import Skip, TdxPolicy
from attestation.result import Checks
from attestation.tdx.certificates import (
    PLATFORM_CA,
    PckExtension,
    issued_by,
    pck_extension,
    read_certificate,
)
from attestation.tdx.collateral import Collateral
from attestation.tdx.quote import Quote, TdReport
from attestation.tdx.signature import verify_signatures

__all__ = ["CrlNumbers", "Registers", "TdxFacts", "appraise"]

_NEVER: Final = frozenset({"OutOfDateConfigurationNeeded", "Revoked"})
"""Refused under every policy, a skipped status check included."""

_ABI: Final = "Intel TDX Module ABI Reference: TDREPORT_STRUCT"
_ROLE: Final = "Intel SGX PCK Certificate and CRL Profile Specification"
_TCB: Final = "Intel PCS API v4: TCB Info V3"


@dataclass(frozen=True, slots=True)
class Registers:
    """Reference values of a release: allowed MRTD and RTMR0 to 2, 48 bytes each. RTMR3 is checked by replay."""

    mrtd: frozenset[bytes]
    rtmr0: frozenset[bytes]
    rtmr1: frozenset[bytes]
    rtmr2: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class CrlNumbers:
    """Highest CRL numbers seen, by issuer; None for one not seen yet. A client keeps them as its floor."""

    root: int | None = None
    platform: int | None = None
    processor: int | None = None

    def merge(self, other: CrlNumbers) -> CrlNumbers:
        """The higher of both, for each issuer."""

        def top(a: int | None, b: int | None) -> int | None:
            return b if a is None else a if b is None else max(a, b)

        return CrlNumbers(
            top(self.root, other.root), top(self.platform, other.platform), top(self.processor, other.processor)
        )


@dataclass(frozen=True, slots=True)
class TdxFacts:
    """What the signature layer vouches for. Holding one proves that quote and collateral chain to the given root at the
    given time; whether the values are wanted ones is in the checks beside it.

    tcb_status           platform and QE together, Intel's words; `qe_status` the QE alone
    advisories           all that apply, platform and QE
    evaluation           tcbEvaluationDataNumber, the smaller of both
    platform_instance_id 16 bytes, None when a Processor CA issued the certificate
    dynamic_platform, cached_keys, smt_enabled   PCK flags, None when not stated
    latest_issue, earliest_expiration   unix seconds: last beginning and first end of collateral, CRLs, certificates
    """

    report: TdReport
    identity: bytes
    tcb_status: str
    qe_status: str
    advisories: frozenset[str]
    evaluation: int
    tcb_date: int
    fmspc: bytes
    ppid: bytes
    platform_instance_id: bytes | None
    dynamic_platform: bool | None
    cached_keys: bool | None
    smt_enabled: bool | None
    crl: CrlNumbers
    latest_issue: int
    earliest_expiration: int

    @property
    def eval_data_number(self) -> int:
        """Intel's name for `evaluation`."""
        return self.evaluation

    @property
    def piid(self) -> bytes | None:
        """Short name of `platform_instance_id`."""
        return self.platform_instance_id


def appraise(
    quote: Quote,
    collateral: Collateral,
    *,
    policy: TdxPolicy,
    registers: Registers | Skip,
    root: bytes,
    now: int,
    checks: Checks,
    crl_floor: CrlNumbers | None = None,
) -> TdxFacts | None:
    """Walk the list, *root* in DER, *now* in unix seconds; every item goes into *checks*.

    Returns the facts, or None when roles or signatures failed: then nothing about the quote is known."""
    roles = _roles(quote, collateral, root, checks)  # (2)
    claims = verify_signatures(quote, collateral, root=root, now=now, checks=checks)  # (3)
    pck = _pck(quote)
    _collateral(quote, collateral, pck, policy, now, checks)  # (4) (5) (6)
    facts = _facts(quote, collateral, pck, claims, checks) if claims is not None else None
    _dates(facts, now, checks)  # (6)
    _crl_numbers(facts, crl_floor, checks)  # (6)
    _status(facts, policy, checks)  # (7)
    _report(quote.body, policy, checks)  # (8) to (11), (13)
    _registers(quote.body, registers, checks)  # (12)
    _platform(pck, policy, checks)  # (16)
    return facts if roles else None


def _roles(quote: Quote, collateral: Collateral, root: bytes, checks: Checks) -> bool:
    """(2) Who signed what. Names are compared whole; the root as DER, because another root has the same names."""

    def role(der: bytes, wanted: str) -> bool:
        try:
            return bool(getattr(read_certificate(der), wanted))
        except FormatError:
            return False

    def subject(der: bytes) -> str:
        try:
            return " / ".join(read_certificate(der).subject)
        except FormatError:
            return "unreadable"

    good = True
    for name, chain in (
        ("tcb-info", collateral.tcb_info_issuer_chain),
        ("qe-identity", collateral.qe_identity_issuer_chain),
    ):
        good &= checks.require(
            f"tdx.{name}-signer", role(chain[0], "is_tcb_signer") and chain[1:] == (root,), code="TDX_COLLATERAL_ROLE",
            reason="signed by Intel's TCB signer directly under the pinned root",
            expected="Intel SGX TCB Signing / Intel Corporation, under the pinned root",
            actual=f"{subject(chain[0])}, {'directly under' if chain[1:] == (root,) else 'not directly under'} it",
            cite=_ROLE,
        )  # fmt: skip
    leaf, ca, top = quote.pck_chain
    good &= checks.require(
        "tdx.pck-role", role(leaf, "is_pck_leaf") and role(ca, "is_pck_ca"), code="TDX_PCK_ROLE",
        reason="the quote's certificate is a PCK certificate issued by a PCK CA",
        expected="Intel SGX PCK Certificate under Intel SGX PCK Platform or Processor CA",
        actual=f"{subject(leaf)} under {subject(ca)}", cite=_ROLE,
    )  # fmt: skip
    good &= checks.require(
        "tdx.pck-root", top == root, code="TDX_PCK_CHAIN",
        reason="the quote's chain ends in the pinned root, byte for byte", expected="the pinned root",
        actual="the pinned root" if top == root else f"another one, named {subject(top)}", cite=_ROLE,
    )  # fmt: skip
    issuer, above = collateral.pck_crl_issuer_chain[0], collateral.pck_crl_issuer_chain[1:]
    same = issuer == ca or (role(issuer, "is_pck_ca") and subject(issuer) == subject(ca) and issued_by(issuer, root))
    good &= checks.require(
        "tdx.pck-crl-issuer", same and above == (root,), code="TDX_COLLATERAL_ROLE",
        reason="the PCK CRL's issuer chain names the CA of this quote under the pinned root",
        expected=subject(ca), actual=subject(issuer), cite=_ROLE,
    )  # fmt: skip
    return good


def _pck(quote: Quote) -> PckExtension | None:
    try:
        sgx = read_certificate(quote.pck_chain[0]).sgx
        return pck_extension(sgx) if sgx is not None else None
    except FormatError:
        return None


def _collateral(
    quote: Quote, collateral: Collateral, pck: PckExtension | None, policy: TdxPolicy, now: int, checks: Checks
) -> None:
    """(4) to (6): what the library does not compare in the collateral, and how old it may be."""
    tcb, qe = collateral.tcb_info, collateral.qe_identity
    checks.equal("tdx.pce-id", tcb.pce_id, pck.pce_id if pck else b"", code="TDX_PCE_ID",
                 reason="TCB info is for the PCK certificate's PCE-ID", cite=f"{_TCB}: pceId")  # fmt: skip
    checks.equal("tdx.tcb-type", 0, tcb.tcb_type, code="TDX_TCB_TYPE", reason="TCB info compares as type 0",
                 cite=f"{_TCB}: tcbType")  # fmt: skip
    checks.require("tdx.qe-report-data", not any(quote.qe_report.report_data[32:]), code="TDX_QE_REPORT_DATA",
                   reason="the second half of the QE report data is zero", expected=bytes(32),
                   actual=quote.qe_report.report_data[32:], cite="Intel TDX DCAP: QE report data")  # fmt: skip
    floor, age = policy.min_tcb_evaluation, policy.max_collateral_age
    cite = f"{_TCB}: tcbEvaluationDataNumber"
    if isinstance(floor, Skip):
        checks.skip("tdx.tcb-evaluation", floor.why, cite=cite)
    else:
        checks.require("tdx.tcb-evaluation", collateral.evaluation >= floor, code="TDX_TCB_EVALUATION",
                       reason="TCB info and QE identity are not from an older evaluation than the floor",
                       expected=f">= {floor}", actual=f"TCB info {tcb.evaluation}, QE identity {qe.evaluation}",
                       cite=cite)  # fmt: skip
    if isinstance(age, Skip):
        checks.skip("tdx.collateral-age", age.why, cite=f"{_TCB}: issueDate")
    else:
        oldest = min(tcb.issue_date, qe.issue_date)
        checks.require("tdx.collateral-age", now - oldest <= age, code="TDX_COLLATERAL_AGE",
                       reason="TCB info and QE identity were issued not longer ago than allowed",
                       expected=f"<= {age} s", actual=f"{now - oldest} s", cite=f"{_TCB}: issueDate")  # fmt: skip


def _facts(
    quote: Quote, collateral: Collateral, pck: PckExtension | None, claims: dict[str, Any], checks: Checks
) -> TdxFacts | None:
    """The library's claims as facts. What it read and what we read must be the same: two parsers, one meaning."""
    try:
        platform, qe = claims["platform"], claims["qe"]
        theirs = platform["pck"]
        report = claims["report"]
        base = next(iter(report.values()))
        base = base.get("base", base)
        base = base.get("base", base)
        advisories = frozenset(
            [*claims["tcb"]["advisory_ids"], *platform["tcb_level"]["advisoryIDs"], *qe["tcb_level"]["advisoryIDs"],
             *((platform["current_tcb_level"] or {}).get("advisoryIDs") or ())]
        )  # fmt: skip
        issuer = read_certificate(quote.pck_chain[0]).issuer[0]
        pck_number = int(platform["pck_crl_num"])
        root_number = int(platform["root_ca_crl_num"])
        on_platform = issuer == PLATFORM_CA
        facts = TdxFacts(
            report=quote.body,
            identity=quote.identity,
            tcb_status=str(claims["tcb"]["status"]),
            qe_status=str(qe["tcb_level"]["tcbStatus"]),
            advisories=advisories,
            evaluation=collateral.evaluation,
            tcb_date=int(platform["tcb_date_tag"]),
            fmspc=bytes(theirs["fmspc"]),
            ppid=bytes(theirs["ppid"]),
            platform_instance_id=pck.platform_instance_id if pck else None,
            dynamic_platform=pck.dynamic_platform if pck else None,
            cached_keys=pck.cached_keys if pck else None,
            smt_enabled=pck.smt_enabled if pck else None,
            crl=CrlNumbers(root_number, pck_number if on_platform else None, None if on_platform else pck_number),
            latest_issue=max(int(claims["latest_issue_date"]), int(claims["qe_iden_latest_issue_date"])),
            earliest_expiration=min(
                int(claims["earliest_expiration_date"]), int(claims["qe_iden_earliest_expiration_date"])
            ),
        )
        seen = _as_library(quote.body, pck, collateral)
        said = tuple(
            [str(base[k]) for k in _LIBRARY_NAMES]
            + [bytes(theirs["ppid"]).hex(), bytes(theirs["fmspc"]).hex(), str(claims["tcb"]["eval_data_number"])]
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, FormatError) as err:
        checks.require("tdx.readers-agree", False, code="TDX_READERS_DIFFER",
                       reason=f"the library's claims cannot be read: {type(err).__name__}", cite=_ABI)  # fmt: skip
        return None
    same = checks.require(
        "tdx.readers-agree", seen == said, code="TDX_READERS_DIFFER",
        reason="our reader and the library's read the same values", expected=", ".join(said[-3:]),
        actual=", ".join(seen[-3:]), cite=_ABI,
    )  # fmt: skip
    return facts if same else None


_LIBRARY_NAMES: Final = (
    "tee_tcb_svn", "mr_seam", "mr_signer_seam", "seam_attributes", "td_attributes", "xfam", "mr_td", "mr_config_id",
    "mr_owner", "mr_owner_config", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "report_data",
)  # fmt: skip


def _as_library(body: TdReport, pck: PckExtension | None, collateral: Collateral) -> tuple[str, ...]:
    values = (
        body.tee_tcb_svn, body.mrseam, body.mrsignerseam, body.seamattributes, body.td_attributes.to_bytes(8, "little"),
        body.xfam.to_bytes(8, "little"), body.mrtd, body.mrconfigid, body.mrowner, body.mrownerconfig, *body.rtmrs,
        body.report_data, pck.ppid if pck else b"", pck.fmspc if pck else b"",
    )  # fmt: skip
    return (*(v.hex() for v in values), str(collateral.evaluation))


def _dates(facts: TdxFacts | None, now: int, checks: Checks) -> None:
    """(6) The library does not mind a CRL from the future: whoever dates one ahead keeps it alive longer."""
    cite = "RFC 5280 §5.1.2.4, §6.3.3"
    if facts is None:
        checks.skip("tdx.issue-dates", "not judged: the signature layer refused", cite=cite)
        return
    begin, end = facts.latest_issue, facts.earliest_expiration
    checks.require("tdx.issue-dates", begin <= now <= end, code="TDX_ISSUE_DATES",
                   reason="certificates, CRLs and collateral are all issued and none has ended",
                   expected=f"{begin} <= now <= {end}", actual=now, cite=cite)  # fmt: skip


def _crl_numbers(facts: TdxFacts | None, floor: CrlNumbers | None, checks: Checks) -> None:
    """(6) A CRL older than one already seen hides revocations, though its own dates may still hold."""
    cite = "RFC 5280 §5.2.3"
    if floor is None:
        checks.skip("tdx.crl-number", "no CRL numbers seen earlier were given", cite=cite)
        return
    if facts is None:
        checks.skip("tdx.crl-number", "not judged: the signature layer refused", cite=cite)
        return
    now = facts.crl
    pairs = (("root", floor.root, now.root), ("platform", floor.platform, now.platform),
             ("processor", floor.processor, now.processor))  # fmt: skip
    older = [f"{n} CRL {b} < {a}" for n, a, b in pairs if a is not None and b is not None and b < a]
    checks.require("tdx.crl-number", not older, code="TDX_CRL_ROLLBACK", reason="no CRL is older than one seen before",
                   expected=", ".join(f"{n} >= {a}" for n, a, _ in pairs if a is not None),
                   actual=", ".join(f"{n} {b}" for n, _, b in pairs if b is not None), cite=cite)  # fmt: skip


def _status(facts: TdxFacts | None, policy: TdxPolicy, checks: Checks) -> None:
    """(7) Status of the platform (with QE and module folded in by Intel's rules), of the QE alone, and advisories."""
    cite = f"{_TCB}: tcbStatus"
    if facts is None:
        for id in ("tdx.tcb-status", "tdx.qe-status", "tdx.advisories"):
            checks.skip(id, "not judged: the signature layer refused", cite=cite)
        return
    allowed = policy.tcb_status
    for id, code, actual in (
        ("tdx.tcb-status", "TDX_TCB_STATUS", facts.tcb_status),
        ("tdx.qe-status", "TDX_QE_STATUS", facts.qe_status),
    ):
        if isinstance(allowed, Skip) and actual not in _NEVER:
            checks.skip(id, f"{allowed.why} (status is {actual})", cite=cite)
            continue
        wanted = frozenset({"anything but " + " or ".join(sorted(_NEVER))}) if isinstance(allowed, Skip) else allowed
        checks.require(id, actual in wanted and actual not in _NEVER, code=code, reason="the status is an allowed one",
                       expected=wanted, actual=actual, cite=cite)  # fmt: skip
    if isinstance(policy.advisories, Skip):
        checks.skip("tdx.advisories", policy.advisories.why, cite=f"{_TCB}: advisoryIDs")
    else:
        extra = facts.advisories - policy.advisories
        checks.require("tdx.advisories", not extra, code="TDX_ADVISORY",
                       reason="every advisory that applies is allowed", expected=policy.advisories or "none",
                       actual=facts.advisories or "none", cite=f"{_TCB}: advisoryIDs")  # fmt: skip


def _member(
    checks: Checks, id: str, code: str, reason: str, allowed: frozenset[Any] | Skip, actual: Any
) -> None:  # Any: int or bytes
    """Record whether *actual* is one of *allowed*; a skip carries its reason."""
    if isinstance(allowed, Skip):
        checks.skip(id, allowed.why, cite=_ABI)
        return

    def text(value: int | bytes) -> str:
        return f"0x{value:x}" if isinstance(value, int) else value.hex()

    checks.require(id, actual in allowed, code=code, reason=reason, expected=frozenset(text(v) for v in allowed),
                   actual=text(actual), cite=_ABI)  # fmt: skip


def _one(value: bytes | Skip) -> frozenset[bytes] | Skip:
    return value if isinstance(value, Skip) else frozenset({value})


def _report(body: TdReport, policy: TdxPolicy, checks: Checks) -> None:
    """(8) to (11) and (13): values of the TD report that policy names."""
    zero48 = frozenset({bytes(48)})
    rows: Iterable[tuple[str, str, str, frozenset[Any] | Skip, int | bytes]] = (
        ("td-attributes", "ATTRIBUTES", "TDATTRIBUTES is an allowed value, all 64 bits", policy.td_attributes,
         body.td_attributes),
        ("xfam", "XFAM", "XFAM is an allowed value, all 64 bits", policy.xfam, body.xfam),
        ("mrsignerseam", "MRSIGNERSEAM", "the TDX module is Intel's own build (zero)", zero48, body.mrsignerseam),
        ("seamattributes", "SEAMATTRIBUTES", "the TDX module is a production build (zero)", frozenset({bytes(8)}),
         body.seamattributes),
        ("mrseam", "MRSEAM", "the TDX module is one of the allowed releases", policy.mrseam, body.mrseam),
        ("mrconfigid", "MRCONFIGID", "MRCONFIGID is the expected value", _one(policy.mrconfigid), body.mrconfigid),
        ("mrowner", "MROWNER", "MROWNER is the expected value", _one(policy.mrowner), body.mrowner),
        ("mrownerconfig", "MROWNERCONFIG", "MROWNERCONFIG is the expected value", _one(policy.mrownerconfig),
         body.mrownerconfig),
    )  # fmt: skip
    for name, code, reason, allowed, actual in rows:
        _member(checks, f"tdx.{name}", f"TDX_{code}", reason, allowed, actual)


def _registers(body: TdReport, registers: Registers | Skip, checks: Checks) -> None:
    """(12) Firmware, kernel and command line are those of a release."""
    for name, actual in (("mrtd", body.mrtd), *((f"rtmr{i}", body.rtmrs[i]) for i in range(3))):
        allowed = registers if isinstance(registers, Skip) else getattr(registers, name)
        _member(checks, f"tdx.{name}", f"TDX_{name.upper()}", f"{name.upper()} is that of the release", allowed, actual)


def _platform(pck: PckExtension | None, policy: TdxPolicy, checks: Checks) -> None:
    """(16) One of the operator's own machines, by platform instance id or PPID."""
    if isinstance(policy.platforms, Skip):
        checks.skip("tdx.platform", policy.platforms.why, cite=_ROLE)
        return
    ids = [i for i in (pck.platform_instance_id, pck.ppid) if i is not None] if pck else []
    checks.require("tdx.platform", any(i in policy.platforms for i in ids), code="TDX_PLATFORM",
                   reason="the machine is an allowed one", expected=policy.platforms, actual=ids,
                   cite=_ROLE)  # fmt: skip
