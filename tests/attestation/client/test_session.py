"""Real evidence over real TLS: what is accepted, what is refused, and how many bytes left before that.

Every refusal inside the handshake lets no application byte out; every refusal at all lets no byte of a user's request
out. `SECRET` stands for that request; the server counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import socket
import ssl
import threading
import time
from typing import Any

import pytest
from OpenSSL import SSL

from attestation.client.handshake import NotAttested
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from attestation.errors import PolicyError, TransportError
from attestation.policy import platform_policy
from tests.attestation.client.enclave import (
    FETCH,
    PROVE,
    proof_json,
    prove,
    served,
    session_for,
    show,
)
from tests.attestation.client.ratls_server import Server, answer, plain_certificate
from tests.attestation.client.talking import SECRET, Send, both_roads, refused, talk, talk_async
from tests.genuine import NAME, genuine


@both_roads
def test_genuine_enclave_is_accepted_and_the_verdict_says_on_what_it_rests(send: Send) -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story)
        assert b"404" in send(session, server)
        assert server.requests == [PROVE, "POST /v1/x"]
        result = session.last_result
        assert result is not None and result.accepted and result.development
        assert result.claims["channel"] == {"binding": "exporter", "group": "X25519MLKEM768", "merkle_path": 0}
        assert result.claims["names"] == [NAME]


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"names": ("other.test",)}, "LEAF_NAME"),
    "a quote bit": ({"report_data_edit": lambda d: bytes([d[0] ^ 1]) + d[1:]}, "TDX_REPORT_DATA"),
    "another key in the claims": ({"certificate_key": 1}, "CLAIMS_KEY"),
    "debug": ({"td": {"td_attributes": 0x10000001}}, "TDX_ATTRIBUTES"),
    "another operator": ({"statement_keys": (7,)}, "DEPLOYMENT_OPERATOR"),
    "another role": ({"claims_edit": lambda c: dataclasses.replace(c, role="gateway")}, "DEPLOYMENT_ROLE"),
    "another release signer": ({"manifest_keys": (7,)}, "RELEASE_SIGNERS"),
    "expired": ({"now": 1_795_000_000 + 3600}, "LEAF_EXPIRED"),
    "GPU not ready": ({"state": {"ready": False}}, "GPU_NOT_CONFIDENTIAL"),
}


@both_roads
@pytest.mark.parametrize(("lie", "code"), LIES.values(), ids=LIES.keys())
def test_refusal_of_the_evidence_lets_no_application_byte_out(lie: dict[str, Any], code: str, send: Send) -> None:
    story = genuine(**lie)
    with served(story) as server:
        session = session_for(server, story, name=NAME)
        with pytest.raises(NotAttested) as caught:
            send(session, server)
        error = caught.value
        assert error.result is not None and code in error.result.codes
        server.wait_idle()
        # A fetch connection may have gone before; it carries the fixed request alone.
        assert b"".join(bytes(c.app_bytes) for c in server.connections if c.requests != [FETCH]) == b""
        assert len([c for c in server.connections if c.requests != [FETCH]]) == 1
        assert session.last_result is error.result


@both_roads
def test_relay_that_swaps_the_certificate_is_refused_without_an_application_byte(send: Send) -> None:
    story = genuine()
    with Server(*plain_certificate(NAME)) as relay:
        refused(session_for(relay, story), relay, "FORMAT_LEAF", send)
        assert relay.received == b""


@both_roads
def test_relay_that_stole_certificate_and_key_cannot_bring_the_channel_proof(send: Send) -> None:
    """The enclave's own answer, to the relay's connection: another exporter than this client's."""
    story = genuine()
    with served(story) as relay:
        relay.routes[PROVE] = lambda c, body: prove(story, c, body, signed_exporter=b"\x07" * 32)
        error = refused(session_for(relay, story), relay, "CHANNEL_REPORT_DATA", send)
        assert relay.requests == [PROVE]
        assert error.result is not None and not error.result.accepted


def test_replayed_channel_proof_is_refused() -> None:
    story = genuine()
    with served(story) as server:
        kept: list[bytes] = []

        def replay(connection: Any, body: bytes) -> bytes:
            kept.append(prove(story, connection, body))
            return kept[0]

        server.routes[PROVE] = replay
        session = session_for(server, story)
        talk(session, server)
        refused(session, server, "CHANNEL_REPORT_DATA")


