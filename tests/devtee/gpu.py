"""H100 evidence, byte for byte as driver 550.90.07 with VBIOS 96.00.9F.00.01 returns it, under test keys.

A report is an SPDM 1.1 GET_MEASUREMENTS request and its MEASUREMENTS response: 64 blocks, NVIDIA's opaque list in
the driver's order, an ECDSA P-384 signature by the attestation key; 4117 bytes. Golden values are digests of
simulated names; RIMs (`rim.py`) are built from the same table.

Source: DMTF DSP0274 1.1 §10.11; NVIDIA's opaque data types as read from genuine reports. Pure but for the random
responder nonce and the ECDSA nonce.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.devtee.pki import Pki
from tests.devtee.tdx import measured

__all__ = ["BLOCKS", "DRIVER", "DRIVER_ACTIVE", "VBIOS", "VBIOS_ACTIVE", "GpuForm", "golden", "report", "sha384"]

DRIVER: Final = "550.90.07"
VBIOS: Final = "96.00.9F.00.01"
BLOCKS: Final = 64
DRIVER_ACTIVE: Final = (7, *range(21, 41))
VBIOS_ACTIVE: Final = (*range(7), *range(8, 13))
_ZERO: Final = frozenset({0, 8, 10, 23, 24, 28})
"""Active entries that are all zero on the genuine machine."""
_ALTERNATIVES: Final = {23: 2, 24: 2, 32: 2, 34: 2, 35: 4, 36: 2}
NVDEC_ENABLED: Final = 0xAA
NVDEC_DISABLED: Final = 0x55


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def golden(index: int) -> list[bytes]:
    """The values a RIM allows for one measurement, in its order; the last is the one an honest GPU shows."""
    shown = bytes(48) if index in _ZERO else measured(f"H100 measurement {index}")
    others = [measured(f"H100 measurement {index} variant {n}") for n in range(1, _ALTERNATIVES.get(index, 1))]
    return [*others, shown]


@dataclass(frozen=True, slots=True)
class GpuForm:
    """What the report says.

    measurements: values by index that replace the golden ones. nvdec0: 0xAA enabled, 0x55 disabled (then NVIDIA's
    rule skips measurement 35). protected_pcie: 0xAA on, 0x55 off. feature_flag: opaque 36 (absent with this
    driver). fwid None means that of the certificate, b"" leaves it out. signer: index of the GPU whose key signs.
    response_nonce None means random.
    """

    driver: str = DRIVER
    vbios: str = VBIOS
    measurements: Mapping[int, bytes] = field(default_factory=dict)
    nvdec0: int = NVDEC_DISABLED
    protected_pcie: int = 0x55
    feature_flag: int | None = None
    fwid: bytes | None = None
    project: str = "1010"
    project_sku: str = "0200"
    chip_sku: str = "882"
    signer: int | None = None
    response_nonce: bytes | None = None
    spdm_version: int = 0x11
    extra_opaque: tuple[tuple[int, bytes], ...] = ()


def vbios_rim_id(form: GpuForm) -> str:
    return f"NV_GPU_VBIOS_{form.project}_{form.project_sku}_{form.chip_sku}_{form.vbios.replace('.', '')}"


def driver_rim_id(form: GpuForm) -> str:
    return f"NV_GPU_DRIVER_GH100_{form.driver}"


def report(pki: Pki, nonce: bytes, index: int, form: GpuForm) -> bytes:
    """Request ‖ response ‖ signature. *nonce* is the requester's, 32 bytes."""
    if len(nonce) != 32:
        raise ValueError(f"the nonce must be 32 bytes, not {len(nonce)}")
    record = b"".join(_block(i, form) for i in range(BLOCKS))
    opaque = _opaque(pki, form)
    signed = b"".join(
        (
            bytes([form.spdm_version, 0xE0, 0x01, 0xFF]),
            nonce,
            b"\0",
            bytes([form.spdm_version, 0x60, 0x00, 0x00, BLOCKS]),
            len(record).to_bytes(3, "little"),
            record,
            secrets.token_bytes(32) if form.response_nonce is None else form.response_nonce,
            len(opaque).to_bytes(2, "little"),
            opaque,
        )
    )
    key = pki[f"device-ak-{index if form.signer is None else form.signer}"].key
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384())))
    return signed + r.to_bytes(48) + s.to_bytes(48)


def _block(index: int, form: GpuForm) -> bytes:
    """One measurement block (55 bytes): index from 1, DMTF specification, type 1, SHA-384 size."""
    active = index in DRIVER_ACTIVE or index in VBIOS_ACTIVE
    value = form.measurements.get(index, golden(index)[-1] if active else bytes(48))
    if len(value) != 48:
        raise ValueError(f"measurement {index} must be 48 bytes")
    return struct.pack("<BBHBH", index + 1, 1, 51, 1, 48) + value


def _opaque(pki: Pki, form: GpuForm) -> bytes:
    counts = b"".join(struct.pack("<I", i in DRIVER_ACTIVE or i in VBIOS_ACTIVE) for i in range(BLOCKS))
    fwid = pki.facts.fwid if form.fwid is None else form.fwid
    items: list[tuple[int, bytes]] = [
        (6, _vbios_bytes(form.vbios)),
        (14, bytes.fromhex("b1030000")),
        (15, form.chip_sku.encode().ljust(9, b"\0")),
        (16, b"0\0\0\0\0"),
        (17, form.project.encode() + b"\0"),
        (18, form.project_sku.encode() + b"\0"),
        (19, b"\0\0"),
        (3, form.driver.encode() + b"\0"),
        (4, bytes.fromhex("8001000000000000")),
        (12, counts),
        (13, bytes.fromhex("00c00100")),
        (11, bytes([form.nvdec0])),
    ]
    items += [(20, fwid)] if fwid else []
    items.append((21, bytes([form.protected_pcie])))
    items += [(36, form.feature_flag.to_bytes(2, "little"))] if form.feature_flag is not None else []
    items += form.extra_opaque
    return b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in items)


def _vbios_bytes(version: str) -> bytes:
    """`96.00.9F.00.01` → 00 9f 00 96 01 00 00 00: the first four reversed, then the fifth."""
    parts = bytes.fromhex(version.replace(".", ""))
    if len(parts) != 5:
        raise ValueError(f"a VBIOS version has five parts: {version}")
    return parts[3::-1] + parts[4:] + bytes(3)
