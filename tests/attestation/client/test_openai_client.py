"""The unmodified OpenAI SDK over the attested transport: connections, receipts, and where requests may go."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from attestation.client.handshake import find
from attestation.client.openai import (
    AsyncAttestedClient,
    AttestedClient,
    async_attested_client,
    attested_client,
)
from attestation.client.receipts import ReceiptRefused
from attestation.errors import InputError
from tests.attestation.client.enclave import CHAT, PROVE, Chat, prove, served, session_for, show
from tests.attestation.client.ratls_server import Server, answer, plain_certificate
from tests.genuine import NAME, Genuine, genuine

MESSAGES: Any = [{"role": "user", "content": "What can the host see?"}]
TEXT = "The host sees nothing."


@pytest.fixture(scope="module")
def story() -> Genuine:
    return genuine()


@pytest.fixture
def server(story: Genuine) -> Iterator[Server]:
    with served(story) as running:
        Chat(story).install(running)
        yield running


def client_of(server: Server, story: Genuine, **changes: Any) -> AttestedClient:
    session = session_for(server, story)
    return attested_client(session.target, policy=story.policy, session=session, **changes)


def sdk(http: AttestedClient, **changes: Any) -> openai.OpenAI:
    given = {"api_key": "sk-test", "base_url": f"https://{NAME}/v1", "http_client": http, "max_retries": 0, **changes}
    return openai.OpenAI(**given)


def stream(client: openai.OpenAI) -> str:
    chunks = client.chat.completions.create(model="parrot", messages=MESSAGES, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_streams_share_one_connection_and_every_receipt_is_verified(server: Server, story: Genuine) -> None:
    with client_of(server, story) as http:
        for _ in range(5):
            assert stream(sdk(http)) == TEXT
            last = http.receipts.last
            assert last is not None and last.verdict is not None and last.verdict.accepted and last.complete
        assert len(server.connections) == 1
        assert server.requests == [PROVE, *[CHAT] * 5]
        verdict = http.receipts.verify_last()
        assert {c.id for c in verdict.checks if c.status == "pass"} >= {
            "receipt.signature", "receipt.keyset", "receipt.request-hash", "receipt.response-hash", "receipt.chain",
        }  # fmt: skip
        assert http.receipts.last_receipt is not None and http.receipts.last_receipt.model == "parrot"


def test_without_reading_the_rest_each_stream_would_cost_a_connection(
    server: Server, story: Genuine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for the test above: it is the drain that keeps the connection."""
    from attestation.client import openai as module

    monkeypatch.setattr(module, "MAX_REST", -1)
    with client_of(server, story, receipts="off") as http:
        for _ in range(3):
            stream(sdk(http))
    assert len(server.connections) == 3


def test_answer_that_is_not_streamed_has_its_receipt_fetched_with_the_same_key(server: Server, story: Genuine) -> None:
    with client_of(server, story) as http:
        done = sdk(http).chat.completions.create(model="parrot", messages=MESSAGES)
        assert done.choices[0].message.content == TEXT
        assert http.receipts.verify_last().accepted
    assert server.requests == [PROVE, CHAT, "GET /v1/aci/receipts/rcpt-1"]
    assert server.received.count(b"Bearer sk-test") == 2


def test_receipt_speaks_of_the_very_bytes_sent_and_received(server: Server, story: Genuine) -> None:
    with client_of(server, story) as http:
        stream(sdk(http))
        last = http.receipts.last
        assert last is not None
        assert bytes(last.request) in server.received and json.loads(last.request)["messages"] == MESSAGES
        assert b"x-vouchsafe-receipt: inline" in server.received.lower()
        assert "host see" not in repr(last) and "nothing" not in repr(last)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "no receipt": ({"inline": False}, "RECEIPT_MISSING"),
    "another key": ({"key": 1}, "RECEIPT_SIGNATURE"),
    "an edited number": (
        {"edit_sealed": lambda s: s.replace(b'"served_at":1795', b'"served_at":1794')},
        "RECEIPT_SIGNATURE",
    ),
    "another keyset": (
        {"edit_document": lambda d: {**d, "workload_keyset_digest": "sha256:" + "0" * 64}},
        "RECEIPT_KEYSET",
    ),
    "an exchanged word": (
        {"edit_stream": lambda e: [e[0].replace(b"host", b"HOST"), *e[1:]]},
        "RECEIPT_RESPONSE_HASH",
    ),
    "a dropped event": ({"edit_stream": lambda e: e[1:]}, "RECEIPT_RESPONSE_CUT"),
    "no JSON": ({"edit_sealed": lambda s: b"{}"}, "FORMAT_RECEIPT"),
}


