"""The real vLLM behind the real gateway: the contract the echo engine stands for, and what only a real engine shows.

Chat and completions are asked of both parrots, the one mounted in process and the one in a process of its own: the same
assertions for both.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from attestation import receipt
from attestation.result import Checks
from attestation.sse import split_inline
from tests.enclave.api.client import API_KEY, CHAT, chat_body
from tests.engine_fixture import MODEL, ROOT, LiveEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(800)]

KEY = {"authorization": f"Bearer {API_KEY}"}


@pytest.fixture
def http(live_engine: LiveEngine) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=live_engine.base_url, headers=KEY, timeout=120) as client:
        yield client


@pytest.fixture
def sdk(live_engine: LiveEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live_engine.base_url + "/v1", api_key=API_KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(params=["parrot", "second"])
def model(request: pytest.FixtureRequest) -> str:
    """Mounted, and over a unix socket."""
    name: str = request.param
    return name


def verified(live: LiveEngine, raw: bytes, request: bytes, response: bytes, **kw: Any) -> receipt.Receipt:
    checks, parsed = Checks(), receipt.Receipt.parse(raw)
    keyset = live.connection.identity.keyset
    receipt.verify_receipt(parsed, keyset, request=request, response=response, checks=checks, **kw)
    assert not checks.failed
    return parsed


# --- contract ---------------------------------------------------------------------------------------------------------


def test_sdk_chats(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
    )
    assert answer.model == model
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


def test_sdk_streams_and_whole_answer_is_the_same_text(sdk: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "What is vouchsafe?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    whole = sdk.chat.completions.create(**ask)
    chunks = list(sdk.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].choices == []
    counted = [(u.prompt_tokens, u.completion_tokens) for u in (chunks[-1].usage, whole.usage) if u is not None]
    assert len(counted) == 2 and counted[0] == counted[1]  # what of it came from the cache may differ


async def test_async_sdk_streams(live_engine: LiveEngine, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=live_engine.base_url + "/v1", api_key=API_KEY, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason in ("stop", "length")


def test_sdk_completes(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.completions.create(model=model, prompt="vouchsafe", max_tokens=5, temperature=0)
    assert answer.usage is not None
    assert (answer.model, answer.usage.completion_tokens <= 5) == (model, True)
    pieces = list(sdk.completions.create(model=model, prompt="vouchsafe", max_tokens=5, temperature=0, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == answer.choices[0].text
    with pytest.raises(openai.NotFoundError, match="Models that do: parrot, second"):
        sdk.completions.create(model="magpie", prompt="x")


def test_sdk_sees_models_and_its_own_error_classes(sdk: openai.OpenAI) -> None:
    assert [m.id for m in sdk.models.list()] == ["parrot", "second", "magpie"]
    assert sdk.models.retrieve("parrot").id == "parrot"
    user: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="gpt-5", messages=user)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.BadRequestError) as long:
        sdk.chat.completions.create(model="parrot", messages=user, max_tokens=99999)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as stored:
        sdk.chat.completions.create(model="parrot", messages=user, store=True)
    assert (stored.value.code, stored.value.param) == ("unsupported_parameter", "store")


@pytest.mark.parametrize("stream", [False, True])
def test_receipt_of_a_real_answer_verifies(
    live_engine: LiveEngine, http: httpx2.Client, stream: bool, model: str
) -> None:
    request = json.dumps(chat_body("hello", model=model, max_tokens=40, stream=stream, ignore_eos=True)).encode()
    reply = http.post(CHAT, content=request, headers={"content-type": "application/json"})
    assert reply.status_code == 200
    raw = http.get("/v1/aci/receipts/" + reply.headers["x-receipt-id"]).content
    parsed = verified(live_engine, raw, request, reply.content)
    assert parsed.chat_id is not None
    assert parsed.chat_id.startswith("chatcmpl-")
    if stream:
        assert parsed.chain is not None
        assert parsed.chain.events == reply.content.count(b"\n\n")
        assert reply.content.count(b"data: [DONE]") == 1


def test_inline_receipt_of_a_real_stream_verifies(live_engine: LiveEngine, http: httpx2.Client) -> None:
    request = json.dumps(chat_body("hello", max_tokens=5, stream=True)).encode()
    headers = {"content-type": "application/json", "x-vouchsafe-receipt": "inline"}
    reply = http.post(CHAT, content=request, headers=headers)
    body, raw = split_inline(reply.content)
    assert raw is not None
    assert body.endswith(b"data: [DONE]\n\n")
    verified(live_engine, raw, request, reply.content)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "x"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": 3, "content": "x"}]},
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 7},
        {"logit_bias": {"a": 1}},
        {"seed": 2**70},
        {"stop": 5},
        {"tools": 3},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
        {"max_tokens": 0},
        {"max_tokens": 10**30},
        {"messages": [{"role": "user", "content": "x" * 100_000}]},
        {"messages": [{"role": "user", "content": "\u0000"}], "max_tokens": 1, "stop": ["\u0000"]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_odd_requests_never_are_500(fields: dict[str, Any], stream: bool, http: httpx2.Client, model: str) -> None:
    reply = http.post(CHAT, json={**chat_body(model=model, max_tokens=1, stream=stream), **fields})
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code == 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str)


def test_structured_outputs_bind_the_answer(http: httpx2.Client) -> None:
    """By choice: under a JSON schema a model may fill its tokens with white space, which proves nothing either way."""
    fields: dict[str, Any] = {"structured_outputs": {"choice": ["oui", "non"]}, "max_tokens": 16, "temperature": 0}
    reply = http.post(CHAT, json=chat_body("yes or no?", **fields))
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] in ("oui", "non")


def test_golden_answers_of_the_shipped_model_come_out(http: httpx2.Client, model: str) -> None:
    golden = MODEL.parent / "golden.json"
    if MODEL != ROOT / "tests" / "model" / "parrot":
        pytest.skip("another model was named")
    for one in json.loads(golden.read_text()):
        fields = {"messages": one["prompt_messages"], "max_tokens": one["max_tokens"], "temperature": 0}
        reply = http.post(CHAT, json={"model": model, **fields})
        assert reply.json()["choices"][0]["message"]["content"] == one["text"]


# --- what only a real engine shows ------------------------------------------------------------------------------------


def test_hang_up_frees_the_engine(live_engine: LiveEngine, http: httpx2.Client, model: str) -> None:
    """A caller that leaves must not keep the engine busy: its receipt shows far fewer events than it asked for."""
    request = json.dumps(chat_body("hello", model=model, max_tokens=1900, ignore_eos=True, stream=True)).encode()
    headers = {"content-type": "application/json", **KEY}
    with httpx2.Client(base_url=live_engine.base_url, timeout=60) as leaving:
        with leaving.stream("POST", CHAT, content=request, headers=headers) as reply:
            next(reply.iter_raw())
        path = "/v1/aci/receipts/" + reply.headers["x-receipt-id"]
    for _ in range(100):
        fetched = http.get(path)
        if fetched.status_code == 200:
            break
        time.sleep(0.05)
    parsed = receipt.Receipt.parse(fetched.content)
    assert parsed.outcome == "client_disconnected"
    assert parsed.chain is not None
    assert parsed.chain.events < 1000


def test_engine_leaves_nothing_readable_for_others(live_engine: LiveEngine) -> None:
    runtime = live_engine.folder / "run"
    assert runtime.stat().st_mode & 0o077 == 0
    for model in ("parrot", "second", "magpie"):
        for name in ("", "cache", "config", "rpc"):
            assert (runtime / model / name).stat().st_mode & 0o077 == 0
    sockets = {p for p in live_engine.folder.rglob("*.sock")}
    assert sockets == {runtime / model / "engine.sock" for model in ("second", "magpie")}
    assert all(p.stat().st_mode & 0o077 == 0 for p in sockets)


def test_engine_core_was_spawned_not_forked(live_engine: LiveEngine, model: str) -> None:
    """A forked core would hold a copy of the front's memory, private keys included."""
    pid = live_engine.process.pid if model == "parrot" else live_engine.worker(model)
    front, core = (Path(f"/proc/{pid}/smaps") for pid in (pid, live_engine.core(pid)))
    heap = [line for line in core.read_text().splitlines() if "[heap]" in line][:1]
    assert heap, "the core has no heap of its own"
    assert heap[0].split(" ")[0] not in front.read_text()


