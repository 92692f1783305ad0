"""The channel proof: only the TD of the certificate, on its platform, over this very connection, is accepted."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from attestation.channel import ChannelProof
from attestation.evidence import Evidence
from attestation.policy import Roots, platform_policy, with_roots
from attestation.result import AttestationResult, Status
from attestation.tdx import CrlNumbers, Quote
from attestation.verifier import verify_channel, verify_quote
from tests.devtee.pki import Pki
from tests.devtee.tdx import CollateralSpec, QuoteForm
from tests.devtee.tee import DevTee
from tests.genuine import EXPORTER, NONCE, NOW, Genuine, any_reason, genuine, gpu_serial, machine

OTHER = hashlib.sha256(b"something else").digest()
FRESH = {"channel.fresh-gpu": True}


def edited(proof: ChannelProof, **changes: Any) -> ChannelProof:
    return dataclasses.replace(proof, **changes)


@pytest.mark.parametrize(
    "how",
    [
        {}, {"others": 1}, {"others": 1, "place": 1}, {"others": 6, "place": 3}, {"others": 1023, "place": 1023},
        {"nonce": OTHER}, {"exporter": OTHER}, {"gpu": True},
    ],
)  # fmt: skip
def test_a_genuine_proof_is_accepted(how: dict[str, Any]) -> None:
    honest = genuine()
    result = honest.verify_channel(honest.channel(**how))
    assert (result.verdict, result.codes) == ("accepted", ())
    path = len(honest.channel(**how).path)
    assert result.claims["channel"] == {"binding": "exporter", "group": "X25519MLKEM768", "merkle_path": path}
    assert not any(text.startswith("channel:") for text in result.not_proven)
    assert result.claims["leaf"] == hashlib.sha256(honest.evidence.leaf).hexdigest()


def test_the_checks_of_the_first_verdict_come_first() -> None:
    honest = genuine()
    first = honest.verify()
    result = honest.verify_channel(honest.channel(), first=first)
    assert result.checks[: len(first.checks)] == first.checks
    assert all(c.id.startswith(("channel.", "verifier.")) for c in result.checks[len(first.checks) :])


def other_platform(honest: Genuine) -> DevTee:
    """A broken machine under the same Intel root: it signs any registers, but its PCK certificate names it."""
    ours = honest.tee.pki
    import dataclasses as d

    from tests.devtee.pki import _intel

    facts = d.replace(ours.facts, ppid=b"p" * 16, piid=b"q" * 16)
    made = _intel(facts)
    # Its PCK certificate is issued by our CA: build the same certificate under our keys.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    theirs, ca = made["intel-pck"], ours["intel-platform-ca"]
    builder = (
        x509.CertificateBuilder()
        .subject_name(theirs.cert.subject)
        .issuer_name(ca.cert.subject)
        .public_key(theirs.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(theirs.cert.not_valid_before_utc)
        .not_valid_after(theirs.cert.not_valid_after_utc)
    )
    for extension in theirs.cert.extensions:
        value = extension.value
        if isinstance(value, x509.AuthorityKeyIdentifier):
            value = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
        builder = builder.add_extension(value, extension.critical)
    pck = type(theirs)(theirs.key, builder.sign(ca.key, hashes.SHA256()))
    tee = DevTee(Pki(facts, {**ours.entities, "intel-pck": pck}, ours.gpus))
    tee.td = honest.tee.td
    return tee


Lie = Callable[[Genuine], ChannelProof]
LIES: dict[str, tuple[Lie, tuple[str, ...]]] = {
    "a quote over another nonce": (lambda h: h.channel(signed_nonce=OTHER), ("CHANNEL_REPORT_DATA",)),
    "a quote over another exporter": (lambda h: h.channel(signed_exporter=OTHER), ("CHANNEL_REPORT_DATA",)),
    "a relay with an exporter of its own": (
        lambda h: edited(h.channel(), exporter=OTHER), ("CHANNEL_REPORT_DATA",),
    ),
    "a replayed proof": (lambda h: edited(h.channel(nonce=OTHER), nonce=NONCE), ("CHANNEL_REPORT_DATA",)),
    "a quote for another key": (lambda h: h.channel(k=b"k" * 48), ("CHANNEL_REPORT_DATA",)),
    "a quote for other claims": (lambda h: h.channel(claims=b"\xa0"), ("CHANNEL_REPORT_DATA",)),
    "the certificate's own quote": (
        lambda h: edited(h.channel(), quote=h.tee.quote(hashlib.sha256(h.claims.encode()).digest() + bytes(32))),
        ("CHANNEL_REPORT_DATA",),
    ),
    "the path of another connection": (
        lambda h: edited(h.channel(others=3, place=1), path=h.channel(others=3, place=2).path),
        ("CHANNEL_REPORT_DATA",),
    ),
    "a path where none is": (
        lambda h: edited(h.channel(), path=(("left", bytes(64)),)), ("CHANNEL_REPORT_DATA",),
    ),
    "half a path": (
        lambda h: edited(p := h.channel(others=7, place=2), path=p.path[:-1]), ("CHANNEL_REPORT_DATA",),
    ),
    "bound to the key where the exporter is asked for": (
        lambda h: h.channel(binding_="key"), ("CHANNEL_BINDING",),
    ),
    "an exporter proof relabelled as a key proof": (
        lambda h: edited(h.channel(), binding="key", exporter=None), ("CHANNEL_BINDING", "CHANNEL_REPORT_DATA"),
    ),
    "another TD of the machine": (lambda h: h.channel(td={"mrtd": b"m" * 48}), ("CHANNEL_TD",)),
    "the same TD after another item was measured": (
        lambda h: h.channel(td={"rtmr": (*h.tee.td.rtmr[:3], b"r" * 48)}), ("CHANNEL_TD",),
    ),
    "the same TD with a debugger": (
        lambda h: h.channel(td={"td_attributes": 0x10000001}),
        ("TDX_ATTRIBUTES", "CHANNEL_TD"),
    ),
    "another platform under the same root": (
        lambda h: h.channel(tee=other_platform(h)), ("TDX_PLATFORM", "CHANNEL_PLATFORM"),
    ),
    "another machine": (
        lambda h: h.channel(tee=DevTee(machine(1))),
        ("TDX_PCK_CHAIN", "TDX_PCK_ROLE", "CHANNEL_TD", "CHANNEL_PLATFORM"),
    ),
    "no quote": (lambda h: edited(h.channel(), quote=b""), ("FORMAT_TDX_SIZE",)),
    "half a quote": (lambda h: edited(p := h.channel(), quote=p.quote[:2000]), ("FORMAT_TDX_LENGTH",)),
    "GPU evidence that the quote does not commit to": (
        lambda h: edited(h.channel(), gpu=b"evidence"), ("CHANNEL_REPORT_DATA",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_the_channel_is_refused_with_its_codes(name: str) -> None:
    lie, codes = LIES[name]
    honest = genuine()
    result = honest.verify_channel(lie(honest))
    if name == "another machine":
        assert {"CHANNEL_TD", "CHANNEL_PLATFORM", "TDX_PCK_CHAIN"} <= set(result.codes)
    else:
        assert result.codes == codes
    assert (result.verdict, dict(result.claims), result.valid_until) == ("refused", {}, 0)


def test_another_platform_is_refused_though_no_policy_lists_platforms() -> None:
    honest = genuine(policy={"tdx.platforms": any_reason()})
    assert honest.verify_channel(honest.channel(tee=other_platform(honest))).codes == ("CHANNEL_PLATFORM",)


def test_a_proof_for_another_certificate_is_refused() -> None:
    """Same TD, same connection, a certificate of another key: the result names the leaf that was accepted."""
    honest, other = genuine(), genuine(key=1)
    result = honest.verify_channel(honest.channel(), first=other.verify())
    assert result.codes == ("CHANNEL_LEAF",)
    result = honest.verify_channel(other.channel())
    assert result.codes == ("CHANNEL_REPORT_DATA",)


@pytest.mark.parametrize("leaf", [b"", b"junk", b"\x30\x03\x02\x01\x01"])
def test_another_leaf_than_the_accepted_one_is_never_parsed(leaf: bytes) -> None:
    honest = genuine()
    evidence = Evidence(leaf, b"", b"", b"", b"", b"")
    assert honest.verify_channel(honest.channel(), evidence=evidence).codes == ("CHANNEL_LEAF",)


def test_a_refused_first_verdict_stays_refused_and_nothing_more_is_looked_at() -> None:
    honest = genuine(name="other.test")
    result = honest.verify_channel(honest.channel())
    assert result.codes == ("LEAF_NAME", "CHANNEL_LEAF")
    assert not any(c.id.startswith("channel.tdx") for c in result.checks)


def test_a_verdict_about_a_bare_quote_is_no_first_verdict() -> None:
    honest = genuine()
    policy = platform_policy(roots=honest.policy.roots)
    bare = verify_quote(honest.tee.quote(bytes(64)), honest.endorsements.collateral, policy, now=honest.now)
    assert bare.accepted
    result = honest.verify_channel(honest.channel(), first=bare, policy=policy)
    assert "CHANNEL_LEAF" in result.codes


def test_a_verdict_about_a_saved_bundle_is_no_first_verdict() -> None:
    """Nobody dialled its name: a connection accepted on it could be anybody's."""
    honest = genuine(name=None)
    assert honest.verify().accepted
    result = honest.verify_channel(honest.channel())
    assert result.codes == ("VERIFIER_INCOMPLETE",)
    assert result.failed[0].actual == "leaf.name"


