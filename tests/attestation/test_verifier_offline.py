"""The offline halves: one quote, or one set of GPU reports, under the policy `platform` or a stricter one."""

from __future__ import annotations

import dataclasses

import pytest

from attestation.gpu import GpuEndorsements, GpuEvidence, decode
from attestation.policy import Skip, platform_policy
from attestation.ratls import Leaf
from attestation.result import Status
from attestation.tdx import CrlNumbers
from attestation.verifier import verify_gpu, verify_quote
from tests.devtee.tdx import CollateralSpec
from tests.genuine import NOW, Genuine, any_reason, genuine

NONCE = b"n" * 32


def gpu_of(honest: Genuine) -> tuple[GpuEvidence, GpuEndorsements, bytes]:
    from attestation import binding

    carried = Leaf.parse(honest.evidence.leaf).extension.gpu
    assert carried is not None
    assert honest.claims.gpu_nonce is not None
    nonce = binding.gpu_nonce(honest.claims.key_hash, honest.claims.gpu_nonce.issued_at, honest.claims.gpu_nonce.salt)
    return decode(carried), GpuEndorsements(honest.endorsements.rims, honest.endorsements.ocsp), nonce


def test_a_quote_alone_is_accepted_and_says_what_it_was_not_asked() -> None:
    honest = genuine()
    policy = platform_policy(roots=honest.policy.roots)
    quote = Leaf.parse(honest.evidence.leaf).extension.quote
    result = verify_quote(quote, honest.endorsements.collateral, policy, now=NOW, event_log=honest.evidence.event_log)
    assert (result.verdict, result.development, result.codes) == ("accepted", True, ())
    skipped = {c.id: c.reason for c in result.checks if c.status is Status.SKIP}
    assert {"tdx.report-data", "tdx.mrtd", "tdx.rtmr0", "tdx.mrseam", "tdx.platform"} <= skipped.keys()
    assert all(skipped.values())
    assert any("REPORTDATA" in text for text in result.not_proven)
    assert [a.name for a in result.anchors] == ["Intel SGX Root CA"]
    assert result.valid_until > NOW


def test_a_quote_whose_log_tells_another_boot_is_refused() -> None:
    honest, other = genuine(), genuine(extra_after_seal=[b"{}"], log_items_edit=lambda items: [*items, b"{}"])
    policy = platform_policy(roots=honest.policy.roots)
    quote = Leaf.parse(honest.evidence.leaf).extension.quote
    collateral = honest.endorsements.collateral
    assert verify_quote(quote, collateral, policy, now=NOW, event_log=other.evidence.event_log).codes == (
        "TDX_EVENT_LOG",
    )
    assert verify_quote(quote, collateral, policy, now=NOW, event_log=b"junk").codes == ("FORMAT_TDX_EVENT_LOG",)
    assert verify_quote(quote, collateral, policy, now=NOW, event_log=b"").codes == ("FORMAT_TDX_EVENT_LOG",)


@pytest.mark.parametrize(
    ("quote", "collateral", "code"),
    [
        (b"", None, "FORMAT_TDX_SIZE"), (None, b"", "TDX_COLLATERAL"), (None, b"[]", "FORMAT_TDX_COLLATERAL"),
        (b"", b"", "FORMAT_TDX_SIZE"),
    ],
)  # fmt: skip
def test_a_quote_that_cannot_be_read_is_refused(quote: bytes | None, collateral: bytes | None, code: str) -> None:
    honest = genuine()
    policy = platform_policy(roots=honest.policy.roots)
    raw = Leaf.parse(honest.evidence.leaf).extension.quote if quote is None else quote
    with_it = honest.endorsements.collateral if collateral is None else collateral
    result = verify_quote(raw, with_it, policy, now=NOW)
    assert code in result.codes
    assert not result.accepted


