"""`POST /v1/messages`: Anthropic's form of a chat, for clients that speak it. A translation, both ways.

One request becomes one chat request of the engine; what cannot be said in a chat is refused by name. Nothing is stored
and nothing runs here: server tools, containers, MCP servers and files are refused. Earlier thinking blocks are left
out: the engine was not given them as thoughts. Cache hints of five minutes are taken and change nothing: the prefix
cache lives in memory, divided by key, and asks nobody.

A client may bring its key as `x-api-key`, as Anthropic's do, or as a bearer token; not both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from enclave.access.keys import bearer
from enclave.api.dialect import Dialect
from enclave.api.errors import Refusal, Refused
from enclave.api.messages_events import Messages

__all__ = ["COUNT_PATH", "MESSAGES_PATH", "count", "counted", "error_body", "token", "translate"]

MESSAGES_PATH: Final = "/v1/messages"
COUNT_PATH: Final = MESSAGES_PATH + "/count_tokens"
MAX_BLOCKS: Final = 10_000
_KEY: Final = re.compile(rb"[\x21-\x7e]{1,512}")

_COUNTED: Final = frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking"})
_FIELDS: Final = _COUNTED | {
    "max_tokens", "metadata", "service_tier", "stop_sequences", "stream", "temperature", "top_k", "top_p",
}  # fmt: skip
_REFUSED: Final = {
    "container": "Nothing runs here.",
    "mcp_servers": "Nothing here calls others.",
    "context_management": "Nothing is stored here.",
    "cache_control": "The prefix cache lives in memory only.",
    "output_config": "Structured answers are asked for on /v1/chat/completions.",
}

Json = dict[str, Any]  # Any: JSON values
_STATUS: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def token(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The one credential of a request: a bearer token, or one `x-api-key`; None for none, several, or both."""
    kept = list(headers)
    keys = [value for name, value in kept if name == b"x-api-key"]
    if not keys:
        return bearer(kept)
    if len(keys) > 1 or any(name == b"authorization" for name, _ in kept) or not _KEY.fullmatch(keys[0]):
        return None
    return keys[0]


def error_body(refusal: Refusal) -> bytes:
    """Anthropic's shape of an error: its SDK chooses its exception by the status and shows these words."""
    kind = _STATUS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": refusal.message}}).encode("ascii")


def counted(tokens: int) -> Json:
    return {"input_tokens": tokens}


def count(document: Json) -> Json:
    """The chat request whose prompt COUNT_PATH counts. Raises Refused."""
    _check_fields(document, _COUNTED)
    return _chat(document)


def translate(document: Json, *, id: str, created: int) -> tuple[Json, Dialect]:
    """The chat request that *document* stands for, and how its answer is told. Raises Refused."""
    _check_fields(document, _FIELDS)
    most = document.get("max_tokens")
    if most is None:
        _refuse("max_tokens", "max_tokens is required.", "missing_required_parameter")
    if type(most) is not int or most < 1:
        _wrong("max_tokens", "an integer of at least 1")
    chat = {**_chat(document), "max_tokens": most}
    for name in ("temperature", "top_p"):
        if document.get(name) is not None:
            chat[name] = _number(name, document[name], 0, 1)
    if document.get("top_k") is not None:
        if type(document["top_k"]) is not int or document["top_k"] < 1:
            _wrong("top_k", "an integer of at least 1")
        chat["top_k"] = document["top_k"]
    if document.get("stop_sequences") is not None and (stop := _texts("stop_sequences", document["stop_sequences"])):
        chat["stop"] = stop
    if not isinstance(document.get("stream"), bool | None):
        _wrong("stream", "a boolean")
    if document.get("stream"):
        chat["stream"] = True
    if document.get("service_tier") not in (None, "auto", "standard_only"):
        _refuse("service_tier", "There is one service tier.", "unsupported_parameter")
    if (user := _user(document.get("metadata"))) is not None:
        chat["user"] = user
    return chat, Messages(id, document["model"])


def _chat(document: Json) -> Json:
    model = document.get("model")
    if model is None:
        _refuse("model", "You must provide a model parameter.", "missing_required_parameter")
    if not isinstance(model, str):
        _wrong("model", "a string")
    thinking = document.get("thinking")
    if thinking is not None and thinking != {"type": "disabled"}:
        _refuse("thinking", "Thinking is the model's own to begin here.", "unsupported_parameter")
    messages: list[Json] = []
    if document.get("system") is not None:
        messages.append({"role": "system", "content": _text_of("system", document["system"])})
    given = document.get("messages")
    if not isinstance(given, list) or not given:
        _wrong("messages", "an array of messages, not empty")
    for number, message in enumerate(given):
        messages += _message(f"messages[{number}]", message)
    chat: Json = {"model": model, "messages": messages}
    if document.get("tools") is not None and (tools := _tools(document["tools"])):
        chat["tools"] = tools
    _tool_choice(document.get("tool_choice"), chat)
    return chat


