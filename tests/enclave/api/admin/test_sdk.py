"""The official SDK administers an organisation: every operation, its shapes and errors, the same after a restart."""

from __future__ import annotations

import itertools
import json
from typing import Any

import openai
import pytest
from openai import BaseModel

from enclave.access.organization import MAX_KEYS
from enclave.api.admin import routes
from enclave.api.admin.fields import NO_LIMIT
from enclave.telemetry import _WORD
from tests.enclave.api.admin.office import MODELS, Office, error, valid


@pytest.fixture
async def office() -> Office:
    return await Office.opened()


async def made(office: Office) -> tuple[str, str, str, str]:
    """Ids of a project, a service account and its key, and the key's value."""
    project = await office.organization.projects.create(name="research")
    account = await office.organization.projects.service_accounts.create(project.id, name="robot")
    assert account.api_key is not None
    return project.id, account.id, account.api_key.id, account.api_key.value


def document(answer: BaseModel) -> dict[str, Any]:
    """As it came, with what is ours."""
    return dict(answer.to_dict())


# --- operations -------------------------------------------------------------------------------------------------------


async def test_projects(office: Office) -> None:
    projects = office.organization.projects
    one = valid(await projects.create(name="one"))
    assert (one.name, one.status, one.archived_at) == ("one", "active", None) and one.created_at == office.world.now
    two = await projects.create(name="two", external_key_id=None)
    assert valid(await projects.retrieve(one.id)) == one
    assert valid(await projects.update(one.id, name="first")).name == "first"
    assert (await projects.update(one.id)).name == "first"  # nothing to change is no error, and no event
    office.world.now += 5
    gone = valid(await projects.archive(two.id))
    assert (gone.status, gone.archived_at) == ("archived", office.world.now)
    assert [p.id async for p in projects.list()] == [one.id]
    assert [p.id async for p in projects.list(include_archived=True)] == [one.id, two.id]
    assert (await projects.retrieve(two.id)).status == "archived"
    assert [e.type for e in office.world.organization.events[1:]] == [
        "project.created", "project.created", "project.updated", "project.archived",
    ]  # fmt: skip


async def test_service_accounts_and_their_keys(office: Office) -> None:
    accounts = office.organization.projects.service_accounts
    project = (await office.organization.projects.create(name="p")).id
    robot = valid(await accounts.create(project, name="robot", expires_in_seconds=60))
    assert robot.role == "member" and robot.api_key is not None
    assert robot.api_key.expires_at == office.world.now + 60
    assert office.world.organization.caller(robot.api_key.value.encode()) is not None
    bare = valid(await accounts.create(project, name="bare", create_service_account_only=True))
    assert (bare.role, bare.api_key) == ("none", None)
    assert [a.id async for a in accounts.list(project)] == [robot.id, bare.id]
    assert valid(await accounts.retrieve(bare.id, project_id=project)).name == "bare"
    assert valid(await accounts.update(bare.id, project_id=project, name="b", role="owner")).role == "owner"
    assert (await accounts.update(bare.id, project_id=project)).name == "b"
    key = valid(await accounts.api_keys.create(bare.id, project_id=project, name="k", scopes=["usage.read"]))
    caller = office.world.organization.caller(key.value.encode())
    assert caller is not None and caller.key.scopes == {"usage.read"} and caller.project.id == project
    gone = valid(await accounts.delete(bare.id, project_id=project))
    assert gone.deleted and gone.id == bare.id
    assert office.world.organization.caller(key.value.encode()) is None
    assert [a.id async for a in accounts.list(project)] == [robot.id]


async def test_project_keys(office: Office) -> None:
    project, account, key, value = await made(office)
    keys = office.organization.projects.api_keys
    (row,) = [valid(k) async for k in keys.list(project)]
    assert row == valid(await keys.retrieve(key, project_id=project))
    assert row.redacted_value.endswith(value[-4:]) and value not in row.to_json()
    assert row.owner.service_account is not None and row.owner.service_account.id == account
    assert (row.last_used_at, row.expires_at, row.owner_project_access) == (None, None, "active")
    changed = valid(await keys.update(key, project_id=project, scopes=["inference"], expires_in_seconds=500))
    assert changed.expires_at == office.world.now + 500 and changed.to_dict()["scopes"] == ["inference"]
    assert (await keys.update(key, project_id=project)) == changed
    for access, found in (("active", 1), ("any", 1), ("inactive", 0)):
        assert len((await keys.list(project, owner_project_access=access)).data) == found  # type: ignore[arg-type]
    gone = valid(await keys.delete(key, project_id=project))
    assert gone.deleted and office.world.organization.caller(value.encode()) is None
    assert not (await keys.list(project)).data
    with pytest.raises(openai.NotFoundError):
        await keys.retrieve(key, project_id=project)


