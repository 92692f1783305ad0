"""What happens when an end dies, hangs or lies: an error at the other end, never a hang, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.host.harness import Backend, RelayProcess, ended, receive, receive_digest, together, wait_until
from tests.host.hellos import hello

LOOPBACK = "tcp:127.0.0.1:0"


def kill_hard(sock: socket.socket) -> None:
    """Close with a TCP reset, as a crashed peer's kernel does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_backend_that_refuses_ends_the_client_at_once(tmp_path: Path, kind: str) -> None:
    behind = f"tcp:127.0.0.1:{free_port()}" if kind == "tcp" else f"unix:{tmp_path}/nobody.sock"
    with RelayProcess(tmp_path, "--default", behind) as relay:
        before = relay.descriptors()
        with relay.open() as client:
            assert ended(client) in ("eof", "reset")
        relay.wait_for_reasons("dial-refused")
        wait_until(lambda: relay.descriptors() == before)


def test_backend_that_never_answers_the_dial_costs_the_dial_deadline(tmp_path: Path) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        crowd = []
        for _ in range(3):  # a full accept queue drops further SYNs: the dial hangs
            extra = socket.socket()
            extra.setblocking(False)
            extra.connect_ex(full.getsockname())
            crowd.append(extra)
        time.sleep(0.1)
        behind = f"tcp:127.0.0.1:{full.getsockname()[1]}"
        with RelayProcess(tmp_path, "--default", behind, "--dial-timeout", "0.3") as relay:
            with relay.open() as client:
                assert ended(client) == "reset"
            relay.wait_for_reasons("dial-timeout")
        for extra in crowd:
            extra.close()


def test_unix_backend_with_a_full_queue_is_dialled_again_until_there_is_room(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as backend:
        backend.bind(f"{tmp_path}/b.sock")
        backend.listen(0)
        backend.settimeout(10)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(f"{tmp_path}/b.sock")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)
                assert probe.connect_ex(f"{tmp_path}/b.sock") == errno.EAGAIN  # the queue is full
            with RelayProcess(tmp_path, "--default", f"unix:{tmp_path}/b.sock") as relay, relay.open():
                time.sleep(0.3)
                assert relay.reasons == []
                assert relay.cpu_seconds() < 2
                backend.accept()[0].close()
                server, _ = backend.accept()
                assert receive(server, len(hello())) == hello()
                server.close()


def test_unix_backend_whose_queue_stays_full_costs_the_dial_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as backend, socket.socket(socket.AF_UNIX) as first:
        backend.bind(f"{tmp_path}/b.sock")
        backend.listen(0)
        first.connect(f"{tmp_path}/b.sock")
        options = ["--default", f"unix:{tmp_path}/b.sock", "--dial-timeout", "0.3"]
        with RelayProcess(tmp_path, *options) as relay, relay.open() as client:
            assert ended(client) == "reset"
            relay.wait_for_reasons("dial-timeout")


