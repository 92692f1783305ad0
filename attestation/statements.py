"""Appraisal of what people signed: release manifest, deployment statement, status list (verifier step 5).

Each is named in the claims by digest, except the status list, which dates itself. Under a policy that pins keys, an
object that is missing, unsigned, out of date or about something else is a refusal. `EVIDENCE_DIGEST` means that the
object offered is not the one the claims name: fetch it again.

A payload is read only after enough pinned keys signed it: what strangers wrote is compared by digest and by signature,
never parsed. Pure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from attestation.claims import Claims
from attestation.deployment import (
    DEPLOYMENT_PAYLOAD_TYPE,
    STATUS_PAYLOAD_TYPE,
    DeploymentStatement,
    SerialFloor,
    StatusList,
    salted,
)
from attestation.dsse import Envelope
from attestation.errors import FormatError
from attestation.evidence import Evidence
from attestation.policy import DeploymentPolicy, Policy, ReleasePolicy, Skip
from attestation.reference_values import RELEASE_PAYLOAD_TYPE, ReleaseManifest
from attestation.result import Checks

__all__ = [
    "Identified", "UrlStatus", "appraise_deployment", "appraise_release", "appraise_status", "read_status",
]  # fmt: skip

_DSSE: Final = "DSSE v1; in-toto Statement v1"
_WHO: Final = "vouchsafe RA-TLS profile, §3.8"
_REFUSED: Final = "not judged: the evidence that would say so was refused"
_UNREAD: Final = "not read: not the document that the claims name, or not enough pinned keys signed it"


@dataclass(frozen=True, slots=True)
class Identified:
    """What only this enclave's evidence shows, asked of the operator's statement: platform of *this* quote, GPUs.

    gpu_serials   identity serials; None when the GPU evidence was refused, empty when the policy asks for none
    """

    piid: bytes | None
    ppid: bytes
    gpu_serials: tuple[bytes, ...] | None


@dataclass(frozen=True, slots=True)
class UrlStatus:
    """What the policy's status URL gave when the client last asked it.

    serial   of a list that enough pinned keys signed (`read_status`); None when it gave none
    why      then why: not reached, or not such a list
    """

    serial: int | None
    why: str = ""


def appraise_release(
    evidence: Evidence, claims: Claims, policy: ReleasePolicy | Skip, *, now: int, checks: Checks
) -> ReleaseManifest | None:
    """The manifest, when it is the one the claims name and enough pinned signers signed it. Its dates and models are
    recorded; registers are compared with it whatever they say, so that a refusal names all that is wrong."""
    if isinstance(policy, Skip):
        checks.skip("release.signers", policy.why, cite=_DSSE)
        return None
    envelope = _envelope(evidence.release, "release", RELEASE_PAYLOAD_TYPE, checks)
    if envelope is None:
        return None
    good = _named(envelope, claims.release, "release", checks)
    good &= _signed(envelope, policy.signers, policy.threshold, "release", "RELEASE_SIGNERS", checks)
    if not good:
        checks.skip("release.form", _UNREAD, cite=_DSSE)
        return None
    manifest = checks.parse(
        "release.form", lambda: ReleaseManifest.parse(envelope.payload), reason="the release manifest is well formed",
        cite=_DSSE,
    )  # fmt: skip
    if manifest is None:
        return None
    checks.require(
        "release.dates", manifest.not_before <= now <= manifest.not_after, code="RELEASE_DATES",
        reason="the release is in force", expected=f"{manifest.not_before} to {manifest.not_after}", actual=now,
        cite=_DSSE,
    )  # fmt: skip
    allowed = [m.id for m in claims.models if m.weights not in manifest.weights.get(m.id, frozenset())]
    checks.require(
        "release.models", not allowed, code="RELEASE_MODELS",
        reason="every model served is one of the release, with its weights",
        expected=sorted(manifest.weights), actual=", ".join(f"{m.id} {m.weights}" for m in claims.models),
        cite="claims: models",
    )  # fmt: skip
    return manifest


def appraise_deployment(
    evidence: Evidence,
    claims: Claims,
    policy: DeploymentPolicy | Skip,
    *,
    who: Identified | None,
    floor: SerialFloor | None,
    now: int,
    checks: Checks,
) -> DeploymentStatement | None:
    """The statement, when it is the one the claims name and enough pinned operator keys signed it. What it covers is
    recorded: dates, serial, names, role, configuration, release, platform, GPUs."""
    if isinstance(policy, Skip):
        checks.skip("deployment.operator", policy.why, cite=_WHO)
        return None
    if claims.deployment is None or not evidence.deployment:
        checks.require(
            "deployment.present", False, code="DEPLOYMENT_ABSENT", reason="the enclave carries a deployment statement",
            expected="a statement", actual="none", cite=_WHO,
        )  # fmt: skip
        return None
    envelope = _envelope(evidence.deployment, "deployment", DEPLOYMENT_PAYLOAD_TYPE, checks)
    if envelope is None:
        return None
    good = _named(envelope, claims.deployment, "deployment", checks)
    good &= _signed(envelope, policy.operators, policy.threshold, "deployment", "DEPLOYMENT_OPERATOR", checks)
    if not good:
        checks.skip("deployment.form", _UNREAD, cite=_WHO)
        return None
    statement = checks.parse(
        "deployment.form", lambda: DeploymentStatement.parse(envelope.payload), reason="the statement is well formed",
        cite=_WHO,
    )  # fmt: skip
    if statement is not None:
        _covers(statement, claims, policy, who, now, checks)
        last = None if floor is None else floor.statement
        _not_older("deployment", "DEPLOYMENT_ROLLBACK", statement.serial, floor is not None, last, checks)
    return statement


def _covers(
    s: DeploymentStatement, claims: Claims, policy: DeploymentPolicy, who: Identified | None, now: int, checks: Checks
) -> None:
    checks.require(
        "deployment.dates", s.not_before <= now <= s.not_after, code="DEPLOYMENT_DATES",
        reason="the statement is in force", expected=f"{s.not_before} to {s.not_after}", actual=now, cite=_WHO,
    )  # fmt: skip
    checks.require(
        "deployment.serial", s.serial >= policy.min_serial, code="DEPLOYMENT_SERIAL",
        reason="the statement is not older than the pinned one", expected=f">= {policy.min_serial}", actual=s.serial,
        cite=_WHO,
    )  # fmt: skip
    checks.require(
        "deployment.names", set(claims.dns_names) <= set(s.dns_names), code="DEPLOYMENT_NAME",
        reason="every name of the certificate is the operator's", expected=s.dns_names, actual=claims.dns_names,
        cite=_WHO,
    )  # fmt: skip
    checks.require(
        "deployment.role", claims.role in s.roles and claims.role == policy.role, code="DEPLOYMENT_ROLE",
        reason="the enclave plays the role that was wanted and granted",
        expected=f"{policy.role}, out of {', '.join(sorted(s.roles))}", actual=claims.role, cite=_WHO,
    )  # fmt: skip
    checks.require(
        "deployment.config", claims.config in s.configs, code="DEPLOYMENT_CONFIG",
        reason="the measured configuration is one the operator signed", expected=s.configs, actual=claims.config,
        cite=_WHO,
    )  # fmt: skip
    checks.require(
        "deployment.release", claims.release in s.releases, code="DEPLOYMENT_RELEASE",
        reason="the release is one the operator runs", expected=s.releases, actual=claims.release, cite=_WHO,
    )  # fmt: skip
    if who is None:
        checks.skip("deployment.platform", _REFUSED, cite=_WHO)
    else:
        checks.require(
            "deployment.platform", s.covers_platform(who.piid, who.ppid), code="DEPLOYMENT_PLATFORM",
            reason="the platform of this quote is one of the operator's", expected=f"one of {len(s.platforms)}",
            actual=salted(s.salt, who.piid or who.ppid), cite=_WHO,
        )  # fmt: skip
    if s.gpus is None:
        checks.skip("deployment.gpus", "the statement does not restrict GPUs", cite=_WHO)
    elif who is None or who.gpu_serials is None:
        checks.skip("deployment.gpus", _REFUSED, cite=_WHO)
    else:
        found = frozenset(salted(s.salt, g) for g in who.gpu_serials)
        checks.require(
            "deployment.gpus", bool(found) and found <= s.gpus, code="DEPLOYMENT_GPUS",
            reason="every GPU is one of the operator's", expected=f"out of {len(s.gpus)}", actual=found or "none",
            cite=_WHO,
        )  # fmt: skip


def appraise_status(
    evidence: Evidence,
    claims: Claims,
    policy: Policy,
    manifest: ReleaseManifest | None,
    statement: DeploymentStatement | None,
    *,
    who: Identified | None,
    floor: SerialFloor | None,
    at_url: UrlStatus | None,
    now: int,
    checks: Checks,
) -> StatusList | None:
    """The status list, when one is required: signed, current, and silent about us.

    Enough operator keys for a deployment statement, or enough release signers for a manifest, must have signed it: a
    single stolen key of several could otherwise clear its own name. *manifest* and *statement* as accepted before."""
    wanted = policy.deployment
    why = wanted if isinstance(wanted, Skip) else wanted.status_list
    if isinstance(wanted, Skip) or isinstance(why, Skip):
        checks.skip("status.list", why.why if isinstance(why, Skip) else "", cite=_WHO)
        return None
    envelope = _envelope(evidence.status, "status", STATUS_PAYLOAD_TYPE, checks)
    if envelope is None:
        return None
    operators, releasers, good = _status_signers(envelope, wanted, policy.release)
    if not checks.require(
        "status.signers", good, code="STATUS_SIGNER",
        reason="enough operator keys, or enough release signers, signed the status list",
        expected=f">= {wanted.threshold} operators, or a manifest's signers", actual=f"{operators}, {releasers}",
        cite=_WHO,
    ):  # fmt: skip
        checks.skip("status.form", _UNREAD, cite=_WHO)
        return None
    status = checks.parse(
        "status.form", lambda: StatusList.parse(envelope.payload), reason="the list is well formed", cite=_WHO
    )
    if status is None:
        return None
    checks.require(
        "status.current", status.issued_at <= now <= status.next_update, code="STATUS_EXPIRED",
        reason="the status list is current", expected=f"{status.issued_at} to {status.next_update}", actual=now,
        cite=_WHO,
    )  # fmt: skip
    last = None if floor is None else floor.status
    _not_older("status", "STATUS_ROLLBACK", status.serial, floor is not None, last, checks)
    _beside_url(status, wanted.status_url, at_url, checks)
    denied = _denied(status, claims, statement, who)
    checks.require(
        "status.denied", not denied, code="STATUS_DENIED", reason="nothing of this enclave has been withdrawn",
        expected="none", actual=denied or "none", cite=_WHO,
    )  # fmt: skip
    if statement is not None:
        _keys_left("status.operator-keys", evidence.deployment, wanted.operators, wanted.threshold, status, checks)
    if manifest is not None and not isinstance(policy.release, Skip):
        signers, threshold = policy.release.signers, policy.release.threshold
        _keys_left("status.release-keys", evidence.release, signers, threshold, status, checks)
    return status


def read_status(raw: bytes, policy: Policy) -> StatusList | None:
    """*raw* as a status list that enough keys of *policy* signed, whatever its dates say; None for anything else.
    For a client that has lists from several places, and must know which is the newest before one is judged."""
    wanted = policy.deployment
    if isinstance(wanted, Skip) or isinstance(wanted.status_list, Skip):
        return None
    try:
        envelope = Envelope.parse(raw)
        if envelope.payload_type != STATUS_PAYLOAD_TYPE or not _status_signers(envelope, wanted, policy.release)[2]:
            return None
        return StatusList.parse(envelope.payload)
    except FormatError:
        return None


def _status_signers(
    envelope: Envelope, wanted: DeploymentPolicy, release: ReleasePolicy | Skip
) -> tuple[int, int, bool]:
    """How many operators and release signers signed, and whether either are enough; operators are asked first."""
    operators = len(envelope.signers(wanted.operators))
    if operators >= wanted.threshold or isinstance(release, Skip):
        return operators, 0, operators >= wanted.threshold
    releasers = len(envelope.signers(release.signers))
    return operators, releasers, releasers >= release.threshold


def _not_older(what: str, code: str, serial: int, given: bool, last: int | None, checks: Checks) -> None:
    """An older document may be one that was withdrawn, though it is well signed and still in its dates."""
    if not given:
        checks.skip(f"{what}.serial-seen", "no serials seen earlier were given", cite=_WHO)
        return
    checks.require(
        f"{what}.serial-seen", last is None or serial >= last, code=code,
        reason="its serial is not lower than the last one seen",
        expected="any: none seen yet" if last is None else f">= {last}", actual=serial, cite=_WHO,
    )  # fmt: skip


def _beside_url(status: StatusList, url: str | Skip, found: UrlStatus | None, checks: Checks) -> None:
    """Whoever hands over the evidence can hold a newer list back: the one at the pinned URL is his rival."""
    if isinstance(url, Skip):
        checks.skip("status.url", url.why, cite=_WHO)
    elif found is None:
        checks.skip("status.url", "nobody asked the pinned URL: the evidence's list alone was judged", cite=_WHO)
    elif found.serial is None:
        checks.skip("status.url", f"no list from the pinned URL, the newest at hand was judged: {found.why}", cite=_WHO)
    else:
        checks.require(
            "status.url", status.serial >= found.serial, code="STATUS_URL",
            reason="the list is not older than the one at the pinned URL", expected=f">= {found.serial}",
            actual=status.serial, cite=_WHO,
        )  # fmt: skip


def _denied(
    status: StatusList, claims: Claims, statement: DeploymentStatement | None, who: Identified | None
) -> list[str]:
    salt = statement.salt if statement else b""
    platforms = {salted(salt, i) for i in (who.piid, who.ppid) if i is not None} if who else set()
    gpus = {salted(salt, g) for g in who.gpu_serials or ()} if who else set()
    asked = {
        "release": claims.release in status.releases,
        "config": claims.config in status.configs,
        "statement": claims.deployment in status.statements,
        "platform": bool(platforms & status.platforms),
        "gpu": bool(gpus & status.gpus),
    }
    return [name for name, hit in asked.items() if hit]


def _keys_left(id: str, raw: bytes, keys: frozenset[bytes], threshold: int, status: StatusList, checks: Checks) -> None:
    """Whether the document still has enough signatures without the keys withdrawn, listed as the key or its SHA-256."""
    left = frozenset(k for k in keys if k not in status.keys and hashlib.sha256(k).digest() not in status.keys)
    try:
        found = len(Envelope.parse(raw).signers(left))
    except FormatError:
        found = 0  # cannot be: the document was accepted before
    checks.require(
        id, found >= threshold, code="STATUS_DENIED", reason="enough of the keys that signed have not been withdrawn",
        expected=f">= {threshold}", actual=found, cite=_WHO,
    )  # fmt: skip


def _envelope(raw: bytes, what: str, payload_type: str, checks: Checks) -> Envelope | None:
    if not raw:
        checks.require(
            f"{what}.present", False, code="EVIDENCE_DIGEST", reason=f"the {what} document is there",
            expected=payload_type, actual="nothing", cite=_DSSE,
        )  # fmt: skip
        return None
    envelope = checks.parse(f"{what}.envelope", lambda: Envelope.parse(raw), reason="a DSSE envelope", cite=_DSSE)
    if envelope is None:
        return None
    typed = checks.equal(
        f"{what}.type", payload_type, envelope.payload_type, code="STATEMENT_TYPE",
        reason=f"the envelope holds a {what} document", cite=_DSSE,
    )  # fmt: skip
    return envelope if typed else None


def _named(envelope: Envelope, digest: bytes, what: str, checks: Checks) -> bool:
    return checks.equal(
        f"{what}.digest", digest, envelope.digest, code="EVIDENCE_DIGEST",
        reason=f"the {what} document is the one the quote commits to", cite="claims",
    )  # fmt: skip


def _signed(envelope: Envelope, keys: frozenset[bytes], threshold: int, what: str, code: str, checks: Checks) -> bool:
    found = len(envelope.signers(keys))
    return checks.require(
        f"{what}.signers", found >= threshold, code=code,
        reason=f"{threshold} of {len(keys)} pinned keys signed the {what} document",
        expected=f">= {threshold}", actual=found, cite=_DSSE,
    )  # fmt: skip
