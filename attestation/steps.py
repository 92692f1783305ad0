"""Steps (1) to (6) of the verifier, one function each, numbered as in `attestation.verifier`.

Each writes into the book of checks and returns what later steps need. None ends without a check: where there are no
bytes left to look at, what was found wrong with them stands in the book. Pure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

from attestation import binding
from attestation.claims import Claims
from attestation.deployment import DeploymentStatement, SerialFloor, StatusList
from attestation.endorsements import Endorsements
from attestation.errors import FormatError
from attestation.evidence import Evidence
from attestation.exceptions import admit, confine
from attestation.gpu import GpuEndorsements, GpuFacts
from attestation.gpu import appraise as appraise_gpu
from attestation.gpu import decode as decode_gpu
from attestation.keyset import Keyset
from attestation.policy import Policy, Skip
from attestation.ratls import Leaf
from attestation.reference_values import ReleaseManifest
from attestation.result import Checks
from attestation.statements import Identified, UrlStatus, appraise_deployment, appraise_release, appraise_status
from attestation.tdx import (
    Collateral,
    CrlNumbers,
    Quote,
    Registers,
    TdxFacts,
    appraise_event_log,
    parse_event_log,
    rtmr3_items,
)
from attestation.tdx import appraise as appraise_tdx

__all__ = ["DCAP", "RATLS", "Found", "Seen", "appraise_devices", "appraise_quote", "walk"]

RATLS: Final = "vouchsafe RA-TLS profile, §3"
_CCEL: Final = "TCG PC Client Platform Firmware Profile §10"
DCAP: Final = "Intel TDX DCAP quote format; Intel PCS API v4"
_MAX_NONCE_AGE: Final = 600
_KEYSET_DRAIN: Final = 3600


@dataclass(frozen=True, slots=True)
class Found:
    """What the steps established on the way, for claims and for the end of the verdict's life.

    ends   unix seconds: when each thing the verdict rests on ends
    """

    leaf: Leaf
    claims: Claims
    tdx: TdxFacts | None
    gpu: GpuFacts | None
    release: ReleaseManifest | None
    statement: DeploymentStatement | None
    status: StatusList | None
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the caller brings beside the evidence, of its own: highest CRL numbers and serials it has seen, and what the
    policy's status URL gave. None: it does not remember, or did not ask; the check is then skipped."""

    crl: CrlNumbers | None
    serials: SerialFloor | None
    at_url: UrlStatus | None


def walk(
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    now: int,
    name: str | None,
    seen: Seen,
    checks: Checks,
) -> Found | None:
    """Steps (1) to (6). None when leaf or claims cannot be read; then a failed check says so."""
    # (1), (2)
    leaf = checks.parse(
        "leaf.form", lambda: Leaf.parse(evidence.leaf), reason="the certificate has the profile's form", cite=RATLS
    )
    if leaf is None:
        return None
    carried = leaf.extension
    claims = checks.parse(
        "claims.form", lambda: Claims.decode(carried.claims), reason="the claims are well formed", cite=RATLS
    )
    if claims is None:
        unread = Skip("the claims cannot be read")
        quote, _ = appraise_quote(carried.quote, endorsements.collateral, policy, unread, now, seen.crl, checks)  # (4)
        _report_data(quote, carried.claims, checks)
        return None
    _leaf(leaf, claims, now, name, checks)  # (1), (3)
    # (5) first half: the manifest's registers are what (4) compares with
    manifest = appraise_release(evidence, claims, policy.release, now=now, checks=checks)
    registers: Registers | Skip
    if manifest is not None:
        registers = Registers(manifest.mrtd, manifest.rtmr0, manifest.rtmr1, manifest.rtmr2)
    elif isinstance(policy.release, Skip):
        registers = policy.release
    else:
        registers = Skip("no release manifest was accepted")
    # (4)
    quote, tdx = appraise_quote(carried.quote, endorsements.collateral, policy, registers, now, seen.crl, checks)
    _report_data(quote, carried.claims, checks)
    if quote is not None:
        _release_values(quote, manifest, checks)
        _event_log(evidence.event_log, claims, quote, policy, checks)  # (5)
    gpu = _gpu(leaf, claims, endorsements, policy, manifest, now, checks)  # (6)
    # (5) second half: the statement speaks of the platform and GPUs just seen
    serials: tuple[bytes, ...] | None = () if isinstance(policy.gpu, Skip) else None
    if gpu is not None:
        serials = tuple(bytes.fromhex(d.ik_serial) for d in gpu.devices if d.kind == "gpu")
    who = Identified(tdx.piid, tdx.ppid, serials) if tdx else None
    statement = appraise_deployment(
        evidence, claims, policy.deployment, who=who, floor=seen.serials, now=now, checks=checks
    )
    status = appraise_status(
        evidence, claims, policy, manifest, statement, who=who, floor=seen.serials, at_url=seen.at_url, now=now,
        checks=checks,
    )  # fmt: skip
    _keyset(evidence.keyset, leaf, claims, now, checks)
    ends = [leaf.not_after]
    ends += [tdx.earliest_expiration] if tdx else []
    ends += [gpu.valid_until] if gpu and gpu.valid_until else []  # 0: no stage that ends was asked
    ends += [manifest.not_after] if manifest else []
    ends += [statement.not_after] if statement else []
    ends += [status.next_update] if status else []
    return Found(leaf, claims, tdx, gpu, manifest, statement, status, tuple(ends))


