"""One HTTP exchange: its ids, its counters, the headers every answer carries, and its one line in the log."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from enclave import telemetry
from enclave.access.prices import ZERO
from enclave.api.errors import TOO_LARGE, TOO_SLOW, Refusal, Refused
from enclave.engine.base import Message, Receive, Scope, Send
from enclave.receipts import SigningIdentity

__all__ = ["Exchange", "Gone", "header"]

API_VERSION: Final = b"2020-10-01"
"""`openai-version`: the only one OpenAI has ever sent."""
WRITE_SECONDS: Final = 120.0
_CLIENT_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
JSON: Final = b"application/json"


class Gone(Exception):
    """The caller hung up before its request was complete: there is nobody to answer."""


class _Connection(Protocol):
    @property
    def identity(self) -> SigningIdentity: ...


def header(scope: Scope, name: bytes) -> bytes | None:
    """Value of the only header of that name; None when absent or given more than once."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0] if len(found) == 1 else None


class Exchange:
    """State of one request and its answer.

    identity   of the connection on which the request came; a certificate replaced meanwhile changes nothing here
    served_at  unix seconds when the request came
    route      template of the route for the log, `other` when there is none
    model      registered model id once known
    receipt_id   set for inference requests
    usage      what was charged for, once settled
    error_body   how an error looks on this route
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: _Connection = scope["vouchsafe"]
        self.scope = scope
        self.receive = receive
        self.identity = connection.identity
        self.request_id = "req_" + secrets.token_hex(16)
        self.served_at = int(time.time())
        self.route = "other"
        self.model: str | None = None
        self.receipt_id: str | None = None
        self.stream: bool | None = None
        self.code: str | None = None
        self.outcome: str | None = None
        self.bytes_in = 0
        self.bytes_out = 0
        self.events: int | None = None
        self.usage = ZERO
        self.error_body: Callable[[Refusal], bytes] = Refusal.body
        self.status: int | None = None
        self._send = send
        self._begun = time.monotonic()
        self._first: float | None = None

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer carries, errors included. Hints for people and SDKs: signature and keyset bind."""
        made = [
            (b"x-request-id", self.request_id.encode("ascii")),
            (b"x-aci-version", b"aci/1"),
            (b"x-aci-keyset-digest", self.identity.keyset_digest.encode("ascii")),
            (b"openai-version", API_VERSION),
            (b"openai-processing-ms", str(self._milliseconds(time.monotonic())).encode("ascii")),
            (b"cache-control", b"no-store"),
        ]
        if self.receipt_id is not None:
            made.append((b"x-receipt-id", self.receipt_id.encode("ascii")))
        own = header(self.scope, b"x-client-request-id")
        if own is not None and _CLIENT_ID.fullmatch(own):
            made.append((b"x-client-request-id", own))
        return made

    async def read(self, most: int, seconds: float) -> bytes:
        """The whole body, at most *most* bytes within *seconds*. Raises Refused 413 or 408, or Gone."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    self.bytes_in += len(part)
                    if self.bytes_in > most:
                        raise Refused(TOO_LARGE)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(TOO_SLOW) from None

    async def start(self, status: int, extra: Iterable[tuple[bytes, bytes]]) -> None:
        """Status and headers. The first byte of an answer: from here on the status can not change."""
        self.status = status
        self._first = time.monotonic()
        await self._send({"type": "http.response.start", "status": status, "headers": [*self.headers(), *extra]})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Raises TimeoutError when the caller does not read: it may not hold what was made for it."""
        self.bytes_out += len(body)
        async with asyncio.timeout(WRITE_SECONDS):
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = JSON,
        extra: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """A whole answer of known length."""
        length = str(len(body)).encode("ascii")
        await self.start(status, [(b"content-type", content_type), (b"content-length", length), *extra])
        await self.write(body, more=False)

    async def refuse(self, refusal: Refusal) -> None:
        self.code = refusal.code
        await self.answer(refusal.status, self.error_body(refusal), extra=refusal.headers)

    async def pass_on(self, message: Message) -> None:
        """`send` for an app of ours that answers by itself: its start message gets our headers."""
        if message["type"] == "http.response.start":
            ours = self.headers()
            names = {name for name, _ in ours}
            kept = [(n, v) for n, v in message.get("headers", ()) if n.lower() not in names or n == b"cache-control"]
            if any(n == b"cache-control" for n, _ in kept):
                ours = [(n, v) for n, v in ours if n != b"cache-control"]
            self.status = int(message["status"])
            self._first = time.monotonic()
            message = {**message, "headers": [*ours, *kept]}
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def first_seconds(self) -> float | None:
        """Until the first byte of the answer."""
        return None if self._first is None else self._first - self._begun

    def log(self) -> None:
        """The canonical line: counts, durations, ids and codes of ours; nothing a caller chose."""
        telemetry.event(
            "request",
            request_id=self.request_id,
            route=self.route,
            model=self.model,
            status=self.status,
            code=self.code,
            outcome=self.outcome,
            stream=self.stream,
            ms=self._milliseconds(time.monotonic()),
            first_ms=self._milliseconds(self._first) if self._first is not None else None,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            events=self.events,
            receipt_id=self.receipt_id,
        )

    def _milliseconds(self, until: float) -> int:
        return round((until - self._begun) * 1000)
