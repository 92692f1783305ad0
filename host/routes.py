"""Which backend a server name leads to. A table and a look-up; no socket, no clock.

Runs in the relay. The name comes from an unauthenticated ClientHello, so a route grants nothing: the backend
proves itself to the client inside TLS, where the relay cannot look.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from host.address import Address, parse_address
from host.clienthello import dns_name
from host.errors import UsageError

__all__ = ["DEFAULT", "Route", "RouteTable", "parse_route"]

DEFAULT = "default"
"""Name of the route taken when no other fits; it is also what the log shows."""


@dataclass(frozen=True, slots=True)
class Route:
    """A name as the operator wrote it (`chat.example.org`, `*.example.org` or `default`) and where it
    leads.
    """

    name: str
    backend: Address


class RouteTable:
    """Exact names first, then a wildcard for exactly one label (as in certificates, RFC 9525 §6.3), then the
    default.
    """

    __slots__ = ("_default", "_exact", "_wildcard", "routes")

    def __init__(self, routes: Iterable[Route], default: Address | None = None) -> None:
        self._exact: dict[str, Route] = {}
        self._wildcard: dict[str, Route] = {}
        self._default = Route(DEFAULT, default) if default is not None else None
        for route in routes:
            if route.name.startswith("*."):
                table, key = self._wildcard, route.name[2:]
            else:
                table, key = self._exact, route.name
            if key in table:
                raise UsageError("DUPLICATE_ROUTE", f"two routes for {route.name}", "give each name one backend")
            table[key] = route
        self.routes: tuple[Route, ...] = (
            *self._exact.values(),
            *self._wildcard.values(),
            *([self._default] if self._default else []),
        )
        if not self.routes:
            raise UsageError(
                "NO_ROUTES", "no backend to relay to", "add --route NAME=ADDRESS or --default ADDRESS (see --help)"
            )

    def find(self, name: str | None) -> Route | None:
        """The route for a lower-case `name` (None: the client sent no name), or None: refuse the
        connection.
        """
        if name is not None:
            if route := self._exact.get(name):
                return route
            if route := self._wildcard.get(name.partition(".")[2]):
                return route
        return self._default


def parse_route(text: str) -> Route:
    """The route in `NAME=ADDRESS`, or UsageError."""
    name, equals, address = text.partition("=")
    hint = "write --route chat.example.org=unix:/run/enclave.sock, or *.example.org=… for one label"
    if not equals:
        raise UsageError("BAD_ROUTE", f"bad route {text!r}: no '='", hint)
    wildcard = name.startswith("*.")
    try:
        plain = dns_name((name[2:] if wildcard else name).encode("utf-8", "surrogateescape"))
    except ValueError as err:
        raise UsageError("BAD_ROUTE", f"bad route {text!r}: bad name: {err}", hint) from err
    return Route(f"*.{plain}" if wildcard else plain, parse_address(address))
