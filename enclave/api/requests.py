"""Requests to inference routes: read within bounds, parsed strictly, admitted field by field, rewritten openly.

A field that is not on the route's list is refused by name, never ignored: the engine answers 200 to fields it does
not know, and some that it knows reach into scheduling, templates, caches or the network. What the gateway consumes or
sets is listed in the receipt (`x.request.rewritten`), by name only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from enclave.api.errors import NO_MODEL, NOT_ALLOWED, NOT_JSON, Refusal, Refused
from enclave.engine.base import Task

__all__ = ["CHAT", "COMPLETIONS", "Admitted", "Route", "admit", "parse"]

MAX_N: Final = 8
MAX_PROMPTS: Final = 64
"""Of one completion: each is a request of its own to the engine."""
MAX_SCHEMA: Final = 64 << 10
"""Bytes of JSON of `tools`, `response_format` or `structured_outputs`: they are compiled before a token is made."""
MAX_DEPTH: Final = 64
_SALT_TAG: Final = b"vouchsafe/cache-salt/v1\x00"

_SAMPLING: Final = frozenset(
    {
        "model",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "n",
        "presence_penalty",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "user",
        "store",
        "safety_identifier",
        "provider",
        "cache_salt",
        "top_k",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
        "stop_token_ids",
        "skip_special_tokens",
        "include_stop_str_in_output",
        "bad_words",
        "structured_outputs",
    }
)


@dataclass(frozen=True, slots=True)
class Route:
    """One inference route: where it stands, the fields a request may have, what its models do, and what more is asked
    of a request (*check* raises Refused)."""

    path: str
    fields: frozenset[str]
    task: Task = "generate"
    check: Callable[[Mapping[str, Any]], None] = lambda document: None  # Any: JSON values


def _check_chat(document: Mapping[str, Any]) -> None:  # Any: JSON values
    messages = document.get("messages")
    if messages is None:
        raise Refused(Refusal(400, "You must provide messages.", code="missing_required_parameter", param="messages"))
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        _wrong("messages", "an array of messages, not empty")


def _check_prompt(document: Mapping[str, Any]) -> None:  # Any: JSON values
    """A text, a list of tokens, or a list of either."""
    prompt = document.get("prompt")
    if prompt is None:
        raise Refused(Refusal(400, "You must provide a prompt.", code="missing_required_parameter", param="prompt"))
    each = prompt if isinstance(prompt, list) else [prompt]
    if not (each and (_are_prompts(each) or _are_tokens(each))):
        _wrong("prompt", "a string, an array of tokens, or an array of either")


def _are_prompts(each: list[Any]) -> bool:  # Any: JSON values
    return all(isinstance(one, str) or (isinstance(one, list) and _are_tokens(one)) for one in each)


def _are_tokens(each: list[Any]) -> bool:  # Any: JSON values
    return bool(each) and all(type(token) is int and 0 <= token < 2**31 for token in each)


CHAT: Final = Route(
    "/v1/chat/completions",
    _SAMPLING
    | {
        "messages",
        "top_logprobs",
        "max_completion_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "reasoning_effort",
    },
    check=_check_chat,
)
COMPLETIONS: Final = Route("/v1/completions", _SAMPLING | {"prompt", "suffix", "echo"}, check=_check_prompt)

_REFUSED: Final[Mapping[str, str]] = {
    "store": "Nothing is stored here.",
    "metadata": "Nothing is stored here, so there is nothing to label.",
    "previous_response_id": "Nothing is stored here.",
    "conversation": "Nothing is stored here.",
    "background": "Nothing is stored here.",
    "prompt_cache_retention": "The prefix cache lives in memory only.",
    "prompt_cache_options": "The prefix cache lives in memory only.",
    "prompt_cache_key": "The prefix cache is divided by API key.",
    "chat_template": "The template belongs to the measured model.",
    "chat_template_kwargs": "The template belongs to the measured model.",
    "logits_processors": "Code is not taken from requests.",
}
"""Why a field that callers may expect is refused. Every other unlisted field is refused without a reason."""


_PARAMETERS: Final = frozenset(
    {
        "model", "frequency_penalty", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "n",
        "presence_penalty", "seed", "stream", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
        "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "tool_choice",
        "parallel_tool_calls", "reasoning_effort", "echo", "dimensions", "encoding_format",
    }
)  # fmt: skip
"""Without those that carry content: stop strings, schemas, biased tokens. `tool_choice` may name a function: see
`_told`."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go to the engine.

    body      the bytes the engine gets, and the JSON they are (`document`)
    set, removed   names of fields that the gateway set and consumed
    wants_usage   whether the caller of a stream asked for its usage; the engine is asked in any case
    """

    model: str
    stream: bool
    body: bytes = field(repr=False)
    set: tuple[str, ...]
    removed: tuple[str, ...]
    wants_usage: bool
    document: Mapping[str, Any] = field(repr=False)  # Any: JSON values

    @property
    def params_digest(self) -> bytes:
        """SHA-256 over the parameters that shape an answer and are no content: JCS, numbers as decimal text."""
        shown = {n: _told(v) for n, v in self.document.items() if n in _PARAMETERS and v is not None}
        return hashlib.sha256(json.dumps(shown, sort_keys=True, separators=(",", ":")).encode("ascii")).digest()


def parse(body: bytes) -> dict[str, Any]:  # Any: JSON values
    """One JSON object: UTF-8, no duplicate member, no NaN, no lone surrogate, bounded depth. Raises Refused 400."""
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=_unique)
        # What can not be written back as UTF-8 JSON (NaN, infinity, lone surrogates) would reach the engine as
        # something else than was sent.
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise Refused(NOT_JSON) from None
    if not isinstance(document, dict) or _depth(document) > MAX_DEPTH:
        raise Refused(NOT_JSON)
    return document


def admit(
    route: Route,
    document: dict[str, Any],  # Any: JSON values
    *,
    known: Callable[[str], bool],
    allowed: Callable[[str], bool],
    salt_key: bytes,
    key_id: str,
) -> Admitted:
    """Check *document* against *route* and rewrite it for the engine. Raises Refused.

    known       whether a model id is served here;  allowed   whether the caller's project may ask it
    salt_key    32 bytes made at boot: prefix-cache salts are HMACs under it, so no caller can meet another's cache
    key_id      of the caller's API key
    """
    model = document.get("model")
    if model is None:
        raise Refused(
            Refusal(400, "You must provide a model parameter.", code="missing_required_parameter", param="model")
        )
    if not isinstance(model, str):
        _wrong("model", "a string")
    if not known(model):
        raise Refused(NO_MODEL)
    if not allowed(model):
        raise Refused(NOT_ALLOWED)
    sent = dict(document)
    removed: list[str] = [name for name in ("user", "safety_identifier", "provider", "store") if name in sent]
    _check_store(sent.pop("store", None))
    _check_provider(sent.pop("provider", None))
    for name in ("user", "safety_identifier"):
        if not isinstance(sent.pop(name, None), str | None):
            _wrong(name, "a string")
    for name in sent:
        if name not in route.fields:
            reason = _REFUSED.get(name)
            message = f"Unsupported parameter. {reason}" if reason else "Unrecognized request argument supplied."
            raise Refused(
                Refusal(400, message, code="unsupported_parameter" if reason else "unknown_parameter", param=name)
            )
    stream = _boolean(sent, "stream")
    _check_n(sent.get("n"))
    _check_lengths(sent)
    wants_usage = _check_stream_options(sent, removed, stream=stream)
    _check_text_only(sent.get("messages"))
    _check_sizes(sent)
    route.check(sent)
    made = ["cache_salt"]
    sent["cache_salt"] = _salt(salt_key, key_id.encode("ascii"), sent.get("cache_salt"))
    if stream:  # the engine's own count on every event, whatever the caller asked for: what is charged is what left
        sent["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        made.append("stream_options")
    body = json.dumps(sent, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Admitted(model, stream, body, tuple(made), tuple(removed), wants_usage, sent)


def _told(value: object) -> object:
    """Numbers as decimal text; of an object only that it was one: a tool's name is content."""
    if isinstance(value, dict):
        return "object"
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _wrong(name: str, expected: str) -> NoReturn:
    raise Refused(Refusal(400, f"Invalid type: expected {expected}.", code="invalid_type", param=name))


