"""ClientHellos for the relay's tests: built field by field, so that each can be wrong in exactly one place."""

from __future__ import annotations

from OpenSSL import SSL

RANDOM = bytes(range(32))


def vector(width: int, data: bytes) -> bytes:
    return len(data).to_bytes(width, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def server_name(name: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, bytes([kind]) + vector(2, name)))


def alpn(*protocols: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, p) for p in protocols)))


SUPPORTED_VERSIONS = extension(43, vector(1, b"\x03\x04"))


def body(
    extensions: bytes | None,
    *,
    version: bytes = b"\x03\x03",
    session: bytes = bytes(32),
    suites: bytes = b"\x13\x01",
    compression: bytes = b"\0",
) -> bytes:
    fixed = version + RANDOM + vector(1, session) + vector(2, suites) + vector(1, compression)
    return fixed + (b"" if extensions is None else vector(2, extensions))


def message(content: bytes, kind: int = 1) -> bytes:
    return bytes([kind]) + vector(3, content)


def records(handshake: bytes, size: int = 16384, version: bytes = b"\x03\x01") -> bytes:
    pieces = [handshake[at : at + size] for at in range(0, len(handshake), size)]
    return b"".join(b"\x16" + version + vector(2, piece) for piece in pieces)


def hello(name: str | None = "demo.vouchsafe.test", *more: bytes) -> bytes:
    """A well-formed hello in one record."""
    named = b"" if name is None else server_name(name.encode())
    return records(message(body(named + SUPPORTED_VERSIONS + b"".join(more))))


def openssl_hello(name: str | None, *protocols: bytes) -> bytes:
    """What a real OpenSSL client with default groups (so, post-quantum) sends first."""
    connection = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    if name is not None:
        connection.set_tlsext_host_name(name.encode())
    if protocols:
        connection.set_alpn_protos(list(protocols))
    connection.set_connect_state()
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        return connection.bio_read(65536)
    raise AssertionError("a client cannot finish a handshake alone")
