"""HTTP/1.1 to an engine process over its unix socket, as an ASGI callable: the gateway sees no difference to a mount.

One request at a time per connection; connections are kept for the next request. The head is written by hand, the
answer is parsed by httptools straight from the transport, under caps. What has come is handed on at once, and while the
gateway's caller does not take it, the socket is not read: the engine process feels the pressure. A caller that hangs up
cuts the connection, which is how the engine learns of it. An answer is complete only when HTTP says so: one that
merely ends raises `EngineGone`.

Runs in the enclave. The other end is our own child process: each new connection asks the kernel for the pid behind the
socket before a byte of plaintext is written.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import httptools

from enclave.engine.base import EngineGone, Receive, Scope, Send

__all__ = ["Wire", "peer_pid"]

HIGH_WATER: Final = 64 * 1024
"""Bytes of an answer that wait for the caller before the socket is left unread."""
MAX_HEAD: Final = 64 * 1024
MAX_IDLE: Final = 64
"""Connections kept for later requests."""
CONNECT_SECONDS: Final = 10.0
_GIVEN: Final = (b"content-type", b"content-length", b"accept")


def peer_pid(sock: socket.socket) -> int:
    """pid of the process that connected, or that listens (`SO_PEERCRED`, unix(7))."""
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


class Wire:
    """All connections to one engine process. `pid` must be the one that listens on `path`."""

    def __init__(self, path: Path, pid: int) -> None:
        self._path, self._pid = path, pid
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._closed = False

    async def call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI. Raises EngineGone when the engine process ended before its answer did."""
        head, body = _head(scope), await _body(receive)
        if body is None:
            return
        connection = await self._take()
        listening = asyncio.ensure_future(_hang_up(receive))
        listening.add_done_callback(lambda task: None if task.cancelled() else connection.cut())
        try:
            connection.ask(head + body)
            await _pass_on(connection, send)
        except EngineGone:
            if not listening.done():  # else the caller hung up, and there is nobody to tell
                raise
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            self._give(connection)

    def close(self) -> None:
        """Cut every connection; answers that were coming end in EngineGone."""
        self._closed = True
        for connection in list(self._open):
            connection.cut()

    async def _take(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        if self._closed:
            raise EngineGone
        loop = asyncio.get_running_loop()
        connection = _Connection(self._open.discard)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                transport, _ = await loop.create_unix_connection(lambda: connection, str(self._path))
        except (OSError, TimeoutError):
            raise EngineGone from None
        self._open.add(connection)
        with socket.socket(fileno=_duplicate(transport)) as sock:
            if peer_pid(sock) != self._pid:
                connection.cut()
                raise EngineGone
        return connection

    def _give(self, connection: _Connection) -> None:
        if connection.usable and len(self._idle) < MAX_IDLE and not self._closed:
            self._idle.append(connection)
        else:
            connection.cut()


class _Connection(asyncio.Protocol):
    """One connection; `ask`, then `begin` and `read` until it gives b""."""

    def __init__(self, lost: Callable[[_Connection], None]) -> None:
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._chunks: deque[bytes] = deque()
        self._held = self._head_bytes = 0
        self._gone = self._paused = False
        self._asked = self._begun = False
        self._ended = True
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def usable(self) -> bool:
        """Open, and the last answer is over and taken."""
        return self._ended and not self._chunks and not self._gone

    def ask(self, request: bytes) -> None:
        if self._transport is None or not self.usable:
            raise EngineGone
        self._asked, self._begun, self._ended = True, False, False
        self._head_bytes, self.status, self.headers = 0, 0, []
        self._transport.write(request)

    async def begin(self) -> None:
        """Wait for status and headers."""
        while not self._begun:
            await self._wait()

    async def read(self) -> bytes:
        """What has come of the body, b"" at its end."""
        while not self._chunks:
            if self._ended:
                return b""
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._held = 0
        if self._paused and self._transport is not None and not self._gone:
            self._paused = False
            self._transport.resume_reading()
        return data

    def cut(self) -> None:
        """Hang up at once, without sending what is still buffered."""
        self._gone = True
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    async def _wait(self) -> None:
        if self._gone:
            raise EngineGone
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- asyncio's side -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._gone:
            return
        if not self._asked or self._ended:  # bytes that nobody asked for
            self.cut()
            return
        if not self._begun:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.cut()
            return
        if not self._begun and self._head_bytes > MAX_HEAD:
            self.cut()
        elif self._held >= HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._lost(self)
        self._wake()

    # --- httptools' side ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._begun:
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:
            raise ValueError("not a final answer")
        self._begun = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._held += len(body)
        self._wake()

    def on_message_complete(self) -> None:
        self._ended = True
        if not self._parser.should_keep_alive():
            self._gone = True
        self._wake()


async def _pass_on(connection: _Connection, send: Send) -> None:
    await connection.begin()
    await send({"type": "http.response.start", "status": connection.status, "headers": connection.headers})
    while data := await connection.read():
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive) -> bytes | None:
    """The request's body, which the gateway has already bounded; None when the caller has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _head(scope: Scope) -> bytes:
    """Request line and headers. Path and values are the gateway's own (`inner_scope`), never a client's."""
    lines = [b"%s %s HTTP/1.1" % (scope["method"].encode("ascii"), scope["raw_path"]), b"host: engine"]
    lines += [b"%s: %s" % (name, value) for name, value in scope["headers"] if name in _GIVEN]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1:
        raise ValueError("a line break in a header of ours")
    return head + b"\r\n\r\n"


def _duplicate(transport: asyncio.BaseTransport) -> int:
    """A descriptor of our own for the transport's socket: uvloop's stand-in for it answers no questions."""
    return os.dup(transport.get_extra_info("socket").fileno())
