"""Deterministic CBOR (RFC 8949 §4.2.1), the form of everything we sign or hash: claims, evidence, bundles.

`cbor2` encodes and decodes. Around it stands what a peer's bytes need: a scan of the heads that bounds depth and
number of items and refuses lengths longer than the input before anything is allocated, and a re-encoding that must
give the same bytes. So there is one encoding of every value: shortest lengths, definite lengths, map keys sorted
bytewise and unique, nothing after the item. Map keys are text, for which cbor2's canonical order is that of §4.2.1.

Values: int (64 bit), bytes, str, bool, None, list, dict with str keys, and CBORTag with a number that the caller names.
Floats, other tags, indefinite lengths and other simple values are refused. Pure.
"""

from __future__ import annotations

from typing import Any, Final

import cbor2

from attestation.errors import FormatError

__all__ = ["MAX_DEPTH", "MAX_ITEMS", "decode", "encode"]

MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 8192
"""Items in one document, nested ones included. The largest we make, a bundle, has some hundreds; four million bytes of
zeros in an array would keep a parser busy for seconds."""
_SIMPLE: Final = (20, 21, 22)  # false, true, null


def encode(value: object) -> bytes:
    """*value* in its one encoding. `TypeError` for what has none here: our own mistake, never a peer's."""
    _check(value, 0)
    return cbor2.dumps(value, canonical=True)


def decode(raw: bytes, *, max_size: int, tags: frozenset[int] = frozenset(), max_depth: int = MAX_DEPTH) -> Any:
    """The one value that *raw* encodes. `FORMAT_CBOR` when *raw* is longer than *max_size*, deeper than *max_depth*,
    of more than `MAX_ITEMS` items, holds a tag outside *tags*, or is not the deterministic encoding of its value.

    Any: the caller checks shapes."""
    if len(raw) > max_size:
        raise FormatError("FORMAT_CBOR", "too long", expected=f"at most {max_size} bytes", actual=len(raw))
    end = _scan(raw, max_depth, tags)
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


def _scan(raw: bytes, max_depth: int, tags: frozenset[int]) -> int:
    """End of the first item, having bounded every length by what is there. Linear, without recursion."""
    at, items = 0, 0
    waiting = [1]  # how many items each open container still waits for, the document itself first
    while waiting:
        if waiting[-1] == 0:
            waiting.pop()
            continue
        waiting[-1] -= 1
        items += 1
        if len(waiting) - 1 > max_depth:
            raise FormatError("FORMAT_CBOR", "nested too deeply", expected=f"at most {max_depth} levels")
        if items > MAX_ITEMS:
            raise FormatError("FORMAT_CBOR", "too many items", expected=f"at most {MAX_ITEMS}")
        major, number, at = _head(raw, at)
        if major == 6:
            if number not in tags:
                raise FormatError("FORMAT_CBOR", "an unexpected tag", expected=sorted(tags), actual=number)
            waiting.append(1)
        elif major >= 2 and major != 7:
            # The peer picks the number: an item of n elements needs n bytes at least.
            if number > len(raw) - at:
                raise FormatError(
                    "FORMAT_CBOR", "a length beyond the input", expected=f"at most {len(raw) - at}", actual=number
                )
            if major in (2, 3):
                at += number
            else:
                waiting.append(number if major == 4 else 2 * number)
    return at


def _head(raw: bytes, at: int) -> tuple[int, int, int]:
    """Major type, number, and the offset behind the head at *at* (RFC 8949 §3)."""
    if at >= len(raw):
        raise FormatError("FORMAT_CBOR", "ends inside an item", actual=len(raw))
    major, info = raw[at] >> 5, raw[at] & 31
    at += 1
    if major == 7 and (info >= 24 or info not in _SIMPLE):
        raise FormatError("FORMAT_CBOR", "a float or an unknown simple value")
    if info < 24:
        return major, info, at
    if info >= 28:
        raise FormatError("FORMAT_CBOR", "an indefinite or reserved length", actual=f"0x{raw[at - 1]:02x}")
    width = 1 << (info - 24)
    if at + width > len(raw):
        raise FormatError("FORMAT_CBOR", "ends inside a head", actual=len(raw))
    return major, int.from_bytes(raw[at : at + width], "big"), at + width


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
