"""What the admin API refuses: who has no admin key, what it does not know, and bodies and queries of every bad kind."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from enclave.api.admin import routes
from enclave.engine.echo import EchoEngine
from tests.enclave.api.admin.office import Office, error
from tests.enclave.api.client import Caller
from tests.enclave.api.serving import gateway

OPERATIONS = routes._OPERATIONS
POSTS = [o for o in OPERATIONS if o.method == "POST"]
GOOD: dict[str, Any] = {
    "name": "n", "threshold_amount": 5, "currency": "USD", "interval": "month", "mode": "allow_list", "model_ids": [],
    "grace_seconds": 0, "retention_type": "zero_data_retention",
}  # fmt: skip


@pytest.fixture
async def office() -> Office:
    return await Office.opened()


async def path_of(office: Office, operation: routes.Operation) -> str:
    """A path of *operation* with ids of objects that are there."""
    o = office.world.organization
    project = await o.create_project("a", "p")
    account = await o.create_account("a", project.id, "s")
    key, _ = await o.create_key("a", account.id, "k")
    admin, _ = await o.create_admin_key("a", "k")
    ids = {"project": project.id, "account": account.id, "limit": "rl-parrot",
           "key": admin.id if operation.path.startswith("admin") else key.id}  # fmt: skip
    return operation.path.format(**ids)


def good(operation: routes.Operation) -> dict[str, Any]:
    return {name: GOOD[name] for name, field in operation.fields.items() if field.required}


def name_of(operation: routes.Operation) -> str:
    return f"{operation.method} {operation.path}"


@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
async def test_every_operation_answers_an_admin_key_and_no_other(operation: routes.Operation, office: Office) -> None:
    path = await path_of(office, operation)
    body = good(operation) if operation.method == "POST" else None
    if path.endswith("spend_limit"):  # there must be one to be read or deleted
        spend = {name: GOOD[name] for name in ("threshold_amount", "currency", "interval")}
        assert (await office.ask("POST", path, spend)).status_code == 200
    account = next(iter(office.world.organization.accounts))
    _, inference = await office.world.organization.create_key("a", account, "k")
    before = [*office.world.stored]
    for key in (None, inference.value, "sk-admin-" + "x" * 43, "x"):
        assert error(await office.ask(operation.method, path, body, key=key)) == (401, "invalid_api_key", None)
    assert office.world.stored == before
    assert (await office.ask(operation.method, path, body)).status_code == 200


@pytest.mark.parametrize("operation", OPERATIONS, ids=name_of)
async def test_unknown_parameter_is_named(operation: routes.Operation, office: Office) -> None:
    path = await path_of(office, operation)
    before = [*office.world.stored]
    body = good(operation) if operation.method == "POST" else None
    assert error(await office.ask(operation.method, path + "?surprise=1", body)) == (
        400,
        "unknown_parameter",
        "surprise",
    )
    if operation.method == "POST":
        answer = await office.ask("POST", path, {**good(operation), "surprise": None})
        assert error(answer) == (400, "unknown_parameter", "surprise")
        for name in operation.unsupported:
            answer = await office.ask("POST", path, {**good(operation), name: "x"})
            assert error(answer) == (400, "unsupported_parameter", name)
        for name, field in operation.fields.items():
            if field.required:
                answer = await office.ask("POST", path, {k: v for k, v in good(operation).items() if k != name})
                assert error(answer) == (400, "missing_required_parameter", name)
    assert office.world.stored == before


WRONG: list[Any] = [
    True, -1, 2**53, 2**64, 1.5, 1e300, "", "x" * 257, "a\0b", "\u202e", "\n", [], [1], ["x"] * 257, ["x" * 300],
    [None], [{}], [[1]], ["parrot"] * 257, {}, {"a": {}},
]  # fmt: skip


@pytest.mark.parametrize("operation", [o for o in POSTS if o.fields], ids=name_of)
async def test_wrong_values_are_refused_and_not_repeated(operation: routes.Operation, office: Office) -> None:
    path = await path_of(office, operation)
    refused = 0
    for name in operation.fields:
        for value in WRONG:
            answer = await office.ask("POST", path, {**good(operation), name: value})
            if answer.status_code == 200:  # some are right for some: an empty list of models, a flag
                assert (name, value) in (("create_service_account_only", True), ("model_ids", []))
                continue
            assert error(answer) == (400, "invalid_value", name), value
            assert not isinstance(value, str) or len(value) < 2 or value not in answer.text
            refused += 1
    assert refused >= 14 * len(operation.fields)


@pytest.mark.parametrize("operation", POSTS, ids=name_of)
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"\0", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'"x"', 400), (b"1", 400), (b"{}{}", 400),
        (b'{"a": 1, "a": 1}', 400), (b'{"name": NaN}', 400), (b'{"name": "\\ud800"}', 400), (b"\xff\xfe", 400),
        (b'{"name": "\xed\xa0\x80"}', 400), (b"[" * 30_000, 400), (b'{"a":' * 10_000, 400),
        (b'{"name": ' + b"9" * 10_000 + b"}", 400), (b'{"name": "' + b"x" * 70_000 + b'"}', 413),
        (b" " * 10_000_000, 413),
    ],
    ids=lambda v: None if isinstance(v, int) else f"{len(v)}:{v[:12]!r}",
)  # fmt: skip
async def test_body_that_is_no_small_json_object(
    content: bytes, status: int, operation: routes.Operation, office: Office
) -> None:
    path = await path_of(office, operation)
    before = [*office.world.stored]
    assert error(await office.ask("POST", path, content=content))[0] == status
    assert office.world.stored == before


async def test_body_of_another_type_is_refused(office: Office) -> None:
    for headers in ({"content_type": "text/plain"}, {"content_type": ""}, {"content_encoding": "gzip"}):
        answer = await office.ask("POST", "projects", {"name": "n"}, **headers)
        assert error(answer) == (415, "unsupported_media_type", None)
    assert (
        await office.ask("POST", "projects", {"name": "n"}, content_type="Application/JSON; x=y")
    ).status_code == 200


async def test_slow_body_is_refused(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "READ_SECONDS", 0.05)

    async def body() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    assert error(await office.ask("POST", "projects", content=body())) == (408, "request_timeout", None)


async def test_who_has_no_admin_key_is_not_listened_to(office: Office) -> None:
    """Neither what is asked nor the body is looked at."""
    heard = []

    async def body() -> Any:
        heard.append(1)
        yield b"{"

    assert error(await office.ask("POST", "projects?surprise=1", content=body(), key=None))[0] == 401
    assert not heard


async def test_first_key_that_is_not_wanted_cannot_expire(office: Office) -> None:
    path = (await path_of(office, POSTS[0])) + "/" + next(reversed(office.world.organization.projects))
    body = {"name": "n", "create_service_account_only": True, "expires_in_seconds": 60}
    answer = await office.ask("POST", path + "/service_accounts", body)
    assert error(answer) == (400, "invalid_value", "expires_in_seconds")


async def test_true_is_not_one(office: Office) -> None:
    """Nor where the limit is 1 already, and the change would be none."""
    path = await path_of(office, next(o for o in POSTS if o.path.endswith("{limit}")))
    assert (await office.ask("POST", path, {"max_concurrent_requests": 1})).status_code == 200
    answer = await office.ask("POST", path, {"max_concurrent_requests": True})
    assert error(answer) == (400, "invalid_value", "max_concurrent_requests")


LISTS = [o for o in OPERATIONS if o.query is not None]


@pytest.mark.parametrize("operation", LISTS, ids=name_of)
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"), ("limit=101", "limit"), ("limit=-1", "limit"), ("limit=1.5", "limit"),
        ("limit=" + "9" * 5000, "limit"), ("limit=1&limit=2", "limit"), ("limit=%d9%a1", "limit"), ("limit=", "limit"),
        ("limit[]=1", "limit[]"),
        ("order=up", "order"), ("after=none", "after"), ("after=", "after"), ("after=%00", "after"),
        ("before=audit_log-00000099", "before"), ("before=audit_log-1", "before"),
        ("after=audit_log-00000000", "after"), ("after=audit_log-000000001", "after"),
        ("after=" + "x" * 1000, "after"), ("%00=1", None), ("surprise", None), ("a=%ff", None), ("=", None),
        ("&".join(f"a{i}=1" for i in range(600)), None), ("limit=1;order=asc", "limit"), ("x" * 20_000 + "=1", None),
    ],
    ids=lambda v: None if v is None else v[:24],
)  # fmt: skip
async def test_query_that_cannot_be_read(
    query: str, param: str | None, operation: routes.Operation, office: Office
) -> None:
    answer = await office.ask("GET", f"{await path_of(office, operation)}?{query}")
    assert error(answer)[0] == 400 and error(answer)[2] == param


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("audit_logs", "&".join("actor_ids=" + "x" * 150 for _ in range(150)), None),
        ("projects", "include_archived=yes", "include_archived"), ("projects", "event_types[]=x", "event_types[]"),
        ("audit_logs", "effective_at[gt]=-1", "effective_at[gt]"), ("audit_logs", "effective_at=1", "effective_at"),
        ("audit_logs", "effective_at[ne]=1", "effective_at[ne]"), ("audit_logs", "tenant_only=1", "tenant_only"),
        ("audit_logs", "project_ids[]=%00", "project_ids"), ("audit_logs", "actor_ids=", "actor_ids"),
        ("audit_logs", "resource_ids[]=" + "x" * 200, "resource_ids"),
    ],
    ids=lambda v: None if v is None else v[:24],
)  # fmt: skip
async def test_filter_that_makes_no_sense(path: str, query: str, param: str | None, office: Office) -> None:
    assert error(await office.ask("GET", f"{path}?{query}"))[::2] == (400, param)


@pytest.mark.parametrize(
    "route",
    [
        "GET ", "GET projects/", "GET projects//archive", "PUT projects", "PATCH projects", "DELETE projects",
        "GET users", "GET invites", "GET certificates", "GET groups", "GET roles", "GET external_keys",
        "GET usage", "GET usage/tokens", "POST usage/completions", "GET spend_alerts", "POST spend_alerts",
        "GET external_storage",
        "GET workload_identity_providers", "GET projects/p/users", "GET projects/p/certificates",
        "GET projects/p/groups",
        "GET projects/p/spend_alerts", "GET projects/p/hosted_tool_permissions", "GET projects/p/service_tier_settings",
        "GET projects/p/roles", "POST projects/p/api_keys", "DELETE projects/p", "POST admin_api_keys/k",
        "DELETE projects/p/rate_limits/rl-parrot", "GET projects/p/archive", "GET %70rojects", "GET projects%2fx",
        "GET projects/p/api_keys/k/rotate", "GET projects/a/b/c/d/e",
    ],
)  # fmt: skip
async def test_all_else_is_not_here_with_or_without_a_key(route: str, office: Office) -> None:
    method, path = route.split(" ")
    for key in ("", None):
        answer = await office.ask(method, path, key=key)
        assert answer.status_code == 404 and answer.json()["error"]["code"] in ("not_supported", "unknown_url")


@pytest.mark.parametrize(("raw", "found"), [("proj", 404), ("%70roj", 404), ("proj%00", 404), ("..", 404)])
async def test_ids_are_taken_as_they_were_sent(raw: str, found: int, office: Office) -> None:
    project = await office.world.organization.create_project("a", "n")
    raw = raw.replace("proj", project.id, 1) if raw != "%70roj" else "%70" + project.id[1:]
    expected = 200 if raw == project.id else found
    assert (await office.ask("GET", f"projects/{raw}")).status_code == expected


async def test_gateway_lists_the_routes_and_nobody_else_stands_there(office: Office, engine: EchoEngine) -> None:
    listed = {(m, p) for m, p in office.gateway.routes if "/organization/" in p}
    own = {(o.method, "/v1/organization/" + o.path) for o in OPERATIONS}
    assert own < listed and len(own) == len(OPERATIONS)
    assert {p.split("/")[3] for _, p in listed - own} == {"usage", "costs"}
    reply = await Caller(office.gateway, key=office.value).get("/v1/organization/../organization/projects")
    assert reply.status == 404
    assert (await Caller(office.gateway).get("/v1/models/parrot")).status == 401  # not the admin's
    with pytest.raises(ValueError, match="stands twice"):
        await gateway(engine, public={("GET", "/v1/organization/projects"): engine.app})


async def test_random_requests_never_fail_on_our_side(office: Office) -> None:
    """Whatever comes: an answer in OpenAI's shape, below 500, and a state that replays."""
    dice = random.Random(5)
    o = office.world.organization
    values = [*WRONG, None, 1, 60, "n", "month", "USD", "deny_list", ["parrot"], ["inference"], "owner", *GOOD.values()]
    names = [*sorted({name for operation in POSTS for name in operation.fields}), "x"]
    seen: set[int] = set()
    for _ in range(1500):
        operation = dice.choice(OPERATIONS)
        pools: dict[str, Any] = {
            "project": o.projects,
            "account": o.accounts,
            "key": {**o.keys, **o.admin_keys},
            "limit": {"rl-parrot": 1},
        }
        ids = {name: dice.choice([*[*pool][-3:], "none", "%00", "a%2fb"]) for name, pool in pools.items()}
        query = dice.choice(["", "", "", "?limit=1", "?after=" + ids["key"], "?order=desc", "?x=1", "?%00"])
        own, some = [*operation.fields] or names, dice.choice((0, 0, 1, 2, 3))
        body = {dice.choice(own if dice.random() < 0.9 else names): dice.choice(values) for _ in range(some)}
        content = json.dumps({**(good(operation) if dice.random() < 0.7 else {}), **body}).encode()
        if dice.random() < 0.2:
            content = bytes(b if dice.random() > 0.05 else dice.randrange(256) for b in content)
        if (operation.method, operation.path) == ("DELETE", "admin_api_keys/{key}"):
            ids["key"] = "none"  # our own key stays
        answer = await office.ask(operation.method, operation.path.format(**ids) + query, content=content)
        assert answer.status_code < 500, (operation, ids, query, content)
        if answer.status_code != 200:
            error(answer)
        seen.add(answer.status_code)
    assert {200, 400, 404, 409} <= seen
    again = office.world.again().organization
    assert again.projects == o.projects and again.keys == o.keys and again.accounts == o.accounts
    assert again.spend_limit_cents == o.spend_limit_cents
