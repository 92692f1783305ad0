"""The Verifier (RFC 9334 §7): evidence, endorsements, policy and a time in; one attestation result out.

This docstring is the algorithm; `steps` and `connection` carry the same numbers (ratls facts §4).

    (1) leaf: one self-signed P-256 certificate of the profile, at most an hour, valid now
    (2) extension and claims decode strictly; the profile is known
    (3) claims agree with the certificate: key hash, times, names; the name dialled is among them
    (4) quote: strict form, every item of the TDX checklist, REPORTDATA = SHA-256(claims) ‖ 0^32
    (5) who and what: release manifest, event log and its replay, RTMR3, deployment statement, status list, keyset
    (6) GPU: present when asked for; digest before inflating; nonce recomputed; every stage of the GPU checklist
    (7) connection, in `verify_channel`: fresh quote of the same TD over nonce, exporter and this leaf's key

Every check is recorded, whatever failed before it, except where there are no bytes left to look at. Before a result is
accepted the book is read once more: what the policy asks must stand there as passed, not merely as not failed.

Nothing else makes an `AttestationResult`, and no evidence makes these functions raise: a fault of our own is a refusal
too, `VERIFIER_FAULT`. Pure: no socket, clock, file or device; time is an argument and always the caller's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from attestation.channel import ChannelProof
from attestation.connection import appraise_connection
from attestation.deployment import SerialFloor
from attestation.endorsements import Endorsements
from attestation.evidence import Evidence
from attestation.gpu import GpuEndorsements, GpuEvidence
from attestation.gpu import appraise as appraise_gpu
from attestation.policy import BUILT_IN_ROOTS as OURS
from attestation.policy import Policy, Skip
from attestation.rendering import (
    NO_CHANNEL,
    NOT_POST_QUANTUM,
    NOT_PROVEN,
    gpu_claims,
    not_appraised,
    render,
    tdx_claims,
)
from attestation.result import AttestationResult, Checks, Status, TrustAnchor, conclude
from attestation.statements import UrlStatus
from attestation.steps import RATLS, Seen, appraise_quote, walk
from attestation.tdx import CrlNumbers, appraise_event_log, parse_event_log

__all__ = ["verify", "verify_channel", "verify_gpu", "verify_quote"]

T = TypeVar("T")

_SIGNED: Final = (
    "tdx.form", "tdx.collateral", "tdx.tcb-info-signer", "tdx.qe-identity-signer", "tdx.pck-role", "tdx.pck-root",
    "tdx.pck-crl-issuer", "tdx.collateral-chain", "tdx.collateral-signature", "tdx.collateral-time",
    "tdx.certificate-time", "tdx.crl", "tdx.revocation", "tdx.pck-chain", "tdx.qe-signature", "tdx.qe-binding",
    "tdx.qe-identity", "tdx.quote-signature", "tdx.fmspc", "tdx.tcb-level", "tdx.td-safety", "tdx.service-td",
    "tdx.readers-agree", "tdx.issue-dates", "tdx.mrsignerseam", "tdx.seamattributes",
)  # fmt: skip
"""What no policy leaves out of a quote's appraisal."""
_ALWAYS: Final = (
    "leaf.form", "leaf.valid-now", "claims.form", "claims.key", "claims.times", "claims.names", *_SIGNED,
    "tdx.report-data", "keyset.form", "keyset.digest", "keyset.tls-key", "keyset.domain", "keyset.dates",
)  # fmt: skip
_RELEASE: Final = (
    "release.type", "release.digest", "release.signers", "release.form", "release.dates", "release.models", "tdx.mrtd",
    "tdx.rtmr0", "tdx.rtmr1", "tdx.rtmr2", "claims.event-log", "tdx.event-log", "tdx.event-log-rtmr3",
    "tdx.rtmr3-items",
)  # fmt: skip
_DEPLOYMENT: Final = (
    "deployment.type", "deployment.digest", "deployment.signers", "deployment.form", "deployment.dates",
    "deployment.serial", "deployment.names", "deployment.role", "deployment.config", "deployment.release",
    "deployment.platform",
)  # fmt: skip
_STATUS: Final = (
    "status.type", "status.signers", "status.form", "status.current", "status.denied", "status.operator-keys",
)  # fmt: skip
_GPU: Final = ("gpu.digest", "gpu.nonce-age", "gpu.form", "gpu.parse", "gpu.state", "gpu.confidential")
# A connection has a name that was dialled: the verdict of a saved bundle, which has none, is no first verdict.
_CHANNEL: Final = (
    "leaf.name",
    "channel.same-leaf",
    "channel.same-policy",
    "channel.time",
    "channel.form",
    "channel.report-data",
)
_REPEATED: Final = ("channel.same-quote", "channel.quote-signature")
_OTHER_QUOTE: Final = (*(f"channel.{id}" for id in _SIGNED), "channel.same-td", "channel.same-platform")


