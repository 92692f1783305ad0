"""A device's attestation report: SPDM 1.1 GET_MEASUREMENTS request ‖ MEASUREMENTS response, as NVIDIA GPUs sign it.

    0    11 E0 01 FF      version, code, signature requested, all measurements      (DSP0274 1.1 §10.11.1)
    4    nonce            32 bytes, the requester's: what the evidence is bound to
    36   00               slot
    37   11 60 00 00      version, code
    41   blocks           64 on a GPU, 31 on an LS10 switch
    42   record length    u24 = 55 × blocks
    45   blocks           index u8 from 1, specification 1, size u16 = 51, type 1, value size u16 = 48, SHA-384
    …    nonce            32 bytes, the device's own
    …    opaque           length u16, then {type u16, length u16, value}*
    end  signature        r ‖ s, 48 + 48 bytes, big endian, over everything before it

Every byte is read or the report is refused. Integers are little endian. Opaque types that this file does not know are
kept as they are: newer drivers add some, and all of them lie under the signature. Pure; runs at client and enclave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from attestation.errors import FormatError

__all__ = ["DIGEST_SIZE", "MAX_REPORT", "NONCE_SIZE", "Kind", "Report"]

Kind = Literal["gpu", "switch"]

MAX_REPORT: Final = 8192
NONCE_SIZE: Final = 32
DIGEST_SIZE: Final = 48
_SIGNATURE_SIZE: Final = 96
_BLOCK_SIZE: Final = 7 + DIGEST_SIZE
_BLOCK_HEAD: Final = bytes.fromhex("013300013000")
_RECORD_AT: Final = 45
_KINDS: Final[Mapping[int, Kind]] = MappingProxyType({64: "gpu", 31: "switch"})
_TEXT: Final = re.compile(r"[A-Za-z0-9._-]{0,32}")

DRIVER_VERSION, VBIOS_VERSION, NVDEC0, CHIP_SKU, PROJECT, PROJECT_SKU = 3, 6, 11, 15, 17, 18
FWID, PROTECTED_PCIE, SWITCH_PDI, GPU_PDI, CHIP_INFO, FEATURE_FLAG = 20, 21, 22, 26, 35, 36

ON: Final = 0xAA
OFF: Final = 0x55
_LINKS: Final = 18
_PDI: Final = 8
_SWITCH_GPUS: Final = 8


@dataclass(frozen=True, slots=True)
class Report:
    """What one device says of itself. Holding one proves nothing: the signature is checked in `appraise`.

    kind              told by the number of blocks
    nonce             32 bytes of the request: what the evidence was asked for with
    measurements      48 bytes each, keyed as RIMs count them, from 0 (block index less one)
    opaque            value by type
    driver_version    text; empty on a switch
    vbios_version     `96.00.9F.00.01`
    chip              GH100, LS10, or what CHIP_INFO says (GB100)
    fwid              48 bytes; None where the driver or the device does not give it
    protected_pcie    0xAA on, 0x55 off, None absent
    feature_flag      0 single GPU, 1 NVLink encryption, 2 protected PCIe, None absent
    switch_pdis       a GPU: the switch at the end of each of its 18 links, else empty; a switch: its own, one entry
    gpu_pdis          a switch: the eight GPUs it sees; a GPU: empty
    nvdec0            0xAA enabled, 0x55 disabled, None absent
    signed, signature the bytes signed, and r ‖ s
    """

    kind: Kind
    nonce: bytes
    measurements: Mapping[int, bytes]
    opaque: Mapping[int, bytes]
    driver_version: str
    vbios_version: str
    chip: str
    project: str
    project_sku: str
    chip_sku: str
    fwid: bytes | None
    protected_pcie: int | None
    feature_flag: int | None
    switch_pdis: tuple[bytes, ...]
    gpu_pdis: tuple[bytes, ...]
    nvdec0: int | None
    signed: bytes
    signature: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Report:
        """Read *raw* whole. Raises `FormatError`: FORMAT_GPU_SIZE, _HEADER, _BLOCK, _LENGTH, _OPAQUE."""
        smallest = _RECORD_AT + _BLOCK_SIZE + NONCE_SIZE + 2 + _SIGNATURE_SIZE
        if not smallest <= len(raw) <= MAX_REPORT:
            raise FormatError(
                "FORMAT_GPU_SIZE", "the report has an impossible size", expected=f"{smallest} to {MAX_REPORT}",
                actual=len(raw),
            )  # fmt: skip
        for at, want in ((0, bytes.fromhex("11e001ff")), (36, bytes.fromhex("0011600000"))):
            if raw[at : at + len(want)] != want:
                raise FormatError(
                    "FORMAT_GPU_HEADER", f"not SPDM 1.1 MEASUREMENTS at offset {at}", expected=want,
                    actual=raw[at : at + len(want)],
                )  # fmt: skip
        kind = _KINDS.get(raw[41])
        if kind is None:
            raise FormatError(
                "FORMAT_GPU_BLOCK", "an unknown number of measurement blocks", expected="64 (GPU) or 31 (LS10)",
                actual=raw[41],
            )  # fmt: skip
        record = int.from_bytes(raw[42:45], "little")
        if record != raw[41] * _BLOCK_SIZE or _RECORD_AT + record + NONCE_SIZE + 2 + _SIGNATURE_SIZE > len(raw):
            raise FormatError(
                "FORMAT_GPU_LENGTH", "the measurement record has another length", expected=raw[41] * _BLOCK_SIZE,
                actual=record,
            )  # fmt: skip
        measurements = _blocks(raw, raw[41])
        opaque = _opaque(raw, _RECORD_AT + record + NONCE_SIZE)
        return _report(kind, raw, measurements, opaque)


def _blocks(raw: bytes, count: int) -> dict[int, bytes]:
    found = {}
    for number in range(count):
        at = _RECORD_AT + number * _BLOCK_SIZE
        # Indices run from 1 without a gap, so none can stand twice and none is missing.
        if raw[at] != number + 1 or raw[at + 1 : at + 7] != _BLOCK_HEAD:
            raise FormatError(
                "FORMAT_GPU_BLOCK", f"block {number} is not a SHA-384 measurement in its place",
                expected=bytes([number + 1]) + _BLOCK_HEAD, actual=raw[at : at + 7],
            )  # fmt: skip
        found[number] = raw[at + 7 : at + _BLOCK_SIZE]
    return found


def _opaque(raw: bytes, at: int) -> dict[int, bytes]:
    end = len(raw) - _SIGNATURE_SIZE
    length = int.from_bytes(raw[at : at + 2], "little")
    at += 2
    if at + length != end:
        raise FormatError(
            "FORMAT_GPU_LENGTH", "lengths do not add up to the report's", expected=end - at, actual=length
        )
    found: dict[int, bytes] = {}
    while at < end:
        if at + 4 > end:
            raise FormatError("FORMAT_GPU_OPAQUE", "the opaque list ends inside a head", actual=end - at)
        kind, size = int.from_bytes(raw[at : at + 2], "little"), int.from_bytes(raw[at + 2 : at + 4], "little")
        at += 4
        if at + size > end:
            raise FormatError("FORMAT_GPU_OPAQUE", f"opaque type {kind} is longer than the list", actual=size)
        if kind in found:
            raise FormatError("FORMAT_GPU_OPAQUE", f"opaque type {kind} stands twice")
        found[kind] = raw[at : at + size]
        at += size
    return found


def _report(kind: Kind, raw: bytes, measurements: dict[int, bytes], opaque: dict[int, bytes]) -> Report:
    gpu = kind == "gpu"
    return Report(
        kind=kind,
        nonce=raw[4:36],
        measurements=MappingProxyType(measurements),
        opaque=MappingProxyType(opaque),
        driver_version=_text(opaque, DRIVER_VERSION, needed=True) if gpu else "",
        vbios_version=_vbios(opaque) if gpu else _text(opaque, VBIOS_VERSION, needed=True),
        chip=(_text(opaque, CHIP_INFO) or "GH100") if gpu else "LS10",
        project=_text(opaque, PROJECT, needed=gpu),
        project_sku=_text(opaque, PROJECT_SKU, needed=gpu),
        chip_sku=_text(opaque, CHIP_SKU, needed=gpu),
        fwid=_sized(opaque, FWID, DIGEST_SIZE),
        protected_pcie=_switch(opaque, PROTECTED_PCIE),
        feature_flag=_flag(opaque),
        switch_pdis=_pdis(_sized(opaque, SWITCH_PDI, _LINKS * _PDI if gpu else _PDI)),
        gpu_pdis=() if gpu else _pdis(_sized(opaque, GPU_PDI, 128))[:_SWITCH_GPUS],
        nvdec0=_switch(opaque, NVDEC0),
        signed=raw[:-_SIGNATURE_SIZE],
        signature=raw[-_SIGNATURE_SIZE:],
    )


def _sized(opaque: Mapping[int, bytes], kind: int, size: int) -> bytes | None:
    value = opaque.get(kind)
    if value is not None and len(value) != size:
        raise FormatError("FORMAT_GPU_OPAQUE", f"opaque type {kind} has another size", expected=size, actual=len(value))
    return value


def _switch(opaque: Mapping[int, bytes], kind: int) -> int | None:
    """A byte that is 0xAA or 0x55: NVIDIA's verifier takes any other value for "off", we take it for neither."""
    value = _sized(opaque, kind, 1)
    if value is None:
        return None
    if value[0] not in (ON, OFF):
        raise FormatError("FORMAT_GPU_OPAQUE", f"opaque type {kind} is neither on nor off", expected="aa or 55",
                          actual=value)  # fmt: skip
    return value[0]


