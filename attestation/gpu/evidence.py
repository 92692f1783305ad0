"""GPU evidence as it travels: reports and certificate chains of all devices of one TD, in one compressed item.

Inflated, it is deterministic CBOR (vouchsafe RA-TLS profile §3.2)

    {"chains": [[DER ICA, DER Identity], …],
     "devices": [{"kind": "gpu" | "switch", "chain": index, "ak": DER, "ik": DER, "report": bytes}, …]}

with each upper chain once, in the order of first use, GPUs before switches. The digest in the claims covers the bytes
as carried, so it is checked before anything here runs. Every length a peer names is capped before it is acted on.

Pure; runs at client and enclave. NVIDIA's JSON shape is read too, for evidence that other tools collected.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from attestation import cbor
from attestation.errors import FormatError
from attestation.gpu.certificates import issued, split_pem
from attestation.gpu.report import MAX_REPORT, Kind

__all__ = ["GpuDevice", "GpuEvidence", "decode", "encode", "from_nvidia_json"]

MAX_GPUS: Final = 16
MAX_SWITCHES: Final = 8
MAX_CHAINS: Final = 4
MAX_CERTIFICATE: Final = 4096
MAX_INFLATED: Final = 256 * 1024
MAX_CARRIED: Final = 64 * 1024
MAX_PEM: Final = 16 * 1024
CHAIN: Final = 4
"""Certificates per device: AK, IK, ICA, Identity. The root is the verifier's own and is never carried."""
_UPPER: Final = 2
_KINDS: Final = ("gpu", "switch")


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """One device's claim, in bytes, undecided.

    report   SPDM report (`report.Report`)
    chain    DER certificates, leaf (AK) first: AK, IK, ICA, Identity, without the root
    """

    kind: Kind
    report: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class GpuEvidence:
    """Evidence of all devices, GPUs first, in PCI order. Proves nothing: see `appraise`."""

    devices: tuple[GpuDevice, ...]


def encode(evidence: GpuEvidence) -> bytes:
    """*evidence* as carried: one zlib stream. Raises `FormatError` for evidence that `decode` would refuse."""
    chains: list[list[bytes]] = []
    devices = []
    for number, device in enumerate(evidence.devices):
        if len(device.chain) != CHAIN:
            raise FormatError(
                "FORMAT_GPU_CHAIN", f"device {number} has another number of certificates", expected=CHAIN,
                actual=len(device.chain),
            )  # fmt: skip
        upper = list(device.chain[2:])
        if upper not in chains:
            chains.append(upper)
        ak, ik = device.chain[:2]
        devices.append({"kind": device.kind, "chain": chains.index(upper), "ak": ak, "ik": ik, "report": device.report})
    plain = cbor.encode({"chains": chains, "devices": devices})
    _read(plain)
    carried = zlib.compress(plain, 9)
    _size(carried, MAX_CARRIED, "the evidence as carried")
    return carried


def decode(carried: bytes) -> GpuEvidence:
    """Evidence as carried. Raises `FormatError` FORMAT_GPU_SIZE, _ZLIB, _CBOR, _SHAPE, _COUNT, _ORDER."""
    _size(carried, MAX_CARRIED, "the evidence as carried")
    inflater = zlib.decompressobj()
    try:
        # One byte beyond the cap tells a bomb from evidence of exactly the cap, at a bounded cost.
        plain = inflater.decompress(carried, MAX_INFLATED + 1)
    except zlib.error:
        raise FormatError("FORMAT_GPU_ZLIB", "not a zlib stream (RFC 1950)") from None
    _size(plain, MAX_INFLATED, "the evidence inflated")
    if not inflater.eof:
        raise FormatError("FORMAT_GPU_ZLIB", "the zlib stream has no end")
    if inflater.unused_data or inflater.unconsumed_tail:
        raise FormatError("FORMAT_GPU_ZLIB", "bytes after the zlib stream", actual=len(inflater.unused_data))
    return _read(plain)


def from_nvidia_json(gpus: Sequence[object], switches: Sequence[object]) -> GpuEvidence:
    """Evidence in NVIDIA's shape: lists of `{"certificate": base64 of PEM, "evidence": base64, "arch", "nonce"}`.

    `arch` and `nonce` are statements of the carrier: their form is read, they decide nothing (the signed report
    says both). The root at the end of each chain is dropped when it issued itself and the fourth certificate; one
    that did not stays, so that the chain stage refuses it. Raises `FormatError`.
    """
    _count(len(gpus), len(switches))
    pairs: list[tuple[Kind, object]] = [("gpu", e) for e in gpus]
    pairs += [("switch", e) for e in switches]
    return GpuEvidence(tuple(_nvidia(kind, entry, number) for number, (kind, entry) in enumerate(pairs)))