def _message(where: str, message: object) -> list[Json]:
    """One turn; results of tools become turns of their own, before what else the user says."""
    if not isinstance(message, dict) or message.keys() - {"role", "content"}:
        _wrong(where, "an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        _wrong(f"{where}.role", "user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": _clean(f"{where}.content", content)}]
    blocks = _blocks(f"{where}.content", content)
    texts: list[str] = []
    calls: list[Json] = []
    results: list[Json] = []
    for number, block in enumerate(blocks):
        at = f"{where}.content[{number}]"
        kind = block.get("type")
        if kind == "text":
            texts.append(_field(at, block, "text"))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(at, block))
        elif kind == "tool_result" and role == "user":
            results.append(_result(at, block))
        elif kind not in ("thinking", "redacted_thinking") or role != "assistant":
            _refuse(at, "This model takes text and its own tools only.", "unsupported_content")
    said: Json = {"role": role, "content": "\n".join(texts) if texts else None}
    if calls:
        said["tool_calls"] = calls
    if texts or calls:
        return [*results, said]
    return results or [{"role": role, "content": ""}]


def _call(at: str, block: Json) -> Json:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        _wrong(f"{at}.input", "an object")
    function = {"name": _field(at, block, "name"), "arguments": json.dumps(arguments)}
    return {"id": _field(at, block, "id"), "type": "function", "function": function}


def _result(at: str, block: Json) -> Json:
    content = block.get("content")
    text = "" if content is None else _text_of(f"{at}.content", content)
    if not isinstance(block.get("is_error"), bool | None):
        _wrong(f"{at}.is_error", "a boolean")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": _field(at, block, "tool_use_id"), "content": text}


def _tools(given: object) -> list[Json]:
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        _wrong("tools", "an array of tools")
    made = []
    for number, tool in enumerate(given):
        at = f"tools[{number}]"
        if tool.get("type") not in (None, "custom"):
            _refuse(f"{at}.type", "Nothing runs here: tools are the caller's own.", "unsupported_tool")
        if tool.keys() - {"type", "name", "description", "input_schema", "cache_control"}:
            _refuse(at, "Unrecognized request argument supplied.", "unknown_parameter")
        if not isinstance(tool.get("input_schema"), dict):
            _wrong(f"{at}.input_schema", "a JSON schema")
        function: Json = {"name": _field(at, tool, "name"), "parameters": tool["input_schema"]}
        if tool.get("description") is not None:
            function["description"] = _field(at, tool, "description")
        made.append({"type": "function", "function": function})
    return made


def _tool_choice(choice: object, chat: Json) -> None:
    if choice is None:
        return
    if not isinstance(choice, dict) or choice.keys() - {"type", "name", "disable_parallel_tool_use"}:
        _wrong("tool_choice", "an object with a type")
    if not isinstance(choice.get("disable_parallel_tool_use"), bool | None):
        _wrong("tool_choice.disable_parallel_tool_use", "a boolean")
    words = {"auto": "auto", "any": "required", "none": "none"}
    kind = choice.get("type")
    if kind == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": _field("tool_choice", choice, "name")}}
    elif isinstance(kind, str) and kind in words:
        chat["tool_choice"] = words[kind]
    else:
        _wrong("tool_choice.type", "auto, any, tool or none")
    if choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False


def _user(metadata: object) -> str | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or metadata.keys() - {"user_id"}:
        _wrong("metadata", "an object with user_id")
    user = metadata.get("user_id")
    if not isinstance(user, str | None):
        _wrong("metadata.user_id", "a string")
    return user


def _text_of(where: str, content: object) -> str:
    """A text, or the texts of its blocks."""
    if isinstance(content, str):
        return _clean(where, content)
    texts = []
    for number, block in enumerate(_blocks(where, content)):
        if block.get("type") != "text":
            _refuse(f"{where}[{number}]", "This model takes text only.", "unsupported_content")
        texts.append(_field(f"{where}[{number}]", block, "text"))
    return "\n".join(texts)


def _blocks(where: str, content: object) -> list[Json]:
    if not isinstance(content, list) or len(content) > MAX_BLOCKS:
        _wrong(where, "a string or an array of content blocks")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            _wrong(f"{where}[{number}]", "a content block")
        hint = block.get("cache_control")
        if hint is not None and hint not in ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}):
            _refuse(f"{where}[{number}].cache_control", _REFUSED["cache_control"], "unsupported_parameter")
    return content


def _check_fields(document: Mapping[str, Any], known: frozenset[str]) -> None:  # Any: JSON values
    for name in document:
        if name in _REFUSED:
            _refuse(name, f"Unsupported parameter. {_REFUSED[name]}", "unsupported_parameter")
        if name not in known:
            _refuse(name, "Unrecognized request argument supplied.", "unknown_parameter")


def _texts(name: str, given: object) -> list[str]:
    if not isinstance(given, list) or len(given) > 16 or not all(isinstance(t, str) and t for t in given):
        _wrong(name, "an array of at most 16 strings")
    return [_clean(name, text) for text in given]


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        _wrong(name, f"a number from {low} to {high}")
    return value


def _field(where: str, block: Json, name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        _wrong(f"{where}.{name}", "a string")
    return _clean(f"{where}.{name}", value)


def _clean(where: str, text: str) -> str:
    if "\0" in text:
        _wrong(where, "text without NUL")
    return text


def _wrong(param: str, expected: str) -> NoReturn:
    _refuse(param, f"{param}: expected {expected}.", "invalid_type")


def _refuse(param: str, message: str, code: str) -> NoReturn:
    raise Refused(Refusal(400, message, code=code, param=param))
