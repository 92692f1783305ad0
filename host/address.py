"""Addresses as operators write them: `tcp:HOST:PORT` (IPv6 in brackets) and `unix:/absolute/path`.

Used for both legs of the relay. Parsing is pure; `resolve` alone asks the resolver, once, at start: a look-up
inside the relay's single thread would stop every stream while it waits.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Final

from host.errors import RunError, UsageError

__all__ = ["Address", "Endpoint", "TcpAddress", "UnixAddress", "parse_address", "resolve"]

_UNIX_PATH_MAX: Final = 107
"""sun_path is 108 bytes with its final zero (unix(7))."""

_FORMS: Final = "write tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:/absolute/path"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A socket family and the address to give to `connect` or `bind`; nothing left to look up."""

    family: socket.AddressFamily
    sockaddr: str | tuple[str, int] | tuple[str, int, int, int]


def parse_address(text: str, *, listening: bool = False) -> Address:
    """The address in `text`, or UsageError. Port 0 (any free port) only makes sense when `listening`."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "tcp":
        return _parse_tcp(text, rest, low=0 if listening else 1)
    if colon and scheme == "unix":
        return _parse_unix(text, rest)
    raise UsageError("BAD_ADDRESS", f"bad address {text!r}: unknown kind", _FORMS)


def _parse_tcp(text: str, rest: str, low: int) -> TcpAddress:
    host, colon, port = rest.rpartition(":")
    if not colon or not host:
        raise UsageError("BAD_ADDRESS", f"bad address {text!r}: want a host and a port", _FORMS)
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and low <= int(port) <= 65535):
        raise UsageError("BAD_ADDRESS", f"bad address {text!r}: want a port of {low}..65535", _FORMS)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError as err:
            raise UsageError("BAD_ADDRESS", f"bad address {text!r}: no IPv6 address in brackets", _FORMS) from err
    elif ":" in host or not host.isascii() or any(c.isspace() for c in host):
        raise UsageError("BAD_ADDRESS", f"bad address {text!r}: bad host", _FORMS)
    return TcpAddress(host, int(port))


def _parse_unix(text: str, path: str) -> UnixAddress:
    if not path.startswith("/") or "\0" in path:
        raise UsageError("BAD_ADDRESS", f"bad address {text!r}: want an absolute path", _FORMS)
    if (length := len(os.fsencode(path))) > _UNIX_PATH_MAX:
        raise UsageError(
            "BAD_ADDRESS",
            f"bad address {text!r}: path of {length} bytes, the kernel allows {_UNIX_PATH_MAX}",
            "use a shorter directory, for example under /run",
        )
    return UnixAddress(path)


def resolve(address: Address) -> tuple[Endpoint, ...]:
    """Every endpoint `address` stands for, in the resolver's order, or RunError. Blocks; call it at start
    only.
    """
    if isinstance(address, UnixAddress):
        return (Endpoint(socket.AF_UNIX, address.path),)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        raise RunError(
            "UNKNOWN_HOST",
            f"{address}: no such host",
            "check the name, or give an IP address; names are looked up once, at start",
        ) from err
    endpoints: list[Endpoint] = []
    for family, _, _, _, sockaddr in found:
        if isinstance(sockaddr[0], str) and (endpoint := Endpoint(family, sockaddr)) not in endpoints:
            endpoints.append(endpoint)
    return tuple(endpoints)