def _nvidia(kind: Kind, entry: object, number: int) -> GpuDevice:
    if not isinstance(entry, dict) or not {"certificate", "evidence"} <= set(entry):
        raise FormatError("FORMAT_GPU_JSON", f"entry {number} is not an object with `certificate` and `evidence`")
    for key, size in (("arch", 32), ("nonce", 64)):
        value = entry.get(key, "")
        if not isinstance(value, str) or len(value) > size:
            raise FormatError("FORMAT_GPU_JSON", f"`{key}` of entry {number} is not a short text")
    chain = split_pem(_base64(entry["certificate"], "certificate", number, MAX_PEM))
    genuine_form = len(chain) == CHAIN + 1 and issued(chain[-1], chain[-1]) and issued(chain[-2], chain[-1])
    if genuine_form or len(chain) != CHAIN + 1:
        chain = chain[:-1]
    return GpuDevice(kind, _base64(entry["evidence"], "evidence", number, MAX_REPORT), chain)


def _base64(text: object, key: str, number: int, limit: int) -> bytes:
    if not isinstance(text, str) or len(text) > limit * 4 // 3 + 4:
        raise FormatError("FORMAT_GPU_JSON", f"`{key}` of entry {number} is not base64 of at most {limit} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("FORMAT_GPU_JSON", f"`{key}` of entry {number} is not base64") from None


def _size(raw: bytes, limit: int, what: str) -> None:
    if len(raw) > limit:
        raise FormatError("FORMAT_GPU_SIZE", f"{what} is too long", expected=f"at most {limit} bytes", actual=len(raw))


def _count(gpus: int, switches: int) -> None:
    if gpus > MAX_GPUS or switches > MAX_SWITCHES or gpus + switches < 1:
        raise FormatError(
            "FORMAT_GPU_COUNT", "an impossible number of devices",
            expected=f"1 or more, at most {MAX_GPUS} GPUs and {MAX_SWITCHES} switches", actual=f"{gpus} and {switches}",
        )  # fmt: skip


def _read(plain: bytes) -> GpuEvidence:
    try:
        item = cbor.decode(plain, max_size=MAX_INFLATED, max_depth=4)
    except FormatError as err:
        raise FormatError("FORMAT_GPU_CBOR", err.reason, expected=err.expected, actual=err.actual) from err
    fields = _fields(item, {"chains", "devices"}, "the evidence")
    chains, devices = _list(fields["chains"], "chains", MAX_CHAINS), _list(fields["devices"], "devices", 24)
    uppers = [tuple(_bytes(c, "a certificate", MAX_CERTIFICATE) for c in _list(u, "a chain", _UPPER)) for u in chains]
    if any(len(u) != _UPPER for u in uppers) or len(set(uppers)) != len(uppers):
        raise FormatError("FORMAT_GPU_SHAPE", "upper chains are two certificates each, each chain once")
    found, used = [], list[int]()
    for device in devices:
        read, index = _device(device, uppers)
        found.append(read)
        used.append(index)
    _count(sum(d.kind == "gpu" for d in found), sum(d.kind == "switch" for d in found))
    if list(dict.fromkeys(used)) != list(range(len(uppers))):
        raise FormatError("FORMAT_GPU_ORDER", "chains do not stand in the order of their first use, each one used")
    if [d.kind for d in found] != sorted((d.kind for d in found), key=_KINDS.index):
        raise FormatError("FORMAT_GPU_ORDER", "a GPU stands after a switch")
    return GpuEvidence(tuple(found))


def _device(item: object, uppers: Sequence[tuple[bytes, ...]]) -> tuple[GpuDevice, int]:
    fields = _fields(item, {"kind", "chain", "ak", "ik", "report"}, "a device")
    kind, index = fields["kind"], fields["chain"]
    if kind not in _KINDS:
        raise FormatError("FORMAT_GPU_SHAPE", "a device of unknown kind", expected="gpu or switch", actual=f"{kind!r}")
    if type(index) is not int or not 0 <= index < len(uppers):
        raise FormatError("FORMAT_GPU_SHAPE", "a device names a chain that is not there", actual=f"{index!r}")
    ak, ik = (_bytes(fields[name], name, MAX_CERTIFICATE) for name in ("ak", "ik"))
    return GpuDevice(kind, _bytes(fields["report"], "a report", MAX_REPORT), (ak, ik, *uppers[index])), index


def _fields(item: object, names: set[str], what: str) -> dict[str, Any]:  # Any: CBOR values, checked field by field
    if not isinstance(item, dict) or set(item) != names:
        raise FormatError("FORMAT_GPU_SHAPE", f"{what} is not a map of exactly {', '.join(sorted(names))}")
    return item


def _list(item: object, what: str, limit: int) -> list[Any]:  # Any: CBOR values, checked one by one
    if not isinstance(item, list) or not 1 <= len(item) <= limit:
        raise FormatError("FORMAT_GPU_COUNT", f"{what}: not a list of 1 to {limit} entries")
    return item


def _bytes(item: object, what: str, limit: int) -> bytes:
    if not isinstance(item, bytes) or not 1 <= len(item) <= limit:
        raise FormatError("FORMAT_GPU_SIZE", f"{what} is not a byte string of 1 to {limit} bytes")
    return item
