"""The firmware id (FWID) that a device's attestation key certificate vouches for (TCG DICE Certificate Profiles).

Hopper: extension 2.23.133.5.4.1, SEQUENCE {INTEGER 1, SubjectPublicKeyInfo, SEQUENCE {OID SHA-384, OCTET STRING 48}}.
Blackwell: extension 2.23.133.5.4.1.1, DiceTcbInfo, whose field [6] lists FWIDs; the first one counts (the second is all
zero, so that taking "the last 48 bytes" fails there).

Both are read whole: definite lengths, shortest form, nothing left over. Pure.
"""

from __future__ import annotations

from typing import Final

from attestation.errors import FormatError
from attestation.gpu.certificates import Certificate

__all__ = ["certified_fwid"]

COMPOSITE: Final = "2.23.133.5.4.1"
TCB_INFO: Final = "2.23.133.5.4.1.1"
_SHA384: Final = bytes.fromhex("608648016503040202")
_INTEGER, _OCTETS, _OID, _SEQUENCE, _FWIDS = 0x02, 0x04, 0x06, 0x30, 0xA6
_SIZE: Final = 48


def certified_fwid(ak: Certificate) -> bytes:
    """48 bytes. Raises `FormatError` FORMAT_GPU_FWID when the certificate holds none, two, or another form."""
    found = {oid: value for oid, value in ak.extensions if oid in (COMPOSITE, TCB_INFO)}
    if len(found) != 1:
        raise FormatError("FORMAT_GPU_FWID", "the certificate does not name one firmware id", actual=len(found))
    if COMPOSITE in found:
        version, spki, digest = _exactly(_one(found[COMPOSITE], _SEQUENCE), 3)
        if version != (_INTEGER, b"\1") or spki[0] != _SEQUENCE or digest[0] != _SEQUENCE:
            raise FormatError("FORMAT_GPU_FWID", "not a composite device id")
        return _fwid(digest[1])
    lists = [body for tag, body in _items(_one(found[TCB_INFO], _SEQUENCE)) if tag == _FWIDS]
    if len(lists) != 1:
        raise FormatError("FORMAT_GPU_FWID", "DiceTcbInfo does not hold one list of firmware ids", actual=len(lists))
    entries = _items(lists[0])
    if not entries or any(tag != _SEQUENCE for tag, _ in entries):
        raise FormatError("FORMAT_GPU_FWID", "an empty list of firmware ids")
    return _fwid(entries[0][1])


def _fwid(body: bytes) -> bytes:
    algorithm, digest = _exactly(body, 2)
    if algorithm != (_OID, _SHA384) or digest[0] != _OCTETS or len(digest[1]) != _SIZE:
        raise FormatError("FORMAT_GPU_FWID", "not a SHA-384 firmware id")
    return digest[1]


def _one(raw: bytes, tag: int) -> bytes:
    ((found, body),) = _exactly(raw, 1)
    if found != tag:
        raise FormatError("FORMAT_GPU_FWID", "another DER type", expected=f"{tag:#x}", actual=f"{found:#x}")
    return body


def _exactly(raw: bytes, count: int) -> list[tuple[int, bytes]]:
    items = _items(raw)
    if len(items) != count:
        raise FormatError("FORMAT_GPU_FWID", "another number of DER items", expected=count, actual=len(items))
    return items


def _items(raw: bytes) -> list[tuple[int, bytes]]:
    """The DER items that fill *raw* (X.690 §8.1, §10.1)."""
    found, at = [], 0
    while at < len(raw):
        if at + 2 > len(raw) or raw[at] & 0x1F == 0x1F:
            raise FormatError("FORMAT_GPU_FWID", "not DER")
        tag, length = raw[at], raw[at + 1]
        at += 2
        if length >= 0x80:
            width = length & 0x7F
            length = int.from_bytes(raw[at : at + width], "big")
            if not 1 <= width <= 2 or at + width > len(raw) or length < (0x80 if width == 1 else 0x100):
                raise FormatError("FORMAT_GPU_FWID", "not DER")
            at += width
        if at + length > len(raw):
            raise FormatError("FORMAT_GPU_FWID", "not DER")
        found.append((tag, raw[at : at + length]))
        at += length
    return found
