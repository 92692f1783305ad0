"""The local proxy: what passes, what is refused, and that no byte of a request leaves before the verdict."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator

import pytest

from attestation.client import proxy as module
from attestation.client.proxy import Guard
from attestation.client.proxy_state import page
from tests.attestation.client.enclave import CHAT, PROVE, Chat, served, show
from tests.attestation.client.proxying import HEADERS, PROMPT, local
from tests.attestation.client.ratls_server import Connection, Server, answer, chunked
from tests.genuine import Genuine, genuine

TEXT = "The host sees nothing."


@pytest.fixture
def story() -> Genuine:
    return genuine()


@pytest.fixture
def server(story: Genuine) -> Iterator[Server]:
    with served(story) as running:
        Chat(story).install(running)
        yield running


# what passes


async def test_answer_passes_unchanged_once_its_receipt_was_checked(server: Server, story: Genuine) -> None:
    async with local(server, story) as made:
        told = await made.ask()
        assert (told.status, told.whole) == (200, True)
        assert json.loads(told.body)["choices"][0]["message"]["content"] == TEXT
        assert told.headers[b"x-receipt-id"] == b"rcpt-1"
        assert made.state.receipts_verified == 1
    assert server.requests == [PROVE, CHAT, "GET /v1/aci/receipts/rcpt-1"]
    assert server.received.count(b"Bearer sk-test") == 2


async def test_stream_passes_event_by_event_and_its_receipt_is_checked_before_done(
    server: Server, story: Genuine
) -> None:
    async with local(server, story) as made:
        told = await made.ask(stream=True)
        assert told.whole and told.body.endswith(b"data: [DONE]\n\n")
        assert b"vouchsafe-receipt" not in told.body  # it was for the proxy
        assert b"".join(told.pieces[:-1]).count(b"data: ") == 2
        assert made.state.receipts_verified == 1
    assert server.requests == [PROVE, CHAT]


async def test_program_that_asks_for_the_receipt_itself_gets_it_too(server: Server, story: Genuine) -> None:
    async with local(server, story) as made:
        told = await made.ask(stream=True, headers=(*HEADERS, (b"x-vouchsafe-receipt", b"inline")))
        assert b"data: [DONE]\n\n: vouchsafe-receipt " in told.body


async def test_many_requests_share_one_proven_connection(server: Server, story: Genuine) -> None:
    async with local(server, story) as made:
        for _ in range(5):
            assert (await made.ask(stream=True)).whole
    assert len(server.connections) == 1
    assert server.requests == [PROVE, *[CHAT] * 5]


async def test_requests_at_the_same_time_get_a_connection_each(server: Server, story: Genuine) -> None:
    async with local(server, story) as made:
        told = await asyncio.gather(*(made.ask() for _ in range(4)))
        assert [t.status for t in told] == [200] * 4
        assert made.upstream.dialled == len(server.connections) <= 4
        assert made.upstream.counts[0] == made.upstream.counts[1]


async def test_other_answers_pass_as_they_are(server: Server, story: Genuine) -> None:
    server.routes["GET /v1/models?limit=2"] = answer(b'{"data":[]}')
    async with local(server, story) as made:
        told = await made.ask("GET", "/v1/models", b"", query=b"limit=2")
        assert (told.status, told.body) == (200, b'{"data":[]}')
        told = await made.ask("DELETE", "/v1/nothing", b"")
        assert told.status == 404 and b"no such route" in told.body


async def test_request_headers_of_this_hop_stay_here(server: Server, story: Genuine) -> None:
    private = [(b"cookie", b"c=1"), (b"x-forwarded-for", b"10.0.0.7"), (b"referer", b"http://localhost/x"),
               (b"connection", b"keep-alive, X-Mine"), (b"x-mine", b"1"), (b"user-agent", b"test/1")]  # fmt: skip
    async with local(server, story) as made:
        assert (await made.ask(headers=(*HEADERS, *private))).status == 200
    head = server.received.split(b"\r\n\r\n")[1].lower()
    assert b"user-agent: test/1" in head
    assert not [n for n in (b"cookie", b"10.0.0.7", b"referer", b"x-mine", b"127.0.0.1") if n in head]
    assert f"host: {made.session.host}".encode() in head


async def test_without_receipts_nothing_is_asked_and_the_page_says_so(server: Server, story: Genuine) -> None:
    async with local(server, story, receipts=False) as made:
        assert (await made.ask()).status == 200
        assert b"data: [DONE]" in (await made.ask(stream=True)).body
        assert made.state.facts(0, 0, 0)["receipts"] == "off"
    assert server.requests == [PROVE, CHAT, CHAT]


# receipts that do not say what was received

BAD = {
    "missing": {"inline": False},
    "of other words": {"edit_stream": lambda events: [events[0].replace(b"host", b"HOST"), *events[1:]]},
    "signed by a stranger": {"key": 1},
    "for another request": {
        "edit_document": lambda d: json.loads(
            json.dumps(d).replace(d["event_log"][0]["body_hash"], "sha256:" + hashlib.sha256(b"x").hexdigest())
        )
    },
}


@pytest.mark.parametrize("name", BAD)
async def test_stream_whose_receipt_is_wrong_ends_in_an_error_and_not_in_done(
    server: Server, story: Genuine, name: str
) -> None:
    Chat(story, **BAD[name]).install(server)
    async with local(server, story) as made:
        told = await made.ask(stream=True)
        assert b"[DONE]" not in told.body and not told.whole
        last = json.loads(told.body.rpartition(b"data: ")[2])
        assert last["error"]["code"].startswith("receipt_")
        assert (made.state.receipts_verified, made.state.receipts_refused) == (0, 1)
        assert made.state.last_refusal.startswith("RECEIPT_")


@pytest.mark.parametrize("how", [{"key": 1}, {"edit_sealed": lambda raw: raw.replace(b"rcpt", b"rcpu", 1)}])
async def test_answer_whose_receipt_is_wrong_does_not_pass(server: Server, story: Genuine, how: dict) -> None:  # type: ignore[type-arg]
    Chat(story, **how).install(server)
    async with local(server, story) as made:
        told = await made.ask()
        assert told.status == 502 and TEXT.encode() not in told.body
        assert told.headers[b"x-should-retry"] == b"false"
        assert made.state.receipts_refused == 1


@pytest.mark.parametrize("headers", ["", "x-receipt-id: ../models\r\n", "x-receipt-id: nobody-has-it\r\n"])
async def test_answer_that_names_no_receipt_does_not_pass(server: Server, story: Genuine, headers: str) -> None:
    server.routes[CHAT] = answer(b'{"choices":[]}', headers=headers)
    async with local(server, story) as made:
        told = await made.ask()
        assert (told.status, told.error) == (502, "receipt_missing")
    well_formed = "nobody" in headers  # only such a name is asked for
    assert server.requests == [PROVE, CHAT, *["GET /v1/aci/receipts/nobody-has-it"] * well_formed]


async def test_without_the_check_a_wrong_receipt_would_pass(
    server: Server, story: Genuine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for the tests above."""
    monkeypatch.setattr(module.Proxy, "_settle", lambda self, exchange: None)
    Chat(story, key=1).install(server)
    async with local(server, story) as made:
        assert (await made.ask()).status == 200