def _boolean(document: dict[str, Any], name: str) -> bool:  # Any: JSON values
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        _wrong(name, "a boolean")
    return bool(value)


def _check_store(store: object) -> None:
    if store is not None and store is not False:
        raise Refused(Refusal(400, "Nothing is stored here.", code="unsupported_parameter", param="store"))


def _check_n(n: object) -> None:
    if n is None:
        return
    if isinstance(n, bool) or not isinstance(n, int):
        _wrong("n", "an integer")
    if not 1 <= n <= MAX_N:
        raise Refused(Refusal(400, f"n must be between 1 and {MAX_N}.", code="invalid_value", param="n"))


def _check_lengths(document: Mapping[str, Any]) -> None:  # Any: JSON values
    """What a request may cost is worked out from these, so they are understood here and not only by the engine."""
    for name in ("max_tokens", "max_completion_tokens"):
        value = document.get(name)
        if value is not None and type(value) is not int:
            _wrong(name, "an integer")
        if value is not None and value < 0:
            raise Refused(Refusal(400, f"{name} must not be negative.", code="invalid_value", param=name))
    prompt = document.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and len(prompt) > MAX_PROMPTS:
        raise Refused(
            Refusal(400, f"prompt must have at most {MAX_PROMPTS} entries.", code="invalid_value", param="prompt")
        )


