"""TLS 1.3 under uvicorn, by pyOpenSSL over memory BIOs: the standard library's `ssl` has no exporter.

Runs in the enclave; trusts nobody on the other side. uvicorn accepts a protocol class (`http=`); ours terminates TLS
and hands plaintext to uvicorn's own HTTP/1.1 parser through a transport facade, so nothing in uvicorn is patched.

* TLS 1.3 only; no session is ever resumed (SESS_CACHE_OFF is what prevents it; OP_NO_TICKET alone would still send
  stateful tickets); no early data (OpenSSL's default of zero, unreachable from here). A resumed session would show
  a client the certificate of an older connection.
* ALPN: `http/1.1`, or none. A client that offers only something else gets the `no_application_protocol` alert.
* SNI is not checked: it is unauthenticated and the names of the certificate are what a client compares. A client
  that knows no name yet may fetch the evidence.
* Every connection keeps the identity it was accepted under. After that leaf's not-after no new request is taken on
  it: 503, `Connection: close`, and the client dials again (a 421 would not be retried by the SDKs). With no successor
  there is nobody to dial: a key whose certificate has ended makes no handshake.
* A peer decides nothing about memory or time: handshakes in progress, open connections, header bytes, and the time
  for handshake, headers, body and a stalled reader are bounded (`TlsLimits`).
* What an ASGI application raises ends here. Its text could hold a prompt, so it reaches neither log nor answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from OpenSSL import SSL
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from enclave.identity import Connection, Identity

__all__ = ["AttestedProtocol", "Endpoint", "TlsLimits", "server_context"]

RECORD: Final = 16 * 1024
"""TLS plaintext limit of one record (RFC 8446 §5.1); one `send` never makes a longer one."""

_LINGER_S: Final = 2.0
_TICKET_OPTIONS: Final = SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION


@dataclass(frozen=True, slots=True)
class TlsLimits:
    """Bounds on what a stranger may cost. Seconds, bytes, counts."""

    handshake_s: float = 10.0
    handshakes: int = 512
    connections: int = 4096
    header_bytes: int = 64 * 1024
    header_s: float = 75.0
    body_s: float = 120.0
    stalled_write_s: float = 60.0
    watch_s: float = 5.0


def server_context() -> SSL.Context:
    """A server context with everything but the key and the certificate (`enclave.keys` installs those).

    Groups are OpenSSL's default list: X25519MLKEM768 comes first where the linked OpenSSL has it (3.5 and later)."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(_TICKET_OPTIONS)
    context.set_verify(SSL.VERIFY_NONE)  # no client certificates: access is by API key
    context.set_alpn_select_callback(_select_alpn)
    return context


