"""The answer side of `/v1/responses`: OpenAI's response object, whole or as its numbered events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from enclave.api.errors import Refusal

__all__ = ["Responses"]

Json = dict[str, Any]  # Any: JSON values
_KNOWN = ("server_error", "rate_limit_exceeded", "invalid_prompt")


class Responses:
    """One answer told in the words of the Responses API. See `enclave.api.dialect.Dialect`.

    echo   what the response repeats of its request
    """

    def __init__(self, id: str, created: int, echo: Json) -> None:
        self._id, self._created, self._echo = id, created, echo
        self._tag = id.partition("_")[2]
        self._number = -1
        self._output: list[Json] = []
        self._open: Json | None = None
        """The item that is being told: the last of the output."""
        self._call = -1
        self._pieces: list[str] = []
        self._logprobs: list[Json] = []
        self._usage: Json | None = None
        self._reason: str | None = None
        self._head = b""

    # whole

    def whole(self, answer: Mapping[str, Any]) -> Json:  # Any: JSON values
        (choice,) = answer["choices"]
        message = choice["message"]
        self._reason = choice["finish_reason"]
        self._usage = answer["usage"]
        if thoughts := message.get("reasoning") or message.get("reasoning_content"):
            self._output.append(self._thoughts(thoughts))
        calls = message.get("tool_calls") or ()
        if message.get("content") or not calls:
            item = self._message("completed")
            logprobs = _logprobs(choice.get("logprobs"))
            item["content"] = [{**_part(message.get("content") or ""), "logprobs": logprobs}]
            self._output.append(item)
        for call in calls:
            self._output.append(self._function(call["id"], call["function"]["name"], call["function"]["arguments"]))
        return self._response(self._status())

    # events

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:  # Any: JSON values
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        told = b"" if self._number >= 0 else self._begin()
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if thoughts := delta.get("reasoning") or delta.get("reasoning_content"):
                self._pieces.append(thoughts) if self._is("reasoning") else self._begin_thoughts(thoughts)
            if text := delta.get("content"):
                told += self._text(text, choice.get("logprobs"))
            for call in delta.get("tool_calls") or ():
                told += self._tool(call)
            if choice.get("finish_reason"):
                self._reason = choice["finish_reason"]
        return told

    def end(self) -> tuple[bytes, bytes]:
        told = b"" if self._number >= 0 else self._begin()
        told += self._close()
        if not self._output:
            told += self._open_message() + self._close()
        status = self._status()
        return told, self._event(f"response.{status}", response=self._response(status))

    def failed(self, refusal: Refusal) -> bytes:
        error = {"code": refusal.code if refusal.code in _KNOWN else "server_error", "message": refusal.message}
        return self._event("response.failed", response={**self._response("failed"), "error": error})

    def _begin(self) -> bytes:
        response = self._response("in_progress")
        told = self._event("response.created", response=response)
        return told + self._event("response.in_progress", response=response)

    def _is(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _text(self, text: str, logprobs: Any) -> bytes:  # Any: JSON values
        told = b"" if self._is("message") else self._close() + self._open_message()
        self._pieces.append(text)
        if logprobs is None:  # the way of most events: one small JSON text
            self._number += 1
            return told + self._head % (json.dumps(text).encode("ascii"), self._number)
        found = _logprobs(logprobs)
        self._logprobs += found
        return told + self._event(
            "response.output_text.delta", item_id=self._item_id, output_index=self._index, content_index=0, delta=text,
            logprobs=found,
        )  # fmt: skip

    def _open_message(self) -> bytes:
        self._open = self._message("in_progress")
        self._output.append(self._open)
        self._head = (
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","item_id":"%b",'
            b'"output_index":%d,"content_index":0,"logprobs":[],"delta":%%b,"sequence_number":%%d}\n\n'
            % (self._item_id.encode("ascii"), self._index)
        )
        told = self._event("response.output_item.added", output_index=self._index, item={**self._open})
        return told + self._event(
            "response.content_part.added", item_id=self._item_id, output_index=self._index, content_index=0,
            part=_part(""),
        )  # fmt: skip

    def _tool(self, call: Mapping[str, Any]) -> bytes:  # Any: JSON values
        function = call.get("function") or {}
        told = b""
        if not self._is("function_call") or call["index"] != self._call:
            told = self._close()
            self._call = call["index"]
            self._open = {**self._function(call["id"], function["name"], ""), "status": "in_progress"}
            self._output.append(self._open)
            told += self._event("response.output_item.added", output_index=self._index, item={**self._open})
        if arguments := function.get("arguments"):
            self._pieces.append(arguments)
            told += self._event(
                "response.function_call_arguments.delta", item_id=self._item_id, output_index=self._index,
                delta=arguments,
            )  # fmt: skip
        return told

    def _begin_thoughts(self, thoughts: str) -> None:
        """Thoughts are told when they are complete: OpenAI's events have no word for what is not their summary."""
        self._open = self._thoughts("")
        self._output.append(self._open)
        self._pieces.append(thoughts)

    def _close(self) -> bytes:
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return b""
        at = {"item_id": self._item_id, "output_index": self._index}
        told = b""
        if item["type"] == "message":
            part = {**_part(text), "logprobs": self._logprobs}
            told = self._event(
                "response.output_text.done", **at, content_index=0, text=text, logprobs=self._logprobs
            ) + self._event("response.content_part.done", **at, content_index=0, part=part)
            item["content"] = [part]
        elif item["type"] == "function_call":
            item["arguments"] = text
            told = self._event("response.function_call_arguments.done", **at, name=item["name"], arguments=text)
        else:
            item["content"] = [{"type": "reasoning_text", "text": text}]
            told = self._event("response.output_item.added", output_index=self._index, item={**item})
        item["status"] = "completed"
        told += self._event("response.output_item.done", output_index=self._index, item=item)
        self._open, self._pieces, self._logprobs = None, [], []
        return told

    # objects

    @property
    def _index(self) -> int:
        return len(self._output) - 1

    @property
    def _item_id(self) -> str:
        return str(self._output[-1]["id"])

    def _message(self, status: str) -> Json:
        id = f"msg_{self._tag}{len(self._output):02d}"
        return {"type": "message", "id": id, "status": status, "role": "assistant", "content": []}

    def _function(self, call_id: str, name: str, arguments: str) -> Json:
        return {
            "type": "function_call", "id": f"fc_{self._tag}{len(self._output):02d}", "call_id": call_id, "name": name,
            "arguments": arguments, "status": "completed",
        }  # fmt: skip

    def _thoughts(self, text: str) -> Json:
        content = [{"type": "reasoning_text", "text": text}]
        return {"type": "reasoning", "id": f"rs_{self._tag}{len(self._output):02d}", "summary": [], "content": content}

    def _status(self) -> str:
        return "incomplete" if self._reason in ("length", "content_filter") else "completed"

    def _response(self, status: str) -> Json:
        cut = "max_output_tokens" if self._reason == "length" else "content_filter"
        finished = status in ("completed", "incomplete")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": cut} if status == "incomplete" else None,
            "output": list(self._output) if finished else [],
            "previous_response_id": None,
            "store": False,
            "metadata": {},
            "service_tier": "default",
            "usage": _usage(self._usage) if finished and self._usage is not None else None,
            **self._echo,
        }

    def _event(self, type: str, **fields: Any) -> bytes:  # Any: JSON values
        self._number += 1
        data = {"type": type, "sequence_number": self._number, **fields}
        return b"event: %b\ndata: %b\n\n" % (type.encode("ascii"), json.dumps(data, separators=(",", ":")).encode())


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Mapping[str, Any]) -> Json:  # Any: JSON values
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage["total_tokens"],
    }


def _logprobs(given: Any) -> list[Json]:  # Any: JSON values
    content = given.get("content") if isinstance(given, dict) else None
    return [
        {name: one[name] for name in ("token", "logprob", "bytes") if name in one}
        | {"top_logprobs": [{n: t[n] for n in ("token", "logprob", "bytes") if n in t} for t in one["top_logprobs"]]}
        for one in content or ()
    ]
