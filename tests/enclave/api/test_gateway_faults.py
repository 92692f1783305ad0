"""The gateway when something goes wrong: engines that break, callers that hang up, and the receipts of refusals."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from attestation.receipt import Receipt
from enclave.api import call, inference
from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine, Fault
from enclave.receipts import ReceiptStore
from tests.enclave.api.client import CHAT, Caller, chat_body
from tests.enclave.api.serving import events, gateway

COMPLETIONS = "/v1/completions"


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "stream", "status", "code"),
    [
        ("reject", False, 400, "invalid_value"),
        ("reject", True, 400, "invalid_value"),
        ("crash", False, 500, "server_error"),
        ("crash", True, 500, "server_error"),
        ("raise", False, 500, "server_error"),
        ("raise", True, 500, "server_error"),
        ("error-first", True, 500, "server_error"),
        ("no-stream", True, 500, "server_error"),
    ],
)
async def test_engine_error_has_openais_shape_and_a_receipt(
    fault: Fault, stream: bool, status: int, code: str, caller: Caller, engine: EchoEngine
) -> None:
    engine.fault = fault
    request = json.dumps(chat_body("CANARY", stream=stream)).encode()
    reply = await caller.request("POST", CHAT, request)
    assert (reply.status, reply.error["code"], reply.complete) == (status, code, True)
    if status == 500:
        assert b"no such luck" not in reply.body
    assert b"canary" not in reply.body.lower()
    assert b"secret" not in reply.body
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    assert Receipt.parse(raw).forwarded is not None


@pytest.mark.parametrize("fault", ["error-event", "no-done"])
async def test_stream_that_breaks_ends_with_an_error_and_a_cut_never_with_done(
    fault: Fault, caller: Caller, engine: EchoEngine
) -> None:
    engine.fault = fault
    request = json.dumps(chat_body("one two three", stream=True)).encode()
    reply = await caller.request("POST", CHAT, request, headers={"x-vouchsafe-receipt": "inline"})
    assert reply.status == 200
    assert not reply.complete, "the answer must be left unfinished, so that the server cuts the connection"
    assert b"[DONE]" not in reply.body
    assert b"vouchsafe-receipt" not in reply.body
    last = json.loads(events(reply)[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "server_error"
    raw = await caller.receipt(reply)
    assert [c.code for c in caller.verify(raw, request=request, response=reply.body).failed] == ["RECEIPT_OUTCOME"]
    assert not caller.verify(raw, request=request, response=reply.body, allow_cut=True).failed


async def test_engine_that_dies_in_mid_stream_is_an_error_and_a_cut(caller: Caller, engine: EchoEngine) -> None:
    engine.fault = "hang"
    running = asyncio.create_task(caller.chat("one two three", stream=True))
    await asyncio.sleep(0.05)
    assert not running.done()
    engine.die("killed")
    reply = await asyncio.wait_for(running, 2)
    assert not reply.complete
    assert json.loads(events(reply)[-1].removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    after = await caller.chat()
    assert (after.status, after.error["code"]) == (503, "engine_unavailable")
    assert after.headers["x-should-retry"] == "false"
    assert len(engine.calls) == 1


async def test_engine_that_falls_silent_is_given_up(
    caller: Caller, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "IDLE_SECONDS", 0.05)
    engine.fault = "hang"
    reply = await asyncio.wait_for(caller.chat("one two three", stream=True), 2)
    assert not reply.complete
    assert b"engine_unavailable" in events(reply)[-1]


async def test_hang_up_reaches_the_engine_and_leaves_a_receipt_of_what_was_emitted(
    caller: Caller, engine: EchoEngine
) -> None:
    engine.repeat, engine.delay = 500, 0.001
    request = json.dumps(chat_body("word", stream=True)).encode()
    reply = await asyncio.wait_for(caller.request("POST", CHAT, request, hang_up_after=3), 5)
    assert engine.calls[0].disconnected
    assert not engine.calls[0].finished
    assert not reply.complete
    raw = await caller.receipt(reply)
    parsed = Receipt.parse(raw)
    assert parsed.outcome == "client_disconnected"
    assert parsed.chain is not None
    assert parsed.chain.size == len(reply.body)
    assert not caller.verify(raw, request=request, response=reply.body, allow_cut=True).failed
    shorter = reply.body[: len(reply.writes[0]) + 5]
    assert not caller.verify(raw, request=request, response=shorter, allow_cut=True).failed


async def test_hang_up_while_a_whole_answer_is_made_reaches_the_engine(caller: Caller, engine: EchoEngine) -> None:
    engine.delay = 30

    async def impatient(scope: Scope, receive: Receive, send: Send) -> None:
        asked = 0

        async def leaving() -> Any:
            nonlocal asked
            asked += 1
            return await receive() if asked == 1 else {"type": "http.disconnect"}

        await caller.app(scope, leaving, send)

    reply = await asyncio.wait_for(Caller(impatient).chat(), 5)
    assert reply.status == 0
    assert engine.calls[0].disconnected


async def test_caller_that_does_not_read_is_hung_up_on(
    caller: Caller, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.api.exchange.WRITE_SECONDS", 0.05)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        async def slow(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()
            await send(message)

        await caller.app(scope, receive, slow)

    await asyncio.wait_for(Caller(stuck).chat("a b c", stream=True), 5)
    assert engine.calls[0].disconnected


async def test_not_ready_is_503(engine: EchoEngine) -> None:
    reply = await Caller(await gateway(engine, ready=False)).chat()
    assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")


async def test_more_requests_than_allowed_are_503_with_a_time_to_come_back(
    caller: Caller, engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_RUNNING", 1)
    engine.delay = 0.2
    first, second = await asyncio.gather(caller.chat(), caller.chat())
    assert sorted((first.status, second.status)) == [200, 503]
    refused = first if first.status == 503 else second
    assert refused.headers["retry-after"] == "1"
    assert (await caller.chat()).status == 200


async def test_fault_of_ours_tells_nothing(engine: EchoEngine) -> None:
    class Broken(ReceiptStore):
        def add(self, *args: Any, **kw: Any) -> None:
            raise RuntimeError("CANARY")

    app = await gateway(engine, receipts=Broken())
    reply = await Caller(app).chat(model="nobody")
    assert (reply.status, reply.error["code"]) == (500, "server_error")
    assert b"CANARY" not in reply.body
    streamed = await Caller(app).chat(stream=True)
    assert not streamed.complete
    assert b"[DONE]" not in streamed.body
    whole = await Caller(app).chat()  # it has left when its receipt turns out to be impossible: a client refuses it
    assert (await Caller(app).get("/v1/aci/receipts/" + whole.headers["x-receipt-id"])).status == 404


# --- receipts of refusals ---------------------------------------------------------------------------------------------


async def test_refusal_has_a_receipt_without_forwarding(caller: Caller) -> None:
    request = json.dumps(chat_body(model="gpt-5")).encode()
    reply = await caller.request("POST", CHAT, request)
    raw = await caller.receipt(reply)
    assert not caller.verify(raw, request=request, response=reply.body).failed
    parsed = Receipt.parse(raw)
    assert parsed.forwarded is None
    assert parsed.model is None, "an unknown model id is user text: it has no place in a receipt"


async def test_receipt_is_given_to_its_credential_only(caller: Caller) -> None:
    path = "/v1/aci/receipts/" + (await caller.chat()).headers["x-receipt-id"]
    assert (await caller.get(path)).status == 200
    nobody = await Caller(caller.app, key=None).get(path)
    assert (nobody.status, nobody.error["type"]) == (401, "unauthorized")
    stranger = await Caller(caller.app, key="sk-other").get(path)
    unknown = await Caller(caller.app, key="sk-other").get("/v1/aci/receipts/rcpt-00")
    assert (stranger.status, stranger.body) == (404, unknown.body)


async def test_receipt_of_a_refused_stranger_is_had_by_its_id(caller: Caller) -> None:
    stranger = Caller(caller.app, key="wrong")
    reply = await stranger.chat()
    raw = await stranger.receipt(reply)
    assert not stranger.verify(raw, request=json.dumps(chat_body()).encode(), response=reply.body).failed
