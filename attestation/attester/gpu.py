"""The GPU attester: reports, certificate chains and driver state through NVML (package `nvidia-ml-py`).

Runs in the enclave. NVML is the measured guest's own driver; still nothing it returns is proof by itself: the enclave
verifies this evidence as a client would before it lets plaintext near a GPU. The GPU signs a nonce that the caller
derived from its certificate key, never one that somebody sent (`attestation.binding`).

`pynvml` is imported when an attester is made, so that nothing else needs it. It loads `libnvidia-ml.so.1`, which the
dynamic loader finds; the development TEE ships one of its own.

The driver's list is compared with the kernel's list of PCI functions each time: a display function that the driver does
not count would be hardware in the machine that no evidence speaks of (GPU facts §7, 6).
"""

from __future__ import annotations

import ctypes
import importlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from attestation.attester.base import AttesterError
from attestation.errors import FormatError
from attestation.gpu.certificates import split_pem
from attestation.gpu.evidence import CHAIN, MAX_GPUS, GpuDevice, GpuEvidence
from attestation.gpu.report import MAX_REPORT, NONCE_SIZE

__all__ = ["GpuAttester", "GpuState"]

T = TypeVar("T")

MAX_CHAIN: Final = 0x1400
"""Bytes of PEM that NVML has room for (NVML_GPU_ATTESTATION_CERT_CHAIN_SIZE)."""
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
MAX_FUNCTIONS: Final = 4096
_ADDRESS: Final = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_DISPLAY: Final = "0x03"  # PCI class code 03h: VGA, 3D and other display controllers
_NVIDIA: Final = "0x10de"
_ON: Final = 1
_PRODUCTION: Final = 2
_MODES: Final[dict[int, Literal["spt", "ppcie", "mpt"]]] = {0: "spt", 1: "ppcie", 2: "mpt"}
_HINT: Final = "nvidia-smi conf-compute -q shows what the driver says"


@dataclass(frozen=True, slots=True)
class GpuState:
    """What the driver says of the machine's GPUs. The GPU signs none of it: it is worth what the measured TD is worth.

    count, switches   GPUs, NVSwitches
    mode              spt, ppcie (protected PCIe), mpt (NVLink encryption)
    cc                confidential computing is on
    dev_tools         developer tools are on: then nothing is confidential
    ready             GPUs take work
    production        the environment is production, not simulation
    """

    count: int
    switches: int
    mode: Literal["spt", "ppcie", "mpt"]
    cc: bool
    dev_tools: bool
    ready: bool
    production: bool


