"""HTTP to an engine process, byte by byte: a scripted server of this process stands at the other end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from enclave.engine import wire
from enclave.engine.base import EngineGone
from enclave.engine.call import inner_scope, post
from enclave.engine.wire import Wire
from tests.enclave.engine.workers import until

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Server:
    """Answers each request with the next of `answers`; None hangs up, a function does as it likes."""

    def __init__(self) -> None:
        self.answers: list[bytes | Callable[[asyncio.StreamWriter], Awaitable[None]] | None] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self.tasks: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(v) for k, _, v in (h.partition(b":") for h in head.split(b"\r\n")) if b"length" in k)
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                if answer is None:
                    return
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    await answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server()
    listening = await asyncio.start_unix_server(made.serve, tmp_path / "s")
    yield made
    listening.close()
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)


@pytest.fixture
async def reached(tmp_path: Path, server: Server) -> AsyncIterator[Wire]:
    made = Wire(tmp_path / "s", os.getpid())
    yield made
    made.close()
    await asyncio.sleep(0)


async def test_request_is_one_head_of_ours_and_the_body(reached: Wire, server: Server) -> None:
    server.answers = [OK]
    assert await post(reached.call, "/v1/embeddings", {"a": 1}) == (200, b"{}")
    assert server.requests == [
        b"POST /v1/embeddings HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
        b'content-length: 8\r\naccept: application/json\r\n\r\n{"a": 1}'
    ]


async def test_headers_beyond_the_three_and_line_breaks_do_not_pass(reached: Wire, server: Server) -> None:
    server.answers = [OK]
    scope = inner_scope("/x", b"")
    scope["headers"].append((b"x-data-parallel-rank", b"1"))
    await reached.call(scope, _given(b""), _ignored)
    assert b"rank" not in server.requests[0]
    scope["headers"] = [(b"accept", b"a\r\nx-evil: 1"), (b"content-length", b"0")]
    with pytest.raises(ValueError, match="line break"):
        await reached.call(scope, _given(b""), _ignored)
    assert len(server.requests) == 1


async def test_connection_is_used_again_after_a_whole_answer_and_only_then(reached: Wire, server: Server) -> None:
    server.answers = [OK, OK, OK.replace(b"content-type", b"connection: close\r\ncontent-type"), OK]
    for _ in range(4):
        assert (await post(reached.call, "/x", {}))[0] == 200
    assert server.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"",
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        CHUNKED + b"2\r\n{}\r\n",
        CHUNKED + b"2\r\n{}\r\nzz\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)
async def test_answer_that_does_not_end_or_is_none_is_never_taken_for_whole(
    answer: bytes | None, reached: Wire, server: Server
) -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(answer or b"")
        await asyncio.sleep(0.05)
        raise ConnectionError

    server.answers = [say if answer is not None else None]
    ended = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not message["more_body"]:
            ended.append(message)

    with pytest.raises(EngineGone):
        await asyncio.wait_for(reached.call(inner_scope("/x", b""), _given(b""), send), 5)
    assert not ended


async def test_head_without_end_is_cut_off(reached: Wire, server: Server) -> None:
    async def for_ever(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x: " + b"a" * 1000 + b"\r\n")
            await writer.drain()

    server.answers = [for_ever]
    with pytest.raises(EngineGone):
        await asyncio.wait_for(post(reached.call, "/x", {}), 10)


async def test_bytes_that_nobody_asked_for_end_the_connection(reached: Wire, server: Server) -> None:
    server.answers = [OK + OK.replace(b"{}", b"[]"), OK]
    for _ in range(2):
        assert await asyncio.wait_for(post(reached.call, "/x", {}), 5) == (200, b"{}")
    assert server.connections == 2


async def test_idle_connection_that_ended_is_not_used(reached: Wire, server: Server) -> None:
    async def then_close(writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        raise ConnectionError

    server.answers = [then_close, OK]
    assert (await post(reached.call, "/x", {}))[0] == 200
    await asyncio.sleep(0.05)
    assert (await post(reached.call, "/x", {}))[0] == 200
    assert server.connections == 2


async def test_each_chunk_is_handed_on_before_the_next_is_there(reached: Wire, server: Server) -> None:
    seen: list[bytes] = []
    more = asyncio.Event()

    async def slowly(writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for n in range(3):
            writer.write(b"1\r\n%d\r\n" % n)
            await more.wait()
            more.clear()
        writer.write(b"0\r\n\r\n")

    async def send(message: Any) -> None:
        if message.get("body"):
            seen.append(message["body"])
            more.set()

    server.answers = [slowly]
    await asyncio.wait_for(reached.call(inner_scope("/x", b""), _given(b""), send), 5)
    assert seen == [b"0", b"1", b"2"]


async def test_closing_ends_what_is_running_and_lets_nothing_new_begin(reached: Wire, server: Server) -> None:
    async def for_ever(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server.answers = [for_ever]
    running = asyncio.create_task(post(reached.call, "/x", {}))
    await until(lambda: server.requests)
    reached.close()
    with pytest.raises(EngineGone):
        await asyncio.wait_for(running, 5)
    with pytest.raises(EngineGone):
        await post(reached.call, "/x", {})
    assert server.connections == 1


async def test_nobody_there_is_engine_gone(tmp_path: Path) -> None:
    with pytest.raises(EngineGone):
        await post(Wire(tmp_path / "none", 1).call, "/x", {})


async def test_no_more_idle_connections_are_kept_than_allowed(
    reached: Wire, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_IDLE", 2)
    server.answers = [OK] * 10
    await asyncio.gather(*(post(reached.call, "/x", {}) for _ in range(5)))
    assert len(reached._idle) == 2
    await asyncio.sleep(0.05)
    assert len(reached._open) == 2


def _given(body: bytes) -> Any:
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _ignored(message: Any) -> None:
    return None
