"""Certificate chains as PEM text, read so that one chain has one spelling (RFC 7468 §3, strict form).

A chain inside a quote or in collateral is text that no signature covers: white space, line length and stray bits of
the last base64 character could be changed at will. Here a chain is the certificates in order, 64 characters a line,
LF, nothing before, between or after; what differs is refused. That is how every platform and Intel's service write it.

Pure; trusts nobody. A certificate that comes out is DER by its framing only: nothing was verified.
"""

from __future__ import annotations

import base64
import binascii
import re
from functools import lru_cache
from typing import Final

from attestation.errors import FormatError

__all__ = ["read_chain", "write_chain"]

MAX_CHAIN: Final = 12 * 1024
"""Bytes of PEM text. Chains seen are 1.9 KB (two certificates) and 3.7 KB (three)."""

_BLOCK: Final = re.compile(r"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+)\n-----END CERTIFICATE-----\n")


@lru_cache(maxsize=32)
def write_chain(chain: tuple[bytes, ...]) -> bytes:
    """The one spelling of *chain* (DER certificates, leaf first)."""
    parts = []
    for der in chain:
        text = base64.b64encode(der).decode("ascii")
        lines = "\n".join(text[i : i + 64] for i in range(0, len(text), 64))
        parts.append(f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n")
    return "".join(parts).encode("ascii")


@lru_cache(maxsize=32)
def read_chain(text: bytes, low: int, high: int, *, code: str, what: str) -> tuple[bytes, ...]:
    """*low* to *high* certificates, DER, in order. Raises `FormatError` *code* for any other spelling or number.

    Remembered: a client sees the same few chains again and again."""
    if len(text) > MAX_CHAIN:
        raise FormatError(code, f"{what} is too long", expected=f"<= {MAX_CHAIN} bytes", actual=len(text))
    try:
        blocks = _BLOCK.findall(text.decode("ascii"))
        chain = tuple(base64.b64decode(block.replace("\n", ""), validate=True) for block in blocks)
    except (UnicodeDecodeError, binascii.Error) as err:
        raise FormatError(code, f"{what} is not PEM: {err}") from err
    if not low <= len(chain) <= high:
        wanted = low if low == high else f"{low} to {high}"
        raise FormatError(code, f"{what} has another number of certificates", expected=wanted, actual=len(chain))
    if write_chain(chain) != text:
        raise FormatError(
            code, f"{what} is not PEM in its one spelling", expected="64 characters a line, LF, nothing else"
        )
    return chain
