"""Each known defect of NVIDIA's own Python verifier (nv-attestation-sdk 2.7.3), tried on ours.

The defects are why that verifier is a second opinion here and not the client's verifier. Its seventh, a token signed
with a public key, has no counterpart: nothing here is signed or handed on, a verdict is a value of the process.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from attestation.gpu import from_nvidia_json
from tests.attestation.gpu.judge import NONCE, NOW, tee, told
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("how", ["tampered", "garbage", "revoked", "wrong-mode"])
def test_1_a_later_gpu_that_fails_never_leaves_the_first_ones_verdict(bad: int, how: str) -> None:
    forms = [GpuForm(feature_flag=1) if how == "wrong-mode" and i == bad else GpuForm() for i in range(3)]
    spec = OcspSpec(revoked=frozenset({f"device-ik-{bad}"})) if how == "revoked" else None
    story = told(*forms, ocsp=spec)
    report = bytearray(story.evidence.devices[bad].report)
    if how == "tampered":
        report[700] ^= 4
    elif how == "garbage":
        report = bytearray(b"\0" * 100)
    verdict = story.with_device(bad, report=bytes(report)).judge()
    assert not verdict.accepted
    named = {c.reason.split(":")[0].split(",")[0] for c in verdict.checks if c.status.value == "fail"}
    assert named - {"evidence"} == {f"GPU {bad}"}, "an honest GPU was blamed, or the bad one not"


def test_2_the_same_gpu_twice_is_refused_even_with_two_fresh_reports() -> None:
    story = told(GpuForm(), GpuForm(), indices=(1, 1))
    first, second = story.evidence.devices
    assert first.report != second.report
    assert story.judge().codes == ["GPU_DUPLICATE"]


def test_3_ocsp_serial_and_window_are_compared() -> None:
    other = told(ocsp=OcspSpec(swapped=(("device-ik", "device-ik-2"), ("device-ik2", "device-ik-2"))))
    assert other.judge().codes == ["GPU_OCSP_MISSING"]
    for moment in (NOW - 601, NOW - 600 + 86_401):
        assert replace(told(), now=moment).judge().codes == ["GPU_OCSP_WINDOW"]
    assert replace(told(), now=NOW - 600 + 86_400).judge().accepted


def test_4_nothing_the_carrier_states_decides() -> None:
    """NRAS tokens: nonce, issuer and digests go unchecked there. Here the nonce is the verifier's own."""
    entry = {**tee().gpu_evidence(bytes(32))[0], "nonce": NONCE.hex(), "arch": "BLACKWELL"}
    verdict = replace(told(), evidence=from_nvidia_json([entry], [])).judge()
    assert verdict.codes == ["GPU_NONCE"]


def test_5_video_decoder_status_and_firmware_id_are_compared_as_values() -> None:
    wrong = {35: bytes([7]) * 48}
    assert told(GpuForm(measurements=wrong, nvdec0=0xAA)).judge().codes == ["GPU_RIM_MISMATCH"]
    assert told(GpuForm(measurements=wrong, nvdec0=0x55)).judge().accepted
    verdict = told(GpuForm(fwid=bytes([1]) * 48)).judge()
    assert verdict.codes == ["GPU_FWID"], "a mismatch surfaces as itself"


def test_5_settings_of_one_call_do_not_leak_into_the_next() -> None:
    good, bad = told(), told(GpuForm(nvdec0=0xAA, measurements={35: bytes([7]) * 48}))
    assert [s.judge().accepted for s in (good, bad, good, bad, good)] == [True, False, True, False, True]


def test_6_versions_and_mode_come_from_signed_bytes_and_are_held_to_the_policy() -> None:
    lists = {"drivers": frozenset({"550.90.07"}), "vbios": frozenset({"96.00.9F.00.01"})}
    assert told(drivers=lists["drivers"], vbios=lists["vbios"]).judge().accepted
    old = GpuForm(driver="535.86.09")
    assert {"GPU_DRIVER", "GPU_RIM_MISSING"} <= set(told(old, drivers=lists["drivers"]).judge().codes)
    assert told(mode="mpt").judge().codes == ["GPU_MODE"]