@pytest.mark.parametrize(("lie", "code"), LIES.values(), ids=LIES.keys())
def test_stream_whose_receipt_is_missing_or_says_something_else_ends_in_an_error(
    server: Server, story: Genuine, lie: dict[str, Any], code: str
) -> None:
    Chat(story, **lie).install(server)
    with client_of(server, story) as http, pytest.raises(ReceiptRefused) as caught:
        stream(sdk(http))
    assert caught.value.code == code


def test_answer_without_its_receipt_is_an_error_when_not_streamed(server: Server, story: Genuine) -> None:
    def forgetful(connection: Any, body: bytes) -> bytes:
        reply = Chat(story)(connection, body)
        connection.server.routes["GET /v1/aci/receipts/rcpt-1"] = answer(b"{}", status="404 Not Found")
        return reply

    server.routes[CHAT] = forgetful
    with client_of(server, story) as http, pytest.raises(ReceiptRefused, match="RECEIPT_MISSING"):
        sdk(http, max_retries=2).chat.completions.create(model="parrot", messages=MESSAGES)
    assert server.requests.count(CHAT) == 1  # and the SDK does not ask again


def test_stream_that_breaks_off_is_an_error_and_no_receipt_is_believed(server: Server, story: Genuine) -> None:
    def broken(connection: Any, body: bytes) -> bytes:
        whole = Chat(story)(connection, body)
        connection.tls.sendall(whole[: whole.index(b"nothing")])
        return b""

    server.routes[CHAT] = broken
    with client_of(server, story) as http:
        with pytest.raises(openai.APIConnectionError):
            stream(sdk(http))
        with pytest.raises(ReceiptRefused, match="RECEIPT_MISSING"):
            http.receipts.verify_last()


def test_stream_closed_in_its_middle_does_not_wait_for_the_rest(server: Server, story: Genuine) -> None:
    def endless(connection: Any, body: bytes) -> bytes:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        event = Chat(story)(connection, body).split(b"\r\n\r\n", 1)[1].split(b"\n\n")[0] + b"\n\n\r\n"
        connection.tls.sendall(head + event)
        connection.tls.recv(1)  # nothing more until the client hangs up
        return b""

    server.routes[CHAT] = endless
    with client_of(server, story) as http:
        chunks = sdk(http).chat.completions.create(model="parrot", messages=MESSAGES, stream=True)
        next(iter(chunks))
        chunks.close()


def test_refused_enclave_costs_retries_and_no_byte_of_the_prompt(story: Genuine) -> None:
    with Server(*plain_certificate(NAME)) as relay:
        with client_of(relay, story) as http, pytest.raises(openai.APIConnectionError) as caught:
            stream(sdk(http, max_retries=1))
        refusal = find(caught.value)
        assert refusal is not None and refusal.code == "FORMAT_LEAF"
        relay.wait_idle(2)
        assert len(relay.connections) == 2 and relay.received == b""


@pytest.mark.parametrize(
    "base",
    [
        "http://demo.vouchsafe.test:443/v1",
        "http://demo.vouchsafe.test/v1",
        "https://other.test/v1",
        "https://demo.vouchsafe.test:444/v1",
    ],
)
def test_request_to_anywhere_else_is_refused_before_dialling(server: Server, story: Genuine, base: str) -> None:
    with client_of(server, story) as http, pytest.raises(InputError, match="INPUT_TARGET"):
        stream(sdk(http, base_url=base))
    assert server.connections == []


def test_redirect_to_another_host_is_not_followed(server: Server, story: Genuine) -> None:
    server.routes["GET /v1/models"] = answer(
        b"", status="307 Gone", headers="location: https://evil.test/v1/models\r\n"
    )
    with client_of(server, story) as http, pytest.raises(InputError):
        http.get("/v1/models", follow_redirects=True)


