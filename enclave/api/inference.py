"""One request to a model: key, body, admission, engine, answer, receipt.

  (1) the key is checked, the body is read within bounds and hashed
  (2) the request is admitted and rewritten (`requests`), the engine is chosen by the model id alone
  (3) the engine's app is called with three headers of ours and the rewritten body; it learns of a hang-up at once
  (4) its answer goes out: whole and unchanged, or event by event through `OutStream`
  (5) a receipt over exactly what was received, forwarded and emitted is signed and stored before the last byte leaves

A stream that can not end well ends with an error event and a cut connection; its receipt says `upstream_error`, or
`client_disconnected` when the caller hung up, and covers what was emitted until then.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final

from attestation import receipt
from attestation.sse import inline_comment
from enclave.access import KeyCheck
from enclave.access.keys import bearer
from enclave.api import errors
from enclave.api.errors import Refusal, Refused
from enclave.api.exchange import Exchange, Gone, header
from enclave.api.requests import Admitted, Route, admit, parse
from enclave.engine.base import Engine, EngineGone, Message
from enclave.engine.call import inner_scope
from enclave.receipts import ReceiptStore, issue, new_receipt_id
from enclave.stream import OutStream

__all__ = ["Inference"]

MAX_BODY: Final = 4 << 20
MAX_ANSWER: Final = 64 << 20
MAX_RUNNING: Final = 256
READ_SECONDS: Final = 60.0
IDLE_SECONDS: Final = 600.0
"""How long an engine may be silent: longer than any queue, shorter than for ever."""
GRACE_SECONDS: Final = 5.0
"""How long an engine may take to notice that the caller hung up."""
_SSE: Final = b"text/event-stream"


class Inference:
    """Serves the inference routes; see `Gateway` for the arguments."""

    def __init__(
        self,
        *,
        engines: Mapping[str, Engine],
        access: KeyCheck,
        receipts: ReceiptStore,
        ready: Callable[[], bool],
    ) -> None:
        self._engines = engines
        self._access = access
        self._receipts = receipts
        self._ready = ready
        self._salt_key = secrets.token_bytes(32)
        self._running = 0

    async def serve(self, x: Exchange, route: Route) -> None:
        key = self._access.allowed(bearer(x.scope["headers"]))  # (1)
        try:
            body = await x.read(MAX_BODY, READ_SECONDS)
        except Gone:
            x.outcome = "client_disconnected"
            return
        x.receipt_id = new_receipt_id()
        record = _Record(x, self._receipts, key, hashlib.sha256(body).digest())
        try:
            admitted, engine = self._admit(x, route, body, key)  # (2)
        except Refused as refused:
            await record.refuse(refused.refusal)
            return
        self._running += 1
        try:
            await _Call(x, record, admitted, engine).run(route.path)
        finally:
            self._running -= 1

    def _admit(self, x: Exchange, route: Route, body: bytes, key: bytes | None) -> tuple[Admitted, Engine]:
        if key is None:
            raise Refused(errors.INVALID_KEY)
        kind = (header(x.scope, b"content-type") or b"").split(b";")[0].strip().lower()
        if kind != b"application/json" or header(x.scope, b"content-encoding") not in (None, b"identity"):
            raise Refused(errors.MEDIA_TYPE)
        document = parse(body)
        named = document.get("model")
        x.model = named if isinstance(named, str) and named in self._engines else None
        admitted = admit(route, document, known=self._engines.__contains__, salt_key=self._salt_key, key_digest=key)
        engine = self._engines[admitted.model]  # and no other, whatever state it is in
        if engine.task != route.task:
            serving = [id for id, other in self._engines.items() if other.task == route.task]
            raise Refused(errors.other_task(route.path, serving))
        x.stream = admitted.stream
        if not engine.healthy:
            raise Refused(errors.unavailable(engine.retry_after))
        if not self._ready():
            raise Refused(errors.UNAVAILABLE)
        if self._running >= MAX_RUNNING:
            raise Refused(errors.BUSY)
        return admitted, engine


class _Record:
    """The receipt of one exchange, filled as it goes."""

    def __init__(self, x: Exchange, store: ReceiptStore, key: bytes | None, received: bytes) -> None:
        self._x = x
        self._store = store
        self._key = key
        self.received = received
        self._events: list[dict[str, Any]] = [receipt.request_received(received)]  # Any: JSON values

    def forwarded(self, admitted: Admitted) -> None:
        rewritten = {"type": "x.request.rewritten", "set": list(admitted.set), "removed": list(admitted.removed)}
        self._events += [rewritten, receipt.request_forwarded(hashlib.sha256(admitted.body).digest())]

    def finish(self, returned: bytes, *, chat_id: str | None, stream: OutStream | None = None) -> bytes:
        """Sign and store. *returned* is the SHA-256 of what was emitted."""
        events = [*self._events, receipt.response_returned(returned)]
        if stream is not None:
            events += [receipt.stream_chain_event(stream.chain), receipt.outcome_event(self._x.outcome or "")]
        if self._x.receipt_id is None:
            raise RuntimeError("an exchange without receipt id has no receipt")
        raw = issue(
            self._x.identity,
            receipt_id=self._x.receipt_id,
            chat_id=chat_id,
            model=self._x.model,
            endpoint=self._x.scope["path"],
            method=self._x.scope["method"],
            served_at=self._x.served_at,
            event_log=events,
        )
        self._store.add(self._x.receipt_id, raw, key_digest=self._key, chat_id=chat_id)
        return raw

    async def refuse(self, refusal: Refusal) -> None:
        """Refusals have receipts too: stored first, so that whoever reads the answer can fetch it."""
        self.finish(hashlib.sha256(refusal.body()).digest(), chat_id=None)
        await self._x.refuse(refusal)


class _Call:
    """One call of an engine: what it is given, what comes back, and how it ends."""

    def __init__(self, x: Exchange, record: _Record, admitted: Admitted, engine: Engine) -> None:
        self._x = x
        self._record = record
        self._admitted = admitted
        self._engine = engine
        self._given = False
        self._gone = asyncio.Event()
        self._status = 0
        self._sse = False
        self._parts: list[bytes] = []
        self._size = 0
        self._complete = False
        self._steps = 0
        self._out = OutStream(x.receipt_id or "", record.received)
        self._inline = admitted.stream and header(x.scope, b"x-vouchsafe-receipt") == b"inline"

    async def run(self, path: str) -> None:
        self._record.forwarded(self._admitted)
        accept = _SSE if self._admitted.stream else b"application/json"
        scope = inner_scope(path, self._admitted.body, accept)
        fault = await self._drive(asyncio.ensure_future(self._engine.app(scope, self._receive, self._send)))
        await self._end(fault)

    async def _drive(self, call: asyncio.Future[None]) -> Refusal | None:
        """(3) Until the engine has answered, has died, is silent for too long, or the caller has hung up."""
        watch = asyncio.ensure_future(self._watch())
        dead = asyncio.ensure_future(self._engine.wait_failed())
        waiting: set[asyncio.Future[Any]] = {call, watch, dead}
        try:
            while True:
                steps = self._steps
                done, _ = await asyncio.wait(waiting, timeout=IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if call in done:
                    return self._fault(call)
                if dead in done:
                    return errors.UNAVAILABLE
                if watch in done:
                    # The engine heard it too, through `_receive`, and gets a moment to abort by itself.
                    await asyncio.wait({call}, timeout=GRACE_SECONDS)
                    return None
                if not done and steps == self._steps:
                    return errors.UNAVAILABLE
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _fault(self, call: asyncio.Future[None]) -> Refusal | None:
        """What ended the engine's call, None when it ended by itself."""
        error = None if call.cancelled() else call.exception()
        if isinstance(error, EngineGone):
            return errors.unavailable(self._engine.retry_after)
        return errors.INTERNAL if call.cancelled() or error is not None else None

    async def _watch(self) -> None:
        """Read the caller's side: after the body it can only say that it is gone."""
        while (await self._x.receive())["type"] != "http.disconnect":
            continue
        self._gone.set()

    async def _receive(self) -> Message:
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": self._admitted.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """(4) What the engine says."""
        self._steps += 1
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
            kind = next((v for n, v in message.get("headers", ()) if n.lower() == b"content-type"), b"")
            self._sse = self._status == 200 and bytes(kind).startswith(_SSE)
        elif message["type"] == "http.response.body":
            body, self._complete = message.get("body", b""), not message.get("more_body", False)
            if self._sse and self._admitted.stream:
                await self._pass_on(body)
                return
            self._size += len(body)
            if self._size <= MAX_ANSWER:
                self._parts.append(body)

    async def _pass_on(self, body: bytes) -> None:
        """Each event is one write, and is waited for: a slow caller slows the engine, not our memory. One that does
        not read at all is hung up on."""
        if self._gone.is_set():
            return
        for event in self._out.feed(body):
            try:
                if self._x.status is None:
                    kind = (b"content-type", _SSE + b"; charset=utf-8")
                    await self._x.start(200, [kind, (b"x-accel-buffering", b"no")])
                more = not self._out.done
                if not more:
                    raw = self._finish_stream("completed")
                    event += inline_comment(raw) if self._inline else b""
                await self._x.write(event, more=more)
            except TimeoutError:
                self._gone.set()
            if self._gone.is_set():
                return

    def _finish_stream(self, outcome: str) -> bytes:
        """(5) Sign and store. Returns the receipt."""
        self._x.outcome = outcome
        self._x.events = self._out.chain.events
        return self._record.finish(self._out.body_hash, chat_id=self._out.chat_id, stream=self._out)

    async def _end(self, fault: Refusal | None) -> None:
        """Whatever the engine has not ended by itself."""
        if self._out.done:
            return
        if self._sse and self._admitted.stream:
            await self._end_stream(fault)
        elif self._gone.is_set():
            self._x.outcome = "client_disconnected"
        elif fault is not None or not self._complete or self._size > MAX_ANSWER or self._sse:
            self._x.outcome = "upstream_error"
            await self._record.refuse(fault or errors.INTERNAL)
        elif self._status != 200:
            self._x.outcome = "refused" if self._status < 500 else "upstream_error"
            await self._record.refuse(errors.engine_refusal(self._status, b"".join(self._parts)))
        elif self._admitted.stream:
            self._x.outcome = "upstream_error"
            await self._record.refuse(errors.INTERNAL)
        else:
            body = b"".join(self._parts)
            self._x.outcome = "completed"
            self._record.finish(hashlib.sha256(body).digest(), chat_id=_chat_id(body))
            await self._x.answer(200, body)

    async def _end_stream(self, fault: Refusal | None) -> None:
        """A stream without `[DONE]`. Before the first byte it is an ordinary error; after it an error event, and then
        this app returns with the answer unfinished: the server cuts the connection, so that even a client that does
        not look at events notices."""
        if self._gone.is_set():
            self._finish_stream("client_disconnected")
            return
        if self._out.failed is None:
            self._out.failed = fault
        self._out.end()
        refusal = self._out.failed or errors.INTERNAL
        if self._x.status is None:
            self._x.outcome = "upstream_error"
            await self._record.refuse(refusal)
            return
        self._x.code = refusal.code
        event = self._out.error()
        self._finish_stream("upstream_error")
        await self._x.write(event, more=True)


def _chat_id(body: bytes) -> str | None:
    """`id` of an answer, for the receipt."""
    try:
        value = json.loads(body).get("id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return value if isinstance(value, str) and 0 < len(value) <= 128 else None