def _leaf(leaf: Leaf, claims: Claims, now: int, name: str | None, checks: Checks) -> None:
    checks.require(
        "leaf.valid-now", leaf.not_before <= now < leaf.not_after, code="LEAF_EXPIRED",
        reason="the certificate is valid at this client's time", expected=f"{leaf.not_before} to {leaf.not_after}",
        actual=now, cite="RFC 5280 §4.1.2.5",
    )  # fmt: skip
    checks.equal(
        "claims.key", binding.key_hash(leaf.spki), claims.key_hash, code="CLAIMS_KEY",
        reason="the claims name this certificate's key", cite=RATLS,
    )  # fmt: skip
    checks.equal(
        "claims.times", (leaf.not_before, leaf.not_after), (claims.not_before, claims.not_after), code="CLAIMS_TIMES",
        reason="claims and certificate agree on the time", cite=RATLS,
    )  # fmt: skip
    checks.equal(
        "claims.names", leaf.dns_names, claims.dns_names, code="CLAIMS_NAMES",
        reason="claims and certificate agree on the names", cite=RATLS,
    )  # fmt: skip
    if name is None:
        checks.skip("leaf.name", "a saved bundle: no name was dialled", cite="RFC 9525")
    else:
        checks.require(
            "leaf.name", name in claims.dns_names, code="LEAF_NAME", reason="the name dialled is one of this enclave's",
            expected=name, actual=claims.dns_names, cite="RFC 9525",
        )  # fmt: skip


def appraise_quote(
    raw: bytes,
    collateral: bytes,
    policy: Policy,
    registers: Registers | Skip,
    now: int,
    crl_floor: CrlNumbers | None,
    checks: Checks,
) -> tuple[Quote | None, TdxFacts | None]:
    """(4) Form, collateral, and the TDX checklist. Facts are there only when the signature layer accepted."""
    quote = checks.parse("tdx.form", lambda: Quote.parse(raw), reason="the quote is well formed", cite=DCAP)
    if not collateral:
        missing = FormatError("TDX_COLLATERAL", "no collateral for this quote", hint="fetch it, or ask for the bundle")
        checks.fail("tdx.collateral", missing, cite=DCAP)
        return quote, None
    pieces = checks.parse(
        "tdx.collateral", lambda: Collateral.parse(collateral), reason="the collateral is well formed", cite=DCAP
    )
    if quote is None or pieces is None:
        return quote, None
    tdx, exception = admit(policy, fmspc=pieces.tcb_info.fmspc, now=now, checks=checks)
    facts = appraise_tdx(
        quote, pieces, policy=tdx, registers=registers, root=policy.roots.intel, now=now, checks=checks,
        crl_floor=crl_floor,
    )  # fmt: skip
    if facts is not None and exception is not None:
        confine(policy, exception, facts.tcb_status, facts.advisories, checks)
        facts = replace(facts, earliest_expiration=min(facts.earliest_expiration, exception.not_after))
    return quote, facts


