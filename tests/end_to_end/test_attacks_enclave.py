"""Attacks on the enclave's side of the channel proof: floods, and clients that would have it sign what they choose.

The real server over real TLS: issuer, gateway, evidence routes, prover, with the development TEE's CPU behind them;
only the CPU's speed is the test's. The client that must not suffer is a real one, with the verifying context.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pytest
from OpenSSL import SSL

from attestation import binding
from attestation.bundle import Bundle
from attestation.channel import CHANNEL_PATH, channel_request
from attestation.client.handshake import NotAttested
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from attestation.policy import Policy
from attestation.tdx import rtmr3_items
from enclave.api import attestation as routes_module
from enclave.api.attestation import Attestation
from enclave.boot_steps import seal
from enclave.channel import BURST, PAUSE, Allowance, ChannelProver
from enclave.clock import Clock
from enclave.issuer import Issuer
from enclave.keys import KeyRing
from enclave.producer import Producer
from tests.enclave.api.serving import gateway_of, locked_custody
from tests.enclave.machine import Surroundings, surroundings
from tests.enclave.support import NAME, Client, Served, serving, wait_until

QUEUE: Final = 8
CROWD: Final = 40


@dataclass
class Enclave:
    """A running enclave's face, and the CPU behind it."""

    around: Surroundings
    issuer: Issuer
    prover: ChannelProver
    served: Served
    open: threading.Event
    entered: threading.Semaphore

    @property
    def quotes(self) -> list[bytes]:
        """What the CPU was asked to sign since this enclave began to listen."""
        return self.around.tdx.asked

    def client(self) -> AttestedSession:
        session = AttestedSession(Target(NAME, 443), Policy.parse(self.around.made.policy.read_text()), seconds=60.0)
        session.offer(Bundle.decode(self.issuer.current.bundle()))
        return session

    def talk(self, session: AttestedSession) -> bytes:
        """A user's request over an attested connection."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.served.path))
        with session.context().wrap_socket(sock, server_hostname=NAME) as tls:
            tls.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            return tls.recv(65536)

    def ask(self, client: Client, body: bytes | None = None) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer to a channel request on *client*'s connection."""
        body = channel_request(os.urandom(32), gpu=False, binding="exporter") if body is None else body
        status, _ = client.get(CHANNEL_PATH, method="POST", body=body)
        lines = client.header.decode("latin-1").split("\r\n")[1:]
        return status, {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    with surroundings(tmp_path_factory.mktemp("a")) as made:
        settings = made.settings
        items = rtmr3_items(made.made.release, settings.digest, [(m.id, m.weights) for m in settings.models])
        made.event_log = seal(made.tdx, items)  # type: ignore[attr-defined]  # one seal per machine, as at boot
        yield made


@pytest.fixture
def enclave(machine: Surroundings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enclave]:
    """Listening, with a queue of `QUEUE`. The CPU signs while `open` is set, and says each time that it was asked."""
    issuer = Issuer(
        machine.settings, machine.policy, KeyRing(), Producer(machine.tdx, None), Clock(), say=lambda line: None
    )
    issuer.event_log, issuer.release_digest = machine.event_log, machine.made.release  # type: ignore[attr-defined]
    issuer.publish(asyncio.run(issuer.issue()))
    gate, entered, quote = threading.Event(), threading.Semaphore(0), machine.tdx.quote

    def slow(report_data: bytes) -> bytes:
        entered.release()
        assert gate.wait(60)
        return quote(report_data)

    gate.set()
    machine.tdx.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.tdx, "quote", slow)
        prover = ChannelProver(Producer(machine.tdx, None), queue=QUEUE)
        routes = Attestation(issuer.bundle, Producer(machine.tdx, None), prover).routes
        gateway = gateway_of(locked_custody(), public=routes)
        folder = tmp_path_factory.mktemp("s")
        with serving(gateway, folder, lambda: issuer.current) as served:
            try:
                yield Enclave(machine, issuer, prover, served, gate, entered)
            finally:
                gate.set()


# --- floods ---