# the service


@pytest.mark.parametrize("wrong", [{"config": b"c" * 32}, {"names": ("other.test",)}, {"statement_keys": (5,)}])
async def test_service_that_is_not_accepted_gets_no_byte_of_the_request(wrong: dict) -> None:  # type: ignore[type-arg]
    story = genuine()
    lie = genuine(**wrong)
    with served(lie) as server:
        async with local(server, story, warm=False) as made:
            told = await made.ask()
        assert told.status == 502
        assert made.state.verdict == "refused" and made.state.last_refusal.lower().startswith(told.error)
        assert PROMPT.encode() not in server.received and b"sk-test" not in server.received


async def test_service_that_is_not_there(story: Genuine) -> None:
    with served(story) as server:
        made_for = local(server, story)
        made = await made_for.__aenter__()
    try:
        told = await made.ask()
        assert (told.status, told.error) == (502, "transport_connect")
    finally:
        await made_for.__aexit__(None, None, None)


async def test_connection_is_not_used_beyond_its_verdict_or_its_age(server: Server, story: Genuine) -> None:
    now = [float(story.now)]
    async with local(server, story, clock=lambda: now[0]) as made:
        await made.ask("GET", "/v1/models", b"")
        now[0] = story.now + 2999
        await made.ask("GET", "/v1/models", b"")
        assert made.upstream.dialled == 1
        now[0] = story.now + 3001  # the status list has ended
        assert (await made.ask("GET", "/v1/models", b"")).error == "status_expired"
    async with local(server, story, max_age=0.0) as made:
        await made.ask("GET", "/v1/models", b"")
        await made.ask("GET", "/v1/models", b"")
        assert made.upstream.dialled == 2


