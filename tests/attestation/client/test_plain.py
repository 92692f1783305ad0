"""The verifying context on the standard library's own sockets: what it refuses is what the other one refuses, what it
proves is bound to the key, and no setting of the `ssl` module makes it less."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop
from OpenSSL import SSL

from attestation.client.handshake import Appraisal, Handshake, NotAttested, find
from attestation.client.plain import PlainAttestedContext, PlainAttestedObject, PlainAttestedSocket
from attestation.client.session import AttestedSession
from attestation.client.wire import ProveChannel
from attestation.errors import RefusedError, TransportError
from tests.attestation.client.enclave import FETCH, PROVE, prove, served, session_for, show
from tests.attestation.client.ratls_server import Server, answer, plain_certificate
from tests.attestation.client.talking import SECRET, refused, talk, talk_async
from tests.attestation.client.test_libraries import LIBRARIES, NONCE
from tests.genuine import NAME, Genuine, genuine


@dataclass
class Plain:
    """*session* as `talk` takes it, with the plain context in place of the other."""

    session: AttestedSession
    made: PlainAttestedContext | None = None

    @property
    def name(self) -> str:
        return self.session.name

    @property
    def last_result(self) -> Any:
        return self.session.last_result

    def context(self) -> PlainAttestedContext:
        self.made = self.made or PlainAttestedContext(self.session, deadline=self.session._seconds)
        return self.made


def plain(server: Server, story: Genuine, **changes: Any) -> Any:  # Any: a Plain, where `talk` is typed for sessions
    return Plain(session_for(server, story, **changes))


def talk_uvloop(session: Any, server: Server) -> bytes:
    async def main() -> bytes:
        reader, writer = await asyncio.open_connection(*server.address, ssl=session.context(), server_hostname=NAME)
        try:
            writer.write(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
            return await reader.read(65536)
        finally:
            writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


Send = Callable[[Any, Server], bytes]
all_roads = pytest.mark.parametrize("send", [talk, talk_async, talk_uvloop], ids=["socket", "asyncio", "uvloop"])


def key_bound(**changes: Any) -> Genuine:
    """An honest enclave, and a client whose policy takes a key-bound proof."""
    return genuine(policy={"channel.proof": "key"}, **changes)


@all_roads
def test_genuine_enclave_is_accepted_and_the_result_says_what_it_rests_on(send: Send) -> None:
    story = key_bound()
    with served(story) as server:
        client = plain(server, story)
        assert b"404" in send(client, server)
        assert server.requests == [PROVE, "POST /v1/x"]
        result = client.last_result
        assert result.accepted and result.claims["channel"] == {"binding": "key", "merkle_path": 0}
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


# --- what a library may try ---


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


def weakened(context: Any) -> None:
    """What a library sets on a context that it takes for an ordinary one, and what a careless one would."""
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0) | ssl.OP_NO_TLSv1_3
    context.verify_flags = 0
    context.sslsocket_class, context.sslobject_class = ssl.SSLSocket, ssl.SSLObject
    context.set_alpn_protocols(["h2"])
    context.load_default_certs()


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
