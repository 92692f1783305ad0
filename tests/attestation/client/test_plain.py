"""The verifying context on the standard library's own sockets: what it refuses is what the other one refuses, and what
it proves is bound to the key."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Any

import pytest
from OpenSSL import SSL

from attestation.client.handshake import NotAttested
from attestation.errors import TransportError
from tests.attestation.client.enclave import FETCH, PROVE, prove, served, session_for, show
from tests.attestation.client.plain_talking import Send, all_roads, key_bound, plain, weakened
from tests.attestation.client.ratls_server import answer, plain_certificate
from tests.attestation.client.talking import SECRET, refused, talk
from tests.genuine import NAME, genuine


@all_roads
def test_genuine_enclave_is_accepted_and_the_result_says_what_it_rests_on(send: Send) -> None:
    story = key_bound()
    with served(story) as server:
        client = plain(server, story)
        assert b"404" in send(client, server)
        assert server.requests == [PROVE, "POST /v1/x"]
        result = client.last_result
        assert result.accepted and result.claims["channel"]["binding"] == "key"
        assert result.claims["channel"]["group"] == ""  # the ssl module does not tell
        assert [s for s in result.not_proven if s.startswith("channel: bound to the key")]


@all_roads
def test_policy_that_wants_the_exporter_refuses_before_a_users_byte(send: Send) -> None:
    story = genuine()
    with served(story) as server:
        error = refused(plain(server, story), server, "CHANNEL_BINDING", send)
        assert server.requests == [PROVE]
        assert error.result is not None and error.result.codes == ("CHANNEL_BINDING",)


def test_what_key_bound_does_not_prove_is_true() -> None:
    """A relay that holds the certificate's key passes the enclave's answer on: key-bound takes it, the exporter not."""
    story = key_bound()
    with served(story) as relay:
        # the enclave's answer to the relay's connection, whose exporter is another
        relay.routes[PROVE] = lambda c, body: prove(story, c, body, signed_exporter=b"\x07" * 32)
        refused(session_for(relay, story), relay, "CHANNEL_REPORT_DATA")
        relay.routes[PROVE] = lambda c, body: prove(story, c, body)
        talk(plain(relay, story), relay)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"names": ("other.test",)}, "LEAF_NAME"),
    "debug": ({"td": {"td_attributes": 0x10000001}}, "TDX_ATTRIBUTES"),
    "another key in the claims": ({"certificate_key": 1}, "CLAIMS_KEY"),
    "another operator": ({"statement_keys": (7,)}, "DEPLOYMENT_OPERATOR"),
}


@all_roads
@pytest.mark.parametrize(("lie", "code"), LIES.values(), ids=LIES.keys())
def test_refusal_of_the_evidence_lets_no_application_byte_out(lie: dict[str, Any], code: str, send: Send) -> None:
    story = key_bound(**lie)
    with served(story) as server:
        with pytest.raises(NotAttested) as caught:
            send(plain(server, story, name=NAME), server)
        error = caught.value
        assert error.result is not None and code in error.result.codes
        server.wait_idle()
        assert b"".join(bytes(c.app_bytes) for c in server.connections if c.requests != [FETCH]) == b""


PROOFS: dict[str, tuple[dict[str, Any], str]] = {
    "another nonce": ({"signed_nonce": bytes(32)}, "CHANNEL_REPORT_DATA"),
    "another key": ({"k": bytes(48)}, "CHANNEL_REPORT_DATA"),
    "another TD": ({"td": {"mrtd": b"\x01" * 48}}, "CHANNEL_TD"),
    "another binding": ({"binding_": "exporter"}, "FORMAT_CHANNEL"),
}


@all_roads
@pytest.mark.parametrize(("lie", "code"), PROOFS.values(), ids=PROOFS.keys())
def test_refusal_of_the_proof_lets_no_byte_of_the_users_request_out(lie: dict[str, Any], code: str, send: Send) -> None:
    story = key_bound()
    with served(story) as server:
        server.routes[PROVE] = lambda c, body: prove(story, c, body, **lie)
        refused(plain(server, story), server, code, send)
        assert server.requests == [PROVE]


@all_roads
def test_replayed_proof_is_refused(send: Send) -> None:
    story = key_bound()
    kept: list[bytes] = []
    with served(story) as server:

        def replay(connection: Any, body: bytes) -> bytes:
            kept.append(prove(story, connection, body))
            return kept[0]

        server.routes[PROVE] = replay
        send(plain(server, story), server)
        refused(plain(server, story), server, "CHANNEL_REPORT_DATA", send)


@all_roads
def test_new_certificate_is_judged_and_its_documents_fetched_on_the_same_connection(send: Send) -> None:
    first, second = key_bound(), key_bound(key=1, issued_at=1_795_000_000 + 30)
    with served(first) as server:
        client = plain(server, first)
        send(client, server)
        show(server, second)
        assert b"404" in send(client, server)
        assert server.connections[-1].requests == [FETCH, PROVE, "POST /v1/x"]
        show(server, key_bound(key=2, issued_at=second.story.issued_at, td={"td_attributes": 0x10000001}))
        before = len(server.received)
        refused(client, server, "TDX_ATTRIBUTES", send)
        assert len(server.received) == before


# --- the handshake ---


@all_roads
def test_tls_1_2_is_refused(send: Send) -> None:
    story = key_bound()
    with served(story) as server:
        server.max_version = SSL.TLS1_2_VERSION
        show(server, story)
        refused(plain(server, story), server, "TLS_VERSION", send)
        assert server.received == b""


@all_roads
def test_tls_1_2_is_refused_by_what_was_negotiated_too(send: Send) -> None:
    """With the context's own floor taken away, as a library cannot: what the connection speaks is looked at."""
    story = key_bound()
    with served(story) as server:
        server.max_version = SSL.TLS1_2_VERSION
        show(server, story)
        client = plain(server, story)
        ssl.SSLContext.minimum_version.__set__(client.context(), ssl.TLSVersion.TLSv1_2)  # type: ignore[attr-defined]
        refused(client, server, "TLS_VERSION", send)
        assert server.received == b""
        assert any(c.handshake_done for c in server.connections)


