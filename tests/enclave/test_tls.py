"""TLS as the enclave serves it: what a client may rely on, and what a stranger may cost."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL

from attestation.claims import PROFILE
from enclave.identity import Identity
from enclave.tls import TlsLimits
from tests.enclave.support import (
    Client,
    Served,
    client_context,
    make_identity,
    open_files,
    plain,
    serving,
    wait_until,
)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await plain(send, 200, b"hello from " + scope["scheme"].encode())


async def exporting(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the exporter of its own connection for a fixed nonce, and the group."""
    connection = scope["vouchsafe"]
    body = connection.exporter(b"n" * 32).hex() + " " + connection.group + " " + connection.identity.keyset_digest
    await plain(send, 200, body.encode())


async def echo_body(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await plain(send, 200, str(size).encode())


@pytest.fixture
def identity() -> Identity:
    return make_identity()


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest, tmp_path: Path, identity: Identity) -> Iterator[Served]:
    with serving(exporting, tmp_path, lambda: identity, uvloop=request.param) as running:
        yield running


def test_both_ends_export_the_same_bytes_and_only_for_their_connection(served: Served, identity: Identity) -> None:
    with Client(served.path) as one, Client(served.path) as two:
        first = one.get()[1].decode().split()
        assert first[0] == one.exporter(b"n" * 32).hex()
        assert first[0] != two.exporter(b"n" * 32).hex()
        assert first[0] != one.exporter(b"m" * 32).hex()
        assert one.leaf == identity.leaf


def test_post_quantum_group_is_negotiated_and_known_to_both_ends(served: Served) -> None:
    with Client(served.path) as client:
        assert client.get()[1].decode().split()[1] == "X25519MLKEM768" == client.tls.get_group_name()


def test_tls_1_2_is_refused(served: Served) -> None:
    context = client_context()
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with pytest.raises(SSL.Error, match="protocol version"):
        Client(served.path, context=context)


def test_no_session_resumes(served: Served) -> None:
    """A resumed session would show the certificate of an older connection. Tickets are sent, and open nothing."""
    stdlib = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stdlib.check_hostname, stdlib.verify_mode = False, ssl.CERT_NONE
    session: ssl.SSLSession | None = None
    for attempt in range(3):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(str(served.path))
        with stdlib.wrap_socket(raw, session=session) as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert tls.recv(1000)
            assert not tls.session_reused, attempt
            assert tls.getpeercert(True)
            session = tls.session


def test_alpn_is_http_1_1_or_nothing(served: Served) -> None:
    with Client(served.path, alpn=[b"h2", b"http/1.1"]) as both:
        assert both.tls.get_alpn_proto_negotiated() == b"http/1.1"
    with Client(served.path) as none:
        assert none.tls.get_alpn_proto_negotiated() == b""
    with pytest.raises(SSL.Error, match="no application protocol"):
        Client(served.path, alpn=[b"h2"])


def test_any_server_name_is_served_because_names_are_the_clients_to_compare(served: Served, identity: Identity) -> None:
    for name in ("other.test", None):
        with Client(served.path, name=name) as client:
            assert client.leaf == identity.leaf
    assert PROFILE.encode() in identity.claims_bytes


def test_new_identity_serves_new_connections_and_old_ones_keep_theirs(tmp_path: Path) -> None:
    old, new = make_identity(), make_identity()
    current = [old]
    with serving(exporting, tmp_path, lambda: current[0]) as running, Client(running.path) as first:
        first.get()
        current[0] = new
        with Client(running.path) as second:
            assert second.leaf == new.leaf
            assert second.get()[1].decode().split()[2] == new.keyset_digest
        assert first.get()[1].decode().split()[2] == old.keyset_digest


def test_a_replaced_key_is_freed_with_its_last_connection(tmp_path: Path) -> None:
    import gc
    import weakref

    current = [make_identity()]
    context = weakref.ref(current[0].context)
    with serving(exporting, tmp_path, lambda: current[0]) as running:
        with Client(running.path) as client:
            client.get()
            current[0] = make_identity()
            gc.collect()
            assert context() is not None
            client.get()
        wait_until(lambda: not running.endpoint.open)

        def gone() -> bool:
            gc.collect()
            return context() is None

        wait_until(gone)