class GpuAttester:
    """The GPUs of the machine this process runs in. Thread-safe: one lock, one NVML call at a time."""

    def __init__(self, nvml: Any = None, pci: Path = PCI_DEVICES) -> None:  # Any: pynvml ships no types
        """Loads and initialises NVML; *nvml* stands in for the module `pynvml`, *pci* is the kernel's list of PCI
        functions (sysfs). Raises `AttesterError`."""
        self._lock = threading.Lock()
        self._pci = pci
        self._open = False
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                raise AttesterError(
                    "ATTESTER_NVML_MISSING", "the Python package nvidia-ml-py is not installed",
                    hint="it is part of vouchsafe[enclave]; or configure the enclave without a GPU",
                ) from None  # fmt: skip
        self._nvml = nvml
        self._call("start NVML", nvml.nvmlInit)
        self._open = True

    def collect(self, nonce: bytes) -> GpuEvidence:
        """Reports of all GPUs over *nonce* (32 bytes), in PCI order. Blocks tens of milliseconds per GPU.

        Raises `AttesterError`; ATTESTER_GPU_PPCIE on a protected-PCIe machine, whose switches cannot be asked here."""
        if len(nonce) != NONCE_SIZE:
            raise AttesterError("ATTESTER_GPU_NONCE", "the nonce has another length", expected=NONCE_SIZE,
                                actual=len(nonce))  # fmt: skip
        with self._lock:
            self._mode()
            return GpuEvidence(tuple(self._device(handle, bytes(nonce)) for handle in self._handles()))

    def state(self) -> GpuState:
        """What the driver says now. Raises `AttesterError`."""
        with self._lock:
            mode, settings = self._mode()
            ready = self._call("read the ready state", self._nvml.nvmlSystemGetConfComputeGpusReadyState)
            return GpuState(
                count=len(self._handles()),
                switches=0,
                mode=mode,
                cc=settings.ccFeature == _ON,
                # Whatever is not plainly off counts as on.
                dev_tools=settings.devToolsMode != 0,
                ready=ready == _ON,
                production=settings.environment == _PRODUCTION,
            )

    def set_ready(self, ready: bool) -> None:
        """Let the GPUs take work, or stop them, and see that the driver did. Needs root. Raises `AttesterError`."""
        wanted = int(ready)
        with self._lock:
            self._call(
                "set the ready state", lambda: self._nvml.nvmlSystemSetConfComputeGpusReadyState(wanted),
                hint="it needs root; after a failed attestation the state stays as it is until the machine reboots",
            )  # fmt: skip
            actual = self._call("read the ready state", self._nvml.nvmlSystemGetConfComputeGpusReadyState)
        if actual != wanted:
            raise AttesterError("ATTESTER_GPU_READY", "the ready state did not change", expected=wanted, actual=actual)

    def close(self) -> None:
        """Let go of NVML. May be called twice."""
        with self._lock:
            if self._open:
                self._open = False
                self._call("stop NVML", self._nvml.nvmlShutdown)

    def _mode(self) -> tuple[Literal["spt", "ppcie", "mpt"], Any]:  # Any: pynvml ships no types
        """The multi-GPU mode and the settings it was read from; protected PCIe is refused by name."""
        settings = self._nvml.c_nvmlSystemConfComputeSettings_v1_t()
        # This one wrapper returns NVML's status instead of raising it.
        self._call("read the confidential-computing settings", lambda: self._nvml._nvmlCheckReturn(
            self._nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings))))  # fmt: skip
        mode = _MODES.get(settings.multiGpuMode)
        if mode is None:
            raise AttesterError(
                "ATTESTER_GPU_MODE", "the driver is in an unknown multi-GPU mode", expected=sorted(_MODES),
                actual=settings.multiGpuMode,
            )  # fmt: skip
        if mode == "ppcie":
            raise AttesterError(
                "ATTESTER_GPU_PPCIE", "this machine runs protected PCIe: its NVSwitches must be attested too",
                expected="mode spt or mpt", actual=mode,
                hint="NVML cannot ask switches (NSCQ can): use single-GPU passthrough until this release supports it",
            )  # fmt: skip
        return mode, settings

    def _handles(self) -> list[Any]:  # Any: pynvml ships no types
        """All GPUs in PCI order: domain, bus, device; exactly those that the kernel shows."""
        count = self._call("count the GPUs", self._nvml.nvmlDeviceGetCount)
        if not 1 <= count <= MAX_GPUS:
            raise AttesterError("ATTESTER_GPU_COUNT", "an impossible number of GPUs", expected=f"1 to {MAX_GPUS}",
                                actual=count)  # fmt: skip
        found = []
        for index in range(count):
            # A GPU that the driver lists but cannot open must not be left out: evidence is of all of them.
            handle = self._call(f"open GPU {index}", partial(self._nvml.nvmlDeviceGetHandleByIndex, index))
            pci = self._call(f"locate GPU {index}", partial(self._nvml.nvmlDeviceGetPciInfo, handle))
            found.append(((pci.domain, pci.bus, pci.device), index, handle))
        listed, there = sorted(at for at, _, _ in found), _display_functions(self._pci)
        if listed != there:
            raise AttesterError(
                "ATTESTER_GPU_PCI", "the driver does not list the display devices that are on the PCI bus",
                expected=[_address(at) for at in there], actual=[_address(at) for at in listed],
                hint="pass NVIDIA GPUs through and no other display device; lspci -d ::0300, ::0302 shows them",
            )  # fmt: skip
        return [handle for _, _, handle in sorted(found, key=lambda f: f[:2])]

    def _device(self, handle: Any, nonce: bytes) -> GpuDevice:  # Any: pynvml ships no types
        answer = self._call(
            "get an attestation report", lambda: self._nvml.nvmlDeviceGetConfComputeGpuAttestationReport(handle, nonce)
        )
        report = _taken(answer.attestationReport, answer.attestationReportSize, MAX_REPORT, "report")
        if report[4 : 4 + NONCE_SIZE] != nonce:
            raise AttesterError("ATTESTER_GPU_REPORT", "the driver returned a report over another nonce",
                                expected=nonce, actual=report[4 : 4 + NONCE_SIZE])  # fmt: skip
        answer = self._call(
            "get a certificate chain", lambda: self._nvml.nvmlDeviceGetConfComputeGpuCertificate(handle)
        )
        pem = _taken(answer.attestationCertChain, answer.attestationCertChainSize, MAX_CHAIN, "certificate chain")
        try:
            chain = split_pem(pem.rstrip(b"\0"))
        except FormatError as err:
            raise AttesterError("ATTESTER_GPU_CHAIN", err.reason, expected=err.expected, actual=err.actual) from err
        if len(chain) != CHAIN + 1:
            raise AttesterError("ATTESTER_GPU_CHAIN", "the driver returned another number of certificates",
                                expected=CHAIN + 1, actual=len(chain))  # fmt: skip
        return GpuDevice("gpu", report, chain[:CHAIN])

    def _call(self, what: str, call: Callable[[], T], *, hint: str = _HINT) -> T:
        try:
            return call()
        except self._nvml.NVMLError as err:
            raise AttesterError(
                "ATTESTER_NVML", f"the NVIDIA driver did not {what}: {' '.join(str(err).split())[:120]}",
                actual=f"NVML status {getattr(err, 'value', 'unknown')}", hint=hint,
            ) from err  # fmt: skip


