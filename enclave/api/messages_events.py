"""The answer side of `/v1/messages`: Anthropic's message, whole or as its named events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from enclave.api.errors import Refusal

__all__ = ["Messages"]

Json = dict[str, Any]  # Any: JSON values
_REASONS: Final = {
    "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal",
}  # fmt: skip
_TEXT: Final = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":"text_delta","text":%b}}\n\n'
)


class Messages:
    """One answer told in Anthropic's words. See `enclave.api.dialect.Dialect`."""

    def __init__(self, id: str, model: str) -> None:
        self._id, self._model = id, model
        self._begun = False
        self._index = -1
        self._open: str | int | None = None
        """What the open block is: `text`, or the number of a tool call."""
        self._reason: str | None = None
        self._stopped_by: str | None = None
        self._usage: Json = {}

    def whole(self, answer: Mapping[str, Any]) -> Json:  # Any: JSON values
        (choice,) = answer["choices"]
        message = choice["message"]
        content: list[Json] = []
        if message.get("content"):
            content.append({"type": "text", "text": message["content"]})
        for call in message.get("tool_calls") or ():
            function = call["function"]
            arguments = json.loads(function["arguments"] or "{}")
            content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
        self._end(choice)
        return {**self._message(content), "usage": _usage(answer["usage"])}

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:  # Any: JSON values
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        told = b"" if self._begun else self._begin()
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if text := delta.get("content"):
                told += self._block("text") + _TEXT % (self._index, json.dumps(text).encode("ascii"))
            for call in delta.get("tool_calls") or ():
                told += self._call(call)
            if choice.get("finish_reason"):
                self._end(choice)
        return told

    def end(self) -> tuple[bytes, bytes]:
        told = b"" if self._begun else self._begin()
        told += self._close()
        delta = {"stop_reason": self._reason or "end_turn", "stop_sequence": self._stopped_by}
        told += _event({"type": "message_delta", "delta": delta, "usage": _usage(self._usage)})
        return told, _event({"type": "message_stop"})

    def failed(self, refusal: Refusal) -> bytes:
        kind = "overloaded_error" if refusal.status == 503 else "api_error"
        if refusal.status == 401:
            kind = "authentication_error"
        return _event({"type": "error", "error": {"type": kind, "message": refusal.message}})

    def _begin(self) -> bytes:
        self._begun = True
        message = {**self._message([]), "usage": {**_usage(self._usage), "output_tokens": 0}}
        return _event({"type": "message_start", "message": message})

    def _block(self, what: str | int, block: Json | None = None) -> bytes:
        """Close what is open and open *what*, unless it is."""
        if self._open == what:
            return b""
        told = self._close()
        self._index += 1
        self._open = what
        block = block or {"type": "text", "text": ""}
        return told + _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event({"type": "content_block_stop", "index": self._index})

    def _call(self, call: Mapping[str, Any]) -> bytes:  # Any: JSON values
        function = call.get("function") or {}
        told = b""
        if call.get("id"):
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
            told = self._block(call["index"], block)
        if function.get("arguments"):
            delta = {"type": "input_json_delta", "partial_json": function["arguments"]}
            told += _event({"type": "content_block_delta", "index": self._index, "delta": delta})
        return told

    def _end(self, choice: Mapping[str, Any]) -> None:  # Any: JSON values
        self._reason = _REASONS.get(choice["finish_reason"], "end_turn")
        stopped_by = choice.get("stop_reason")  # vLLM's: the stop string that was met, or a token's number
        if self._reason == "end_turn" and isinstance(stopped_by, str):
            self._reason, self._stopped_by = "stop_sequence", stopped_by

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": self._reason, "stop_sequence": self._stopped_by,
        }  # fmt: skip


def _usage(usage: Mapping[str, Any]) -> Json:  # Any: JSON values
    """Anthropic counts what came from the cache apart."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }


def _event(data: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode("ascii"), json.dumps(data, separators=(",", ":")).encode())
