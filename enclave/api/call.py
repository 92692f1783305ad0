"""One call of an engine: its turn, what the engine is given, what comes back, and how it ends.

  (1) the call waits for a slot of its engine, which keys take in turns
  (2) the engine's app is called with three headers of ours and the rewritten body; it learns of a hang-up at once
  (3) its answer goes out: whole, or event by event through `OutStream`
  (4) entry and receipt are made over exactly what was received, forwarded and emitted: before the last event of a
      stream leaves, and with the last byte of a whole answer

A stream that can not end well ends with an error event and a cut connection; its receipt says why (`upstream_error`,
`key_revoked`, or `client_disconnected` when the caller hung up) and covers, as the bill does, what was emitted until
then. A revoked key ends its open answers at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from typing import Any, Final

from attestation.sse import inline_comment
from enclave.access.fair import Busy, FairQueue, Slot
from enclave.api import errors
from enclave.api.dialect import Dialect
from enclave.api.errors import Refusal
from enclave.api.exchange import Exchange, header
from enclave.api.record import Job, Record
from enclave.engine.base import Engine, EngineGone, Message
from enclave.engine.call import inner_scope
from enclave.stream import OutStream, PlainTeller, Translated
from enclave.tenancy import Tenancy, limit_of

__all__ = ["Call"]

MAX_ANSWER: Final = 64 << 20
IDLE_SECONDS: Final = 600.0
"""How long an engine may be silent: longer than any queue, shorter than for ever."""
GRACE_SECONDS: Final = 5.0
"""How long an engine may take to notice that the caller hung up."""
_SSE: Final = b"text/event-stream"

Headers = list[tuple[bytes, bytes]]


class Call:
    """See the module. *dead* is done when the engine has failed for good; *dialect* None: the caller gets what the
    engine says."""

    def __init__(
        self, x: Exchange, record: Record, job: Job, tenancy: Tenancy, engine: Engine, dead: asyncio.Future[str],
        dialect: Dialect | None, answer_id: str,
    ) -> None:  # fmt: skip
        self._x, self._record, self._job, self._tenancy, self._engine = x, record, job, tenancy, engine
        self._dead, self._dialect, self._answer_id = dead, dialect, answer_id
        self._given = False
        self._gone = asyncio.Event()
        self._entered = self._revoked = False
        self._status = 0
        self._sse = False
        self._parts: list[bytes] = []
        self._size = 0
        self._complete = False
        self._steps = 0
        a, meter = job.admitted, job.meter
        plain = PlainTeller(meter, wants_usage=a.wants_usage)
        teller = plain if dialect is None else Translated(meter, dialect)
        self._out = OutStream(x.receipt_id or "", record.received, teller, meter)
        self._inline = a.stream and header(x.scope, b"x-vouchsafe-receipt") == b"inline"

    async def run(self, path: str, queue: FairQueue) -> None:
        """The whole call, on *path* of the engine. The job is settled afterwards, whatever happened."""
        organization, caller = self._tenancy.organization, self._job.caller
        watch = asyncio.ensure_future(self._watch())
        revoked = organization.watch(caller)
        slot = queue.slot(caller.key.id)
        try:
            try:
                fault = await self._turn(slot, queue, watch, revoked)
                if fault is None and not self._stopped:
                    fault = await self._drive(path, watch, revoked)
            finally:
                if self._entered:  # whoever hung up in the moment of its turn has had one
                    await slot.__aexit__(None, None, None)
            await self._end(fault)
        finally:
            watch.cancel()  # it ends by itself: nothing waits for that
            organization.unwatch(caller, revoked)

    @property
    def _stopped(self) -> bool:
        return self._gone.is_set() or self._revoked

    async def _turn(
        self, slot: Slot, queue: FairQueue, watch: asyncio.Future[None], revoked: asyncio.Future[None]
    ) -> Refusal | None:
        """(1) Enter *slot*; why not, or None when it was entered or nobody waits any more."""
        try:
            if queue.free:
                await slot.__aenter__()
                self._entered = True
                return None
            entering = asyncio.ensure_future(slot.__aenter__())
            try:
                await asyncio.wait({entering, watch, revoked}, return_when=asyncio.FIRST_COMPLETED)
                self._revoked = revoked.done()
                if entering.done():
                    entering.result()
            finally:
                if not entering.done():
                    entering.cancel()
                    await asyncio.gather(entering, return_exceptions=True)
                self._entered = not entering.cancelled() and entering.exception() is None
        except Busy as busy:
            after = str(busy.retry_after_ms).encode("ascii")
            return replace(errors.BUSY, headers=((b"retry-after-ms", after),))
        return None

    async def _drive(self, path: str, watch: asyncio.Future[None], revoked: asyncio.Future[None]) -> Refusal | None:
        """(2) Until the engine has answered, has died, is silent for too long, or nobody may have the answer."""
        a = self._job.admitted
        self._record.forwarded(a)
        scope = inner_scope(path, a.body, _SSE if a.stream else b"application/json")
        call = asyncio.ensure_future(self._engine.app(scope, self._receive, self._send))
        waiting: set[asyncio.Future[Any]] = {call, watch, self._dead, revoked}
        try:
            while True:
                steps = self._steps
                done, _ = await asyncio.wait(waiting, timeout=IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if call in done:
                    return self._fault(call)
                if self._dead in done:
                    return errors.UNAVAILABLE
                if watch in done or revoked in done:
                    self._revoked = revoked in done
                    self._gone.set()
                    # The engine hears it too, through `_receive`, and gets a moment to abort by itself.
                    await asyncio.wait({call}, timeout=GRACE_SECONDS)
                    return None
                if not done and steps == self._steps:
                    return errors.UNAVAILABLE
        finally:
            if not call.done():
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)

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
            return {"type": "http.request", "body": self._job.admitted.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """(3) What the engine says."""
        self._steps += 1
        if message["type"] == "http.response.start":
            self._status = int(message["status"])
            kind = next((v for n, v in message.get("headers", ()) if n.lower() == b"content-type"), b"")
            self._sse = self._status == 200 and bytes(kind).startswith(_SSE)
        elif message["type"] == "http.response.body":
            body, self._complete = message.get("body", b""), not message.get("more_body", False)
            if self._sse and self._job.admitted.stream:
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
                    await self._x.start(200, [kind, (b"x-accel-buffering", b"no"), *self._limits()])
                more = not self._out.done
                if not more:
                    raw = self._finish_stream("completed")
                    if self._inline:
                        await self._record.durable()
                        event += inline_comment(raw)
                await self._x.write(event, more=more)
            except TimeoutError:
                self._gone.set()
            if self._gone.is_set():
                return

    def _limits(self) -> Headers:
        """`x-ratelimit-…`, as the next request will find it."""
        caller, model = self._job.caller, self._job.admitted.model
        limit = caller.project.limits.get(model)
        if limit is None:
            return []
        return self._tenancy.limiter.headers(caller.project.id, model, limit_of(limit))

    def _finish_stream(self, outcome: Any) -> bytes:  # Any: the ledger's Outcome
        """(4) Sign and store. Returns the receipt."""
        self._x.outcome = outcome
        self._x.events = self._out.chain.events
        chat_id = self._out.chat_id if self._dialect is None else self._answer_id
        return self._record.settle(outcome, self._out.body_hash, chat_id=chat_id, stream=self._out)

    async def _end(self, fault: Refusal | None) -> None:
        """Whatever the engine has not ended by itself."""
        if self._job.reservation.entry is not None:
            return
        if self._revoked and self._x.status is None:
            self._x.outcome = "key_revoked"
            await self._record.refuse(errors.INVALID_KEY, "key_revoked")
        elif self._sse and self._job.admitted.stream:
            await self._end_stream(fault)
        elif self._gone.is_set():
            self._x.outcome = "client_disconnected"
            self._record.settle("client_disconnected", hashlib.sha256(b"").digest(), chat_id=None)
        elif fault is not None or not self._complete or self._size > MAX_ANSWER or self._sse:
            await self._fail(fault or errors.INTERNAL)
        elif self._status != 200:
            outcome = "refused" if self._status < 500 else "upstream_error"
            self._x.outcome = outcome
            refusal = errors.engine_refusal(self._status, b"".join(self._parts))
            await self._record.refuse(refusal, "refused" if outcome == "refused" else "upstream_error")
        elif self._job.admitted.stream:
            await self._fail(errors.INTERNAL)
        else:
            await self._answer(b"".join(self._parts))

    async def _fail(self, refusal: Refusal) -> None:
        self._x.outcome = "upstream_error"
        await self._record.refuse(refusal, "upstream_error")

    async def _answer(self, body: bytes) -> None:
        """A whole answer: the engine's own bytes, or in the words of the route."""
        try:
            document = json.loads(body)
            self._job.meter.final(document["usage"])
            if self._dialect is not None:
                told = self._dialect.whole(document)
                body, chat_id = json.dumps(told, separators=(",", ":")).encode("ascii"), self._answer_id
            else:
                chat_id = document.get("id")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            await self._fail(errors.INTERNAL)
            return
        named = chat_id if isinstance(chat_id, str) and 0 < len(chat_id) <= 128 else None
        self._x.outcome = "completed"
        usage = self._job.meter.usage()
        self._job.ticket.settle(usage.input_tokens + usage.output_tokens)  # what remains is told in the head
        try:
            await self._x.answer(200, body, extra=self._limits())
        finally:  # in the same step of the loop: whoever has the answer can ask for its receipt
            self._record.settle("completed", hashlib.sha256(body).digest(), chat_id=named)

    async def _end_stream(self, fault: Refusal | None) -> None:
        """A stream without its end. Before the first byte it is an ordinary error; after it an error event, and then
        this app returns with the answer unfinished: the server cuts the connection, so that even a client that does
        not look at events notices."""
        if self._revoked:
            fault = errors.INVALID_KEY
        elif self._gone.is_set():
            self._finish_stream("client_disconnected")
            return
        if self._out.failed is None:
            self._out.failed = fault
        self._out.end()
        refusal = self._out.failed or errors.INTERNAL
        if self._x.status is None:
            await self._fail(refusal)
            return
        self._x.code = refusal.code
        event = self._out.error()
        self._finish_stream("key_revoked" if self._revoked else "upstream_error")
        await self._x.write(event, more=True)
