"""Lies under good signatures: the development machine tells them, the verifier names them.

Each row is one mutation away from the honest story, which is accepted; the code is the reason for the refusal.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from attestation.gpu import GpuEvidence, from_nvidia_json
from attestation.policy import GPU_STAGES
from tests.attestation.gpu.judge import ANY, NOW, Story, tee, told
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec
from tests.devtee.pki import Entity, Pki, utc
from tests.devtee.rim import RimSpec
from tests.devtee.tee import DevTee

DAY = 86_400
HONEST_LISTS: dict[str, Any] = {
    "drivers": frozenset({"550.90.07"}),
    "vbios": frozenset({"96.00.9F.00.01"}),
    "hwmodels": frozenset({"SIM GH100 A01 GSP BROM"}),
}


def ik(index: int) -> OcspSpec:
    return OcspSpec(revoked=frozenset({f"device-ik-{index}"}))


def flipped(story: Story, index: int = 0, at: int = 500) -> Story:
    report = bytearray(story.evidence.devices[index].report)
    report[at] ^= 1
    return story.with_device(index, report=bytes(report))


def test_honest_devices_are_accepted() -> None:
    verdict = told(GpuForm(), GpuForm(), **HONEST_LISTS).judge()
    assert verdict.accepted, verdict.codes
    assert verdict.facts is not None and verdict.facts.mode == "spt"
    assert [d.ik_serial[:2] for d in verdict.facts.devices] == ["41", "41"]
    assert {c.id for c in verdict.checks if c.status.value == "skip"} == set()


STORIES: dict[str, tuple[Callable[[], Story], set[str]]] = {
    # nonce
    "report-for-another-nonce": (lambda: replace(told(), nonce=bytes(32)), {"GPU_NONCE"}),
    "empty-nonce-asked-for": (lambda: replace(told(), nonce=b""), {"GPU_NONCE"}),
    # signature, chain
    "measurement-flipped": (lambda: flipped(told(), at=45 + 7), {"GPU_SIGNATURE", "GPU_RIM_MISMATCH"}),
    "signed-by-another-gpu": (lambda: told(GpuForm(signer=1)), {"GPU_SIGNATURE"}),
    "foreign-device-root": (
        lambda: replace(told(), device_root=foreign().roots.nvidia_device),
        {"GPU_CHAIN_ISSUER", "GPU_OCSP_MISSING"},
    ),
    "root-of-the-other-hierarchy": (
        lambda: replace(told(), device_root=tee().roots.nvidia_rim),
        {"GPU_CHAIN_ISSUER", "GPU_OCSP_MISSING"},
    ),
    "chain-without-identity": (lambda: chain(told(), lambda c: c[:3]), {"GPU_CHAIN_LENGTH"}),
    "chain-with-root": (lambda: chain(told(), lambda c: (*c, tee().roots.nvidia_device)), {"GPU_CHAIN_LENGTH"}),
    "chain-out-of-order": (
        lambda: chain(told(), lambda c: (c[0], c[2], c[1], c[3])),
        {"GPU_CHAIN_ISSUER", "GPU_OCSP_MISSING"},
    ),
    "chain-of-another-gpu": (lambda: chain(told(), lambda _: tuple(e.der for e in device(1))), {"GPU_SIGNATURE"}),
    "leaf-is-the-identity-key": (
        lambda: chain(told(), lambda c: (c[1], *c[1:])),
        {"GPU_CHAIN_ISSUER", "GPU_SIGNATURE", "FORMAT_GPU_FWID"},
    ),
    "certificate-garbage": (lambda: chain(told(), lambda c: (c[0], b"\x30\x00", *c[2:])), {"FORMAT_GPU_CERTIFICATE"}),
    "before-the-chain-is-valid": (
        lambda: replace(told(), now=utc_seconds(2019)),
        {"GPU_CHAIN_VALIDITY", "GPU_RIM_CHAIN_VALIDITY", "GPU_OCSP_RESPONDER"},
    ),
    # firmware id
    "no-fwid-old-driver": (lambda: told(GpuForm(fwid=b"")), {"GPU_FWID"}),
    "other-fwid": (lambda: told(GpuForm(fwid=bytes(48))), {"GPU_FWID"}),
    # devices together
    "one-gpu-listed-twice": (lambda: told(GpuForm(), GpuForm(), indices=(0, 0)), {"GPU_DUPLICATE"}),
    "one-gpu-too-few": (lambda: told().with_policy(count=2), {"GPU_COUNT"}),
    "one-gpu-too-many": (lambda: told(GpuForm(), GpuForm()).with_policy(count=1), {"GPU_COUNT"}),
    "a-switch-is-missing": (lambda: told(switches=4), {"GPU_COUNT"}),
    "no-device": (
        lambda: replace(told(), evidence=GpuEvidence(())),
        {"FORMAT_GPU_COUNT", "GPU_ABSENT", "GPU_COUNT", "GPU_TOPOLOGY"},
    ),
    "seventeen-devices": (
        lambda: replace(told(), evidence=GpuEvidence(told().evidence.devices * 17)),
        {"FORMAT_GPU_COUNT", "GPU_COUNT", "GPU_DUPLICATE"},
    ),
    "gpu-called-a-switch": (
        lambda: told().with_device(0, kind="switch"),
        {"FORMAT_GPU_KIND", "GPU_NO_REPORT", "GPU_ABSENT", "GPU_COUNT", "GPU_TOPOLOGY"},
    ),
    # mode
    "protected-pcie-instead-of-spt": (lambda: told(GpuForm(protected_pcie=0xAA)), {"GPU_MODE", "GPU_TOPOLOGY"}),
    "mpt-instead-of-spt": (lambda: told(GpuForm(feature_flag=1)), {"GPU_MODE"}),
    "spt-instead-of-ppcie": (lambda: told(mode="ppcie"), {"GPU_MODE"}),
    "flag-and-status-disagree": (lambda: told(GpuForm(feature_flag=2)), {"GPU_MODE", "GPU_TOPOLOGY"}),
    "flag-spt-but-protected": (
        lambda: told(GpuForm(feature_flag=0, protected_pcie=0xAA)),
        {"GPU_MODE", "GPU_TOPOLOGY"},
    ),
    "unknown-flag": (lambda: told(GpuForm(feature_flag=3)), {"GPU_MODE", "GPU_TOPOLOGY"}),
    "two-modes": (lambda: told(GpuForm(), GpuForm(feature_flag=1)), {"GPU_MODE", "GPU_TOPOLOGY"}),
    "two-modes-none-asked-for": (
        lambda: told(GpuForm(), GpuForm(feature_flag=1), mode=ANY),
        {"GPU_MODE", "GPU_TOPOLOGY"},
    ),
    "ppcie-without-switches": (
        lambda: told(GpuForm(protected_pcie=0xAA, feature_flag=2), mode="ppcie"),
        {"GPU_TOPOLOGY"},
    ),
    # reference values
    "measurement-35-of-developer-mode": (
        lambda: told(GpuForm(measurements={35: bytes([9]) * 48}, nvdec0=0xAA)),
        {"GPU_RIM_MISMATCH"},
    ),
    "measurement-9-changed": (lambda: told(GpuForm(measurements={9: bytes([9]) * 48})), {"GPU_RIM_MISMATCH"}),
    "no-rim": (lambda: replace(told(), rims={}), {"GPU_RIM_MISSING"}),
    "no-driver-rim": (lambda: without(told(), "NV_GPU_DRIVER_GH100_550.90.07"), {"GPU_RIM_MISSING"}),
    "rims-exchanged": (
        lambda: replace(told(), rims=dict(zip(told().rims, reversed(list(told().rims.values())), strict=True))),
        {"GPU_RIM_VERSION"},
    ),
    "rim-of-another-version": (lambda: told(rim=RimSpec(driver="1.2.3")), {"GPU_RIM_VERSION"}),
    "rim-with-another-golden-value": (lambda: told(rim=RimSpec(values={30: bytes(48)})), {"GPU_RIM_MISMATCH"}),
    "index-active-in-both-rims": (lambda: told(rim=RimSpec(both=frozenset({9}))), {"GPU_RIM_OVERLAP"}),
    "rim-with-nothing-active": (lambda: told(rim=RimSpec(active=frozenset())), {"GPU_RIM_EMPTY"}),
    "rim-with-only-the-skipped-index": (
        lambda: told(rim=RimSpec(active=frozenset({35}))),
        {"GPU_RIM_EMPTY", "GPU_RIM_OVERLAP"},
    ),
    "rim-signer-expired": (
        lambda: told(rim=RimSpec(not_after=utc(NOW - DAY))),
        {"GPU_RIM_CHAIN_VALIDITY", "GPU_OCSP_MISSING"},
    ),
    "rim-signer-of-the-future": (
        lambda: told(rim=RimSpec(not_before=utc(NOW + DAY))),
        {"GPU_RIM_CHAIN_VALIDITY", "GPU_OCSP_MISSING"},
    ),
    "foreign-rim-root": (lambda: replace(told(), rims=foreign().rims()), {"GPU_RIM_CHAIN_ROOT"}),
    "rim-root-of-the-device-hierarchy": (
        lambda: replace(told(), rim_root=tee().roots.nvidia_device),
        {"GPU_RIM_CHAIN_ROOT"},
    ),
    # revocation
    "no-ocsp": (lambda: replace(told(), ocsp={}), {"GPU_OCSP_MISSING"}),
    "device-revoked": (lambda: told(ocsp=ik(0)), {"GPU_OCSP_REVOKED"}),
    "second-device-revoked": (lambda: told(GpuForm(), GpuForm(), ocsp=ik(1)), {"GPU_OCSP_REVOKED"}),
    "device-on-hold": (lambda: told(ocsp=OcspSpec(on_hold=frozenset({"device-ik-0"}))), {"GPU_OCSP_REVOKED"}),
    "device-unknown": (lambda: told(ocsp=OcspSpec(unknown=frozenset({"device-ik-0"}))), {"GPU_OCSP_STATUS"}),
    "issuer-revoked": (lambda: told(ocsp=OcspSpec(revoked=frozenset({"device-ica"}))), {"GPU_OCSP_REVOKED"}),
    "product-revoked": (lambda: told(ocsp=OcspSpec(revoked=frozenset({"device-identity"}))), {"GPU_OCSP_REVOKED"}),
    "rim-signer-revoked": (lambda: told(ocsp=OcspSpec(revoked=frozenset({"rim-vbios-l4"}))), {"GPU_OCSP_REVOKED"}),
    "rim-l3-revoked": (lambda: told(ocsp=OcspSpec(revoked=frozenset({"rim-l3"}))), {"GPU_OCSP_REVOKED"}),
    "rim-l2-revoked": (lambda: told(ocsp=OcspSpec(revoked=frozenset({"rim-l2"}))), {"GPU_OCSP_REVOKED"}),
    "ocsp-stale": (lambda: told(ocsp=OcspSpec(age=2 * DAY)), {"GPU_OCSP_WINDOW"}),
    "ocsp-of-the-future": (lambda: told(ocsp=OcspSpec(age=-60)), {"GPU_OCSP_WINDOW"}),
    "ocsp-of-another-device": (
        lambda: told(ocsp=OcspSpec(swapped=(("device-ik", "device-ik-1"),))),
        {"GPU_OCSP_MISSING"},
    ),
    "ocsp-by-a-responder-of-another-issuer": (
        lambda: told(ocsp=OcspSpec(responder=(("device-ik-0", "device-identity"),))),
        {"GPU_OCSP_RESPONDER"},
    ),
    "ocsp-by-a-responder-of-the-rim-side": (
        lambda: told(ocsp=OcspSpec(responder=(("device-ik-0", "rim-l3"),))),
        {"GPU_OCSP_RESPONDER"},
    ),
    # allow lists
    "old-driver": (lambda: told(drivers=frozenset({"570.10"})), {"GPU_DRIVER"}),
    "other-vbios": (lambda: told(vbios=frozenset({"96.00.9F.00.02"})), {"GPU_VBIOS"}),
    "other-hwmodel": (lambda: told(hwmodels=frozenset({"GH100 A01 GSP BROM"})), {"GPU_HWMODEL"}),
}


@pytest.mark.parametrize("name", STORIES)
def test_lie_is_refused_for_its_reason(name: str) -> None:
    tell, codes = STORIES[name]
    verdict = tell().judge()
    assert not verdict.accepted
    assert set(verdict.codes) == codes


def test_what_the_rules_leave_open_is_accepted() -> None:
    # NVIDIA's rules: inactive entries are ignored, and 35 is not compared while the video decoder is off.
    forms = (
        GpuForm(measurements={13: b"\2" * 48}),
        GpuForm(measurements={35: b"\2" * 48}),
        GpuForm(feature_flag=0),
        GpuForm(extra_opaque=((34, b"\1\0"), (99, b"new"))),
        GpuForm(nvdec0=0xAA),
    )
    for form in forms:
        assert told(form).judge().accepted
    assert told(GpuForm(feature_flag=1), mode="mpt").judge().accepted


def test_answers_may_come_under_any_name() -> None:
    story = told()
    shuffled = {f"x{i}": der for i, der in enumerate(reversed(list(story.ocsp.values())))}
    assert replace(story, ocsp=shuffled).judge().accepted


def test_every_failure_of_every_device_is_recorded() -> None:
    story = told(GpuForm(measurements={9: bytes([1]) * 48}), GpuForm(fwid=bytes(48)), GpuForm(signer=0), ocsp=ik(2))
    verdict = story.judge()
    assert not verdict.accepted
    found = {(c.reason.split(":")[0].split(",")[0], c.code) for c in verdict.checks if c.status.value == "fail"}
    assert found == {
        ("GPU 0", "GPU_RIM_MISMATCH"), ("GPU 1", "GPU_FWID"), ("GPU 2", "GPU_SIGNATURE"), ("GPU 2", "GPU_OCSP_REVOKED"),
    }  # fmt: skip


@pytest.mark.parametrize("stage", sorted(set(GPU_STAGES) - {"parse"}))
def test_stage_that_is_not_required_is_a_skip_and_never_a_pass(stage: str) -> None:
    verdict = told(require=frozenset(GPU_STAGES) - {stage}).judge()
    assert verdict.accepted and verdict.stage(stage) == "skip"
    reasons = [c.reason for c in verdict.checks if c.id == "gpu." + stage.replace("_", "-")]
    assert reasons == [f"the policy does not require the stage {stage}"]


def test_what_does_not_parse_is_refused_even_when_nothing_is_required() -> None:
    story = told(require=frozenset()).with_device(0, report=b"no report")
    verdict = story.judge()
    assert not verdict.accepted and verdict.codes == ["FORMAT_GPU_SIZE"]


def test_a_good_and_a_broken_report_are_refused_whatever_their_order() -> None:
    good = told(GpuForm(), GpuForm())
    for index in (0, 1):
        verdict = flipped(good, index, at=4000).judge()
        assert not verdict.accepted and "GPU_SIGNATURE" in verdict.codes
        assert [c.reason.split(":")[0] for c in verdict.failed("gpu.signature")] == [f"GPU {index}"]


def test_gpu_from_another_machine_is_refused_by_its_nonce() -> None:
    mine, other = told(), bytes(range(32))
    stolen = from_nvidia_json(tee().gpu_evidence(other, [1]), []).devices[0]
    verdict = mine.with_devices(*mine.evidence.devices, stolen).with_policy(count=2).judge()
    assert verdict.codes == ["GPU_NONCE"]
    assert [c.reason.split(":")[0] for c in verdict.failed("gpu.nonce")] == ["GPU 1"]


def test_one_key_under_two_serials_is_one_device() -> None:
    """The provisioner certified the same identity key twice: still one GPU."""
    pki, story = tee().pki, told(require=frozenset({"signature", "chain", "distinct", "count"}))
    ik, ica = pki["device-ik-0"].cert, pki["device-ica"]
    builder = x509.CertificateBuilder(
        ica.cert.subject, ik.subject, ik.public_key(), ik.serial_number + 1, ik.not_valid_before_utc,
        ik.not_valid_after_utc, list(ik.extensions),
    )  # fmt: skip
    again = builder.sign(ica.key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)
    ak, _, *upper = story.evidence.devices[0].chain
    twin = replace(story.evidence.devices[0], chain=(ak, again, *upper))
    verdict = story.with_devices(story.evidence.devices[0], twin).with_policy(count=2).judge()
    assert verdict.codes == ["GPU_DUPLICATE"]


def test_verdict_ends_with_the_shortest_proof() -> None:
    verdict = told().judge()
    assert verdict.facts is not None
    assert verdict.facts.valid_until == NOW - 600 + DAY
    bare = told(require=frozenset(GPU_STAGES) - {"ocsp_device", "ocsp_rim"}).judge()
    assert bare.facts is not None
    rim_end = dt.datetime(2049, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
    assert bare.facts.valid_until == int(rim_end.timestamp())


def device(index: int) -> list[Entity]:
    return [tee().pki[r] for r in (f"device-ak-{index}", f"device-ik-{index}", "device-ica", "device-identity")]


def chain(story: Story, change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]) -> Story:
    return story.with_device(0, chain=change(story.evidence.devices[0].chain))


def without(story: Story, name: str) -> Story:
    return replace(story, rims={k: v for k, v in story.rims.items() if k != name})


def utc_seconds(year: int) -> int:
    return int(dt.datetime(year, 1, 1, tzinfo=dt.UTC).timestamp())


_foreign: list[DevTee] = []


def foreign() -> DevTee:
    """Another machine, whose keys nobody here trusts."""
    if not _foreign:
        _foreign.append(DevTee(Pki.fresh(1)))
    return _foreign[0]
