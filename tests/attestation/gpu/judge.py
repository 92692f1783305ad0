"""Real GPU evidence, evidence under test keys, and the one way the tests of this folder have both judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from attestation import roots
from attestation.gpu import GpuDevice, GpuEndorsements, GpuEvidence, GpuFacts, appraise, from_nvidia_json
from attestation.policy import GPU_STAGES, GpuPolicy, Skip
from attestation.result import Check, Checks, Status
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec
from tests.devtee.pki import Pki
from tests.devtee.rim import RimSpec
from tests.devtee.tee import DevTee

NOW = 1_795_000_000
NONCE = bytes(range(100, 132))
ANY = Skip("not what this test asks about")


@dataclass(frozen=True)
class Verdict:
    """What `appraise` said: facts (None when refused) and the checks it wrote down."""

    facts: GpuFacts | None
    checks: tuple[Check, ...]

    @property
    def accepted(self) -> bool:
        return self.facts is not None

    @property
    def codes(self) -> list[str]:
        return list(dict.fromkeys(c.code for c in self.checks if c.status is Status.FAIL))

    def stage(self, name: str) -> str:
        """`fail` when any check of the stage failed, else `pass` when any passed, else `skip`."""
        found = {c.status for c in self.checks if c.id == "gpu." + name.replace("_", "-")}
        return "fail" if Status.FAIL in found else "pass" if Status.PASS in found else "skip"

    def failed(self, id: str) -> list[Check]:
        return [c for c in self.checks if c.id == id and c.status is Status.FAIL]


@dataclass(frozen=True)
class Story:
    """One question to the verifier: evidence, endorsements, policy, roots and time."""

    evidence: GpuEvidence
    rims: Mapping[str, bytes]
    ocsp: Mapping[str, bytes]
    nonce: bytes
    policy: GpuPolicy
    now: int
    device_root: bytes
    rim_root: bytes
    case: Mapping[str, Any] = field(default_factory=dict)

    def judge(self) -> Verdict:
        checks = Checks()
        facts = appraise(
            self.evidence, GpuEndorsements(self.rims, self.ocsp), nonce=self.nonce, policy=self.policy,
            device_root=self.device_root, rim_root=self.rim_root, now=self.now, checks=checks,
        )  # fmt: skip
        book = tuple(checks)
        assert (facts is None) == any(c.status is Status.FAIL for c in book), "facts and book disagree"
        return Verdict(facts, book)

    def with_policy(self, **fields: Any) -> Story:
        return replace(self, policy=replace(self.policy, **fields))

    def with_device(self, index: int, **fields: Any) -> Story:
        """The same with fields of one device replaced."""
        devices = list(self.evidence.devices)
        devices[index] = replace(devices[index], **fields)
        return replace(self, evidence=GpuEvidence(tuple(devices)))

    def with_devices(self, *devices: GpuDevice) -> Story:
        return replace(self, evidence=GpuEvidence(devices))


def policy(**fields: Any) -> GpuPolicy:
    """Every stage required; one GPU, no switch, mode spt."""
    whole: dict[str, Any] = {
        "count": 1, "switches": 0, "mode": "spt", "drivers": ANY, "vbios": ANY, "hwmodels": ANY,
        "require": frozenset(GPU_STAGES),
    }  # fmt: skip
    return GpuPolicy(**(whole | fields))


def genuine(folder: Path) -> Story:
    """A vector as a story, with the stages, roots and time that its `case.json` names."""
    case = json.loads((folder / "case.json").read_text())
    lists = [json.loads(p.read_text()) if (p := folder / name).exists() else [] for name in
             ("evidence.json", "switches.json")]  # fmt: skip
    return Story(
        evidence=from_nvidia_json(*lists),
        rims={p.stem: p.read_bytes() for p in sorted(folder.glob("rims/*.xml"))},
        ocsp={p.stem: p.read_bytes() for p in sorted(folder.glob("ocsp/*.der"))},
        nonce=bytes.fromhex(case["nonce"]),
        policy=policy(
            count=case["count"][0], switches=case["count"][1], mode=case["mode"] or ANY,
            require=frozenset(case["require"]),
        ),
        now=case["at"],
        device_root=roots.NVIDIA_DEVICE_ROOT,
        rim_root=roots.NVIDIA_RIM_ROOT,
        case=case,
    )  # fmt: skip


@cache
def tee() -> DevTee:
    """One development machine with three GPUs for the whole run: making keys is what costs."""
    return DevTee(Pki.fresh(3))


@cache
def _honest_rims() -> Mapping[str, bytes]:
    return tee().rims()


def told(
    *forms: GpuForm,
    rim: RimSpec | None = None,
    ocsp: OcspSpec | None = None,
    indices: tuple[int, ...] | None = None,
    **fields: Any,
) -> Story:
    """A story of the development machine, one GPU per form (one honest GPU without any); *fields* change the policy."""
    forms = forms or (GpuForm(),)
    shown = indices if indices is not None else tuple(range(len(forms)))
    entries = [tee().gpu_evidence(NONCE, [i], form)[0] for i, form in zip(shown, forms, strict=True)]
    return Story(
        evidence=from_nvidia_json(entries, []),
        rims=_honest_rims() if rim is None else tee().rims(rim),
        ocsp=tee().ocsp(NOW, gpus=3, spec=ocsp),
        nonce=NONCE,
        policy=policy(count=len(forms), **fields),
        now=NOW,
        device_root=tee().roots.nvidia_device,
        rim_root=tee().roots.nvidia_rim,
    )
