"""Where the API key of a request stands. Keys reach the enclave inside the attested channel only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["bearer"]

_BEARER: Final = re.compile(rb"(?i:bearer) +([\x21-\x7e]{1,512})")


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of exactly one `authorization: Bearer …` header (RFC 6750 §2.1), None otherwise."""
    found = [value for name, value in headers if name == b"authorization"]
    match = _BEARER.fullmatch(found[0]) if len(found) == 1 else None
    return match.group(1) if match else None
