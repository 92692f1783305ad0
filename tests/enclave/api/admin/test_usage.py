"""The usage and cost pages as the official SDK reads them: the ledger's own sums, and nobody else's."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from enclave.engine.base import Receive, Scope, Send
from enclave.engine.echo import EchoEngine
from enclave.tenancy import Tenancy
from tests.enclave.api.client import API_KEY, Caller, Connection
from tests.enclave.api.serving import NOW, gateway, prices, tenancy_of

DAY = 86_400
START = NOW - DAY
NOTHING = ("moderations", "images", "audio_speeches", "audio_transcriptions", "vector_stores",
           "code_interpreter_sessions")  # fmt: skip


class Service:
    """Two projects that have used two models, and an administrator's SDK."""

    def __init__(self, tenancy: Tenancy, app: Any, admin: str, keys: dict[str, str]) -> None:
        self.tenancy, self.admin_key, self.keys = tenancy, admin, keys
        connection = Connection()

        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "vouchsafe": connection}, receive, send)

        self.http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=inside), base_url="https://enclave.test")
        self.sdk = AsyncOpenAI(
            api_key="none", admin_api_key=admin, base_url="https://enclave.test/v1", http_client=self.http,
            max_retries=0,
        ).admin.organization  # fmt: skip

    async def raw(self, path: str, key: str, **query: Any) -> httpx2.Response:
        pairs = [(n, str(v)) for n, value in query.items() for v in (value if isinstance(value, list) else [value])]
        head = {"authorization": f"Bearer {key}"}
        return await self.http.get(f"/v1/organization/{path}", params=pairs, headers=head)


@pytest.fixture
async def service(engine: EchoEngine) -> Service:
    magpie = EchoEngine("magpie", "embed")
    await magpie.start()
    table = prices("parrot", "magpie", input=123_456_789, cached=0, output=987_654_321)
    tenancy = await tenancy_of(["parrot", "magpie"], table=table)
    app = await gateway(engine, magpie, tenancy=tenancy)
    organization = tenancy.organization
    (first,) = organization.projects
    second = await organization.create_project("test", "second")
    account = await organization.create_account("test", second.id, "account")
    keys = {first: API_KEY}
    _, made = await organization.create_key("test", account.id, "key", scopes=["inference", "usage.read"])
    keys[second.id] = made.value
    for number, key in enumerate(keys.values()):
        caller = Caller(app, key=key)
        for _ in range(2 + number):
            await caller.chat("one two three")
        await caller.post("/v1/embeddings", {"model": "magpie", "input": "one two"})
    _, admin = await organization.create_admin_key("test", "admin")
    return Service(tenancy, app, admin.value, keys)


async def test_pages_are_the_ledgers_sums(service: Service) -> None:
    page = await service.sdk.usage.completions(start_time=START, group_by=["project_id", "model"])
    rows = {r.project_id: r for b in page.data for r in b.results}  # type: ignore[union-attr]  # one kind of result
    first, second = service.keys
    assert {p: (r.input_tokens, r.output_tokens, r.num_model_requests) for p, r in rows.items()} == {  # type: ignore[union-attr]
        first: (6, 6, 2), second: (9, 9, 3),
    }  # fmt: skip
    embeddings = await service.sdk.usage.embeddings(start_time=START)
    assert sum(r.input_tokens for b in embeddings.data for r in b.results) == 4  # type: ignore[union-attr]
    for project in (first, second, None):
        query = {} if project is None else {"project_ids": [project]}
        answer = await service.raw("costs", service.admin_key, start_time=START, **query)
        document = json.loads(answer.content, parse_float=Decimal)
        nano = sum(Decimal(r["amount"]["value"]) * 10**9 for b in document["data"] for r in b["results"])
        assert nano == service.tenancy.ledger.spend(project).spent > 0
    costs = await service.sdk.usage.costs(start_time=START, group_by=["line_item"])
    assert {r.line_item for b in costs.data for r in b.results} >= {"parrot, input_tokens", "parrot, output_tokens"}  # type: ignore[union-attr]


async def test_key_with_the_scope_reads_its_own_project_only(service: Service) -> None:
    first, second = service.keys
    for page, field in (("usage/completions", "input_tokens"), ("costs", "amount")):
        answer = await service.raw(page, service.keys[second], start_time=START, group_by="project_id")
        assert answer.status_code == 200
        rows = [r for b in answer.json()["data"] for r in b["results"]]
        assert rows and {r["project_id"] for r in rows} == {second} and all(field in r for r in rows)
        mine = await service.raw(page, service.keys[second], start_time=START, project_ids=second)
        assert mine.status_code == 200
        for others in (first, [first, second], "proj_none"):
            theirs = await service.raw(page, service.keys[second], start_time=START, project_ids=others)
            assert (theirs.status_code, theirs.json()["error"]["code"]) == (403, "insufficient_scope")
        without = await service.raw(page, service.keys[first], start_time=START)
        assert (without.status_code, without.json()["error"]["code"]) == (403, "insufficient_scope")
        assert (await service.raw(page, "sk-" + "x" * 43, start_time=START)).status_code == 401
    assert (await service.raw("projects", service.keys[second])).status_code == 401


async def test_pages_of_what_never_happens_here_are_empty(service: Service) -> None:
    for name in NOTHING:
        page = await getattr(service.sdk.usage, name)(start_time=START, bucket_width="1d", limit=2)
        assert page.object == "page" and [b.results for b in page.data] == [[]] * len(page.data)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "start_time"), ({"start_time": "soon"}, "start_time"), ({"start_time": START, "limit": 0}, "limit"),
        ({"start_time": START, "bucket_width": "1w"}, "bucket_width"), ({"start_time": START, "page": "x"}, "page"),
        ({"start_time": START, "group_by": "color"}, "group_by"), ({"start_time": START, "x": 1}, "query"),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked_is_named(service: Service, query: dict[str, Any], param: str) -> None:
    answer = await service.raw("usage/completions", service.admin_key, **query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_pages_go_on_where_they_ended(service: Service) -> None:
    seen, cursor, pages = 0, None, 0
    while True:
        more: dict[str, Any] = {} if cursor is None else {"page": cursor}
        page = await service.sdk.usage.completions(start_time=NOW - 7200, bucket_width="1m", limit=50, **more)
        seen += sum(r.num_model_requests for b in page.data for r in b.results)  # type: ignore[union-attr]
        pages += 1
        if not page.has_more:
            break
        cursor = page.next_page
    assert (seen, pages) == (5, 3)


async def test_wrong_kind_of_client_is_told_by_its_own_class(service: Service) -> None:
    with pytest.raises(openai.AuthenticationError):
        await AsyncOpenAI(
            api_key="none", admin_api_key="sk-admin-x", base_url="https://enclave.test/v1", http_client=service.http,
            max_retries=0,
        ).admin.organization.usage.completions(start_time=START)  # fmt: skip
