"""DSSE envelopes (github.com/secure-systems-lab/dsse, v1) with Ed25519: how people sign what they vouch for.

Release manifests, deployment statements and status lists travel this way. A signature covers the payload's type and
exact bytes, so nothing is parsed before somebody pinned has signed it. One key never counts twice, unknown key ids are
ignored, and a key id is only a hint: the signature decides. Pure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.errors import FormatError
from attestation.strict_json import exact, listed, load

__all__ = ["MAX_ENVELOPE", "Envelope", "key_id", "public_bytes", "sign", "small_order"]

MAX_ENVELOPE: Final = 512 * 1024
MAX_SIGNATURES: Final = 32
SIGNATURE_SIZE: Final = 64

_SMALL_ORDER: Final = frozenset(
    int(y, 16)
    for y in (
        "0",
        "1",
        "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffec",
        "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffed",
        "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffee",
        "05fc536d880238b13933c6d305acdfd5f098eff289f4c345b027b2c28f95e826",
        "7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7",
    )
)
"""y coordinates (RFC 8032 §5.1.2, non-canonical ones included) of the eight points whose order divides 8."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """An envelope, parsed. Proves nothing until `signers` has been asked."""

    payload_type: str
    payload: bytes
    signatures: tuple[bytes, ...]
    hints: tuple[str, ...]
    """keyid of each signature, "" without one: says which key to try first, and decides nothing."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the payload: the name by which claims and statements refer to it."""
        return hashlib.sha256(self.payload).digest()

    @classmethod
    def parse(cls, raw: bytes) -> Envelope:
        """Strict: the three members, base64 with padding, at most 32 signatures of 64 bytes. `FORMAT_DSSE`."""
        try:
            top = load(raw, MAX_ENVELOPE, "DSSE envelope")
            names = frozenset({"payloadType", "payload", "signatures"})
            exact(top, names, names, "DSSE envelope")
            payload_type, payload = top["payloadType"], top["payload"]
            if not isinstance(payload_type, str):
                raise FormatError("FORMAT_DSSE", "payloadType is text")
            signatures, hints = [], []
            for entry in listed(top["signatures"], "signatures", limit=MAX_SIGNATURES):
                exact(entry, frozenset({"sig"}), frozenset({"keyid", "sig"}), "signatures")
                signature = _base64(entry["sig"])
                if not isinstance(entry.get("keyid", ""), str) or len(signature) != SIGNATURE_SIZE:
                    raise FormatError("FORMAT_DSSE", "a signature is {keyid?: text, sig: base64 of 64 bytes}")
                signatures.append(signature)
                hints.append(entry.get("keyid", ""))
            return cls(payload_type, _base64(payload), tuple(signatures), tuple(hints))
        except FormatError as err:
            raise FormatError("FORMAT_DSSE", err.reason, expected=err.expected, actual=err.actual) from None

    def signers(self, keys: Iterable[bytes]) -> frozenset[bytes]:
        """Which of *keys* (Ed25519, 32 bytes each) signed this very payload under this very type. Each counts once."""
        message = _pae(self.payload_type, self.payload)
        left = list(zip(self.hints, self.signatures, strict=True))
        asked, found = {key_id(k): k for k in keys}, set()
        for hint, signature in [*left]:
            if hint in asked and _verifies(asked[hint], signature, message):
                found.add(asked[hint])
                left.remove((hint, signature))
        found |= {k for k in {*asked.values()} - found if any(_verifies(k, s, message) for _, s in left)}
        return frozenset(found)


def sign(payload_type: str, payload: bytes, keys: Sequence[Ed25519PrivateKey]) -> bytes:
    """The envelope (JSON) of *payload*, signed by each of *keys*."""
    message = _pae(payload_type, payload)
    signatures: list[dict[str, Any]] = [  # Any: JSON values
        {"keyid": key_id(public_bytes(k)), "sig": base64.b64encode(k.sign(message)).decode()} for k in keys
    ]
    envelope = {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": signatures,
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def key_id(public: bytes) -> str:
    """SHA-256 of the 32-byte public key, hex."""
    return hashlib.sha256(public).hexdigest()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32-byte public key, as policies pin it."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def small_order(public: bytes) -> bool:
    """Whether *public* is a point under which anybody can sign anything: 32 zero bytes, a likely placeholder, are one.

    OpenSSL verifies under such keys (RFC 8032 lets it), so whoever pins keys must not take them."""
    return int.from_bytes(public, "little") & ((1 << 255) - 1) in _SMALL_ORDER


def _pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding of DSSE v1."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise FormatError("FORMAT_DSSE", "base64 text is expected")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("FORMAT_DSSE", "not base64 with padding") from None
    if base64.b64encode(raw).decode() != text:
        raise FormatError("FORMAT_DSSE", "not the canonical base64")
    return raw
