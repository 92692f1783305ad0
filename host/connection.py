"""One relayed connection, from accept to close: read the hello, dial, move bytes both ways, pass on each end.

    accept → HELLO ──complete──→ DIAL ──connected──→ STREAM ──both ends closed──→ gone
               │ garbage, deadline  │ refused, deadline   │ reset, idle
               └────────────────────┴─────────────────────┴──→ gone, with one reason for the log

Runs in the relay's single thread and never blocks. It trusts neither side: the client is a stranger, the
backend may hang, die or flood. Events are hints (level-triggered), so a late or doubled one is harmless. What
a connection says about itself afterwards is `name`, byte counts, duration and `reason`, all of them the
operator's words or numbers, none of them the client's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, Protocol

from host.address import Endpoint
from host.clienthello import HelloReader, NeedMore, NotTLS
from host.limits import Limits
from host.routes import RouteTable
from host.splice import DONE, READ, WRITE, Direction, LegFailed, PipePool

__all__ = ["Connection", "Leg", "Loop", "prepare", "reset"]

_BROKEN: Final = select.EPOLLHUP | select.EPOLLERR
_RST: Final = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds
# RFC 8446 §6: record alert(21), 3.3, length 2; fatal(2), unrecognized_name(112). Sent in clear before any
# handshake, so that the user reads "unrecognized name" and not "connection reset".
_UNRECOGNIZED_NAME: Final = bytes.fromhex("15 03 03 00 02 02 70")
NO_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Phase(Enum):
    HELLO = auto()
    DIAL = auto()
    STREAM = auto()
    GONE = auto()


class Leg:
    """One socket, who handles its events, and the mask epoll has for it (0: not registered)."""

    __slots__ = ("fd", "handler", "mask", "sock")

    def __init__(self, sock: socket.socket, handler: Callable[[int], None]) -> None:
        self.sock, self.fd, self.handler, self.mask = sock, sock.fileno(), handler, 0


class Loop(Protocol):
    """What a connection needs from the relay around it."""

    now: float
    limits: Limits
    routes: RouteTable
    pool: PipePool

    def endpoints(self, name: str) -> tuple[Endpoint, ...]:
        """Where the route `name` leads, resolved at start."""
        ...

    def watch(self, leg: Leg, mask: int) -> None:
        """Report these events of `leg` from now on; 0: none, not even errors."""
        ...

    def bury(self, leg: Leg) -> None:
        """Stop watching now, close once the current batch of events is through (its number must not be reused
        within).
        """
        ...

    def redial(self, connection: Connection) -> None:
        """Call `connection.dial_again()` soon."""
        ...

    def ended(self, connection: Connection) -> None:
        """Everything is closed; `reason` says why."""
        ...


def prepare(sock: socket.socket) -> None:
    """Non-blocking, and no Nagle: without TCP_NODELAY the first byte after TLS tickets waits for a delayed
    ACK (40 ms).
    """
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # the peer is gone already; the next read says so
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def reset(sock: socket.socket) -> None:
    """Make the coming close a TCP reset, so that the peer sees an error and never a clean end. No effect on
    unix sockets.
    """
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # already broken
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)


def _unsent(sock: socket.socket) -> bool:
    """Whether the kernel still holds bytes for the peer."""
    try:
        return fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)) != bytes(4)
    except OSError:
        return False


class Connection:
    """A client, later its backend, and the two directions between them."""

    __slots__ = (
        "_backend", "_candidates", "_client", "_down", "_loop", "_reader", "_up",
        "bytes_down", "bytes_up", "deadline", "name", "phase", "reason", "source", "started",
    )  # fmt: skip

    def __init__(self, loop: Loop, sock: socket.socket, source: str | None) -> None:
        self._loop = loop
        self._client = Leg(sock, self._on_client)
        self._backend: Leg | None = None
        self._reader: HelloReader | None = HelloReader()
        self._candidates: list[Endpoint] = []
        self._up: Direction | None = None
        self._down: Direction | None = None
        self.source = source
        self.started = loop.now
        self.deadline = loop.now + loop.limits.hello_timeout
        self.phase = Phase.HELLO
        self.name = "-"
        self.reason = ""
        self.bytes_up = self.bytes_down = 0
        loop.watch(self._client, READ)

    # --- HELLO

    def _on_client(self, events: int) -> None:
        if self.phase is Phase.HELLO:
            self._read_hello()
        elif self.phase is Phase.STREAM:
            self._move(up=bool(events & (READ | _BROKEN)), down=bool(events & (WRITE | _BROKEN)))

    def _read_hello(self) -> None:
        # Read into our own bounded buffer: MSG_PEEK under level-triggered epoll would spin on a partial
        # hello.
        assert self._reader is not None
        try:
            data = self._client.sock.recv(self._reader.room)
        except BlockingIOError:
            return None
        except OSError:
            return self._end("client-reset")
        if not data:
            return self._end("hello-eof")
        result = self._reader.feed(data)
        if isinstance(result, NeedMore):
            return None
        if isinstance(result, NotTLS):
            return self._end(result.code)
        route = self._loop.routes.find(result.sni)
        if route is None:
            return self._refuse_name()
        self.name = route.name
        self.phase = Phase.DIAL
        self.deadline = self._loop.now + self._loop.limits.dial_timeout
        self._loop.watch(self._client, 0)  # what it sends meanwhile waits in the kernel
        self._candidates = list(self._loop.endpoints(route.name))
        return self._dial()

    def _refuse_name(self) -> None:
        with contextlib.suppress(OSError):  # a courtesy; the connection ends either way
            self._client.sock.send(_UNRECOGNIZED_NAME)
        self._end("no-route")

    # --- DIAL

    def _dial(self) -> None:
        """Start connecting to the next candidate; the last one's failure is the connection's."""
        reason = "dial-failed"
        while self._candidates:
            endpoint = self._candidates[0]
            try:
                sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
            except OSError as err:
                return self._end("no-descriptors" if err.errno in NO_DESCRIPTORS else "dial-failed")
            prepare(sock)
            error = sock.connect_ex(endpoint.sockaddr)
            if error == errno.EAGAIN and endpoint.family == socket.AF_UNIX:
                # A unix listener with a full backlog. Nothing to wait on, so come back; the dial deadline
                # bounds it.
                sock.close()
                return self._loop.redial(self)
            if error in (0, errno.EINPROGRESS):
                self._backend = Leg(sock, self._on_backend)
                return self._stream() if error == 0 else self._loop.watch(self._backend, WRITE)
            sock.close()
            self._candidates.pop(0)
            reason = _dial_reason(error)
        return self._end(reason)

    def dial_again(self) -> None:
        """Called by the loop some milliseconds after `redial`."""
        if self.phase is Phase.DIAL and self._backend is None:
            self._dial()

    def _on_backend(self, events: int) -> None:
        if self.phase is Phase.STREAM:
            self._move(up=bool(events & (WRITE | _BROKEN)), down=bool(events & (READ | _BROKEN)))
        elif self.phase is Phase.DIAL:
            self._dialled()

    def _dialled(self) -> None:
        assert self._backend is not None
        error = self._backend.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error == 0:
            return self._stream()
        self._loop.bury(self._backend)
        self._backend = None
        self._candidates.pop(0)
        return self._dial() if self._candidates else self._end(_dial_reason(error))

    # --- STREAM

    def _stream(self) -> None:
        assert self._backend is not None and self._reader is not None
        client, backend, pool = self._client.sock, self._backend.sock, self._loop.pool
        self._up = Direction(client, backend, pool, replay=bytes(self._reader.buffer))
        self._down = Direction(backend, client, pool)
        self._reader = None
        self._candidates = []
        self.phase = Phase.STREAM
        self._touch()
        self._move(up=True, down=False)

    def _touch(self) -> None:
        """Something moved: the silence starts again."""
        assert self._up is not None and self._down is not None
        limits = self._loop.limits
        half_closed = self._up.want == DONE or self._down.want == DONE
        self.deadline = self._loop.now + (limits.half_close_timeout if half_closed else limits.idle_timeout)

    def _move(self, *, up: bool, down: bool) -> None:
        upward, downward, backend = self._up, self._down, self._backend
        assert upward is not None and downward is not None and backend is not None
        before = (upward.moved, downward.moved, upward.want == DONE, downward.want == DONE)
        try:
            if up:
                upward.step()
            if down:
                downward.step()
        except LegFailed as failed:
            return self._fail(failed)
        if (upward.moved, downward.moved, upward.want == DONE, downward.want == DONE) != before:
            self._touch()
        if upward.want == downward.want == DONE:
            return self._end("closed")
        # A side nobody waits for gets mask 0 and is unregistered: EPOLLHUP comes even with an empty mask, and
        # would spin.
        self._loop.watch(self._client, (upward.want & READ) | (downward.want & WRITE))
        return self._loop.watch(backend, (downward.want & READ) | (upward.want & WRITE))

    def _fail(self, failed: LegFailed) -> None:
        """A leg broke. Deliver what it had said before, then break the other leg too: an error stays an
        error.
        """
        assert self._up is not None and self._down is not None and self._backend is not None
        client_died = failed.at_source == (failed.direction is self._up)
        dead, survivor = (self._client, self._backend) if client_died else (self._backend, self._client)
        last_words = self._up if client_died else self._down
        if last_words is not failed.direction:
            with contextlib.suppress(LegFailed):
                last_words.step()
        reset(dead.sock)
        if not _unsent(survivor.sock):  # a reset would drop those; the close then ends the stream after them
            reset(survivor.sock)
        self._end("client-reset" if client_died else "backend-reset")

    # --- end

    def expire(self) -> None:
        """The deadline of this phase has passed."""
        half_closed = self._up is not None and self._down is not None and DONE in (self._up.want, self._down.want)
        reasons = {Phase.HELLO: "hello-timeout", Phase.DIAL: "dial-timeout"}
        self.abort(reasons.get(self.phase, "half-close-timeout" if half_closed else "idle-timeout"))

    def abort(self, reason: str) -> None:
        """Reset both legs now: nothing may linger in the kernel for a peer that has stopped reading."""
        reset(self._client.sock)
        if self._backend is not None:
            reset(self._backend.sock)
        self._end(reason)

    def _end(self, reason: str) -> None:
        if self.phase is Phase.GONE:
            return
        self.phase = Phase.GONE
        self.reason = reason
        for direction in (self._up, self._down):
            if direction is not None:
                direction.close()
        self.bytes_up = self._up.moved if self._up is not None else 0
        self.bytes_down = self._down.moved if self._down is not None else 0
        self._loop.bury(self._client)
        if self._backend is not None:
            self._loop.bury(self._backend)
        self._up = self._down = self._reader = self._backend = None
        self._loop.ended(self)


def _dial_reason(error: int) -> str:
    if error in (errno.ECONNREFUSED, errno.ENOENT):
        return "dial-refused"
    return "dial-timeout" if error == errno.ETIMEDOUT else "dial-failed"
