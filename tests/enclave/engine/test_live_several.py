"""Several real engines side by side: embeddings from a pooling engine, and one process that dies while others serve.

The last test kills an engine: it stands in a file of its own whose name sorts after the others' that use the same boot.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from attestation import receipt
from attestation.result import Checks
from tests.enclave.api.client import API_KEY, CHAT, chat_body
from tests.engine_fixture import MAGPIE, LiveEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(800)]

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture
def http(live_engine: LiveEngine) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {API_KEY}"}
    with httpx2.Client(base_url=live_engine.base_url, headers=headers, timeout=120) as client:
        yield client


@pytest.fixture
def sdk(live_engine: LiveEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live_engine.base_url + "/v1", api_key=API_KEY, max_retries=0, timeout=120) as client:
        yield client


def near(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_sdk_embeds_and_near_texts_have_near_vectors(sdk: openai.OpenAI) -> None:
    texts = ["What can the host see?", "What can the host of the machine see?", "bananas are yellow"]
    answer = sdk.embeddings.create(model="magpie", input=texts)  # the SDK asks for base64 and unpacks it
    assert (answer.model, answer.object) == ("magpie", "list")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    one, two, three = (d.embedding for d in answer.data)
    assert [d.index for d in answer.data] == [0, 1, 2]
    assert near(one, two) > 0.7 > 0.4 > near(one, three)


def test_vectors_are_those_computed_without_the_engine(sdk: openai.OpenAI) -> None:
    for one in json.loads((MAGPIE.parent / "magpie-golden.json").read_text()):
        answer = sdk.embeddings.create(model="magpie", input=one["input"], encoding_format="float")
        assert answer.data[0].embedding == pytest.approx(one["embedding"], abs=2e-3)


def test_base64_is_the_same_vector_and_tokens_are_the_same_text(http: httpx2.Client) -> None:
    from tokenizers import Tokenizer

    text = "yellow bananas"
    tokens = Tokenizer.from_file(str(MAGPIE / "tokenizer.json")).encode(text).ids
    plain = http.post(EMBEDDINGS, json={"model": "magpie", "input": text}).json()["data"][0]["embedding"]
    packed = http.post(EMBEDDINGS, json={"model": "magpie", "input": [tokens], "encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(plain, abs=1e-3)
    assert packed["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(("dimensions", "status"), [(16, 200), (32, 200), (64, 200), (17, 400), (128, 400)])
def test_dimensions_are_those_the_model_was_made_for(dimensions: int, status: int, http: httpx2.Client) -> None:
    reply = http.post(EMBEDDINGS, json={"model": "magpie", "input": "x", "dimensions": dimensions})
    assert reply.status_code == status
    if status == 200:
        (entry,) = reply.json()["data"]
        assert len(entry["embedding"]) == dimensions
        assert near(entry["embedding"], entry["embedding"]) == pytest.approx(1, abs=1e-3)
    else:
        assert reply.json()["error"]["code"] == "invalid_value"


@pytest.mark.parametrize("given", ["x " * 3000, [[1] * 600], [999_999], [[2**31 - 1]]])
def test_odd_inputs_never_are_500(given: Any, http: httpx2.Client) -> None:
    reply = http.post(EMBEDDINGS, json={"model": "magpie", "input": given})
    assert reply.status_code == 400, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_many_inputs_come_back_in_order(sdk: openai.OpenAI) -> None:
    texts = [f"number {n}" for n in range(200)]
    together = sdk.embeddings.create(model="magpie", input=texts)
    assert [d.index for d in together.data] == list(range(200))
    alone = sdk.embeddings.create(model="magpie", input=texts[117]).data[0].embedding
    assert near(together.data[117].embedding, alone) > 0.999


def test_receipt_of_a_vector_verifies(live_engine: LiveEngine, http: httpx2.Client) -> None:
    request = json.dumps({"model": "magpie", "input": "a text"}).encode()
    reply = http.post(EMBEDDINGS, content=request, headers={"content-type": "application/json"})
    parsed = receipt.Receipt.parse(http.get("/v1/aci/receipts/" + reply.headers["x-receipt-id"]).content)
    checks = Checks()
    keyset = live_engine.connection.identity.keyset
    receipt.verify_receipt(parsed, keyset, request=request, response=reply.content, checks=checks)
    assert not checks.failed
    assert parsed.model == "magpie"


def test_models_of_the_other_kind_are_refused_by_name(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Models that do: magpie"):
        sdk.embeddings.create(model="parrot", input="x")
    with pytest.raises(openai.NotFoundError, match="Models that do: parrot, second"):
        sdk.chat.completions.create(model="magpie", messages=[{"role": "user", "content": "x"}])


# --- death ------------------------------------------------------------------------------------------------------------


def test_killed_engine_core_is_an_honest_error_for_its_model_alone_and_heals(
    live_engine: LiveEngine, http: httpx2.Client
) -> None:
    """Kill the core of one process in the middle of its stream, and look at everything that must follow."""
    request = json.dumps(chat_body("hello", model="second", max_tokens=1900, ignore_eos=True, stream=True)).encode()
    headers = {"content-type": "application/json"}
    worker = live_engine.worker("second")
    core = live_engine.core(worker)
    got = b""
    with (
        pytest.raises(httpx2.RemoteProtocolError),
        http.stream("POST", CHAT, content=request, headers=headers) as reply,
    ):
        for part in reply.iter_raw():
            if not got:
                threading.Timer(0.05, os.kill, (core, signal.SIGKILL)).start()
            got += part
    assert b"[DONE]" not in got
    last = json.loads(got.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
    assert last["error"]["code"] in ("server_error", "engine_unavailable")
    parsed = receipt.Receipt.parse(http.get("/v1/aci/receipts/" + reply.headers["x-receipt-id"]).content)
    assert (parsed.outcome, parsed.returned) == ("upstream_error", hashlib.sha256(got).digest())

    while (after := http.post(CHAT, json=chat_body(model="second", max_tokens=1))).status_code == 500:
        time.sleep(0.1)  # the worker looks at its core twice a second
    assert (after.status_code, after.json()["error"]["code"]) == (503, "engine_unavailable")
    assert 1 <= int(after.headers["retry-after"]) <= 120
    assert http.post(CHAT, json=chat_body(max_tokens=1)).json()["model"] == "parrot"
    assert http.post(EMBEDDINGS, json={"model": "magpie", "input": "x"}).status_code == 200

    while (back := http.post(CHAT, json=chat_body(model="second", max_tokens=1))).status_code == 503:
        time.sleep(0.5)
    assert (back.status_code, back.json()["model"]) == (200, "second")
    assert live_engine.worker("second") != worker
    assert not any("failed" in line for line in live_engine.reports), "none has failed for good"
