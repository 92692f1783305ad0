"""Reads the one message the relay may read: a TLS ClientHello, from bytes alone.

Pure: bytes in, a value out; no socket, no clock. Runs in the relay on bytes that anyone on the network can
send, so every length is checked before it is used, the total is capped, and what is not understood is
refused. Nothing in a ClientHello is authenticated: the name found here chooses a backend and proves nothing
about either end.

Sources: RFC 8446 §4.1.2 (ClientHello), §4.2 (extensions), §5.1 (record layer); RFC 6066 §3 (server_name); RFC
7301 §3.1 (ALPN); RFC 9849 (encrypted_client_hello). Post-quantum hellos are some 1.5 KB and span TCP
segments; a hello may also span TLS records. Cost: linear in the bytes fed, whatever the segmentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["CAP", "Hello", "HelloReader", "NeedMore", "NotTLS", "Refusal", "dns_name"]

CAP: Final = 17 * 1024
"""Bytes kept of a connection before its hello is understood: one full record (16 KiB) and some."""

Refusal = Literal["not-tls", "bad-hello", "bad-sni", "hello-too-large"]

_RECORD_HEADER: Final = 5
_RECORD_MAX: Final = 1 << 14  # RFC 8446 §5.1
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_ECH: Final = 0xFE0D

_LABEL: Final = re.compile(rb"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class NeedMore:
    """Everything so far could be the beginning of a ClientHello."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A well-formed ClientHello. Unauthenticated: any client can write any name here."""

    sni: str | None
    """Server name, lower case, A-labels, no trailing dot; None when the client sent none."""
    alpn: tuple[bytes, ...]
    """Application protocols offered, in the client's order."""
    ech: bool
    """An encrypted_client_hello extension is present (real or GREASE): `sni` is then the outer, public
    name.
    """


@dataclass(frozen=True, slots=True)
class NotTLS:
    """These bytes are no ClientHello we forward. `reason` holds field names and numbers, never the peer's
    bytes.
    """

    code: Refusal
    reason: str


class _Malformed(Exception):
    def __init__(self, code: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = NotTLS(code, reason)


_NEED_MORE: Final = NeedMore()


def dns_name(raw: bytes) -> str:
    """The host name in `raw` in lower case, or ValueError: LDH labels of 1..63 bytes, 253 in all, not an IP
    literal.

    RFC 6066 §3: ASCII (A-labels), no trailing dot, no literal addresses. A name whose last label is all
    digits is an IPv4 address to every URL parser, so it is refused too.
    """
    if not 1 <= len(raw) <= 253:
        raise ValueError(f"want 1..253 bytes, got {len(raw)}")
    lowered = raw.lower()
    labels = lowered.split(b".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("want labels of letters, digits and inner hyphens, 1..63 bytes each")
    if labels[-1].isdigit():
        raise ValueError("want a host name, got a literal address")
    return lowered.decode("ascii")


class _Cursor:
    """A bounded read position: every `take` is checked against what is left, and `end` refuses trailing
    bytes.
    """

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._at, self._what = data, 0, what

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int, field: str) -> bytes:
        if count > self.left:
            raise _Malformed("bad-hello", f"{self._what}.{field}: want {count} bytes, {self.left} left")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, width: int, field: str) -> int:
        return int.from_bytes(self.take(width, field), "big")

    def vector(self, width: int, field: str, low: int, high: int) -> bytes:
        """An opaque<low..high> with a length of `width` bytes (RFC 8446 §3.4)."""
        length = self.number(width, field)
        if not low <= length <= high:
            raise _Malformed("bad-hello", f"{self._what}.{field}: length {length}, want {low}..{high}")
        return self.take(length, field)

    def end(self) -> None:
        if self.left:
            raise _Malformed("bad-hello", f"{self._what}: {self.left} bytes after the end")


