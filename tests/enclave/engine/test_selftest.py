"""Golden answers: any difference, error or silence stops the boot."""

from __future__ import annotations

from typing import Any

import pytest

from enclave.engine import selftest
from enclave.engine.base import EngineError
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
