"""Protected PCIe: eight GPUs and four switches that see each other, on the reports of a genuine node.

The signatures of these reports hold (test_vectors); here single fields of the parsed reports are changed, which no
signature would survive, to ask the rule alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from attestation.errors import RefusedError
from attestation.gpu import GpuDevice, GpuEvidence, Report
from attestation.gpu.topology import Mode, check_topology, device_mode
from attestation.policy import GPU_STAGES
from tests.attestation.gpu.judge import Story, genuine, told
from tests.vectors import VECTORS, need_vectors

Reports = list[Report]


@cache
def node() -> Story:
    return genuine(VECTORS / "gpu" / "h100x8-ls10x4-590.12")


def reports() -> tuple[Reports, Reports]:
    need_vectors()
    found = [Report.parse(d.report) for d in node().evidence.devices]
    return found[:8], found[8:]


def changed(of: Reports, index: int, **fields: Any) -> Reports:
    return [replace(r, **fields) if i == index else r for i, r in enumerate(of)]


@pytest.mark.vectors
def test_genuine_node_fits() -> None:
    gpus, switches = reports()
    check_topology("ppcie", gpus, switches)
    assert {device_mode(g) for g in gpus} == {"ppcie"}
    check_topology("ppcie", gpus[::-1], switches[::-1])


def other(pdi: bytes) -> bytes:
    return bytes(b ^ 0x5A for b in pdi)


@pytest.mark.vectors
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seven GPUs", lambda g, s: (g[:7], s)),
        ("nine GPUs", lambda g, s: (g + g[:1], s)),
        ("three switches", lambda g, s: (g, s[:3])),
        ("five switches", lambda g, s: (g, s + s[:1])),
        ("no switches", lambda g, s: (g, [])),
        ("one switch twice", lambda g, s: (g, [*s[:3], s[0]])),
        ("a switch without an id", lambda g, s: (g, changed(s, 0, switch_pdis=()))),
        ("a switch in the other byte order", lambda g, s: (g, changed(s, 0, switch_pdis=(s[0].switch_pdis[0][::-1],)))),
        ("another switch", lambda g, s: (g, changed(s, 3, switch_pdis=(other(s[3].switch_pdis[0]),)))),
        ("a GPU without links", lambda g, s: (changed(g, 5, switch_pdis=()), s)),
        ("a GPU of another chassis", lambda g, s: (changed(g, 5, switch_pdis=tuple(map(other, g[5].switch_pdis))), s)),
        ("a fifth switch at one link", lambda g, s: (changed(g, 0, switch_pdis=(*g[0].switch_pdis[:17], bytes(8))), s)),
        ("all links at one switch but three", lambda g, s: (changed(g, 0, switch_pdis=crowd(g[0])), s)),
        ("a switch sees another GPU", lambda g, s: (g, changed(s, 2, gpu_pdis=(*s[2].gpu_pdis[:7], b"gpu no 9")))),
        ("a switch sees a GPU twice", lambda g, s: (g, changed(s, 2, gpu_pdis=(*s[2].gpu_pdis[:7], s[2].gpu_pdis[0])))),
        ("a switch sees no GPU", lambda g, s: (g, changed(s, 2, gpu_pdis=()))),
        ("all-ones for one GPU", lambda g, s: (g, blank(s, b"\xff" * 8))),
        ("all switches see one GPU twice", lambda g, s: (g, blank(s, s[0].gpu_pdis[1]))),
        ("no GPUs", lambda g, s: ([], s)),
        ("a switch with the id of zeros", lambda g, s: zeroed(g, s)),
        ("a GPU not linked to one switch", lambda g, s: (changed(g, 0, switch_pdis=without_one(g[0])), s)),
        ("zeros for one GPU", lambda g, s: (g, blank(s, bytes(8)))),
    ],
)
def test_node_that_does_not_fit_is_refused(
    name: str, change: Callable[[Reports, Reports], tuple[Reports, Reports]]
) -> None:
    with pytest.raises(RefusedError, match="GPU_TOPOLOGY"):
        check_topology("ppcie", *change(*reports()))


def crowd(gpu: Report) -> tuple[bytes, ...]:
    """18 links, all four switches, but not four or five links each."""
    four = list(dict.fromkeys(gpu.switch_pdis))
    return (*four[1:], *(four[0],) * 15)


def without_one(gpu: Report) -> tuple[bytes, ...]:
    return tuple(p for p in gpu.switch_pdis if p != gpu.switch_pdis[0])


def zeroed(gpus: Reports, switches: Reports) -> tuple[Reports, Reports]:
    """One switch whose id reads as zeros, at its own end and at every GPU's."""
    lost = switches[0].switch_pdis[0][::-1]
    linked = [replace(g, switch_pdis=tuple(bytes(8) if p == lost else p for p in g.switch_pdis)) for g in gpus]
    return linked, changed(switches, 0, switch_pdis=(bytes(8),))