async def test_rotated_key_is_shown_once_and_the_old_value_has_its_grace(office: Office) -> None:
    project, _, key, value = await made(office)
    options: Any = {"security": {"admin_api_key_auth": True}}
    path, body = f"/organization/projects/{project}/api_keys/{key}/rotate", {"grace_seconds": 60}
    answer: Any = await office.client.post(path, cast_to=object, body=body, options=options)
    assert answer["object"] == "organization.project.api_key" and answer["id"] == key
    assert answer["previous_value_expires_at"] == office.world.now + 60
    assert answer["redacted_value"].endswith(answer["value"][-4:])
    caller = office.world.organization.caller
    assert caller(value.encode()) and caller(answer["value"].encode())
    office.world.now += 60
    assert caller(value.encode()) is None and caller(answer["value"].encode())


async def test_admin_keys(office: Office) -> None:
    keys = office.organization.admin_api_keys
    second = valid(await keys.create(name="second", expires_in_seconds=200_000))
    assert second.expires_at == office.world.now + 200_000
    assert valid(await keys.retrieve(second.id)).name == "second"
    listed = [valid(k) async for k in keys.list(order="desc")]
    assert [k.name for k in listed] == ["second", "first admin key"] and second.value not in repr(listed)
    other = office.sdk(second.value).admin.organization
    assert valid(await other.admin_api_keys.delete(listed[1].id)).deleted
    with pytest.raises(openai.AuthenticationError):  # it was our own
        await keys.list()
    with pytest.raises(openai.ConflictError):  # the last one stays
        await other.admin_api_keys.delete(second.id)
    office.world.now += 200_000
    with pytest.raises(openai.AuthenticationError):
        await other.projects.list()


async def test_rate_limits_are_one_row_per_model_and_change_one_by_one(office: Office) -> None:
    project, *_ = await made(office)
    limits = office.organization.projects.rate_limits
    rows = [valid(r) async for r in limits.list_rate_limits(project)]
    assert [(r.model, r.id) for r in rows] == [(m, "rl-" + m) for m in MODELS]
    assert {r.max_requests_per_1_minute for r in rows} == {NO_LIMIT}
    magpie = "rl-org/magpie:v1"  # its "/" is escaped in the path
    ours = {"max_concurrent_requests": 2, "max_tokens_per_1_day": 900}
    row = valid(
        await limits.update_rate_limit(magpie, project_id=project, max_requests_per_1_minute=7, extra_body=ours)
    )
    assert (row.model, row.max_requests_per_1_minute, row.max_tokens_per_1_minute) == ("org/magpie:v1", 7, NO_LIMIT)
    assert row.to_dict()["max_concurrent_requests"] == 2
    row = await limits.update_rate_limit(magpie, project_id=project, max_tokens_per_1_minute=0)
    assert (row.max_requests_per_1_minute, row.max_tokens_per_1_minute) == (7, 0)
    kept = office.world.organization.projects[project].limits["org/magpie:v1"]
    assert (kept.max_tokens_per_1_minute, kept.max_tokens_per_1_day, kept.max_requests_per_1_day) == (0, 900, None)
    assert (await limits.update_rate_limit(magpie, project_id=project)) == row
    off: dict[str, Any] = {"max_concurrent_requests": None, "max_tokens_per_1_day": None}
    await limits.update_rate_limit(magpie, project_id=project, max_requests_per_1_minute=NO_LIMIT, extra_body=off)
    row = await limits.update_rate_limit(
        magpie,
        project_id=project,
        max_tokens_per_1_minute=None,  # type: ignore[arg-type]  # null
    )
    assert not office.world.organization.projects[project].limits
    assert office.world.organization.events[-1].type == "rate_limit.deleted"
    for unknown in ("rl-none", "parrot", "rl-"):
        with pytest.raises(openai.NotFoundError):
            await limits.update_rate_limit(unknown, project_id=project, max_requests_per_1_minute=1)