def test_no_request_is_taken_after_the_leafs_end(tmp_path: Path) -> None:
    identity, now = make_identity(), [int(time.time())]
    with serving(hello, tmp_path, lambda: identity, now=lambda: now[0]) as running, Client(running.path) as client:
        assert client.get() == (200, b"hello from https")
        now[0] = identity.not_after
        status, body = client.get()
        assert status == 503 and b"certificate_expired" in body and b"connection: close" in client.header
        assert client.read_all() == (b"", "notify")


def test_running_answer_ends_with_the_drain_after_the_leafs_end(tmp_path: Path) -> None:
    identity, now = make_identity(), [int(time.time())]

    async def forever(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass

    limits = TlsLimits(watch_s=0.05)
    running = serving(forever, tmp_path, lambda: identity, now=lambda: now[0], limits=limits, leaf_drain_s=5)
    with running as served, Client(served.path) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        client.tls.recv(1000)
        now[0] = identity.not_after + 4
        time.sleep(0.2)
        assert served.endpoint.open
        now[0] = identity.not_after + 5
        assert client.read_all()[1] == "cut"


def test_a_stream_arrives_event_by_event_and_a_large_answer_whole(tmp_path: Path, identity: Identity) -> None:
    release = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: one\n\n", "more_body": True})
        while not release.is_set():
            import asyncio

            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"y" * 3_000_000})

    with serving(app, tmp_path, lambda: identity) as running, Client(running.path) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        first = b""
        while b"data: one" not in first:
            first += client.tls.recv(65536)
        release.set()
        rest, how = client.read_all()
        assert rest.count(b"y") == 3_000_000 and how == "notify"


def test_a_large_body_is_taken_with_backpressure(tmp_path: Path, identity: Identity) -> None:
    with serving(echo_body, tmp_path, lambda: identity) as running, Client(running.path) as client:
        assert client.get(method="POST", body=b"z" * 5_000_000) == (200, b"5000000")
        assert client.get(method="POST", body=b"z") == (200, b"1")


def test_pipelined_requests_are_answered_in_order(tmp_path: Path, identity: Identity) -> None:
    async def path(scope: Any, receive: Any, send: Any) -> None:
        await plain(send, 200, scope["path"].encode())

    with serving(path, tmp_path, lambda: identity) as running, Client(running.path) as client:
        client.send(b"".join(b"GET /n%02d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in range(20)))
        data = b""
        while b"/n19" not in data:
            data += client.tls.recv(65536)
        assert [data.index(b"/n%02d" % n) for n in range(20)] == sorted(data.index(b"/n%02d" % n) for n in range(20))


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(20), bytes(600)])
def test_garbage_instead_of_a_hello_ends_the_connection(served: Served, garbage: bytes) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as raw:
        raw.settimeout(5)
        raw.connect(str(served.path))
        raw.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            while raw.recv(4096):
                pass
    wait_until(lambda: not served.endpoint.handshaking)


def test_half_a_handshake_is_cut_after_its_deadline_and_leaves_nothing(tmp_path: Path, identity: Identity) -> None:
    limits = TlsLimits(handshake_s=0.2)
    with serving(hello, tmp_path, lambda: identity, limits=limits) as running:
        before = open_files()
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as raw:
            raw.connect(str(running.path))
            raw.settimeout(5)
            raw.sendall(b"\x16\x03\x01")
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(10) == b""
        wait_until(lambda: open_files() <= before)


def test_handshakes_in_progress_are_bounded(tmp_path: Path, identity: Identity) -> None:
    limits = TlsLimits(handshakes=3, handshake_s=30)
    with serving(hello, tmp_path, lambda: identity, limits=limits) as running:
        idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
        for raw in idle:
            raw.connect(str(running.path))
        wait_until(lambda: len(running.endpoint.handshaking) == 3)
        with pytest.raises((SSL.Error, OSError)):
            Client(running.path)
        for raw in idle:
            raw.close()
        wait_until(lambda: not running.endpoint.handshaking)
        with Client(running.path) as client:
            assert client.get()[0] == 200


