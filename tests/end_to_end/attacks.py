"""An attack is written once and run several times: refused as things are, then with one defence after the other taken
out, until the user's secret arrives. So each test proves that the attack is real, and which defence does the work.

    stops(attack, "CODE", (defence, "NEXT_CODE"), (other_defence, THROUGH), monkeypatch=monkeypatch, send=send)

Where a second layer stands behind the first, its code is named: defence in depth is asserted, not assumed. Defences
stay out once they are out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import pytest
from cryptography import x509
from OpenSSL import SSL

from attestation.bundle import Bundle
from attestation.client.session import AttestedSession
from attestation.ratls import Leaf, build_leaf
from attestation.result import Check, Checks, Status
from tests.attestation.client.enclave import FETCH, PROVE
from tests.attestation.client.ratls_server import Connection, Handler, Server, answer
from tests.attestation.client.talking import SECRET, Send, refused, talk
from tests.genuine import NAME, Genuine, leaf_key

__all__ = [
    "THROUGH", "Attack", "Defence", "ask", "check", "dress", "forward", "impostor", "replaced", "stops", "users_bytes",
]  # fmt: skip

THROUGH: Final = "the secret arrives"

Attack = Callable[[], AbstractContextManager[tuple[AttestedSession, Server]]]
"""Sets up the attacker; yields the client's session, and the server that the client will reach."""
Defence = Callable[[pytest.MonkeyPatch], None]
"""Takes one defence out."""

_FIXED: Final = re.compile(
    rb"GET /\.well-known/vouchsafe/evidence HTTP/1\.1\r\n(?:[^\r\n]+\r\n)*\r\n"
    rb"|POST /\.well-known/vouchsafe/channel HTTP/1\.1\r\n(?:[^\r\n]+\r\n)*\r\n"
    rb'\{"nonce":"[A-Za-z0-9_-]{43}","gpu":(?:true|false),"binding":"(?:exporter|key)"\}'
)


def users_bytes(server: Server) -> bytes:
    """Application bytes that reached *server* and are not one of the two fixed requests."""
    return b"".join(_FIXED.sub(b"", bytes(c.app_bytes)) for c in server.connections)


def stops(
    attack: Attack,
    code: str,
    *layers: tuple[Defence, str],
    monkeypatch: pytest.MonkeyPatch,
    send: Send = talk,
) -> None:
    """*attack* is refused with *code*, no byte of a user's request crosses, and it works without the defences."""
    assert layers and layers[-1][1] == THROUGH, "an attack that never works tests nothing"
    _refused(attack, code, send)
    for defence, then in layers:
        defence(monkeypatch)
        if then == THROUGH:
            with attack() as (session, attacker):
                send(session, attacker)
                assert SECRET in attacker.received
        else:
            _refused(attack, then, send)


def _refused(attack: Attack, code: str, send: Send) -> None:
    with attack() as (session, attacker):
        refused(session, attacker, code, send)
        assert users_bytes(attacker) == b""
        assert set(attacker.requests) <= {FETCH, PROVE}


# Defences


def check(*ids: str) -> Defence:
    """The verifier's checks *ids* pass, whatever they find."""

    def take_out(monkeypatch: pytest.MonkeyPatch) -> None:
        add = Checks.add

        def blind(self: Checks, found: Check) -> bool:
            if found.id in ids and found.status is Status.FAIL:
                found = dataclasses.replace(found, status=Status.PASS, code="OK")
            return add(self, found)

        monkeypatch.setattr(Checks, "add", blind)

    return take_out


def replaced(owner: Any, name: str, value: Any) -> Defence:  # Any: whatever stands there
    """*value* stands in place of *owner*'s own."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


# Attackers


def dress(server: Server, story: Genuine, key: int) -> None:
    """Show *story*'s own quote, claims and GPU evidence, byte for byte, in a certificate of another key, and a bundle
    that names this certificate."""
    carried = Leaf.parse(story.evidence.leaf).extension
    leaf = build_leaf(leaf_key(key), story.claims, carried.quote, carried.gpu)
    assert Leaf.parse(leaf).extension == carried
    server.use(x509.load_der_x509_certificate(leaf), leaf_key(key))
    server.routes[FETCH] = answer(Bundle(dataclasses.replace(story.evidence, leaf=leaf), story.endorsements).encode())


def ask(server: Server, request: str, body: bytes = b"") -> bytes:
    """The whole answer of *server* to *request* ("METHOD /path") over a connection of one's own, unverified."""
    with socket.create_connection(server.address) as sock:
        tls = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), sock)
        tls.set_tlsext_host_name(NAME.encode())
        tls.set_connect_state()
        tls.do_handshake()
        tls.sendall(f"{request} HTTP/1.1\r\nhost: {NAME}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        data = b""
        while b"\r\n\r\n" not in data:
            data += tls.recv(65536)
        head, _, rest = data.partition(b"\r\n\r\n")
        length = next(int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:"))
        while len(rest) < length:
            rest += tls.recv(65536)
        with contextlib.suppress(SSL.Error):
            tls.shutdown()
        return head + b"\r\n\r\n" + rest


def forward(upstream: Server) -> Handler:
    """Ask the genuine enclave the same over a connection of one's own, and hand its answer on."""

    def handler(connection: Connection, body: bytes) -> bytes:
        return ask(upstream, connection.requests[-1], body)

    return handler


def impostor(upstream: Server) -> Server:
    """A relay that terminates TLS itself and forwards the two questions to the genuine enclave. Shows nothing yet."""
    relay = Server()
    relay.routes[FETCH] = relay.routes[PROVE] = forward(upstream)
    return relay