def test_both_parts_are_judged_under_one_policy_and_its_roots() -> None:
    honest = genuine()
    other = genuine(policy={"tdx.min-tcb-evaluation": 19})
    assert honest.verify_channel(honest.channel(), policy=other.policy).codes == ("CHANNEL_POLICY",)
    roots = Roots(honest.policy.roots.intel, honest.policy.roots.nvidia_device, honest.policy.roots.intel)
    moved = dataclasses.replace(honest.policy, roots=roots)
    assert moved.label == honest.policy.label
    assert honest.verify_channel(honest.channel(), policy=moved).codes == ("CHANNEL_POLICY",)
    assert with_roots(honest.policy, roots).label != honest.policy.label


@pytest.mark.parametrize(
    ("now", "codes"),
    [
        (NOW + 3000, ()), (NOW + 3001, ("CHANNEL_EXPIRED",)), (NOW + 3600, ("CHANNEL_EXPIRED",)),
        (NOW - 1, ("CHANNEL_EXPIRED",)),
    ],
)  # fmt: skip
def test_a_proof_after_the_end_of_the_first_verdict_is_refused(now: int, codes: tuple[str, ...]) -> None:
    """A remembered verdict must not outlive the status list, the certificate, or anything else it rests on."""
    honest = genuine()
    assert honest.verify_channel(honest.channel(), now=now).codes == codes


