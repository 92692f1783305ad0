"""A streamed answer on its way out: cut into whole events, chained, hashed, and ended honestly.

`OutStream` takes the engine's bytes in any chunks and gives back the exact bytes to emit; what it gives back is what
the receipt covers. It ends in one of two ways: with the engine's own `data: [DONE]`, before which it puts a comment
with receipt id and chain head; or with an error event, after which the gateway cuts the connection. It never makes a
`[DONE]` of its own. Holds one event at a time; does no I/O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Final

from attestation.errors import FormatError
from attestation.sse import SseCutter, StreamChain, chain_comment
from enclave.api.errors import INTERNAL, Refusal, error_event, refusal_from_engine_event

__all__ = ["OutStream"]

MAX_EVENT: Final = 4 << 20
MAX_EVENTS: Final = 1 << 20
_DONE: Final = b"data: [DONE]"


class OutStream:
    """State of one stream.

    done     the engine said `[DONE]`, and nothing more may follow
    failed   why the stream can not end well, None while it can
    chat_id  `id` of the first event, for the receipt
    """

    def __init__(self, receipt_id: str, request_hash: bytes) -> None:
        self._receipt_id = receipt_id
        self._cutter = SseCutter(limit=MAX_EVENT)
        self._hash = hashlib.sha256()
        self.chain = StreamChain(receipt_id, request_hash)
        self.done = False
        self.failed: Refusal | None = None
        self.chat_id: str | None = None

    @property
    def body_hash(self) -> bytes:
        """SHA-256 of everything given back so far."""
        return self._hash.digest()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Events to emit, each to be written in one piece. Stops giving at the engine's error or `[DONE]`."""
        try:
            for event in self._cutter.feed(chunk):
                if self.done or self.failed is not None:
                    return
                yield from self._pass(event)
        except FormatError:
            self.failed = INTERNAL

    def end(self) -> None:
        """The engine will say no more. Without `[DONE]`, or with a piece of an event left, that is a failure."""
        if not self.done and self.failed is None:
            self.failed = INTERNAL

    def error(self) -> bytes:
        """The last event of a failed stream."""
        return self._emit(error_event(self.failed or INTERNAL))

    def _pass(self, event: bytes) -> Iterator[bytes]:
        if event.startswith(_DONE):
            self.done = True
            # One write with the sentinel: a client that stops reading there has had the comment.
            yield self._emit(chain_comment(self._receipt_id, self.chain.head)) + self._emit(event)
            return
        self.failed = refusal_from_engine_event(event)
        if self.failed is None and self.chain.events >= MAX_EVENTS:
            self.failed = INTERNAL
        if self.failed is not None:
            return
        if self.chain.events == 0:
            self.chat_id = _chat_id(event)
        yield self._emit(event)

    def _emit(self, event: bytes) -> bytes:
        self.chain.update(event)
        self._hash.update(event)
        return event


def _chat_id(event: bytes) -> str | None:
    try:
        document = json.loads(event.removeprefix(b"data:"))
    except ValueError:
        return None
    value = document.get("id") if isinstance(document, dict) else None
    return value if isinstance(value, str) and 0 < len(value) <= 128 else None