@all_roads
def test_a_chain_of_certificates_is_refused(send: Send) -> None:
    story = key_bound()
    other, _ = plain_certificate("ca.test")
    with served(story) as server:
        server.extra = (other,)
        show(server, story)
        refused(plain(server, story), server, "TLS_CHAIN", send)
        assert server.received == b""


def test_session_is_neither_taken_nor_accepted() -> None:
    story = key_bound()
    with served(story, tickets=True) as server:
        context = plain(server, story).context()
        with context.wrap_socket(socket.create_connection(server.address, 5), server_hostname=NAME) as tls:
            tls.sendall(b"GET /x HTTP/1.1\r\n\r\n")
            tls.recv(100)  # tickets have arrived by now
            assert tls.session is None and not tls.session_reused
            ticket = tls._sslobj.session  # what the ssl module would have handed out
        with pytest.raises(ValueError, match="never resumes"):
            context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), session=ticket)
        with socket.create_connection(server.address, 5) as sock, pytest.raises(ValueError, match="never resumes"):
            context.wrap_socket(sock, session=ticket)
        sock = socket.create_connection(server.address, 5)
        with context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=NAME) as tls:
            with pytest.raises(ValueError, match="never resumes"):
                tls.session = ticket
            before = len(server.received)
            tls._sslobj.session = ticket  # past every gate: the handshake itself must say no
            with pytest.raises(NotAttested) as caught:
                tls.do_handshake()
            assert caught.value.code == "TLS_RESUMED"
        server.wait_idle(3)
        assert len(server.received) == before


