"""A certificate's life: renewed under running connections, and what is withdrawn when it cannot be renewed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL

from attestation.attester import TeeAttester
from attestation.channel import CHANNEL_PATH, EVIDENCE_PATH, channel_request
from attestation.client.session import AttestedSession, read_policy
from attestation.errors import RefusedError
from attestation.tdx import rtmr3_items
from enclave.api.attestation import ACI_PATH
from enclave.api.health import health_routes
from enclave.boot_steps import seal
from enclave.clock import Clock
from enclave.issuer import RETRY_MAX, Issuer
from enclave.keys import KeyRing
from enclave.producer import Producer
from tests.attestation.attester.driver import Driver, attester
from tests.demo.provision import Provisioned, provision
from tests.devtee import nvml
from tests.devtee.gpu import GpuForm
from tests.devtee.running import running_machine
from tests.enclave.machine import EnclaveProcess, Surroundings, model_directory, surroundings
from tests.enclave.support import NAME, Client, client_context, make_identity, plain, serving, wait_until

LIFETIME = 60


class Moved(Clock):
    """A clock whose wall time the test moves, forward only."""

    def __init__(self) -> None:
        self.offset = 0.0
        super().__init__(lambda: time.time() + self.offset)


@dataclass
class Renewing:
    """An issuer on its machine, with the strings the test pulls."""

    issuer: Issuer
    clock: Moved
    around: Surroundings
    driver: Driver
    told: list[str]
    documents: Path

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.issuer.renew_forever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Surroundings, bytes]]:
    """A machine with one GPU, sealed once as at boot, and its event log."""
    with surroundings(tmp_path_factory.mktemp("n"), lifetime=LIFETIME, gpus=1) as made:
        settings = made.settings
        items = rtmr3_items(made.made.release, settings.digest, [(m.id, m.weights) for m in settings.models])
        yield made, _sealed(made.tdx, items)


def _sealed(tdx: TeeAttester, items: list[bytes]) -> bytes:
    return seal(tdx, items)


@pytest.fixture
def renewing(machine: tuple[Surroundings, bytes], tmp_path: Path) -> Iterator[Renewing]:
    around, event_log = machine
    driver, clock, told = Driver(around.tdx.tee), Moved(), list[str]()
    documents = tmp_path / "endorsements"
    shutil.copytree(around.settings.paths.endorsements, documents)
    settings = replace(around.settings, paths=replace(around.settings.paths, endorsements=documents))
    issuer = Issuer(
        settings, around.policy, KeyRing(), Producer(around.tdx, attester(driver, tmp_path)), clock,
        say=told.append, poll=0.02, retry=0.02,
    )  # fmt: skip
    issuer.event_log, issuer.release_digest = event_log, around.made.release
    yield Renewing(issuer, clock, around, driver, told, documents)
    around.tdx.fails = False


async def until(holds: Any, seconds: float = 10) -> None:  # Any: a function without arguments
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - a condition of the code under test, not an event of ours
            await asyncio.sleep(0.01)


# --- the swap ---------------------------------------------------------------------------------------------------------


async def test_stream_runs_across_a_renewal_and_the_old_key_dies_with_its_connection(
    renewing: Renewing, tmp_path: Path
) -> None:
    """The real issuer under the real server: old connection, new connection, old key."""
    issuer, release = renewing.issuer, threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        keyset = scope["vouchsafe"].identity.keyset_digest.encode()
        if scope["path"] == "/short":
            await plain(send, 200, keyset)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: one\n\n", "more_body": True})
        while not release.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"data: " + keyset + b"\n\n"})

    def stream(client: Client) -> None:
        client.send(b"GET /long HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        seen = b""
        while b"data: one" not in seen:
            seen += client.tls.recv(65536)

    first = await issuer.issue()
    issuer.publish(first)
    leaf, keyset, context = first.leaf, first.keyset_digest, weakref.ref(first.context)
    del first
    with serving(app, tmp_path, lambda: issuer.current, now=renewing.clock.now) as running:
        with Client(running.path) as old:
            await asyncio.to_thread(stream, old)
            assert old.leaf == leaf
            async with renewing.running():
                renewing.clock.offset = LIFETIME - 4
                await until(lambda: issuer.current.leaf != leaf)
            with Client(running.path) as new:
                second = await asyncio.to_thread(new.get, "/short")
                assert new.leaf == issuer.current.leaf != leaf
                assert second == (200, issuer.current.keyset_digest.encode())
            gc.collect()
            assert context() is not None, "a stream still needs it"
            release.set()
            rest, how = await asyncio.to_thread(old.read_all)
            assert keyset.encode() in rest and how == "notify"

        def gone() -> bool:
            gc.collect()
            return context() is None

        await until(gone)


# --- a renewal that fails ---------------------------------------------------------------------------------------------


async def test_failed_renewal_is_told_each_time_in_readiness_and_log(
    renewing: Renewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, events = renewing.issuer, list[tuple[str, dict[str, object]]]()
    monkeypatch.setattr("enclave.telemetry.event", lambda name, **fields: events.append((name, fields)))
    issuer.publish(await issuer.issue())
    assert await readiness(issuer) == (200, {"status": "ready"})
    renewing.around.tdx.fails = True
    async with renewing.running():
        renewing.clock.offset = LIFETIME / 2 + 1
        await until(lambda: len(renewing.told) >= 3)
        assert issuer.failing == "ATTESTER_TIMEOUT" and issuer.valid
        # Nobody is sent away before the end; whoever asks is told.
        assert await readiness(issuer) == (200, {"status": "ready", "certificate": "renewal-failing"})
        attempts = [fields["attempt"] for name, fields in events if name == "certificate.failed"]
        assert attempts[:3] == [1, 2, 3]
        assert all(f["code"] == "ATTESTER_TIMEOUT" for n, f in events if n == "certificate.failed")
        renewing.clock.offset = LIFETIME + 1
        assert await readiness(issuer) == (503, {"status": "not-ready", "certificate": "renewal-failing"})
        renewing.around.tdx.fails = False
        await until(lambda: issuer.valid)
        assert await readiness(issuer) == (200, {"status": "ready"})


async def readiness(issuer: Issuer) -> tuple[int, Any]:
    """What `/health/ready` says, wired as the boot wires it."""
    sent = list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    routes = health_routes(lambda: issuer.valid, lambda: bool(issuer.failing))
    await routes["GET", "/health/ready"]({}, None, send)  # type: ignore[arg-type]  # neither is looked at
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_attempts_come_less_and_less_often_and_never_sleep_past_the_leafs_end(
    renewing: Renewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, slept = renewing.issuer, list[float]()
    issuer.publish(await issuer.issue())

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(issuer, "_retry", 5.0)
    left = issuer.current.not_after - renewing.clock.now()
    with monkeypatch.context() as patched:
        patched.setattr("enclave.issuer.asyncio.sleep", sleep)
        for attempt in (1, 2, 3, 4, 9, 1000):
            await issuer._failed(RefusedError("GPU_OCSP_MISSING", "no answer"), attempt)
        renewing.clock.offset = LIFETIME - 3
        await issuer._failed(RefusedError("GPU_OCSP_MISSING", "no answer"), 5)
    assert slept[:4] == [5, 10, 20, min(40, left)]
    assert all(left - 2 <= pause <= min(RETRY_MAX, left) for pause in slept[4:6])
    assert slept[6] <= 3


async def test_handshake_is_refused_once_the_leaf_has_ended(tmp_path: Path) -> None:
    identity, now = make_identity(), [int(time.time())]

    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await plain(send, 200, b"hello")

    with serving(hello, tmp_path, lambda: identity, now=lambda: now[0]) as running:
        now[0] = identity.not_after - 1
        with Client(running.path) as before:
            assert before.get()[0] == 200
            now[0] = identity.not_after
            with pytest.raises((SSL.Error, OSError)):
                Client(running.path)
            assert before.get()[0] == 503 and b"connection: close" in before.header
        wait_until(lambda: not running.endpoint.open and not running.endpoint.handshaking)


# --- the GPUs' ready state --------------------------------------------------------------------------------------------


async def test_ready_state_ends_with_the_leaf_that_vouched_for_it_and_comes_back_with_the_next(
    renewing: Renewing,
) -> None:
    issuer, driver = renewing.issuer, renewing.driver
    issuer.publish(await issuer.issue())
    assert driver.ready == 1
    shutil.move(renewing.documents / "ocsp", renewing.documents / "lost")  # the host's doing, not the GPU's
    async with renewing.running():
        renewing.clock.offset = LIFETIME / 2 + 1
        await until(lambda: len(renewing.told) >= 2)
        assert "GPU_OCSP" in renewing.told[0] and issuer.valid and driver.ready == 1
        renewing.clock.offset = LIFETIME + 1
        await until(lambda: driver.ready == 0)
        await until(lambda: any("READY STATE WITHDRAWN (GPU_OCSP_MISSING)" in line for line in renewing.told))
        assert not issuer.valid
        shutil.move(renewing.documents / "lost", renewing.documents / "ocsp")
        await until(lambda: issuer.valid)
    assert driver.ready == 1 and issuer.current.claims.gpu_state is not None
    assert issuer.current.claims.gpu_state.ready


async def test_ready_state_ends_with_the_leaf_when_the_platform_does_not_sign(renewing: Renewing) -> None:
    """Each attempt verifies the GPU and lets it work again; without a certificate that must not stay."""
    issuer = renewing.issuer
    issuer.publish(await issuer.issue())
    renewing.around.tdx.fails = True
    async with renewing.running():
        renewing.clock.offset = LIFETIME + 1
        await until(lambda: sum("READY STATE WITHDRAWN (ATTESTER_TIMEOUT)" in line for line in renewing.told) >= 2)
        assert not issuer.valid


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        ({"form": GpuForm(measurements={9: bytes([9]) * 48})}, "GPU_RIM_MISMATCH"),
        ({"ccFeature": 0}, "GPU_NOT_CONFIDENTIAL"),
        ({"devToolsMode": 1}, "GPU_NOT_CONFIDENTIAL"),
        ({"environment": 1}, "GPU_NOT_CONFIDENTIAL"),
        ({"multiGpuMode": 2}, "GPU_STATE"),
    ],
    ids=["measurement", "cc off", "developer tools", "simulation", "mode"],
)
async def test_gpu_that_is_refused_at_renewal_gets_no_more_work_at_once(
    renewing: Renewing, lie: dict[str, Any], code: str
) -> None:
    issuer, driver = renewing.issuer, renewing.driver
    issuer.publish(await issuer.issue())
    assert driver.ready == 1
    driver.changes.update(lie)
    async with renewing.running():
        renewing.clock.offset = LIFETIME / 2 + 1
        await until(lambda: driver.ready == 0)
        assert not issuer.valid, "the leaf has not ended, but what it says of the GPU is not true any more"
        assert any(f"READY STATE WITHDRAWN ({code})" in line for line in renewing.told)
        driver.changes.clear()
        await until(lambda: issuer.valid)
    assert driver.ready == 1


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        ({"ccFeature": 0}, "GPU_NOT_CONFIDENTIAL"),
        ({"devToolsMode": 1}, "GPU_NOT_CONFIDENTIAL"),
        ({"environment": 1}, "GPU_NOT_CONFIDENTIAL"),
        ({"multiGpuMode": 2}, "GPU_STATE"),
    ],
    ids=["cc off", "developer tools", "simulation", "mode"],
)
async def test_ready_state_is_not_set_while_driver_and_evidence_disagree(
    renewing: Renewing, lie: dict[str, Any], code: str
) -> None:
    renewing.driver.changes.update(lie)
    with pytest.raises(RefusedError) as refused:
        await renewing.issuer.prepare()
    assert refused.value.code == code and renewing.driver.ready == 0


async def test_driver_that_counts_another_gpu_than_the_evidence_is_refused(
    renewing: Renewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = renewing.issuer._producer
    state = await producer.gpu_state()

    async def more() -> Any:
        return replace(state, count=2)

    monkeypatch.setattr(producer, "gpu_state", more)  # between the two calls: a GPU that appears in a running driver
    with pytest.raises(RefusedError, match="GPU_STATE"):
        await renewing.issuer.prepare()
    assert renewing.driver.ready == 0


async def test_ready_state_that_cannot_be_withdrawn_is_said_and_serving_ends_all_the_same(renewing: Renewing) -> None:
    issuer, driver = renewing.issuer, renewing.driver
    issuer.publish(await issuer.issue())
    driver.changes.update(ready_stuck=True, devToolsMode=1)
    async with renewing.running():
        renewing.clock.offset = LIFETIME / 2 + 1
        await until(lambda: any("READY STATE NOT WITHDRAWN (ATTESTER_GPU_READY" in line for line in renewing.told))
        assert not issuer.valid


def test_an_enclave_that_stops_leaves_no_gpu_ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    short = tmp_path_factory.mktemp("g")
    with running_machine(short / "tee"), live_enclave(short) as (_, enclave):
        assert ready_state(short / "tee") == 1
        assert enclave.stop() == 0
        assert ready_state(short / "tee") == 0


def ready_state(state: Path) -> int:
    """The GPUs' ready state, asked of the driver beside its library (`tests.devtee.nvml`, operation 11)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as driver:
        driver.settimeout(10)
        driver.connect(str(state / "nvml.sock"))
        driver.sendall(nvml.REQUEST.pack(nvml.MAGIC, 11, 0, 0, bytes(32)))
        answer = b""
        while len(answer) < nvml.REPLY.size + 4:
            answer += driver.recv(64)
    return int.from_bytes(answer[nvml.REPLY.size :], sys.byteorder)


