"""Attested connections on asyncio, pooled: TLS, verdict and HTTP/1.1 straight over `Link`, for the local proxy.

A connection is used only while its verdict holds: until the earliest end of anything the verdict rests on, and not
beyond `max_age` seconds, after which a new one is dialled and proven. What the other end sends is parsed by httptools
under caps for head and time; bytes that nobody asked for, or that are no HTTP/1.1, end the connection. An answer is
complete only when HTTP says so: a connection that merely ends in the middle is an error.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Final, cast

import httptools

from attestation.client.handshake import Link, NotAttested
from attestation.client.session import AttestedSession
from attestation.errors import FormatError, TransportError, VouchsafeError

__all__ = ["Answer", "Connection", "Upstream"]

READ: Final = 64 * 1024
MAX_HEAD: Final = 64 * 1024
HIGH_WATER: Final = 256 * 1024
HEAD_S: Final = 600.0
"""Seconds until an answer begins: a long completion that is not streamed is silent until its end."""
GAP_S: Final = 300.0
"""Seconds between two pieces of a body."""
CONNECTIONS: Final = 128


class Answer:
    """One answer while it comes in. `status` and `headers` (names lower case) are there once `head` has returned."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._begun = self._ended = False
        self._failure: VouchsafeError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> bytes:
        return next((v for k, v in self.headers if k == name), b"")

    async def head(self) -> None:
        """Wait for status and headers. Raises `TransportError`, `FormatError`."""
        while not self._begun:
            await self._wait(HEAD_S)

    async def read(self) -> bytes:
        """The next bytes of the body, all that have come; b"" at its end. Raises as `head` does."""
        while not self._chunks:
            if self._ended:
                return b""
            await self._wait(GAP_S)
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._held >= HIGH_WATER:
            self.connection.resume()
        self._held = 0
        return data

    async def _wait(self, seconds: float) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._waiter
        except TimeoutError:
            raise TransportError("TRANSPORT_DEADLINE", "the service stopped answering") from None
        finally:
            self._waiter = None

    # the connection's side

    def begin(self, status: int) -> None:
        self.status, self._begun = status, True
        self._wake()

    def take(self, data: bytes) -> None:
        self._chunks.append(data)
        self._held += len(data)
        if self._held >= HIGH_WATER:
            self.connection.pause()
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, failure: VouchsafeError) -> None:
        if not self._ended:
            self._failure = failure
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One attested connection: handshake and appraisal first, then one request at a time."""

    def __init__(self, link: Link, closed: Callable[[Connection], None]) -> None:
        self.link = link
        self.born = time.monotonic()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._head_bytes = 0
        self.alive = True

    # requests

    def send(self, request: bytes) -> Answer:
        """Send one whole request; the last answer must have ended. Raises `TransportError` when the link is gone."""
        if not self.alive or self._answer is not None:
            raise TransportError("TRANSPORT_ENDED", "the connection ended before the request was sent")
        self._answer = answer = Answer(self)
        self._head_bytes = 0
        view = memoryview(request)
        while len(view):
            view = view[self.link.write(view) :]
        self._flush()
        return answer

    @property
    def reusable(self) -> bool:
        """Whether the last answer is over and another request may follow."""
        return self.alive and self._answer is None

    def pause(self) -> None:
        if self._transport is not None and self.alive:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self.alive:
            self._transport.resume_reading()

    def close(self) -> None:
        """Say goodbye and hang up; an answer that still comes in fails."""
        if self.alive:
            self.link.close_notify()
            self._flush()
        self._end(TransportError("TRANSPORT_ENDED", "the connection was closed"))

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._advance()

    def data_received(self, data: bytes) -> None:
        if self.alive:
            self.link.feed(data)
            self._advance()

    def eof_received(self) -> None:
        if self.alive:
            self.link.feed(b"")
            self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(TransportError("TRANSPORT_ENDED", "the connection ended"))
        self._closed(self)

    def _advance(self) -> None:
        try:
            if not self.link.open:
                self.link.handshake()
                if not self.ready.done():
                    self.ready.set_result(None)
            while self.alive:
                data = self.link.read(READ)
                if not data:
                    self._end(TransportError("TRANSPORT_ENDED", "the service closed the connection"))
                    return
                self._receive(data)
        except ssl.SSLWantReadError:
            pass
        except NotAttested as err:
            self._flush()  # the alert must leave
            self._end(err)
        except ssl.SSLError:
            self._end(TransportError("TRANSPORT_ENDED", "the connection was cut"))
        finally:
            self._flush()

    def _receive(self, data: bytes) -> None:
        if self._answer is None:
            self._end(FormatError("FORMAT_ANSWER", "bytes that nobody asked for"))
            return
        answer = self._answer
        self._head_bytes += 0 if answer.status else len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as err:
            self._end(FormatError("FORMAT_ANSWER", f"the answer is not HTTP/1.1: {type(err).__name__}"))
        if not answer.status and self._head_bytes > MAX_HEAD:
            self._end(FormatError("FORMAT_ANSWER", "the answer's head is too long", expected=f"<= {MAX_HEAD} bytes"))

    def _flush(self) -> None:
        data = self.link.outgoing()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _end(self, failure: VouchsafeError | NotAttested) -> None:
        if not self.alive:
            return
        self.alive = False
        if not self.ready.done():
            self.ready.set_exception(failure)
        if self._answer is not None:
            self._answer.fail(failure.failure if isinstance(failure, NotAttested) else failure)
        if self._transport is not None:
            self._transport.close()

    # httptools's side

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.status:
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is None or self._answer.status:
            raise ValueError("fields after the body")
        self._answer.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is None or status < 200 or self._parser.get_http_version() != "1.1":
            raise ValueError("not a final answer of HTTP/1.1")
        self._answer.begin(status)

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.take(body)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end()
        if not self._parser.should_keep_alive():
            self._end(TransportError("TRANSPORT_ENDED", "the service closed the connection"))


class Upstream:
    """Connections to one service. Used from one event loop.

    max_age   seconds after which a connection takes no further request
    clock     unix seconds, as the session's
    """

    def __init__(self, session: AttestedSession, *, max_age: float, clock: Callable[[], float] = time.time) -> None:
        self.session = session
        self._max_age, self._clock = max_age, clock
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._dialling = 0
        self.dialled = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Connections open, and idle among them."""
        return len(self._open), len(self._idle)

    async def borrow(self) -> Connection:
        """A connection whose verdict holds now, dialled when none is idle. Raises `NotAttested`, `TransportError`."""
        while self._idle:
            connection = self._idle.pop()
            if self._good(connection):
                return connection
            connection.close()
        if len(self._open) + self._dialling >= CONNECTIONS:
            raise TransportError(
                "TRANSPORT_BUSY", "too many requests at once", expected=f"<= {CONNECTIONS}", hint="try again later"
            )
        self._dialling += 1
        try:
            return await self._dial()
        finally:
            self._dialling -= 1

    def give_back(self, connection: Connection) -> None:
        """After use: kept when another request may follow, closed otherwise."""
        if self._good(connection):
            self._idle.append(connection)
        else:
            connection.close()

    def close_idle(self) -> None:
        """Hang up what nobody uses: the next request dials, and proves, anew."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        for connection in [*self._open]:
            connection.close()

    def _good(self, connection: Connection) -> bool:
        result = connection.link.result
        return (
            connection.reusable
            and result is not None
            and self._clock() < result.valid_until
            and time.monotonic() - connection.born < self._max_age
        )

    async def _dial(self) -> Connection:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.session.prepare)
        link = self.session.context().link()
        host, port = self.session.target.address
        connection = Connection(link, self._forget)
        try:
            async with asyncio.timeout(max(link.remaining, 0.001)):
                await loop.create_connection(lambda: connection, host, port)
                self._open.add(connection)
                await asyncio.shield(connection.ready)
            self.dialled += 1
            return connection
        except TimeoutError:
            raise TransportError("TRANSPORT_DEADLINE", f"{self.session.target.host} did not answer in time") from None
        except NotAttested:
            raise
        except OSError as err:
            raise TransportError(
                "TRANSPORT_CONNECT", f"cannot reach {self.session.target.host}: {err.strerror or type(err).__name__}",
                hint="is the service running?",
            ) from None  # fmt: skip
        finally:
            if not connection.link.open:
                connection.ready.cancel()
                connection.close()

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
