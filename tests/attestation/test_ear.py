"""The translation into EAR and AR4SI words says no more than the checks do."""

from __future__ import annotations

import pytest

from attestation.ear import AFFIRMING, CONTRAINDICATED, NONE, WARNING, ear, vector
from attestation.result import Check, Status

AR4SI = {
    "instance-identity", "configuration", "executables", "file-system", "hardware", "runtime-opaque",
    "storage-opaque", "sourced-data",
}  # fmt: skip


def check(id: str, status: Status) -> Check:
    return Check(id, status, "OK" if status is Status.PASS else "X", "why")


def test_every_claim_of_ar4si_is_there_and_silence_is_no_claim() -> None:
    assert vector([]) == dict.fromkeys(AR4SI, NONE)


@pytest.mark.parametrize(
    ("id", "claim"),
    [
        ("tdx.quote-signature", "hardware"), ("gpu.signature", "hardware"), ("tdx.mrtd", "executables"),
        ("release.signers", "executables"), ("release.models", "file-system"), ("tdx.td-attributes", "configuration"),
        ("deployment.platform", "instance-identity"), ("tdx.td-safety", "runtime-opaque"),
        ("channel.tdx.quote-signature", "hardware"),
    ],
)  # fmt: skip
def test_a_failed_check_contraindicates_the_claim_it_speaks_for(id: str, claim: str) -> None:
    assert vector([check(id, Status.PASS)])[claim] == AFFIRMING
    assert vector([check(id, Status.PASS), check(id, Status.FAIL)])[claim] == CONTRAINDICATED


def test_what_was_left_out_is_not_affirmed() -> None:
    assert vector([check("tdx.mrtd", Status.SKIP)])["executables"] == NONE
    assert vector([check("tdx.mrtd", Status.SKIP), check("gpu.rim", Status.PASS)])["executables"] == WARNING


def test_status_follows_the_verdict() -> None:
    for accepted, word in ((True, "affirming"), (False, "contraindicated")):
        found = ear([], accepted=accepted, policy="p", now=1)
        assert found["submods"]["vouchsafe"]["ear.status"] == word
