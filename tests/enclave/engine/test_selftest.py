"""Golden answers: any difference, error or silence stops the boot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from enclave.engine import selftest
from enclave.engine.base import EngineError
from enclave.engine.call import post
from enclave.engine.echo import EchoEngine, Fault

GOLDEN: list[dict[str, Any]] = [
    {"prompt_messages": [{"role": "user", "content": text}], "max_tokens": 8, "text": text}
    for text in ("one", "two words")
]


@pytest.fixture
async def engine() -> EchoEngine:
    made = EchoEngine("parrot")
    await made.start()
    return made


async def test_right_answers_pass_alone_and_as_a_batch(engine: EchoEngine) -> None:
    await engine.self_test(GOLDEN)
    assert len(engine.calls) == 4
    assert b'"temperature": 0' in engine.calls[0].body


async def test_one_different_character_is_refused(engine: EchoEngine) -> None:
    with pytest.raises(EngineError, match="golden answer 1") as refused:
        await engine.self_test([GOLDEN[0], {**GOLDEN[1], "text": "two words."}])
    assert refused.value.code == "ENGINE_SELF_TEST"


@pytest.mark.parametrize("fault", ["reject", "crash"])
async def test_engine_error_is_refused(engine: EchoEngine, fault: Fault) -> None:
    engine.fault = fault
    with pytest.raises(EngineError, match="ENGINE_SELF_TEST"):
        await engine.self_test(GOLDEN)


async def test_silence_is_refused(engine: EchoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "DEADLINE", 0.05)
    engine.delay = 30
    with pytest.raises(EngineError, match="did not end"):
        await engine.self_test(GOLDEN)


@pytest.mark.parametrize("golden", [[], [{"text": "x"}], ["x"], [{**GOLDEN[0], "more": 1}]])
async def test_unusable_golden_file_is_refused_never_passed(engine: EchoEngine, golden: Any) -> None:
    with pytest.raises(EngineError, match="ENGINE_GOLDEN"):
        await engine.self_test(golden)


# --- vectors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def embedder() -> EchoEngine:
    made = EchoEngine("magpie", "embed")
    await made.start()
    return made


async def vector(engine: EchoEngine, text: str) -> list[float]:
    _, body = await post(engine.app, "/v1/embeddings", {"model": "magpie", "input": text})
    values: list[float] = json.loads(body)["data"][0]["embedding"]
    return values


async def test_right_vectors_pass_up_to_rounding(embedder: EchoEngine) -> None:
    golden = [{"input": t, "embedding": [round(v, 4) for v in await vector(embedder, t)]} for t in ("one", "two words")]
    await embedder.self_test(golden)
    assert len(embedder.calls) == 2 + 4


@pytest.mark.parametrize("change", ["other", "short", "long", "zero", "nan", "scaled", "words"])
async def test_other_vectors_are_refused(change: str, embedder: EchoEngine) -> None:
    right = await vector(embedder, "one")
    wrong: Any = {
        "other": await vector(embedder, "two"),
        "short": right[:-1],
        "long": [*right, 0.0],
        "zero": [0.0] * len(right),
        "nan": [float("nan")] * len(right),
        "scaled": [2 * v for v in right],
        "words": "x" * len(right),
    }[change]
    with pytest.raises(EngineError, match="golden vector 0") as refused:
        await embedder.self_test([{"input": "one", "embedding": wrong}])
    assert refused.value.code == "ENGINE_SELF_TEST"


async def test_answers_of_the_other_kind_are_not_usable(engine: EchoEngine, embedder: EchoEngine) -> None:
    with pytest.raises(EngineError, match="ENGINE_GOLDEN"):
        await embedder.self_test(GOLDEN)
    with pytest.raises(EngineError, match="ENGINE_GOLDEN"):
        await engine.self_test([{"input": "one", "embedding": [1.0]}])
