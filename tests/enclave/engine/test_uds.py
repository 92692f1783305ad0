"""An engine as a process of its own: the same answers as mounted, and what happens when its process does not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attestation.receipt import Receipt
from enclave.engine import processes, spawn, wire
from enclave.engine.base import EngineGone
from enclave.engine.call import inner_scope, post
from enclave.engine.echo import EchoEngine
from tests.enclave.api.client import CHAT, Caller, Reply, chat_body
from tests.enclave.api.serving import events, gateway
from tests.enclave.engine.workers import ROOT, Worker, until

GOLDEN: list[dict[str, Any]] = [
    {"prompt_messages": [{"role": "user", "content": "one"}], "max_tokens": 8, "text": "one"}
]


@pytest.fixture
async def caller(worker: Worker) -> Caller:
    return Caller(await gateway(worker.engine))


def last_error(reply: Reply) -> Any:
    return json.loads(events(reply)[-1].removeprefix(b"data: "))["error"]


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


# --- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_those_of_the_same_engine_mounted(stream: bool, caller: Caller) -> None:
    mounted = EchoEngine("parrot")
    await mounted.start()
    request = json.dumps(chat_body("one two three", stream=stream)).encode()
    for _ in range(3):  # the second and third on a connection that has been used
        reply = await caller.request("POST", CHAT, request)
        same = await Caller(await gateway(mounted)).request("POST", CHAT, request)
        assert (reply.status, reply.complete) == (200, True)
        assert [e for e in events(reply) if e[:1] != b":"] == [e for e in events(same) if e[:1] != b":"]
        if not stream:
            assert reply.body == same.body
        assert not caller.verify(await caller.receipt(reply), request=request, response=reply.body).failed


async def test_many_at_once_are_not_mixed_up(caller: Caller, worker: Worker) -> None:
    worker.wish(repeat=50)
    texts = [f"text-{n}" for n in range(40)]
    replies = await asyncio.gather(*(caller.chat(text, stream=n % 2 == 0) for n, text in enumerate(texts)))
    for reply, text in zip(replies, texts, strict=True):
        assert reply.complete
        assert reply.body.count(text.encode() + b'"') + reply.body.count(text.encode() + b" ") == 50


async def test_large_request_and_large_answer_pass_whole(caller: Caller) -> None:
    text = "x" * 3_000_000
    reply = await caller.chat(text)
    assert reply.json()["choices"][0]["message"]["content"] == text


async def test_engines_refusals_pass_as_they_are(caller: Caller, worker: Worker) -> None:
    for fault, status in (("reject", 400), ("crash", 500), ("raise", 500)):
        worker.wish(fault=fault)
        reply = await caller.chat()
        assert (reply.status, reply.complete) == (status, True)
    worker.wish()
    assert (await caller.chat()).status == 200


# --- walls ------------------------------------------------------------------------------------------------------------


async def test_socket_is_private_and_answers_its_parent_alone(worker: Worker) -> None:
    path = worker.folder / "run" / "engine.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    stranger = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])\n"
        f"try:\n s.sendall({request!r}); print(s.recv(100))\n"
        "except (ConnectionResetError, BrokenPipeError): print(b'')"
    )
    line = [sys.executable, "-c", stranger, str(path)]
    process = await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"b''\n"
    assert not worker.seen("calls")
    assert (await post(worker.engine.app, CHAT, chat_body("still here")))[0] == 200


async def test_nothing_is_sent_to_a_process_that_is_not_the_child(tmp_path: Path) -> None:
    got = bytearray()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend(await reader.read())
        writer.close()

    server = await asyncio.start_unix_server(impostor, tmp_path / "s")
    with pytest.raises(EngineGone):
        await post(wire.Wire(tmp_path / "s", os.getpid() + 1).call, CHAT, {"secret": 1})
    server.close()
    await server.wait_closed()
    assert got == b""


async def test_worker_is_hardened_and_inherits_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/another/engines")
    monkeypatch.setenv("HF_TOKEN", "secret")
    made = Worker(tmp_path / "a")
    await made.engine.start()
    try:
        environment = set(made.seen("started")[0]["environment"])
        assert environment <= {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "LD_LIBRARY_PATH"}
        status = proc(made.pid, "status")
        assert "NoNewPrivs:\t1" in status
        assert "Umask:\t0077" in status
        core = next(line for line in proc(made.pid, "limits").splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
    finally:
        await made.engine.stop()


async def test_what_a_worker_prints_goes_nowhere(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    worker = Worker(tmp_path / "a")
    await worker.engine.start()
    worker.wish(print="CANARY")
    assert (await post(worker.engine.app, CHAT, chat_body()))[0] == 200
    worker.wish(fault="raise")
    assert (await post(worker.engine.app, CHAT, chat_body("CANARY")))[0] == 500
    await worker.engine.stop()
    seen = capfd.readouterr()
    assert "CANARY" not in seen.out + seen.err
    assert '"event":"library"' in seen.err, "the exception was to be seen, without its text"


def test_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed outright, the parent can tell nobody: the kernel does, even a worker that can do nothing itself."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom tests.enclave.engine.workers import Worker\n"
        "async def main():\n"
        f" w = Worker(Path({str(tmp_path / 'a')!r})); w.wish(child=True); await w.engine.start()\n"
        " print(w.pid, flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    below = processes.descendants(parent.pid)
    assert pid in below
    (sleeper,) = [p for p in below if p != pid]
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    asyncio.run(until(lambda: not processes.alive({pid: below[pid]}), 10))
    os.kill(sleeper, signal.SIGKILL)  # it asked the kernel for nothing; a real engine's children do


# --- callers ----------------------------------------------------------------------------------------------------------


async def test_hang_up_ends_the_call_and_the_process_hears_of_it(worker: Worker) -> None:
    """Without anybody's deadline: nothing cancels this call, and the engine would be silent for ten minutes."""
    worker.wish(delay=600)
    request = json.dumps(chat_body(stream=True)).encode()
    told = [{"type": "http.disconnect"}, {"type": "http.request", "body": request, "more_body": False}]

    async def receive() -> Any:
        if len(told) == 1:
            await until(lambda: worker.seen("asked"))
        return told.pop()

    async def send(message: Any) -> None:
        return None

    await asyncio.wait_for(worker.engine.app(inner_scope(CHAT, request), receive, send), 10)  # type: ignore[arg-type]  # a coroutine
    await until(lambda: worker.seen("calls"), 10)
    assert worker.seen("calls") == [{"path": CHAT, "gone": True, "finished": False}]