def test_a_header_without_an_end_is_refused(tmp_path: Path, identity: Identity) -> None:
    with serving(hello, tmp_path, lambda: identity) as running, Client(running.path) as client:
        with contextlib.suppress(SSL.Error, OSError):
            # Just over the limit: what lies unread when the server closes would take the answer with it.
            client.send(b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * (TlsLimits().header_bytes // 6 + 1))
        assert b" 431 " in client.read_all()[0]


def test_a_trailer_without_an_end_is_refused(tmp_path: Path, identity: Identity) -> None:
    with serving(echo_body, tmp_path, lambda: identity) as running, Client(running.path) as client:
        client.send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        with contextlib.suppress(SSL.Error, OSError):
            client.send(b"a: b\r\n" * 40_000)
        client.read_all()
        wait_until(lambda: not running.endpoint.open)


def test_small_chunks_are_no_flood(tmp_path: Path, identity: Identity) -> None:
    with serving(echo_body, tmp_path, lambda: identity) as running, Client(running.path) as client:
        client.send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        client.send(b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n")
        assert client.answer() == (200, b"50000")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nab"])
def test_a_peer_that_stops_sending_is_cut(tmp_path: Path, identity: Identity, sent: bytes) -> None:
    limits = TlsLimits(header_s=0.2, body_s=0.2, watch_s=0.05)
    with serving(echo_body, tmp_path, lambda: identity, limits=limits) as running, Client(running.path) as client:
        if sent:
            client.send(sent)
        assert client.read_all()[1] == "cut"


def test_a_peer_that_stops_reading_is_cut(tmp_path: Path, identity: Identity) -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(5000):  # far more than the buffers of two sockets hold
            await send({"type": "http.response.body", "body": b"z" * 65536, "more_body": True})

    limits = TlsLimits(stalled_write_s=0.3, watch_s=0.05)
    with serving(endless, tmp_path, lambda: identity, limits=limits) as running, Client(running.path) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_until(lambda: bool(running.endpoint.open))
        wait_until(lambda: not running.endpoint.open)


def test_a_slow_answer_is_no_stall(tmp_path: Path, identity: Identity) -> None:
    import asyncio

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.6)
        await plain(send, 200, b"late")

    limits = TlsLimits(header_s=0.2, body_s=0.2, watch_s=0.05)
    with serving(slow, tmp_path, lambda: identity, limits=limits) as running, Client(running.path) as client:
        assert client.get() == (200, b"late")


@pytest.mark.parametrize("late", [False, True])
def test_what_an_application_raises_is_neither_answered_nor_logged(
    tmp_path: Path, identity: Identity, late: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        if late:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        raise RuntimeError("CANARY prompt")

    with serving(failing, tmp_path, lambda: identity) as running, Client(running.path) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        data, how = client.read_all()
        assert b"CANARY" not in data
        assert (how == "cut") is late  # a broken stream must not look complete
        assert late or b"500" in data
        assert running.endpoint.failures == [1]  # type: ignore[attr-defined]  # see support
    captured = capfd.readouterr()
    assert "CANARY" not in captured.out + captured.err and "Traceback" not in captured.err


def test_connection_ends_with_close_notify_both_ways(served: Served) -> None:
    with Client(served.path) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert client.read_all()[1] == "notify"
    with Client(served.path) as client:
        client.get()
        client.tls.shutdown()
        assert client.read_all()[1] == "notify"


def test_shutdown_ends_idle_and_half_open_connections_while_an_answer_drains(
    tmp_path: Path, identity: Identity
) -> None:
    import asyncio

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await asyncio.sleep(2.5)
        await plain(send, 200, b"whole")

    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with serving(slow, tmp_path, lambda: identity, drain_s=10) as running:
        raw.connect(str(running.path))
        raw.settimeout(1.5)
        with Client(running.path) as idle, Client(running.path) as busy:
            idle.get()
            busy.send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
            time.sleep(0.3)
            running.server.should_exit = True
            assert idle.read_all()[1] == "notify"
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(10) == b""
            assert busy.answer() == (200, b"whole")
    raw.close()


def test_drain_that_runs_out_cuts_the_stream(tmp_path: Path, identity: Identity) -> None:
    import asyncio

    async def forever(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(60)

    with serving(forever, tmp_path, lambda: identity, drain_s=1) as running:
        client = Client(running.path)
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        client.tls.recv(1000)
        running.server.should_exit = True
        assert client.read_all()[1] == "cut"
        client.sock.close()


def test_many_connections_leave_no_descriptor(served: Served) -> None:
    with Client(served.path) as client:
        client.get()
    wait_until(lambda: not served.endpoint.open)
    before = open_files()
    for _ in range(40):
        with Client(served.path) as client:
            client.get()
    wait_until(lambda: open_files() <= before)
