"""Golden answers: before it serves, an engine must say at temperature 0 exactly what the measured image says it says.

Catches an engine that runs and answers nonsense (a miscompiled kernel, stale views of pinned memory in
confidential mode, wrong weights under the right name). Each answer is asked for alone, then all at once as a batch:
some faults show only there.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from enclave.engine.base import Engine, EngineError, EngineGone
from enclave.engine.call import post

__all__ = ["run"]

DEADLINE: Final = 180.0
"""Seconds for all answers of both rounds."""
_MEMBERS: Final = {"prompt_messages", "max_tokens", "text"}


async def run(engine: Engine, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
    """Compare. Raises EngineError `ENGINE_SELF_TEST` on any difference, error or timeout."""
    if not golden or any(not isinstance(g, dict) or set(g) != _MEMBERS for g in golden):
        raise EngineError(
            "ENGINE_GOLDEN", "the golden answers are not usable", expected=f"entries of {sorted(_MEMBERS)}"
        )
    try:
        async with asyncio.timeout(DEADLINE):
            for number, one in enumerate(golden):
                await _compare(engine, number, one)
            await asyncio.gather(*(_compare(engine, number, one) for number, one in enumerate(golden)))
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


def _text(body: bytes) -> str | None:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None
