"""What libraries may do to a plain, key-bound context and its sockets: nothing of it makes them less."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from attestation.client.handshake import Appraisal, Handshake, NotAttested, find
from attestation.client.plain import PlainAttestedContext, PlainAttestedObject, PlainAttestedSocket
from attestation.client.wire import ProveChannel
from attestation.errors import RefusedError
from tests.attestation.client.enclave import PROVE, served
from tests.attestation.client.plain_talking import Send, all_roads, key_bound, plain, weakened
from tests.attestation.client.ratls_server import Server, answer
from tests.attestation.client.talking import SECRET, refused, talk
from tests.attestation.client.test_libraries import LIBRARIES, NONCE
from tests.genuine import NAME

WRITES = ["send", "sendall", "sendto", "write", "sendfile", "sendmsg"]
READS = ["recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "read", "unwrap"]


def call(tls: Any, name: str) -> Any:
    argument: Any = {
        "sendfile": (io.BytesIO(SECRET),), "sendto": (SECRET, ("127.0.0.1", 1)), "sendmsg": ([SECRET],), "unwrap": (),
        "recv_into": (bytearray(9),), "recvfrom_into": (bytearray(9),), "recvmsg_into": ([bytearray(9)],),
    }.get(name, (SECRET,) if name in WRITES else (9,))  # fmt: skip
    return getattr(tls, name)(*argument)


@pytest.mark.parametrize("name", [*WRITES, *READS])
def test_nothing_is_written_or_read_before_acceptance_nor_in_the_clear_after_tls_was_taken_off(name: str) -> None:
    story = key_bound()
    with served(story) as server:
        context = plain(server, story).context()
        sock = socket.create_connection(server.address, 5)
        with context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=NAME) as tls:
            assert isinstance(tls, PlainAttestedSocket) and isinstance(tls, ssl.SSLSocket)
            with pytest.raises(ssl.SSLError, match="not accepted"):
                call(tls, name)
        with context.wrap_socket(socket.create_connection(server.address, 5), server_hostname=NAME) as tls:
            tls.shutdown(socket.SHUT_RD)  # the ssl module drops TLS here, whichever direction is shut
            with pytest.raises(ssl.SSLError, match="not any more"):
                call(tls, name)
        server.wait_idle(2)
        assert SECRET not in server.received


def test_bio_object_writes_nothing_before_acceptance_and_stays_refused() -> None:
    story = key_bound(names=("other.test",))
    with served(story) as server, socket.create_connection(server.address, 5) as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = plain(server, story, name=NAME).context().wrap_bio(incoming, outgoing, server_hostname=NAME)
        assert isinstance(tls, PlainAttestedObject) and isinstance(tls, ssl.SSLObject)
        for name in ("write", "read", "unwrap"):
            with pytest.raises(ssl.SSLError, match="not accepted"):
                call(tls, name)
        with pytest.raises(NotAttested):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
        for name in ("write", "read", "unwrap"):
            with pytest.raises(NotAttested):
                call(tls, name)
        with pytest.raises(NotAttested):
            tls.do_handshake()
        sock.sendall(outgoing.read())
    server.wait_idle()
    assert server.received == b""


def test_unconnected_socket_is_not_taken() -> None:
    """The ssl module's class is a plain socket until it is connected."""
    story = key_bound()
    with served(story) as server, socket.socket() as sock, pytest.raises(OSError, match="not connected"):
        plain(server, story).context().wrap_socket(sock, server_hostname=NAME)


@all_roads
def test_settings_of_an_ssl_context_change_nothing(send: Send) -> None:
    honest, liar = key_bound(), key_bound(td={"td_attributes": 0x10000001})
    with served(honest) as server:
        client = plain(server, honest)
        context = client.context()
        before = (context.options, context.minimum_version, context.maximum_version)
        weakened(context)
        assert (context.options, context.minimum_version, context.maximum_version) == before
        assert before[1:] == (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3)
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname is True
        assert b"404" in send(client, server)
    with served(liar) as server:
        client = plain(server, liar)
        weakened(client.context())
        refused(client, server, "TDX_ATTRIBUTES", send)
        assert server.received == b""


def test_nothing_but_http_1_1_is_offered() -> None:
    story = key_bound()
    with served(story) as server:
        context = plain(server, story).context()
        weakened(context)
        with context.wrap_socket(socket.create_connection(server.address, 5), server_hostname=NAME) as tls:
            assert tls.selected_alpn_protocol() == "http/1.1"


def test_setting_that_makes_openssl_ask_a_chain_does_not_stop_it() -> None:
    story = key_bound()
    with served(story) as server:
        client = plain(server, story)
        client.context().verify_mode = ssl.CERT_REQUIRED
        client.context().check_hostname = True
        assert b"404" in talk(client, server)


def test_connection_keeps_its_context() -> None:
    story = key_bound()
    with served(story) as server:
        sock = socket.create_connection(server.address, 5)
        context = plain(server, story).context()
        with context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=NAME) as tls:
            with pytest.raises(ValueError, match="keeps its context"):
                tls.context = ssl.create_default_context()
            with pytest.raises(ValueError, match="for clients"):
                context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


def test_another_name_is_refused_before_a_byte_is_sent() -> None:
    story = key_bound()
    with served(story) as server:
        sock = socket.create_connection(server.address, 5)
        with pytest.raises(NotAttested) as caught:
            plain(server, story).context().wrap_socket(sock, server_hostname="other.test")
        assert caught.value.code == "CLIENT_NAME"
        server.wait_idle()
        assert not any(c.sni for c in server.connections)


# --- libraries ---


class Verdict:
    """An appraiser for tests of the plumbing: refuses the leaf, refuses the proof, or accepts both."""

    name, host = "localhost", "localhost:1"

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def prepare(self) -> None:
        pass

    def appraise(self, handshake: Handshake) -> Appraisal:
        assert handshake.exporter is None
        if self.wrong == "fault":
            raise ZeroDivisionError(SECRET)
        if self.wrong == "leaf":
            raise RefusedError("TEST_LEAF", "this leaf is not accepted")
        proof = yield ProveChannel(NONCE, False, "key")
        if self.wrong == "proof" or proof.expect_ok("the proof") != b'{"proof":1}':
            raise RefusedError("TEST_PROOF", "this proof is not accepted")
        return None


@pytest.mark.parametrize("wrong", ["", "leaf", "proof", "fault"])
@pytest.mark.parametrize("send", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_every_library_works_over_it_and_sends_nothing_when_refused(
    send: Callable[..., bytes], wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Server() as server:
        server.routes[PROVE] = answer(b'{"proof":1}')
        server.routes["POST /v1/chat"] = lambda _c, body: answer(b'{"echo":"' + body + b'"}')
        context = PlainAttestedContext(Verdict(wrong))
        if not wrong:
            assert SECRET in send(context, server.port)
            assert server.connections[0].requests[0] == PROVE
            return
        with pytest.raises(Exception) as caught:
            send(context, server.port)
        refusal = find(caught.value)
        assert refusal is not None
        assert refusal.code == {"leaf": "TEST_LEAF", "proof": "TEST_PROOF", "fault": "CLIENT_INTERNAL"}[wrong]
        server.wait_idle()
        assert SECRET not in server.received and SECRET.decode() not in str(refusal)
        assert set(server.requests) <= {PROVE} and (wrong == "proof" or server.received == b"")
        assert "Fatal error" not in caplog.text
