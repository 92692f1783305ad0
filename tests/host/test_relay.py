"""What the relay carries, and what it refuses to carry, with a real relay process between two real ends."""

from __future__ import annotations

import datetime
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from tests.host.harness import (
    Backend,
    RelayProcess,
    dial,
    ended,
    receive,
    receive_digest,
    refused,
    send_digest,
    together,
    wait_until,
)
from tests.host.hellos import hello, records

LOOPBACK = "tcp:127.0.0.1:0"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


def exchange(client: socket.socket, backend: socket.socket, up: int, down: int, seed: int) -> None:
    """Random bytes both ways at once, every digest compared; both streams end with their half-close."""
    sent: dict[str, bytes] = {}
    got: dict[str, tuple[int, bytes]] = {}

    def send(name: str, sock: socket.socket, count: int, seed: int) -> None:
        sent[name] = send_digest(sock, count, seed)

    def take(name: str, sock: socket.socket) -> None:
        got[name] = receive_digest(sock)

    with together(
        lambda: send("up", client, up, seed),
        lambda: send("down", backend, down, seed + 1),
        lambda: take("up", backend),
        lambda: take("down", client),
    ):
        pass
    assert got == {"up": (up, sent["up"]), "down": (down, sent["down"])}


@pytest.mark.parametrize(
    ("listen", "behind"),
    [
        pytest.param("tcp:127.0.0.1:0", "tcp:127.0.0.1:0", id="tcp-tcp"),
        pytest.param("tcp:127.0.0.1:0", "unix:{}/b.sock", id="tcp-unix"),
        pytest.param("unix:{}/l.sock", "tcp:127.0.0.1:0", id="unix-tcp"),
        pytest.param("unix:{}/l.sock", "unix:{}/b.sock", id="unix-unix"),
        pytest.param("tcp:[::1]:0", "tcp:[::1]:0", id="tcp6-tcp6", marks=ipv6),
    ],
)
def test_bytes_are_the_same_both_ways_at_once_on_every_kind_of_leg(tmp_path: Path, listen: str, behind: str) -> None:
    with (
        Backend(behind.format(tmp_path)) as backend,
        RelayProcess(tmp_path, "--default", backend.address, listen=listen.format(tmp_path)) as relay,
    ):
        with relay.open() as client, backend.accept() as server:
            exchange(client, server, 5_000_000, 7_000_000, seed=1)
        relay.wait_for_reasons("closed")
        assert f"up={5_000_000 + len(hello())} down=7000000 " in relay.log


def test_bytes_are_the_same_on_many_connections_at_once(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        pairs = [(relay.open(), backend.accept()) for _ in range(8)]
        jobs = [partial(exchange, *pair, 900_000, 1_100_000, 10 * number) for number, pair in enumerate(pairs)]
        with together(*jobs):
            pass
        for client, server in pairs:
            client.close()
            server.close()
        relay.wait_for_reasons(*["closed"] * 8)


def test_real_tls_handshake_crosses_the_relay_and_ends_at_the_backend(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "demo.vouchsafe.test")])
    now = datetime.datetime.now(datetime.UTC)
    leaf = (
        x509.CertificateBuilder(name, name, key.public_key(), serial_number=1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_privatekey(key)
    context.use_certificate(leaf)
    seen: list[bytes] = []

    with Backend(LOOPBACK) as backend:
        route = f"demo.vouchsafe.test={backend.address}"

        def serve() -> None:
            raw, _ = backend.sock.accept()
            raw.setblocking(True)
            server = SSL.Connection(context, raw)
            server.set_accept_state()
            seen.append(server.recv(100))
            server.sendall(b"answer")
            server.shutdown()

        with RelayProcess(tmp_path, "--route", route) as relay, together(serve):
            raw = relay.connect()
            raw.setblocking(True)
            client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), raw)
            client.set_tlsext_host_name(b"demo.vouchsafe.test")
            client.set_connect_state()
            client.do_handshake()
            assert client.get_peer_certificate(as_cryptography=True) == leaf
            client.sendall(b"question")
            assert client.recv(100) == b"answer"
            client.close()
    assert seen == [b"question"]