def _check_provider(provider: object) -> None:
    """Assertions that a direct, attested, non-storing service satisfies, or refuses; never ignores (ACI aci/1)."""
    if provider is None:
        return
    if not isinstance(provider, dict):
        _wrong("provider", "an object")
    for name, value in provider.items():
        param = f"provider.{name}"
        if name == "aci_session_ids":
            if not isinstance(value, list) or not value or provider.get("aci_verified") is False:
                raise Refused(Refusal(400, "Invalid list of sessions.", code="invalid_value", param=param))
            message = "This service is direct: it has no upstream sessions."
            raise Refused(Refusal(412, message, "session_not_accepted", "session_not_accepted", param))
        if name == "aci_verified":
            if not isinstance(value, bool):
                _wrong(param, "a boolean")
        elif (name, value) not in (("zdr", True), ("data_collection", "deny")):
            raise Refused(Refusal(400, "Unsupported provider preference.", code="unsupported_parameter", param=param))


def _check_stream_options(document: dict[str, Any], removed: list[str], *, stream: bool) -> bool:  # Any: JSON values
    """Whether the caller wants to see the usage of its stream."""
    options = document.pop("stream_options", None)
    if options is None:
        return False
    if not isinstance(options, dict):
        _wrong("stream_options", "an object")
    if not stream:
        message = "stream_options is only allowed when stream is true."
        raise Refused(Refusal(400, message, code="invalid_value", param="stream_options"))
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            param = f"stream_options.{name}"
            raise Refused(
                Refusal(400, "Unrecognized request argument supplied.", code="unknown_parameter", param=param)
            )
        _boolean(options, name)
    if "include_obfuscation" in options:
        removed.append("stream_options.include_obfuscation")
    return bool(options.get("include_usage"))


def _check_text_only(messages: object) -> None:
    """Media would be fetched or decoded by the engine: content parts are text, or the request is refused."""
    if not isinstance(messages, list):
        return  # absent for completions; a wrong type is the engine's to refuse
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                param = f"messages[{number}].content"
                raise Refused(Refusal(400, "This model takes text only.", code="unsupported_content", param=param))


def _check_sizes(document: Mapping[str, Any]) -> None:  # Any: JSON values
    for name in ("tools", "response_format", "structured_outputs"):
        if name in document and len(json.dumps(document[name])) > MAX_SCHEMA:
            raise Refused(Refusal(400, f"{name} is too large.", code="invalid_value", param=name))


def _salt(key: bytes, key_digest: bytes, own: object) -> str:
    """base64url(HMAC-SHA256(boot key, tag ‖ lp(key digest) ‖ lp(caller's own salt))): a caller may divide its own
    cache further, and can not choose its way into another's."""
    if own is not None and not (isinstance(own, str) and 0 < len(own) <= 128):
        _wrong("cache_salt", "a string of 1 to 128 characters")
    text = own.encode("utf-8") if isinstance(own, str) else b""
    message = _SALT_TAG + b"".join(len(part).to_bytes(4, "big") + part for part in (key_digest, text))
    return base64.urlsafe_b64encode(hmac.new(key, message, hashlib.sha256).digest()).rstrip(b"=").decode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a member stands twice")
    return made


def _depth(document: object) -> int:
    depth, level = 0, [document]
    while level:
        depth += 1
        nested = [v for v in level if isinstance(v, dict | list)]
        level = [inner for v in nested for inner in (v.values() if isinstance(v, dict) else v)]
    return depth