async def test_certificate_that_changes_is_judged_before_the_next_request_on_a_new_connection(story: Genuine) -> None:
    with served(story) as server:
        async with local(server, story) as made:
            assert (await made.ask("GET", "/v1/models", b"")).status == 404
            made.upstream.close_idle()
            show(server, genuine(key=1, config=b"c" * 32))
            told = await made.ask()
            assert told.status == 502 and PROMPT.encode() not in server.received


HOSTILE = {
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20000,
    "both framings": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "fields after the body": b"HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: y\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_answer_that_is_none_is_an_error_and_ends_the_connection(
    server: Server, story: Genuine, name: str
) -> None:
    server.routes[CHAT] = HOSTILE[name]
    async with local(server, story) as made:
        told = await made.ask()
        assert told.status in (404, 502) and not (told.status == 404 and told.whole)
        assert made.upstream.counts[1] == 0
        Chat(story).install(server)
        assert (await made.ask()).status == 200


async def test_second_answer_to_one_request_is_never_given_to_the_next(server: Server, story: Genuine) -> None:
    server.routes["GET /v1/models"] = answer(b"{}") + answer(b'"smuggled"')
    async with local(server, story) as made:
        assert (await made.ask("GET", "/v1/models", b"")).body == b"{}"
        await asyncio.sleep(0.05)
        assert made.upstream.counts[1] == 0
        assert b"smuggled" not in (await made.ask("GET", "/v1/models", b"")).body


