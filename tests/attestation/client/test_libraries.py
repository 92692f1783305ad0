"""Every HTTP library, with the verifying context: what a refusal lets out, and that an acceptance lets it work."""

from __future__ import annotations

import asyncio
import http.client
import os
import ssl
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from attestation.client.handshake import Appraisal, Handshake
from attestation.client.tls import AttestedContext, NotAttested, find
from attestation.client.wire import FetchEvidence, ProveChannel
from attestation.errors import RefusedError
from tests.attestation.client.ratls_server import Server, answer, chunked

SECRET = b"the user's own prompt"
NONCE = bytes(range(32))
LABEL = b"EXPORTER-vouchsafe-conn-v1"
PROVE = "POST /.well-known/vouchsafe/channel"


class Verdict:
    """An appraiser for tests of the plumbing: refuses the leaf, refuses the proof, or accepts both."""

    name, host = "localhost", "localhost:1"

    def __init__(self, *, leaf: bool = True, proof: bool = True) -> None:
        self.accept_leaf, self.accept_proof = leaf, proof
        self.exporters: list[bytes] = []
        self.prepared = 0

    def prepare(self) -> None:
        self.prepared += 1

    def appraise(self, handshake: Handshake) -> Appraisal:
        if not self.accept_leaf:
            raise RefusedError("TEST_LEAF", "this leaf is not accepted")
        proof = yield ProveChannel(NONCE, False, "exporter")
        self.exporters.append(handshake.exporter(NONCE))
        if not self.accept_proof or proof.expect_ok("the proof") != b'{"proof":1}':
            raise RefusedError("TEST_PROOF", "this proof is not accepted")
        return None


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        running.routes[PROVE] = answer(b'{"proof":1}')
        running.routes["POST /v1/chat"] = lambda _c, body: answer(b'{"echo":"' + body + b'"}')
        running.routes["POST /v1/stream"] = chunked(b"data: 1\n\n", b"data: [DONE]\n\n")
        yield running


# One function per library: send SECRET to https://localhost:port/v1/chat with this context, return the body.


def by_http_client(ctx: AttestedContext, port: int) -> bytes:
    conn = http.client.HTTPSConnection("localhost", port, context=ctx, timeout=10)
    try:
        conn.request("POST", "/v1/chat", SECRET)
        return conn.getresponse().read()
    finally:
        conn.close()


def by_urllib3(ctx: AttestedContext, port: int) -> bytes:
    urllib3 = pytest.importorskip("urllib3")
    with urllib3.PoolManager(ssl_context=ctx, retries=False) as pool:
        return bytes(pool.request("POST", f"https://localhost:{port}/v1/chat", body=SECRET).data)


def by_requests(ctx: AttestedContext, port: int) -> bytes:
    requests = pytest.importorskip("requests")

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[misc,name-defined]  # requests has no types here
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, ssl_context=ctx, **kwargs)

    with requests.Session() as session:
        session.trust_env = False
        session.mount("https://", Adapter())
        return bytes(session.post(f"https://localhost:{port}/v1/chat", data=SECRET, timeout=10).content)


def by_urllib(ctx: AttestedContext, port: int) -> bytes:
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=ctx), urllib.request.ProxyHandler({}))
    with opener.open(f"https://localhost:{port}/v1/chat", SECRET, timeout=10) as response:
        return bytes(response.read())


def by_httpx2(ctx: AttestedContext, port: int) -> bytes:
    import httpx2

    with httpx2.Client(verify=ctx, trust_env=False) as client:
        return client.post(f"https://localhost:{port}/v1/chat", content=SECRET).content


def by_httpx(ctx: AttestedContext, port: int) -> bytes:
    httpx = pytest.importorskip("httpx")
    with httpx.Client(verify=ctx, trust_env=False) as client:
        return bytes(client.post(f"https://localhost:{port}/v1/chat", content=SECRET).content)


def _run(main: Any, uvloop: bool = False) -> Any:  # Any: a coroutine and its result
    if not uvloop:
        return asyncio.run(main)
    module = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=module.new_event_loop) as runner:
        return runner.run(main)


async def _async_httpx2(ctx: AttestedContext, port: int) -> bytes:
    import httpx2

    async with httpx2.AsyncClient(verify=ctx, trust_env=False) as client:
        return (await client.post(f"https://localhost:{port}/v1/chat", content=SECRET)).content


async def _async_httpx(ctx: AttestedContext, port: int) -> bytes:
    httpx = pytest.importorskip("httpx")
    async with httpx.AsyncClient(verify=ctx, trust_env=False) as client:
        return bytes((await client.post(f"https://localhost:{port}/v1/chat", content=SECRET)).content)


async def _aiohttp(ctx: AttestedContext, port: int) -> bytes:
    aiohttp = pytest.importorskip("aiohttp")
    async with aiohttp.ClientSession() as session:  # noqa: SIM117
        async with session.post(f"https://localhost:{port}/v1/chat", data=SECRET, ssl=ctx) as response:
            return bytes(await response.read())


