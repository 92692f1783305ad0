"""The development TEE as a library: one simulated machine with its platform, its TD and its GPUs.

`DevTee.create` makes a fresh PKI in a state directory, `DevTee.load` reads one again. Tests ask it for honest
evidence, or hand it a changed form and get the lie, signed as well as the truth would be. The running machine
(`machine.py`) serves the same object through files and a socket.

Nothing here is evidence of anything: whoever holds the state directory signs whatever it likes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from cryptography.hazmat.primitives import serialization

from tests.devtee import gpu, ocsp, rim, tdx
from tests.devtee.eventlog import Event, boot_events, replay
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec
from tests.devtee.pki import Pki
from tests.devtee.rim import RimSpec
from tests.devtee.tdx import CollateralSpec, QuoteForm, Td

__all__ = ["DevTee", "Roots"]

_FILE: Final = "pki.json"


@dataclass(frozen=True, slots=True)
class Roots:
    """The three trust anchors of one machine, DER."""

    intel: bytes
    nvidia_device: bytes
    nvidia_rim: bytes


class DevTee:
    """One simulated machine. `td` is what its CPU reports about the TD, `events` the boot that RTMR0-2 come from."""

    def __init__(self, pki: Pki, events: Sequence[Event] | None = None) -> None:
        self.pki = pki
        self.events: list[Event] = list(boot_events() if events is None else events)
        self.td = Td(rtmr=replay(self.events))

    @classmethod
    def create(cls, state_dir: Path, *, gpus: int = 8) -> DevTee:
        """A new PKI with *gpus* device identities, saved in *state_dir* (made 0700). Refuses to replace one."""
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        if (state_dir / _FILE).exists():
            raise FileExistsError(f"{state_dir} already holds a development TEE: load it, or remove the folder")
        pki = Pki.fresh(gpus)
        pki.save(state_dir / _FILE)
        return cls(pki)

    @classmethod
    def load(cls, state_dir: Path) -> DevTee:
        """The machine whose PKI lies in *state_dir*, freshly booted."""
        return cls(Pki.load(state_dir / _FILE))

    @classmethod
    def open(cls, state_dir: Path, *, gpus: int = 8) -> DevTee:
        """Load what is there, or create it."""
        return cls.load(state_dir) if (state_dir / _FILE).exists() else cls.create(state_dir, gpus=gpus)

    @property
    def roots(self) -> Roots:
        return Roots(self.pki["intel-root"].der, self.pki["device-root"].der, self.pki["rim-root"].der)

    @property
    def roots_pem(self) -> dict[str, bytes]:
        """PEM of the roots by the names of `Roots`' fields."""
        roles = {"intel": "intel-root", "nvidia_device": "device-root", "nvidia_rim": "rim-root"}
        return {n: self.pki[r].cert.public_bytes(serialization.Encoding.PEM) for n, r in roles.items()}

    def extend(self, index: int, digest: bytes) -> bytes:
        """RTMR[index] = SHA-384(RTMR ‖ digest), and its new value (TDG.MR.RTMR.EXTEND)."""
        if not 0 <= index <= 3 or len(digest) != 48:
            raise ValueError("an extend names RTMR 0 to 3 and brings 48 bytes")
        registers = list(self.td.rtmr)
        registers[index] = gpu.sha384(registers[index] + digest)
        self.td = replace(self.td, rtmr=(registers[0], registers[1], registers[2], registers[3]))
        return registers[index]

    def quote(
        self,
        report_data: bytes,
        *,
        version: Literal[4, 5] | None = None,
        td: Td | None = None,
        form: QuoteForm | None = None,
    ) -> bytes:
        """A TDX quote over 64 bytes of *report_data*. *td* and *form* replace the honest values; *version* the
        form's version (5 alone means a TD report 1.5)."""
        form = form or (QuoteForm(version=5, body="1.5") if version == 5 else QuoteForm())
        if version is not None:
            form = replace(form, version=version)
        return tdx.quote(self.pki, report_data, td or self.td, form)

    def collateral(self, now: int, spec: CollateralSpec | None = None) -> bytes:
        """`QuoteCollateralV3` as JSON, valid around *now* (unix seconds)."""
        return tdx.collateral(self.pki, now, spec or CollateralSpec())

    def gpu_report(self, nonce: bytes, index: int = 0, form: GpuForm | None = None) -> tuple[bytes, bytes]:
        """One GPU's SPDM report over *nonce* (32 bytes) and its PEM chain."""
        return gpu.report(self.pki, nonce, index, form or GpuForm()), self.pki.device_chain(index)

    def gpu_evidence(
        self, nonce: bytes, indices: Sequence[int] = (0,), form: GpuForm | None = None
    ) -> list[dict[str, str]]:
        """Evidence in NVIDIA's JSON shape. An index that stands twice is one GPU shown twice."""
        found = []
        for index in indices:
            report, chain = self.gpu_report(nonce, index, form)
            found.append(
                {
                    "certificate": base64.b64encode(chain).decode(),
                    "evidence": base64.b64encode(report).decode(),
                    "arch": "HOPPER",
                    "nonce": nonce.hex(),
                }
            )
        return found

    def rims(self, spec: RimSpec | None = None) -> dict[str, bytes]:
        """The driver's and the VBIOS's RIM, XML by RIM id."""
        return rim.rims(self.pki, spec or RimSpec())

    def ocsp(self, now: int, *, gpus: int = 1, spec: OcspSpec | None = None) -> dict[str, bytes]:
        """OCSP answers (DER) by name: device-ica, device-identity, device-ik (device-ik1 … for further GPUs),
        rim-driver-l4, rim-driver-l3, rim-driver-l2, rim-vbios-l4."""
        return ocsp.responses(self.pki, now, gpus, spec or OcspSpec())

    def changed(self, **fields: Any) -> Td:  # Any: fields of Td
        """This machine's TD with some fields replaced."""
        return replace(self.td, **fields)
