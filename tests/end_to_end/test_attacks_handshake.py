"""Attacks on the handshake itself: an older TLS, a resumed session, a certificate that changes, a peer that drips."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography import x509
from OpenSSL import SSL

from attestation.client import tls as tls_module
from attestation.client.handshake import Link
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from tests.attestation.client.enclave import FETCH, PROVE, prove, served, session_for, show
from tests.attestation.client.ratls_server import Server
from tests.attestation.client.talking import SECRET, Send, both_roads, refused, talk
from tests.end_to_end.attacks import THROUGH, Defence, check, replaced, stops, users_bytes
from tests.genuine import NAME, Genuine, genuine, leaf_key

NEWS = 1_795_000_000 + 30
"""When a renewed certificate was issued."""
OTHER_IMAGE = {"mrtd": b"\x01" * 48}
"""What the TD's registers show when it runs something else."""


# --- an older TLS ---


def any_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client offers TLS 1.2 as well."""
    build = tls_module.client_context

    def lax() -> SSL.Context:
        context = build()
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        return context

    monkeypatch.setattr(tls_module, "client_context", lax)


unread_version: Defence = replaced(SSL.Connection, "get_protocol_version_name", lambda connection: "TLSv1.3")
"""What was negotiated is not looked at."""


@contextlib.contextmanager
def downgraded(story: Genuine) -> Iterator[tuple[AttestedSession, Server]]:
    with served(story) as server:
        server.max_version = SSL.TLS1_2_VERSION
        show(server, story)
        yield session_for(server, story), server


@both_roads
def test_downgrade_to_tls_1_2(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not offered, and refused if it came to pass: TLS 1.2 renegotiates, and shows the certificate to the whole way."""
    story = genuine()
    stops(
        lambda: downgraded(story), "TLS_VERSION", (any_version, "TLS_VERSION"), (unread_version, THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_tls_1_2_is_not_even_offered(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer alone: such a handshake does not come about."""
    with downgraded(genuine()) as (session, server):
        refused(session, server, "TLS_VERSION", send)
        assert not any(c.handshake_done for c in server.connections)
    any_version(monkeypatch)
    with downgraded(genuine()) as (session, server):
        refused(session, server, "TLS_VERSION", send)
        assert all(c.handshake_done for c in server.connections)


# --- a resumed session ---


def offers_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client keeps the session of its last connection and offers it at the next, as browsers do."""
    last: dict[SSL.Context, Any] = {}
    begin, build, read = Link.__init__, tls_module.client_context, Link.read

    def caching() -> SSL.Context:
        context = build()
        context.set_session_cache_mode(SSL.SESS_CACHE_CLIENT)
        return context

    def resuming(self: Link, *args: Any) -> None:
        begin(self, *args)
        if self._conn.get_context() in last:
            self._conn.set_session(last[self._conn.get_context()])

    def keeping(self: Link, size: int) -> bytes:
        data = read(self, size)
        last[self._conn.get_context()] = self._conn.get_session()  # tickets have come by now
        return data

    monkeypatch.setattr(tls_module, "client_context", caching)
    monkeypatch.setattr(Link, "__init__", resuming)
    monkeypatch.setattr(Link, "read", keeping)


unread_resumption: Defence = replaced(Link, "session_reused", False)
"""The client does not ask whether a session was resumed."""


@contextlib.contextmanager
def ticketed(first: Genuine, second: Genuine) -> Iterator[tuple[AttestedSession, Server]]:
    """A server that hands out tickets as *first*, and then is *second*; it still takes the tickets."""
    with served(first, tickets=True) as server:
        session = session_for(server, first)
        talk(session, server)
        for connection in server.connections:
            connection.app_bytes.clear()
            connection.requests.clear()
        # In place: the same context has the same ticket keys. pyOpenSSL would rather have a new one.
        server._context._used = False
        server._context.use_certificate(x509.load_der_x509_certificate(second.evidence.leaf))
        server._context.use_privatekey(leaf_key(second.story.key))
        server.routes[PROVE] = lambda c, body: prove(first, c, body, td=OTHER_IMAGE)
        yield session, server


@both_roads
def test_resumption_that_hides_what_the_server_has_become(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server runs another image by now. A full handshake shows it; a resumed one would show the old certificate.

    Layers: no session is offered; a resumed one is refused; the channel proof shows the TD as it is now."""
    first, second = genuine(), genuine(key=1, td=OTHER_IMAGE)
    stops(
        lambda: ticketed(first, second), "TDX_MRTD", (offers_tickets, "TLS_RESUMED"),
        (unread_resumption, "CHANNEL_TD"), (check("channel.same-td"), THROUGH), monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


def test_tickets_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An honest server that offers them sees a full handshake each time."""
    story = genuine()
    with served(story, tickets=True) as server:
        session = session_for(server, story)
        for _ in range(3):
            talk(session, server)
        resumed = [SSL._lib.SSL_session_reused(c.tls._ssl) for c in server.connections]  # type: ignore[attr-defined]
        assert resumed == [0, 0, 0]


# --- a certificate that changes ---


@contextlib.contextmanager
def swapped(first: Genuine, second: Genuine) -> Iterator[tuple[AttestedSession, Server]]:
    """A service that the client has accepted shows another certificate for the same name from now on."""
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        for connection in server.connections:
            connection.app_bytes.clear()
            connection.requests.clear()
        show(server, second)
        yield session, server


class AnyCertificate(dict[bytes, Any]):
    """What is known about one certificate is taken for every one: verdicts kept by service."""

    def get(self, key: bytes, default: Any = None) -> Any:
        return next(iter(self.values()), default)


def kept_by_service(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = AttestedSession.__init__

    def forgetful(self: AttestedSession, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        self._known = AnyCertificate()

    monkeypatch.setattr(AttestedSession, "__init__", forgetful)


@both_roads
def test_certificate_swapped_for_a_bad_one_mid_life(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new certificate is verified. Were it not, the connection's quote is still compared with the old one's."""
    first, second = genuine(), genuine(key=1, td=OTHER_IMAGE)
    stops(
        lambda: swapped(first, second), "TDX_MRTD", (kept_by_service, "CHANNEL_TD"),
        (check("channel.same-td"), "CHANNEL_REPORT_DATA"),
        (check("channel.report-data"), THROUGH), monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_certificate_swapped_for_one_of_another_machine_mid_life(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = genuine(), genuine(key=1, issued_at=NEWS, statement={"platforms": [("piid", b"another machine")]})
    stops(
        lambda: swapped(first, second), "DEPLOYMENT_PLATFORM", (check("deployment.platform"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_certificate_renewed_mid_life_is_accepted_with_its_evidence_fetched_again(send: Send) -> None:
    """The counterpart: a good one costs one more question and no dropped service."""
    first, second = genuine(), genuine(key=1, issued_at=NEWS)
    with swapped(first, second) as (session, server):
        send(session, server)
        assert server.connections[-1].requests == [FETCH, PROVE, "POST /v1/x"]
        assert SECRET in users_bytes(server)
        assert session.last_result is not None and session.last_result.accepted
        before = server.requests.count(FETCH)
        send(session, server)
        assert server.requests.count(FETCH) == before


# --- a peer that drips ---


class Drip:
    """Carries bytes between client and *server*, the server's first ones one at a time."""

    def __init__(self, server: Server, *, slow: int, pause: float) -> None:
        self._server, self._slow, self._pause = server, slow, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._socks: list[socket.socket] = []
        self._threads[0].start()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server.address)
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socks += [near, far]
                self._start(self._carry, near, far, 0)
                self._start(self._carry, far, near, self._slow)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket, slow: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                for byte in data[:slow]:
                    sink.sendall(bytes([byte]))
                    time.sleep(self._pause)
                data, slow = data[slow:], max(0, slow - len(data))
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in self._socks:
            sock.close()


class Dripping:
    """The server behind the drip, as `talk` and `refused` use one: dialled at the drip, counted at the server."""

    def __init__(self, server: Server, address: tuple[str, int]) -> None:
        self._server, self.address = server, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


@both_roads
def test_handshake_that_drips_byte_by_byte(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is one for TLS, evidence and proof together; a byte now and then does not push it back."""
    story = genuine()

    @contextlib.contextmanager
    def attack() -> Iterator[tuple[AttestedSession, Any]]:
        with served(story) as server:
            drip = Drip(server, slow=100, pause=0.006)  # 0.6 s at least
            try:
                session = session_for(server, story, seconds=0.3)
                session.target = Target(NAME, 443, drip.address)
                yield session, Dripping(server, drip.address)
            finally:
                drip.close()

    stops(
        attack, "TRANSPORT_DEADLINE", (replaced(Link, "remaining", 5.0), THROUGH), monkeypatch=monkeypatch, send=send
    )  # fmt: skip