async def test_hang_up_reaches_the_process_at_once(caller: Caller, worker: Worker) -> None:
    worker.wish(repeat=2000, delay=0.005)
    request = json.dumps(chat_body("word", stream=True)).encode()
    reply = await asyncio.wait_for(caller.request("POST", CHAT, request, hang_up_after=3), 10)
    await until(lambda: worker.seen("calls"), 10)
    assert worker.seen("calls")[0] == {"path": CHAT, "gone": True, "finished": False}
    assert Receipt.parse(await caller.receipt(reply)).outcome == "client_disconnected"
    worker.wish()
    assert (await caller.chat()).status == 200


async def test_hang_up_while_a_whole_answer_is_made_reaches_the_process(worker: Worker) -> None:
    worker.wish(delay=600)
    app = await gateway(worker.engine)

    async def leaving(scope: Any, receive: Any, send: Any) -> None:
        asked = 0

        async def gone() -> Any:
            nonlocal asked
            asked += 1
            if asked > 1:
                await asyncio.sleep(0.2)
                return {"type": "http.disconnect"}
            return await receive()

        await app(scope, gone, send)

    await asyncio.wait_for(Caller(leaving).chat(), 10)
    await until(lambda: worker.seen("calls"), 10)
    assert worker.seen("calls")[0]["gone"]


async def test_caller_that_does_not_read_holds_the_process_back(worker: Worker) -> None:
    """Megabytes are asked for and not taken: all but a few buffers must still be unmade."""
    worker.wish(repeat=5000)
    text, go, got = "w" * 2000, asyncio.Event(), bytearray()
    request = json.dumps(chat_body(text, stream=True)).encode()
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            return {"type": "http.request", "body": request, "more_body": False}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await go.wait()
            got.extend(message["body"])

    running = asyncio.create_task(worker.engine.app(inner_scope(CHAT, request), receive, send))  # type: ignore[arg-type]  # a coroutine
    before = -1
    await until(lambda: worker.sent > 0)
    while worker.sent != before:
        before = worker.sent
        await asyncio.sleep(0.5)
    assert 0 < before < 2_000_000, "of ten million"
    go.set()
    await asyncio.wait_for(running, 60)
    assert got.count(text.encode()) == 5000
    assert got.endswith(b"data: [DONE]\n\n")


