"""Every real vector gives its expected verdict, and every stage what the vector says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attestation.gpu import decode, encode
from attestation.policy import GPU_STAGES
from tests.attestation.gpu.judge import genuine
from tests.vectors import cases, need_vectors

CASES = cases("gpu")
EXPECTED_CODES = {
    "h100-550.90.07-ocsp-stale": ["GPU_OCSP_WINDOW"],
    "neg-h100-535-vbios-rim-mismatch": ["GPU_FWID", "GPU_RIM_MISSING", "GPU_RIM_MISMATCH"],
    "neg-h100-invalid-signature": ["GPU_SIGNATURE", "GPU_FWID"],
    "neg-h100-measurement-flipped": ["GPU_SIGNATURE", "GPU_RIM_MISMATCH"],
    "neg-h100-other-nonce": ["GPU_NONCE"],
    "neg-h100-trailing": ["FORMAT_GPU_LENGTH", "GPU_NO_REPORT"],
    "neg-ls10-rim-digest": ["GPU_RIM_SIGNATURE"],
}

pytestmark = pytest.mark.vectors


def test_vectors_are_there() -> None:
    need_vectors()
    assert len(CASES) >= 12
    assert set(EXPECTED_CODES) <= {c.name for c in CASES}


@pytest.mark.parametrize("folder", CASES, ids=lambda c: c.name)
def test_verdict_is_the_expected_one_for_the_expected_reason(folder: Path) -> None:
    story = genuine(folder)
    verdict = story.judge()
    assert ("accept" if verdict.accepted else "refuse") == story.case["expect"]
    for stage in story.case["fails"]:
        assert verdict.stage(stage) == "fail"
    if not verdict.accepted:
        assert verdict.codes == EXPECTED_CODES[folder.name]
    for stage in set(GPU_STAGES) - set(story.case["require"]) - {"parse"}:
        assert verdict.stage(stage) == "skip"


@pytest.mark.parametrize("folder", CASES, ids=lambda c: c.name)
def test_each_stage_gives_what_the_vector_says(folder: Path) -> None:
    story = genuine(folder)
    verdict = story.with_policy(require=frozenset(GPU_STAGES)).judge()
    said = {k: v for k, v in story.case["stages"].items() if isinstance(v, str)}
    if said["parse"] == "fail":
        # The vectors stop there; our chain and distinct stages need no report and go on.
        assert verdict.stage("parse") == "fail" and not verdict.accepted
        return
    for stage, value in said.items():
        assert verdict.stage(stage) == ("pass" if value == "pass" else "fail"), stage


@pytest.mark.parametrize("folder", [c for c in CASES if c.name != "neg-h100-trailing"], ids=lambda c: c.name)
def test_facts_name_the_devices_the_vector_names(folder: Path) -> None:
    story = genuine(folder)
    verdict = story.judge()
    if verdict.facts is None:
        return
    for device, said in zip(verdict.facts.devices, story.case["devices"], strict=True):
        assert (device.hwmodel, device.ik_serial, device.vbios) == (said["hwmodel"], said["device"], said["vbios"])
        assert device.driver == (said["driver"] or "")
    assert verdict.facts.mode == (story.case["mode"] or "")
    assert verdict.facts.valid_until > story.now


@pytest.mark.parametrize("folder", CASES, ids=lambda c: c.name)
def test_evidence_survives_the_wire(folder: Path) -> None:
    evidence = genuine(folder).evidence
    assert decode(encode(evidence)) == evidence


def test_one_h100_and_a_whole_node_fit_their_budget() -> None:
    need_vectors()
    sizes = {c.name: len(encode(genuine(c).evidence)) for c in CASES}
    assert sizes["h100-550.90.07-full"] < 3_700
    assert sizes["h100x8-ls10x4-590.12"] < 15_000
