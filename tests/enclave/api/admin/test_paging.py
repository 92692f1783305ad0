"""Pages of lists: against a slow reference, through the SDK, and when what a cursor names is deleted meanwhile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from enclave.api.admin.paging import Ask, rows_of
from tests.enclave.api.admin.office import Office


def reference(rows: list[int], ask: Ask) -> tuple[list[int], bool]:
    """The same by walking over all positions there ever were."""
    order = sorted(range(1, 9), reverse=ask.newest_first)
    low = order.index(int(ask.after)) + 1 if ask.after else 0
    high = order.index(int(ask.before)) if ask.before else len(order)
    there = [p for p in order[low:high] if p in rows]
    shown = there[-ask.limit :] if ask.before and not ask.after else there[: ask.limit]
    return shown, len(there) > ask.limit


def test_pages_are_those_of_the_reference() -> None:
    cursors = [None, "1", "3", "4", "8"]
    for rows in ([], [1], [2, 3, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8], [8]):
        for limit, newest, after, before in itertools.product((1, 2, 3, 9), (False, True), cursors, cursors):
            ask = Ask(limit, newest, after, before, {}, {})
            assert rows_of(rows, ask, position=lambda p: p, at=int) == reference(rows, ask), (rows, ask)


def test_filter_is_asked_until_the_page_is_full() -> None:
    asked: list[int] = []

    def keep(row: int) -> bool:
        asked.append(row)
        return row % 10 == 0

    ask = Ask(2, True, None, None, {}, {})
    assert rows_of(range(1000), ask, position=lambda p: p, at=int, keep=keep) == ([990, 980], True)
    assert len(asked) == 30


@pytest.fixture
async def office() -> Office:
    made = await Office.opened()
    o = made.world.organization
    for i in range(23):
        project = await o.create_project("a", f"p{i}")
    for i in range(23):
        account = await o.create_account("a", project.id, f"s{i}")
    for i in range(23):
        await o.create_key("a", account.id, f"k{i}")
        await o.create_admin_key("a", f"a{i}")
    return made


async def pages(office: Office, path: str) -> list[dict[str, Any]]:
    """All pages, by `last_id` from the first on."""
    found: list[dict[str, Any]] = []
    sign = "&" if "?" in path else "?"
    while not found or found[-1]["has_more"]:
        after = f"{sign}after={found[-1]['last_id']}" if found else ""
        answer = await office.ask("GET", path + after)
        assert answer.status_code == 200
        found.append(answer.json())
        assert found[-1]["object"] == "list" and len(found) < 50
        ids = [row["id"] for row in found[-1]["data"]]
        assert (found[-1]["first_id"], found[-1]["last_id"]) == (ids[0], ids[-1])
    return found


@pytest.mark.parametrize("what", ["projects", "service_accounts", "api_keys", "admin_api_keys", "audit_logs"])
async def test_every_list_is_paged_both_ways(what: str, office: Office) -> None:
    project = next(reversed(office.world.organization.projects))
    path = what if what in ("projects", "admin_api_keys", "audit_logs") else f"projects/{project}/{what}"
    there = {"projects": 23, "service_accounts": 23, "api_keys": 23, "admin_api_keys": 24, "audit_logs": 93}[what]
    first = (await office.ask("GET", path)).json()
    assert len(first["data"]) == 20 and first["has_more"]
    up, down = [
        [row["id"] for page in await pages(office, f"{path}?limit=5&order={order}") for row in page["data"]]
        for order in ("asc", "desc")
    ]
    assert up == down[::-1] and len(set(up)) == there
    assert [row["id"] for row in first["data"]] == (down if what == "audit_logs" else up)[:20]
    page = (await office.ask("GET", f"{path}?order=asc&limit=3&before={up[10]}")).json()
    assert [row["id"] for row in page["data"]] == up[7:10] and page["has_more"]
    page = (await office.ask("GET", f"{path}?order=asc&limit=3&before={up[2]}")).json()
    assert [row["id"] for row in page["data"]] == up[:2] and not page["has_more"]
    empty = (await office.ask("GET", f"{path}?order=asc&after={up[-1]}")).json()
    assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_rate_limits_are_paged(office: Office) -> None:
    project = next(iter(office.world.organization.projects))
    listed = office.organization.projects.rate_limits.list_rate_limits(project, limit=1)
    assert [row.id async for row in listed] == ["rl-parrot", "rl-org/magpie:v1", "rl-wren"]
    page = await office.organization.projects.rate_limits.list_rate_limits(project, before="rl-org/magpie:v1")
    assert [row.id for row in page.data] == ["rl-parrot"]


async def test_who_lists_and_deletes_by_turns_misses_nothing(office: Office) -> None:
    o, project = office.organization, next(reversed(office.world.organization.projects))
    keys = [k.id async for k in o.projects.api_keys.list(project)]
    gone = []
    async for key in o.projects.api_keys.list(project, limit=4):
        await o.projects.api_keys.delete(key.id, project_id=project)
        gone.append(key.id)
    assert gone == keys and len(keys) == 23
    accounts = [a.id async for a in o.projects.service_accounts.list(project)]
    gone = []
    async for account in o.projects.service_accounts.list(project, limit=4):
        await o.projects.service_accounts.delete(account.id, project_id=project)
        gone.append(account.id)
    assert gone == accounts and len(accounts) == 23


async def test_list_that_grows_meanwhile_shows_what_came(office: Office) -> None:
    project = next(reversed(office.world.organization.projects))
    names = []
    async for account in office.organization.projects.service_accounts.list(project, limit=10):
        names.append(account.name)
        if len(names) == 5:
            await office.organization.projects.service_accounts.create(project, name="new")
    assert names == [*(f"s{i}" for i in range(23)), "new"]
