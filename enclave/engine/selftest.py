"""Golden answers: before it serves, an engine must say at temperature 0 exactly what the measured image says it says.

An embedding model must give the measured vectors: direction and length may differ by rounding, and by no more.

Catches an engine that runs and answers nonsense (a miscompiled kernel, stale views of pinned memory in
confidential mode, wrong weights under the right name). Each answer is asked for alone, then all at once as a batch:
some faults show only there.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Final

from enclave.engine.base import Engine, EngineError, EngineGone
from enclave.engine.call import post

__all__ = ["run"]

DEADLINE: Final = 180.0
"""Seconds for all answers of both rounds."""
NEAR: Final = 0.999
"""Least cosine of a vector and the measured one. Rounding moves it by less than 1e-5, a wrong weight by far more."""
_MEMBERS: Final = {"generate": {"prompt_messages", "max_tokens", "text"}, "embed": {"input", "embedding"}}


async def run(engine: Engine, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
    """Compare. Raises EngineError `ENGINE_SELF_TEST` on any difference, error or timeout."""
    members = _MEMBERS[engine.task]
    if not golden or any(not isinstance(g, dict) or set(g) != members for g in golden):
        raise EngineError(
            "ENGINE_GOLDEN", "the golden answers are not usable", expected=f"entries of {sorted(members)}"
        )
    compare = _compare_vector if engine.task == "embed" else _compare
    try:
        async with asyncio.timeout(DEADLINE):
            for number, one in enumerate(golden):
                await compare(engine, number, one)
            await asyncio.gather(*(compare(engine, number, one) for number, one in enumerate(golden)))
    except EngineGone:
        raise EngineError("ENGINE_SELF_TEST", "the engine process ended during the self-test") from None
    except TimeoutError:
        raise EngineError("ENGINE_SELF_TEST", f"the self-test did not end within {DEADLINE:.0f} seconds") from None


async def _compare(engine: Engine, number: int, one: dict[str, Any]) -> None:  # Any: JSON values
    status, body = await post(
        engine.app,
        "/v1/chat/completions",
        {
            "model": engine.model_id,
            "messages": one["prompt_messages"],
            "max_tokens": one["max_tokens"],
            "temperature": 0,
            "seed": 0,
        },
    )
    text = _text(body) if status == 200 else None
    if text != one["text"]:
        raise EngineError(
            "ENGINE_SELF_TEST",
            f"golden answer {number} came out differently (status {status})",
            expected=one["text"],
            actual=text if text is not None else "no answer",
            hint="weights, engine version, arguments and golden answers belong together: make the answers anew",
        )


async def _compare_vector(engine: Engine, number: int, one: dict[str, Any]) -> None:  # Any: JSON values
    status, body = await post(engine.app, "/v1/embeddings", {"model": engine.model_id, "input": one["input"]})
    cosine = _cosine(body, one["embedding"]) if status == 200 else 0.0
    if not cosine >= NEAR:  # not `<`: nothing compares with NaN
        raise EngineError(
            "ENGINE_SELF_TEST",
            f"golden vector {number} came out differently (status {status})",
            expected=f"a cosine of at least {NEAR}",
            actual=f"{cosine:.5f}",
            hint="weights, engine version, arguments and golden vectors belong together: make the vectors anew",
        )


def _cosine(body: bytes, wanted: object) -> float:
    """Of the answer's one vector and *wanted*, both of length 1; 0 for what is no such vector."""
    try:
        (entry,) = json.loads(body)["data"]
        pairs = [(float(a), float(b)) for a, b in zip(entry["embedding"], wanted, strict=True)]  # type: ignore[call-overload]  # refused below
    except (ValueError, KeyError, TypeError):
        return 0.0
    lengths = (math.hypot(*(pair[i] for pair in pairs)) for i in (0, 1))
    if any(abs(length - 1) > 1e-3 for length in lengths):
        return 0.0
    return sum(a * b for a, b in pairs)


def _text(body: bytes) -> str | None:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None
