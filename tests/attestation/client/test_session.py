"""Real evidence over real TLS: what is accepted, what is refused, and how many bytes left before that.

Every refusal inside the handshake lets no application byte out; every refusal at all lets no byte of a user's request
out. `SECRET` stands for that request; the server counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL

from attestation.bundle import Bundle
from attestation.client.handshake import NotAttested
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from attestation.errors import FormatError, PolicyError, TransportError
from attestation.policy import platform_policy
from attestation.verifier import verify
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
from tests.devtee.tdx import CollateralSpec
from tests.genuine import NAME, genuine

SECRET = b"the user's own prompt"


def talk(session: AttestedSession, server: Server) -> bytes:
    """Dial, and send SECRET the moment the connection is accepted, as a library would."""
    sock = socket.create_connection(server.address, 5)
    with session.context().wrap_socket(sock, server_hostname=session.name) as tls:
        tls.sendall(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
        return tls.recv(65536)


def talk_async(session: AttestedSession, server: Server) -> bytes:
    async def main() -> bytes:
        reader, writer = await asyncio.open_connection(
            *server.address, ssl=session.context(), server_hostname=session.name
        )
        try:
            writer.write(b"POST /v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
            return await reader.read(65536)
        finally:
            writer.close()

    return asyncio.run(main())


both_roads = pytest.mark.parametrize("send", [talk, talk_async], ids=["socket", "bio"])
Send = Callable[[AttestedSession, Server], bytes]


def refused(session: AttestedSession, server: Server, code: str, send: Send = talk) -> NotAttested:
    """The connection is refused with *code*, and no byte of the user's request has left."""
    before = len(server.connections)
    with pytest.raises(NotAttested) as caught:
        send(session, server)
    assert caught.value.code == code, caught.value
    server.wait_idle(before + 1)
    assert not any(SECRET in c.app_bytes for c in server.connections[before:])
    return caught.value


@both_roads
def test_genuine_enclave_is_accepted_and_the_verdict_says_on_what_it_rests(send: Send) -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story)
        assert b"404" in send(session, server)
        assert server.requests == [PROVE, "POST /v1/x"]
        result = session.last_result
        assert result is not None and result.accepted and result.development
        assert result.claims["channel"] == {"binding": "exporter", "merkle_path": 0}
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


# --- the cache ---


def test_empty_cache_is_filled_by_one_unverified_fetch_that_sends_only_the_fixed_request() -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story, warm=False)
        talk(session, server)
        assert [c.requests for c in server.connections] == [[PROVE, "POST /v1/x"], [FETCH]]
        fetch = bytes(server.connections[1].app_bytes)
        assert fetch == b"GET /.well-known/vouchsafe/evidence HTTP/1.1\r\nHost: demo.vouchsafe.test\r\n" + (
            b"Accept-Encoding: identity\r\n\r\n"
        )


def test_known_certificate_costs_the_channel_proof_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from attestation.client import session as module

    story = genuine()
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return verify(*arguments, **named)

    monkeypatch.setattr(module, "verify", counted)
    with served(story) as server:
        session = session_for(server, story)
        for _ in range(3):
            talk(session, server)
        assert len(calls) == 1
        assert server.requests.count(PROVE) == 3 and FETCH not in server.requests


def test_verdict_is_not_reused_beyond_its_end() -> None:
    story = genuine()
    clock = [float(story.now)]
    with served(story) as server:
        session = session_for(server, story, clock=lambda: clock[0])
        talk(session, server)
        clock[0] = story.now + 7200
        refused(session, server, "LEAF_EXPIRED")


@both_roads
def test_new_certificate_is_judged_before_its_documents_are_asked_for_on_the_same_connection(send: Send) -> None:
    first, second = genuine(), genuine(key=1, issued_at=1_795_000_000 + 30)
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        show(server, second)
        assert b"404" in send(session, server)
        assert server.connections[-1].requests == [FETCH, PROVE, "POST /v1/x"]


def test_new_certificate_with_a_bad_quote_is_refused_without_a_byte() -> None:
    first = genuine()
    second = genuine(key=1, td={"td_attributes": 0x10000001})
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        before = len(server.received)
        show(server, second)
        refused(session, server, "TDX_ATTRIBUTES")
        assert len(server.received) == before


def test_evidence_of_another_certificate_is_refused() -> None:
    first, second = genuine(), genuine(key=1)
    with served(second) as server:
        server.routes[FETCH] = answer(first.bundle())
        refused(session_for(server, first), server, "EVIDENCE_LEAF")
        assert server.requests == [FETCH]


def test_documents_that_do_not_fit_the_certificate_are_refused_after_they_were_fetched() -> None:
    first, second = genuine(), genuine(key=1, event_log_edit=lambda log: log + b"\0")
    with served(first) as server:
        session = session_for(server, first)
        show(server, second)
        error = refused(session, server, "EVIDENCE_DIGEST")
        assert error.result is not None and server.requests == [FETCH]
        assert session.bundle(hashlib.sha256(second.evidence.leaf).digest()) is None


def test_revocation_list_older_than_one_seen_before_is_refused() -> None:
    first = genuine(collateral=CollateralSpec(crl_number=5))
    second = genuine(key=1, collateral=CollateralSpec(crl_number=4))
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        show(server, second)
        refused(session, server, "TDX_CRL_ROLLBACK")


def test_damaged_bundle_is_refused() -> None:
    story = genuine()
    raw = bytearray(story.bundle())
    raw[len(raw) // 2] ^= 1
    with served(story) as server:
        server.routes[FETCH] = answer(bytes(raw))
        session = session_for(server, story, warm=False)
        refused(session, server, "FORMAT_BUNDLE")
        with pytest.raises(FormatError):
            session.prepare()


def test_bundle_on_disk_serves_the_next_program_without_network(tmp_path: Path) -> None:
    story = genuine()
    with served(story) as server:
        talk(session_for(server, story, cache_dir=tmp_path), server)
        again = session_for(server, story, warm=False, cache_dir=tmp_path)
        before = server.requests.count(FETCH)
        talk(again, server)
        assert server.requests.count(FETCH) == before


def test_tampered_cache_on_disk_is_not_believed(tmp_path: Path) -> None:
    story = genuine()
    with served(story) as server:
        talk(session_for(server, story, cache_dir=tmp_path), server)
        path = next(tmp_path.iterdir())
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
        path.write_bytes(raw)
        again = session_for(server, story, warm=False, cache_dir=tmp_path)
        talk(again, server)
        assert FETCH in server.requests


def test_cache_stays_bounded() -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story)
        for n in range(50):
            evidence = dataclasses.replace(story.evidence, leaf=b"%d" % n)
            session.offer(Bundle(evidence, story.endorsements))
        assert len(session._bundles) <= 16


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