def verify(
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    *,
    now: int,
    name: str | None,
    crl_floor: CrlNumbers | None = None,
    serial_floor: SerialFloor | None = None,
    at_url: UrlStatus | None = None,
    looked_back: tuple[int, int] | None = None,
) -> AttestationResult:
    """Steps (1) to (6) at *now* (unix seconds, the caller's own clock).

    name       the name dialled, lower case; None only for a saved bundle
    crl_floor  highest CRL numbers this client has seen; those of this result are in its claims
    serial_floor  likewise the highest serials of this operator's statements and status lists
    at_url     what the policy's status URL gave; the list that is judged is the evidence's, whoever put it there
    looked_back  (when the question is asked, grace in seconds) for a saved bundle that is judged at its own time *now*
    """
    checks = Checks()
    if looked_back is not None:
        asked, grace = looked_back
        checks.require(
            "bundle.age", now <= asked <= now + grace, code="BUNDLE_AGE",
            reason="the bundle, judged at its own time, is not older than the grace allows",
            expected=f"{now} to {now + grace}", actual=asked, cite=RATLS,
        )  # fmt: skip
    seen = Seen(crl_floor, serial_floor, at_url)
    found = _guarded(checks, lambda: walk(evidence, endorsements, policy, now, name, seen, checks))
    _complete(checks, _wanted(policy, name, seen))
    return conclude(
        checks, claims=render(found) if found else {}, not_proven=not_appraised(policy, name),
        anchors=_anchors(policy, gpu=not isinstance(policy.gpu, Skip)), policy=policy.label, now=now,
        valid_until=min(found.ends) if found else 0, development=policy.development,
    )  # fmt: skip


