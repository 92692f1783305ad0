"""A small threaded TLS server for tests: any certificate, canned HTTP answers, and a count of what came in.

`app_bytes` holds, per connection, every byte that arrived as application data: the ground truth for "nothing left
the client before the verdict". It is a test's stand-in for a relay that terminates TLS, or for an enclave.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

Handler = Callable[["Connection", bytes], bytes]
"""(connection, request body) -> the whole HTTP answer, or b"" to close without one."""


def plain_certificate(name: str = "localhost") -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A self-signed certificate without evidence: what a relay that swaps certificates would show."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(minutes=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def answer(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n{headers}\r\n"
    return head.encode() + body


def chunked(*parts: bytes, headers: str = "") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n{headers}\r\n"
    return head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (*parts, b""))


@dataclass
class Connection:
    tls: SSL.Connection
    server: Server
    app_bytes: bytearray = field(default_factory=bytearray)
    handshake_done: bool = False
    sni: str | None = None
    requests: list[str] = field(default_factory=list)

    def exporter(self, label: bytes, context: bytes) -> bytes:
        return self.tls.export_keying_material(label, 32, context)


class Server:
    """Listens on loopback. `routes` maps "METHOD /path" to a handler or to a fixed answer; others get 404."""

    def __init__(
        self,
        certificate: x509.Certificate | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
        *,
        extra: tuple[x509.Certificate, ...] = (),
        max_version: int = SSL.TLS1_3_VERSION,
        tickets: bool = False,
    ) -> None:
        if certificate is None or key is None:
            certificate, key = plain_certificate()
        self.routes: dict[str, Handler | bytes] = {}
        self.connections: list[Connection] = []
        self.extra, self.max_version, self.tickets = extra, max_version, tickets
        self._context = self._build(certificate, key)
        self.leaf = certificate.public_bytes(Encoding.DER)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _build(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_max_proto_version(self.max_version)
        if not self.tickets:
            context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
            context.set_options(SSL.OP_NO_TICKET)
        context.use_certificate(certificate)
        context.use_privatekey(key)
        for other in self.extra:
            context.add_extra_chain_cert(other)
        context.set_alpn_select_callback(lambda _c, offered: b"http/1.1" if b"http/1.1" in offered else offered[0])
        return context

    def use(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        """Show another certificate from the next connection on."""
        self._context = self._build(certificate, key)
        self.leaf = certificate.public_bytes(Encoding.DER)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def received(self) -> bytes:
        """All application bytes of all connections."""
        return b"".join(bytes(c.app_bytes) for c in self.connections)

    @property
    def requests(self) -> list[str]:
        return [r for c in self.connections for r in c.requests]

    def close(self) -> None:
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in (self._accepting, *self._threads):
            thread.join(5)
        for sock in self._socks:
            sock.close()

    def wait_idle(self, at_least: int = 1) -> None:
        """Until *at_least* so many connections have come and every one has ended: nothing more can arrive on them."""
        deadline = time.monotonic() + 10
        while len(self._threads) < at_least:
            assert time.monotonic() < deadline, "nobody dialled"
            time.sleep(0.005)
        for thread in list(self._threads):
            thread.join(10)
            assert not thread.is_alive(), "a client kept its connection open"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = SSL.Connection(self._context, sock)
            tls.set_accept_state()
            connection = Connection(tls, self)
            self._socks.append(sock)
            self.connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection, sock), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: Connection, sock: socket.socket) -> None:
        try:
            connection.tls.do_handshake()
            connection.handshake_done = True
            name = connection.tls.get_servername()
            connection.sni = name.decode() if name else None
            buffer = b""
            while True:
                buffer = self._request(connection, buffer)
        except SSL.Error:
            return
        except OSError:
            return
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _more(self, connection: Connection) -> bytes:
        data = connection.tls.recv(65536)
        connection.app_bytes += data
        return data

    def _request(self, connection: Connection, buffer: bytes) -> bytes:
        while b"\r\n\r\n" not in buffer:
            buffer += self._more(connection)
        head, _, body = buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            while not body.endswith(b"0\r\n\r\n"):
                body += self._more(connection)
            rest, raw = b"", b""
            while (size := int(body.split(b"\r\n", 1)[0], 16)) > 0:
                start = body.index(b"\r\n") + 2
                raw, body = raw + body[start : start + size], body[start + size + 2 :]
            body = raw
        else:
            length = int(headers.get("content-length", "0"))
            while len(body) < length:
                body += self._more(connection)
            body, rest = body[:length], body[length:]
        method, path, _ = lines[0].split(" ")
        connection.requests.append(f"{method} {path}")
        handler = self.routes.get(f"{method} {path}", answer(b'{"error":"no such route"}', status="404 Not Found"))
        reply = handler if isinstance(handler, bytes) else handler(connection, body)
        if not reply:
            raise OSError("closing on purpose")
        connection.tls.sendall(reply)
        return rest