def _display_functions(folder: Path) -> list[tuple[int, int, int]]:
    """Domain, bus and device of every display function of the machine, in order. Raises `AttesterError`, also for one
    that is not NVIDIA's: nobody vouches for it."""
    found = []
    try:
        names = sorted(entry.name for entry in folder.iterdir())
        if len(names) > MAX_FUNCTIONS:
            raise AttesterError("ATTESTER_GPU_PCI", "an impossible number of PCI functions", actual=len(names))
        for name in names:
            if not _word(folder / name / "class").startswith(_DISPLAY):
                continue
            at, vendor = _ADDRESS.fullmatch(name), _word(folder / name / "vendor")
            if at is None or vendor != _NVIDIA or at[4] != "0":
                raise AttesterError(
                    "ATTESTER_GPU_PCI", "a display device is there that is no GPU of NVIDIA's", expected=_NVIDIA,
                    actual=f"{name} of vendor {vendor}", hint="start the machine without a display device",
                )  # fmt: skip
            found.append((int(at[1], 16), int(at[2], 16), int(at[3], 16)))
    except OSError as err:
        raise AttesterError(
            "ATTESTER_GPU_PCI", f"cannot read the kernel's list of PCI functions in {folder}: {err.strerror}",
            hint="mount sysfs, or correct paths.pci",
        ) from err  # fmt: skip
    return found


def _word(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(64).decode("ascii", "replace").strip()


def _address(at: tuple[int, int, int]) -> str:
    return "{:04x}:{:02x}:{:02x}".format(*at)


def _taken(array: Any, size: int, limit: int, what: str) -> bytes:  # Any: a ctypes array
    if not 1 <= size <= min(limit, len(array)):
        raise AttesterError(
            "ATTESTER_GPU_SIZE", f"the driver returned a {what} of an impossible size", expected=f"1 to {limit}",
            actual=size,
        )  # fmt: skip
    return bytes(array[:size])
