"""Several models behind one gateway: each request is served by the model it names, or by none; and `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import pytest

from attestation.receipt import Receipt
from enclave.api.embeddings import MAX_INPUTS
from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import CHAT, Caller, chat_body
from tests.enclave.api.serving import gateway

EMBEDDINGS = "/v1/embeddings"
COMPLETIONS = "/v1/completions"


class Healing(EchoEngine):
    """One that will be back."""

    retry_after = 7  # type: ignore[assignment]  # the echo's own never is


@pytest.fixture
async def engines() -> tuple[EchoEngine, EchoEngine, EchoEngine]:
    made = (EchoEngine("parrot"), Healing("second"), EchoEngine("magpie", "embed"))
    for one in made:
        await one.start()
    return made


@pytest.fixture
async def caller(engines: tuple[EchoEngine, ...]) -> Caller:
    return Caller(await gateway(*engines))


def body(text: Any = "one two", **fields: Any) -> dict[str, Any]:
    return {"model": "magpie", "input": text, **fields}


# --- the model is explicit --------------------------------------------------------------------------------------------


async def test_every_model_is_listed_and_answers_for_itself(caller: Caller, engines: tuple[EchoEngine, ...]) -> None:
    assert [m["id"] for m in (await caller.get("/v1/models")).json()["data"]] == ["parrot", "second", "magpie"]
    for number, id in enumerate(("parrot", "second")):
        assert (await caller.chat(model=id)).json()["model"] == id
        assert (await caller.post(COMPLETIONS, {"model": id, "prompt": "x"})).json()["model"] == id
        assert [len(e.calls) for e in engines] == [2 * (number >= n) for n in (0, 1)] + [0]


@pytest.mark.parametrize("stream", [False, True])
async def test_model_that_is_down_is_503_and_never_served_by_another(
    stream: bool, caller: Caller, engines: tuple[EchoEngine, ...]
) -> None:
    engines[1].die("killed")
    for path, document in ((CHAT, chat_body(model="second")), (COMPLETIONS, {"model": "second", "prompt": "x"})):
        reply = await caller.post(path, {**document, "stream": stream})
        assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
        assert reply.headers["retry-after"] == "7", "it heals: say when to come back"
        assert "x-should-retry" not in reply.headers
        assert Receipt.parse(await caller.receipt(reply)).forwarded is None
    assert (await caller.chat(model="parrot")).status == 200
    assert [len(e.calls) for e in engines] == [1, 0, 0]


async def test_model_that_has_failed_for_good_says_so(caller: Caller, engines: tuple[EchoEngine, ...]) -> None:
    engines[0].die("killed")
    reply = await caller.chat(model="parrot")
    assert (reply.status, reply.headers["x-should-retry"]) == (503, "false")
    assert (await caller.chat(model="second")).status == 200


@pytest.mark.parametrize(
    ("path", "document", "names"),
    [
        (CHAT, chat_body(model="magpie"), "parrot, second"),
        (COMPLETIONS, {"model": "magpie", "prompt": "x"}, "parrot, second"),
        (EMBEDDINGS, {"model": "parrot", "input": "x"}, "magpie"),
    ],
)
async def test_model_of_another_kind_is_refused_and_the_right_ones_are_named(
    path: str, document: Any, names: str, caller: Caller, engines: tuple[EchoEngine, ...]
) -> None:
    reply = await caller.post(path, document)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_supported", "model")
    assert reply.error["message"] == f"This model is not served on {path}. Models that do: {names}."
    assert not any(e.calls for e in engines)
    assert Receipt.parse(await caller.receipt(reply)).forwarded is None


async def test_no_model_of_that_kind_is_said_plainly(engines: tuple[EchoEngine, ...]) -> None:
    reply = await Caller(await gateway(engines[0])).post(EMBEDDINGS, {"model": "parrot", "input": "x"})
    assert reply.error["message"].endswith("No model here does.")


# --- embeddings -------------------------------------------------------------------------------------------------------


async def test_vector_comes_back_unchanged_with_a_receipt(caller: Caller, engines: tuple[EchoEngine, ...]) -> None:
    request = json.dumps(body(user="me")).encode()
    reply = await caller.request("POST", EMBEDDINGS, request)
    assert reply.status == 200
    made = reply.json()
    assert (made["object"], made["model"], made["data"][0]["object"]) == ("list", "magpie", "embedding")
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    parsed = Receipt.parse(raw)
    assert (parsed.model, parsed.chat_id) == ("magpie", "embd-echo")
    seen = json.loads(engines[2].calls[0].body)
    assert set(seen) == {"model", "input", "cache_salt"}, "the caller's name does not reach the engine"


@pytest.mark.parametrize(
    "given", ["a text", ["a text"], ["one", "two", "three"], [1, 2, 3], [[1, 2], [3]], ["x"] * MAX_INPUTS]
)
async def test_texts_and_tokens_alone_or_in_lists_are_taken(given: Any, caller: Caller) -> None:
    reply = await caller.post(EMBEDDINGS, body(given))
    assert reply.status == 200
    many = isinstance(given, list) and not isinstance(given[0], int)
    assert [d["index"] for d in reply.json()["data"]] == list(range(len(given) if many else 1))


async def test_base64_and_dimensions_reach_the_engine(caller: Caller) -> None:
    plain = (await caller.post(EMBEDDINGS, body(dimensions=8))).json()["data"][0]["embedding"]
    packed = (await caller.post(EMBEDDINGS, body(dimensions=8, encoding_format="base64"))).json()["data"][0]
    assert struct.unpack("<8f", base64.b64decode(packed["embedding"])) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [""]}, "invalid_value", "input"),
        ({"input": ["a", [1]]}, "invalid_value", "input"),
        ({"input": ["a", 1]}, "invalid_value", "input"),
        ({"input": [1, True]}, "invalid_value", "input"),
        ({"input": [-1]}, "invalid_value", "input"),
        ({"input": [2**31]}, "invalid_value", "input"),
        ({"input": [1.5]}, "invalid_value", "input"),
        ({"input": [[]]}, "invalid_value", "input"),
        ({"input": [[[1]]]}, "invalid_value", "input"),
        ({"input": {"role": "user"}}, "invalid_value", "input"),
        ({"input": [{"role": "user", "content": "x"}]}, "invalid_value", "input"),
        ({"input": None}, "invalid_value", "input"),
        ({"input": ["x"] * (MAX_INPUTS + 1)}, "invalid_value", "input"),
        ({"encoding_format": "bytes"}, "invalid_value", "encoding_format"),
        ({"encoding_format": 1}, "invalid_value", "encoding_format"),
        ({"dimensions": 0}, "invalid_value", "dimensions"),
        ({"dimensions": -1}, "invalid_value", "dimensions"),
        ({"dimensions": True}, "invalid_value", "dimensions"),
        ({"dimensions": "8"}, "invalid_value", "dimensions"),
        ({"dimensions": 10**9}, "invalid_value", "dimensions"),
        ({"messages": [{"role": "user", "content": "x"}]}, "unknown_parameter", "messages"),
        ({"stream": True}, "unknown_parameter", "stream"),
        ({"truncate_prompt_tokens": 1}, "unknown_parameter", "truncate_prompt_tokens"),
        ({"add_special_tokens": False}, "unknown_parameter", "add_special_tokens"),
        ({"embed_dtype": "float16"}, "unknown_parameter", "embed_dtype"),
        ({"priority": 1}, "unknown_parameter", "priority"),
        ({"store": True}, "unsupported_parameter", "store"),
    ],
)
async def test_what_is_not_openais_is_refused_by_name_before_the_engine(
    fields: dict[str, Any], code: str, param: str, caller: Caller, engines: tuple[EchoEngine, ...]
) -> None:
    reply = await caller.post(EMBEDDINGS, body(**fields))
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, code, param)
    assert not engines[2].calls


async def test_missing_input_is_refused(caller: Caller) -> None:
    reply = await caller.post(EMBEDDINGS, {"model": "magpie"})
    assert (reply.status, reply.error["code"]) == (400, "missing_required_parameter")


async def test_engines_own_refusal_is_passed_in_openais_shape(caller: Caller, engines: tuple[EchoEngine, ...]) -> None:
    engines[2].fault = "reject"
    reply = await caller.post(EMBEDDINGS, body())
    assert (reply.status, reply.error["message"]) == (400, "no such luck")


async def test_hang_up_reaches_the_embedding_engine(engines: tuple[EchoEngine, ...]) -> None:
    engines[2].delay = 30
    app = await gateway(*engines)

    async def leaving(scope: Any, receive: Any, send: Any) -> None:
        asked = 0

        async def gone() -> Any:
            nonlocal asked
            asked += 1
            return await receive() if asked == 1 else {"type": "http.disconnect"}

        await app(scope, gone, send)

    await asyncio.wait_for(Caller(leaving).post(EMBEDDINGS, body()), 5)
    assert engines[2].calls[0].disconnected