async def test_model_permissions(office: Office) -> None:
    project, _, _, value = await made(office)
    permissions = office.organization.projects.model_permissions
    for _ in range(2):
        none = valid(await permissions.retrieve(project))
        assert (none.mode, none.api_model_ids) == ("deny_list", [])
        assert valid(await permissions.delete(project)).deleted
    given = valid(await permissions.update(project, mode="allow_list", model_ids=["wren", "parrot"]))
    assert (given.mode, given.api_model_ids) == ("allow_list", ["parrot", "wren"])
    assert await permissions.retrieve(project) == given
    caller = office.world.organization.caller(value.encode())
    assert caller is not None and caller.may_use("wren") and not caller.may_use("org/magpie:v1")
    with pytest.raises(openai.BadRequestError) as caught:
        await permissions.update(project, mode="deny_list", model_ids=["parot"])
    assert caught.value.param == "model_ids" and "parot" not in caught.value.message
    await permissions.delete(project)
    caller = office.world.organization.caller(value.encode())
    assert caller is not None and caller.may_use("org/magpie:v1")


async def test_spend_limits_of_organisation_and_project(office: Office) -> None:
    project, *_ = await made(office)
    o = office.organization
    for get, put, drop, level in (
        (o.spend_limit.retrieve, o.spend_limit.update, o.spend_limit.delete, "organization"),
        (lambda: o.projects.spend_limit.retrieve(project), lambda **k: o.projects.spend_limit.update(project, **k),
         lambda: o.projects.spend_limit.delete(project), "project"),
    ):  # fmt: skip
        for nothing in (get, drop):
            with pytest.raises(openai.NotFoundError):
                await nothing()
        for cents, status in ((5000, "inactive"), (0, "enforcing")):  # nothing has been spent: 0 stops all the same
            given = valid(await put(threshold_amount=cents, currency="USD", interval="month"))
            assert (given.object, given.threshold_amount) == (f"{level}.spend_limit", cents)
            assert (given.currency, given.interval, given.enforcement.status) == ("USD", "month", status)
            assert valid(await get()) == given
        gone = valid(await drop())
        assert gone.deleted and gone.object == f"{level}.spend_limit.deleted"
    assert office.world.organization.spend_limit_cents is None


