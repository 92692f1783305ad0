"""Whom the user means to talk to: a name, a port, and where to dial them. Pure parsing, no I/O.

The name is the user's own word. Everything that later asks "is it the one I meant?" compares with this name and never
with one that the other end supplied.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from attestation.errors import InputError

__all__ = ["Target", "parse_address"]

_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")


@dataclass(frozen=True, slots=True)
class Target:
    """A service: the DNS name it must prove, its port, and the address to dial when DNS does not know the name."""

    name: str
    port: int
    connect: tuple[str, int] | None = None

    @classmethod
    def parse(cls, text: str, connect: tuple[str, int] | None = None) -> Target:
        """Read `https://host[:port][/v1]`. Raises `InputError`: `INPUT_TARGET`."""
        try:
            url = urlsplit(text)
            port = 443 if url.port is None else url.port
        except ValueError:
            raise _bad(text) from None
        name = (url.hostname or "").lower().removesuffix(".")
        plain = not (url.query or url.fragment or url.username or url.password)
        if url.scheme != "https" or not plain or url.path.rstrip("/") not in ("", "/v1") or not 0 < port < 65536:
            raise _bad(text)
        if _is_address(name):
            raise InputError(
                "INPUT_TARGET",
                "an address proves nothing: evidence names DNS names",
                expected="https://NAME[:PORT]",
                actual=text,
                hint=f"name the service and say where to dial it: --connect {name}:{port}",
            )
        if len(name) > 253 or not _NAME.fullmatch(name):
            raise _bad(text)
        return cls(name, port, connect)

    @property
    def address(self) -> tuple[str, int]:
        """Where to dial."""
        return self.connect or (self.name, self.port)

    @property
    def origin(self) -> str:
        return f"https://{self.host}"

    @property
    def host(self) -> str:
        """The Host header's value."""
        return self.name if self.port == 443 else f"{self.name}:{self.port}"


def parse_address(text: str) -> tuple[str, int]:
    """Read `HOST:PORT` (or `[IPV6]:PORT`) of `--connect`. Raises `InputError`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise InputError("INPUT_ADDRESS", "not an address to dial", expected="HOST:PORT", actual=text)
    return host, int(port)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bad(text: str) -> InputError:
    return InputError(
        "INPUT_TARGET",
        "not a service to talk to",
        expected="https://NAME[:PORT]",
        actual=text,
        hint="for a name that DNS does not know add --connect HOST:PORT",
    )
