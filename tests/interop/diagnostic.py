"""Python values from the diagnostic notation that `cbor_reader.py` writes, refusing all that is not deterministic.

Only what our formats use is understood: maps with text keys, arrays, text, byte strings, integers, true, false, null
and one tag. Shortest and definite lengths (no `_` outside text), map keys sorted by their encoding and each once
(RFC 8949 §4.2.1). It shares nothing with `attestation.cbor`.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.interop.service import peer

__all__ = ["Tagged", "read", "value"]

READER: Final = Path(__file__).with_name("cbor_reader.py")
_TOKEN: Final = re.compile(
    r"""(?P<text>"(?:[^"\\]|\\.)*") | h'(?P<bytes>[0-9a-f]*)' | (?P<tag>\d+)\( | (?P<end>\))
      | (?P<plain>-?\d+|true|false|null|[][{},:])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Tagged:
    number: int
    item: Any  # Any: a CBOR value


def read(raw: bytes) -> Any:  # Any: a CBOR value
    """The value of one CBOR item, decoded by the independent library. ValueError for another spelling than ours."""
    return value(peer(READER, raw).decode())


def value(notation: str) -> Any:  # Any: a CBOR value
    parts, at = [], 0
    while at < len(notation):
        found = _TOKEN.match(notation, at)
        if found is None:
            raise ValueError(f"not deterministic, or not of our formats: …{notation[at : at + 40]}")
        at = found.end()
        match found.lastgroup:
            case "bytes":
                parts.append(f'{{"$bytes":"{found["bytes"]}"}}')
            case "tag":
                parts.append(f'{{"$tag":{found["tag"]},"$item":')
            case "end":
                parts.append("}")
            case _:
                parts.append(found[0])
    return json.loads("".join(parts), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> Any:  # Any: CBOR values
    names = [name for name, _ in pairs]
    if names == ["$bytes"]:
        return bytes.fromhex(pairs[0][1])
    if names == ["$tag", "$item"]:
        return Tagged(pairs[0][1], pairs[1][1])
    encoded = [(len(name.encode()), name.encode()) for name in names]  # a shorter text has the smaller head
    if any(left >= right for left, right in itertools.pairwise(encoded)):
        raise ValueError(f"map keys are not sorted, or stand twice: {names}")
    return dict(pairs)