def _flag(opaque: Mapping[int, bytes]) -> int | None:
    value = _sized(opaque, FEATURE_FLAG, 2)
    return None if value is None else int.from_bytes(value, "little")


def _text(opaque: Mapping[int, bytes], kind: int, *, needed: bool = False) -> str:
    """Text up to its NULs. Letters, digits, `.`, `_`, `-` alone: RIM ids, and so file names, are made of it."""
    value = opaque.get(kind, b"")
    body = value.rstrip(b"\0")
    text = body.decode("ascii", "replace")
    if not _TEXT.fullmatch(text) or (needed and not text):
        raise FormatError("FORMAT_GPU_OPAQUE", f"opaque type {kind} is not the text it should be", actual=value)
    return text


def _vbios(opaque: Mapping[int, bytes]) -> str:
    """`00 9f 00 96 01 00 00 00` → `96.00.9F.00.01`: the first four reversed, then the fifth."""
    value = _sized(opaque, VBIOS_VERSION, 8)
    if value is None or value[5:] != bytes(3):
        raise FormatError("FORMAT_GPU_OPAQUE", "no VBIOS version of five parts", actual=value or "nothing")
    return ".".join(f"{b:02X}" for b in (*value[3::-1], value[4]))


def _pdis(value: bytes | None) -> tuple[bytes, ...]:
    return () if value is None else tuple(value[at : at + _PDI] for at in range(0, len(value), _PDI))
