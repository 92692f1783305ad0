"""A protected-PCIe node is eight GPUs and the four switches at the ends of their links, or it is refused.

The node is a genuine one; what is changed in it is changed in the parsed reports, so that the rule alone decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from attestation.errors import RefusedError
from attestation.gpu import GpuEvidence, Report
from attestation.gpu.topology import check_topology, device_mode
from tests.attestation.gpu.judge import Story, genuine, told
from tests.vectors import VECTORS, need_vectors

Node = tuple[list[Report], list[Report]]
Change = Callable[[list[Report], list[Report]], Node]


@cache
def node() -> Story:
    return genuine(VECTORS / "gpu" / "h100x8-ls10x4-590.12")


def reports() -> Node:
    parsed = [Report.parse(d.report) for d in node().evidence.devices]
    return [r for r in parsed if r.kind == "gpu"], [r for r in parsed if r.kind == "switch"]


def with_one(found: list[Report], **fields: object) -> list[Report]:
    return [*found[:-1], replace(found[-1], **fields)]  # type: ignore[arg-type]  # fields of Report


@pytest.mark.vectors
def test_genuine_node_is_one_fabric() -> None:
    need_vectors()
    check_topology("ppcie", *reports())


LINK_ELSEWHERE = b"\x11" * 8

CHANGES: dict[str, Change] = {
    "a GPU less": lambda g, s: (g[:-1], s),
    "a GPU more": lambda g, s: ([*g, g[0]], s),
    "a switch less": lambda g, s: (g, s[:-1]),
    "a switch more": lambda g, s: (g, [*s, s[0]]),
    "no switch": lambda g, s: (g, []),
    "no GPU": lambda g, s: ([], s),
    "one switch twice": lambda g, s: (g, [*s[:-1], s[0]]),
    "a switch that names nobody": lambda g, s: (g, with_one(s, switch_pdis=())),
    "a switch with the id of zeros": lambda g, s: (
        [replace(r, switch_pdis=tuple(bytes(8) if p == s[-1].switch_pdis[0][::-1] else p for p in r.switch_pdis))
         for r in g],
        with_one(s, switch_pdis=(bytes(8),)),
    ),
    "a foreign switch": lambda g, s: (g, with_one(s, switch_pdis=(LINK_ELSEWHERE,))),
    "a switch id in the GPUs' byte order": lambda g, s: (g, with_one(s, switch_pdis=(s[-1].switch_pdis[0][::-1],))),
    "one link to a foreign switch": lambda g, s: (
        with_one(g, switch_pdis=(LINK_ELSEWHERE, *g[-1].switch_pdis[1:])), s,
    ),
    "a GPU without links": lambda g, s: (with_one(g, switch_pdis=()), s),
    "a GPU linked to one switch only": lambda g, s: (with_one(g, switch_pdis=(g[-1].switch_pdis[0],) * 18), s),
    "a GPU not linked to one of the switches": lambda g, s: (
        with_one(g, switch_pdis=tuple(p for p in g[-1].switch_pdis if p != s[0].switch_pdis[0][::-1])), s,
    ),
    "a switch that sees another GPU": lambda g, s: (
        g, with_one(s, gpu_pdis=(LINK_ELSEWHERE, *s[-1].gpu_pdis[1:])),
    ),
    "a switch that sees seven GPUs": lambda g, s: (g, with_one(s, gpu_pdis=(s[-1].gpu_pdis[1], *s[-1].gpu_pdis[1:]))),
    "switches that all see an empty place": lambda g, s: (
        g, [replace(r, gpu_pdis=(b"\xff" * 8, *sorted(r.gpu_pdis)[1:])) for r in s],
    ),
}  # fmt: skip


@pytest.mark.vectors
@pytest.mark.parametrize("name", CHANGES)
def test_node_of_another_shape_is_refused(name: str) -> None:
    need_vectors()
    with pytest.raises(RefusedError) as refused:
        check_topology("ppcie", *CHANGES[name](*reports()))
    assert refused.value.code == "GPU_TOPOLOGY"


@pytest.mark.vectors
@pytest.mark.parametrize("mode", ["spt", "mpt"])
def test_devices_of_a_plaintext_fabric_in_another_mode_are_refused(mode: str) -> None:
    """Switches, or GPUs that sit at switches, do not belong to a machine that says it has no such fabric."""
    need_vectors()
    gpus, switches = reports()
    plain = [replace(g, switch_pdis=()) for g in gpus]
    check_topology(mode, plain, [])  # type: ignore[arg-type]  # one of the modes
    for changed in ((plain, switches[:1]), (gpus, [])):
        with pytest.raises(RefusedError, match="GPU_TOPOLOGY"):
            check_topology(mode, *changed)  # type: ignore[arg-type]  # one of the modes


@pytest.mark.vectors
def test_verdict_on_a_node_without_its_switches_is_a_refusal() -> None:
    need_vectors()
    whole = node()
    assert whole.judge().accepted
    alone = replace(whole, evidence=GpuEvidence(whole.evidence.devices[:8]))
    assert alone.with_policy(switches=0).judge().codes == ["GPU_TOPOLOGY"]
    twice = whole.with_devices(*whole.evidence.devices[:-1], whole.evidence.devices[-2]).judge()
    assert twice.codes == ["GPU_DUPLICATE", "GPU_TOPOLOGY"]


def test_one_gpu_of_its_own_passes_because_there_is_nothing_to_place() -> None:
    verdict = told().judge()
    assert verdict.accepted and verdict.stage("topology") == "pass"
    (said,) = [c for c in verdict.checks if c.id == "gpu.topology"]
    assert "not applicable in mode spt" in said.reason


MODES = [
    (None, None, "spt"), (None, 0x55, "spt"), (0, None, "spt"), (0, 0x55, "spt"),
    (1, None, "mpt"), (1, 0x55, "mpt"),
    (None, 0xAA, "ppcie"), (2, 0xAA, "ppcie"),
]  # fmt: skip


@pytest.mark.parametrize("flag", [None, 0, 1, 2, 3, 0xFFFF])
@pytest.mark.parametrize("protected", [None, 0x55, 0xAA])
def test_mode_is_the_one_that_flag_and_status_agree_on(flag: int | None, protected: int | None) -> None:
    honest = Report.parse(told().evidence.devices[0].report)
    report = replace(honest, feature_flag=flag, protected_pcie=protected)
    expected = [mode for f, p, mode in MODES if (f, p) == (flag, protected)]
    if expected:
        assert device_mode(report) == expected[0]
        return
    with pytest.raises(RefusedError) as refused:
        device_mode(report)
    assert refused.value.code == "GPU_MODE"
