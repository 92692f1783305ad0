"""The gateway against the echo engine: what is served, what is refused, what the engine gets to see."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from attestation.receipt import Receipt
from enclave.access import KeyCheck
from enclave.api import inference
from enclave.api.app import Gateway
from enclave.engine.base import ASGIApp, Receive, Scope, Send
from enclave.engine.echo import EchoEngine, Fault
from enclave.receipts import ReceiptStore
from tests.enclave.api.client import API_KEY, CHAT, Caller, Connection, Identity, Reply, chat_body

COMPLETIONS = "/v1/completions"


def gateway(engine: EchoEngine, *, ready: bool = True, public: dict[tuple[str, str], ASGIApp] | None = None) -> Gateway:
    return Gateway(
        engines={engine.model_id: engine},
        access=KeyCheck(hashlib.sha256(API_KEY.encode()).hexdigest()),
        receipts=ReceiptStore(),
        public=public or {},
        ready=lambda: ready,
    )


@pytest.fixture
async def engine() -> EchoEngine:
    made = EchoEngine("parrot")
    await made.start()
    return made


@pytest.fixture
def caller(engine: EchoEngine) -> Caller:
    return Caller(gateway(engine))


def events(reply: Reply) -> list[bytes]:
    return [e + b"\n\n" for e in reply.body.split(b"\n\n")[:-1]]


# --- routes -----------------------------------------------------------------------------------------------------------


def test_route_table_is_exactly_this(engine: EchoEngine) -> None:
    assert gateway(engine).routes == {
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{id}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/aci/receipts/{id}"),
    }


@pytest.mark.parametrize(
    "route",
    [
        "GET /",
        "GET /metrics",
        "GET /health",
        "GET /openapi.json",
        "GET /docs",
        "GET /version",
        "POST /tokenize",
        "POST /invocations",
        "POST /v1/responses",
        "POST /v1/embeddings",
        "POST /scale_elastic_ep",
        "POST /v1/chat/completions/render",
        "POST /v1/chat/completions/",
        "POST //v1/chat/completions",
        "GET /v1/chat/completions",
        "OPTIONS /v1/chat/completions",
        "HEAD /v1/models",
        "DELETE /v1/models/parrot",
        "GET /v1/models/",
        "GET /v1/aci/receipts",
    ],
)
async def test_route_outside_the_table_is_404_and_never_reaches_the_engine(
    route: str, caller: Caller, engine: EchoEngine
) -> None:
    method, path = route.split(" ")
    reply = await caller.request(method, path, json.dumps(chat_body()).encode())
    assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    assert path not in reply.error["message"]
    assert not engine.calls


async def test_percent_encoded_spelling_of_a_route_is_not_the_route(engine: EchoEngine) -> None:
    app = gateway(engine)

    async def encoded(scope: Scope, receive: Receive, send: Send) -> None:
        scope["raw_path"] = b"/v1/%63hat/completions"
        await app(scope, receive, send)

    assert (await Caller(encoded).chat()).status == 404


async def test_websocket_is_refused(engine: EchoEngine) -> None:
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await gateway(engine)({"type": "websocket", "path": CHAT}, receive, send)
    assert sent == ["websocket.close"]


async def test_public_route_needs_no_key_and_carries_our_headers(engine: EchoEngine) -> None:
    async def live(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"x-own", b"1"), (b"cache-control", b"max-age=1")],
            }
        )
        await send({"type": "http.response.body", "body": b"ok"})

    reply = await Caller(gateway(engine, public={("GET", "/health/live"): live}), key=None).get("/health/live")
    assert (reply.status, reply.body, reply.headers["x-own"]) == (200, b"ok", "1")
    assert reply.headers["cache-control"] == "max-age=1"
    assert reply.headers["x-aci-version"] == "aci/1"


def test_public_route_can_not_stand_over_ours(engine: EchoEngine) -> None:
    for key in (("POST", CHAT), ("GET", "/v1/models/x")):
        with pytest.raises(ValueError, match="twice"):
            gateway(engine, public={key: engine.app})


async def test_models_are_listed_and_retrieved(caller: Caller) -> None:
    listed = (await caller.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["parrot"]
    assert (await caller.get("/v1/models/parrot")).json() == listed["data"][0]
    missing = await caller.get("/v1/models/other")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


async def test_every_answer_carries_ids_and_keyset(caller: Caller) -> None:
    digest = caller.connection.identity.keyset_digest
    seen = set()
    replies = [
        await caller.chat(),
        await caller.chat(stream=True),
        await caller.get("/v1/models"),
        await caller.get("/nowhere"),
        await caller.post(CHAT, {"bad": 1}),
        await Caller(caller.app, key="wrong").chat(),
    ]
    for reply in replies:
        assert reply.headers["x-aci-keyset-digest"] == digest
        assert reply.headers["x-aci-version"] == "aci/1"
        assert reply.headers["openai-version"] == "2020-10-01"
        assert int(reply.headers["openai-processing-ms"]) >= 0
        seen.add(reply.headers["x-request-id"])
    assert len(seen) == len(replies)
    assert [("x-receipt-id" in r.headers) for r in replies] == [True, True, False, False, True, True]


async def test_client_request_id_is_echoed_only_when_short_and_safe(caller: Caller) -> None:
    assert (await caller.chat(headers={"x-client-request-id": "abc-1"})).headers["x-client-request-id"] == "abc-1"
    for bad in ("a b", "a" * 65, "é"):
        assert "x-client-request-id" not in (await caller.chat(headers={"x-client-request-id": bad})).headers


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", API_KEY, f"Basic {API_KEY}", f"Bearer {API_KEY} x", "Bearer " + "a" * 999],
)
@pytest.mark.parametrize("route", ["GET /v1/models", "GET /v1/models/parrot", f"POST {CHAT}", f"POST {COMPLETIONS}"])
async def test_without_the_key_nothing_is_served(
    authorization: str, route: str, caller: Caller, engine: EchoEngine
) -> None:
    method, path = route.split(" ")
    body = json.dumps(chat_body()).encode()
    reply = await caller.request(method, path, body, headers={"authorization": authorization})
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert not engine.calls


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="broken"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'{"model":"parrot"}\x00', id="nul"),
        pytest.param(b'{"model":"parrot","model":"other"}', id="duplicate"),
        pytest.param(b'{"model":"parrot","temperature":NaN}', id="nan"),
        pytest.param(b'{"model":"parrot","temperature":1e999}', id="infinity"),
        pytest.param(b'{"model":"parrot","user":"\\ud800"}', id="surrogate"),
        pytest.param(b'\xff\xfe{"a":1}', id="not-utf8"),
        pytest.param(b"[" * 100_000, id="deep-list"),
        pytest.param(b'{"tools":' + b"[" * 200 + b"]" * 200 + b"}", id="deep"),
        pytest.param(b'{"seed":' + b"9" * 5000 + b"}", id="huge-integer"),
    ],
)
async def test_body_that_is_not_one_strict_json_object_is_400(body: bytes, caller: Caller, engine: EchoEngine) -> None:
    reply = await caller.request("POST", CHAT, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert not engine.calls


async def test_body_over_the_cap_is_cut_off_without_reading_on(caller: Caller, engine: EchoEngine) -> None:
    chunks = [b"x" * (1 << 20)] * 9
    reply = await caller.request("POST", CHAT, chunks=chunks)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert len(chunks) == 4
    assert "x-receipt-id" not in reply.headers


async def test_body_that_does_not_arrive_is_408(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "READ_SECONDS", 0.05)

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        async def silent() -> Any:
            await asyncio.Event().wait()

        await caller.app(scope, silent, send)

    reply = await Caller(never).chat()
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-encoding": "gzip"}])
async def test_other_media_types_are_415(headers: dict[str, str], caller: Caller) -> None:
    assert (await caller.chat(headers=headers)).status == 415


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": None}, 400, "missing_required_parameter", "model"),
        ({"model": 3}, 400, "invalid_type", "model"),
        ({"model": "gpt-5"}, 404, "model_not_found", None),
        ({"store": True}, 400, "unsupported_parameter", "store"),
        ({"store": 0}, 400, "unsupported_parameter", "store"),
        ({"metadata": {}}, 400, "unsupported_parameter", "metadata"),
        ({"background": True}, 400, "unsupported_parameter", "background"),
        ({"previous_response_id": "x"}, 400, "unsupported_parameter", "previous_response_id"),
        ({"prompt_cache_retention": "24h"}, 400, "unsupported_parameter", "prompt_cache_retention"),
        ({"chat_template": "{{x}}"}, 400, "unsupported_parameter", "chat_template"),
        ({"kv_transfer_params": {}}, 400, "unknown_parameter", "kv_transfer_params"),
        ({"vllm_xargs": {}}, 400, "unknown_parameter", "vllm_xargs"),
        ({"request_id": "x"}, 400, "unknown_parameter", "request_id"),
        ({"priority": -1}, 400, "unknown_parameter", "priority"),
        ({"prompt_embeds": "x"}, 400, "unknown_parameter", "prompt_embeds"),
        ({"mm_processor_kwargs": {}}, 400, "unknown_parameter", "mm_processor_kwargs"),
        ({"strange field\n": 1}, 400, "unknown_parameter", None),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": 9}, 400, "invalid_value", "n"),
        ({"n": True}, 400, "invalid_type", "n"),
        ({"stream": "yes"}, 400, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, 400, "unknown_parameter", "stream_options.x"),
        ({"cache_salt": ""}, 400, "invalid_type", "cache_salt"),
        ({"tools": ["x" * 70000]}, 400, "invalid_value", "tools"),
        ({"provider": {"aci_new": 1}}, 400, "unsupported_parameter", "provider.aci_new"),
        ({"provider": {"aci_session_ids": ["00" * 32]}}, 412, "session_not_accepted", "provider.aci_session_ids"),
        ({"provider": {"aci_session_ids": []}}, 400, "invalid_value", "provider.aci_session_ids"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            400,
            "unsupported_content",
            "messages[0].content",
        ),
    ],
)
async def test_field_that_is_not_allowed_is_refused_by_name(
    fields: dict[str, Any], status: int, code: str, param: str | None, caller: Caller, engine: EchoEngine
) -> None:
    reply = await caller.chat(**fields)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (status, code, param)
    assert not engine.calls


async def test_fields_of_one_route_are_not_fields_of_the_other(caller: Caller) -> None:
    assert (await caller.chat(prompt="x")).error["param"] == "prompt"
    body = {"model": "parrot", "prompt": "x", "messages": []}
    assert (await caller.post(COMPLETIONS, body)).error["param"] == "messages"


# --- what the engine sees ---------------------------------------------------------------------------------------------


async def test_engine_sees_three_headers_of_ours_and_the_rewritten_body(caller: Caller, engine: EchoEngine) -> None:
    reply = await caller.chat(
        headers={"x-request-id": "mine", "x-data-parallel-rank": "1", "cookie": "a=b"},
        temperature=0.5,
        user="alice",
        store=False,
        provider={"zdr": True, "aci_verified": True, "data_collection": "deny"},
    )
    assert reply.status == 200
    call = engine.calls[0]
    assert [name for name, _ in call.headers] == [b"content-type", b"content-length", b"accept"]
    assert dict(call.headers)[b"content-length"] == str(len(call.body)).encode()
    seen = json.loads(call.body)
    assert set(seen) == {"model", "messages", "temperature", "cache_salt"}
    parsed = Receipt.parse(await caller.receipt(reply))
    assert parsed.forwarded == hashlib.sha256(call.body).digest()
    rewritten = next(e for e in parsed.event_log if e["type"] == "x.request.rewritten")
    assert (rewritten["set"], rewritten["removed"]) == (["cache_salt"], ["user", "provider", "store"])


async def test_cache_salt_is_ours_and_differs_by_caller_and_boot(engine: EchoEngine, caller: Caller) -> None:
    async def salt(of: Caller, **fields: Any) -> str:
        await of.chat(**fields)
        made: str = json.loads(engine.calls[-1].body)["cache_salt"]
        return made

    plain = await salt(caller)
    assert plain == await salt(caller)
    chosen = await salt(caller, cache_salt=plain)
    other_boot = await salt(Caller(gateway(engine)))
    assert len({plain, chosen, other_boot}) == 3
    assert all(len(s) == 43 and s.replace("-", "").replace("_", "").isalnum() for s in (plain, chosen, other_boot))


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_whole_answer_is_the_engines_and_its_receipt_verifies(caller: Caller) -> None:
    request = json.dumps(chat_body("hello world")).encode()
    reply = await caller.request("POST", CHAT, request)
    assert (reply.status, reply.complete) == (200, True)
    assert reply.json()["choices"][0]["message"]["content"] == "hello world"
    raw = await caller.receipt(reply)
    checks = caller.verify(raw, request=request, response=reply.body)
    assert not checks.failed
    parsed = Receipt.parse(raw)
    assert (parsed.model, parsed.endpoint, parsed.chat_id) == ("parrot", CHAT, "chatcmpl-echo")
    assert [e["type"] for e in parsed.event_log] == [
        "request.received",
        "x.request.rewritten",
        "request.forwarded",
        "response.returned",
    ]
    assert (await caller.get("/v1/aci/receipts/chatcmpl-echo")).body == raw


async def test_stream_is_event_by_event_and_its_receipt_verifies(caller: Caller) -> None:
    request = json.dumps(chat_body("one two three", stream=True)).encode()
    reply = await caller.request("POST", CHAT, request)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.complete
    made = events(reply)
    assert made[-1] == b"data: [DONE]\n\n"
    assert made[-2].startswith(b": vouchsafe receipt=" + reply.headers["x-receipt-id"].encode() + b" chain=")
    assert len(made) == 5
    assert len(reply.writes) == 4
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    parsed = Receipt.parse(raw)
    assert parsed.chain is not None
    assert (parsed.chain.events, parsed.chain.size, parsed.outcome) == (5, len(reply.body), "completed")


async def test_comment_before_done_names_the_chain_up_to_there(caller: Caller) -> None:
    from attestation.sse import StreamChain

    request = json.dumps(chat_body("one two", stream=True)).encode()
    reply = await caller.request("POST", CHAT, request)
    chain = StreamChain(reply.headers["x-receipt-id"], hashlib.sha256(request).digest())
    for event in events(reply)[:-2]:
        chain.update(event)
    assert chain.head.hex().encode() in events(reply)[-2]


async def test_inline_receipt_comes_after_done_when_asked_for(caller: Caller) -> None:
    from attestation.sse import split_inline

    request = json.dumps(chat_body("one two", stream=True)).encode()
    reply = await caller.request("POST", CHAT, request, headers={"x-vouchsafe-receipt": "inline"})
    body, raw = split_inline(reply.body)
    assert body.endswith(b"data: [DONE]\n\n")
    assert raw is not None
    assert raw == await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    plain = await caller.request("POST", CHAT, request)
    assert split_inline(plain.body)[1] is None


async def test_completions_are_served_both_ways(caller: Caller) -> None:
    whole = await caller.post(COMPLETIONS, {"model": "parrot", "prompt": "a b"})
    assert whole.json()["choices"][0]["text"] == "a b"
    streamed = await caller.post(COMPLETIONS, {"model": "parrot", "prompt": "a b", "stream": True})
    assert events(streamed)[-1] == b"data: [DONE]\n\n"


async def test_receipt_names_the_keyset_of_the_connection_of_its_request(engine: EchoEngine) -> None:
    app = gateway(engine)
    first, second = Caller(app, connection=Connection(Identity(1))), Caller(app, connection=Connection(Identity(2)))
    replies = [await first.chat(), await second.chat()]
    for reply, identity in zip(replies, (first.connection.identity, second.connection.identity), strict=True):
        assert reply.headers["x-aci-keyset-digest"] == identity.keyset_digest
        assert Receipt.parse(await second.receipt(reply)).keyset_digest == identity.keyset_digest


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "stream", "status", "code"),
    [
        ("reject", False, 400, "invalid_value"),
        ("reject", True, 400, "invalid_value"),
        ("crash", False, 500, "server_error"),
        ("crash", True, 500, "server_error"),
        ("raise", False, 500, "server_error"),
        ("raise", True, 500, "server_error"),
        ("error-first", True, 500, "server_error"),
        ("no-stream", True, 500, "server_error"),
    ],
)
async def test_engine_error_has_openais_shape_and_a_receipt(
    fault: Fault, stream: bool, status: int, code: str, caller: Caller, engine: EchoEngine
) -> None:
    engine.fault = fault
    request = json.dumps(chat_body("CANARY", stream=stream)).encode()
    reply = await caller.request("POST", CHAT, request)
    assert (reply.status, reply.error["code"], reply.complete) == (status, code, True)
    if status == 500:
        assert b"no such luck" not in reply.body
    assert b"canary" not in reply.body.lower()
    assert b"secret" not in reply.body
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    assert Receipt.parse(raw).forwarded is not None


@pytest.mark.parametrize("fault", ["error-event", "no-done"])
async def test_stream_that_breaks_ends_with_an_error_and_a_cut_never_with_done(
    fault: Fault, caller: Caller, engine: EchoEngine
) -> None:
    engine.fault = fault
    request = json.dumps(chat_body("one two three", stream=True)).encode()
    reply = await caller.request("POST", CHAT, request, headers={"x-vouchsafe-receipt": "inline"})
    assert reply.status == 200
    assert not reply.complete, "the answer must be left unfinished, so that the server cuts the connection"
    assert b"[DONE]" not in reply.body
    assert b"vouchsafe-receipt" not in reply.body
    last = json.loads(events(reply)[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "server_error"
    raw = await caller.receipt(reply)
    assert [c.code for c in caller.verify(raw, request=request, response=reply.body).failed] == ["RECEIPT_OUTCOME"]
    assert not caller.verify(raw, request=request, response=reply.body, allow_cut=True).failed


async def test_engine_that_dies_in_mid_stream_is_an_error_and_a_cut(caller: Caller, engine: EchoEngine) -> None:
    engine.fault = "hang"
    running = asyncio.create_task(caller.chat("one two three", stream=True))
    await asyncio.sleep(0.05)
    assert not running.done()
    engine.die("killed")
    reply = await asyncio.wait_for(running, 2)
    assert not reply.complete
    assert json.loads(events(reply)[-1].removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    after = await caller.chat()
    assert (after.status, after.error["code"]) == (503, "engine_unavailable")
    assert after.headers["x-should-retry"] == "false"
    assert len(engine.calls) == 1


async def test_engine_that_falls_silent_is_given_up(
    caller: Caller, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "IDLE_SECONDS", 0.05)
    engine.fault = "hang"
    reply = await asyncio.wait_for(caller.chat("one two three", stream=True), 2)
    assert not reply.complete
    assert b"engine_unavailable" in events(reply)[-1]


async def test_hang_up_reaches_the_engine_and_leaves_a_receipt_of_what_was_emitted(
    caller: Caller, engine: EchoEngine
) -> None:
    engine.repeat, engine.delay = 500, 0.001
    request = json.dumps(chat_body("word", stream=True)).encode()
    reply = await asyncio.wait_for(caller.request("POST", CHAT, request, hang_up_after=3), 5)
    assert engine.calls[0].disconnected
    assert not engine.calls[0].finished
    assert not reply.complete
    raw = await caller.receipt(reply)
    parsed = Receipt.parse(raw)
    assert parsed.outcome == "client_disconnected"
    assert parsed.chain is not None
    assert parsed.chain.size == len(reply.body)
    assert not caller.verify(raw, request=request, response=reply.body, allow_cut=True).failed
    shorter = reply.body[: len(reply.writes[0]) + 5]
    assert not caller.verify(raw, request=request, response=shorter, allow_cut=True).failed


async def test_hang_up_while_a_whole_answer_is_made_reaches_the_engine(caller: Caller, engine: EchoEngine) -> None:
    engine.delay = 30

    async def impatient(scope: Scope, receive: Receive, send: Send) -> None:
        asked = 0

        async def leaving() -> Any:
            nonlocal asked
            asked += 1
            return await receive() if asked == 1 else {"type": "http.disconnect"}

        await caller.app(scope, leaving, send)

    reply = await asyncio.wait_for(Caller(impatient).chat(), 5)
    assert reply.status == 0
    assert engine.calls[0].disconnected


async def test_caller_that_does_not_read_is_hung_up_on(
    caller: Caller, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.api.exchange.WRITE_SECONDS", 0.05)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        async def slow(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()
            await send(message)

        await caller.app(scope, receive, slow)

    await asyncio.wait_for(Caller(stuck).chat("a b c", stream=True), 5)
    assert engine.calls[0].disconnected


async def test_not_ready_is_503(engine: EchoEngine) -> None:
    reply = await Caller(gateway(engine, ready=False)).chat()
    assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")


async def test_more_requests_than_allowed_are_503_with_a_time_to_come_back(
    caller: Caller, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_RUNNING", 1)
    engine.delay = 0.2
    first, second = await asyncio.gather(caller.chat(), caller.chat())
    assert sorted((first.status, second.status)) == [200, 503]
    refused = first if first.status == 503 else second
    assert refused.headers["retry-after"] == "1"
    assert (await caller.chat()).status == 200


async def test_fault_of_ours_tells_nothing(engine: EchoEngine) -> None:
    class Broken(ReceiptStore):
        def add(self, *args: Any, **kw: Any) -> None:
            raise RuntimeError("CANARY")

    app = Gateway(
        engines={"parrot": engine},
        access=KeyCheck(hashlib.sha256(API_KEY.encode()).hexdigest()),
        receipts=Broken(),
        public={},
        ready=lambda: True,
    )
    reply = await Caller(app).chat()
    assert (reply.status, reply.error["code"]) == (500, "server_error")
    assert b"CANARY" not in reply.body
    streamed = await Caller(app).chat(stream=True)
    assert not streamed.complete
    assert b"[DONE]" not in streamed.body


# --- receipts of refusals ---------------------------------------------------------------------------------------------


async def test_refusal_has_a_receipt_without_forwarding(caller: Caller) -> None:
    request = json.dumps(chat_body(model="gpt-5")).encode()
    reply = await caller.request("POST", CHAT, request)
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    parsed = Receipt.parse(raw)
    assert parsed.forwarded is None
    assert parsed.model is None, "an unknown model id is user text: it has no place in a receipt"


async def test_receipt_is_given_to_its_credential_only(caller: Caller) -> None:
    path = "/v1/aci/receipts/" + (await caller.chat()).headers["x-receipt-id"]
    assert (await caller.get(path)).status == 200
    nobody = await Caller(caller.app, key=None).get(path)
    assert (nobody.status, nobody.error["type"]) == (401, "unauthorized")
    stranger = await Caller(caller.app, key="sk-other").get(path)
    unknown = await Caller(caller.app, key="sk-other").get("/v1/aci/receipts/rcpt-00")
    assert (stranger.status, stranger.body) == (404, unknown.body)


async def test_receipt_of_a_refused_stranger_is_had_by_its_id(caller: Caller) -> None:
    stranger = Caller(caller.app, key="wrong")
    reply = await stranger.chat()
    raw = await stranger.receipt(reply)
    assert not stranger.verify(raw, request=json.dumps(chat_body()).encode(), response=reply.body).failed
