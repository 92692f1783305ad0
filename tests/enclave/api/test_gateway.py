"""The gateway against the echo engine: what is served, what is refused, what the engine gets to see."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from attestation.receipt import Receipt
from enclave.api import inference
from enclave.api.admin import Admin
from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import API_KEY, CHAT, Caller, Connection, Identity, chat_body
from tests.enclave.api.serving import events, gateway

COMPLETIONS = "/v1/completions"


# --- routes -----------------------------------------------------------------------------------------------------------


async def test_route_table_is_exactly_this(engine: EchoEngine) -> None:
    """A route that is not here does not exist; one that is here has a key, a limit and a meter, or none to ask for."""
    assert (await gateway(engine)).routes - Admin.routes() == {
        ("POST", "/v1/responses"),
        ("POST", "/v1/responses/input_tokens"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/tokenize"),
        ("GET", "/v1/state"),
        ("POST", "/v1/state/bootstrap"),
        ("POST", "/v1/state/unlock"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{id}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
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
        "POST /invocations",
        "POST /scale_elastic_ep",
        "POST /v1/chat/completions/",
        "POST //v1/chat/completions",
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


@pytest.mark.parametrize(
    "route",
    [
        "GET /v1/embeddings",
        "GET /v1/chat/completions",
        "OPTIONS /v1/chat/completions",
        "HEAD /v1/models",
        "DELETE /v1/models/parrot",
        "POST /v1/chat/completions/render",
        "GET /v1/responses",
    ],
)
async def test_other_method_or_a_neighbour_of_a_route_is_refused_with_a_reason(
    route: str, caller: Caller, engine: EchoEngine
) -> None:
    method, path = route.split(" ")
    reply = await caller.request(method, path, json.dumps(chat_body()).encode())
    assert reply.status in (404, 405) and reply.error["code"] in ("method_not_allowed", "zero_data_retention")
    assert path not in reply.error["message"]
    assert not engine.calls


async def test_percent_encoded_spelling_of_a_route_is_not_the_route(engine: EchoEngine) -> None:
    app = await gateway(engine)

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

    await (await gateway(engine))({"type": "websocket", "path": CHAT}, receive, send)
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

    reply = await Caller(await gateway(engine, public={("GET", "/health/live"): live}), key=None).get("/health/live")
    assert (reply.status, reply.body, reply.headers["x-own"]) == (200, b"ok", "1")
    assert reply.headers["cache-control"] == "max-age=1"
    assert reply.headers["x-aci-version"] == "aci/1"


async def test_public_route_can_not_stand_over_ours(engine: EchoEngine) -> None:
    for key in (("POST", CHAT), ("GET", "/v1/models/x")):
        with pytest.raises(ValueError, match="twice"):
            await gateway(engine, public={key: engine.app})


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
    other_boot = await salt(Caller(await gateway(engine)))
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
        "x.usage.metered",
        "x.execution",
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
    app = await gateway(engine)
    first, second = Caller(app, connection=Connection(Identity(1))), Caller(app, connection=Connection(Identity(2)))
    replies = [await first.chat(), await second.chat()]
    for reply, identity in zip(replies, (first.connection.identity, second.connection.identity), strict=True):
        assert reply.headers["x-aci-keyset-digest"] == identity.keyset_digest
        assert Receipt.parse(await second.receipt(reply)).keyset_digest == identity.keyset_digest