def test_truncated_answer_is_an_error_and_not_an_end() -> None:
    """A relay can cut the stream; an option of the ssl module would call that the end."""
    story = key_bound()
    with served(story) as server:
        context = plain(server, story).context()
        weakened(context)
        with context.wrap_socket(socket.create_connection(server.address, 5), server_hostname=NAME) as tls:
            server.routes["GET /cut"] = b""  # ends the TCP connection without close_notify
            tls.sendall(b"GET /cut HTTP/1.1\r\n\r\n")
            with pytest.raises(ssl.SSLEOFError):
                tls.recv(100)


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "drips"])
def test_slow_server_is_given_up_at_the_deadline(drip: bool) -> None:
    story = key_bound()
    with socket.create_server(("127.0.0.1", 0)) as listener, served(story) as server:
        stop = threading.Event()

        def slow() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.sendall(b"\x16\x03\x03\x40\x00")  # a long handshake record begins
                while drip and not stop.wait(0.02):
                    peer.sendall(b"\0")
                stop.wait(10)

        thread = threading.Thread(target=slow)
        thread.start()
        context = plain(server, story, seconds=0.3).context()
        with pytest.raises(NotAttested) as caught:
            context.wrap_socket(socket.create_connection(listener.getsockname()), server_hostname=NAME)
        assert caught.value.code == "TRANSPORT_DEADLINE"
        stop.set()
        thread.join(10)


def test_bio_handshake_ends_at_its_deadline() -> None:
    story = key_bound()
    with served(story) as server:
        tls = plain(server, story, seconds=0.0).context().wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
        for _ in range(2):
            with pytest.raises(NotAttested, match="TRANSPORT_DEADLINE"):
                tls.do_handshake()


@all_roads
@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (answer(b"{}", status="429 Slow down"), "TRANSPORT_BUSY"),
        (answer(b"x" * 600_000), "FORMAT_ANSWER_SIZE"),
        (answer(b"{}") * 2, "FORMAT_ANSWER"),
        (b"", "TRANSPORT_ENDED"),
    ],
    ids=["busy", "too long", "a second answer", "the end"],
)
def test_bad_answer_to_the_proof_is_refused(reply: bytes, code: str, send: Send) -> None:
    story = key_bound()
    with served(story) as server:
        server.routes[PROVE] = reply
        try:
            refused(plain(server, story), server, code, send)
        except ConnectionError:
            # an event loop tells the end of a connection inside a handshake itself
            assert code == "TRANSPORT_ENDED" and send is not talk
            assert SECRET not in server.received


def test_close_notify_in_place_of_the_answer_is_the_end() -> None:
    story = key_bound()
    with served(story) as server:

        def close(connection: Any, _body: bytes) -> bytes:
            connection.tls.shutdown()
            return b""

        server.routes[PROVE] = close
        refused(plain(server, story), server, "TRANSPORT_ENDED")


def test_unreachable_evidence_is_told_by_the_handshake() -> None:
    story = key_bound()
    with served(story) as server:
        client = plain(server, story)
        client.session.prepare = lambda: (_ for _ in ()).throw(TransportError("TRANSPORT_CONNECT", "nobody there"))
        refused(client, server, "TRANSPORT_CONNECT")
        assert not any(c.handshake_done for c in server.connections)


def test_non_blocking_socket_reaches_acceptance_in_steps() -> None:
    story = key_bound()
    with served(story) as server:
        sock = socket.create_connection(server.address, 5)
        sock.setblocking(False)
        context = plain(server, story).context()
        with pytest.raises(ValueError, match="non-blocking"):
            context.wrap_socket(sock, server_hostname=NAME)
        with context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=NAME) as tls:
            steps = 0
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    steps += 1
                    with pytest.raises(ssl.SSLError, match="not accepted"):
                        tls.send(SECRET)
            assert steps >= 2 and tls.gettimeout() == 0.0 and tls.attestation.accepted
            assert tls.leaf == tls.getpeercert(True) == story.evidence.leaf
