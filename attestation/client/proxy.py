"""The local verifying proxy: plain HTTP on this machine, attested TLS to one service. An ASGI application.

Any program in any language gets verified inference by changing its base URL. The hop from that program to this proxy is
plain HTTP and rests on this machine alone, so a browser's page must not be able to use it: a request that names another
host than the loopback's, or comes from a page of elsewhere, is refused.

Receipts are checked as answers pass. An answer that is not streamed waits until its receipt has been checked; of a
stream, its end waits, and a receipt that is missing or says something else becomes an error event in its place, which
OpenAI's clients raise. What the service says beyond that is passed on unchanged: status, headers, bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attestation.client.handshake import NotAttested
from attestation.client.proxy_state import ProxyState, page
from attestation.client.receipts import (
    CREDENTIALS,
    MAX_RECORDED,
    RECEIPT_ID,
    Exchange,
    ReceiptRefused,
    receipt_due,
    stream_ends,
)
from attestation.client.upstream import Answer, Connection, Upstream
from attestation.errors import FormatError, RefusedError, TransportError, VouchsafeError
from attestation.sse import SseCutter

__all__ = ["Guard", "Proxy"]

Scope = MutableMapping[str, Any]  # Any: ASGI messages
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

STATUS_PAGE: Final = "/vouchsafe/status"
STATUS_JSON: Final = "/vouchsafe/status.json"
MAX_REQUEST: Final = 32 * 1024 * 1024
MAX_RECEIPT: Final = 4 * 1024 * 1024
MAX_EVENT: Final = 16 * 1024 * 1024
TOKEN_HEADER: Final = b"x-vouchsafe-token"

_ASK: Final = b"x-vouchsafe-receipt"
_PATH: Final = re.compile(rb"/v1(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")
_QUERY: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:@%/?\[\]-]{0,8192}")
_LOCAL: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_OURS: Final = frozenset(
    {
        b"host", b"connection", b"keep-alive", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
        b"upgrade", b"transfer-encoding", b"content-length", b"accept-encoding", b"expect", b"forwarded", b"via",
        b"cookie", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"origin", b"referer",
        TOKEN_HEADER, _ASK,
    }
)  # fmt: skip
"""Request headers that end here: they belong to this hop, or would tell the service about this machine."""
_HOP: Final = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"trailer"})


@dataclass(frozen=True, slots=True)
class Guard:
    """Who may use the proxy.

    token   required in `X-Vouchsafe-Token` when the proxy listens beyond loopback; then any Host is taken
    named   whether requests carry a host name to check: not so on a unix socket
    """

    token: bytes | None = None
    named: bool = True

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Raises `_Stop` 400, 401 or 403."""
        found = dict(headers)
        if sum(k in (b"host", b"origin", TOKEN_HEADER) for k, _ in headers) > len(
            found.keys() & {b"host", b"origin", TOKEN_HEADER}
        ):
            raise _Stop(400, "proxy_headers", "Host, Origin and the token may stand once.")
        if self.token is not None:
            if not hmac.compare_digest(found.get(TOKEN_HEADER, b""), self.token):
                raise _Stop(401, "proxy_token", "This proxy asks for its token in the header X-Vouchsafe-Token.")
        elif self.named and _host(found.get(b"host", b"")) not in _LOCAL:
            # A page of elsewhere can make its own name point here (DNS rebinding); it cannot choose the Host header.
            raise _Stop(403, "proxy_host", "This proxy answers to 127.0.0.1, localhost and [::1] only.")
        origin = found.get(b"origin")
        if origin is not None and (origin == b"null" or _host(origin.partition(b"://")[2]) not in _LOCAL):
            raise _Stop(403, "proxy_origin", "This proxy does not serve web pages of elsewhere.")


