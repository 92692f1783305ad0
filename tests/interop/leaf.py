"""The certificate taken apart by `openssl` and `cbor-diag`, for the tests of this folder. No code of ours reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tests.interop import diagnostic
from tests.interop.diagnostic import Tagged
from tests.interop.service import Recorded, openssl

__all__ = ["PROFILE", "REPORT_DATA", "Element", "elements", "evidence", "extension", "spki", "x509"]

PROFILE: Final = "urn:uuid:4dca7186-a56e-420c-ae1f-df53a898193b"
OID: Final = bytes.fromhex("0606678105050409")
"""2.23.133.5.4.9 as a DER OBJECT IDENTIFIER: an OpenSSL that knows a name for it prints that instead."""
REPORT_DATA: Final = slice(48 + 520, 48 + 584)
"""In a version 4 quote: header of 48 bytes, then the TD report."""


def x509(shown: Recorded, *arguments: str) -> str:
    return openssl("x509", "-in", str(shown.folder / "leaf.der"), "-inform", "DER", "-noout", *arguments).decode()


@dataclass(frozen=True)
class Element:
    offset: int
    depth: int
    head: int
    size: int
    kind: str
    text: str


def elements(shown: Recorded) -> list[Element]:
    """The leaf's DER as `openssl asn1parse` lists it."""
    listed = openssl("asn1parse", "-in", str(shown.folder / "leaf.der"), "-inform", "DER").decode("ascii", "replace")
    line = re.compile(r" *(\d+):d=(\d+) +hl=(\d+) l= *(\d+) (?:prim|cons): (.{18}):?(.*)")
    found = [line.fullmatch(text) for text in listed.splitlines()]
    assert all(found), listed
    return [Element(*map(int, m.groups()[:4]), m[5].strip(), m[6]) for m in found if m]


def extension(shown: Recorded) -> bytes:
    """The content of the evidence extension: the OCTET STRING that follows its OID, by OpenSSL's count."""
    parts = elements(shown)
    at = [i for i, e in enumerate(parts) if shown.leaf[e.offset : e.offset + e.head + e.size] == OID]
    assert len(at) == 1, "the extension stands once"
    octets = parts[at[0] + 1]
    assert octets.kind == "OCTET STRING", "non-critical: no BOOLEAN between the OID and the octets"
    return shown.leaf[octets.offset + octets.head : octets.offset + octets.head + octets.size]


def spki(shown: Recorded) -> bytes:
    """DER SubjectPublicKeyInfo, OpenSSL's own output."""
    return openssl("pkey", "-pubin", "-outform", "DER", stdin=x509(shown, "-pubkey").encode())


def evidence(shown: Recorded) -> tuple[bytes, bytes, bytes | None]:
    """Quote, claims and GPU evidence of the extension, by the independent decoder."""
    item, gpu = diagnostic.read(extension(shown)), None
    if shown.gpus:
        assert item.keys() == {"__cmwc_t", "tdx", "gpu"} and item["__cmwc_t"] == PROFILE
        media, raw = item["tdx"]
        assert media == "application/vnd.vouchsafe.ccc-evidence+cbor"
        media, gpu = item["gpu"]
        assert media == "application/vnd.vouchsafe.nvidia-evidence"
        item = diagnostic.read(raw)
    assert isinstance(item, Tagged) and item.number == 60000
    quote, claims = item.item
    assert isinstance(quote, bytes) and isinstance(claims, bytes)
    return quote, claims, gpu
