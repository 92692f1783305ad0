"""Deterministic CBOR (RFC 8949 §4.2.1), the form of everything we sign or hash: claims, evidence, bundles.

`cbor2` encodes and decodes. Around it stands what a peer's bytes need: a scan of the heads that bounds depth and
refuses lengths longer than the input before anything is allocated, and a re-encoding that must give the same bytes.
So there is one encoding of every value: shortest lengths, definite lengths, map keys sorted bytewise and unique,
nothing after the item. Map keys are text, for which cbor2's canonical order is that of §4.2.1.

Values: int (64 bit), bytes, str, bool, None, list, dict with str keys, and CBORTag with a number that the caller names.
Floats, other tags, indefinite lengths and other simple values are refused. Pure.
"""

from __future__ import annotations

from typing import Any, Final

import cbor2

from attestation.errors import FormatError

__all__ = ["MAX_DEPTH", "decode", "encode"]

MAX_DEPTH: Final = 8
_SIMPLE: Final = (20, 21, 22)  # false, true, null


def encode(value: object) -> bytes:
    """*value* in its one encoding. `TypeError` for what has none here: our own mistake, never a peer's."""
    _check(value, 0)
    return cbor2.dumps(value, canonical=True)


def decode(raw: bytes, *, max_size: int, tags: frozenset[int] = frozenset(), max_depth: int = MAX_DEPTH) -> Any:
    """The one value that *raw* encodes. `FORMAT_CBOR` when *raw* is longer than *max_size*, deeper than *max_depth*,
    holds a tag outside *tags*, or is not the deterministic encoding of its value. Any: the caller checks shapes."""
    if len(raw) > max_size:
        raise FormatError("FORMAT_CBOR", "too long", expected=f"at most {max_size} bytes", actual=len(raw))
    end = _scan(raw, 0, max_depth, tags)
    if end != len(raw):
        raise FormatError("FORMAT_CBOR", "bytes after the item", expected=end, actual=len(raw))
    try:
        value = cbor2.loads(raw)
        same = encode(value) == raw
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError) as err:
        raise FormatError("FORMAT_CBOR", f"cannot be decoded ({type(err).__name__})") from None
    if not same:
        raise FormatError("FORMAT_CBOR", "not the deterministic encoding (RFC 8949 §4.2.1)")
    return value


def _scan(raw: bytes, at: int, depth: int, tags: frozenset[int]) -> int:
    """End of the item at *at*, having bounded every length by what is there. Linear; recursion bounded by *depth*."""
    if depth < 0:
        raise FormatError("FORMAT_CBOR", "nested too deeply")
    if at >= len(raw):
        raise FormatError("FORMAT_CBOR", "ends inside an item", actual=len(raw))
    major, info = raw[at] >> 5, raw[at] & 31
    at += 1
    if info < 24:
        number = info
    elif info < 28:
        width = 1 << (info - 24)
        if at + width > len(raw):
            raise FormatError("FORMAT_CBOR", "ends inside a head", actual=len(raw))
        number = int.from_bytes(raw[at : at + width], "big")
        at += width
    else:
        raise FormatError("FORMAT_CBOR", "an indefinite or reserved length", actual=f"0x{raw[at - 1]:02x}")
    if major in (0, 1):
        return at
    if major == 7:
        if info >= 24 or number not in _SIMPLE:
            raise FormatError("FORMAT_CBOR", "a float or an unknown simple value")
        return at
    if major == 6:
        if number not in tags:
            raise FormatError("FORMAT_CBOR", "an unexpected tag", expected=sorted(tags), actual=number)
        return _scan(raw, at, depth - 1, tags)
    # The peer picks the number: an item of n elements needs n bytes at least.
    if number > len(raw) - at:
        raise FormatError(
            "FORMAT_CBOR", "a length beyond the input", expected=f"at most {len(raw) - at}", actual=number
        )
    if major in (2, 3):
        return at + number
    for _ in range(number if major == 4 else 2 * number):
        at = _scan(raw, at, depth - 1, tags)
    return at


def _check(value: object, depth: int) -> None:
    if depth > 4 * MAX_DEPTH:
        raise TypeError("nested too deeply")
    if isinstance(value, (bytes, str, bool)) or value is None:
        return
    if isinstance(value, int):
        if not -(2**64) <= value < 2**64:
            raise TypeError("an integer beyond 64 bits")
    elif isinstance(value, cbor2.CBORTag):
        _check(value.value, depth + 1)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError("map keys are text")
            _check(inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check(inner, depth + 1)
    else:
        raise TypeError(f"{type(value).__name__} has no encoding here")