class HelloReader:
    """Collects bytes until they are one ClientHello or cannot become one.

    `buffer` holds every byte fed, hello and what follows it, to be replayed to the backend unchanged. Never
    more than `cap` bytes: feed at most `room` at a time.
    """

    __slots__ = ("_cap", "_message", "_next", "_result", "buffer")

    def __init__(self, cap: int = CAP) -> None:
        self._cap = cap
        self._next = 0  # where the next record starts in `buffer`
        self._message = bytearray()  # handshake bytes of the records read so far
        self._result: NeedMore | Hello | NotTLS = _NEED_MORE
        self.buffer = bytearray()

    @property
    def room(self) -> int:
        """Bytes that may still be fed."""
        return self._cap - len(self.buffer)

    def feed(self, data: bytes) -> NeedMore | Hello | NotTLS:
        """Add `data` and say what the bytes are. A final answer stays: later bytes are only kept for the
        replay.
        """
        if len(data) > self.room:
            raise ValueError(f"feed at most {self.room} bytes")
        self.buffer += data
        if isinstance(self._result, NeedMore):
            try:
                self._result = self._advance()
            except _Malformed as malformed:
                self._result = malformed.refusal
        return self._result

    def _advance(self) -> NeedMore | Hello:
        while True:
            header = self.buffer[self._next : self._next + _RECORD_HEADER]
            self._check_start_of_record(header)
            if len(header) < _RECORD_HEADER:
                break
            length = int.from_bytes(header[3:], "big")
            if not 1 <= length <= _RECORD_MAX:  # §5.1: handshake records are never empty
                raise _Malformed("not-tls", f"record length {length}, want 1..{_RECORD_MAX}")
            end = self._next + _RECORD_HEADER + length
            if end > self._cap:
                raise _Malformed("hello-too-large", f"record ends at byte {end}, cap {self._cap}")
            if end > len(self.buffer):
                break
            self._message += self.buffer[self._next + _RECORD_HEADER : end]
            self._next = end
            if self._message_complete():
                return _parse(bytes(self._message[4:]))
        if not self.room:
            raise _Malformed("hello-too-large", f"no hello within {self._cap} bytes")
        return _NEED_MORE

    @staticmethod
    def _check_start_of_record(header: bytearray) -> None:
        # Answer on the first byte: a browser that speaks plain HTTP should not wait for the hello deadline.
        if header and header[0] != _HANDSHAKE:
            raise _Malformed("not-tls", f"record type {header[0]}, want {_HANDSHAKE}")
        if len(header) > 1 and header[1] != 3:
            raise _Malformed("not-tls", f"record version {header[1]}.x, want 3.x")

    def _message_complete(self) -> bool:
        if self._message[0] != _CLIENT_HELLO:
            raise _Malformed("not-tls", f"handshake type {self._message[0]}, want {_CLIENT_HELLO}")
        if len(self._message) < 4:
            return False
        want = 4 + int.from_bytes(self._message[1:4], "big")
        # The peer picks this length; refuse it before waiting for that many bytes.
        if want + _RECORD_HEADER > self._cap:
            raise _Malformed("hello-too-large", f"hello of {want} bytes, cap {self._cap}")
        if len(self._message) > want:
            raise _Malformed("bad-hello", f"{len(self._message) - want} handshake bytes after the hello")
        return len(self._message) == want


def _parse(body: bytes) -> Hello:
    """The ClientHello in `body` (without the four-byte handshake header), RFC 8446 §4.1.2, in field order."""
    hello = _Cursor(body, "hello")
    if hello.number(1, "legacy_version") != 3:
        raise _Malformed("bad-hello", "hello.legacy_version: want 3.x")
    hello.number(1, "legacy_version")
    hello.take(32, "random")
    hello.vector(1, "session_id", 0, 32)
    if len(hello.vector(2, "cipher_suites", 2, 65534)) % 2:
        raise _Malformed("bad-hello", "hello.cipher_suites: odd length")
    hello.vector(1, "compression_methods", 1, 255)
    # TLS 1.2 allows a hello without extensions (RFC 5246 §7.4.1.2): then there is no name.
    extensions = _extensions(hello.vector(2, "extensions", 0, 65535)) if hello.left else {}
    hello.end()
    return Hello(
        sni=_server_name(extensions[_SERVER_NAME]) if _SERVER_NAME in extensions else None,
        alpn=_protocols(extensions[_ALPN]) if _ALPN in extensions else (),
        ech=_ECH in extensions,
    )


def _extensions(block: bytes) -> dict[int, bytes]:
    cursor = _Cursor(block, "extensions")
    found: dict[int, bytes] = {}
    while cursor.left:
        kind = cursor.number(2, "type")
        # §4.2: no type twice. Two names would let relay and server each believe another one.
        if kind in found:
            raise _Malformed("bad-hello", f"extension {kind} twice")
        found[kind] = cursor.vector(2, f"extension {kind}", 0, 65535)
    return found


def _server_name(data: bytes) -> str:
    """The one host_name of a ServerNameList (RFC 6066 §3); another name type or a second name is refused."""
    outer = _Cursor(data, "server_name")
    names = _Cursor(outer.vector(2, "list", 1, 65535), "server_name.list")
    outer.end()
    if kind := names.number(1, "name_type"):
        raise _Malformed("bad-sni", f"server_name.name_type {kind}, want 0")
    raw = names.vector(2, "host_name", 1, 65535)
    names.end()
    try:
        return dns_name(raw)
    except ValueError as err:
        raise _Malformed("bad-sni", f"server_name: {err}") from err


def _protocols(data: bytes) -> tuple[bytes, ...]:
    outer = _Cursor(data, "alpn")
    names = _Cursor(outer.vector(2, "list", 2, 65535), "alpn.list")
    outer.end()
    found: list[bytes] = []
    while names.left:
        found.append(names.vector(1, "protocol", 1, 255))
    return tuple(found)