def test_backend_killed_mid_stream_is_an_error_at_the_client(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        before = relay.descriptors()
        with relay.open() as client, backend.accept() as server:
            server.sendall(b"half an ans")
            assert receive(client, 11) == b"half an ans"
            kill_hard(server)
            assert ended(client) == "reset"
        relay.wait_for_reasons("backend-reset")
        wait_until(lambda: relay.descriptors() <= before + 4)  # at most two pipes wait in the pool


def test_client_killed_mid_stream_is_an_error_at_the_backend(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        client, server = relay.open(), backend.accept()
        client.sendall(b"half a quest")
        assert receive(server, 12) == b"half a quest"
        kill_hard(client)
        assert ended(server) == "reset"
        server.close()
        relay.wait_for_reasons("client-reset")


def test_client_killed_while_the_backend_floods_it_frees_everything(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        before = relay.descriptors()
        client, server = relay.open(), backend.accept()
        server.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                server.send(bytes(1_000_000))
        kill_hard(client)
        relay.wait_for_reasons("client-reset")
        server.close()
        wait_until(lambda: relay.descriptors() <= before + 4)


def test_unix_backend_that_closes_with_unread_input_still_delivers_its_answer(tmp_path: Path) -> None:
    """An early refusal (413, 401) while the client is still uploading must reach it, whatever error follows."""
    with Backend(f"unix:{tmp_path}/b.sock") as backend, RelayProcess(tmp_path, "--default", backend.address) as relay:
        for _ in range(20):
            with relay.open() as client, backend.accept() as server:
                client.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    for _ in range(50):
                        client.send(bytes(1_000_000))
                client.settimeout(10)
                server.sendall(b"refused" * 1000)
                server.close()
                assert receive(client, 7000) == b"refused" * 1000
                assert ended(client) in ("eof", "reset")
        wait_until(lambda: len(relay.reasons) == 20)


def test_answer_still_on_its_way_to_a_slow_client_is_delivered_before_the_error(tmp_path: Path) -> None:
    answer = os.urandom(60_000)
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that most of it waits in the relay's kernel
        client.settimeout(10)
        client.connect(("127.0.0.1", int(relay.address.rpartition(":")[2])))
        client.sendall(hello())
        server = backend.accept()
        server.sendall(answer)
        time.sleep(0.3)
        kill_hard(server)
        relay.wait_for_reasons("backend-reset")
        assert receive(client, len(answer)) == answer
        assert ended(client) in ("eof", "reset")


def test_client_that_talks_on_while_the_dial_hangs_costs_no_processor_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as backend, socket.socket(socket.AF_UNIX) as first:
        backend.bind(f"{tmp_path}/b.sock")
        backend.listen(0)
        first.connect(f"{tmp_path}/b.sock")
        with RelayProcess(tmp_path, "--default", f"unix:{tmp_path}/b.sock") as relay, relay.open() as client:
            time.sleep(0.2)
            client.sendall(bytes(50_000))
            before = relay.cpu_seconds()
            time.sleep(1)
            assert relay.cpu_seconds() - before < 0.3


def test_silent_stream_ends_at_the_idle_deadline_and_a_talking_one_does_not(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--idle-timeout", "0.5") as relay,
        relay.open() as talker,
        backend.accept() as far,
        relay.open() as silent,
        backend.accept() as mute,
    ):
        for _ in range(12):
            far.sendall(b".")
            assert receive(talker, 1) == b"."
            time.sleep(0.1)
        assert ended(silent) == ended(mute) == "reset"
        assert relay.reasons == ["idle-timeout"]


def test_half_closed_stream_that_stays_silent_ends_at_its_own_deadline(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address, "--half-close-timeout", "0.3") as relay,
    ):
        with relay.open() as client, backend.accept() as server:
            client.shutdown(socket.SHUT_WR)
            assert ended(server) == "eof"
            assert ended(client) == "reset"
        relay.wait_for_reasons("half-close-timeout")


def test_storm_of_resets_hurts_no_other_stream(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.open() as survivor,
        backend.accept() as far,
    ):
        for number in range(150):
            storm = relay.connect()
            storm.sendall(hello()[: number * 2])
            kill_hard(storm)
        far.sendall(b"alive")
        assert receive(survivor, 5) == b"alive"
        wait_until(lambda: len(relay.reasons) == 150)


def test_at_the_descriptor_limit_accepting_pauses_streams_live_and_waiting_clients_get_in_later(tmp_path: Path) -> None:
    with (
        Backend(LOOPBACK) as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.open() as survivor,
        backend.accept() as far,
    ):
        limit = relay.descriptors() + 2
        _, hard = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (limit, hard))
        crowd = [relay.connect() for _ in range(6)]
        time.sleep(0.3)
        before = relay.cpu_seconds()
        far.sendall(bytes(500_000))
        assert len(receive(survivor, 500_000)) == 500_000
        time.sleep(0.7)
        assert relay.cpu_seconds() - before < 0.3  # pausing, and not spinning on a failing accept
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (hard, hard))
        for sock in crowd:
            sock.sendall(hello())
            backend.accept().close()
            sock.close()


def test_log_that_nobody_reads_stops_no_stream(tmp_path: Path) -> None:
    with Backend(LOOPBACK) as backend:
        command = [sys.executable, "-m", "host.cli", "relay", "--listen", LOOPBACK, "--default", backend.address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(b":")[2])
            for _ in range(1500):  # more lines than a pipe of 64 KiB holds
                with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                    client.sendall(b"x")
                    assert ended(client) in ("eof", "reset")
        finally:
            process.kill()
            process.communicate()


def test_large_stream_survives_a_slow_reader(tmp_path: Path) -> None:
    with (
        Backend(f"unix:{tmp_path}/b.sock") as backend,
        RelayProcess(tmp_path, "--default", backend.address) as relay,
        relay.open() as client,
        backend.accept() as server,
    ):
        payload = os.urandom(2_000_000)
        got = bytearray()

        def send() -> None:
            server.sendall(payload)
            server.shutdown(socket.SHUT_WR)

        with together(send):
            while piece := client.recv(20_000):
                got += piece
                time.sleep(0.001)
        assert bytes(got) == payload
        client.shutdown(socket.SHUT_WR)
        assert receive_digest(server)[0] == 0