# --- a live enclave, and our own client -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    made: Provisioned
    socket: Path


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    short = tmp_path_factory.mktemp("v")
    with running_machine(short / "tee"), live_enclave(short) as (made, _):
        yield Live(made, short / "s" / "e.sock")


@contextlib.contextmanager
def live_enclave(short: Path) -> Iterator[tuple[Provisioned, EnclaveProcess]]:
    listen = f"unix:{short / 's' / 'e.sock'}"
    made = provision(short / "made", short / "tee", model_directory(short / "model"), None, "parrot", listen, NAME)
    with EnclaveProcess(made.config, short / "tee") as enclave:
        enclave.set_up(made, short / "s" / "e.sock")
        yield made, enclave


def test_our_client_and_our_server_agree_on_the_post_quantum_group(live: Live, tmp_path: Path) -> None:
    with Client(live.socket) as fetching:
        raw = fetching.get(EVIDENCE_PATH)[1]
    (tmp_path / f"{NAME}_443.bundle").write_bytes(raw)
    session = AttestedSession(f"https://{NAME}", read_policy(live.made.policy), cache_dir=tmp_path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(live.socket))
    with session.context().wrap_socket(sock, server_hostname=NAME) as tls:
        assert tls.group() == "X25519MLKEM768" and tls.version() == "TLSv1.3"
        assert tls.attestation is not None and tls.attestation.accepted
        assert not tls.session_reused


