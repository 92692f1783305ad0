"""In which mode the devices run, and whether GPUs and switches see each other (NVIDIA protected PCIe, HGX 8-GPU).

    spt     one tenant per GPU: PCIe encrypted, no NVLink fabric in the evidence
    mpt     NVLink encryption between GPUs (Blackwell)
    ppcie   protected PCIe: NVLink and NVSwitch carry plaintext inside the chassis, so four switches are attested too

A GPU does not report its own PDI, so a given report cannot be tied to a given PDI: the rule counts, it does not name.
Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

from attestation.errors import RefusedError
from attestation.gpu.report import ON, Report

__all__ = ["Mode", "check_topology", "device_mode"]

Mode = Literal["spt", "ppcie", "mpt"]

_FLAGS: Final[dict[int | None, Mode | None]] = {None: None, 0: "spt", 1: "mpt", 2: "ppcie"}
_GPUS: Final = 8
_SWITCHES: Final = 4
_LINKS_PER_SWITCH: Final = (4, 5)


def device_mode(report: Report) -> Mode:
    """The one mode that feature flag and protected-PCIe status of a GPU agree on. Raises `RefusedError` GPU_MODE.

    Older drivers have no flag; then the status alone decides, and its absence means off."""
    protected = report.protected_pcie == ON
    named = _FLAGS.get(report.feature_flag, None) if report.feature_flag in _FLAGS else None
    if report.feature_flag not in _FLAGS or (named is not None and protected != (named == "ppcie")):
        raise RefusedError(
            "GPU_MODE", "feature flag and protected-PCIe status do not name one mode",
            expected="flag 0 or 1 with status off, flag 2 with status on",
            actual=f"flag {report.feature_flag}, status {'on' if protected else 'off'}",
        )  # fmt: skip
    return named or ("ppcie" if protected else "spt")


def check_topology(mode: Mode, gpus: Sequence[Report], switches: Sequence[Report]) -> None:
    """Raises `RefusedError` GPU_TOPOLOGY naming the first thing that does not fit *mode*."""
    if mode != "ppcie":
        _same("NVSwitches in the evidence", 0, len(switches))
        _same("GPUs that report switches at their links", 0, sum(bool(g.switch_pdis) for g in gpus))
        return
    _same("GPUs", _GPUS, len(gpus))
    _same("switches", _SWITCHES, len(switches))
    # Switches give their own PDI in the other byte order than GPUs give it.
    own = [s.switch_pdis[0][::-1] if s.switch_pdis else b"" for s in switches]
    if len(set(own)) != _SWITCHES or any(not pdi.strip(b"\0") or not pdi.strip(b"\xff") for pdi in own):
        raise _wrong("the switches do not name four ids of their own", "4 distinct", len(set(own)))
    for number, gpu in enumerate(gpus):
        links = Counter(gpu.switch_pdis)
        if set(links) != set(own) or not set(links.values()) <= set(_LINKS_PER_SWITCH):
            raise _wrong(f"GPU {number} is linked to other switches than those attested", own, list(links))
    seen = {frozenset(s.gpu_pdis) for s in switches}
    shared = next(iter(seen))
    if len(seen) != 1 or len(shared) != _GPUS or shared & {bytes(8), b"\xff" * 8}:
        raise _wrong("the four switches do not see the same eight GPUs", "one set of 8", f"{len(seen)} sets")


def _same(what: str, expected: int, actual: int) -> None:
    if expected != actual:
        raise _wrong(f"another number of {what}", expected, actual)


def _wrong(reason: str, expected: object, actual: object) -> RefusedError:
    shown = [", ".join(b.hex() for b in v) if isinstance(v, list) else v for v in (expected, actual)]
    return RefusedError("GPU_TOPOLOGY", reason, expected=shown[0], actual=shown[1])