def _report_data(quote: Quote | None, claims: bytes, checks: Checks) -> None:
    if quote is not None:
        checks.equal(
            "tdx.report-data", binding.report_data(claims), quote.body.report_data, code="TDX_REPORT_DATA",
            reason="the quote commits to these claims", cite="CCC interoperable RA-TLS",
        )  # fmt: skip


def _release_values(quote: Quote, manifest: ReleaseManifest | None, checks: Checks) -> None:
    """A manifest may narrow what the policy allows; it never widens it."""
    if manifest is None:
        return
    body = quote.body
    for id, allowed, actual in (
        ("td-attributes", manifest.td_attributes, body.td_attributes),
        ("xfam", manifest.xfam, body.xfam),
        ("mrseam", manifest.mrseam, body.mrseam),
    ):
        if not allowed:
            checks.skip(f"release.{id}", "the release leaves it to the policy", cite="release manifest")
            continue
        checks.require(
            f"release.{id}", actual in allowed, code="RELEASE_VALUE", reason=f"{id} is one the release allows",
            expected=sorted(map(_value, allowed)), actual=_value(actual), cite="release manifest",
        )  # fmt: skip


def _value(value: int | bytes) -> str:
    return hex(value) if isinstance(value, int) else value.hex()


def _event_log(raw: bytes, claims: Claims, quote: Quote, policy: Policy, checks: Checks) -> None:
    if not raw and isinstance(policy.release, Skip):
        checks.skip("tdx.event-log", policy.release.why, cite=_CCEL)
        return
    same = checks.equal(
        "claims.event-log", claims.event_log, hashlib.sha384(raw).digest(), code="EVIDENCE_DIGEST",
        reason="the event log is the one the quote commits to", cite=RATLS,
    )  # fmt: skip
    if not same:
        return
    log = checks.parse("tdx.event-log", lambda: parse_event_log(raw), reason="the event log is well formed", cite=_CCEL)
    if log is not None:
        items = rtmr3_items(claims.release, claims.config, [(m.id, m.weights) for m in claims.models])
        appraise_event_log(log, quote.body.rtmrs, checks, items=items)


def _gpu(
    leaf: Leaf,
    claims: Claims,
    endorsements: Endorsements,
    policy: Policy,
    manifest: ReleaseManifest | None,
    now: int,
    checks: Checks,
) -> GpuFacts | None:
    carried = leaf.extension.gpu
    if isinstance(policy.gpu, Skip):
        checks.skip("gpu.present", policy.gpu.why, cite=RATLS)
        return None
    if carried is None or claims.gpu is None or claims.gpu_nonce is None or claims.gpu_state is None:
        checks.require(
            "gpu.present", False, code="GPU_ABSENT", reason="the certificate carries GPU evidence",
            expected="evidence and claims", actual="none", cite=RATLS,
        )  # fmt: skip
        return None
    if not checks.equal(
        "gpu.digest", claims.gpu, binding.gpu_digest(carried), code="GPU_DIGEST",
        reason="the quote commits to this GPU evidence", cite=RATLS,
    ):  # fmt: skip
        return None
    age = claims.not_before - claims.gpu_nonce.issued_at
    checks.require(
        "gpu.nonce-age", 0 <= age <= _MAX_NONCE_AGE, code="GPU_NONCE_AGE",
        reason="the GPU evidence was made for this certificate, not long before it",
        expected=f"0 to {_MAX_NONCE_AGE} s", actual=age, cite=RATLS,
    )  # fmt: skip
    nonce = binding.gpu_nonce(binding.key_hash(leaf.spki), claims.gpu_nonce.issued_at, claims.gpu_nonce.salt)
    facts = appraise_devices(carried, endorsements, policy, nonce, now, checks)
    if facts is None:
        return None
    state = claims.gpu_state
    counted = (
        sum(d.kind == "gpu" for d in facts.devices),
        sum(d.kind == "switch" for d in facts.devices),
        facts.mode,
    )
    checks.equal(
        "gpu.state", counted, (state.count, state.switches, state.mode), code="GPU_STATE",
        reason="the TD's driver counts the devices the evidence shows", cite=RATLS,
    )  # fmt: skip
    checks.equal(
        "gpu.confidential", (True, True, True, False), (state.cc, state.production, state.ready, state.dev_tools),
        code="GPU_NOT_CONFIDENTIAL", reason="confidential computing on, production, ready, developer tools off",
        cite="NVML nvmlConfComputeSystemState_t",
    )  # fmt: skip
    _release_gpu(facts, manifest, checks)
    return facts