@pytest.mark.parametrize("group", ["X25519", "secp256r1", ""])
def test_a_key_exchange_that_a_quantum_computer_breaks_is_not_kept_quiet(group: str) -> None:
    honest = genuine()
    result = honest.verify_channel(honest.channel(), group=group)
    assert result.accepted
    assert result.claims["channel"]["group"] == group
    assert sum(text.startswith("secrecy:") for text in result.not_proven) == 1


def another_quoting_enclave(honest: Genuine, proof: ChannelProof, **form: Any) -> ChannelProof:
    """The same TD and REPORTDATA, quoted by an enclave that was set up anew."""
    report_data = Quote.parse(proof.quote).body.report_data
    return edited(proof, quote=honest.tee.quote(report_data, form=QuoteForm(auth_data=b"another" + bytes(25), **form)))


def test_a_quote_that_repeats_the_certificates_costs_one_signature() -> None:
    honest = genuine()
    result = honest.verify_channel(honest.channel())
    passed = {c.id for c in result.checks if c.status is Status.PASS}
    assert {"channel.same-quote", "channel.quote-signature"} <= passed
    assert not any(c.id.startswith("channel.tdx.") for c in result.checks)


def test_the_signature_of_a_quote_that_repeats_the_certificates_is_verified() -> None:
    honest = genuine()
    proof = honest.channel()
    quote = Quote.parse(proof.quote)
    at = proof.quote.index(quote.signature)
    for place in (at, at + 63):
        forged = bytearray(proof.quote)
        forged[place] ^= 1
        assert honest.verify_channel(edited(proof, quote=bytes(forged))).codes == ("TDX_QUOTE_SIGNATURE",)
    # REPORTDATA is all that may differ, and it is signed.
    moved = proof.quote.replace(quote.body.report_data, bytes(64))
    assert honest.verify_channel(edited(proof, quote=moved)).codes == ("TDX_QUOTE_SIGNATURE", "CHANNEL_REPORT_DATA")