def blank(switches: Reports, pdi: bytes) -> Reports:
    """One and the same GPU lost in all four switches."""
    lost = switches[0].gpu_pdis[0]
    return [replace(s, gpu_pdis=tuple(pdi if p == lost else p for p in s.gpu_pdis)) for s in switches]


@pytest.mark.vectors
@pytest.mark.parametrize("mode", ["spt", "mpt"])
def test_mode_without_a_fabric_has_none_in_its_evidence(mode: Mode) -> None:
    gpus, switches = reports()
    unlinked = replace(gpus[0], switch_pdis=())
    check_topology(mode, [unlinked], [])
    for shown in ((gpus[:1], []), ([unlinked], switches)):
        with pytest.raises(RefusedError, match="GPU_TOPOLOGY"):
            check_topology(mode, *shown)


# The node as evidence: genuine devices, put together otherwise.

STAGES = frozenset(GPU_STAGES) - {"rim", "ocsp_device", "ocsp_rim"}


def arranged(*devices: GpuDevice) -> Story:
    return replace(node(), evidence=GpuEvidence(devices)).with_policy(require=STAGES)


@pytest.mark.vectors
def test_node_is_accepted_as_it_is() -> None:
    need_vectors()
    verdict = arranged(*node().evidence.devices).judge()
    assert verdict.accepted and verdict.facts is not None and verdict.facts.mode == "ppcie"
    assert [d.kind for d in verdict.facts.devices] == ["gpu"] * 8 + ["switch"] * 4
    assert {d.mode for d in verdict.facts.devices} == {"ppcie", None}


@pytest.mark.vectors
def test_node_without_its_switches_is_refused() -> None:
    need_vectors()
    verdict = arranged(*node().evidence.devices[:8]).judge()
    assert set(verdict.codes) == {"GPU_COUNT", "GPU_TOPOLOGY"}


@pytest.mark.vectors
def test_subset_of_the_node_is_refused() -> None:
    """Attest one, use another."""
    need_vectors()
    devices = node().evidence.devices
    assert set(arranged(*devices[:7], *devices[8:]).judge().codes) == {"GPU_COUNT", "GPU_TOPOLOGY"}


@pytest.mark.vectors
def test_one_gpu_of_the_node_listed_twice_is_refused_by_identity() -> None:
    need_vectors()
    devices = node().evidence.devices
    assert arranged(*devices[:7], devices[0], *devices[8:]).judge().codes == ["GPU_DUPLICATE"]


@pytest.mark.vectors
def test_switch_of_another_machine_is_refused() -> None:
    """A genuine LS10 with its genuine report: another nonce, another chassis."""
    need_vectors()
    (stranger,) = genuine(VECTORS / "gpu" / "ls10-96.10.55.00.01").evidence.devices
    verdict = arranged(*node().evidence.devices[:11], stranger).judge()
    assert set(verdict.codes) == {"GPU_NONCE", "GPU_TOPOLOGY"}


@pytest.mark.vectors
def test_gpu_of_another_machine_is_refused() -> None:
    need_vectors()
    (stranger,) = genuine(VECTORS / "gpu" / "h100-550.90.07-full").evidence.devices
    devices = node().evidence.devices
    assert set(arranged(*devices[:7], stranger, *devices[8:]).judge().codes) == {
        "GPU_NONCE",
        "GPU_MODE",
        "GPU_TOPOLOGY",
    }


# Without a fabric, and the mode itself.


def test_gpu_of_its_own_passes_because_there_is_nothing_to_place() -> None:
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
    with pytest.raises(RefusedError, match="GPU_MODE"):
        device_mode(report)