async def _streams(ctx: AttestedContext, port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=ctx, server_hostname="localhost")
    writer.write(b"POST /v1/chat HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(SECRET), SECRET))
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
    return body


def by_openai(ctx: AttestedContext, port: int) -> bytes:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        api_key="k",
        base_url=f"https://localhost:{port}/v1",
        http_client=openai.DefaultHttpx2Client(verify=ctx, trust_env=False),
        max_retries=1,
    )
    with client:
        return bytes(client.post("/chat", body={"p": SECRET.decode()}, cast_to=str).encode())


LIBRARIES: dict[str, Callable[[AttestedContext, int], bytes]] = {
    "http.client": by_http_client,
    "urllib": by_urllib,
    "urllib3": by_urllib3,
    "requests": by_requests,
    "httpx": by_httpx,
    "httpx2": by_httpx2,
    "openai": by_openai,
    "httpx2-async": lambda c, p: _run(_async_httpx2(c, p)),
    "httpx2-async-uvloop": lambda c, p: _run(_async_httpx2(c, p), True),
    "httpx-async": lambda c, p: _run(_async_httpx(c, p)),
    "aiohttp": lambda c, p: _run(_aiohttp(c, p)),
    "aiohttp-uvloop": lambda c, p: _run(_aiohttp(c, p), True),
    "asyncio": lambda c, p: _run(_streams(c, p)),
    "uvloop": lambda c, p: _run(_streams(c, p), True),
}
each_library = pytest.mark.parametrize("send", LIBRARIES.values(), ids=LIBRARIES.keys())


@each_library
def test_accepted_connection_carries_request_and_answer(server: Server, send: Callable[..., bytes]) -> None:
    verdict = Verdict()
    assert SECRET in send(AttestedContext(verdict), server.port)
    connection = server.connections[0]
    assert connection.requests[0] == PROVE
    assert connection.sni == "localhost"
    assert verdict.exporters[0] == connection.exporter(LABEL, NONCE)
    assert verdict.prepared >= 1


@each_library
def test_refused_leaf_lets_no_application_byte_out(
    server: Server, send: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Exception) as caught:
        send(AttestedContext(Verdict(leaf=False)), server.port)
    refusal = find(caught.value)
    assert refusal is not None and refusal.code == "TEST_LEAF"
    server.wait_idle()
    assert server.connections and server.received == b""
    assert "Fatal error" not in caplog.text


@each_library
def test_refused_proof_lets_no_byte_of_the_users_request_out(server: Server, send: Callable[..., bytes]) -> None:
    with pytest.raises(Exception) as caught:
        send(AttestedContext(Verdict(proof=False)), server.port)
    refusal = find(caught.value)
    assert refusal is not None and refusal.code == "TEST_PROOF"
    server.wait_idle()
    assert set(server.requests) == {PROVE}
    assert SECRET not in server.received


@each_library
def test_fault_of_the_check_itself_is_a_refusal_like_any_other(
    server: Server, send: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Verdict):
        def appraise(self, handshake: Handshake) -> Appraisal:
            raise ZeroDivisionError(SECRET)
            yield  # a generator, as every appraiser is

    with pytest.raises(Exception) as caught:
        send(AttestedContext(Faulty()), server.port)
    refusal = find(caught.value)
    assert refusal is not None and refusal.code == "CLIENT_INTERNAL" and SECRET.decode() not in str(refusal)
    server.wait_idle()
    assert server.received == b"" and "Fatal error" not in caplog.text


def test_settings_that_weaken_an_ssl_context_do_not_weaken_this_one(server: Server) -> None:
    context = AttestedContext(Verdict(leaf=False))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    with pytest.raises(NotAttested):
        by_http_client(context, server.port)
    server.wait_idle()
    assert server.received == b""


def test_urllib3_and_requests_see_a_verified_connection(server: Server) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_urllib3(AttestedContext(Verdict()), server.port)
        by_requests(AttestedContext(Verdict()), server.port)


def test_another_name_is_refused_before_a_byte_is_sent(server: Server) -> None:
    context = AttestedContext(Verdict())
    conn = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=5)
    with pytest.raises(NotAttested) as caught:
        conn.request("POST", "/v1/chat", SECRET)
    assert caught.value.code == "CLIENT_NAME"
    server.wait_idle()
    assert not any(c.handshake_done or c.sni for c in server.connections)


@each_library
def test_answer_longer_than_one_record_arrives_whole(server: Server, send: Callable[..., bytes]) -> None:
    big = os.urandom(150_000).hex().encode()
    server.routes["POST /v1/chat"] = answer(big)
    assert send(AttestedContext(Verdict()), server.port) == big


def test_many_threads_may_use_one_context(server: Server) -> None:
    context, results = AttestedContext(Verdict()), []

    def one() -> None:
        results.append(by_http_client(context, server.port))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(SECRET in r for r in results)


def test_evidence_may_be_fetched_over_the_connection_itself(server: Server) -> None:
    server.routes["GET /.well-known/vouchsafe/evidence"] = answer(b"bundle")

    class Fetching(Verdict):
        def appraise(self, handshake: Handshake) -> Appraisal:
            bundle = yield FetchEvidence()
            assert bundle.body == b"bundle"
            return (yield from super().appraise(handshake))

    assert SECRET in by_http_client(AttestedContext(Fetching()), server.port)
    assert SECRET in _run(_streams(AttestedContext(Fetching()), server.port))
    assert server.connections[0].requests[:2] == ["GET /.well-known/vouchsafe/evidence", PROVE]
