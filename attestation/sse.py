"""Server-sent events as bytes: where one event ends, the hash chain over them, and the receipt carried in band.

Both ends must cut a stream the same way whatever HTTP framing did to it, so the unit is the raw bytes of one event
including the blank line that closes it, comments and padding included. The rule is on bytes alone: an event ends
with the first LF that is followed by LF or CR LF (WHATWG HTML §9.2.6, less the bare CR, which no OpenAI-style server
sends). This file does not parse fields. Pure; runs in the enclave's `stream` and at whoever checks a receipt.

    h_0 = SHA256("vouchsafe/sse-chain/v1" ‖ 0x00 ‖ u32be(len(receipt_id)) ‖ receipt_id ‖ request_hash)
    h_i = SHA256(h_{i-1} ‖ u32be(len(event_i)) ‖ event_i)

Marks are h after events 1, 2, 4, 8, 16, 32 and then every 64th: a copy that breaks off after k events is proven up
to the last mark ≤ k. No list of single event hashes is kept anywhere: an event of one token could be guessed from it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from typing import ClassVar, Final

from attestation.errors import FormatError

__all__ = ["SseCutter", "StreamChain", "chain_comment", "inline_comment", "mark_count", "split_inline"]

_END: Final = re.compile(rb"\n\r?\n")
_TAG: Final = b"vouchsafe/sse-chain/v1\x00"
_EARLY: Final = (1, 2, 4, 8, 16, 32)
_INLINE: Final = re.compile(rb"(?:\A|(?<=\n\n)): vouchsafe-receipt ([A-Za-z0-9_-]+)\n\n\Z")


class SseCutter:
    """Cut bytes that arrive in any chunks into whole events. Work is linear in the bytes fed.

    limit   bytes of one event; more is a FormatError `FORMAT_SSE_EVENT`: the peer decides when an event ends
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._seen = 0  # where the search goes on, so that a long event is not searched from its start each time

    @property
    def rest(self) -> bytes:
        """Bytes after the last whole event."""
        return bytes(self._buffer)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Whole events that *chunk* completes, in order. Take them all before feeding again."""
        self._buffer += chunk
        while (found := _END.search(self._buffer, self._seen)) is not None:
            if found.end() > self._limit:
                break
            event = bytes(self._buffer[: found.end()])
            del self._buffer[: found.end()]
            self._seen = 0
            yield event
        if len(self._buffer) > self._limit:
            raise FormatError("FORMAT_SSE_EVENT", "an event is too long", expected=f"at most {self._limit} bytes")
        self._seen = max(0, len(self._buffer) - 2)


class StreamChain:
    """Running hash chain over the events of one stream, as its receipt will name it.

    events, size (bytes)   emitted so far;  head   h after the last event;  marks   see the module
    marked_events, marked_bytes   how far the last mark reaches
    """

    EVERY: ClassVar[int] = 64

    def __init__(self, receipt_id: str, request_hash: bytes) -> None:
        if len(request_hash) != 32:
            raise ValueError("a request hash is 32 bytes")
        name = receipt_id.encode("ascii")
        self.events = 0
        self.size = 0
        self.head = hashlib.sha256(_TAG + len(name).to_bytes(4, "big") + name + request_hash).digest()
        self.marks: list[bytes] = []
        self.marked_events = 0
        self.marked_bytes = 0

    def update(self, event: bytes) -> None:
        self.head = hashlib.sha256(self.head + len(event).to_bytes(4, "big") + event).digest()
        self.events += 1
        self.size += len(event)
        if self.events % self.EVERY == 0 or self.events in _EARLY:
            self.marks.append(self.head)
            self.marked_events, self.marked_bytes = self.events, self.size


def mark_count(events: int) -> int:
    """How many marks a chain over *events* events has."""
    return sum(1 for early in _EARLY if early <= events) + events // StreamChain.EVERY


def chain_comment(receipt_id: str, head: bytes) -> bytes:
    """The comment before `data: [DONE]`: the id under which the receipt can be had, and h after the event before it."""
    return f": vouchsafe receipt={receipt_id} chain={head.hex()}\n\n".encode("ascii")


def inline_comment(receipt: bytes) -> bytes:
    """The comment after `data: [DONE]` that carries a receipt (JSON) in band, for a client that asked for it."""
    return b": vouchsafe-receipt " + base64.urlsafe_b64encode(receipt).rstrip(b"=") + b"\n\n"


def split_inline(body: bytes) -> tuple[bytes, bytes | None]:
    """A stream's body, and the receipt (JSON bytes, unverified) that its last comment carries, or None without one."""
    start = body.rfind(b": vouchsafe-receipt ")
    found = _INLINE.match(body, start) if start >= 0 else None
    if found is None:
        return body, None
    text = found.group(1)
    try:
        receipt = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return body, None
    return body[:start], receipt
