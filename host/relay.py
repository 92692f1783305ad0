"""The ciphertext relay: accept, read one ClientHello, route by name, then splice bytes both ways in the
kernel.

Runs on the untrusted host as one process with one thread of level-triggered epoll. It holds no key, has no
parser for anything after the hello, and loads no TLS (so no asyncio, which loads it): the standard library's
sockets and nothing more. It trusts nobody: clients are strangers, backends may hang or die, and whoever runs
it can replace it by any L4 balancer without the client noticing, since the client checks the far end itself.

It writes one line per connection (route, bytes up and down, seconds, reason) and keeps counters; never a byte
of content and never a client's address.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from host.address import Endpoint
from host.connection import NO_DESCRIPTORS, Connection, Leg, prepare, reset
from host.limits import Admission, Limits, source_key
from host.listen import Listener
from host.routes import RouteTable
from host.splice import READ, PipePool

__all__ = ["Counters", "Log", "Relay"]

_ACCEPT_BATCH: Final = 64
_EVENTS: Final = 256
_BACK_OFF: Final = (0.1, 1.0)
"""First and longest pause of accepting at the descriptor limit, in seconds."""
_REDIAL: Final = 0.02


@dataclass(slots=True)
class Counters:
    """Content-free: how many, how much, why it ended."""

    accepted: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    accept_pauses: int = 0
    lines_dropped: int = 0


class Log:
    """Lines on a descriptor that is never waited for: a stuck log reader must not stop the streams."""

    def __init__(self, counters: Counters, fd: int = 2, *, quiet: bool = False) -> None:
        self._counters, self._fd, self._quiet = counters, fd, quiet
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def line(self, text: str) -> None:
        if self._quiet:
            return
        try:
            # A pipe that polls writable takes a whole page, and a line is far shorter: this write cannot
            # block.
            if self._poll.poll(0) == [(self._fd, select.POLLOUT)]:
                os.write(self._fd, f"relay: {text}\n".encode())
                return
        except OSError:
            pass  # nobody reads the log any more; the streams go on
        self._counters.lines_dropped += 1


class Relay:
    """The event loop. `run` returns when a stop has been asked for and the streams have ended or run out of
    time.

    Takes over `listeners` and closes them. `endpoints` gives, per route name, where it leads, already
    resolved.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        routes: RouteTable,
        endpoints: Mapping[str, tuple[Endpoint, ...]],
        limits: Limits,
        *,
        pipes: int = 256,
        quiet: bool = False,
    ) -> None:
        self.limits = limits
        self.routes = routes
        self.pool = PipePool(most=pipes)
        self.now = time.monotonic()
        self.counters = Counters()
        self._log = Log(self.counters, quiet=quiet)
        self._endpoints = endpoints
        self._admission = Admission(limits)
        self._connections: set[Connection] = set()
        self._legs: dict[int, Leg] = {}
        self._buried: list[Leg] = []
        self._redial: list[Connection] = []
        self._epoll = select.epoll()
        self._stops = 0
        self._closed = False
        self._drain_until: float | None = None
        self._accept_again: float | None = None
        self._back_off = _BACK_OFF[0]
        self._next_sweep = self.now
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_r, READ)
        self._listeners = list(listeners)
        self._doors = [self._door(listener) for listener in listeners]

    def _door(self, listener: Listener) -> Leg:
        leg = Leg(listener.sock, lambda _events: self._accept(listener, leg))
        self.watch(leg, READ)
        return leg

    # --- what connections use (host.connection.Loop)

    def endpoints(self, name: str) -> tuple[Endpoint, ...]:
        return self._endpoints[name]

    def watch(self, leg: Leg, mask: int) -> None:
        if mask == leg.mask:
            return
        if not leg.mask:
            self._epoll.register(leg.fd, mask)
            self._legs[leg.fd] = leg
        elif mask:
            self._epoll.modify(leg.fd, mask)
        else:
            self._epoll.unregister(leg.fd)
            del self._legs[leg.fd]
        leg.mask = mask

    def bury(self, leg: Leg) -> None:
        self.watch(leg, 0)
        self._buried.append(leg)

    def redial(self, connection: Connection) -> None:
        self._redial.append(connection)

    def ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._admission.leave(connection.source)
        self.counters.bytes_up += connection.bytes_up
        self.counters.bytes_down += connection.bytes_down
        self._count(connection.name, connection.bytes_up, connection.bytes_down, connection.started, connection.reason)

    def _count(self, name: str, up: int, down: int, started: float, reason: str) -> None:
        self.counters.reasons[reason] += 1
        self._log.line(f"name={name} up={up} down={down} seconds={self.now - started:.3f} reason={reason}")

    # --- accepting

    def _accept(self, listener: Listener, door: Leg) -> None:
        for _ in range(_ACCEPT_BATCH):
            if not door.mask:
                break
            try:
                sock, peer = listener.sock.accept()
            except BlockingIOError:
                break
            except OSError as err:
                if err.errno in NO_DESCRIPTORS:
                    # The listener stays readable; without a pause the loop would spin on a failing accept.
                    self._pause_accepting()
                    break
                continue  # accept(2): errors of the new connection itself, already gone
            self._back_off = _BACK_OFF[0]
            self.counters.accepted += 1
            source = source_key(peer)
            refusal = self._admission.enter(source)
            if refusal:
                reset(sock)
                sock.close()
                self._count("-", 0, 0, self.now, refusal)
            else:
                prepare(sock)
                self._connections.add(Connection(self, sock, source))

    def _pause_accepting(self) -> None:
        self.counters.accept_pauses += 1
        for door in self._doors:
            self.watch(door, 0)
        self._accept_again = self.now + self._back_off
        self._back_off = min(2 * self._back_off, _BACK_OFF[1])

    # --- stopping

    def stop(self) -> None:
        """Stop accepting and drain; a second call stops at once. Safe in a signal handler, also after the end."""
        self._stops += 1
        if self._closed:
            return  # the wake-up descriptor may be somebody else's by now
        with contextlib.suppress(BlockingIOError):  # plenty of wake-ups are waiting already
            os.write(self._wake_w, b"\0")

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT call `stop`."""

        def handle(_signum: int, _frame: FrameType | None) -> None:
            self.stop()

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)

    def _begin_drain(self) -> None:
        self._drain_until = self.now + self.limits.drain_timeout
        self._accept_again = None
        for door in self._doors:
            self.watch(door, 0)
        for listener in self._listeners:
            listener.close()
        self._log.line(f"stopping, {len(self._connections)} open")

    # --- the loop

    def run(self) -> None:
        try:
            while not self._finished():
                ready = self._epoll.poll(self._patience(), _EVENTS)
                self.now = time.monotonic()  # after a long sleep: a newcomer's deadlines count from here
                for fd, events in ready:
                    if leg := self._legs.get(fd):
                        leg.handler(events)
                    elif fd == self._wake_r:
                        os.read(fd, 4096)
                self._after_batch()
        finally:
            self._close()

    def _finished(self) -> bool:
        self.now = time.monotonic()
        if self._stops and self._drain_until is None:
            self._begin_drain()
        if self._drain_until is None:
            return False
        return not self._connections or self._stops > 1 or self.now >= self._drain_until

    def _patience(self) -> float:
        """Seconds epoll may sleep: for ever when nothing has a deadline."""
        if self._redial:
            return _REDIAL
        if self._connections:
            return self.limits.tick if self._drain_until is None else min(self.limits.tick, 0.1)
        return -1.0 if self._accept_again is None else self._back_off

    def _after_batch(self) -> None:
        self.now = time.monotonic()
        if self._redial:
            waiting, self._redial = self._redial, []
            for connection in waiting:
                connection.dial_again()
        if self._accept_again is not None and self.now >= self._accept_again:
            self._accept_again = None
            for door in self._doors:
                self.watch(door, READ)
        if self.now >= self._next_sweep:
            # One pass over all connections a tick: no timer per connection to keep, move or forget.
            self._next_sweep = self.now + self.limits.tick
            for connection in [c for c in self._connections if c.deadline <= self.now]:
                connection.expire()
        self._close_buried()

    def _close_buried(self) -> None:
        for leg in self._buried:
            leg.sock.close()
        self._buried.clear()

    def _close(self) -> None:
        for connection in list(self._connections):
            connection.abort("drain-timeout")
        self._close_buried()
        if self._drain_until is None:
            for listener in self._listeners:
                listener.close()
        self._closed = True
        self.pool.close()
        self._epoll.close()
        os.close(self._wake_r)
        os.close(self._wake_w)
        totals = self.counters
        self._log.line(f"stopped, accepted={totals.accepted} up={totals.bytes_up} down={totals.bytes_down}")