def asked_without_end(enclave: Enclave, times: int) -> list[tuple[int, dict[str, str]]]:
    with Client(enclave.served.path) as greedy:
        return [enclave.ask(greedy) for _ in range(times)]


def test_connection_that_asks_for_proofs_without_end(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = asked_without_end(enclave, 20)
    assert [status for status, _ in answers] == [200] * BURST + [429] * (20 - BURST)
    assert all(1 <= int(headers["retry-after"]) <= 60 for status, headers in answers if status == 429)
    assert len(enclave.quotes) == BURST
    assert b" 503 " in enclave.talk(enclave.client())  # another connection has its own allowance
    # Without the allowance every request is answered, and costs a quote.
    monkeypatch.setattr(Allowance, "take", lambda self, connection: None)
    before = len(enclave.quotes)
    assert {status for status, _ in asked_without_end(enclave, 20)} == {200}
    assert len(enclave.quotes) == before + 20


@contextlib.contextmanager
def crowding(enclave: Enclave) -> Iterator[tuple[list[tuple[int, dict[str, str]]], Callable[[], None]]]:
    """`CROWD` connections that ask while the CPU is busy with the first: their answers as they come; wait for all."""
    clients = [Client(enclave.served.path) for _ in range(CROWD)]
    answers: list[tuple[int, dict[str, str]]] = []
    enclave.open.clear()
    with ThreadPoolExecutor(CROWD) as pool:
        try:
            ask: Callable[[Client], None] = lambda client: answers.append(enclave.ask(client))  # noqa: E731
            pending = [pool.submit(ask, clients[0])]
            assert enclave.entered.acquire(timeout=30)  # the first is with the CPU
            pending += [pool.submit(ask, client) for client in clients[1:]]
            yield answers, lambda: [future.result(60) for future in pending] and None
        finally:
            enclave.open.set()
            for client in clients:
                client.sock.close()


def waiting(enclave: Enclave) -> int:
    return int(enclave.served.call(lambda: len(enclave.prover._waiting)))


def test_more_connections_than_the_queue_holds(enclave: Enclave) -> None:
    """As many wait as the queue holds, the rest are told when to come again, and one quote serves all that waited."""
    session = enclave.client()
    began = time.monotonic()
    with crowding(enclave) as (answers, wait):
        wait_until(lambda: len(answers) == CROWD - 1 - QUEUE, 30)
        assert {status for status, _ in answers} == {503}
        assert all(1 <= int(headers["retry-after"]) <= 60 for _, headers in answers)
        # A real client is told the same, sends nothing, and comes again.
        with pytest.raises(NotAttested) as caught:
            enclave.talk(session)
        assert caught.value.code == "TRANSPORT_BUSY"
        enclave.open.set()
        wait()
        assert sorted(status for status, _ in answers) == [200] * (1 + QUEUE) + [503] * (CROWD - 1 - QUEUE)
        assert len(enclave.quotes) == 2
        assert b" 503 " in enclave.talk(session)
    assert session.last_result is not None and session.last_result.accepted
    assert len(enclave.quotes) <= 2 + (time.monotonic() - began) / PAUSE


def test_queue_without_its_bound_takes_them_all(enclave: Enclave) -> None:
    """The bound is what refused them: without it all wait, for as long and in as much memory as they like."""
    enclave.prover._limit = 1 << 30
    with crowding(enclave) as (answers, wait):
        wait_until(lambda: waiting(enclave) == CROWD - 1, 30)
        assert answers == []
        enclave.open.set()
        wait()
        assert [status for status, _ in answers] == [200] * CROWD


def test_client_gets_its_proof_while_a_flood_goes_on(enclave: Enclave) -> None:
    """Sixteen connections ask as fast as they can and dial again when their allowance is used up. The CPU is asked no
    more often than the pause between two quotes allows."""
    stop, statuses = threading.Event(), list[int]()

    def flood() -> None:
        while not stop.is_set():
            with Client(enclave.served.path) as client:
                statuses.extend(enclave.ask(client)[0] for _ in range(BURST + 1))

    session, served, began = enclave.client(), 0, time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        crowd = [pool.submit(flood) for _ in range(16)]
        try:
            while served < 5:
                try:
                    assert b" 503 " in enclave.talk(session)
                    served += 1
                except NotAttested as err:
                    assert err.code == "TRANSPORT_BUSY"
        finally:
            stop.set()
        for thread in crowd:
            thread.result(60)
    assert {200, 429} <= set(statuses) <= {200, 429, 503}
    assert len(enclave.quotes) <= 1 + (time.monotonic() - began) / PAUSE
    assert len(enclave.quotes) < statuses.count(200), "one quote serves many"


def test_cpu_is_left_alone_between_two_quotes(enclave: Enclave) -> None:
    """The pause is what bounds the rate: with a long one the second waits, without one it does not."""
    enclave.prover._pause = 3600.0
    with Client(enclave.served.path) as first, Client(enclave.served.path) as second, ThreadPoolExecutor(1) as pool:
        assert enclave.ask(first)[0] == 200
        late = pool.submit(enclave.ask, second)
        wait_until(lambda: waiting(enclave) == 1, 30)
        assert len(enclave.quotes) == 1 and not late.done()
        second.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(SSL.Error):
            late.result(60)


def test_cpu_without_the_pause_is_asked_each_time(enclave: Enclave) -> None:
    enclave.prover._pause = 0.0
    with Client(enclave.served.path) as first, Client(enclave.served.path) as second:
        assert enclave.ask(first)[0] == enclave.ask(second)[0] == 200
        assert len(enclave.quotes) == 2


# --- a signing oracle ---


BINDER: Final = bytes(range(64))
HONEST: Final = json.loads(channel_request(bytes(32), gpu=False, binding="exporter"))
TEXT: Final = base64.urlsafe_b64encode(BINDER).rstrip(b"=").decode()
ORACLES: dict[str, dict[str, Any]] = {
    "a binder in place of the nonce": {"report_data": BINDER.hex(), "gpu": False, "binding": "exporter"},
    "a nonce as long as a binder": {**HONEST, "nonce": TEXT},
    "a nonce in hex": {**HONEST, "nonce": BINDER.hex()},
    "a binder beside the nonce": {**HONEST, "report_data": BINDER.hex()},
    "an exporter beside the nonce": {**HONEST, "exporter": BINDER[:32].hex()},
    "a leaf hash beside the nonce": {**HONEST, "leaf": BINDER.hex()},
    "a binding of the caller's": {**HONEST, "binding": BINDER.hex()},
}


@pytest.mark.parametrize("request_", ORACLES.values(), ids=ORACLES.keys())
def test_client_that_posts_its_own_binder(enclave: Enclave, request_: dict[str, Any]) -> None:
    with Client(enclave.served.path) as client:
        status, _ = enclave.ask(client, json.dumps(request_).encode())
        assert status == 400
        assert enclave.quotes == []
        assert enclave.ask(client)[0] == 200 and len(enclave.quotes) == 1  # the control


def test_binder_that_gets_past_the_form_is_still_not_signed(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers: the request's form, the sizes that the formula takes, and the hash that it is. Only without all of
    them would the enclave be an oracle."""
    body = json.dumps({**HONEST, "nonce": TEXT, "binding": "key"}).encode()
    with Client(enclave.served.path) as client:
        assert enclave.ask(client, body)[0] == 400 and enclave.quotes == []
        monkeypatch.setattr(routes_module, "_nonce", lambda text: base64.urlsafe_b64decode(text + "=="))
        assert enclave.ask(client, body)[0] == 500 and enclave.quotes == []
        monkeypatch.setattr(binding, "_fixed", lambda part, size: part)
        assert enclave.ask(client, body)[0] == 200
        assert len(enclave.quotes) == 1 and BINDER not in enclave.quotes
        monkeypatch.setattr(binding, "connection_leaf", lambda k, exporter, nonce, *rest: nonce)
        assert enclave.ask(client, body)[0] == 200 and enclave.quotes[-1] == BINDER
