"""A GPU driver in this process, for what the development TEE's own (a library and a process) does not do.

Reports and chains are genuine: the development TEE signs them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml  # type: ignore[import-untyped]  # ships no types

from attestation.attester.gpu import GpuAttester
from tests.devtee.gpu import GpuForm
from tests.devtee.tee import DevTee


class Driver:
    """pynvml's functions as a driver would answer them, one GPU per entry of *buses*, with some parts changed; they may
    change while it runs. `ready` is the GPUs' ready state."""

    NVMLError = pynvml.NVMLError
    c_nvmlSystemConfComputeSettings_v1_t = pynvml.c_nvmlSystemConfComputeSettings_v1_t

    def __init__(self, tee: DevTee, buses: tuple[int, ...] = (0x10,), **changes: Any) -> None:
        self._tee, self.buses, self.changes = tee, buses, changes
        self.ready = 0

    def __getattr__(self, name: str) -> Any:
        return self.changes[name]

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def _nvmlCheckReturn(self, status: int) -> int:
        if status:
            raise pynvml.NVMLError(status)
        return status

    def nvmlSystemGetConfComputeSettings(self, pointer: Any) -> int:
        told = {"environment": 2, "ccFeature": 1, "devToolsMode": 0, "multiGpuMode": 0} | self.changes
        for name in ("environment", "ccFeature", "devToolsMode", "multiGpuMode"):
            setattr(pointer._obj, name, told[name])
        return int(self.changes.get("settings", 0))

    def nvmlDeviceGetCount(self) -> int:
        return int(self.changes.get("count", len(self.buses)))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == self.changes.get("lost"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(domain=0, bus=self.buses[handle], device=0)

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: int, nonce: bytes) -> Any:
        report = self._tee.gpu_report(self.changes.get("nonce", nonce), handle, self.changes.get("form", GpuForm()))[0]
        answer = pynvml.c_nvmlConfComputeGpuAttestationReport_t()
        ctypes.memmove(answer.attestationReport, report, len(report))
        answer.attestationReportSize = self.changes.get("report_size", len(report))
        return answer

    def nvmlDeviceGetConfComputeGpuCertificate(self, handle: int) -> Any:
        pem = self.changes.get("pem", lambda pem: pem)(self._tee.pki.device_chain(handle))
        answer = pynvml.c_nvmlConfComputeGpuCertificate_t()
        ctypes.memmove(answer.attestationCertChain, pem, len(pem))
        answer.attestationCertChainSize = self.changes.get("pem_size", len(pem))
        return answer

    def nvmlSystemSetConfComputeGpusReadyState(self, state: int) -> None:
        if not self.changes.get("ready_stuck"):
            self.ready = state

    def nvmlSystemGetConfComputeGpusReadyState(self) -> int:
        return self.ready


def attester(driver: Driver, folder: Path, *, seen: tuple[int, ...] | None = None) -> GpuAttester:
    """*driver* on a machine whose bus shows its GPUs, or the ones on the buses *seen*."""
    buses = driver.buses if seen is None else seen
    pci = folder / ("pci-" + "-".join(map(str, buses)))
    for bus in buses:
        function = pci / f"0000:{bus:02x}:00.0"
        function.mkdir(parents=True, exist_ok=True)
        (function / "class").write_text("0x030200\n")
        (function / "vendor").write_text("0x10de\n")
    return GpuAttester(driver, pci)
