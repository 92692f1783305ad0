"""The Verifier (RFC 9334 §7): evidence, endorsements, policy and a time in; one attestation result out.

This docstring is the algorithm; the body carries the same numbers (ratls facts §4).

    (1) leaf: one self-signed P-256 certificate of the profile, at most an hour, valid now
    (2) extension and claims decode strictly; the profile is known
    (3) claims agree with the certificate: key hash, times, names; the name dialled is among them
    (4) quote: strict form, every item of the TDX checklist, REPORTDATA = SHA-256(claims) ‖ 0^32
    (5) who and what: release manifest, event log and its replay, RTMR3, deployment statement, status list, keyset
    (6) GPU: present when asked for; digest before inflating; nonce recomputed; every stage of the GPU checklist
    (7) connection, in `verify_channel`: fresh quote of the same TD over nonce, exporter and this leaf's key

Every check is recorded, whatever failed before it, except where there are no bytes left to look at. Nothing else makes
an `AttestationResult`. Pure: no socket, clock, file or device; time is an argument and always the caller's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from attestation import binding
from attestation.channel import ChannelProof
from attestation.claims import Claims
from attestation.endorsements import Endorsements
from attestation.errors import FormatError
from attestation.evidence import Evidence
from attestation.gpu import GpuEndorsements, GpuEvidence, GpuFacts
from attestation.gpu import appraise as appraise_gpu
from attestation.gpu import decode as decode_gpu
from attestation.keyset import Keyset
from attestation.policy import BUILT_IN_ROOTS as OURS
from attestation.policy import Policy, Skip
from attestation.ratls import Leaf
from attestation.reference_values import ReleaseManifest
from attestation.result import AttestationResult, Checks, TrustAnchor, conclude
from attestation.statements import Identified, appraise_deployment, appraise_release, appraise_status
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

__all__ = ["verify", "verify_channel", "verify_gpu", "verify_quote"]

_RATLS: Final = "vouchsafe RA-TLS profile, §3"
_MAX_NONCE_AGE: Final = 600
_KEYSET_DRAIN: Final = 3600

NOT_PROVEN: Final = (
    "physical attacks: whoever taps the memory bus can forge quotes (TEE.fail, WireTap, Battering RAM)",
    "place: on Hopper nothing in hardware ties the GPU to this TD; that rests on the measured driver (relayable)",
    "traffic shape: the host sees sizes and times of what it carries",
)
_NO_CHANNEL: Final = "channel: no proof was asked that this very connection ends in the TD"


@dataclass(frozen=True, slots=True)
class _Found:
    """What the steps established on the way, for claims and for the channel proof."""

    leaf: Leaf
    claims: Claims
    quote: Quote | None = None
    tdx: TdxFacts | None = None
    gpu: GpuFacts | None = None
    release: ReleaseManifest | None = None
    operator: str = ""
    ends: tuple[int, ...] = ()


def verify(
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    *,
    now: int,
    name: str | None,
    crl_floor: CrlNumbers | None = None,
) -> AttestationResult:
    """Steps (1) to (6) at *now* (unix seconds, the caller's own clock).

    name       the name dialled, lower case; None only for a saved bundle
    crl_floor  highest CRL numbers this client has seen
    """
    checks = Checks()
    found = _walk(evidence, endorsements, policy, now, name, crl_floor, checks)
    return _conclude(checks, policy, found, now, not_proven=(*NOT_PROVEN, _NO_CHANNEL))


def verify_channel(
    first: AttestationResult,
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    proof: ChannelProof,
    *,
    now: int,
) -> AttestationResult:
    """Step (7). *first* is the accepted result for this very leaf and policy; its checks come first in the new result."""
    checks = Checks()
    checks.extend(first.checks)
    checks.equal(
        "channel.same-leaf", hashlib.sha256(evidence.leaf).hexdigest(), first.claims.get("leaf", ""),
        code="CHANNEL_LEAF", reason="the proof belongs to the certificate that was accepted", cite=_RATLS,
    )  # fmt: skip
    checks.require(
        "channel.same-policy", first.policy == policy.label, code="CHANNEL_POLICY",
        reason="both parts were judged under one policy", cite=_RATLS,
    )  # fmt: skip
    if first.accepted:
        _channel(evidence, endorsements, policy, proof, now, checks)
    claims = {**first.claims, "channel": {"binding": proof.binding, "merkle_path": len(proof.path)}}
    not_proven = [text for text in first.not_proven if text != _NO_CHANNEL]
    if proof.binding == "key":
        not_proven.append(
            "channel: bound to the key, not to the TLS exporter; a relay that holds the key could pass it on"
        )
    return conclude(
        checks, claims=claims, not_proven=not_proven, anchors=first.anchors, policy=first.policy, now=now,
        valid_until=first.valid_until,
    )  # fmt: skip


def verify_quote(
    raw: bytes,
    collateral: bytes,
    policy: Policy,
    *,
    now: int,
    event_log: bytes | None = None,
    crl_floor: CrlNumbers | None = None,
) -> AttestationResult:
    """One TDX quote and its collateral, nothing else: what it was made for (REPORTDATA) is not appraised."""
    checks = Checks()
    skip = Skip("no release manifest is given to this command")
    quote, facts = _quote(raw, collateral, policy, skip, now, crl_floor, checks)
    if quote is not None:
        checks.skip("tdx.report-data", "this command does not know what the quote was made for", cite=_RATLS)
        if event_log is not None:
            log = checks.parse(
                "tdx.event-log", lambda: parse_event_log(event_log), reason="the event log is well formed"
            )
            if log is not None:
                appraise_event_log(log, quote.body.rtmrs, checks, items=skip)
    claims = _tdx_claims(facts) if facts else {}
    return conclude(
        checks, claims=claims, anchors=_anchors(policy, gpu=False), policy=policy.label, now=now,
        not_proven=("what the quote was made for: REPORTDATA", "what the TD runs: no reference values", NOT_PROVEN[0]),
        valid_until=facts.earliest_expiration if facts else 0,
    )  # fmt: skip


def verify_gpu(
    evidence: GpuEvidence, endorsements: GpuEndorsements, policy: Policy, *, nonce: bytes, now: int
) -> AttestationResult:
    """GPU and switch evidence for one *nonce*, nothing else: which machine holds the devices is not appraised."""
    checks = Checks()
    facts = None
    if isinstance(policy.gpu, Skip):
        checks.skip("gpu.present", policy.gpu.why, cite=_RATLS)
    else:
        facts = appraise_gpu(
            evidence, endorsements, nonce=nonce, policy=policy.gpu, device_root=policy.roots.nvidia_device,
            rim_root=policy.roots.nvidia_rim, now=now, checks=checks,
        )  # fmt: skip
    return conclude(
        checks, claims=_gpu_claims(facts) if facts else {}, anchors=_anchors(policy, gpu=True)[1:],
        policy=policy.label, now=now, not_proven=("which machine holds these devices", NOT_PROVEN[1]),
        valid_until=facts.valid_until if facts else 0,
    )  # fmt: skip


def _walk(
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    now: int,
    name: str | None,
    crl_floor: CrlNumbers | None,
    checks: Checks,
) -> _Found | None:
    # (1), (2)
    leaf = checks.parse("leaf.form", lambda: Leaf.parse(evidence.leaf), reason="a leaf of the profile", cite=_RATLS)
    if leaf is None:
        return None
    claims = checks.parse("claims.form", lambda: Claims.decode(leaf.extension.claims), reason="claims", cite=_RATLS)
    if claims is None:
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
    quote, tdx = _quote(leaf.extension.quote, endorsements.collateral, policy, registers, now, crl_floor, checks)
    if quote is not None:
        checks.equal(
            "tdx.report-data", binding.report_data(leaf.extension.claims), quote.body.report_data,
            code="TDX_REPORT_DATA", reason="the quote commits to these claims", cite="CCC interoperable RA-TLS",
        )  # fmt: skip
        _release_values(quote, manifest, checks)
        _event_log(evidence.event_log, claims, quote, policy, checks)  # (5)
    gpu = _gpu(leaf, claims, endorsements, policy, manifest, now, checks)  # (6)
    # (5) second half: the statement speaks of the platform and GPUs just seen
    serials = tuple(bytes.fromhex(d.ik_serial) for d in gpu.devices if d.kind == "gpu") if gpu else ()
    who = Identified(tdx.piid, tdx.ppid, serials) if tdx else None
    statement = appraise_deployment(evidence, claims, policy.deployment, who=who, now=now, checks=checks)
    status = appraise_status(evidence, claims, policy, statement, who=who, now=now, checks=checks)
    _keyset(evidence.keyset, leaf, claims, now, checks)
    ends = [leaf.not_after]
    ends += [tdx.earliest_expiration] if tdx else []
    ends += [gpu.valid_until] if gpu else []
    ends += [manifest.not_after] if manifest else []
    ends += [statement.not_after] if statement else []
    ends += [status.next_update] if status else []
    operator = statement.operator if statement else ""
    return _Found(leaf, claims, quote, tdx, gpu, manifest, operator, tuple(ends))


def _leaf(leaf: Leaf, claims: Claims, now: int, name: str | None, checks: Checks) -> None:
    checks.require(
        "leaf.valid-now", leaf.not_before <= now < leaf.not_after, code="LEAF_EXPIRED",
        reason="the certificate is valid at this client's time", expected=f"{leaf.not_before} to {leaf.not_after}",
        actual=now, cite="RFC 5280 §4.1.2.5",
    )  # fmt: skip
    checks.equal(
        "claims.key", binding.key_hash(leaf.spki), claims.key_hash, code="CLAIMS_KEY",
        reason="the claims name this certificate's key", cite=_RATLS,
    )  # fmt: skip
    checks.equal(
        "claims.times", (leaf.not_before, leaf.not_after), (claims.not_before, claims.not_after), code="CLAIMS_TIMES",
        reason="claims and certificate agree on the time", cite=_RATLS,
    )  # fmt: skip
    checks.equal(
        "claims.names", leaf.dns_names, claims.dns_names, code="CLAIMS_NAMES",
        reason="claims and certificate agree on the names", cite=_RATLS,
    )  # fmt: skip
    if name is None:
        checks.skip("leaf.name", "a saved bundle: no name was dialled", cite="RFC 9525")
    else:
        checks.require(
            "leaf.name", name in claims.dns_names, code="LEAF_NAME", reason="the name dialled is one of this enclave's",
            expected=name, actual=claims.dns_names, cite="RFC 9525",
        )  # fmt: skip


def _quote(
    raw: bytes,
    collateral: bytes,
    policy: Policy,
    registers: Registers | Skip,
    now: int,
    crl_floor: CrlNumbers | None,
    checks: Checks,
) -> tuple[Quote | None, TdxFacts | None]:
    quote = checks.parse(
        "tdx.form", lambda: Quote.parse(raw), reason="the quote is well formed", cite="DCAP quote v4/v5"
    )
    if not collateral:
        missing = FormatError("TDX_COLLATERAL", "no collateral for this quote", hint="fetch it, or ask for the bundle")
        checks.fail("tdx.collateral", missing)
        return quote, None
    pieces = checks.parse(
        "tdx.collateral", lambda: Collateral.parse(collateral), reason="the collateral is well formed"
    )
    if quote is None or pieces is None:
        return quote, None
    facts = appraise_tdx(
        quote, pieces, policy=policy.tdx, registers=registers, root=policy.roots.intel, now=now, checks=checks,
        crl_floor=crl_floor,
    )  # fmt: skip
    return quote, facts


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
        if allowed:
            checks.require(
                f"release.{id}", actual in allowed, code="RELEASE_VALUE", reason=f"{id} is one the release allows",
                expected=allowed, actual=actual, cite="release manifest",
            )  # fmt: skip


def _event_log(raw: bytes, claims: Claims, quote: Quote, policy: Policy, checks: Checks) -> None:
    if not raw and isinstance(policy.release, Skip):
        checks.skip("tdx.event-log", policy.release.why)
        return
    same = checks.equal(
        "claims.event-log", claims.event_log, hashlib.sha384(raw).digest(), code="EVIDENCE_DIGEST",
        reason="the event log is the one the quote commits to", cite=_RATLS,
    )  # fmt: skip
    if not same:
        return
    log = checks.parse("tdx.event-log", lambda: parse_event_log(raw), reason="the event log is well formed")
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
        checks.skip("gpu.present", policy.gpu.why, cite=_RATLS)
        return None
    if carried is None or claims.gpu is None or claims.gpu_nonce is None or claims.gpu_state is None:
        checks.require(
            "gpu.present", False, code="GPU_ABSENT", reason="the certificate carries GPU evidence",
            expected="evidence and claims", actual="none", cite=_RATLS,
        )  # fmt: skip
        return None
    if not checks.equal(
        "gpu.digest", claims.gpu, binding.gpu_digest(carried), code="GPU_DIGEST",
        reason="the quote commits to this GPU evidence", cite=_RATLS,
    ):  # fmt: skip
        return None
    age = claims.not_before - claims.gpu_nonce.issued_at
    checks.require(
        "gpu.nonce-age", 0 <= age <= _MAX_NONCE_AGE, code="GPU_NONCE_AGE",
        reason="the GPU evidence was made for this certificate", expected=f"0 to {_MAX_NONCE_AGE} s", actual=age,
        cite=_RATLS,
    )  # fmt: skip
    nonce = binding.gpu_nonce(binding.key_hash(leaf.spki), claims.gpu_nonce.issued_at, claims.gpu_nonce.salt)
    facts = _devices(carried, endorsements, policy, nonce, now, checks)
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
        reason="the TD's driver counts the devices the evidence shows", cite=_RATLS,
    )  # fmt: skip
    checks.equal(
        "gpu.confidential", (True, True, True, False), (state.cc, state.production, state.ready, state.dev_tools),
        code="GPU_NOT_CONFIDENTIAL", reason="confidential computing on, production, ready, developer tools off",
        cite="NVML nvmlConfComputeSystemState_t",
    )  # fmt: skip
    _release_gpu(facts, manifest, checks)
    return facts


def _devices(
    carried: bytes, endorsements: Endorsements, policy: Policy, nonce: bytes, now: int, checks: Checks
) -> GpuFacts | None:
    assert not isinstance(policy.gpu, Skip)
    evidence = checks.parse(
        "gpu.form", lambda: decode_gpu(carried), reason="the GPU evidence is well formed", cite=_RATLS
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
    checks.equal(
        "keyset.digest", "sha256:" + claims.keyset.hex(), keyset.digest, code="EVIDENCE_DIGEST",
        reason="the keyset is the one the quote commits to", cite=_RATLS,
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


def _channel(
    evidence: Evidence, endorsements: Endorsements, policy: Policy, proof: ChannelProof, now: int, checks: Checks
) -> None:
    """(7). The connection's quote passes the whole TDX checklist again, and shows the same TD."""
    wanted = policy.channel.proof
    if isinstance(wanted, Skip):
        checks.skip("channel.binding", wanted.why, cite=_RATLS)
    else:
        checks.require(
            "channel.binding", proof.binding == "exporter" or wanted == "key", code="CHANNEL_BINDING",
            reason="the proof is bound to what the policy asks for", expected=wanted, actual=proof.binding,
            cite="RFC 9266; RFC 8446 §7.5",
        )  # fmt: skip
    leaf = Leaf.parse(evidence.leaf)
    own = Checks()
    skip = Skip("compared with the certificate's quote instead")
    quote, _ = _quote(proof.quote, endorsements.collateral, policy, skip, now, None, own)
    checks.extend(_prefixed(own))
    if quote is not None:
        one, two = Quote.parse(leaf.extension.quote).body, quote.body
        same = ("mrtd", "rtmrs", "mrseam", "td_attributes", "xfam", "mrconfigid", "mrowner", "mrownerconfig")
        differing = [f for f in same if getattr(one, f) != getattr(two, f)]
        checks.require(
            "channel.same-td", not differing, code="CHANNEL_TD", reason="the connection's quote shows the same TD",
            expected="equal registers", actual=differing or "equal", cite=_RATLS,
        )  # fmt: skip
    k = binding.key_hash(leaf.spki)
    fresh = None if proof.gpu is None else binding.gpu_digest(proof.gpu)
    expected = binding.merkle_root(
        binding.connection_leaf(k, proof.exporter, proof.nonce, leaf.extension.claims, fresh, proof.binding), proof.path
    )
    if quote is not None:
        checks.equal(
            "channel.report-data", expected, quote.body.report_data, code="CHANNEL_REPORT_DATA",
            reason="the quote commits to this connection: nonce, exporter and key", cite=_RATLS,
        )  # fmt: skip
    _fresh_gpu(endorsements, policy, proof, k, now, checks)


def _fresh_gpu(
    endorsements: Endorsements, policy: Policy, proof: ChannelProof, k: bytes, now: int, checks: Checks
) -> None:
    if not policy.channel.fresh_gpu:
        checks.skip("channel.gpu", "the policy does not ask for GPU evidence per connection", cite=_RATLS)
        return
    if proof.gpu is None or isinstance(policy.gpu, Skip):
        checks.require(
            "channel.gpu", False, code="GPU_ABSENT", reason="fresh GPU evidence for this connection", cite=_RATLS
        )
        return
    own = Checks()
    nonce = binding.connection_gpu_nonce(k, proof.exporter or bytes(binding.EXPORTER_SIZE), proof.nonce)
    _devices(proof.gpu, endorsements, policy, nonce, now, own)
    checks.extend(_prefixed(own))


def _prefixed(checks: Checks) -> Sequence[Any]:  # Any: Check; dataclasses.replace keeps the type
    return [replace(c, id=f"channel.{c.id}") for c in checks]


def _conclude(
    checks: Checks, policy: Policy, found: _Found | None, now: int, *, not_proven: tuple[str, ...]
) -> AttestationResult:
    claims = _claims(found) if found else {}
    ends = min(found.ends) if found and found.ends else 0
    return conclude(
        checks, claims=claims, not_proven=not_proven, anchors=_anchors(policy, gpu=not isinstance(policy.gpu, Skip)),
        policy=policy.label, now=now, valid_until=ends,
    )  # fmt: skip


def _anchors(policy: Policy, *, gpu: bool) -> tuple[TrustAnchor, ...]:
    pairs = [("Intel SGX Root CA", policy.roots.intel, OURS.intel)]
    if gpu:
        pairs += [
            ("NVIDIA Device Identity CA", policy.roots.nvidia_device, OURS.nvidia_device),
            ("NVIDIA CoRIM signing Root CA", policy.roots.nvidia_rim, OURS.nvidia_rim),
        ]
    return tuple(TrustAnchor(name, hashlib.sha256(der).digest(), der == ours) for name, der, ours in pairs)


def _claims(found: _Found) -> dict[str, Any]:  # Any: JSON values
    c = found.claims
    release = found.release
    return {
        "leaf": hashlib.sha256(found.leaf.der).hexdigest(),
        "names": list(c.dns_names),
        "operator": found.operator,
        "role": c.role,
        "release": c.release.hex(),
        "version": release.version if release else "",
        "source_commit": release.source_commit if release else "",
        "config": c.config.hex(),
        "models": [{"id": m.id, "weights": m.weights} for m in c.models],
        "keyset": "sha256:" + c.keyset.hex(),
        "not_after": c.not_after,
        **(_tdx_claims(found.tdx) if found.tdx else {}),
        **(_gpu_claims(found.gpu) if found.gpu else {}),
    }


def _tdx_claims(facts: TdxFacts) -> dict[str, Any]:  # Any: JSON values
    body = facts.report
    return {
        "tdx": {
            "tcb_status": facts.tcb_status,
            "tcb_evaluation": facts.evaluation,
            "advisories": sorted(facts.advisories),
            "fmspc": facts.fmspc.hex(),
            "mrtd": body.mrtd.hex(),
            "rtmrs": [r.hex() for r in body.rtmrs],
            "mrseam": body.mrseam.hex(),
            "td_attributes": hex(body.td_attributes),
            "xfam": hex(body.xfam),
            "report_data": body.report_data.hex(),
        }
    }


def _gpu_claims(facts: GpuFacts) -> dict[str, Any]:  # Any: JSON values
    return {
        "gpu": {
            "mode": facts.mode,
            "tied_to_td": "relayable",
            "devices": [
                {"kind": d.kind, "hwmodel": d.hwmodel, "driver": d.driver, "vbios": d.vbios, "serial": d.ik_serial}
                for d in facts.devices
            ],
        }
    }
