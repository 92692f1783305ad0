"""`/v1/responses` as the official SDK uses it: answers and events are the SDK's own types, and add up."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from enclave.api.errors import Refused
from enclave.api.requests import CHAT as CHAT_ROUTE
from enclave.api.requests import admit
from enclave.api.responses import translate
from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import API_KEY, Caller, Connection
from tests.enclave.api.serving import events, gateway

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "look", "description": "d", "parameters": {"type": "object"}, "strict": True}


@pytest.fixture
async def sdk(engine: EchoEngine) -> AsyncOpenAI:
    app, connection = await gateway(engine), Connection()

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "vouchsafe": connection}, receive, send)

    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=inside), base_url="https://enclave.test")
    return AsyncOpenAI(api_key=API_KEY, base_url="https://enclave.test/v1", http_client=http, max_retries=0)


def told(document: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return translate({"model": "parrot", **document}, id="resp_0123", created=1)


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
                                  "prompt_tokens_details": {"cached_tokens": 2}}}  # fmt: skip


def stream_of(dialect: Any, chunks: list[dict[str, Any]]) -> list[Any]:
    rest, last = b"".join(dialect.chunk(c) for c in chunks), dialect.end()
    raw = rest + last[0] + last[1]
    made = []
    for event in raw.split(b"\n\n")[:-1]:
        name, data = event.split(b"\n", 1)
        document = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + document["type"].encode()
        made.append(EVENT.validate_python(document, strict=False))
    assert [e.sequence_number for e in made] == list(range(len(made)))
    return made


# --- through the SDK --------------------------------------------------------------------------------------------------


async def test_sdk_gets_a_whole_answer(sdk: AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model="parrot", input="hello world", instructions="be brief")
    Response.model_validate(answer.to_dict(mode="python"), strict=False)
    assert (answer.output_text, answer.status, answer.model) == ("hello world", "completed", "parrot")
    assert answer.store is False and answer.id.startswith("resp_")
    assert answer.usage is not None and answer.usage.total_tokens == 4


async def test_sdk_accumulates_a_stream_into_the_same_answer(sdk: AsyncOpenAI) -> None:
    async with sdk.responses.stream(model="parrot", input=[{"role": "user", "content": "one two three"}]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == "one two three" and final.usage is not None and final.usage.output_tokens == 3
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * 3, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip


async def test_answer_that_was_cut_short_says_so(sdk: AsyncOpenAI) -> None:
    whole = await sdk.responses.create(model="parrot", input="one two three", max_output_tokens=2)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    stream = await sdk.responses.create(model="parrot", input="one two three", max_output_tokens=2, stream=True)
    assert [e async for e in stream][-1].type == "response.incomplete"


async def test_failed_stream_ends_in_response_failed_and_a_cut(engine: EchoEngine) -> None:
    engine.fault = "error-event"
    reply = await Caller(await gateway(engine)).post(PATH, {"model": "parrot", "input": "a b c", "stream": True})
    assert not reply.complete
    last = json.loads(events(reply)[-1].split(b"\n")[1].removeprefix(b"data: "))
    assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
    assert b"secret" not in reply.body


@pytest.mark.parametrize("stream", [False, True])
async def test_receipt_names_the_response_and_covers_what_was_told(stream: bool, engine: EchoEngine) -> None:
    caller = Caller(await gateway(engine))
    request = json.dumps({"model": "parrot", "input": "a b", "stream": stream}).encode()
    reply = await caller.request("POST", PATH, request)
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    id = json.loads(raw)["chat_id"]
    assert id.startswith("resp_") and id.encode() in reply.body
    assert (await caller.get(f"/v1/aci/receipts/{id}")).body == raw
    assert b"[DONE]" not in reply.body


async def test_input_tokens_are_counted(sdk: AsyncOpenAI, engine: EchoEngine) -> None:
    counted = await sdk.responses.input_tokens.count(model="parrot", input="one two three")
    assert counted.input_tokens == 3
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.input_tokens.count(model="nobody", input="x")
    assert [c.path for c in engine.calls] == ["/tokenize"]


# --- translation ------------------------------------------------------------------------------------------------------


def test_items_become_messages() -> None:
    chat, _ = told({
        "instructions": "system words",
        "input": [
            {"role": "developer", "content": "dev"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"},
                                                            {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "seen"},
        ],
        "tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}, "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low"}, "max_output_tokens": 9, "temperature": 0.5, "top_p": 1, "stream": True,
        "top_logprobs": 3, "store": False, "user": "u", "metadata": {}, "previous_response_id": None,
        "background": False,
    })  # fmt: skip
    assert [m["role"] for m in chat["messages"]] == ["system", "system", "user", "assistant", "tool"]
    assert chat["messages"][2]["content"] == "a\nb" and len(chat["messages"][3]["tool_calls"]) == 2
    assert chat["tools"][0]["function"]["strict"] is True
    assert chat["response_format"]["json_schema"] == {"name": "n", "schema": {"type": "object"}}
    assert (chat["max_completion_tokens"], chat["reasoning_effort"], chat["top_logprobs"]) == (9, "low", 3)
    admit(CHAT_ROUTE, chat, known=lambda id: True, allowed=lambda id: True, salt_key=bytes(32), key_id="key")


def test_calls_of_tools_are_told_whole_and_in_events() -> None:
    _, dialect = told({"input": "x", "tools": [TOOL]})
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = dialect.whole({"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": USAGE["usage"]})
    response = Response.model_validate(whole)
    assert [o.type for o in response.output] == ["function_call"]
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens == 2
    _, dialect = told({"input": "x", "tools": [TOOL]})
    made = stream_of(dialect, [
        chunk({"role": "assistant", "content": ""}), chunk({"content": "so "}),
        chunk({"tool_calls": [{"index": 0, "id": "call_1", "type": "function",
                               "function": {"name": "look", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "call_2", "function": {"name": "look", "arguments": "{}"}}]}),
        chunk({}, "tool_calls"), USAGE,
    ])  # fmt: skip
    final = made[-1].response
    assert [(o.type, getattr(o, "arguments", None)) for o in final.output] == [
        ("message", None), ("function_call", '{"a":1}'), ("function_call", "{}"),
    ]  # fmt: skip
    assert [e.arguments for e in made if e.type == "response.function_call_arguments.done"] == ['{"a":1}', "{}"]
    assert len({o.id for o in final.output}) == 3


def test_thoughts_are_an_item_of_their_own() -> None:
    _, dialect = told({"input": "x"})
    made = stream_of(
        dialect, [chunk({"reasoning": "hm"}), chunk({"reasoning": "m"}), chunk({"content": "a"}, "stop"), USAGE]
    )
    assert [o.type for o in made[-1].response.output] == ["reasoning", "message"]
    assert made[-1].response.output[0].content[0].text == "hmm"


def test_logprobs_are_told() -> None:
    _, dialect = told({"input": "x", "include": ["message.output_text.logprobs"]})
    one = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    made = stream_of(dialect, [chunk({"content": "a"}, "stop", logprobs={"content": [one]}), USAGE])
    delta = next(e for e in made if e.type == "response.output_text.delta")
    assert delta.logprobs[0].logprob == made[-1].response.output[0].content[0].logprobs[0].logprob == -0.5


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"store": True}, "unsupported_parameter", "store"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "conv"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"prompt_cache_retention": "24h"}, "unsupported_parameter", "prompt_cache_retention"),
        ({"metadata": {"a": "b"}}, "unsupported_parameter", "metadata"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_tool", "tools[0].type"),
        ({"tools": [{"type": "mcp", "server_url": "https://x"}]}, "unsupported_tool", "tools[0].type"),
        ({"tools": [{"type": "code_interpreter"}]}, "unsupported_tool", "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x"}]}]},
         "unsupported_content", "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_content", "input[0].type"),
        ({"input": []}, "invalid_type", "input"),
        ({"input": "a\0b"}, "invalid_type", "input"),
        ({"max_output_tokens": 0}, "invalid_type", "max_output_tokens"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"color": "red"}, "unknown_parameter", "color"),
    ],
)  # fmt: skip
async def test_what_cannot_be_had_is_refused_by_name(
    fields: dict[str, Any], code: str, param: str, engine: EchoEngine
) -> None:
    reply = await Caller(await gateway(engine)).post(PATH, {"model": "parrot", "input": "x", **fields})
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, code, param)
    assert not engine.calls


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)  # fmt: skip
FIELDS = ["input", "instructions", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "stream",
          "store", "stream_options", "temperature", "top_p", "top_logprobs", "max_output_tokens", "parallel_tool_calls",
          "service_tier", "truncation", "background", "model"]  # fmt: skip
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"])},
    optional={"role": st.sampled_from(["user", "assistant", "x"]) | JSON, "content": JSON, "output": JSON, "name": JSON,
              "arguments": JSON, "call_id": JSON},
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(ITEM, max_size=3), max_size=4))
def test_any_json_is_refused_or_understood(document: dict[str, Any]) -> None:
    try:
        chat, _ = translate({"model": "parrot", "input": "x", **document}, id="resp_1", created=1)
    except Refused as refused:
        assert refused.refusal.status == 400
        return
    json.dumps(chat)
