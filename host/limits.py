"""What a stranger may take from the relay: connections, time and descriptors. Values and counts; no socket,
no clock.

Every number a peer can drive is bounded here: connections in total and per source, the time to send a hello,
to reach a backend, to stay silent, to stay half-closed, and the time a stopping relay waits. Sources are
counted in memory while they are connected and never written anywhere.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, fields
from typing import Final

from host.errors import UsageError

__all__ = ["Admission", "Limits", "connections_within", "descriptors_needed", "source_key"]

_TIMEOUT_MAX: Final = 86400.0 * 30
_SPARE_DESCRIPTORS: Final = 64
"""Standard streams, epoll, signals, listeners and what the interpreter opens."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, counts of connections."""

    hello_timeout: float = 5.0
    """From accept to a complete ClientHello, however slowly it drips."""
    dial_timeout: float = 5.0
    """To reach a backend, all its addresses together."""
    idle_timeout: float = 600.0
    """Without a byte delivered in either direction. A model that thinks is silent: do not set it too low."""
    half_close_timeout: float = 60.0
    """The same once one direction has ended."""
    drain_timeout: float = 30.0
    """What a stopping relay grants to open connections."""
    max_connections: int = 4096
    max_per_source: int = 512
    """Per IPv4 address or IPv6 /64. Connections from a unix socket have no source and are not counted."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            flag = "--" + field.name.replace("_", "-")
            if isinstance(value, float) and not (math.isfinite(value) and 0 < value <= _TIMEOUT_MAX):
                raise UsageError("BAD_LIMIT", f"{flag} {value:g}: want seconds above 0", f"for example {flag} 5")
            if isinstance(value, int) and not 1 <= value <= 1_000_000:
                raise UsageError("BAD_LIMIT", f"{flag} {value}: want 1..1000000", f"for example {flag} 512")

    @property
    def tick(self) -> float:
        """How often deadlines are looked at: a tenth of the shortest, within 0.02..1 s."""
        shortest = min(self.hello_timeout, self.dial_timeout, self.idle_timeout, self.half_close_timeout)
        return min(1.0, max(0.02, shortest / 10))


class Admission:
    """Counts who is inside. `enter` says None or why not; every successful `enter` is paid back by one
    `leave`.
    """

    __slots__ = ("_limits", "_sources", "total")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sources: dict[str, int] = {}
        self.total = 0

    def enter(self, source: str | None) -> str | None:
        """The reason to refuse a connection from `source` (None: no source to count), or None and it is
        counted.
        """
        if self.total >= self._limits.max_connections:
            return "over-capacity"
        if source is not None:
            count = self._sources.get(source, 0)
            if count >= self._limits.max_per_source:
                return "over-source-limit"
            self._sources[source] = count + 1
        self.total += 1
        return None

    def leave(self, source: str | None) -> None:
        self.total -= 1
        if source is not None:
            left = self._sources[source] - 1
            if left:
                self._sources[source] = left
            else:
                del self._sources[source]  # remember nobody who has left

    @property
    def sources(self) -> int:
        """How many different sources are connected."""
        return len(self._sources)


def source_key(peer: object) -> str | None:
    """What connections of `peer` (as `accept` gives it) are counted under: an IPv4 address, an IPv6 /64, or
    nothing.

    One IPv6 customer holds a whole /64, so counting single addresses would count nothing.
    """
    if not isinstance(peer, tuple) or not peer or not isinstance(peer[0], str):
        return None
    if ":" not in peer[0]:
        return peer[0]
    packed = ipaddress.IPv6Address(peer[0].partition("%")[0]).packed
    return packed[:8].hex()


def descriptors_needed(connections: int, pipes: int) -> int:
    """Descriptors for `connections` (two sockets each) and `pipes` (two ends each) at the same time."""
    return 2 * connections + 2 * pipes + _SPARE_DESCRIPTORS


def connections_within(descriptors: int, pipes: int) -> int:
    """The most connections that fit into a descriptor limit; zero or less when not even the pipes do."""
    return (descriptors - _SPARE_DESCRIPTORS - 2 * pipes) // 2
