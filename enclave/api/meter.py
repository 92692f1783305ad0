"""What a request has used, by the engine's own count, and the same taken out of what its caller sees.

The gateway asks every stream for cumulative usage on every event (`stream_options`, set in `requests`). A caller who
did not ask for it gets events without; one who did gets OpenAI's form: null on every event, and the figure on a last
one of its own. An engine that streams to the end without a figure has failed: nothing is ever counted here, chunks
least of all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from enclave.access.prices import Usage

__all__ = ["Meter", "Plain", "answer_of", "chunk"]

Source = Literal["engine_final", "engine_cumulative", "none"]

_DATA: Final = b"data: "
_USAGE: Final = b',"usage":{'
_TAIL: Final = re.compile(
    rb',"usage":\{"prompt_tokens":(\d{1,10}),"total_tokens":\d{1,10},"completion_tokens":(\d{1,10})'
    rb'(?:,"completion_tokens_details":null)?\}\}\n\n'
)
"""How vLLM ends an event: anchored there, and what a model says cannot look like it: its quotes are escaped."""
_NO_CHOICES: Final = b'"choices":[]'


class Meter:
    """The last figure the engine gave for one request.

    answers   how many answers each prompt gets: until the end vLLM counts each answer apart, with its own prompt
    single    whether there is one answer to one prompt
    """

    __slots__ = (
        "_answers", "_inputs", "_outputs", "cached_tokens", "input_tokens", "output_tokens", "reasoning_tokens",
        "single", "source",
    )  # fmt: skip

    def __init__(self, answers: int = 1, prompts: int = 1) -> None:
        self.input_tokens = self.cached_tokens = self.output_tokens = self.reasoning_tokens = 0
        self.source: Source = "none"
        self.single = answers == prompts == 1
        self._answers = answers
        self._inputs: dict[int, int] = {}
        self._outputs: dict[int, int] = {}

    def usage(self) -> Usage:
        """What is charged for."""
        return Usage(self.input_tokens, self.cached_tokens, self.output_tokens, self.reasoning_tokens)

    def final(self, usage: Mapping[str, Any]) -> None:  # Any: JSON values
        """The engine's `usage` of the whole request. Raises ValueError for what is none."""
        self._count(usage.get("prompt_tokens"), usage.get("completion_tokens", 0), "engine_final")
        self._details(usage)

    def so_far(self, usage: Mapping[str, Any], answer: object = 0) -> None:  # Any: JSON values
        """Its usage up to an event of the *answer* of that index. Raises ValueError."""
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
        if not self.single:
            if type(answer) is not int or type(prompt) is not int or type(output) is not int:
                raise ValueError("the engine's usage makes no sense")
            self._inputs[answer // self._answers], self._outputs[answer] = prompt, output
            prompt, output = sum(self._inputs.values()), sum(self._outputs.values())
        self._count(prompt, output, "engine_cumulative")
        self._details(usage)

    def quick(self, prompt: bytes, output: bytes, *, final: bool) -> None:
        """The same for a single answer and figures in decimal."""
        self._count(int(prompt), int(output), "engine_final" if final else "engine_cumulative")

    def _count(self, prompt: object, output: object, source: Source) -> None:
        if type(prompt) is not int or type(output) is not int:
            raise ValueError("the engine's usage makes no sense")
        if prompt < self.input_tokens or output < self.output_tokens:
            raise ValueError("the engine's usage goes back")
        self.input_tokens, self.output_tokens, self.source = prompt, output, source

    def _details(self, usage: Mapping[str, Any]) -> None:  # Any: JSON values
        cached = _detail(usage, "prompt_tokens_details", "cached_tokens")
        reasoning = _detail(usage, "completion_tokens_details", "reasoning_tokens")
        self.cached_tokens = min(max(cached, self.cached_tokens), self.input_tokens)
        self.reasoning_tokens = min(max(reasoning, self.reasoning_tokens), self.output_tokens)


class Plain:
    """Events of chat and completions, which are the engine's own less the usage. See `enclave.stream.Teller`."""

    def __init__(self, meter: Meter, *, wants_usage: bool) -> None:
        self._meter = meter
        self._null = b',"usage":null}\n\n' if wants_usage else b"}\n\n"
        self._wants_usage = wants_usage

    def event(self, event: bytes) -> bytes:
        """What to emit for an event of the engine: one event, or nothing. Raises ValueError."""
        at = event.rfind(_USAGE) if self._meter.single else -1
        found = _TAIL.fullmatch(event, at) if at > 0 else None
        if found is None:
            return self._whole(event)
        final = _NO_CHOICES in event
        self._meter.quick(found[1], found[2], final=final)
        if final:
            return event if self._wants_usage else b""
        return event[:at] + self._null

    def _whole(self, event: bytes) -> bytes:
        """The same for an event of another form, by reading all of it."""
        document = chunk(event)
        usage, choices = document.pop("usage", None), document.get("choices")
        final = choices == []
        if usage is not None:
            self._meter.final(usage) if final else self._meter.so_far(usage, answer_of(choices))
        if final:
            return event if self._wants_usage else b""
        if self._wants_usage:
            document["usage"] = None
        return _DATA + json.dumps(document, separators=(",", ":")).encode("ascii") + b"\n\n"


def answer_of(choices: object) -> object:
    """The index of the answer that a chunk belongs to; vLLM's chunks have one choice."""
    return choices[0].get("index", 0) if isinstance(choices, list) and choices and isinstance(choices[0], dict) else 0


def chunk(event: bytes) -> dict[str, Any]:  # Any: JSON values
    """The JSON object of an event of the engine. Raises ValueError."""
    document = json.loads(event.removeprefix(_DATA)) if event.startswith(_DATA) else None
    if not isinstance(document, dict):
        raise ValueError("the engine's event is no chunk")
    return document


def _detail(usage: Mapping[str, Any], where: str, what: str) -> int:  # Any: JSON values
    details = usage.get(where)
    value = details.get(what) if isinstance(details, dict) else None
    return value if type(value) is int and value >= 0 else 0