@pytest.mark.parametrize("at", [16, 28, 48, 184, 519, 704, 1100, 1200, 1300, -1])
def test_any_other_byte_sends_a_quote_through_the_whole_checklist(at: int) -> None:
    """Header, TD report before REPORTDATA, QE report, its signature, its authentication data, the PCK chain."""
    honest = genuine()
    proof = honest.channel()
    changed = bytearray(proof.quote)
    changed[at] ^= 1
    result = honest.verify_channel(edited(proof, quote=bytes(changed)))
    assert result.verdict == "refused"
    assert not any(c.id == "channel.same-quote" and c.status is Status.PASS for c in result.checks)


def test_a_quote_of_another_quoting_enclave_is_judged_from_the_start() -> None:
    honest = genuine()
    proof = another_quoting_enclave(honest, honest.channel())
    result = honest.verify_channel(proof)
    assert result.accepted
    assert {"channel.tdx.qe-signature", "channel.same-td"} <= {c.id for c in result.checks if c.status is Status.PASS}
    revoked = honest.tee.collateral(NOW, CollateralSpec(revoked=frozenset({"intel-pck"})))
    worse = dataclasses.replace(honest.endorsements, collateral=revoked)
    assert honest.verify_channel(proof, endorsements=worse).codes == ("TDX_REVOKED",)
    none = dataclasses.replace(honest.endorsements, collateral=b"")
    assert honest.verify_channel(proof, endorsements=none).codes == ("TDX_COLLATERAL",)
    stranger = another_quoting_enclave(honest, honest.channel(), qe_mrsigner=bytes(32))
    assert "TDX_QE_IDENTITY" in honest.verify_channel(stranger).codes


def test_a_newer_crl_seen_since_sends_the_quote_through_the_whole_checklist() -> None:
    honest = genuine()
    assert honest.verify_channel(honest.channel(), crl_floor=CrlNumbers(root=1)).accepted
    assert honest.verify_channel(honest.channel(), crl_floor=CrlNumbers(root=2)).codes == ("TDX_CRL_ROLLBACK",)


def test_a_policy_for_the_key_binding_takes_either_and_says_which() -> None:
    honest = genuine(policy={"channel.proof": "key"})
    result = honest.verify_channel(honest.channel(binding_="key"))
    assert result.accepted
    assert result.claims["channel"]["binding"] == "key"
    assert any("bound to the key" in text for text in result.not_proven)
    assert honest.verify_channel(honest.channel()).accepted


def test_a_policy_that_asks_no_proof_still_judges_one() -> None:
    honest = genuine(policy={"channel.proof": any_reason()})
    assert honest.verify_channel(honest.channel()).accepted
    assert honest.verify_channel(honest.channel(signed_nonce=OTHER)).codes == ("CHANNEL_REPORT_DATA",)


