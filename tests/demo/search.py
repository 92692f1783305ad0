"""One search for a prompt and an answer in recorded bytes, used on what the host carries and on the attack's record.

A streamed answer crosses as many small JSON events, so the search reads the deltas' text together as well as the raw
bytes. Finding nothing is worth something only because the same search finds both where TLS was ended.
"""

from __future__ import annotations

import json
import re

_EVENT = re.compile(rb"data: (\{.*?\})\r?\n\r?\n", re.DOTALL)


def found(record: bytes, needle: str) -> bool:
    """Whether *needle* stands in *record*: raw, as a JSON string, or spread over the deltas of a stream."""
    forms = {needle.encode(), json.dumps(needle)[1:-1].encode()}
    return any(form in record for form in forms) or needle in deltas(record)


def deltas(record: bytes) -> str:
    """Text of all chat deltas in *record*, joined."""
    # HTTP chunk sizes stand between events, never inside one: the server writes an event at a time.
    text = []
    for match in _EVENT.finditer(record):
        try:
            event = json.loads(match[1])
        except ValueError:
            continue
        for choice in event.get("choices", []):
            text.append(choice.get("delta", {}).get("content") or "")
    return "".join(text)
