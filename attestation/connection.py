"""Step (7) of the verifier: the proof that one connection ends in the TD whose certificate was accepted.

A relay that holds a stolen key, or a certificate made elsewhere, must bring a fresh quote of the same TD on the same
platform over this client's nonce, this connection's exporter and this certificate's key. It cannot. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attestation import binding
from attestation.channel import ChannelProof
from attestation.claims import Claims
from attestation.endorsements import Endorsements
from attestation.errors import FormatError
from attestation.evidence import Evidence
from attestation.gpu import GpuFacts
from attestation.policy import Policy, Skip
from attestation.ratls import Leaf
from attestation.result import AttestationResult, Check, Checks
from attestation.steps import DCAP, RATLS, appraise_devices, appraise_quote
from attestation.tdx import CrlNumbers, Quote
from attestation.tdx.certificates import pck_extension, read_certificate, signature_holds

__all__ = ["appraise_connection"]

_SAME_TD = ("mrtd", "rtmrs", "mrseam", "td_attributes", "xfam", "mrconfigid", "mrowner", "mrownerconfig")


def appraise_connection(
    first: AttestationResult,
    evidence: Evidence,
    endorsements: Endorsements,
    policy: Policy,
    proof: ChannelProof,
    *,
    now: int,
    crl_floor: CrlNumbers | None,
    checks: Checks,
) -> None:
    """*first* is the accepted result of this leaf, checked by the caller; what is asked here goes into *checks*."""
    leaf = Leaf.parse(evidence.leaf)
    claims = Claims.decode(leaf.extension.claims)
    certificate = Quote.parse(leaf.extension.quote)
    checks.require(
        "channel.time", leaf.not_before <= now < leaf.not_after and now <= first.valid_until, code="CHANNEL_EXPIRED",
        reason="nothing that the first verdict rests on has ended", expected=f"until {first.valid_until}", actual=now,
        cite=RATLS,
    )  # fmt: skip
    _binding(policy, proof, checks)
    quote = checks.parse(
        "channel.form", lambda: Quote.parse(proof.quote), reason="the connection's quote is well formed", cite=DCAP
    )
    if quote is None:
        return
    if quote.repeated == certificate.repeated and not _older_crl(first, crl_floor):
        _signature(quote, checks)
    else:
        _from_the_start(certificate, quote, endorsements, policy, now, crl_floor, checks)
    k = claims.key_hash
    fresh = None if proof.gpu is None else binding.gpu_digest(proof.gpu)
    own_leaf = binding.connection_leaf(k, proof.exporter, proof.nonce, leaf.extension.claims, fresh, proof.binding)
    checks.equal(
        "channel.report-data", binding.merkle_root(own_leaf, proof.path), quote.body.report_data,
        code="CHANNEL_REPORT_DATA", reason="the quote commits to this connection: nonce, exporter and key",
        cite=RATLS,
    )  # fmt: skip
    _fresh_gpu(first, endorsements, policy, proof, claims.key_hash, now, checks)


def _binding(policy: Policy, proof: ChannelProof, checks: Checks) -> None:
    wanted = policy.channel.proof
    if isinstance(wanted, Skip):
        checks.skip("channel.binding", wanted.why, cite="RFC 8446 §7.5")
        return
    checks.require(
        "channel.binding", proof.binding == "exporter" or wanted == "key", code="CHANNEL_BINDING",
        reason="the proof is bound to what the policy asks for", expected=wanted, actual=proof.binding,
        cite="RFC 8446 §7.5",
    )  # fmt: skip


def _signature(quote: Quote, checks: Checks) -> None:
    """The same TD, quoting enclave and platform as in the certificate's quote, byte for byte: all that was found about
    it holds as long as `first` does, and the attestation key's signature over the new REPORTDATA is what is left."""
    checks.require(
        "channel.same-quote", True, code="CHANNEL_TD",
        reason="but for REPORTDATA and its signature, the quote is the certificate's, byte for byte", cite=RATLS,
    )  # fmt: skip
    checks.require(
        "channel.quote-signature", signature_holds(quote.attestation_key, quote.signature, quote.signed),
        code="TDX_QUOTE_SIGNATURE", reason="the attestation key signed header and TD report", cite=DCAP,
    )  # fmt: skip