def test_each_name_reaches_its_own_backend(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as one, Backend(LOOPBACK) as two, Backend(LOOPBACK) as rest:
        options = ["--route", f"a.test={one.address}", "--route", f"*.b.test={two.address}", "--default", rest.address]
        with RelayProcess(tmp_path, *options) as relay:
            for name, backend in [("a.test", one), ("X.b.test", two), ("c.test", rest), (None, rest)]:
                with relay.open(name) as client, backend.accept(hello(name)) as server:
                    server.sendall(b"here")
                    assert receive(client, 4) == b"here"


@pytest.mark.parametrize("name", ["other.test", None])
def test_unknown_or_missing_name_is_refused_when_there_is_no_default(tmp_path: Path, name: str | None) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--route", f"a.test={backend.address}") as relay:
        with relay.open(name) as client:
            assert receive(client, 100) == bytes.fromhex("15030300020270")  # alert: unrecognized_name
        relay.wait_for_reasons("no-route")
        backend.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            backend.sock.accept()


def test_real_client_reads_the_refusal_of_its_name(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--route", f"a.test={backend.address}") as relay:
        raw = relay.connect()
        raw.setblocking(True)
        client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), raw)
        client.set_tlsext_host_name(b"b.test")
        client.set_connect_state()
        with pytest.raises(SSL.Error, match="unrecognized name"):
            client.do_handshake()
        raw.close()


def test_hello_in_one_byte_segments_and_records_is_replayed_unchanged(tmp_path: Path) -> None:
    slow = records(hello()[5:], size=40) + b"\x14\x03\x03\0\x01\x01"
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.connect() as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(slow)):
            client.sendall(slow[at : at + 1])
        with backend.accept(slow):
            pass


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 30_000, b"\x16\x03\x01\0\x05hello"])
def test_garbage_is_closed_with_one_line_and_nothing_left_behind(tmp_path: Path, garbage: bytes) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        before = relay.descriptors()
        with relay.connect() as client:
            client.sendall(garbage)
            assert ended(client) in ("eof", "reset")
        relay.wait_for_reasons("not-tls")
        wait_until(lambda: relay.descriptors() == before)