def appraise_devices(
    carried: bytes, endorsements: Endorsements, policy: Policy, nonce: bytes, now: int, checks: Checks
) -> GpuFacts | None:
    """(6) Evidence as carried, its digest checked before: inflate under caps, then every stage. None: unreadable."""
    assert not isinstance(policy.gpu, Skip)
    evidence = checks.parse(
        "gpu.form", lambda: decode_gpu(carried), reason="the GPU evidence is well formed", cite=RATLS
    )
    if evidence is None:
        return None
    return appraise_gpu(
        evidence, GpuEndorsements(endorsements.rims, endorsements.ocsp), nonce=nonce, policy=policy.gpu,
        device_root=policy.roots.nvidia_device, rim_root=policy.roots.nvidia_rim, now=now, checks=checks,
    )  # fmt: skip


def _release_gpu(facts: GpuFacts, manifest: ReleaseManifest | None, checks: Checks) -> None:
    if manifest is None:
        return
    gpus = [d for d in facts.devices if d.kind == "gpu"]
    for id, allowed, actual in (
        ("gpu-driver", manifest.drivers, {d.driver for d in gpus}),
        ("gpu-vbios", manifest.vbios, {d.vbios for d in gpus}),
    ):
        checks.require(
            f"release.{id}", actual <= allowed, code="RELEASE_VALUE", reason=f"{id} is one the release allows",
            expected=allowed, actual=actual, cite="release manifest",
        )  # fmt: skip


def _keyset(raw: bytes, leaf: Leaf, claims: Claims, now: int, checks: Checks) -> None:
    """The keyset that receipts will name: this certificate's key and no other TLS key."""
    keyset = checks.parse(
        "keyset.form", lambda: Keyset.parse(raw), reason="the keyset is well formed", cite="aci/1 keyset"
    )
    if keyset is None:
        return
    # Over the bytes as served, which are the JCS form: one spelling of the document, as of everything else.
    checks.equal(
        "keyset.digest", claims.keyset, hashlib.sha256(raw).digest(), code="EVIDENCE_DIGEST",
        reason="the keyset is the one the quote commits to", cite=RATLS,
    )  # fmt: skip
    domains = {d for _, d in keyset.tls if d is not None}
    checks.require(
        "keyset.domain", domains <= set(claims.dns_names), code="KEYSET_KEY",
        reason="the keyset names this enclave's names alone", expected=claims.dns_names, actual=sorted(domains),
        cite="aci/1 keyset",
    )  # fmt: skip
    spki = hashlib.sha256(leaf.spki).digest()
    checks.require(
        "keyset.tls-key", [s for s, _ in keyset.tls] == [spki], code="KEYSET_KEY",
        reason="the keyset names this certificate's key alone", expected=spki, actual=[s for s, _ in keyset.tls],
        cite="aci/1 keyset",
    )  # fmt: skip
    checks.require(
        "keyset.dates", now <= keyset.not_after <= leaf.not_after + _KEYSET_DRAIN, code="KEYSET_DATES",
        reason="the keyset ends with the certificate, drain included",
        expected=f"{now} to {leaf.not_after + _KEYSET_DRAIN}", actual=keyset.not_after, cite="aci/1 keyset",
    )  # fmt: skip