def test_tls_1_2_is_refused_by_a_live_enclave(live: Live) -> None:
    context = client_context()
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with pytest.raises(SSL.Error, match="protocol version"):
        Client(live.socket, context=context)


def test_no_early_data_and_a_ticket_that_opens_nothing(live: Live, tmp_path: Path) -> None:
    """OpenSSL's own client: what it is sent after the handshake allows neither early data nor resumption."""
    request = b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    saved, early = tmp_path / "session", tmp_path / "early"
    early.write_bytes(request)
    common = ["openssl", "s_client", "-unix", str(live.socket), "-servername", NAME, "-ign_eof"]

    def run(*more: str) -> str:
        done = subprocess.run([*common, *more], input=request, capture_output=True, timeout=30)
        assert b'{"status":"live"}' in done.stdout, done.stderr
        return done.stdout.decode("latin-1")

    first = run("-sess_out", str(saved))
    assert "Max Early Data: 0" in first
    assert not [line for line in first.splitlines() if "Max Early Data" in line and not line.endswith(": 0")]
    second = run("-sess_in", str(saved), "-early_data", str(early))
    assert "Early data was not sent" in second and "New, TLSv1.3" in second and "Reused, " not in second


def test_evidence_needs_no_api_key_and_answers_do(live: Live) -> None:
    with Client(live.socket) as client:
        assert client.get(EVIDENCE_PATH)[0] == 200
        assert client.get(ACI_PATH)[0] == 200
        assert client.get(f"{ACI_PATH}?nonce={'0' * 64}")[0] == 200
        body = channel_request(bytes(32), gpu=False, binding="exporter")
        assert client.get(CHANNEL_PATH, method="POST", body=body)[0] == 200
        assert client.get("/health/ready")[0] == 200
        assert client.get("/v1/models")[0] == 401
        headers = "content-type: application/json\r\n"
        question = b'{"model":"parrot","messages":[{"role":"user","content":"x"}]}'
        assert client.get("/v1/chat/completions", method="POST", body=question, headers=headers)[0] == 401