def test_proof_of_another_td_of_the_same_release_is_refused() -> None:
    story = genuine()
    with served(story) as server:
        server.routes[PROVE] = lambda c, body: prove(story, c, body, td={"mrtd": b"\x01" * 48})
        refused(session_for(server, story), server, "CHANNEL_TD")


def test_merkle_proof_is_accepted_and_one_of_another_place_is_not() -> None:
    story = genuine()
    with served(story) as server:
        server.routes[PROVE] = lambda c, body: prove(story, c, body, others=5, place=3)
        session = session_for(server, story)
        talk(session, server)
        assert session.last_result is not None and session.last_result.claims["channel"]["merkle_path"] >= 2
        stolen = story.channel(others=5, place=2)
        server.routes[PROVE] = answer(proof_json(stolen))
        refused(session, server, "CHANNEL_REPORT_DATA")


ANSWERS: dict[str, tuple[bytes, str]] = {
    "busy": (answer(b"{}", status="503 Busy", headers="retry-after: 3\r\n"), "TRANSPORT_BUSY"),
    "too many": (answer(b"{}", status="429 Slow down"), "TRANSPORT_BUSY"),
    "unknown": (answer(b"{}", status="404 Not Found"), "TRANSPORT_STATUS"),
    "no JSON": (answer(b"nonsense"), "FORMAT_CHANNEL"),
    "no HTTP": (b"220 ready\r\n\r\n", "FORMAT_ANSWER"),
    "too long": (answer(b"x" * 600_000), "FORMAT_ANSWER_SIZE"),
    "endless head": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, "FORMAT_ANSWER"),
    "a second answer behind": (answer(b"{}") * 2, "FORMAT_ANSWER"),
    "the end of the connection": (b"", "TRANSPORT_ENDED"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\n{}", "FORMAT_ANSWER"),
}


@both_roads
@pytest.mark.parametrize(("reply", "code"), ANSWERS.values(), ids=ANSWERS.keys())
def test_bad_answer_to_the_proof_is_refused(reply: bytes, code: str, send: Send) -> None:
    story = genuine()
    with served(story) as server:
        server.routes[PROVE] = reply
        try:
            refused(session_for(server, story), server, code, send)
        except ConnectionError:
            # asyncio tells the end of a connection inside a handshake itself
            assert code == "TRANSPORT_ENDED" and send is talk_async
            assert SECRET not in server.received


def test_tls_1_2_is_refused() -> None:
    story = genuine()
    with served(story) as server:
        server.max_version = SSL.TLS1_2_VERSION
        show(server, story)
        refused(session_for(server, story), server, "TLS_VERSION")
        assert server.received == b""


def test_a_chain_of_certificates_is_refused() -> None:
    story = genuine()
    other, _ = plain_certificate("ca.test")
    with served(story) as server:
        server.extra = (other,)
        show(server, story)
        refused(session_for(server, story), server, "TLS_CHAIN")
        assert server.received == b""


def test_no_session_is_resumed_even_with_a_server_that_hands_out_tickets() -> None:
    story = genuine()
    with served(story, tickets=True) as server:
        session = session_for(server, story)
        for _ in range(3):
            sock = socket.create_connection(server.address, 5)
            with session.context().wrap_socket(sock, server_hostname=NAME) as tls:
                tls.sendall(b"GET /x HTTP/1.1\r\n\r\n")
                tls.recv(100)  # tickets have arrived by now
                assert not tls.session_reused and tls.session is None
                assert tls.leaf == story.evidence.leaf
        with pytest.raises(ValueError, match="never resumes"):
            session.context().wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), session=object())


def test_silent_server_is_given_up_at_the_deadline() -> None:
    story = genuine()
    with socket.create_server(("127.0.0.1", 0)) as silent, served(story) as server:
        session = session_for(server, story, seconds=0.3)
        sock = socket.create_connection(silent.getsockname())
        begun = time.monotonic()
        with pytest.raises(NotAttested) as caught:
            session.context().wrap_socket(sock, server_hostname=NAME)
        assert caught.value.code == "TRANSPORT_DEADLINE" and time.monotonic() - begun < 3
        assert sock.fileno() < 0


