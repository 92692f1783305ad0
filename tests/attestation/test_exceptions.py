"""A signed exception widens exactly the status and advisories it names, for as long as it says, and shows itself."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.dsse import public_bytes, sign
from attestation.errors import FormatError
from attestation.exceptions import EXCEPTION_PAYLOAD_TYPE, MAX_EXCEPTION_LIFETIME, TcbException, new_exception
from attestation.policy import BUILT_IN_ROOTS, Policy, ReleasePolicy, platform_policy
from attestation.result import AttestationResult, Status
from attestation.verifier import verify_quote
from tests.devtee.tdx import CollateralSpec
from tests.devtee.tee import DevTee

NOW = int(time.time())
SIGNER = Ed25519PrivateKey.generate()
ADVISORY = "INTEL-SA-00837"


@pytest.fixture(scope="module")
def tee(tmp_path_factory: pytest.TempPathFactory) -> DevTee:
    return DevTee.create(tmp_path_factory.mktemp("tee") / "state", gpus=1)


def policy(tee: DevTee, exception: bytes | None, *signers: Ed25519PrivateKey) -> Policy:
    keys = frozenset(public_bytes(k) for k in signers or (SIGNER,))
    made = platform_policy(roots=replace(BUILT_IN_ROOTS, intel=tee.roots.intel))
    return replace(made, release=ReleasePolicy(keys, len(keys)), exception=exception)


def payload(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "status": "OutOfDate", "advisories": [ADVISORY], "fmspc": None, "reason": "firmware roll-out until March",
        "not_before": NOW - 60, "not_after": NOW + 86400, **changes,
    }  # fmt: skip
    return new_exception(**fields)


def signed(*keys: Ed25519PrivateKey, kind: str = EXCEPTION_PAYLOAD_TYPE, **changes: Any) -> bytes:
    return sign(kind, payload(**changes), keys or (SIGNER,))


def judged(tee: DevTee, exception: bytes | None, *signers: Ed25519PrivateKey) -> AttestationResult:
    """An OutOfDate platform with one advisory, judged under a policy that allows neither."""
    collateral = tee.collateral(NOW, CollateralSpec(tcb_status="OutOfDate", advisories=(ADVISORY,)))
    return verify_quote(tee.quote(bytes(64)), collateral, policy(tee, exception, *signers), now=NOW)


def test_without_it_the_platform_is_refused(tee: DevTee) -> None:
    assert {"TDX_TCB_STATUS", "TDX_ADVISORY"} <= set(judged(tee, None).codes)


def test_it_widens_status_and_advisories_and_stands_in_the_result(tee: DevTee) -> None:
    result = judged(tee, signed())
    assert result.accepted
    assert result.valid_until <= NOW + 86400
    said = [c.reason for c in result.checks if c.id == "tdx.exception" and c.status is Status.PASS]
    assert any(f"OutOfDate with {ADVISORY}" in reason and "firmware roll-out" in reason for reason in said)


def test_it_widens_nothing_it_does_not_name(tee: DevTee) -> None:
    assert "TDX_ADVISORY" in judged(tee, signed(advisories=[])).codes
    assert "TDX_TCB_STATUS" in judged(tee, signed(status="SWHardeningNeeded")).codes


def test_its_advisories_come_with_its_status_alone(tee: DevTee) -> None:
    collateral = tee.collateral(NOW, CollateralSpec(tcb_status="UpToDate", advisories=(ADVISORY,)))
    result = verify_quote(tee.quote(bytes(64)), collateral, policy(tee, signed()), now=NOW)
    assert "EXCEPTION_SCOPE" in result.codes


def test_it_shows_in_the_policys_digest(tee: DevTee) -> None:
    assert policy(tee, None).label != policy(tee, signed()).label


@pytest.mark.parametrize(
    "changes",
    [
        {"not_before": NOW - 7200, "not_after": NOW - 3600},
        {"not_before": NOW + 3600, "not_after": NOW + 7200},
        {"fmspc": bytes(6)},
    ],
    ids=["ended", "not begun", "another platform"],
)
def test_one_that_is_not_in_force_here_widens_nothing(tee: DevTee, changes: dict[str, Any]) -> None:
    result = judged(tee, signed(**changes))
    assert "TDX_TCB_STATUS" in result.codes
    assert any(c.id == "tdx.exception" and c.status is Status.SKIP for c in result.checks)


def test_one_that_nobody_pinned_has_signed_is_refused(tee: DevTee) -> None:
    stranger = Ed25519PrivateKey.generate()
    assert {"EXCEPTION_SIGNER", "TDX_TCB_STATUS"} <= set(judged(tee, signed(stranger)).codes)
    assert "EXCEPTION_SIGNER" in judged(tee, signed(kind="application/json")).codes
    assert "EXCEPTION_SIGNER" in judged(tee, signed(SIGNER), SIGNER, stranger).codes  # one of two
    assert judged(tee, signed(SIGNER, stranger), SIGNER, stranger).accepted


def test_a_policy_that_pins_nobody_grants_no_exception(tee: DevTee) -> None:
    bare = platform_policy(roots=replace(BUILT_IN_ROOTS, intel=tee.roots.intel))
    collateral = tee.collateral(NOW, CollateralSpec(tcb_status="OutOfDate", advisories=(ADVISORY,)))
    result = verify_quote(tee.quote(bytes(64)), collateral, replace(bare, exception=signed()), now=NOW)
    assert {"EXCEPTION_SIGNER", "TDX_TCB_STATUS"} <= set(result.codes)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "Revoked"}, {"status": "OutOfDateConfigurationNeeded"}, {"advisories": ["*"]}, {"reason": "short"},
        {"not_after": NOW - 60 + MAX_EXCEPTION_LIFETIME + 1}, {"not_after": NOW - 60}, {"fmspc": bytes(5)},
        {"not_before": 2**50, "not_after": 2**50 + 60},
    ],
)  # fmt: skip
def test_what_no_signature_can_allow_is_no_exception(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as caught:
        payload(**changes)
    assert caught.value.code == "FORMAT_EXCEPTION"


def test_garbage_is_a_refusal_not_a_crash(tee: DevTee) -> None:
    for raw in (b"", b"{}", b"\xff" * 100, signed()[:-5]):
        assert not judged(tee, raw).accepted


def test_payload_round_trip() -> None:
    found = TcbException.parse(payload(fmspc=bytes.fromhex("00806f050000")))
    assert (found.status, found.advisories, found.fmspc) == ("OutOfDate", {ADVISORY}, bytes.fromhex("00806f050000"))


def test_commands_write_sign_and_use_one(tee: DevTee, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from attestation.client.cli import main

    key = tmp_path / "key.pem"
    key.write_bytes(SIGNER.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    plain, envelope = tmp_path / "plain.json", tmp_path / "envelope.json"
    new = ["exception", "new", "--status", "OutOfDate", "--advisory", ADVISORY, "--reason", "firmware roll-out"]
    assert main([*new, "--not-before", str(NOW - 60), "--valid", "30d", "-o", str(plain)]) == 0
    assert main(["exception", "sign", str(plain), "--key", str(key), "-o", str(envelope)]) == 0
    assert main(["exception", "show", str(envelope), "--key", public_bytes(SIGNER).hex()]) == 0
    assert judged(tee, envelope.read_bytes()).accepted
    assert main([*new, "--valid", "91d", "-o", str(plain)]) != 0
