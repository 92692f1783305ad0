"""The verifier: the genuine enclave is accepted, and every lie is refused for exactly its own reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from attestation.policy import Skip, platform_policy
from attestation.result import Status
from attestation.verifier import verify
from tests.genuine import NOW, Genuine, any_reason, genuine, operator_key, signer_key
from tests.lies import LIES


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_with_exactly_its_codes(name: str) -> None:
    changes, codes = LIES[name]
    result = genuine(**changes).verify()
    assert result.codes == codes
    assert result.verdict == "refused"
    assert (dict(result.claims), result.valid_until) == ({}, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"name": None}, {"name": "demo.vouchsafe.test"}, {"gpus": ()}, {"gpus": tuple(range(8))},
        {"quote_form": None, "models": ()}, {"names": ("demo.vouchsafe.test", "spare.vouchsafe.test")},
        {"statement": {"gpus": None}}, {"statement": {"platforms": [("piid", b"i" * 16), ("piid", b"j" * 16)]}},
    ],
)  # fmt: skip
def test_a_genuine_enclave_is_accepted(changes: dict[str, Any]) -> None:
    if "platforms" in changes.get("statement", {}):
        platform = [*changes["statement"]["platforms"], ("ppid", genuine().tee.pki.facts.ppid)]
        changes = {"statement": {"platforms": platform}}
    result = genuine(**changes).verify()
    assert (result.verdict, result.codes) == ("accepted", ())
    assert result.development


def ids(result: Any, status: Status) -> list[str]:
    return [c.id for c in result.checks if c.status is status]


def test_a_result_says_what_follows_and_what_does_not() -> None:
    honest = genuine()
    result = honest.verify()
    claims = result.claims
    assert (claims["operator"], claims["statement_serial"], claims["status_serial"]) == ("Example Operator", 7, 3)
    assert (claims["release"], claims["config"]) == (honest.claims.release.hex(), honest.claims.config.hex())
    assert claims["tdx"]["crl_numbers"] == {"root": 1, "platform": 1, "processor": None}
    assert claims["gpu"]["tied_to_td"] == "relayable"
    assert result.valid_until == NOW + 3000, "the status list ends first"
    assert any(text.startswith("channel:") for text in result.not_proven)
    assert any("physical" in text for text in result.not_proven)
    assert {a.name for a in result.anchors} == {
        "Intel SGX Root CA", "NVIDIA Device Identity CA", "NVIDIA CoRIM signing Root CA",
    }  # fmt: skip
    assert result.policy == honest.policy.label


@pytest.mark.parametrize(
    ("field", "check", "said"),
    [
        ("gpu", "gpu.present", "GPU: not appraised"),
        ("release", "release.signers", "release: not appraised"),
        ("deployment", "deployment.operator", "deployment: not appraised"),
        ("deployment.status-list", "status.list", "revocation by the operator: not appraised"),
        ("tdx.mrseam", "tdx.mrseam", ""), ("tdx.platforms", "tdx.platform", ""),
        ("tdx.tcb-status", "tdx.tcb-status", ""),
    ],
)  # fmt: skip
def test_a_skip_is_told_with_its_reason_and_is_never_a_pass(field: str, check: str, said: str) -> None:
    result = genuine(policy={field: any_reason("this test says so")}, statement={"gpus": None}).verify()
    assert result.accepted
    found = [c for c in result.checks if c.id == check]
    assert [(c.status, c.code) for c in found] == [(Status.SKIP, "SKIPPED")]
    assert found[0].reason.startswith("this test says so")
    assert not said or any(text.startswith(said) for text in result.not_proven)


def test_without_a_name_the_result_says_so() -> None:
    result = genuine(name=None).verify()
    assert "leaf.name" in ids(result, Status.SKIP)
    assert any(text.startswith("name:") for text in result.not_proven)


def test_every_failure_is_reported_not_only_the_first() -> None:
    result = genuine(
        name="other.test", config=b"c" * 32, state={"cc": False}, manifest={"max_age_days": 1}, td={"mrtd": b"m" * 48},
        status={"next_update": NOW + 1}, keyset={"domain": "bank.test"}, event_log_edit=lambda log: log[:-1],
        gpu_issued_at=NOW - 900, statement={"serial": 1, "dns_names": ["bank.test"]},
    ).verify()  # fmt: skip
    assert set(result.codes) == {
        "LEAF_NAME", "RELEASE_DATES", "TDX_MRTD", "EVIDENCE_DIGEST", "GPU_NONCE_AGE", "GPU_NOT_CONFIDENTIAL",
        "DEPLOYMENT_SERIAL", "DEPLOYMENT_NAME", "DEPLOYMENT_CONFIG", "STATUS_EXPIRED", "KEYSET_KEY",
    }  # fmt: skip


def test_claims_that_cannot_be_read_leave_the_quote_to_be_judged() -> None:
    result = genuine(claims_bytes_edit=lambda raw: b"\xa0", td={"mrsignerseam": b"s" * 48}).verify()
    assert result.codes == ("FORMAT_CLAIMS", "TDX_MODULE", "TDX_MRSIGNERSEAM")
    assert {"tdx.quote-signature", "tdx.report-data"} <= set(ids(result, Status.PASS))


def test_payloads_that_strangers_signed_are_not_parsed() -> None:
    for lie in (
        "a manifest that nobody pinned signed",
        "a statement by somebody else",
        "a status list by somebody else",
    ):
        result = genuine(**LIES[lie][0]).verify()
        what = {"manifest": "release", "statement": "deployment", "status": "status"}[lie.split()[1]]
        assert f"{what}.form" in ids(result, Status.SKIP)
        assert f"{what}.form" not in ids(result, Status.PASS)


def test_signers_beyond_the_threshold_may_be_strangers() -> None:
    changes = {"release.threshold": 2, "deployment.threshold": 2}
    result = genuine(manifest_keys=(0, 2, 9), statement_keys=(9, 1, 0), status_keys=(2, 1), policy=changes).verify()
    assert result.codes == ()


def test_release_signers_may_sign_the_status_list_as_many_as_a_manifest_needs() -> None:
    changes = {"release.threshold": 2, "deployment.threshold": 2}
    keys: dict[str, Any] = {"manifest_keys": (0, 1), "statement_keys": (0, 1), "status_keys": (), "policy": changes}
    assert genuine(status_release_keys=(1, 2), **keys).verify().codes == ()
    assert genuine(status_release_keys=(1,), **keys).verify().codes == ("STATUS_SIGNER",)
    assert genuine(status_release_keys=(1,), **(keys | {"status_keys": (1,)})).verify().codes == ("STATUS_SIGNER",)


def test_a_withdrawn_key_among_enough_others_does_no_harm() -> None:
    from attestation.dsse import public_bytes

    gone = [public_bytes(operator_key(0)), public_bytes(signer_key(0))]
    result = genuine(manifest_keys=(0, 1), statement_keys=(0, 2), status_keys=(1,), status={"keys": gone}).verify()
    assert result.codes == ()


@pytest.mark.parametrize("member", ["leaf", "keyset", "event_log", "release", "deployment", "status"])
@pytest.mark.parametrize("junk", [b"", b"\0", b"null", b"[]", b"{}", b"\xff" * 64, b"-----BEGIN CERTIFICATE-----"])
def test_junk_in_one_member_is_a_refusal(member: str, junk: bytes) -> None:
    result = genuine().verify(**{member: junk})
    assert not result.accepted
    assert "VERIFIER_FAULT" not in result.codes


@pytest.mark.parametrize("at", [0, NOW - 1, NOW + 3600, NOW + 10**6, 2**62, 2**70, -1, -(2**40)])
def test_any_clock_gives_an_answer(at: int) -> None:
    result = genuine().verify(now=at)
    assert not result.accepted
    assert "VERIFIER_FAULT" not in result.codes


def test_the_lists_own_end_and_beginning_count_as_inside() -> None:
    honest = genuine(status={"issued_at": NOW + 60, "next_update": NOW + 60 + 3540})
    assert honest.verify(now=NOW + 60).accepted
    assert honest.verify(now=NOW + 3599).accepted
    assert honest.verify(now=NOW + 59).codes == ("STATUS_EXPIRED",)


def test_the_platform_policy_never_asks_who_and_says_so() -> None:
    honest = genuine()
    policy = platform_policy(roots=honest.policy.roots)
    result = verify(honest.evidence, honest.endorsements, policy, now=honest.now, name=honest.name)
    assert result.accepted
    assert result.development
    assert [t.split(":")[0] for t in result.not_proven if "not appraised" in t] == ["release", "deployment"]


def test_production_roots_refuse_the_development_tee() -> None:
    honest = genuine()
    result = verify(honest.evidence, honest.endorsements, platform_policy(), now=honest.now, name=honest.name)
    assert {"TDX_PCK_CHAIN", "TDX_COLLATERAL_ROLE"} <= set(result.codes)
    assert not result.development


def test_collateral_that_is_missing_or_somebody_elses_is_a_refusal() -> None:
    honest, other = genuine(), genuine(machine=1)
    none = dataclasses.replace(honest.endorsements, collateral=b"")
    assert honest.verify(endorsements=none).codes == ("TDX_COLLATERAL",)
    foreign = dataclasses.replace(honest.endorsements, collateral=other.endorsements.collateral)
    assert not honest.verify(endorsements=foreign).accepted
    junk = dataclasses.replace(honest.endorsements, collateral=b"{}")
    assert honest.verify(endorsements=junk).codes == ("FORMAT_TDX_COLLATERAL",)


def test_an_older_crl_than_one_seen_before_is_refused() -> None:
    from attestation.tdx import CrlNumbers

    assert genuine().verify(crl_floor=CrlNumbers(root=1, platform=1)).accepted
    assert genuine().verify(crl_floor=CrlNumbers(root=1, platform=2)).codes == ("TDX_CRL_ROLLBACK",)


def _silenced(monkeypatch: pytest.MonkeyPatch, target: str, instead: Any = None) -> None:
    monkeypatch.setattr(target, lambda *a, **k: instead)


@pytest.mark.parametrize(
    ("step", "missing"),
    [
        ("_leaf", "leaf.name"), ("_report_data", "tdx.report-data"), ("_event_log", "tdx.rtmr3-items"),
        ("_gpu", "gpu.digest"), ("_keyset", "keyset.digest"), ("appraise_release", "release.signers"),
        ("appraise_deployment", "deployment.signers"), ("appraise_status", "status.denied"),
    ],
)  # fmt: skip
def test_a_step_that_says_nothing_is_not_taken_for_one_that_found_nothing(
    monkeypatch: pytest.MonkeyPatch, step: str, missing: str
) -> None:
    honest = genuine()
    _silenced(monkeypatch, f"attestation.steps.{step}")
    result = honest.verify()
    assert result.codes == ("VERIFIER_INCOMPLETE",)
    assert missing in result.failed[0].actual or len(result.failed[0].actual) >= 200


def test_a_quote_that_nobody_appraised_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = genuine()
    _silenced(monkeypatch, "attestation.steps.appraise_tdx")
    assert honest.verify().codes == ("VERIFIER_INCOMPLETE",)


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("secret"), RecursionError(), AssertionError(), TypeError()]
)
def test_a_fault_of_our_own_is_a_refusal(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    honest = genuine()
    monkeypatch.setattr("attestation.steps.appraise_tdx", broken)
    result = honest.verify()
    assert result.codes == ("VERIFIER_FAULT",)
    assert "secret" not in str(result.as_json())


def test_results_name_the_skip_reason_for_fields_of_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    result = genuine().verify()
    skipped = {c.id: c.reason for c in result.checks if c.status is Status.SKIP}
    assert skipped == {
        "tdx.crl-number": "no CRL numbers seen earlier were given",
        "gpu.hwmodel": "the manifest's RIMs name the chip",
        "deployment.serial-seen": "no serials seen earlier were given",
        "status.serial-seen": "no serials seen earlier were given",
        "status.url": "the evidence's list is all there is",
    }
    assert isinstance(genuine(policy={"gpu": any_reason()}).policy.gpu, Skip)


def test_helpers_make_what_they_say() -> None:
    """The lie table rests on the honest story: the same machine and keys each time."""
    one, two = genuine(), genuine()
    assert isinstance(one, Genuine)
    assert (one.claims.release, one.claims.deployment) == (two.claims.release, two.claims.deployment)
    assert len(LIES) > 120
