"""`POST /tokenize`: vLLM's own route with its own names, less what would let a caller choose the template.

Also the two questions that the gateway itself asks of an engine's tokenizer before it reserves anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn

from enclave.api.errors import Refusal, Refused

__all__ = ["TOKENIZE_PATH", "count_completion", "count_document", "tokenize_request", "tokenized"]

TOKENIZE_PATH: Final = "/tokenize"
_COMPLETION: Final = frozenset({"model", "prompt", "add_special_tokens", "return_token_strs"})
_CHAT: Final = frozenset(
    {"model", "messages", "add_generation_prompt", "continue_final_message", "add_special_tokens", "return_token_strs",
     "tools"}
)  # fmt: skip
_FLAGS: Final = ("add_special_tokens", "return_token_strs", "add_generation_prompt", "continue_final_message")

Json = dict[str, Any]  # Any: JSON values


def count_document(chat: Mapping[str, Any]) -> Json:  # Any: JSON values
    """What the engine is asked to count the prompt of a chat request as it will render it."""
    asked: Json = {"messages": chat["messages"], "add_generation_prompt": True}
    if chat.get("tools") and chat.get("tool_choice") != "none":
        asked["tools"] = chat["tools"]
    return asked


def count_completion(prompt: str) -> Json:
    """The same for the prompt of a completion, or an input of an embedding."""
    return {"prompt": prompt, "add_special_tokens": True}


def tokenize_request(document: Mapping[str, Any]) -> tuple[str, Json]:  # Any: JSON values
    """Model id, and what the engine is asked. Raises Refused."""
    model = document.get("model")
    if model is None:
        raise Refused(Refusal(400, "You must provide a model parameter.", code="missing_required_parameter",
                              param="model"))  # fmt: skip
    if not isinstance(model, str):
        _wrong("model", "a string")
    if ("prompt" in document) == ("messages" in document):
        _refuse("prompt", "Give either a prompt or messages.", "missing_required_parameter")
    for name in document:
        if name not in (_CHAT if "messages" in document else _COMPLETION):
            _refuse(name, "Unrecognized request argument supplied.", "unknown_parameter")
    for name in _FLAGS:
        if not isinstance(document.get(name), bool | None):
            _wrong(name, "a boolean")
    if "prompt" in document and not isinstance(document["prompt"], str):
        _wrong("prompt", "a string")
    if "messages" in document:
        _check_messages(document["messages"])
    if not isinstance(document.get("tools"), list | None):
        _wrong("tools", "an array")
    return model, {name: value for name, value in document.items() if value is not None}


def tokenized(answer: Mapping[str, Any]) -> Json:  # Any: JSON values
    """The engine's answer, as far as it is known. Raises KeyError or TypeError for what is none."""
    return {name: answer[name] for name in ("count", "max_model_len", "tokens")} | {
        "token_strs": answer.get("token_strs")
    }


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        _wrong("messages", "an array of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _wrong(f"messages[{number}]", "a message")
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                _refuse(f"messages[{number}].content", "This model takes text only.", "unsupported_content")


def _wrong(param: str, expected: str) -> NoReturn:
    _refuse(param, f"Invalid type: expected {expected}.", "invalid_type")


def _refuse(param: str, message: str, code: str) -> NoReturn:
    raise Refused(Refusal(400, message, code=code, param=param))
