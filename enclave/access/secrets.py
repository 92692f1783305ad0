"""API keys as values: made once, shown once, kept as a keyed hash.

A value is 32 random bytes in base64url behind a prefix that says what it is good for: `sk-` for inference, `sk-admin-`
for administration. The two kinds live in different tables and neither works for the other. What is kept is
HMAC-SHA256(pepper, tag ‖ value); the pepper is derived from the state key, so a stolen state without it cannot even be
searched for a known key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["KeyKind", "Made", "Pepper", "kind_of"]

KeyKind = Literal["inference", "admin"]

_PREFIX: Final[dict[KeyKind, str]] = {"inference": "sk-", "admin": "sk-admin-"}
_BODY: Final = r"[A-Za-z0-9_-]{43}"
_FORM: Final = {kind: re.compile((prefix + _BODY).encode()) for kind, prefix in _PREFIX.items()}
_TAG: Final = b"vouchsafe/api-key/v1"


@dataclass(frozen=True, slots=True)
class Made:
    """A new key. `value` is for the caller alone, once; `digest` (32 bytes) and `redacted` are what is kept."""

    value: str = field(repr=False)
    digest: bytes = field(repr=False)
    redacted: str


def kind_of(token: bytes) -> KeyKind | None:
    """Which kind *token* has the form of, None for neither. Says nothing about whether there is such a key."""
    for kind in ("admin", "inference"):  # the longer prefix first: it begins with the shorter one
        if token.startswith(_PREFIX[kind].encode()) and _FORM[kind].fullmatch(token):
            return kind
    return None


class Pepper:
    """The keyed hash of API keys. Made from the 32-byte state key; holds nothing else of it."""

    def __init__(self, state_key: bytes) -> None:
        if len(state_key) != 32:
            raise ValueError("the state key is 32 bytes")
        self._key = HKDF(hashes.SHA256(), 32, salt=None, info=_TAG).derive(state_key)

    def digest(self, token: bytes) -> bytes:
        """32 bytes. Finding a key by it takes no comparison of secrets: the hash is keyed."""
        return hmac.new(self._key, _TAG + token, hashlib.sha256).digest()

    def make(self, kind: KeyKind) -> Made:
        value = _PREFIX[kind] + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        return Made(value, self.digest(value.encode()), f"{_PREFIX[kind]}…{value[-4:]}")
