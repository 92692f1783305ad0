"""JSON that can be signed: integers only, ASCII member names, no member twice, bounded size and depth.

What two parsers could read differently is refused, so that whoever signs and whoever checks speak of one value. The
signed form is JCS (RFC 8785). Pure; runs wherever keysets and receipts are made or read, and trusts nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from attestation.errors import FormatError

__all__ = ["DIGEST", "HEX32", "HEX64", "ID", "bad", "count", "exact", "jcs", "listed", "load", "short", "text"]

MAX_TEXT: Final = 1024
MAX_INT: Final = 2**53 - 1
MAX_DEPTH: Final = 4

DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
HEX32: Final = re.compile(r"[0-9a-f]{64}")
HEX64: Final = re.compile(r"[0-9a-f]{128}")
ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def jcs(document: Mapping[str, Any]) -> bytes:  # Any: JSON values
    """RFC 8785 form of *document*. Refuses floats: a receipt holds integers only, so that no two printers differ.

    What is left after that check, the standard library writes as RFC 8785 does (a test holds it to rfc8785's bytes):
    member names are ASCII, so code points and UTF-16 sort alike, and both escape alike. It takes a tenth of the time.
    """
    _values(document, depth=0)
    return _ENCODER.encode(document).encode("utf-8")


_ENCODER: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=dict
)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def bad(what: str, *, expected: object = "", actual: object = "") -> NoReturn:
    """Raise the FormatError for *what*, a member or document of a receipt or keyset."""
    raise FormatError("FORMAT_RECEIPT", f"malformed {what}", expected=expected, actual=actual)


def load(raw: bytes, limit: int, what: str) -> dict[str, Any]:  # Any: JSON values
    """JSON object of at most *limit* bytes: duplicate members, floats, NaN and deep nesting are refused."""
    if len(raw) > limit:
        bad(what, expected=f"at most {limit} bytes", actual=f"{len(raw)} bytes")
    try:
        doc = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as err:
        if isinstance(err, UnicodeError | json.JSONDecodeError | RecursionError):
            raise FormatError("FORMAT_RECEIPT", f"{what} is not JSON in UTF-8") from None
        raise FormatError("FORMAT_RECEIPT", f"malformed {what}: {err}") from None
    if not isinstance(doc, dict):
        bad(what, expected="a JSON object", actual=type(doc).__name__)
    try:
        _values(doc, depth=0)
    except ValueError as err:
        raise FormatError("FORMAT_RECEIPT", f"malformed {what}: {err}") from None
    return doc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a member stands twice")
    return made


def _values(value: object, *, depth: int) -> None:
    """Raise ValueError unless *value* is JSON of integers, strings, booleans and null with ASCII member names."""
    if type(value) is str:  # most are
        if not value.isascii() and _SURROGATE.search(value):
            raise ValueError("a string is not Unicode text")
        return
    if depth > MAX_DEPTH:
        raise ValueError("nesting is too deep")
    if isinstance(value, dict | Mapping):
        for name, inner in value.items():
            if not isinstance(name, str) or not name.isascii():
                raise ValueError("member names are ASCII")
            _values(inner, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _values(inner, depth=depth + 1)
    elif isinstance(value, bool) or value is None:
        return
    elif not isinstance(value, int) or not -MAX_INT <= value <= MAX_INT:
        raise ValueError("only integers within 2^53-1 are allowed")


def exact(value: object, required: set[str] | frozenset[str], allowed: set[str] | frozenset[str], what: str) -> None:
    """*value* is an object with all *required* members and none outside *allowed*."""
    if not isinstance(value, dict) or not required <= value.keys() <= allowed:
        names = sorted(value) if isinstance(value, dict) else type(value).__name__
        bad(what, expected=sorted(required), actual=names)


def listed(value: object, what: str, *, limit: int = 64) -> list[Any]:  # Any: JSON values
    if not isinstance(value, list) or len(value) > limit:
        bad(what, expected=f"a list of at most {limit}")
    return value


def text(value: object, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        bad(what, expected=pattern.pattern)
    return value


def short(value: object, what: str) -> str | None:
    if value is not None and not (isinstance(value, str) and 1 <= len(value) <= MAX_TEXT):
        bad(what, expected=f"null or a string of 1 to {MAX_TEXT} characters")
    return value


def count(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        bad(what, expected="an integer of at least 0")
    return value
