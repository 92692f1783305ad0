"""A streamed answer on its way out: cut into whole events, told in the route's form, chained, hashed, ended honestly.

`OutStream` takes the engine's bytes in any chunks and gives back the exact bytes to emit; what it gives back is what
the receipt covers, and what its meter has counted by then. It ends in one of two ways: when the engine has said
`data: [DONE]`, with the route's last event, before which stands a comment with receipt id and chain head; or with an
error event, after which the gateway cuts the connection. It never ends well by itself. Holds one event at a time; does
no I/O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Final, Protocol

from attestation.errors import FormatError
from attestation.sse import SseCutter, StreamChain, chain_comment
from enclave.api.dialect import Dialect
from enclave.api.errors import INTERNAL, Refusal, error_event, refusal_from_engine_event
from enclave.api.meter import Meter, Plain, chunk

__all__ = ["OutStream", "PlainTeller", "Teller", "Translated"]

MAX_EVENT: Final = 4 << 20
MAX_EVENTS: Final = 1 << 20
_DONE: Final = b"data: [DONE]"


class Teller(Protocol):
    """How a stream is told. Bytes are whole events, none or several."""

    def event(self, event: bytes) -> bytes:
        """What to emit for an event of the engine. Raises ValueError, KeyError or TypeError for what is none."""

    def end(self) -> tuple[bytes, bytes]:
        """What is left to say, and the one last event."""

    def failed(self, refusal: Refusal) -> bytes:
        """The last event of a stream that cannot end well."""


class PlainTeller(Plain):
    """As the engine tells it."""

    def end(self) -> tuple[bytes, bytes]:
        return b"", _DONE + b"\n\n"

    def failed(self, refusal: Refusal) -> bytes:
        return error_event(refusal)


class Translated:
    """In the words of *dialect*."""

    def __init__(self, meter: Meter, dialect: Dialect) -> None:
        self._meter, self._dialect = meter, dialect

    def event(self, event: bytes) -> bytes:
        document = chunk(event)
        usage = document.get("usage")
        if usage is not None:
            self._meter.final(usage) if document.get("choices") == [] else self._meter.so_far(usage)
        return self._dialect.chunk(document)

    def end(self) -> tuple[bytes, bytes]:
        return self._dialect.end()

    def failed(self, refusal: Refusal) -> bytes:
        return self._dialect.failed(refusal)


class OutStream:
    """State of one stream.

    done     the engine said `[DONE]`, and nothing more may follow
    failed   why the stream can not end well, None while it can
    chat_id  `id` of the engine's first event
    """

    def __init__(self, receipt_id: str, request_hash: bytes, teller: Teller, meter: Meter) -> None:
        self._receipt_id, self._teller, self._meter = receipt_id, teller, meter
        self._cutter = SseCutter(limit=MAX_EVENT)
        self._hash = hashlib.sha256()
        self._seen = False
        self.chain = StreamChain(receipt_id, request_hash)
        self.done = False
        self.failed: Refusal | None = None
        self.chat_id: str | None = None

    @property
    def body_hash(self) -> bytes:
        """SHA-256 of everything given back so far."""
        return self._hash.digest()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bytes to emit, each to be written in one piece. Stops giving at the engine's error or `[DONE]`."""
        try:
            for event in self._cutter.feed(data):
                if self.done or self.failed is not None:
                    return
                if told := self._pass(event):
                    yield told
        except FormatError:
            self.failed = INTERNAL

    def end(self) -> None:
        """The engine will say no more. Without `[DONE]`, or with a piece of an event left, that is a failure."""
        if not self.done and self.failed is None:
            self.failed = INTERNAL

    def error(self) -> bytes:
        """The last event of a failed stream."""
        return self._emit(self._teller.failed(self.failed or INTERNAL))

    def _pass(self, event: bytes) -> bytes:
        if event.startswith(_DONE):
            return self._last()
        self.failed = refusal_from_engine_event(event)
        if self.failed is None and self.chain.events >= MAX_EVENTS:
            self.failed = INTERNAL
        if self.failed is not None:
            return b""
        if not self._seen:
            self._seen, self.chat_id = True, _chat_id(event)
        try:
            told = self._teller.event(event)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            self.failed = INTERNAL  # its text may quote the answer
            return b""
        return self._emit(told) if told else b""

    def _last(self) -> bytes:
        if self._meter.source != "engine_final":  # what nobody has counted to its end cannot be charged: it ends badly
            self.failed = INTERNAL
            return b""
        rest, last = self._teller.end()
        self.done = True
        told = self._emit(rest) if rest else b""
        # One write with the last event: a client that stops reading there has had the comment.
        return told + self._emit(chain_comment(self._receipt_id, self.chain.head)) + self._emit(last)

    def _emit(self, told: bytes) -> bytes:
        """Chain and hash; *told* is one whole event or several."""
        self._hash.update(told)
        if told.find(b"\n\n") == len(told) - 2:
            self.chain.update(told)
        else:
            for event in told.split(b"\n\n")[:-1]:
                self.chain.update(event + b"\n\n")
        return told


def _chat_id(event: bytes) -> str | None:
    try:
        document = json.loads(event.removeprefix(b"data:"))
    except ValueError:
        return None
    value = document.get("id") if isinstance(document, dict) else None
    return value if isinstance(value, str) and 0 < len(value) <= 128 else None