class _Stop(Exception):
    """A request that ends here, with an error in OpenAI's shape."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class _Gone(Exception):
    """The local program hung up."""


class _Unfinished(Exception):
    """The answer cannot be completed: the connection to the local program must not end as if it were."""


class Proxy:
    """The application. `receipts` False: receipts are neither asked for nor checked, and the status page says so."""

    def __init__(self, upstream: Upstream, state: ProxyState, guard: Guard, *, receipts: bool) -> None:
        self._upstream, self._state, self._guard, self._receipts = upstream, state, guard, receipts
        self._target = upstream.session.target

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        try:
            self._guard.check(scope["headers"])
            if scope["path"] in (STATUS_PAGE, STATUS_JSON) and scope["method"] == "GET":
                await self._status(scope["path"], send)
            else:
                await self._forward(scope, receive, send)
        except _Gone:
            self._state.gone += 1
        except _Stop as stop:
            await _answer(send, stop.status, _error(stop.message, stop.code), ((b"x-should-retry", b"false"),))
        except NotAttested as err:
            self._state.refuse(err.code, err.failure.reason)
            await _answer(
                send, 502,
                _error(f"The service is not accepted, nothing was sent to it: {err.failure}", err.code.lower()),
                ((b"x-should-retry", b"false"),),
            )  # fmt: skip
        except TransportError as err:
            self._state.failed += 1
            busy = err.code == "TRANSPORT_BUSY"
            extra = ((b"retry-after", b"1"),) if busy else ()
            await _answer(send, 503 if busy else 502, _error(str(err), err.code.lower()), extra)
        except VouchsafeError as err:  # a receipt, or an answer that is none: asking again may cost again
            self._state.failed += 1
            await _answer(send, 502, _error(str(err), err.code.lower()), ((b"x-should-retry", b"false"),))

    async def _status(self, path: str, send: Send) -> None:
        facts = self._state.facts(*self._upstream.counts, self._upstream.dialled)
        if path == STATUS_JSON:
            await _answer(send, 200, json.dumps(facts, indent=1).encode())
            return
        safe = (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'")
        await _answer(
            send, 200, page(facts).encode(), (safe, (b"cache-control", b"no-store")), b"text/html; charset=utf-8"
        )

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = str(scope["method"]), _path(scope)
        if method not in ("GET", "POST", "DELETE"):
            raise _Stop(405, "method_not_allowed", f"This proxy passes GET, POST and DELETE on, not {method[:16]}.")
        body = await _body(receive)
        self._state.requests += 1
        wants = self._receipts and receipt_due(method, path.partition(b"?")[0].decode("ascii"))
        asked = dict(scope["headers"]).get(_ASK) == b"inline"
        connection = await self._upstream.borrow()
        watch = asyncio.ensure_future(_disconnected(receive))
        work = asyncio.ensure_future(self._exchange(connection, method, path, scope, body, wants, asked, send))
        try:
            await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                # Nobody listens: hanging up makes the service stop, and bill what was delivered.
                raise _Gone
            await work
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            self._upstream.give_back(connection)

    async def _exchange(
        self, connection: Connection, method: str, path: bytes, scope: Scope, body: bytes, wants: bool, asked: bool,
        send: Send,
    ) -> None:  # fmt: skip
        answer = connection.send(self._request(method, path, scope["headers"], body, wants or asked))
        await answer.head()
        exchange = self._begin(connection, method, path, body, answer) if wants and answer.status == 200 else None
        stream = answer.header(b"content-type").startswith(b"text/event-stream")
        if exchange is None:
            await _pass(answer, send)
        elif stream:
            await self._stream(answer, exchange, asked, send)
        else:
            whole = await _whole(answer, MAX_RECORDED)
            exchange.take(whole)
            exchange.receipt = await self._fetch_receipt(connection, scope["headers"], exchange.receipt_id)
            self._settle(exchange)
            await send({"type": "http.response.start", "status": 200, "headers": _passed(answer)})
            await send({"type": "http.response.body", "body": whole})

    # receipts

    def _begin(self, connection: Connection, method: str, path: bytes, body: bytes, answer: Answer) -> Exchange:
        leaf = hashlib.sha256(connection.link.leaf).digest()
        bundle = self._upstream.session.bundle(leaf)
        if bundle is None:
            raise RefusedError("EVIDENCE_NONE", "the evidence of this connection is not kept any more")
        exchange = Exchange(method, path.partition(b"?")[0].decode(), leaf, bundle.evidence.keyset, body)
        exchange.receipt_id = answer.header(b"x-receipt-id").decode("latin-1")
        return exchange

    async def _fetch_receipt(
        self, connection: Connection, headers: Iterable[tuple[bytes, bytes]], receipt_id: str
    ) -> bytes | None:
        """GET the receipt of an answer that was not streamed, with the same credential, over the same connection."""
        if not RECEIPT_ID.fullmatch(receipt_id):
            raise self._missing("the answer names no receipt")
        keep = [(k, v) for k, v in headers if k.decode("latin-1") in CREDENTIALS]
        path = f"/v1/aci/receipts/{receipt_id}".encode()
        if not connection.reusable:
            raise self._missing("the connection ended before the receipt came")
        answer = connection.send(self._request("GET", path, keep, b"", False))
        await answer.head()
        raw = await _whole(answer, MAX_RECEIPT)
        return raw if answer.status == 200 else None

    def _missing(self, why: str) -> ReceiptRefused:
        self._state.receipts_refused += 1
        return ReceiptRefused(RefusedError("RECEIPT_MISSING", why, hint="do not rely on this answer"))

    def _settle(self, exchange: Exchange) -> None:
        """The answer is complete: its receipt must be there and say the same."""
        exchange.complete = True
        try:
            verdict = exchange.verify()
            if not verdict.accepted:
                raise ReceiptRefused.from_verdict(verdict)
        except ReceiptRefused as err:
            self._state.receipts_refused += 1
            self._state.last_refusal = f"{err.code}: {err.reason}"
            raise
        self._state.receipts_verified += 1

    async def _stream(self, answer: Answer, exchange: Exchange, asked: bool, send: Send) -> None:
        """Pass events on as they come; the stream's end and what follows wait for the receipt."""
        await send({"type": "http.response.start", "status": 200, "headers": _passed(answer)})
        cutter, held = SseCutter(limit=MAX_EVENT), b""
        try:
            while chunk := await answer.read():
                exchange.take(chunk)
                ready = []
                for event in cutter.feed(chunk):
                    if held or stream_ends(event):
                        held += event
                    else:
                        ready.append(event)
                if len(held) > MAX_RECEIPT:
                    raise FormatError("FORMAT_ANSWER", "the stream goes on after its end")
                if ready:
                    await send({"type": "http.response.body", "body": b"".join(ready), "more_body": True})
            exchange.find_inline()
            self._settle(exchange)
        except VouchsafeError as err:
            self._state.failed += 1
            event = b"data: " + _error(str(err), err.code.lower()) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
            # The chunked body stays without its end: whoever reads no events sees a broken connection.
            raise _Unfinished from None
        rest = held + cutter.rest
        if not asked:
            rest = rest[: rest.find(b": vouchsafe-receipt ")] if b": vouchsafe-receipt " in rest else rest
        await send({"type": "http.response.body", "body": rest})

    def _request(
        self, method: str, path: bytes, headers: Sequence[tuple[bytes, bytes]], body: bytes, receipt: bool
    ) -> bytes:
        nominated = {
            n.strip().lower() for k, v in headers if k == b"connection" for n in v.split(b",")
        }  # RFC 9110 §7.6.1
        lines = [b"%s %s HTTP/1.1" % (method.encode("ascii"), path), b"host: " + self._target.host.encode("ascii")]
        lines += [k + b": " + v for k, v in headers if k not in _OURS and k not in nominated]
        lines.append(b"accept-encoding: identity")  # receipts speak of the bytes as sent
        if receipt:
            lines.append(_ASK + b": inline")
        if body or method == "POST":
            lines.append(b"content-length: %d" % len(body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def _pass(answer: Answer, send: Send) -> None:
    """An answer that no receipt is due for, piece by piece."""
    await send({"type": "http.response.start", "status": answer.status, "headers": _passed(answer)})
    try:
        while chunk := await answer.read():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except VouchsafeError:
        raise _Unfinished from None
    await send({"type": "http.response.body", "body": b""})


async def _whole(answer: Answer, limit: int) -> bytes:
    parts, size = [], 0
    while chunk := await answer.read():
        size += len(chunk)
        if size > limit:
            raise FormatError("FORMAT_ANSWER", "the answer is too long", expected=f"<= {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


async def _body(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_REQUEST:
            raise _Stop(413, "request_too_large", f"This proxy takes requests of at most {MAX_REQUEST} bytes.")
        if not message.get("more_body", False):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _path(scope: Scope) -> bytes:
    """Path and query as received, when they are ones to pass on."""
    raw, query = bytes(scope["raw_path"]).partition(b"?")[0], bytes(scope.get("query_string", b""))
    if not _PATH.fullmatch(raw) or b"/.." in raw or not _QUERY.fullmatch(query):
        raise _Stop(404, "not_found", "This proxy passes on what begins with /v1/: does the base URL end in /v1?")
    return raw + b"?" + query if query else raw


def _passed(answer: Answer) -> list[tuple[bytes, bytes]]:
    return [(k, v) for k, v in answer.headers if k not in _HOP]


def _host(value: bytes) -> str:
    text = value.decode("latin-1").lower()
    return text[: text.find("]") + 1] if text.startswith("[") else text.partition(":")[0]


def _error(message: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "proxy_error", "param": None, "code": code}}).encode()


async def _answer(
    send: Send, status: int, body: bytes, extra: Iterable[tuple[bytes, bytes]] = (), kind: bytes = b"application/json"
) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