def owned_file(path: Path, user: int) -> bool:
    """Whether *path* is a file of *user*; engines come and go, and one of their files may go while we look."""
    try:
        return path.is_file() and path.stat().st_uid == user
    except FileNotFoundError:
        return False


def test_no_canary_reaches_log_or_disk(live_engine: LiveEngine, http: httpx2.Client) -> None:
    """Through every route and error path; then everything the host process wrote is searched."""
    canary = secrets.token_hex(16)
    bodies: list[dict[str, Any]] = [
        chat_body(canary, max_tokens=2),
        chat_body(canary, max_tokens=2, stream=True),
        chat_body(canary, model=canary),
        chat_body(canary, max_tokens=99999),
        chat_body(canary, stop=[canary], max_tokens=2),
        chat_body(canary, temperature=canary),
        chat_body(canary, tools=[{"type": "function", "function": {"name": canary, "parameters": {}}}], max_tokens=2),
        chat_body(canary, tools=canary),
        chat_body(canary, tool_choice={"type": "function", "function": {"name": canary}}),
        chat_body(
            canary, response_format={"type": "json_schema", "json_schema": {"name": canary, "schema": {"type": canary}}}
        ),
        chat_body(canary, structured_outputs={"regex": canary + "("}),
        chat_body(canary, structured_outputs={"grammar": canary}),
        chat_body(canary, bad_words=[canary], max_tokens=2),
        chat_body(canary, **{canary: 1}),
        chat_body(canary, messages=[{"role": canary, "content": canary}]),
        {"model": "parrot", "prompt": canary, "max_tokens": 2},
        {"model": "parrot", "prompt": {"x": canary}},
    ]
    bodies += [{**body, "model": "second"} for body in bodies if body["model"] == "parrot"]
    bodies += [
        {"model": "magpie", "input": canary},
        {"model": "magpie", "input": [canary] * 3, "dimensions": 16},
        {"model": "magpie", "input": canary * 1000},
        {"model": "magpie", "input": canary, "dimensions": 17},
        {"model": "magpie", "input": canary, "encoding_format": canary},
    ]
    for body in bodies:
        for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/" + canary):
            http.post(
                path, json=body, headers={"x-request-id": canary, "x-client-request-id": canary, "user-agent": canary}
            )
    http.post(CHAT, content=b'{"' + canary.encode(), headers={"content-type": "application/json"})
    http.get("/v1/models/" + canary)
    http.get("/v1/aci/receipts/" + canary)
    http.get("/v1/models", headers={"authorization": f"Bearer {canary}"})
    live_engine.reported("port", 1)
    time.sleep(0.5)

    assert b"POSITIVE-CONTROL before" in live_engine.output, "the search does not see what the process writes"
    assert b"POSITIVE-CONTROL after" not in live_engine.output, "the seal lets prints through"
    assert b'"event":"request"' in live_engine.output
    places = [live_engine.folder, Path("/dev/shm")]
    mine = os.getuid()  # /dev/shm is shared: what another user owns, this process has not written
    for file in (f for place in places for f in place.rglob("*") if owned_file(f, mine)):
        assert canary not in file.name
        assert canary.encode() not in file.read_bytes(), f"the canary is in {file.name}"


def test_one_line_per_request_with_counts_only(live_engine: LiveEngine, http: httpx2.Client) -> None:
    reply = http.post(CHAT, json=chat_body("hello", max_tokens=3))
    time.sleep(0.2)
    lines = [json.loads(line) for line in live_engine.output.splitlines() if line.startswith(b"{")]
    mine = [line for line in lines if line.get("request_id") == reply.headers["x-request-id"]]
    assert len(mine) == 1
    assert mine[0]["status"] == 200
    assert mine[0]["route"] == CHAT
    assert mine[0]["bytes_out"] == len(reply.content)