@pytest.mark.parametrize("stream", [True, False])
async def test_answer_that_is_cut_is_no_answer(server: Server, story: Genuine, stream: bool) -> None:
    whole = chunked(b"data: 1\n\n", b"data: 2\n\n") if stream else answer(b'{"choices":[]}' * 50)

    def cut(connection: Connection, body: bytes) -> bytes:
        connection.tls.sendall(whole[: len(whole) // 2])
        return b""

    server.routes[CHAT] = cut
    async with local(server, story) as made:
        told = await made.ask()
        assert not (told.status == 200 and told.whole)
        assert b"transport_ended" in told.body


async def test_program_that_hangs_up_ends_the_request_at_the_service(server: Server, story: Genuine) -> None:
    gone, begun = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(connection: Connection, body: bytes) -> bytes:
        connection.tls.sendall(chunked(b"data: 1\n\n", headers="x-receipt-id: rcpt-1\r\n")[:-5])
        loop.call_soon_threadsafe(begun.set)
        connection.tls.recv(1)  # until the proxy hangs up
        return b""

    server.routes[CHAT] = slow
    async with local(server, story) as made:
        asked = asyncio.create_task(made.ask(stream=True, hang_up=gone))
        await begun.wait()
        gone.set()
        told = await asked
        assert not told.whole and made.state.gone == 1
        await asyncio.to_thread(server.wait_idle)
        assert made.upstream.counts == (0, 0)


# who may ask


@pytest.mark.parametrize("host", [b"127.0.0.1:8080", b"localhost", b"LOCALHOST:1", b"[::1]:8080"])
async def test_loopback_names_are_served(server: Server, story: Genuine, host: bytes) -> None:
    async with local(server, story) as made:
        assert (await made.ask("GET", "/v1/models", b"", headers=((b"host", host),))).status == 404


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        (((b"host", b"rebound.test:8080"),), "proxy_host"),
        (((b"host", b""),), "proxy_host"),
        ((), "proxy_host"),
        (((b"host", b"127.0.0.1.rebound.test"),), "proxy_host"),
        (((b"host", b"localhost"), (b"origin", b"https://elsewhere.test")), "proxy_origin"),
        (((b"host", b"localhost"), (b"origin", b"null")), "proxy_origin"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/vouchsafe/status", "/vouchsafe/status.json"])
async def test_pages_of_elsewhere_get_nothing(
    server: Server, story: Genuine, headers: tuple[tuple[bytes, bytes], ...], code: str, path: str
) -> None:
    async with local(server, story) as made:
        told = await made.ask("GET", path, b"", headers=headers)
        assert (told.status, told.error) == (403, code)
    assert not server.connections


async def test_host_and_origin_stand_once(server: Server, story: Genuine) -> None:
    async with local(server, story) as made:
        for name, first, second in ((b"host", b"evil.test", b"localhost"), (b"origin", b"null", b"http://localhost")):
            told = await made.ask("GET", "/v1/models", b"", headers=(*HEADERS, (name, first), (name, second)))
            assert (told.status, told.error) == (400, "proxy_headers")
    assert not server.connections


async def test_token_is_asked_for_beyond_loopback_and_stays_here(server: Server, story: Genuine) -> None:
    token = b"t" * 32
    async with local(server, story, guard=Guard(token)) as made:
        named = (b"host", b"box.lan:8080")
        for wrong in ((), ((b"x-vouchsafe-token", b"u" * 32),), ((b"x-vouchsafe-token", b""),)):
            told = await made.ask("GET", "/v1/models", b"", headers=(named, *wrong))
            assert (told.status, told.error) == (401, "proxy_token")
        assert not server.connections
        assert (await made.ask("GET", "/v1/models", b"", headers=(named, (b"x-vouchsafe-token", token)))).status == 404
    assert token not in server.received


@pytest.mark.parametrize(
    ("method", "path", "query", "status"),
    [
        ("GET", "/v2/models", b"", 404), ("GET", "/", b"", 404), ("GET", "/v1", b"", 404),
        ("GET", "/v1/../health", b"", 404), ("GET", "/v1/%2e%2e/x", b"\x00", 404), ("GET", "/v1/a b", b"", 404),
        ("GET", "//v1/models", b"", 404), ("GET", "/.well-known/vouchsafe/channel", b"", 404),
        ("OPTIONS", "/v1/models", b"", 405), ("TRACE", "/v1/models", b"", 405), ("PUT", "/v1/models", b"", 405),
        ("POST", "/vouchsafe/status", b"", 404),
    ],
)  # fmt: skip
async def test_other_paths_and_methods_are_not_passed_on(
    server: Server, story: Genuine, method: str, path: str, query: bytes, status: int
) -> None:
    async with local(server, story) as made:
        assert (await made.ask(method, path, b"", query=query)).status == status
    assert not server.connections


async def test_request_too_long_is_not_passed_on(
    server: Server, story: Genuine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REQUEST", 1000)
    async with local(server, story) as made:
        assert (await made.ask(body=b"{}".ljust(1001))).status == 413
        assert not server.connections
        assert (await made.ask(body=b"{}".ljust(1000))).status == 200


# the status page


async def test_status_page_tells_verdict_and_counts_and_no_content(server: Server, story: Genuine) -> None:
    async with local(server, story) as made:
        await made.ask()
        made.state.accept(made.session.last_result)  # type: ignore[arg-type]  # there is one
        facts = json.loads((await made.ask("GET", "/vouchsafe/status.json", b"")).body)
        assert (facts["verdict"], facts["requests"], facts["receipts_verified"]) == ("accepted", 1, 1)
        assert facts["operator"] and facts["channel"]["group"] == "X25519MLKEM768"
        told = await made.ask("GET", "/vouchsafe/status", b"")
        assert b"default-src 'none'" in told.headers[b"content-security-policy"]
        for content in (PROMPT, TEXT, "sk-test"):
            assert content.encode() not in told.body and content not in json.dumps(facts)


def test_status_page_escapes_what_others_chose() -> None:
    made = page({"verdict": "refused", "target": "https://x.test", "last_refusal": "<script>alert(1)</script>\x1b[31m"})
    assert "<script" not in made and "\x1b" not in made