async def test_retention_is_zero_and_stays_so(office: Office) -> None:
    project, *_ = await made(office)
    own, theirs = office.organization.data_retention, office.organization.projects.data_retention
    before = len(office.world.stored)
    assert valid(await own.retrieve()).type == valid(await theirs.retrieve(project)).type == "zero_data_retention"
    assert valid(await own.update(retention_type="zero_data_retention")).type == "zero_data_retention"
    for kind in ("zero_data_retention", "organization_default"):
        answer = valid(await theirs.update(project, retention_type=kind))
        assert answer.type == "zero_data_retention"
    for weaker in ("modified_abuse_monitoring", "enhanced_zero_data_retention"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await own.update(retention_type=weaker)
        assert (caught.value.code, caught.value.param) == ("zero_data_retention", "retention_type")
    with pytest.raises(openai.PermissionDeniedError):
        await theirs.update(project, retention_type="none")
    with pytest.raises(openai.BadRequestError):
        await own.update(retention_type="none")  # type: ignore[arg-type]
    assert len(office.world.stored) == before


# --- the audit log ----------------------------------------------------------------------------------------------------


async def everything(office: Office) -> list[str]:
    """Do what can be done; the values of all keys that were made."""
    o = office.organization
    project, account, key, value = await made(office)
    second = await o.admin_api_keys.create(name="second")
    await o.projects.update(project, name="renamed")
    rotated = (await office.ask("POST", f"projects/{project}/api_keys/{key}/rotate", {"grace_seconds": 0})).json()
    await o.projects.api_keys.update(key, project_id=project, scopes=["inference"])
    extra = await o.projects.service_accounts.api_keys.create(account, project_id=project, expires_in_seconds=60)
    await o.projects.service_accounts.update(account, project_id=project, role="owner")
    await o.projects.rate_limits.update_rate_limit("rl-parrot", project_id=project, max_requests_per_1_day=5)
    await o.projects.rate_limits.update_rate_limit("rl-parrot", project_id=project, max_requests_per_1_day=NO_LIMIT)
    await o.projects.model_permissions.update(project, mode="deny_list", model_ids=["wren"])
    await o.projects.model_permissions.delete(project)
    await o.spend_limit.update(threshold_amount=1, currency="USD", interval="month")
    await o.spend_limit.delete()
    await o.projects.spend_limit.update(project, threshold_amount=1, currency="USD", interval="month")
    await o.projects.spend_limit.delete(project)
    await o.projects.api_keys.delete(extra.id, project_id=project)
    await o.admin_api_keys.delete(second.id)
    other, *_ = await made(office)
    doomed = await o.projects.service_accounts.create(project, name="doomed", create_service_account_only=True)
    await o.projects.service_accounts.delete(doomed.id, project_id=project)
    await o.projects.archive(other)
    return [office.value, value, second.value, rotated["value"], extra.value]


DONE = [
    "api_key.created", "project.created", "service_account.created", "api_key.created", "api_key.created",
    "project.updated", "api_key.updated", "api_key.updated", "api_key.created", "service_account.updated",
    "rate_limit.updated", "rate_limit.deleted", "project.updated", "project.updated", "organization.updated",
    "organization.updated", "project.updated", "project.updated", "api_key.deleted", "api_key.deleted",
    "project.created", "service_account.created", "api_key.created", "service_account.created",
    "service_account.deleted", "project.archived",
]  # fmt: skip


async def test_every_change_is_in_the_audit_log_and_no_secret_is(office: Office) -> None:
    values = await everything(office)
    rows = [valid(row) async for row in office.organization.audit_logs.list(limit=7)]
    assert [row.type for row in reversed(rows)] == DONE
    mine = office.world.organization.events[0].subject
    assert [r.actor.api_key.id for r in rows if r.actor and r.actor.api_key] == [mine] * (len(rows) - 1) + ["bootstrap"]
    chain: list[dict[str, Any]] = [document(row)["chain"] for row in rows]
    assert all(newer["previous"] == older["hash"] for newer, older in itertools.pairwise(chain))
    told = "".join(row.to_json() for row in rows)
    stored = b"".join(office.world.stored).decode()
    for value in values:
        assert value[-20:] not in told and value[-20:] not in stored and value[-4:] in stored
    assert stored.count('"digest":"') == 6  # the log of the state holds them, the one that is read does not
    assert "digest" not in told
    details = {row["type"]: row[row["type"]] for row in map(document, rows)}
    assert all(detail["id"] for detail in details.values())
    assert details["rate_limit.updated"]["id"] == "rl-parrot"
    assert details["rate_limit.updated"]["changes_requested"]["max_requests_per_1_day"] == 5


async def test_audit_log_is_filtered(office: Office) -> None:
    project, account, key, _ = await made(office)
    office.world.now += 10
    await office.organization.projects.update(project, name="later")
    logs, start = office.organization.audit_logs, office.world.now - 10

    async def types(**asked: Any) -> list[str]:
        return [row.type async for row in logs.list(**asked)]

    all_of_them = [
        "project.updated",
        "api_key.created",
        "service_account.created",
        "project.created",
        "api_key.created",
    ]
    assert await types() == all_of_them
    assert await types(event_types=["project.created", "project.updated"]) == ["project.updated", "project.created"]
    assert await types(project_ids=[project]) == all_of_them[:4]
    assert await types(resource_ids=[account, key]) == ["api_key.created", "service_account.created"]
    assert await types(actor_ids=["bootstrap"]) == ["api_key.created"]
    assert await types(effective_at={"gt": start}) == await types(effective_at={"gte": start + 1}) == all_of_them[:1]
    assert await types(effective_at={"lt": start + 10}) == await types(effective_at={"lte": start}) == all_of_them[1:]
    assert await types(effective_at={"gt": start, "gte": 0}) == all_of_them[:1]
    assert await types(effective_at={"lt": start, "lte": 10**10}) == []
    assert await types(actor_emails=["a@b"]) == await types(tenant_only=True) == []
    assert await types(limit=1, event_types=["project.created", "api_key.created"]) == [
        "api_key.created", "project.created", "api_key.created",
    ]  # fmt: skip


# --- restart ----------------------------------------------------------------------------------------------------------


async def test_restart_gives_the_same_answers(office: Office) -> None:
    await everything(office)
    project = office.world.organization.events[1].subject
    again = office.again()
    for path in (
        "projects?include_archived=true", f"projects/{project}", f"projects/{project}/service_accounts",
        f"projects/{project}/api_keys", "admin_api_keys", f"projects/{project}/rate_limits",
        f"projects/{project}/model_permissions", "spend_limit", f"projects/{project}/spend_limit",
        "audit_logs?limit=100", "data_retention",
    ):  # fmt: skip
        before, after = await office.ask("GET", path), await again.ask("GET", path)
        assert (before.status_code, before.json()) == (after.status_code, after.json()), path


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_refusals_are_what_the_sdk_makes_of_them(office: Office) -> None:
    project, _, key, value = await made(office)
    o = office.organization
    for call in (
        o.projects.retrieve("proj_none"), o.projects.update("proj_none", name="n"), o.projects.archive("proj_none"),
        o.projects.service_accounts.create("proj_none", name="n"), o.admin_api_keys.retrieve(key),
        o.projects.service_accounts.delete("svc_none", project_id=project), o.admin_api_keys.delete("key_none"),
        o.projects.api_keys.delete("key_none", project_id=project), o.projects.data_retention.retrieve("proj_none"),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert caught.value.code == "not_found" and "none" not in caught.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        await o.projects.create(name="a\nb")
    assert (bad.value.code, bad.value.param) == ("invalid_value", "name")
    for key_value in (value, "sk-admin-" + "x" * 43, "sk-none"):
        with pytest.raises(openai.AuthenticationError) as unknown:
            await office.sdk(key_value).admin.organization.projects.list()
        assert unknown.value.code == "invalid_api_key"


async def test_what_another_project_owns_is_not_there(office: Office) -> None:
    _, account, key, value = await made(office)
    other, *_ = await made(office)
    for method, path, body in (
        ("GET", f"service_accounts/{account}", None), ("POST", f"service_accounts/{account}", {"name": "n"}),
        ("DELETE", f"service_accounts/{account}", None), ("POST", f"service_accounts/{account}/api_keys", {}),
        ("GET", f"api_keys/{key}", None), ("POST", f"api_keys/{key}", {"scopes": ["inference"]}),
        ("DELETE", f"api_keys/{key}", None), ("POST", f"api_keys/{key}/rotate", {"grace_seconds": 0}),
    ):  # fmt: skip
        assert error(await office.ask(method, f"projects/{other}/{path}", body))[:2] == (404, "not_found"), path
    assert office.world.organization.caller(value.encode()) is not None


async def test_conflicts_and_full_tables_are_asked_once(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDKs repeat 409 and 429 unless they are told that it makes no sense."""
    project, *_ = await made(office)
    asked: list[str] = []

    async def count(request: Any) -> None:
        asked.append(request.method)

    office.http.event_hooks = {"request": [count], "response": []}
    patient = office.sdk(office.value, max_retries=5).admin.organization
    await patient.projects.archive(project)
    with pytest.raises(openai.ConflictError):
        await patient.projects.update(project, name="n")
    assert len(asked) == 2
    other = (await patient.projects.create(name="other")).id
    monkeypatch.setattr("enclave.access.organization.MAX_KEYS", 1)
    assert MAX_KEYS > 1
    with pytest.raises(openai.RateLimitError):
        await patient.projects.service_accounts.create(other, name="n")
    assert len(asked) == 4
    assert not (await patient.projects.service_accounts.list(other)).data  # nor is half of it there


async def test_change_that_cannot_be_stored_is_an_error_and_did_not_happen(office: Office) -> None:
    project, *_ = await made(office)
    office.world.broken = True
    with pytest.raises(openai.InternalServerError) as caught:
        await office.organization.projects.update(project, name="lost")
    assert "full" not in str(caught.value)
    assert (await office.organization.projects.retrieve(project)).name == "research"


async def test_expired_admin_key_is_refused_in_the_same_words(office: Office) -> None:
    short = await office.organization.admin_api_keys.create(name="short", expires_in_seconds=5)
    office.world.now += 5
    answers = [
        await office.ask("GET", "projects", key=key) for key in (short.value, "sk-admin-" + "y" * 43, None, "sk-x")
    ]
    assert {a.status_code for a in answers} == {401} and len({a.content for a in answers}) == 1
    assert all(a.headers["www-authenticate"] == "Bearer" for a in answers)


async def test_admin_key_that_is_deleted_while_its_request_comes_in_does_nothing(office: Office) -> None:
    second = await office.organization.admin_api_keys.create(name="second")

    async def body() -> Any:
        yield b'{"name": '
        await office.organization.admin_api_keys.delete(second.id)
        yield b'"too late"}'

    assert error(await office.ask("POST", "projects", content=body(), key=second.value))[0] == 401
    assert not office.world.organization.projects


async def test_log_knows_the_route_and_nothing_that_was_sent(office: Office, capfd: pytest.CaptureFixture[str]) -> None:
    project, *_ = await made(office)
    capfd.readouterr()
    await office.organization.projects.update(project, name="CANARY")
    await office.ask("POST", "projects/CANARY/api_keys/CANARY/rotate?CANARY=1", {"CANARY": 1}, key="CANARY")
    written = capfd.readouterr()
    lines = [json.loads(line) for line in (written.out + written.err).splitlines()]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/v1/organization/projects/id", 200), ("/v1/organization/projects/id/api_keys/id/rotate", 401),
    ]  # fmt: skip
    assert "CANARY" not in written.out + written.err and project not in written.out + written.err
    assert all(_WORD.fullmatch(o.logged) for o in routes._OPERATIONS)