# --- death ------------------------------------------------------------------------------------------------------------


async def test_death_in_mid_stream_is_an_honest_error_and_others_go_on(
    worker: Worker, second: Worker, tmp_path: Path
) -> None:
    worker.wish(fault="hang")
    second.wish(repeat=300, delay=0.002)
    caller = Caller(await gateway(worker.engine, second.engine))
    cut = asyncio.create_task(caller.chat("one two three", stream=True))
    other = asyncio.create_task(caller.chat("word", model="second", stream=True))
    await until(lambda: worker.sent > 200 and second.sent > 0)
    os.kill(worker.pid, signal.SIGKILL)
    reply = await asyncio.wait_for(cut, 10)
    assert (reply.status, reply.complete) == (200, False)
    assert b"[DONE]" not in reply.body
    assert last_error(reply)["code"] == "engine_unavailable"
    assert Receipt.parse(await caller.receipt(reply)).outcome == "upstream_error"
    whole = await asyncio.wait_for(other, 30)
    assert whole.complete
    assert whole.body.count(b"word") == 300


async def test_death_before_the_first_byte_is_503_with_a_time_to_come_back(caller: Caller, worker: Worker) -> None:
    worker.wish(delay=600)
    running = asyncio.create_task(caller.chat())
    await asyncio.sleep(0.3)
    os.kill(worker.pid, signal.SIGKILL)
    reply = await asyncio.wait_for(running, 10)
    assert (reply.status, reply.error["code"], reply.complete) == (503, "engine_unavailable", True)
    assert 1 <= int(reply.headers["retry-after"]) <= 120
    assert Receipt.parse(await caller.receipt(reply)).forwarded is not None


async def test_dead_process_is_restarted_tested_again_and_serves(caller: Caller, worker: Worker) -> None:
    await worker.engine.self_test(GOLDEN)
    tested = len(worker.seen("asked"))
    for _ in range(3):
        old = worker.pid
        os.kill(old, signal.SIGKILL)
        await until(lambda: not worker.engine.healthy)
        await until(lambda: worker.engine.healthy)
        assert worker.pid != old
        assert (await caller.chat()).status == 200
    assert len(worker.seen("started")) == 4
    assert len(worker.seen("asked")) == tested * 4 + 3, "each restart asks for the golden answers again"


async def test_engine_that_fails_inside_its_process_is_restarted_too(caller: Caller, worker: Worker) -> None:
    worker.wish(die=True, delay=600)
    reply = await asyncio.wait_for(caller.chat(), 10)
    assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
    worker.wish()
    await until(lambda: worker.engine.healthy)
    assert (await caller.chat()).status == 200
    assert len(worker.seen("started")) == 2


async def test_restarted_engine_that_answers_otherwise_never_serves(caller: Caller, worker: Worker) -> None:
    await worker.engine.self_test(GOLDEN)
    worker.wish(say="two")
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: len(worker.seen("started")) >= 4)
    assert not worker.engine.healthy
    reply = await caller.chat("one")
    assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
    worker.wish()
    await until(lambda: worker.engine.healthy)
    assert (await caller.chat("one")).status == 200


async def test_weights_that_changed_since_the_boot_are_not_loaded(worker: Worker) -> None:
    config = worker.folder / "model" / "config.json"
    config.write_text('{"other": 1}')
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: worker.engine._backoff.attempt >= 4)
    assert len(worker.seen("started")) == 1
    assert not worker.engine.healthy
    config.write_text("{}")
    await until(lambda: worker.engine.healthy)


async def test_what_a_dead_worker_leaves_is_ended_before_it_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "KILL_SECONDS", 0.2)
    made = Worker(tmp_path / "a")
    made.wish(child=True)
    await made.engine.start()
    try:
        below = processes.descendants(made.pid)
        assert below
        old = made.pid
        os.kill(old, signal.SIGKILL)
        await until(lambda: made.engine.healthy and made.pid != old)
        assert not processes.alive(below)
    finally:
        await made.engine.stop()