def test_half_a_hello_is_closed_at_the_deadline_even_when_it_drips(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--hello-timeout", "0.4") as relay,
    ):
        before, started = relay.descriptors(), time.monotonic()
        with relay.connect() as silent, relay.connect() as dripping:
            for at in range(len(hello()) // 2):
                try:
                    dripping.sendall(hello()[at : at + 1])
                except OSError:
                    break
                time.sleep(0.02)
            assert ended(silent) == "reset"
            assert ended(dripping) in ("eof", "reset")  # a failed send has taken the error already
        assert time.monotonic() - started < 3
        relay.wait_for_reasons("hello-timeout", "hello-timeout")
        wait_until(lambda: relay.descriptors() == before)


def test_first_client_after_a_long_silence_has_the_whole_hello_time(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--hello-timeout", "0.4") as relay,
    ):
        for _ in range(2):
            time.sleep(1)  # nobody is connected: the relay sleeps without a deadline, longer than a hello may take
            with relay.connect() as client:
                time.sleep(0.05)  # a network's round trip between accept and hello
                client.sendall(hello("demo.vouchsafe.test"))
                backend.accept().close()
                assert ended(client) in ("eof", "reset")
        assert "hello-timeout" not in relay.reasons


def test_waiting_for_half_a_hello_costs_no_processor_time(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.connect() as client,
    ):
        client.sendall(hello()[:20])
        before = relay.cpu_seconds()
        time.sleep(1)
        assert relay.cpu_seconds() - before < 0.2


def test_client_that_leaves_before_its_hello_is_counted_and_forgotten(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        relay.connect().close()
        relay.wait_for_reasons("hello-eof")


def test_half_close_is_passed_on_and_the_other_way_stays_open(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        with relay.open() as client, backend.accept() as server:
            client.sendall(b"last word")
            client.shutdown(socket.SHUT_WR)
            assert receive(server, 100) == b"last word"
            for _ in range(3):
                server.sendall(b"still here")
                assert receive(client, 10) == b"still here"
                time.sleep(0.05)
            server.close()
            assert ended(client) == "eof"
        relay.wait_for_reasons("closed")


def test_backend_that_does_not_read_stops_the_client_and_not_the_relays_memory(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.open() as client,
        backend.accept() as server,
    ):
        client.settimeout(1)
        sent, before = 0, resident(relay.pid)
        with pytest.raises(TimeoutError):
            while sent < 100_000_000:
                sent += client.send(bytes(1_000_000))
        cpu = relay.cpu_seconds()
        time.sleep(0.5)
        assert relay.cpu_seconds() - cpu < 0.1  # stalled, and not spinning
        assert resident(relay.pid) - before < 2_000_000
        client.shutdown(socket.SHUT_WR)
        assert receive_digest(server)[0] == sent


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_source_over_its_cap_is_refused_and_let_in_again_when_one_leaves(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--max-per-source", "2") as relay,
    ):
        first, second = relay.open(), relay.open()
        ends = [backend.accept(), backend.accept()]
        assert refused(relay.address)
        relay.wait_for_reasons("over-source-limit")
        for sock in (first, *ends):
            sock.close()
        wait_until(lambda: "closed" in relay.reasons or "backend-reset" in relay.reasons)
        with relay.open(), backend.accept():
            pass
        second.close()


def test_connections_over_the_total_are_refused(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--max-connections", "1") as relay,
        relay.open(),
        backend.accept(),
    ):
        assert refused(relay.address)
        relay.wait_for_reasons("over-capacity")


def test_no_descriptor_is_left_after_200_connections(tmp_path: Path) -> None:
    with Backend(f"unix:{tmp_path}/b.sock") as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        with relay.open() as client, backend.accept() as server:  # warms the pipe pool: one pipe stays for the next
            server.sendall(b"x")
            receive(client, 1)
        wait_until(lambda: len(relay.reasons) == 1)
        before = relay.descriptors()
        for number in range(200):
            client, server = relay.open(), backend.accept()
            server.sendall(b"x" * 1000)
            receive(client, 1000)
            client, server = (client, server) if number % 2 else (server, client)
            client.close()
            server.close()
        wait_until(lambda: len(relay.reasons) == 201)
        assert relay.descriptors() == before


def test_log_holds_no_address_no_name_of_the_client_and_no_content(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend:
        options = ["--route", f"*.b.test={backend.address}"]
        with RelayProcess(tmp_path, *options) as relay:
            with relay.open("canary-name.b.test") as client, backend.accept(hello("canary-name.b.test")) as server:
                own = client.getsockname()
                client.sendall(b"canary-content")
                assert receive(server, 14) == b"canary-content"
            with relay.open("canary-other.test") as unknown:
                receive(unknown, 100)
            wait_until(lambda: len(relay.reasons) == 2)
            assert relay.stop() == 0
            assert "name=*.b.test " in relay.log
            assert "canary" not in relay.log
            assert "127.0.0.1" not in relay.log
            assert f":{own[1]}" not in relay.log


def test_quiet_relay_writes_nothing(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address, "--quiet") as relay:
        with relay.connect() as client:
            client.sendall(b"GET /")
            ended(client)
        assert relay.stop() == 0
        assert relay.log == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_lets_a_stream_end_accepts_nobody_new_and_exits_zero(tmp_path: Path, number: int) -> None:
    listen = f"unix:{tmp_path}/l.sock"
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address, listen=listen) as relay:
        with relay.open() as client, backend.accept() as server:
            relay.signal(number)
            wait_until(lambda: not Path(f"{tmp_path}/l.sock").exists())
            with pytest.raises(OSError):
                dial(listen)
            exchange(client, server, 3_000_000, 3_000_000, seed=5)
        assert relay.process.wait(10) == 0
        assert relay.reasons == ["closed"]


def test_stream_that_outlives_the_drain_deadline_is_reset(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--drain-timeout", "0.3") as relay,
    ):
        with relay.open() as client, backend.accept() as server:
            relay.signal()
            assert relay.process.wait(10) == 0
            assert ended(client) == ended(server) == "reset"
        assert relay.reasons == ["drain-timeout"]


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.open(),
        backend.accept(),
    ):
        relay.signal()
        wait_until(lambda: "stopping" in relay.log)
        relay.signal()
        assert relay.process.wait(10) == 0
