"""The development TEE as a running machine: files and a socket that the production attesters read as hardware.

    DIR/tsm/                configfs-tsm: quotes
    DIR/measurements/       the TD's registers; a write of 48 bytes extends an RTMR
    DIR/acpi/               CCEL and data/CCEL: the event log behind RTMR0-2
    DIR/endorsements/       collateral.json, rims/<id>.xml, ocsp/<name>.der, kept fresh
    DIR/roots/              intel, nvidia_device, nvidia_rim as .der and .pem
    DIR/lib/, DIR/nvml.sock the NVML stand-in (LD_LIBRARY_PATH=DIR/lib)
    DIR/pci/                the kernel's list of PCI functions: class and vendor

One process, one thread, one loop that looks at the directories every few milliseconds. A start is a boot: RTMR3 is
zero again, the GPUs are not ready; the PKI in DIR stays what it was.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tests.devtee.eventlog import ccel_log, ccel_table
from tests.devtee.nvml import GpuSystem, NvmlServer, build_library, write_pci
from tests.devtee.ocsp import OcspSpec
from tests.devtee.registers import Registers
from tests.devtee.rim import RimSpec
from tests.devtee.tdx import CollateralSpec, QuoteForm
from tests.devtee.tee import DevTee
from tests.devtee.tsm import TsmDirectory

__all__ = ["Behaviour", "Machine"]

POLL: Final = 0.004
"""Seconds between two looks."""
REFRESH: Final = 3600.0
"""Seconds between two sets of endorsements: OCSP answers live 24 hours, collateral 30 days."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the machine behaves: honest by default, and every part of it can lie."""

    quote: QuoteForm = field(default_factory=QuoteForm)
    collateral: CollateralSpec = field(default_factory=CollateralSpec)
    gpu: GpuSystem = field(default_factory=GpuSystem)
    rim: RimSpec = field(default_factory=RimSpec)
    ocsp: OcspSpec = field(default_factory=OcspSpec)


class Machine:
    """Serves *state*. Use as a context manager: leaving it removes FIFOs and the socket."""

    def __init__(self, state: Path, tee: DevTee, behaviour: Behaviour | None = None) -> None:
        self.state, self.tee, self.behaviour = state, tee, behaviour or Behaviour()
        # Two machines in one folder would serve each other's files.
        self._lock = (state / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self._lock.close()
            raise RuntimeError(f"another development TEE runs in {state}: stop it, or name another folder") from err
        self._write_static()
        self._refreshed = 0.0
        self._refresh()
        self._registers = Registers(state / "measurements", lambda: tee.td, tee.extend)
        self._tsm = TsmDirectory(state / "tsm", lambda data: tee.quote(data, form=self.behaviour.quote))
        self._nvml = NvmlServer(state / "nvml.sock", tee, self.behaviour.gpu)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, stopped: Callable[[], bool]) -> None:
        """Serve until *stopped* says so; it is asked every few milliseconds."""
        while not stopped():
            self.step()

    def step(self) -> None:
        """One look at everything, and at most `POLL` seconds of waiting."""
        self._registers.poll()
        self._tsm.poll()
        self._nvml.wait(POLL)
        if time.monotonic() - self._refreshed > REFRESH:
            self._refresh()

    def close(self) -> None:
        self._nvml.close()
        self._tsm.close()
        self._lock.close()

    def _write_static(self) -> None:
        acpi = self.state / "acpi"
        (acpi / "data").mkdir(parents=True, exist_ok=True)
        (acpi / "CCEL").write_bytes(ccel_table())
        (acpi / "data" / "CCEL").write_bytes(ccel_log(self.tee.events))
        roots = self.state / "roots"
        roots.mkdir(exist_ok=True)
        for name, text in self.tee.roots_pem.items():
            (roots / f"{name}.pem").write_bytes(text)
            (roots / f"{name}.der").write_bytes(getattr(self.tee.roots, name))
        build_library(self.state / "lib")
        write_pci(self.state / "pci", self.behaviour.gpu)

    def _refresh(self) -> None:
        """Write the endorsements. Each file is replaced at once: a reader sees the old or the new one."""
        now, folder, b = int(time.time()), self.state / "endorsements", self.behaviour
        files = {"collateral.json": self.tee.collateral(now, b.collateral)}
        rim = replace(b.rim, form=b.gpu.form)
        files |= {f"rims/{name}.xml": text for name, text in self.tee.rims(rim).items()}
        answers = self.tee.ocsp(now, gpus=min(b.gpu.gpus, self.tee.pki.gpus), spec=b.ocsp)
        files |= {f"ocsp/{name}.der": answer for name, answer in answers.items()}
        if self._refreshed == 0.0:
            shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f".{target.name}")
            fresh.write_bytes(content)
            fresh.replace(target)
        self._refreshed = time.monotonic()