def _from_the_start(
    certificate: Quote,
    quote: Quote,
    endorsements: Endorsements,
    policy: Policy,
    now: int,
    crl_floor: CrlNumbers | None,
    checks: Checks,
) -> None:
    """A quote that differs in more, such as one from a restarted quoting enclave: the whole checklist again."""
    checks.skip("channel.same-quote", "it differs from the certificate's in more: judged from the start", cite=RATLS)
    own = Checks()
    skip = Skip("compared with the certificate's quote instead")
    appraise_quote(quote.raw, endorsements.collateral, policy, skip, now, crl_floor, own)
    checks.extend(_prefixed(own))
    _same(certificate, quote, checks)


def _older_crl(first: AttestationResult, floor: CrlNumbers | None) -> bool:
    """Whether a newer CRL was seen since *first*: it may revoke what *first* rests on."""
    seen = CrlNumbers(**first.claims["tdx"]["crl_numbers"])
    return floor is not None and seen.merge(floor) != seen.merge(CrlNumbers())


def _same(certificate: Quote, quote: Quote, checks: Checks) -> None:
    """Registers and platform. With the key alone, a broken machine elsewhere could sign for this one."""
    one, two = certificate.body, quote.body
    differing = [f for f in _SAME_TD if getattr(one, f) != getattr(two, f)]
    checks.require(
        "channel.same-td", not differing, code="CHANNEL_TD", reason="the connection's quote shows the same TD",
        expected="equal registers", actual=differing or "equal registers", cite=RATLS,
    )  # fmt: skip
    first, second = _platform(certificate), _platform(quote)
    checks.require(
        "channel.same-platform", first is not None and first == second, code="CHANNEL_PLATFORM",
        reason="the connection's quote comes from the platform of the certificate's",
        expected=first or "a PCK certificate", actual=second or "none", cite=RATLS,
    )  # fmt: skip


def _platform(quote: Quote) -> tuple[bytes, bytes] | None:
    """Platform instance id (b"" without one) and PPID out of the PCK certificate."""
    try:
        sgx = read_certificate(quote.pck_chain[0]).sgx
        pck = pck_extension(sgx) if sgx is not None else None
    except FormatError:
        return None
    return None if pck is None else (pck.platform_instance_id or b"", pck.ppid)


def _fresh_gpu(
    first: AttestationResult,
    endorsements: Endorsements,
    policy: Policy,
    proof: ChannelProof,
    k: bytes,
    now: int,
    checks: Checks,
) -> None:
    if not policy.channel.fresh_gpu:
        checks.skip("channel.gpu", "the policy does not ask for GPU evidence per connection", cite=RATLS)
        return
    if proof.gpu is None or isinstance(policy.gpu, Skip):
        checks.require(
            "channel.gpu", False, code="GPU_ABSENT", reason="fresh GPU evidence for this connection",
            expected="evidence", actual="none", cite=RATLS,
        )  # fmt: skip
        return
    own = Checks()
    nonce = binding.connection_gpu_nonce(k, proof.exporter or bytes(binding.EXPORTER_SIZE), proof.nonce)
    facts = appraise_devices(proof.gpu, endorsements, policy, nonce, now, own)
    checks.extend(_prefixed(own))
    seen, before = _devices(facts), _accepted_devices(first)
    checks.require(
        "channel.gpu", bool(seen) and seen == before, code="CHANNEL_GPU",
        reason="the devices are those of the certificate", expected=before, actual=seen or "none", cite=RATLS,
    )  # fmt: skip


def _devices(facts: GpuFacts | None) -> list[str]:
    return sorted(f"{d.kind} {d.ik_serial} {d.driver} {d.vbios}" for d in facts.devices) if facts else []


def _accepted_devices(first: AttestationResult) -> list[str]:
    devices = first.claims.get("gpu", {}).get("devices", [])
    return sorted(f"{d['kind']} {d['serial']} {d['driver']} {d['vbios']}" for d in devices)


def _prefixed(checks: Checks) -> Iterator[Check]:
    return (replace(c, id=f"channel.{c.id}") for c in checks)