def _select_alpn(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if b"http/1.1" not in offered:
        # Raised inside the callback: OpenSSL sends the fatal alert, do_handshake raises this error (RFC 7301 §3.2).
        raise SSL.Error("no application protocol in common")
    return b"http/1.1"


class Endpoint:
    """What all connections of one server share: the current identity, the limits, and the counts they bound.

    current   returns the identity for the next handshake; called once per connection
    now       the enclave's clock, unix seconds
    drain_s   how long after a leaf's end its running answers may go on
    failed    called with nothing when an application raised: a count for telemetry
    """

    def __init__(
        self,
        current: Callable[[], Identity],
        now: Callable[[], int],
        *,
        limits: TlsLimits | None = None,
        drain_s: int = 600,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self.current, self.now, self.failed = current, now, failed
        self.limits, self.drain_s = limits or TlsLimits(), drain_s
        self.handshaking: set[AttestedProtocol] = set()
        self.open: set[AttestedProtocol] = set()

    def protocol(self) -> type[asyncio.Protocol]:
        """The class for `uvicorn.Config(http=…)`."""
        endpoint = self

        class Bound(AttestedProtocol):
            def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **kw: Any) -> None:
                # Any: uvicorn's own untyped state and loop argument
                super().__init__(endpoint, _Http(config, server_state, app_state, **kw))

        return Bound

    def abort_handshakes(self) -> None:
        """At shutdown: whoever has not finished a handshake has no request to lose."""
        for connection in list(self.handshaking):
            connection.abort()


class _Http(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, which also says what it is receiving and how much of it was no body.

    llhttp has no limits of its own: a header, a chunk extension or a trailer without an end would be kept for ever."""

    def __init__(self, *args: Any, **kw: Any) -> None:  # Any: passed through
        super().__init__(*args, **kw)
        self.receiving: Literal["nothing", "header", "body"] = "nothing"
        self.body_bytes = 0

    def on_message_begin(self) -> None:
        self.receiving, self.body_bytes = "header", 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.receiving = "body"
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.receiving = "nothing"
        super().on_message_complete()

    @property
    def answering(self) -> bool:
        """Whether an application owes an answer."""
        return self.cycle is not None and not self.cycle.response_complete


class AttestedProtocol(asyncio.Protocol):
    """One connection: handshake, then records in both directions, then `close_notify`."""

    def __init__(self, endpoint: Endpoint, http: _Http) -> None:
        self.endpoint, self.limits, self.http = endpoint, endpoint.limits, http
        self.raw: asyncio.Transport | None = None
        self.established = False
        self.closing = False
        self._corked, self._held = False, b""
        self.reading = True
        self._timer: asyncio.TimerHandle | None = None
        self._receiving = "nothing"
        self._since = 0.0
        self._framing = 0
        self._stalled_since: float | None = None

    # --- asyncio's side -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.raw = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        shared = self.endpoint
        if len(shared.handshaking) >= self.limits.handshakes or len(shared.open) >= self.limits.connections:
            self.closing = True
            self.raw.abort()
            return
        self.identity = shared.current()
        if shared.now() >= self.identity.not_after:
            self.closing = True
            self.raw.abort()
            return
        shared.handshaking.add(self)
        self.tls = SSL.Connection(self.identity.context, None)  # None: memory BIOs
        self.tls.set_accept_state()
        self._timer = self.loop.call_later(self.limits.handshake_s, self.abort)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self.tls.bio_write(data)
        if self.established or self._handshake():
            self._pump()

    def eof_received(self) -> None:
        return None  # asyncio closes the transport: half-open TLS connections are not served

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self.endpoint.handshaking.discard(self)
        self.endpoint.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self.established:
            self.http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        if self.established:
            self.http.pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        if self.established:
            self.http.resume_writing()

    # --- TLS ------------------------------------------------------------------------------------------------------

    def _handshake(self) -> bool:
        """Advance the handshake; true once it is complete."""
        try:
            self.tls.do_handshake()
        except SSL.WantReadError:
            self._flush()
            return False
        except SSL.Error:
            self._flush()  # first: the alert must leave
            self.close_raw()
            return False
        self._flush()
        shared = self.endpoint
        shared.handshaking.discard(self)
        shared.open.add(self)
        self.established = True
        self._since = self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.limits.watch_s, self._watch)
        self.connection = Connection(self.identity, self.tls)
        self.http.app = cast(Any, self._application)  # Any: uvicorn's ASGI type; each connection carries its own scope
        self.http.connection_made(_Facade(self))
        return True

    def _pump(self) -> None:
        """Hand decrypted bytes to HTTP, one record at a time, until there are none or HTTP asks for a pause."""
        while self.reading and not self.closing:
            try:
                data = self.tls.recv(RECORD)
            except SSL.WantReadError:
                break
            except SSL.ZeroReturnError:  # close_notify
                self.close()
                return
            except SSL.Error:
                self._flush()
                self.close_raw()
                return
            self._feed(data)
        if not self.closing:
            self._flush()  # answers to a KeyUpdate

    def _feed(self, data: bytes) -> None:
        before, had = self.http.receiving, self.http.body_bytes
        try:
            self.http.data_received(data)
        except Exception:  # a defect of the parser must cost one connection, and quote nothing
            self.endpoint.failed()
            self.abort()
            return
        if before != self.http.receiving:
            self._framing = 0
        self._note()
        if self.http.receiving != "nothing":
            body = self.http.body_bytes - (had if before == "body" else 0)
            # Small chunks cost more framing than body: 16 bytes for each byte are allowed on top.
            self._framing = max(0, self._framing + len(data) - 17 * body)
            if self._framing > self.limits.header_bytes and not self.closing:
                self.send(_answer(431, b"the request's header is too long"))
                self.close()

    def _note(self) -> None:
        """Start the clock anew when something else is being waited for."""
        if self._receiving != self.http.receiving:
            self._receiving, self._since = self.http.receiving, self.loop.time()

    def _watch(self) -> None:
        """Every few seconds: a peer that neither sends nor reads loses the connection."""
        now = self.loop.time()
        if self.http.answering and self.http.receiving == "nothing":
            self._since = now  # it is the service that is awaited
        allowed = self.limits.body_s if self.http.receiving == "body" else self.limits.header_s
        stalled = self._stalled_since is not None and now - self._stalled_since > self.limits.stalled_write_s
        ended = self.endpoint.now() >= self.identity.not_after + self.endpoint.drain_s
        if stalled or ended or now - self._since > allowed:
            self.abort()
            return
        self._timer = self.loop.call_later(self.limits.watch_s, self._watch)

    def send(self, data: bytes) -> None:
        """Encrypt *data* in records of at most `RECORD` bytes and write them; a head waits for what follows it."""
        if self.closing:
            return
        if self._corked:
            self._held += data
            return
        if self._held:
            data, self._held = self._held + data, b""
        view = memoryview(data)
        try:
            for start in range(0, len(view), RECORD):
                self.tls.sendall(bytes(view[start : start + RECORD]))
                self._flush()
        except SSL.Error:
            self.abort()

    def _uncork(self) -> None:
        self._corked = False
        if self._held:
            self.send(b"")

    def _flush(self) -> None:
        assert self.raw is not None
        while True:
            try:
                data = self.tls.bio_read(1 << 18)
            except SSL.WantReadError:
                return
            if not self.raw.is_closing():
                self.raw.write(data)

    def close(self) -> None:
        """Send `close_notify`, then close once everything written has left."""
        if self.closing:
            return
        self._uncork()
        with contextlib.suppress(SSL.Error):  # the peer was faster, or the session is broken: close all the same
            self.tls.shutdown()
        self._flush()
        self.close_raw()

    def close_raw(self) -> None:
        """Close after what is buffered has left, or after a bound: a peer that does not read keeps nothing open."""
        self.closing = True
        assert self.raw is not None
        self.raw.close()
        if self._timer is not None:
            self._timer.cancel()
        bound = self.limits.stalled_write_s if self.established else _LINGER_S
        self._timer = self.loop.call_later(bound, self.raw.abort)

    def abort(self) -> None:
        self.closing = True
        if self.raw is not None:
            self.raw.abort()

    # --- HTTP's side ----------------------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        self.reading = False
        if self.raw is not None and not self.closing:
            self.raw.pause_reading()

    def resume_reading(self) -> None:
        if self.reading:
            return
        self.reading = True
        if self.raw is not None and not self.closing:
            self.raw.resume_reading()
            self.loop.call_soon(self._pump)  # decrypted records may be waiting in the BIO

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI
        """The application under this connection: adds `scope["vouchsafe"]`, refuses what comes after the leaf's end."""
        if self.endpoint.now() >= self.identity.not_after:
            await _refuse(send, 503, "certificate_expired", "this connection's certificate has ended: connect again")
            return
        scope["vouchsafe"] = self.connection
        started = False

        async def watched(message: Any) -> None:  # Any: ASGI
            nonlocal started
            started = started or message["type"] == "http.response.start"
            # Head and first bytes of an answer leave in one record: one write less here, one read less there.
            self._corked = message["type"] == "http.response.start"
            if self.closing:
                # uvicorn drops it without waiting: an application that does not look for the disconnect would
                # otherwise never give the loop back.
                await asyncio.sleep(0)
            await send(message)
            if not self._corked:
                self._uncork()  # a body without bytes

        try:
            await self.http.config.loaded_app(scope, receive, watched)
        except asyncio.CancelledError:
            self.abort()  # a drain that ran out of time: the client must not take the stream for complete
            raise
        except Exception:
            # Never the exception's text: it may quote the request.
            self.endpoint.failed()
            if started:
                self.abort()
            else:
                await _refuse(send, 500, "server_error", "the request failed inside the service")


class _Facade(asyncio.Transport):
    """The transport that uvicorn's HTTP protocol sees: plaintext in, records out."""

    def __init__(self, owner: AttestedProtocol) -> None:
        super().__init__()
        self._owner = owner

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._owner.send(bytes(data))

    def close(self) -> None:
        self._owner.close()

    def abort(self) -> None:
        self._owner.abort()

    def is_closing(self) -> bool:
        return self._owner.closing

    def pause_reading(self) -> None:
        self._owner.pause_reading()

    def resume_reading(self) -> None:
        self._owner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # Any: asyncio's signature
        if name == "sslcontext":
            return self._owner.identity.context  # truthy, so that uvicorn reports the scheme https
        # No addresses: behind a relay they are the relay's, and nothing here may depend on them.
        return default


def _answer(status: int, reason: bytes) -> bytes:
    """A whole answer for what never became a request."""
    return (
        b"HTTP/1.1 %d Refused\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
        b"connection: close\r\n\r\n%s" % (status, len(reason), reason)
    )


async def _refuse(send: Any, status: int, code: str, reason: str) -> None:  # Any: ASGI
    """OpenAI's error shape, then the connection closes."""
    body = b'{"error":{"message":"%s","type":"server_error","param":null,"code":"%s"}}' % (
        reason.encode(),
        code.encode(),
    )
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