def test_server_that_drips_its_answer_is_given_up_at_the_deadline() -> None:
    story = genuine()
    with served(story) as server:

        def drip(connection: Any, body: bytes) -> bytes:
            for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100:
                connection.tls.send(bytes([byte]))
                time.sleep(0.05)
            return b""

        server.routes[PROVE] = drip
        session = session_for(server, story, seconds=0.5)
        begun = time.monotonic()
        refused(session, server, "TRANSPORT_DEADLINE")
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("call", ["send", "sendall", "write", "recv", "sendfile"])
def test_nothing_is_written_or_read_before_the_connection_is_accepted(call: str) -> None:
    story = genuine()
    with served(story) as server:
        sock = socket.create_connection(server.address, 5)
        context = session_for(server, story).context()
        tls = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=NAME)
        argument: Any = {"recv": 10, "sendfile": io.BytesIO(SECRET)}.get(call, SECRET)
        with pytest.raises(ssl.SSLError, match="not accepted"):
            getattr(tls, call)(argument)
        tls.close()
        server.wait_idle()
        assert not any(c.handshake_done or c.app_bytes for c in server.connections)


def test_bio_object_writes_nothing_before_acceptance_and_stays_refused_after_a_refusal() -> None:
    story = genuine(names=("other.test",))
    with served(story) as server, socket.create_connection(server.address, 5) as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = session_for(server, story, name=NAME).context().wrap_bio(incoming, outgoing, server_hostname=NAME)
        with pytest.raises(ssl.SSLError, match="not accepted"):
            tls.write(SECRET)
        with pytest.raises(NotAttested):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
        for call in (tls.do_handshake, lambda: tls.write(SECRET), lambda: tls.read(10)):
            with pytest.raises(NotAttested):
                call()
        sock.sendall(outgoing.read() or b"")
    server.wait_idle()
    assert server.received == b""


def test_bio_handshake_ends_at_its_deadline() -> None:
    story = genuine()
    with served(story) as server:
        context = session_for(server, story, seconds=0.05).context()
        tls = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=NAME)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        time.sleep(0.06)
        with pytest.raises(NotAttested, match="TRANSPORT_DEADLINE"):
            tls.do_handshake()


# --- policies, targets ---


def test_client_refuses_to_connect_under_the_platform_policy() -> None:
    with pytest.raises(PolicyError, match="POLICY_PLATFORM"):
        AttestedSession(Target(NAME, 443), platform_policy())


def test_unreachable_service_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    story = genuine()
    session = AttestedSession(Target(NAME, 443, ("127.0.0.1", port)), story.policy)
    with pytest.raises(TransportError, match="TRANSPORT_CONNECT"):
        session.verify_once()


def test_verify_once_returns_refusals_and_acceptances() -> None:
    story = genuine()
    with served(story) as server:
        assert session_for(server, story, warm=False).verify_once().accepted
        server.routes[PROVE] = lambda c, body: prove(story, c, body, signed_nonce=bytes(32))
        result = session_for(server, story).verify_once()
        assert not result.accepted and "CHANNEL_REPORT_DATA" in result.codes


def test_policy_that_wants_fresh_gpu_evidence_gets_it_or_refuses() -> None:
    story = genuine(policy={"channel.fresh-gpu": True})
    with served(story) as server:
        talk(session_for(server, story), server)

        def without(connection: Any, body: bytes) -> bytes:
            return prove(story, connection, body.replace(b'"gpu":true', b'"gpu":false'))

        server.routes[PROVE] = without
        refused(session_for(server, story), server, "GPU_ABSENT")


def test_key_bound_proof_is_refused_when_the_exporter_is_asked_for() -> None:
    story = genuine()
    with served(story) as server:

        def key_bound(_connection: Any, body: bytes) -> bytes:
            import base64
            import json

            nonce = base64.urlsafe_b64decode(json.loads(body)["nonce"] + "=")
            return answer(proof_json(story.channel(nonce=nonce, binding_="key")))

        server.routes[PROVE] = key_bound
        refused(session_for(server, story), server, "FORMAT_CHANNEL")


def test_many_connections_at_once_share_one_session() -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story, warm=False)
        answers: list[bytes] = []
        threads = [threading.Thread(target=lambda: answers.append(talk(session, server))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 8
        assert server.requests.count(FETCH) == 1
