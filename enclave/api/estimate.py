"""How much a request can use at most, before the engine has seen it: what is reserved, and what counts against limits.

`bound` costs nothing and is never too small: a prompt and its answer together fit the model's context. `exact` asks
the engine's own tokenizer, with the same messages, tools and template as the request itself, and is only asked where a
loose bound could refuse somebody: next to a spend limit, or under a limit of tokens. The engine's count after the
answer replaces either.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from enclave.api.errors import INTERNAL, Refused, engine_refusal, unavailable
from enclave.api.tokenize import TOKENIZE_PATH, count_completion, count_document
from enclave.engine.base import Engine, EngineGone
from enclave.engine.call import post

__all__ = ["Bound", "bound", "exact", "prompt_tokens"]

SECONDS: Final = 30.0
COMPLETION_TOKENS: Final = 16
"""`max_tokens` of /v1/completions when absent: OpenAI's, and vLLM's."""

Document = Mapping[str, Any]  # Any: JSON values


@dataclass(frozen=True, slots=True)
class Bound:
    """Tokens of all prompts, tokens of one answer, and how many answers: each at most."""

    prompt: int
    output: int
    answers: int

    @property
    def total(self) -> int:
        return self.prompt + self.output * self.answers


def prompts_of(document: Document) -> Sequence[Any]:  # Any: texts, or lists of tokens
    """The prompts or inputs of a completion or an embedding, one by one."""
    given = document.get("prompt", document.get("input"))
    return given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]


def bound(document: Document, context: int) -> Bound:
    """For a request that has been admitted to a model of that context."""
    prompts = 1 if "messages" in document else len(prompts_of(document))
    if "input" in document:
        return Bound(prompts * context, 0, 1)
    return Bound(prompts * context, _output(document, context), prompts * (document.get("n") or 1))


async def exact(engine: Engine, document: Document, context: int) -> Bound:
    """The same, with the prompt as the engine's tokenizer counts it. Raises Refused for what the engine cannot read."""
    count = await prompt_tokens(engine, document)
    loose = bound(document, context)
    room = context - (count if loose.answers == (document.get("n") or 1) else 0)
    return Bound(count, max(0, min(loose.output, room)), loose.answers)


async def prompt_tokens(engine: Engine, document: Document) -> int:
    """How many tokens the prompts of *document* are to the engine. Raises Refused."""
    if "messages" in document:
        return await _ask(engine, count_document(document))
    total = 0
    for prompt in prompts_of(document):
        total += len(prompt) if isinstance(prompt, list) else await _ask(engine, count_completion(prompt))
    return total


async def _ask(engine: Engine, document: Document) -> int:
    try:
        async with asyncio.timeout(SECONDS):
            status, body = await post(engine.app, TOKENIZE_PATH, {**document, "model": engine.model_id})
    except (EngineGone, TimeoutError):
        raise Refused(unavailable(engine.retry_after)) from None
    except Exception:  # its text may quote the request
        raise Refused(INTERNAL) from None
    if status != 200:
        raise Refused(engine_refusal(status, body))
    try:
        count = json.loads(body)["count"]
    except (ValueError, KeyError, TypeError):
        raise Refused(INTERNAL) from None
    if type(count) is not int or count < 0:
        raise Refused(INTERNAL)
    return count


def _output(document: Document, context: int) -> int:
    given = document.get("max_completion_tokens")
    if given is None:
        given = document.get("max_tokens")
    if given is None:
        return context if "messages" in document else min(COMPLETION_TOKENS, context)
    return max(0, min(int(given), context))