def test_fresh_gpu_evidence_is_asked_for_and_judged() -> None:
    honest = genuine(policy=FRESH)
    result = honest.verify_channel(honest.channel(gpu=True))
    assert result.codes == ()
    passed = {c.id for c in result.checks if c.status is Status.PASS}
    assert {"channel.gpu.nonce", "channel.gpu.signature", "channel.gpu.ocsp-device", "channel.gpu"} <= passed


@pytest.mark.parametrize(
    ("how", "codes"),
    [
        ({}, ("GPU_ABSENT",)),
        ({"gpu": True, "gpu_exporter": OTHER}, ("GPU_NONCE", "CHANNEL_GPU")),
        ({"gpu": True, "gpu_indices": (1,)}, ("GPU_OCSP_MISSING", "CHANNEL_GPU")),
        ({"gpu": True, "gpu_indices": (0, 1)}, ("GPU_COUNT", "GPU_OCSP_MISSING", "CHANNEL_GPU")),
    ],
)  # fmt: skip
def test_a_lie_about_fresh_gpu_evidence_is_refused(how: dict[str, Any], codes: tuple[str, ...]) -> None:
    honest = genuine(policy=FRESH)
    assert honest.verify_channel(honest.channel(**how)).codes == codes


def test_another_gpu_than_the_certificates_is_seen_though_it_is_genuine_and_the_operators() -> None:
    """A GPU exchanged after the certificate was made: it passes every stage, and is another."""
    honest, both = genuine(policy=FRESH), genuine(gpus=(0, 1))
    known = dataclasses.replace(honest.endorsements, ocsp=both.endorsements.ocsp)
    result = honest.verify_channel(honest.channel(gpu=True, gpu_indices=(1,)), endorsements=known)
    assert result.codes == ("CHANNEL_GPU",)
    assert gpu_serial(machine(), 1).hex() in next(c.actual for c in result.failed)


def test_evidence_not_asked_for_is_covered_and_not_judged() -> None:
    honest = genuine()
    result = honest.verify_channel(honest.channel(gpu=True))
    assert result.accepted
    assert [c.id for c in result.checks if c.status is Status.SKIP and c.id.startswith("channel.")] == [
        *(c.id for c in result.checks if c.id.startswith("channel.tdx") and c.status is Status.SKIP), "channel.gpu",
    ]  # fmt: skip


def test_version_5_quotes_of_the_same_td_are_taken() -> None:
    honest = genuine()
    proof = honest.channel()
    again = honest.tee.quote(Quote.parse(proof.quote).body.report_data, form=QuoteForm(version=5, body="1.5"))
    assert honest.verify_channel(edited(proof, quote=again)).accepted


def test_a_connection_step_that_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = genuine()
    proof, first = honest.channel(), honest.verify()
    monkeypatch.setattr("attestation.verifier.appraise_connection", lambda *a, **k: None)
    assert honest.verify_channel(proof, first=first).codes == ("VERIFIER_INCOMPLETE",)


@pytest.mark.parametrize("step", ["_signature", "_from_the_start"])
def test_a_quote_that_nobody_judged_is_refused(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = genuine()
    proof, first = honest.channel(), honest.verify()
    if step == "_from_the_start":
        proof = another_quoting_enclave(honest, proof)
    monkeypatch.setattr(f"attestation.connection.{step}", lambda *a, **k: None)
    assert honest.verify_channel(proof, first=first).codes == ("VERIFIER_INCOMPLETE",)


def test_fresh_evidence_that_nobody_judged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = genuine(policy=FRESH)
    proof, first = honest.channel(gpu=True), honest.verify()
    monkeypatch.setattr("attestation.connection._fresh_gpu", lambda *a, **k: None)
    assert honest.verify_channel(proof, first=first).codes == ("VERIFIER_INCOMPLETE",)


def test_the_exporter_reaches_the_formula_as_the_client_has_it() -> None:
    honest = genuine()
    assert honest.channel().exporter == EXPORTER
    result: AttestationResult = verify_channel(
        honest.verify(), honest.evidence, honest.endorsements, honest.policy, honest.channel(), now=honest.now, group=""
    )
    assert result.accepted
