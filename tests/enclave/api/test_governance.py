"""Who may ask what, how much at a time, for how long, and for how much: through the gateway, as a caller meets it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from enclave.access.prices import CENT
from enclave.access.records import ModelLimit, ModelPermissions
from enclave.api import call
from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine
from enclave.receipts import ReceiptStore
from enclave.tenancy import Tenancy
from tests.enclave.api.client import CHAT, Caller, Reply, chat_body
from tests.enclave.api.serving import events, gateway, prices, tenancy_of

TENTH = CENT * 100_000
"""nano-USD per million tokens: a tenth of a cent for one."""
ROUTES = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.fixture
async def tenancy() -> Tenancy:
    return await tenancy_of(["parrot"])


@pytest.fixture
async def caller(engine: EchoEngine, tenancy: Tenancy) -> Caller:
    return Caller(await gateway(engine, tenancy=tenancy))


def project_of(tenancy: Tenancy) -> str:
    (project,) = tenancy.organization.projects
    return project


async def key_of(tenancy: Tenancy, **how: Any) -> tuple[str, str]:
    """Id and value of another key in the same project."""
    (account,) = tenancy.organization.accounts
    key, made = await tenancy.organization.create_key("test", account, "another", **how)
    return key.id, made.value


def body_for(path: str, text: str = "hello world", **fields: Any) -> dict[str, Any]:
    if path == "/v1/completions":
        return {"model": "parrot", "prompt": text, **fields}
    if path == "/v1/responses":
        return {"model": "parrot", "input": text, **fields}
    return {**chat_body(text), "max_tokens": 16, **fields} if path == "/v1/messages" else chat_body(text, **fields)


def code(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.error["code"]


async def running(engine: EchoEngine, count: int = 1) -> None:
    """Until so many requests have reached the engine and none has been answered to its end."""
    async with asyncio.timeout(5):
        while sum(not c.finished for c in engine.calls) < count:  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0.005)


# --- who --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
async def test_every_route_asks_for_scope_model_and_key(
    path: str, caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    _, reader = await key_of(tenancy, scopes=["models.read"])
    assert (await Caller(caller.app, key=reader).post(path, body_for(path))).status == 403
    assert (await Caller(caller.app, key=reader).get("/v1/models")).status == 200
    permissions = ModelPermissions("allow_list", frozenset({"other"}))
    await tenancy.organization.update_project("test", project_of(tenancy), permissions=permissions)
    assert (await caller.post(path, body_for(path))).status == 403
    await tenancy.organization.update_project("test", project_of(tenancy), permissions=None)
    assert (await caller.post(path, body_for(path))).status == 200
    assert (await Caller(caller.app, key="sk-" + "x" * 43).post(path, body_for(path))).status == 401
    assert len(engine.calls) == 1


async def test_model_that_a_project_may_not_ask_is_403_and_not_listed(caller: Caller, tenancy: Tenancy) -> None:
    deny = ModelPermissions("deny_list", frozenset({"parrot"}))
    await tenancy.organization.update_project("test", project_of(tenancy), permissions=deny)
    assert code(await caller.chat()) == (403, "model_not_allowed")
    assert code(await caller.chat(model="unknown")) == (404, "model_not_found")
    assert (await caller.get("/v1/models")).json()["data"] == []
    assert code(await caller.get("/v1/models/parrot")) == (404, "model_not_found")


async def test_receipt_belongs_to_the_key_and_needs_its_scope(caller: Caller, tenancy: Tenancy) -> None:
    reply = await caller.chat()
    path = "/v1/aci/receipts/" + reply.headers["x-receipt-id"]
    _, other = await key_of(tenancy)
    _, blind = await key_of(tenancy, scopes=["inference"])
    assert (await caller.get(path)).status == 200
    for value in (other, blind):
        assert (await Caller(caller.app, key=value).get(path)).status == 404
    mine = await Caller(caller.app, key=blind).chat()
    assert (await Caller(caller.app, key=blind).get("/v1/aci/receipts/" + mine.headers["x-receipt-id"])).status == 404


async def test_rotated_key_keeps_its_receipts(caller: Caller, tenancy: Tenancy) -> None:
    id, old = await key_of(tenancy)
    reply = await Caller(caller.app, key=old).chat()
    _, made = await tenancy.organization.rotate_key("test", id, 60)
    for value in (old, made.value):
        assert (
            await Caller(caller.app, key=value).get("/v1/aci/receipts/" + reply.headers["x-receipt-id"])
        ).status == 200


# --- revocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["key", "account", "project"])
async def test_revocation_ends_open_streams_and_bills_what_was_delivered(
    how: str, caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    id, value = await key_of(tenancy)
    engine.fault = "hang"  # after two events
    mine = Caller(caller.app, key=value)
    streaming = asyncio.create_task(mine.chat("one two three four", stream=True))
    await running(engine)
    await asyncio.sleep(0.05)
    organization = tenancy.organization
    if how == "key":
        await organization.revoke_key("test", id)
    elif how == "account":
        await organization.delete_account("test", next(iter(organization.accounts)))
    else:
        await organization.archive_project("test", project_of(tenancy))
    async with asyncio.timeout(1):
        reply = await streaming
    assert reply.status == 200 and not reply.complete
    last = json.loads(events(reply)[-1].removeprefix(b"data: "))
    assert last["error"]["code"] == "invalid_api_key" and b"[DONE]" not in reply.body
    assert engine.calls[0].disconnected
    assert tenancy.ledger.spend().reserved == 0
    assert tenancy.ledger.spend().spent == tenancy.ledger.prices.lines("parrot", usage_of(4, 2)).total
    assert code(await mine.chat()) == (401, "invalid_api_key")


async def test_revocation_ends_a_whole_answer_before_it_is_given(
    caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    id, value = await key_of(tenancy)
    engine.delay = 30
    asking = asyncio.create_task(Caller(caller.app, key=value).chat())
    await running(engine)
    await tenancy.organization.revoke_key("test", id)
    async with asyncio.timeout(1):
        assert code(await asking) == (401, "invalid_api_key")
    assert (tenancy.ledger.spend().spent, tenancy.ledger.spend().reserved) == (0, 0)


def usage_of(input: int, output: int) -> Any:
    from enclave.access.prices import Usage

    return Usage(input, 0, output, 0)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
async def test_requests_per_minute_hold_on_every_route_with_an_honest_time(
    path: str, caller: Caller, tenancy: Tenancy
) -> None:
    await tenancy.organization.set_limit("test", project_of(tenancy), "parrot", ModelLimit(max_requests_per_1_minute=2))
    replies = [await caller.post(path, body_for(path)) for _ in range(3)]
    assert [r.status for r in replies] == [200, 200, 429]
    assert [r.headers["x-ratelimit-remaining-requests"] for r in replies] == ["1", "0", "0"]
    assert replies[2].headers["x-ratelimit-limit-requests"] == "2"
    assert 0 < int(replies[2].headers["retry-after-ms"]) <= 60_000
    assert 0 < int(replies[2].headers["retry-after"]) <= 60


async def test_remaining_tokens_fall_by_exactly_the_usage(caller: Caller, tenancy: Tenancy) -> None:
    await tenancy.organization.set_limit(
        "test", project_of(tenancy), "parrot", ModelLimit(max_tokens_per_1_minute=5000)
    )
    remaining = 5000
    for words in (1, 7, 3):
        reply = await caller.chat(" ".join(["w"] * words), max_tokens=100)
        remaining -= reply.json()["usage"]["total_tokens"]
        assert reply.headers["x-ratelimit-remaining-tokens"] == str(remaining)


async def test_parallel_requests_never_exceed_the_tokens_of_a_minute(
    caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    await tenancy.organization.set_limit("test", project_of(tenancy), "parrot", ModelLimit(max_tokens_per_1_minute=100))
    engine.delay = 0.01
    replies = await asyncio.gather(*(caller.chat("a b c d e", max_tokens=5) for _ in range(40)))
    served = [r for r in replies if r.status == 200]
    assert len(served) == 10  # of 5 + 5 tokens each
    assert {code(r) for r in replies if r.status != 200} == {(429, "rate_limit_exceeded")}


async def test_prompt_counts_by_the_tokenizer_not_by_the_context(caller: Caller, tenancy: Tenancy) -> None:
    """With the loose bound, 4096 tokens of context, nothing would fit."""
    await tenancy.organization.set_limit("test", project_of(tenancy), "parrot", ModelLimit(max_tokens_per_1_minute=50))
    assert (await caller.chat("a b c", max_tokens=10)).status == 200
    too_large = await caller.chat("a b c", max_tokens=60)
    assert code(too_large) == (429, "rate_limit_exceeded") and too_large.headers["x-should-retry"] == "false"


async def test_requests_at_a_time_are_bounded_and_come_back(
    caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    await tenancy.organization.set_limit("test", project_of(tenancy), "parrot", ModelLimit(max_concurrent_requests=2))
    engine.delay = 0.05
    replies = await asyncio.gather(*(caller.chat() for _ in range(5)))
    assert sorted(r.status for r in replies) == [200, 200, 429, 429, 429]
    assert (await caller.chat()).status == 200


async def test_a_key_that_floods_does_not_starve_another(engine: EchoEngine) -> None:
    tenancy = await tenancy_of(["parrot"], slots=2)
    app = await gateway(engine, tenancy=tenancy)
    _, quiet = await key_of(tenancy)
    engine.delay = 0.02
    flood = [asyncio.create_task(Caller(app).chat("x")) for _ in range(40)]
    await running(engine, 2)
    before = sum(c.finished for c in engine.calls)
    assert (await Caller(app, key=quiet).chat("mine")).status == 200
    assert sum(c.finished for c in engine.calls) - before <= 6, "it waited behind the flood"
    assert {r.status for r in await asyncio.gather(*flood)} == {200}
    assert max_at_once(engine) == 2


def max_at_once(engine: EchoEngine) -> int:
    return engine.most


async def test_hang_up_while_waiting_for_a_turn_costs_nothing_and_frees_the_place(engine: EchoEngine) -> None:
    tenancy = await tenancy_of(["parrot"], slots=1)
    app = await gateway(engine, tenancy=tenancy)
    engine.fault = "hang"
    first = asyncio.create_task(Caller(app).chat("one two three", stream=True))
    await running(engine)
    waiting = asyncio.create_task(Caller(app).chat("x", stream=True))
    await asyncio.sleep(0.05)
    assert tenancy.queues["parrot"].waiting == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert tenancy.queues["parrot"].waiting == 0 and len(engine.calls) == 1
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    engine.fault = ""
    assert (await Caller(app).chat()).status == 200
    assert tenancy.ledger.spend().reserved == 0


async def test_hang_up_in_the_moment_of_its_turn_loses_no_turn(engine: EchoEngine) -> None:
    tenancy = await tenancy_of(["parrot"], slots=1)
    app = await gateway(engine, tenancy=tenancy)
    queue = tenancy.queues["parrot"]
    engine.delay = 0.02

    async def leaving(scope: Scope, receive: Receive, send: Send) -> None:
        asked = False

        async def hang_up() -> Any:
            nonlocal asked
            if not asked:
                asked = True
                return await receive()
            while not queue.waiting:  # noqa: ASYNC110 - the queue tells nobody
                await asyncio.sleep(0)
            while queue.waiting:  # noqa: ASYNC110 - until the very step in which it is handed over
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        await app(scope, hang_up, send)

    for _ in range(5):
        first = asyncio.create_task(Caller(app).chat("x"))
        await running(engine)
        await Caller(leaving).chat("y")
        await first
        assert (queue.running, queue.waiting) == (0, 0)
    assert tenancy.ledger.spend().reserved == 0


async def test_hang_up_before_a_stream_that_is_over_at_once_is_settled_with_a_receipt(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "GRACE_SECONDS", 0.05)
    tenancy, kept = await tenancy_of(["parrot"]), ReceiptStore()
    app = await gateway(engine, tenancy=tenancy, receipts=kept)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        begun = asyncio.Event()

        async def hang_up() -> Any:
            if begun.is_set() or scope.setdefault("asked", 0):
                await begun.wait()
                return {"type": "http.disconnect"}
            scope["asked"] = 1
            return await receive()

        async def never(message: Any) -> None:
            begun.set()
            await asyncio.Event().wait()

        await app(scope, hang_up, never)

    async with asyncio.timeout(5):
        await Caller(stuck).chat("one two", stream=True, max_tokens=0)
    assert tenancy.ledger.spend().reserved == 0 and len(kept) == 1


# --- money ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_budget_holds_exactly_on_every_route(path: str, stream: bool, engine: EchoEngine) -> None:
    """A tenth of a cent a word: three answers of five words in and five out are three cents, to the nano-dollar."""
    table = prices("parrot", input=TENTH, cached=TENTH, output=TENTH)
    tenancy = await tenancy_of(["parrot"], table=table)
    caller = Caller(await gateway(engine, tenancy=tenancy))
    await tenancy.organization.update_project("test", project_of(tenancy), spend_limit_cents=3)
    limit = {"/v1/responses": "max_output_tokens"}.get(path, "max_tokens")
    body = body_for(path, "a b c d e", stream=stream, **{limit: 5})
    replies = [await caller.post(path, body) for _ in range(4)]
    assert [r.status for r in replies] == [200, 200, 200, 429]
    assert replies[3].headers["x-should-retry"] == "false"
    assert b"insufficient_quota" in replies[3].body or b"rate_limit_error" in replies[3].body
    assert tenancy.ledger.spend(project_of(tenancy)).spent == 3 * CENT
    assert len(engine.calls) - sum(c.path == "/tokenize" for c in engine.calls) == 3


async def test_parallel_requests_never_exceed_a_budget(engine: EchoEngine) -> None:
    table = prices("parrot", input=TENTH, cached=TENTH, output=TENTH)
    tenancy = await tenancy_of(["parrot"], table=table)
    caller = Caller(await gateway(engine, tenancy=tenancy))
    await tenancy.organization.set_spend_limit("test", 10)
    engine.delay = 0.01
    replies = await asyncio.gather(*(caller.chat("a b c d e", max_tokens=5, stream=n % 2 == 0) for n in range(40)))
    assert sorted(r.status for r in replies) == [200] * 10 + [429] * 30
    assert tenancy.ledger.spend().spent == 10 * CENT


async def test_nobody_is_refused_for_a_loose_bound(engine: EchoEngine) -> None:
    """The whole context would cost 41 cents, the request 4: eleven fit into 45, whatever a bound says of them."""
    a_cent_a_hundred = CENT * 10_000
    table = prices("parrot", input=a_cent_a_hundred, cached=a_cent_a_hundred, output=a_cent_a_hundred)
    tenancy = await tenancy_of(["parrot"], table=table)
    caller = Caller(await gateway(engine, tenancy=tenancy))
    await tenancy.organization.set_spend_limit("test", 45)
    engine.delay = 0.02
    replies = await asyncio.gather(*(caller.chat("hello world", max_tokens=400) for _ in range(11)))
    assert [r.status for r in replies] == [200] * 11


@pytest.mark.parametrize("what", ["requests", "tokens", "budget"])
async def test_prompt_is_not_counted_for_a_request_that_has_no_chance(
    what: str, caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    project = project_of(tenancy)
    if what == "budget":
        await tenancy.organization.update_project("test", project, spend_limit_cents=0)
    else:
        limit = ModelLimit(max_requests_per_1_minute=0 if what == "requests" else None, max_tokens_per_1_minute=0)
        await tenancy.organization.set_limit("test", project, "parrot", limit)
    assert (await caller.chat("a b c")).status == 429
    assert not engine.calls


async def test_refusal_and_failure_cost_nothing(caller: Caller, tenancy: Tenancy, engine: EchoEngine) -> None:
    for fault in ("reject", "crash", "raise", "error-first", "error-event", "no-done", "no-usage", "no-stream"):
        engine.fault = fault  # type: ignore[assignment]  # one of them
        await caller.chat("one two three", stream=fault not in ("reject", "crash", "raise"))
    assert (tenancy.ledger.spend().spent, tenancy.ledger.spend().reserved) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_several_answers_are_all_counted(
    path: str, stream: bool, caller: Caller, tenancy: Tenancy, engine: EchoEngine
) -> None:
    reply = await caller.post(path, body_for(path, "one two three", stream=stream, n=3))
    metered = await metered_of(caller, reply)
    assert (metered["input_tokens"], metered["output_tokens"]) == (3, 9)
    assert tenancy.ledger.spend().spent == metered["cost_nanousd"] > 0


@pytest.mark.parametrize("wants", [False, True])
async def test_usage_is_metered_whatever_the_caller_asked_for(wants: bool, caller: Caller, engine: EchoEngine) -> None:
    fields = {"stream_options": {"include_usage": True}} if wants else {}
    reply = await caller.chat("one two three", stream=True, **fields)
    sent = json.loads(engine.calls[0].body)["stream_options"]
    assert sent == {"include_usage": True, "continuous_usage_stats": True}
    chunks = [json.loads(e[6:]) for e in events(reply) if e.startswith(b"data: {")]
    if wants:
        assert [c["usage"] for c in chunks[:-1]] == [None] * 3
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    else:
        assert all("usage" not in c for c in chunks) and len(chunks) == 3
    metered = await metered_of(caller, reply)
    assert (metered["input_tokens"], metered["output_tokens"], metered["source"]) == (3, 3, "engine_final")


async def test_hang_up_is_billed_for_what_was_delivered(caller: Caller, tenancy: Tenancy, engine: EchoEngine) -> None:
    engine.delay = 0.01
    body = json.dumps(chat_body("a b c d e f g h", stream=True)).encode()
    reply = await caller.request("POST", CHAT, body, hang_up_after=3)
    metered = await metered_of(caller, reply)
    assert (metered["outcome"], metered["output_tokens"], metered["source"]) == (
        "client_disconnected", 3, "engine_cumulative",
    )  # fmt: skip
    assert tenancy.ledger.spend().spent == metered["cost_nanousd"] > 0


async def metered_of(caller: Caller, reply: Reply) -> dict[str, Any]:
    document = json.loads(await caller.receipt(reply))
    (metered,) = [e for e in document["event_log"] if e["type"] == "x.usage.metered"]
    return dict(metered)
