"""`/v1/messages` as Anthropic's own SDK uses it, through a server that speaks HTTP."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enclave.api.errors import Refused
from enclave.api.messages import count, token, translate
from enclave.api.requests import CHAT as CHAT_ROUTE
from enclave.api.requests import admit
from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import API_KEY, Caller, Connection
from tests.enclave.api.serving import events, gateway

PATH = "/v1/messages"
TOOL = {"name": "look", "description": "d", "input_schema": {"type": "object"}}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 2}}


@pytest.fixture
async def sdk(engine: EchoEngine) -> anthropic.AsyncAnthropic:
    app, connection = await gateway(engine), Connection()

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "vouchsafe": connection}, receive, send)

    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=inside), base_url="https://enclave.test")
    return anthropic.AsyncAnthropic(api_key=API_KEY, base_url="https://enclave.test", http_client=http, max_retries=0)


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def told(document: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return translate({"model": "parrot", "max_tokens": 9, "messages": say("x"), **document}, id="msg_1", created=1)


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


async def test_sdk_gets_a_whole_answer_and_its_errors(sdk: anthropic.AsyncAnthropic) -> None:
    answer = await sdk.messages.create(model="parrot", max_tokens=20, system="brief", messages=say("hello world"))
    Message.model_validate(answer.to_dict(mode="python"))
    assert [b.text for b in answer.content if b.type == "text"] == ["hello world"]
    assert (answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens) == ("end_turn", 2, 2)
    cut = await sdk.messages.create(model="parrot", max_tokens=1, messages=say("hello world"))
    assert cut.stop_reason == "max_tokens"
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        await sdk.messages.create(model="nobody", max_tokens=1, messages=say("x"))
    with pytest.raises(anthropic.AuthenticationError):
        await sdk.with_options(api_key="sk-" + "x" * 43).messages.create(
            model="parrot", max_tokens=1, messages=say("x")
        )
    with pytest.raises(anthropic.BadRequestError):
        await sdk.messages.create(model="parrot", max_tokens=1, messages=say("x"), extra_body={"mcp_servers": []})


async def test_sdk_accumulates_a_stream_into_the_same_answer(sdk: anthropic.AsyncAnthropic) -> None:
    async with sdk.messages.stream(model="parrot", max_tokens=20, messages=say("one two three")) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "one two three" and final.stop_reason == "end_turn"
    assert (final.usage.input_tokens, final.usage.output_tokens) == (3, 3)


async def test_tokens_are_counted(sdk: anthropic.AsyncAnthropic) -> None:
    assert (await sdk.messages.count_tokens(model="parrot", messages=say("one two three"))).input_tokens == 3


async def test_stream_that_fails_is_an_error_event_and_a_cut(engine: EchoEngine) -> None:
    engine.fault = "error-event"
    body = {"model": "parrot", "max_tokens": 9, "messages": say("a b c"), "stream": True}
    reply = await Caller(await gateway(engine)).post(PATH, body)
    assert not reply.complete
    name, data = events(reply)[-1].strip().split(b"\n")
    assert name == b"event: error" and json.loads(data[6:])["error"]["type"] == "api_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_receipt_verifies_and_is_given_for_the_same_header(stream: bool, engine: EchoEngine) -> None:
    caller = Caller(await gateway(engine), key=None)
    request = json.dumps({"model": "parrot", "max_tokens": 9, "messages": say("a b"), "stream": stream}).encode()
    reply = await caller.request("POST", PATH, request, headers={"x-api-key": API_KEY})
    assert reply.status == 200
    path = "/v1/aci/receipts/" + reply.headers["x-receipt-id"]
    raw = (await caller.get(path, headers={"x-api-key": API_KEY})).body
    assert not caller.verify(raw, request=request, response=reply.body).failed
    assert json.loads(raw)["chat_id"].startswith("msg_")


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([(b"x-api-key", b"sk-1")], b"sk-1"), ([(b"authorization", b"Bearer sk-2")], b"sk-2"), ([], None),
        ([(b"x-api-key", b"sk-1"), (b"authorization", b"Bearer sk-2")], None),
        ([(b"x-api-key", b"sk-1"), (b"x-api-key", b"sk-1")], None), ([(b"x-api-key", b"a b")], None),
        ([(b"x-api-key", b"")], None), ([(b"x-api-key", b"x" * 513)], None),
    ],
)  # fmt: skip
def test_one_credential_stands_in_one_place(headers: list[tuple[bytes, bytes]], found: bytes | None) -> None:
    assert token(headers) == found


def test_blocks_become_messages() -> None:
    chat, _ = told({
        "system": [{"type": "text", "text": "sys", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "seen"}]},
                {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                {"type": "text", "text": "and"}]},
        ],
        "tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"], "temperature": 1, "top_p": 0.5, "top_k": 3, "stream": True,
        "metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "service_tier": "auto",
    })  # fmt: skip
    assert [m["role"] for m in chat["messages"]] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert json.loads(chat["messages"][2]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert chat["messages"][4]["content"] == "Error: no" and chat["messages"][5]["content"] == "and"
    assert (chat["tool_choice"], chat["parallel_tool_calls"], chat["stop"], chat["user"]) == (
        "required", False, ["END"], "u",
    )  # fmt: skip
    admit(CHAT_ROUTE, chat, known=lambda id: True, allowed=lambda id: True, salt_key=bytes(32), key_id="key")


def test_calls_of_tools_and_stop_strings_are_told() -> None:
    _, dialect = told({"tools": [TOOL]})
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    choice = {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}
    whole = Message.model_validate(dialect.whole({"choices": [choice], "usage": USAGE}))
    assert (whole.stop_reason, whole.content[0].type) == ("tool_use", "tool_use")
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (3, 2)
    _, dialect = told({"stop_sequences": ["END"]})
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "stop_reason": "END"}
    assert dialect.whole({"choices": [choice], "usage": USAGE})["stop_sequence"] == "END"
    _, dialect = told({"tools": [TOOL]})
    raw = b"".join(dialect.chunk(c) for c in (
        chunk({"role": "assistant", "content": ""}), chunk({"content": "so"}),
        chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "look", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}), chunk({}, "tool_calls"),
        {"choices": [], "usage": USAGE},
    )) + b"".join(dialect.end())  # fmt: skip
    kinds = [json.loads(e.split(b"data: ")[1])["type"] for e in raw.split(b"\n\n")[:-1]]
    assert kinds == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "content_block_start",
        "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"container": "c"}, "container"), ({"mcp_servers": []}, "mcp_servers"), ({"color": 1}, "color"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x",
                                                     "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}]},
         "messages[0].content[0].cache_control"),
        ({"stop_sequences": [1]}, "stop_sequences"), ({"temperature": 2}, "temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        told(fields)
    assert (refused.value.refusal.status, refused.value.refusal.param) == (400, param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)  # fmt: skip
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"])},
    optional={"text": JSON, "id": JSON, "name": JSON, "input": JSON, "tool_use_id": JSON, "content": JSON},
)
FIELDS = ["system", "messages", "tools", "tool_choice", "metadata", "stop_sequences", "temperature", "top_k", "stream",
          "max_tokens", "thinking", "service_tier", "model"]  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.lists(BLOCK, max_size=3))
def test_any_json_is_refused_or_understood(document: dict[str, Any], blocks: list[Any]) -> None:
    turns = [{"role": "user", "content": blocks}, {"role": "assistant", "content": blocks}]
    for ask in ({"messages": turns}, document):
        try:
            chat, _ = told(ask)
        except Refused as refused:
            assert refused.refusal.status == 400
            continue
        json.dumps(chat)
        count({k: v for k, v in ask.items() if k in ("messages", "system", "tools")} | {"model": "parrot",
              "messages": ask.get("messages", say("x"))})  # fmt: skip
