"""`POST /v1/responses`, stateless: OpenAI's newer form of a chat. A translation, both ways.

One request becomes one chat request of the engine; what cannot be said in a chat is refused by name. Nothing is stored,
so nothing can be named: no earlier response, conversation, prompt, file or background job; `store` is false and the
answer says so. Tools are the caller's own functions. Reasoning items of earlier turns are left out, as they are by
OpenAI's own models between turns of a user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from enclave.api.dialect import Dialect
from enclave.api.errors import Refusal, Refused
from enclave.api.responses_events import Responses

__all__ = ["RESPONSES_PATH", "counted", "input_tokens", "translate"]

RESPONSES_PATH: Final = "/v1/responses"
MAX_ITEMS: Final = 10_000

_COUNTED: Final = frozenset(
    {"model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "text", "truncation"}
)
_FIELDS: Final = _COUNTED | {
    "include", "max_output_tokens", "metadata", "provider", "safety_identifier", "service_tier", "store", "stream",
    "stream_options", "temperature", "top_logprobs", "top_p", "user",
}  # fmt: skip
_STORED: Final = "Nothing is stored here."
_REFUSED: Final = {
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "background": _STORED,
    "prompt": _STORED,
    "prompt_cache_retention": "The prefix cache lives in memory only.",
    "prompt_cache_options": "The prefix cache lives in memory only.",
    "prompt_cache_key": "The prefix cache is divided by API key.",
    "max_tool_calls": "No tool runs here.",
}
_EMPTY: Final = {"background": False}
"""What says no more than nothing does."""
_LOGPROBS: Final = "message.output_text.logprobs"

Json = dict[str, Any]  # Any: JSON values


def counted(tokens: int) -> Json:
    return {"object": "response.input_tokens", "input_tokens": tokens}


def input_tokens(document: Json) -> Json:
    """The chat request whose prompt `/v1/responses/input_tokens` counts. Raises Refused."""
    _check_fields(document, _COUNTED)
    return _chat(_given(document))


def translate(document: Json, *, id: str, created: int) -> tuple[Json, Dialect]:
    """The chat request that *document* stands for, and how its answer is told. Raises Refused."""
    _check_fields(document, _FIELDS)
    given = _given(document)
    if given.get("store", False) is not False:
        _refuse("store", f"{_STORED} Set store to false, or leave it out.", "unsupported_parameter")
    if given.get("metadata"):
        _refuse("metadata", f"{_STORED} There is nothing to label.", "unsupported_parameter")
    if given.get("service_tier", "auto") not in ("auto", "default"):
        _refuse("service_tier", "There is one service tier.", "unsupported_parameter")
    chat = _chat(given)
    for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1)):
        if name in given:
            chat[name] = _number(name, given[name], low, high)
    if "max_output_tokens" in given:
        chat["max_completion_tokens"] = _whole("max_output_tokens", given["max_output_tokens"], 1, 2**31 - 1)
    _include(given, chat)
    if not isinstance(given.get("stream", False), bool):
        _wrong("stream", "a boolean")
    if given.get("stream"):
        chat["stream"] = True
    if "stream_options" in given:
        options = given["stream_options"]
        if not isinstance(options, dict) or options.keys() - {"include_obfuscation"}:
            _wrong("stream_options", "an object with include_obfuscation")
        chat["stream_options"] = options
    for name in ("user", "safety_identifier", "provider"):
        if name in given:
            chat[name] = given[name]
    return chat, Responses(id, created, _echo(given))


def _given(document: Json) -> Json:
    """Null for an optional field means that it is absent."""
    return {name: value for name, value in document.items() if value is not None}


def _chat(given: Json) -> Json:
    model = given.get("model")
    if model is None:
        _refuse("model", "You must provide a model parameter.", "missing_required_parameter")
    if not isinstance(model, str):
        _wrong("model", "a string")
    if given.get("truncation", "disabled") != "disabled":
        _refuse("truncation", "Nothing is left out of an input here.", "unsupported_parameter")
    messages: list[Json] = []
    if "instructions" in given:
        messages.append({"role": "system", "content": _text("instructions", given["instructions"])})
    messages += _input(given.get("input"))
    chat: Json = {"model": model, "messages": messages}
    if tools := _tools(given.get("tools", [])):
        chat["tools"] = tools
    if "tool_choice" in given:
        chat["tool_choice"] = _tool_choice(given["tool_choice"])
    if "parallel_tool_calls" in given:
        if not isinstance(given["parallel_tool_calls"], bool):
            _wrong("parallel_tool_calls", "a boolean")
        if chat.get("tools"):
            chat["parallel_tool_calls"] = given["parallel_tool_calls"]
    _format(given.get("text", {}), chat)
    _reasoning(given.get("reasoning", {}), chat)
    return chat


def _input(given: object) -> list[Json]:
    if isinstance(given, str):
        return [{"role": "user", "content": _text("input", given)}]
    if not isinstance(given, list) or not given or len(given) > MAX_ITEMS:
        _wrong("input", f"a text, or an array of 1 to {MAX_ITEMS} items")
    messages: list[Json] = []
    for number, item in enumerate(given):
        _item(f"input[{number}]", item, messages)
    if not messages:
        _wrong("input", "at least one message")
    return messages


def _item(at: str, item: object, messages: list[Json]) -> None:
    """One item becomes a message, or part of the one before: a chat holds the calls of a turn in one message."""
    if not isinstance(item, dict):
        _wrong(at, "an object")
    kind = item.get("type", "message")
    if kind == "message":
        messages.append(_message(at, item))
    elif kind == "function_call":
        function = {"name": _field(at, item, "name"), "arguments": _field(at, item, "arguments")}
        call = {"id": _field(at, item, "call_id"), "type": "function", "function": function}
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.get("output")
        text = _text(f"{at}.output", output) if isinstance(output, str) else _parts(f"{at}.output", output)
        messages.append({"role": "tool", "tool_call_id": _field(at, item, "call_id"), "content": text})
    elif kind != "reasoning":
        _refuse(f"{at}.type", "This model takes messages and its own tools' calls only.", "unsupported_content")


def _message(at: str, item: Json) -> Json:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        _wrong(f"{at}.role", "user, assistant, system or developer")
    content = item.get("content")
    text = _text(f"{at}.content", content) if isinstance(content, str) else _parts(f"{at}.content", content)
    return {"role": "system" if role == "developer" else role, "content": text}


def _parts(at: str, parts: object) -> str:
    if not isinstance(parts, list) or len(parts) > MAX_ITEMS:
        _wrong(at, "a text, or an array of parts")
    texts = []
    for number, part in enumerate(parts):
        where = f"{at}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text"):
            texts.append(_field(where, part, "text"))
        elif kind == "refusal":
            texts.append(_field(where, part, "refusal"))
        else:
            _refuse(where, "This model takes text only.", "unsupported_content")
    return "\n".join(texts)


def _tools(given: object) -> list[Json]:
    if not isinstance(given, list):
        _wrong("tools", "an array of tools")
    made = []
    for number, tool in enumerate(given):
        at = f"tools[{number}]"
        if not isinstance(tool, dict):
            _wrong(at, "an object")
        if tool.get("type") != "function":
            _refuse(f"{at}.type", "Nothing runs here: tools are the caller's own functions.", "unsupported_tool")
        if tool.keys() - {"type", "name", "description", "parameters", "strict"}:
            _refuse(at, "Unrecognized request argument supplied.", "unknown_parameter")
        function: Json = {"name": _field(at, tool, "name")}
        if tool.get("description") is not None:
            function["description"] = _field(at, tool, "description")
        for name, type_ in (("parameters", dict), ("strict", bool)):
            if tool.get(name) is not None:
                if not isinstance(tool[name], type_):
                    _wrong(f"{at}.{name}", "a JSON schema" if type_ is dict else "a boolean")
                function[name] = tool[name]
        made.append({"type": "function", "function": function})
    return made


def _tool_choice(choice: object) -> object:
    if choice in ("none", "auto", "required"):
        return choice
    if not isinstance(choice, dict) or choice.get("type") != "function" or choice.keys() - {"type", "name"}:
        _refuse("tool_choice", "Expected none, auto, required, or a function by its name.", "unsupported_parameter")
    return {"type": "function", "function": {"name": _field("tool_choice", choice, "name")}}


def _format(text: object, chat: Json) -> None:
    if not isinstance(text, dict) or text.keys() - {"format", "verbosity"}:
        _wrong("text", "an object with a format")
    if text.get("verbosity") not in (None, "medium"):
        _refuse("text.verbosity", "The model decides how much it says.", "unsupported_parameter")
    form = text.get("format")
    if form is None:
        return
    if not isinstance(form, dict):
        _wrong("text.format", "an object")
    kind = form.get("type")
    if kind == "json_object" and form.keys() == {"type"}:
        chat["response_format"] = {"type": "json_object"}
    elif kind == "json_schema":
        if form.keys() - {"type", "name", "schema", "description", "strict"} or not isinstance(
            form.get("schema"), dict
        ):
            _wrong("text.format", "a name and a schema")
        _field("text.format", form, "name")
        schema = {name: value for name, value in form.items() if name != "type" and value is not None}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif kind != "text" or form.keys() != {"type"}:
        _wrong("text.format.type", "text, json_object or json_schema")


def _reasoning(reasoning: object, chat: Json) -> None:
    if not isinstance(reasoning, dict):
        _wrong("reasoning", "an object")
    for name, value in reasoning.items():
        if name == "effort":
            if value is not None and value not in ("none", "minimal", "low", "medium", "high"):
                _wrong("reasoning.effort", "none, minimal, low, medium or high")
            if value is not None:
                chat["reasoning_effort"] = value
        elif value is not None:
            _refuse(f"reasoning.{name}", "Unsupported parameter.", "unsupported_parameter")


def _include(given: Json, chat: Json) -> None:
    include = given.get("include", [])
    if not isinstance(include, list):
        _wrong("include", "an array")
    for what in include:
        if what != _LOGPROBS:
            _refuse("include", "There is nothing more to include.", "unsupported_parameter")
    if include or "top_logprobs" in given:
        chat["logprobs"] = True
        chat["top_logprobs"] = _whole("top_logprobs", given.get("top_logprobs", 0), 0, 20)


def _echo(given: Json) -> Json:
    """What an answer repeats of its request."""
    text = given.get("text") or {}
    return {
        "model": given["model"],
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "temperature": given.get("temperature"),
        "top_p": given.get("top_p"),
        "top_logprobs": given.get("top_logprobs"),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in given.get("tools", [])],
        "text": {"format": text.get("format") or {"type": "text"}},
        "reasoning": {"effort": (given.get("reasoning") or {}).get("effort"), "summary": None},
        "truncation": "disabled",
        "user": given.get("user") if isinstance(given.get("user"), str) else None,
    }


def _check_fields(document: Mapping[str, Any], known: frozenset[str]) -> None:  # Any: JSON values
    for name, value in document.items():
        if name in _REFUSED and value is not None and value != _EMPTY.get(name, ...):
            _refuse(name, f"Unsupported parameter. {_REFUSED[name]}", "unsupported_parameter")
        if name not in known and name not in _REFUSED:
            _refuse(name, "Unrecognized request argument supplied.", "unknown_parameter")


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        _wrong(name, f"a number from {low} to {high}")
    return value


def _whole(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _wrong(name, f"an integer from {low} to {high}")
    return value


def _field(at: str, item: Json, name: str) -> str:
    return _text(f"{at}.{name}", item.get(name))


def _text(at: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        _wrong(at, "a text without NUL")
    return value


def _wrong(param: str, expected: str) -> NoReturn:
    _refuse(param, f"Invalid type or value: expected {expected}.", "invalid_type")


def _refuse(param: str, message: str, code: str) -> NoReturn:
    raise Refused(Refusal(400, message, code=code, param=param))
