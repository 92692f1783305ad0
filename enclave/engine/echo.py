"""An engine for tests that speaks the same HTTP as vLLM, deterministically, and can be told to misbehave.

It answers with the last user message (or the prompt), one word per event, and counts a token per word (`max_tokens`
holds, and `n` answers are given); as an embedding model, with a vector made from the input's SHA-256. Delay, errors, a
death in mid-stream, and a stream that ends without `[DONE]` are switched by attributes; what reached it is kept in
`calls`. Its quirks are vLLM's: integer error codes, an error event followed by `[DONE]`, unknown fields accepted. No
configuration can load it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from enclave.engine import selftest
from enclave.engine.base import ASGIApp, Receive, Scope, Send, Task

__all__ = ["Call", "EchoEngine"]

Fault = Literal[
    "", "reject", "crash", "raise", "error-event", "error-first", "no-done", "no-usage", "hang", "no-stream"
]  # fmt: skip


@dataclass(slots=True)
class Call:
    """One request as it reached the engine."""

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes = field(repr=False)
    disconnected: bool = False
    finished: bool = False


class EchoEngine:
    """Implements `enclave.engine.base.Engine`.

    delay     seconds before each event
    fault     what to do wrong: `reject` 400, `crash` 500, `raise` an exception, `error-event` after two events,
              `error-first` before any, `no-done`, `no-usage` at the end, `hang` after two events, `no-stream` JSON
              for a stream
    repeat    how often the text is said
    most      how many requests it had at a time
    """

    retry_after = None

    def __init__(self, model_id: str, task: Task = "generate") -> None:
        self._model_id = model_id
        self._task = task
        self._failed = asyncio.Event()
        self._reason = ""
        self._started = False
        self.delay = 0.0
        self.fault: Fault = ""
        self.repeat = 1
        self.calls: list[Call] = []
        self.most = 0
        self._running = 0

    @property
    def model_id(self) -> str:
        return self._model_id

    @property
    def task(self) -> Task:
        return self._task

    @property
    def app(self) -> ASGIApp:
        return self._serve

    @property
    def healthy(self) -> bool:
        return self._started and not self._failed.is_set()

    async def start(self) -> None:
        self._started = True

    async def self_test(self, golden: list[dict[str, Any]]) -> None:  # Any: JSON values
        await selftest.run(self, golden)

    async def wait_failed(self) -> str:
        await self._failed.wait()
        return self._reason

    async def stop(self) -> None:
        self._started = False

    def die(self, reason: str) -> None:
        """Fail for good, as an engine does whose process was killed."""
        self._reason = reason
        self._failed.set()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        call = Call(scope["path"], list(scope["headers"]), body)
        self.calls.append(call)
        self._running += 1
        self.most = max(self.most, self._running)
        watch = asyncio.create_task(self._watch(call, receive))
        answer = asyncio.create_task(self._answer(call, send))
        try:
            await asyncio.wait({watch, answer}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
                call.finished = True
        finally:
            self._running -= 1
            for task in (watch, answer):
                task.cancel()
            await asyncio.gather(watch, answer, return_exceptions=True)

    async def _watch(self, call: Call, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            raise RuntimeError("the body was given twice")
        call.disconnected = True

    async def _answer(self, call: Call, send: Send) -> None:
        body = json.loads(call.body)
        if self.fault == "raise":
            raise RuntimeError("canary in an exception: " + call.body.decode())
        if self.fault in ("reject", "crash"):
            status = 400 if self.fault == "reject" else 500
            document = {
                "error": {"message": "no such luck", "type": "BadRequestError", "param": "seed", "code": status}
            }
            await _json(send, status, document)
            return
        if call.path == "/tokenize":
            await _json(send, 200, _tokens(_text(body)))
            return
        if call.path == "/v1/embeddings":
            await asyncio.sleep(self.delay)
            await _json(send, 200, _vectors(self._model_id, body))
            return
        said = _Said(self._model_id, body, self.repeat, chat=call.path == "/v1/chat/completions")
        if not body.get("stream") or self.fault == "no-stream":
            await asyncio.sleep(self.delay)
            await _json(send, 200, said.whole())
            return
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        async for event in self._events(said):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, said: _Said) -> AsyncIterator[bytes]:
        error = b'data: {"error": {"message": "secret text", "type": "InternalServerError", "code": 500}}\n\n'
        if self.fault == "error-first":
            yield error
            yield b"data: [DONE]\n\n"
            return
        for number in range(said.count):
            await asyncio.sleep(self.delay)
            for answer in range(said.answers):
                yield said.event(number, answer)
            if number == 1 and self.fault == "hang":
                await asyncio.Event().wait()
            if number == 1 and self.fault == "error-event":
                yield error
                break
        if said.usage and self.fault != "no-usage":
            yield said.final()
        if self.fault != "no-done":
            yield b"data: [DONE]\n\n"


class _Said:
    """One answer of the echo, and vLLM's ways of telling it: until the end each answer's tokens are counted apart."""

    def __init__(self, model: str, body: dict[str, Any], repeat: int, *, chat: bool) -> None:  # Any: JSON values
        words = " ".join([_text(body)] * repeat).split(" ")
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        self.words = words if most is None else words[:most]
        self.length = len(self.words) < len(words)
        self.prompt, self.count, self.answers = len(_text(body).split(" ")), len(self.words), body.get("n") or 1
        self._model, self._chat = model, chat
        options = body.get("stream_options") or {}
        self.usage = options.get("include_usage") is True
        self._continuous = self.usage and options.get("continuous_usage_stats") is True

    def event(self, number: int, answer: int) -> bytes:
        word, last = self.words[number], number == self.count - 1
        text = word if number == 0 else " " + word
        choice: dict[str, Any] = {"index": answer, "finish_reason": self._reason if last else None}
        choice.update({"delta": {"role": "assistant", "content": text}} if self._chat else {"text": text})
        return self._chunk([choice], self._usage(number + 1) if self._continuous else None)

    def final(self) -> bytes:
        return self._chunk([], self._usage(self.count * self.answers))

    def whole(self) -> dict[str, Any]:  # Any: JSON values
        text = " ".join(self.words)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {
            "id": "chatcmpl-echo",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": 0,
            "model": self._model,
            "choices": [{"index": i, "finish_reason": self._reason, **said} for i in range(self.answers)],
            "usage": self._usage(self.count * self.answers),
        }

    @property
    def _reason(self) -> str:
        return "length" if self.length else "stop"

    def _usage(self, output: int) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "total_tokens": self.prompt + output, "completion_tokens": output}

    def _chunk(self, choices: list[Any], usage: dict[str, int] | None) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk: dict[str, Any] = {"id": "chatcmpl-echo", "object": kind, "created": 0, "model": self._model}
        chunk["choices"] = choices
        if usage is not None:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _text(body: dict[str, Any]) -> str:  # Any: JSON values
    said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return said if isinstance(said, str) else json.dumps(said)


def _tokens(text: str) -> dict[str, Any]:  # Any: JSON values
    words = text.split(" ")
    return {"count": len(words), "max_model_len": 1 << 20, "tokens": list(range(len(words))), "token_strs": None}


def _vectors(model: str, body: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
    given = body["input"]
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    data = []
    for index, one in enumerate(inputs):
        bits = hashlib.sha256(json.dumps(one).encode()).digest()[: body.get("dimensions") or 16]
        length = math.sqrt(sum(b * b for b in bits))
        vector: Any = [b / length for b in bits]
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    count = sum(len(one) if isinstance(one, list) else len(one.split(" ")) for one in inputs)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"id": "embd-echo", "object": "list", "created": 0, "model": model, "data": data, "usage": usage}


async def _json(send: Send, status: int, document: dict[str, Any]) -> None:  # Any: JSON values
    body = json.dumps(document).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})