def test_proxy_settings_of_the_environment_are_not_followed(
    server: Server, story: Genuine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    with client_of(server, story) as http:
        assert stream(sdk(http)) == TEXT


def test_new_certificate_between_two_requests_is_verified_and_its_keyset_used(story: Genuine) -> None:
    second = genuine(key=1)
    with served(story) as server:
        Chat(story).install(server)
        with client_of(server, story) as http:
            stream(sdk(http))
            http._transport._inner._pool._connections[0].close()  # type: ignore[attr-defined]  # as a server does
            show(server, second)
            Chat(second).install(server)
            assert stream(sdk(http)) == TEXT
            assert http.session.last_result is not None
            assert http.receipts.last is not None and http.receipts.last.keyset == second.evidence.keyset


# --- async ---


def async_client_of(server: Server, story: Genuine, **changes: Any) -> AsyncAttestedClient:
    session = session_for(server, story)
    return async_attested_client(session.target, policy=story.policy, session=session, **changes)


async def async_stream(http: AsyncAttestedClient) -> str:
    client = openai.AsyncOpenAI(api_key="sk-test", base_url=f"https://{NAME}/v1", http_client=http, max_retries=0)
    chunks = await client.chat.completions.create(model="parrot", messages=MESSAGES, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


async def test_async_streams_share_one_connection_and_every_receipt_is_verified(server: Server, story: Genuine) -> None:
    async with async_client_of(server, story) as http:
        for _ in range(3):
            assert await async_stream(http) == TEXT
            assert http.receipts.verify_last().accepted
        done = await openai.AsyncOpenAI(
            api_key="sk-test", base_url=f"https://{NAME}/v1", http_client=http
        ).chat.completions.create(model="parrot", messages=MESSAGES)
        assert done.choices[0].message.content == TEXT
        assert len(server.connections) == 1


@pytest.mark.parametrize(("lie", "code"), LIES.values(), ids=LIES.keys())
async def test_async_stream_with_a_bad_receipt_ends_in_an_error(
    server: Server, story: Genuine, lie: dict[str, Any], code: str
) -> None:
    Chat(story, **lie).install(server)
    async with async_client_of(server, story) as http:
        with pytest.raises(ReceiptRefused) as caught:
            await async_stream(http)
    assert caught.value.code == code


async def test_async_refusal_lets_no_byte_of_the_prompt_out(story: Genuine) -> None:
    with served(story) as relay:
        relay.routes[PROVE] = lambda c, body: prove(story, c, body, signed_exporter=bytes(32))
        async with async_client_of(relay, story) as http:
            with pytest.raises(openai.APIConnectionError) as caught:
                await async_stream(http)
        refusal = find(caught.value)
        assert refusal is not None and refusal.code == "CHANNEL_REPORT_DATA"
        assert relay.requests == [PROVE]


async def test_concurrent_async_requests_each_verify_their_own_receipt(server: Server, story: Genuine) -> None:
    async with async_client_of(server, story) as http:
        assert await asyncio.gather(*(async_stream(http) for _ in range(4))) == [TEXT] * 4


async def test_evidence_is_fetched_in_a_thread_and_not_in_the_event_loop(
    server: Server, story: Genuine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attestation.client import session as module

    seen: list[bool] = []
    fetch = module.fetch_evidence

    def noted(*args: Any, **kw: Any) -> bytes:
        seen.append(threading.current_thread() is threading.main_thread())
        return fetch(*args, **kw)

    monkeypatch.setattr(module, "fetch_evidence", noted)
    session = session_for(server, story, warm=False)
    async with async_attested_client(session.target, policy=story.policy, session=session) as http:
        assert await async_stream(http) == TEXT
    assert seen == [False]


async def test_service_that_cannot_be_reached_is_the_librarys_connect_error(story: Genuine) -> None:
    with served(story) as gone:
        session = session_for(gone, story, warm=False)
    async with async_attested_client(session.target, policy=story.policy, session=session) as http:
        with pytest.raises(httpx2.ConnectError) as caught:
            await http.get("/v1/models")
    refusal = find(caught.value)
    assert refusal is not None and refusal.code == "TRANSPORT_CONNECT"
