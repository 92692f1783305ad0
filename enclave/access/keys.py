"""The API key of a request. Runs in the enclave; keys reach it inside the attested channel only.

The enclave never holds the key, only its SHA-256: API keys are random and long, so the digest tells nothing. A
digest also binds receipts to whoever made the request (`enclave.receipts`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["KeyCheck", "bearer"]

_BEARER: Final = re.compile(rb"(?i:bearer) +([\x21-\x7e]{1,512})")


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of exactly one `authorization: Bearer …` header (RFC 6750 §2.1), None otherwise."""
    found = [value for name, value in headers if name == b"authorization"]
    match = _BEARER.fullmatch(found[0]) if len(found) == 1 else None
    return match.group(1) if match else None


class KeyCheck:
    """One key, known by its SHA-256.

    api_key_sha256   64 hex characters, from the measured configuration
    """

    def __init__(self, api_key_sha256: str) -> None:
        digest = bytes.fromhex(api_key_sha256)
        if len(digest) != 32:
            raise ValueError("api-key-sha256 is 64 hex characters")
        self._digest = digest

    def allowed(self, token: bytes | None) -> bytes | None:
        """SHA-256 of the key when it is ours, else None. Compared in constant time."""
        if token is None:
            return None
        digest = hashlib.sha256(token).digest()
        return digest if hmac.compare_digest(digest, self._digest) else None