def test_a_quote_is_judged_with_the_floors_given() -> None:
    honest = genuine()
    quote = Leaf.parse(honest.evidence.leaf).extension.quote
    collateral = honest.tee.collateral(NOW, CollateralSpec(evaluation=19))
    for floor, codes in ((19, ()), (20, ("TDX_TCB_EVALUATION",))):
        policy = platform_policy(roots=honest.policy.roots, min_tcb_evaluation=floor)
        assert verify_quote(quote, collateral, policy, now=NOW).codes == codes
    policy = platform_policy(roots=honest.policy.roots, min_tcb_evaluation=19)
    assert verify_quote(quote, collateral, policy, now=NOW, crl_floor=CrlNumbers(root=5)).codes == ("TDX_CRL_ROLLBACK",)


def test_gpu_evidence_alone_is_accepted_for_its_nonce_and_no_other() -> None:
    honest = genuine()
    evidence, hints, nonce = gpu_of(honest)
    policy = platform_policy(roots=honest.policy.roots)
    result = verify_gpu(evidence, hints, policy, nonce=nonce, now=NOW)
    assert (result.verdict, result.development) == ("accepted", True)
    assert result.claims["gpu"]["tied_to_td"] == "relayable"
    assert {a.name for a in result.anchors} == {"NVIDIA Device Identity CA", "NVIDIA CoRIM signing Root CA"}
    assert verify_gpu(evidence, hints, policy, nonce=NONCE, now=NOW).codes == ("GPU_NONCE",)
    assert verify_gpu(evidence, hints, policy, nonce=b"", now=NOW).codes == ("GPU_NONCE",)


def test_fewer_stages_are_told_as_skips() -> None:
    honest = genuine()
    evidence, hints, _ = gpu_of(honest)
    policy = platform_policy(roots=honest.policy.roots, gpu_require=frozenset({"signature", "chain"}))
    result = verify_gpu(evidence, hints, policy, nonce=NONCE, now=NOW)
    assert result.accepted
    assert {"gpu.nonce", "gpu.rim", "gpu.ocsp-device"} <= {c.id for c in result.checks if c.status is Status.SKIP}


def test_no_device_and_no_policy_are_refusals() -> None:
    honest = genuine()
    _, hints, nonce = gpu_of(honest)
    policy = platform_policy(roots=honest.policy.roots)
    assert "FORMAT_GPU_COUNT" in verify_gpu(GpuEvidence(()), hints, policy, nonce=nonce, now=NOW).codes
    bare = genuine(policy={"gpu": any_reason()}).policy
    assert isinstance(bare.gpu, Skip)
    assert verify_gpu(GpuEvidence(()), hints, bare, nonce=nonce, now=NOW).codes == ("RESULT_NOTHING_ASKED",)


@pytest.mark.parametrize("step", ["appraise_gpu", "appraise_quote"])
def test_an_offline_step_that_says_nothing_or_breaks_is_a_refusal(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    honest = genuine()
    evidence, hints, nonce = gpu_of(honest)
    policy = platform_policy(roots=honest.policy.roots)
    quote = Leaf.parse(honest.evidence.leaf).extension.quote

    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    for stub, code in ((lambda *_, **__: None, "VERIFIER_INCOMPLETE"), (broken, "VERIFIER_FAULT")):
        monkeypatch.setattr(f"attestation.verifier.{step}", stub)
        if step == "appraise_gpu":
            assert verify_gpu(evidence, hints, policy, nonce=nonce, now=NOW).codes == (code,)
        else:
            assert verify_quote(quote, honest.endorsements.collateral, policy, now=NOW).codes == (code,)


def test_rims_and_answers_that_are_missing_are_refusals() -> None:
    honest = genuine()
    evidence, hints, nonce = gpu_of(honest)
    policy = platform_policy(roots=honest.policy.roots)
    assert (
        "GPU_RIM_MISSING"
        in verify_gpu(evidence, dataclasses.replace(hints, rims={}), policy, nonce=nonce, now=NOW).codes
    )
    assert (
        "GPU_OCSP_MISSING"
        in verify_gpu(evidence, dataclasses.replace(hints, ocsp={}), policy, nonce=nonce, now=NOW).codes
    )