def verify_channel(
    first: AttestationResult,
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    proof: ChannelProof,
    *,
    now: int,
    group: str,
    crl_floor: CrlNumbers | None = None,
) -> AttestationResult:
    """Step (7). *first* is the accepted result of `verify` for this very leaf and policy; its checks come first in the
    new result. When it was refused, or belongs to another leaf or policy, nothing else is looked at.

    endorsements  those of *first*: a quote that repeats the certificate's rests on it, any other is judged with them
    group         the key exchange group that this client's own TLS negotiated, "" when it cannot tell
    """
    checks = Checks()
    checks.extend(first.checks)
    anchors = _anchors(policy, gpu=not isinstance(policy.gpu, Skip))
    good = checks.equal(
        "channel.same-leaf", hashlib.sha256(evidence.leaf).hexdigest(), first.claims.get("leaf", ""),
        code="CHANNEL_LEAF", reason="the proof belongs to the certificate that was accepted", cite=RATLS,
    )  # fmt: skip
    good &= checks.require(
        "channel.same-policy", first.policy == policy.label and first.anchors == anchors, code="CHANNEL_POLICY",
        reason="both parts are judged under one policy and its roots", cite=RATLS,
    )  # fmt: skip
    if first.accepted and good:
        _guarded(
            checks,
            lambda: appraise_connection(
                first, evidence, endorsements, policy, proof, now=now, crl_floor=crl_floor, checks=checks
            ),
        )
    wanted = {*_CHANNEL} | (set() if isinstance(policy.channel.proof, Skip) else {"channel.binding"})
    # One of the two ways to judge the connection's quote, whole.
    repeated = any(c.id == "channel.same-quote" and c.status is Status.PASS for c in checks)
    wanted |= {*_REPEATED} if repeated else {*_OTHER_QUOTE}
    _complete(checks, wanted | ({"channel.gpu", "channel.gpu.form"} if policy.channel.fresh_gpu else set()))
    said = {"binding": proof.binding, "group": group, "merkle_path": len(proof.path)}
    claims = {**first.claims, "channel": said}
    not_proven = [text for text in first.not_proven if text != NO_CHANNEL]
    if proof.binding == "key":
        not_proven.append(
            "channel: bound to the key, not to the TLS exporter; a relay that holds the key could pass it on"
        )
    if "MLKEM" not in group:
        not_proven.append(NOT_POST_QUANTUM)
    return conclude(
        checks, claims=claims, not_proven=not_proven, anchors=anchors, policy=first.policy, now=now,
        valid_until=first.valid_until, development=first.development,
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
    found = _guarded(checks, lambda: appraise_quote(raw, collateral, policy, skip, now, crl_floor, checks))
    quote, facts = found or (None, None)
    if quote is not None:
        checks.skip("tdx.report-data", "this command does not know what the quote was made for", cite=RATLS)
        if event_log is not None:
            log = checks.parse(
                "tdx.event-log", lambda: parse_event_log(event_log), reason="the event log is well formed",
                cite="TCG PC Client Platform Firmware Profile §10",
            )  # fmt: skip
            if log is not None:
                appraise_event_log(log, quote.body.rtmrs, checks, items=skip)
    _complete(checks, _SIGNED)
    return conclude(
        checks, claims=tdx_claims(facts) if facts else {}, anchors=_anchors(policy, gpu=False), policy=policy.label,
        not_proven=("what the quote was made for: REPORTDATA", "what the TD runs: no reference values", NOT_PROVEN[0]),
        now=now, valid_until=facts.earliest_expiration if facts else 0, development=policy.development,
    )  # fmt: skip


def verify_gpu(
    evidence: GpuEvidence, endorsements: GpuEndorsements, policy: Policy, *, nonce: bytes, now: int
) -> AttestationResult:
    """GPU and switch evidence for one *nonce*, nothing else: which machine holds the devices is not appraised."""
    checks = Checks()
    facts, wanted = None, policy.gpu
    if isinstance(wanted, Skip):
        checks.skip("gpu.present", wanted.why, cite=RATLS)
    else:
        facts = _guarded(
            checks,
            lambda: appraise_gpu(
                evidence, endorsements, nonce=nonce, policy=wanted, device_root=policy.roots.nvidia_device,
                rim_root=policy.roots.nvidia_rim, now=now, checks=checks,
            ),
        )  # fmt: skip
        _complete(checks, ("gpu.parse",))
    return conclude(
        checks, claims=gpu_claims(facts) if facts else {}, anchors=_anchors(policy, gpu=True)[1:],
        policy=policy.label, now=now, not_proven=("which machine holds these devices", NOT_PROVEN[1]),
        valid_until=facts.valid_until if facts else 0, development=policy.development,
    )  # fmt: skip


def _wanted(policy: Policy, name: str | None, seen: Seen) -> set[str]:
    """Ids that must stand in the book as passed before `verify` accepts under *policy*."""
    wanted = {*_ALWAYS} | ({"leaf.name"} if name is not None else set())
    if not isinstance(policy.release, Skip):
        wanted |= {*_RELEASE}
    if not isinstance(policy.deployment, Skip):
        wanted |= {*_DEPLOYMENT} | (set() if seen.serials is None else {"deployment.serial-seen"})
        if not isinstance(policy.deployment.status_list, Skip):
            wanted |= {*_STATUS} | (set() if seen.serials is None else {"status.serial-seen"})
            if seen.at_url is not None and seen.at_url.serial is not None:
                wanted |= set() if isinstance(policy.deployment.status_url, Skip) else {"status.url"}
    if not isinstance(policy.gpu, Skip):
        wanted |= {*_GPU}
    return wanted


def _complete(checks: Checks, wanted: Iterable[str]) -> None:
    """A last look before acceptance: a branch that ended without a word must not pass for one that found nothing."""
    if checks.failed:
        return
    missing = sorted({*wanted} - {c.id for c in checks if c.status is Status.PASS})
    checks.require(
        "verifier.complete", not missing, code="VERIFIER_INCOMPLETE", reason="everything the policy asks was looked at",
        expected="every check passed", actual=missing or "every check passed", cite="RFC 9334 §7",
    )  # fmt: skip


def _guarded(checks: Checks, step: Callable[[], T]) -> T | None:
    """Run *step*. Parsers refuse with `FormatError`; whatever else escapes is our own fault, and must not be a way to
    stop a client from refusing. The message stays out: it may quote the evidence."""
    try:
        return step()
    except Exception as err:
        checks.require(
            "verifier.fault", False, code="VERIFIER_FAULT", reason="the verifier itself failed: please report this",
            actual=type(err).__name__, cite="RFC 9334 §7",
        )  # fmt: skip
        return None


def _anchors(policy: Policy, *, gpu: bool) -> tuple[TrustAnchor, ...]:
    pairs = [("Intel SGX Root CA", policy.roots.intel, OURS.intel)]
    if gpu:
        pairs += [
            ("NVIDIA Device Identity CA", policy.roots.nvidia_device, OURS.nvidia_device),
            ("NVIDIA CoRIM signing Root CA", policy.roots.nvidia_rim, OURS.nvidia_rim),
        ]
    return tuple(TrustAnchor(name, hashlib.sha256(der).digest(), der == ours) for name, der, ours in pairs)
