"""Moves bytes from one socket to another inside the kernel: socket → pipe → socket, one direction at a time.

Runs in the relay's single thread; all sockets and pipes are non-blocking. A pipe is lent to a direction only
while bytes are in it, so an idle connection costs no pipe and a stalled one costs at most one per direction.
A direction never reads while it still holds bytes: that is the whole of the backpressure. When no pipe can be
had (descriptor or memory limits), the direction copies through a small buffer until one is free; nothing is
lost, it is only dearer.

The bytes are sealed for somebody else. Nothing here looks at them.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
from typing import Final

__all__ = ["DONE", "READ", "WRITE", "Direction", "LegFailed", "Pipe", "PipePool"]

READ: Final = select.EPOLLIN
"""Waiting until the source is readable."""
WRITE: Final = select.EPOLLOUT
"""Waiting until the sink is writable."""
DONE: Final = 0
"""End of stream read, everything delivered, end of stream passed on."""

_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_ROUNDS: Final = 8
"""A fair share: at most this many pipefuls, then the other connections' turn."""
_SHORT_READ: Final = 16 * 1024
"""After less than this the source is probably empty; let epoll say so instead of asking it once more."""
_COPY: Final = 32 * 1024


class Pipe:
    """A kernel pipe and how many bytes one splice into it may carry."""

    __slots__ = ("capacity", "r", "w")

    def __init__(self, wanted: int) -> None:
        self.r, self.w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # An unprivileged user gets fs.pipe-user-pages-soft (64 MiB); past it the kernel keeps the small
            # default.
            self.capacity: int = fcntl.fcntl(self.w, fcntl.F_SETPIPE_SZ, wanted)
        except OSError:
            self.capacity = fcntl.fcntl(self.w, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.r)
        os.close(self.w)


class PipePool:
    """At most `most` pipes exist at a time; up to `keep` empty ones wait for the next borrower."""

    __slots__ = ("_free", "_keep", "_most", "_wanted", "open")

    def __init__(self, most: int = 256, wanted: int = 256 * 1024, keep: int = 64) -> None:
        self._most, self._wanted, self._keep = most, wanted, keep
        self._free: list[Pipe] = []
        self.open = 0

    def take(self) -> Pipe | None:
        """An empty pipe, or None when there is none to be had right now."""
        if self._free:
            return self._free.pop()
        if self.open >= self._most:
            return None
        try:
            pipe = Pipe(self._wanted)
        except OSError:  # no descriptors, no memory: the borrower copies instead
            return None
        self.open += 1
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Take back an EMPTY pipe."""
        if len(self._free) < self._keep:
            self._free.append(pipe)
        else:
            self.discard(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe that still holds bytes: lent again, it would deliver them to somebody else."""
        pipe.close()
        self.open -= 1

    def close(self) -> None:
        while self._free:
            self.discard(self._free.pop())


class LegFailed(Exception):
    """One of the two sockets is broken: `at_source` says which, from the direction that found out."""

    def __init__(self, direction: Direction, *, at_source: bool) -> None:
        super().__init__("source" if at_source else "sink")
        self.direction = direction
        self.at_source = at_source


class Direction:
    """One way through a connection. `want` says what it waits for, `moved` how many bytes the sink has
    taken.
    """

    __slots__ = ("_copied", "_held", "_pipe", "_pool", "_sink", "_sink_fd", "_source", "_source_fd", "moved", "want")

    def __init__(self, source: socket.socket, sink: socket.socket, pool: PipePool, replay: bytes = b"") -> None:
        self._source, self._source_fd = source, source.fileno()
        self._sink, self._sink_fd = sink, sink.fileno()
        self._pool = pool
        self._pipe: Pipe | None = None
        self._held = 0  # bytes in `_pipe`
        self._copied = memoryview(replay)  # bytes held outside a pipe; they leave first
        self.moved = 0
        self.want = WRITE if replay else READ

    def step(self) -> None:
        """Move what can be moved now and update `want`; LegFailed when a socket breaks. Never blocks."""
        if self.want == DONE:
            return
        try:
            self.want = self._step()
        except LegFailed:
            self.close()
            raise

    def _step(self) -> int:
        for _ in range(_ROUNDS):
            got = 0
            if not self._held and not self._copied:
                try:
                    got = self._fill()
                except BlockingIOError:
                    return READ
                except OSError as err:
                    raise LegFailed(self, at_source=True) from err
            try:
                if not self._held and not self._copied:  # end of stream, and everything before it delivered
                    self._sink.shutdown(socket.SHUT_WR)
                    return DONE
                self._flush()
            except BlockingIOError:
                return WRITE
            except OSError as err:
                raise LegFailed(self, at_source=False) from err
            if 0 < got < _SHORT_READ:
                break
        return READ

    def _fill(self) -> int:
        """Take bytes from the source into a pipe (or the copy buffer); how many, 0 at the end of the
        stream.
        """
        pipe = self._pool.take()
        if pipe is None:
            data = self._source.recv(_COPY)
            self._copied = memoryview(data)
            return len(data)
        try:
            self._held = os.splice(self._source_fd, pipe.w, pipe.capacity, flags=_FLAGS)
        finally:
            if self._held:
                self._pipe = pipe
            else:
                self._pool.give(pipe)
        return self._held

    def _flush(self) -> None:
        """Hand everything held to the sink, or BlockingIOError with the rest still held."""
        while self._copied:
            sent = self._sink.send(self._copied)
            self._copied = self._copied[sent:]
            self.moved += sent
        if self._pipe is not None:
            while self._held:
                sent = os.splice(self._pipe.r, self._sink_fd, self._held, flags=_FLAGS)
                self._held -= sent
                self.moved += sent
            self._pool.give(self._pipe)
            self._pipe = None

    def close(self) -> None:
        """Give up: what is still held is dropped, pipe and all."""
        if self._pipe is not None:
            self._pool.discard(self._pipe)
            self._pipe = None
        self._held, self._copied = 0, memoryview(b"")
        self.want = DONE
