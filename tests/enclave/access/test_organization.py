"""Who may ask: projects, service accounts and keys, and that replaying the events gives the same organisation."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from enclave.access.events import GENESIS, Event, EventError
from enclave.access.organization import LOOK_SECONDS, AccessError, Caller
from enclave.access.records import ModelLimit, ModelPermissions
from enclave.access.secrets import Made, Pepper, kind_of
from tests.enclave.access.world import World


async def with_key(world: World, **how: Any) -> tuple[str, str, Made]:
    """Project id, key id and value of a fresh key."""
    o = world.organization
    project = await o.create_project("key_admin", "research")
    account = await o.create_account("key_admin", project.id, "robot")
    key, made = await o.create_key("key_admin", account.id, "laptop", **how)
    return project.id, key.id, made


def code(caught: pytest.ExceptionInfo[AccessError]) -> str:
    return caught.value.code


async def test_first_admin_key_is_made_once_and_for_ever() -> None:
    world = World()
    key, made = await world.organization.bootstrap()
    assert world.organization.admin(made.value.encode()) == key
    for o in (world.organization, world.again().organization):
        with pytest.raises(AccessError) as caught:
            await o.bootstrap()
        assert code(caught) == "ACCESS_STATE"
        with pytest.raises(AccessError) as caught:
            await o.delete_admin_key(key.id, key.id)
        assert code(caught) == "ACCESS_STATE"


async def test_key_opens_its_project_and_says_what_it_may() -> None:
    world = World()
    project, key, made = await with_key(world)
    caller = world.organization.caller(made.value.encode())
    assert caller is not None and (caller.project.id, caller.key.id) == (project, key)
    assert caller.may("inference") and not caller.may("usage.read")


async def test_value_of_a_key_is_nowhere_but_in_the_answer() -> None:
    world = World()
    _, _, made = await with_key(world)
    body = made.value.removeprefix("sk-")
    assert body not in b"".join(world.stored).decode() and body not in repr(made) + repr(world.organization.keys)
    assert world.organization.keys and made.redacted.endswith(body[-4:])


@pytest.mark.parametrize("token", [b"", b"sk-", b"sk-" + b"x" * 43, b"sk-admin-" + b"x" * 43, b"sk-" + b"x" * 400])
async def test_value_that_was_never_given_out_opens_nothing(token: bytes) -> None:
    world = World()
    await world.organization.bootstrap()
    await with_key(world)
    assert world.organization.caller(token) is None and world.organization.admin(token) is None


async def test_admin_and_inference_keys_do_not_open_each_others_doors() -> None:
    world = World()
    _, admin = await world.organization.bootstrap()
    _, _, made = await with_key(world)
    assert world.organization.caller(admin.value.encode()) is None
    assert world.organization.admin(made.value.encode()) is None
    assert (kind_of(admin.value.encode()), kind_of(made.value.encode())) == ("admin", "inference")


async def test_keys_expire() -> None:
    world = World()
    _, _, made = await with_key(world, seconds=60)
    admin, its = await world.organization.create_admin_key("x", "short", 60)
    world.now += 59
    assert world.organization.caller(made.value.encode()) and world.organization.admin(its.value.encode()) == admin
    world.now += 1
    assert world.organization.caller(made.value.encode()) is None
    assert world.organization.admin(its.value.encode()) is None


async def test_rotated_key_has_two_values_for_the_grace_and_never_three() -> None:
    world = World()
    _, key, first = await with_key(world)
    _, second = await world.organization.rotate_key("a", key, 100)
    for o in (world.organization, world.again().organization):
        assert o.caller(first.value.encode()) and o.caller(second.value.encode())
    world.now += 100
    assert world.organization.caller(first.value.encode()) is None
    assert world.organization.caller(second.value.encode())
    _, third = await world.organization.rotate_key("a", key, 100)
    _, fourth = await world.organization.rotate_key("a", key, 0)
    assert [bool(world.organization.caller(m.value.encode())) for m in (second, third, fourth)] == [False, False, True]


async def test_open_streams_are_told_at_once_when_their_key_stops_to_open() -> None:
    world = World()
    o = world.organization
    project, key, made = await with_key(world)
    _, other, theirs = await with_key(world)
    mine = caller_of(world, made)
    futures = [o.watch(mine), o.watch(mine), o.watch(caller_of(world, theirs))]
    await o.revoke_key("a", key)
    assert [f.done() for f in futures] == [True, True, False]
    assert o.watch(mine).done()  # too late, and told so
    account = o.keys[other].owner_id
    await o.delete_account("a", account)
    assert futures[2].done()
    third = await o.create_account("a", project, "robot")
    _, made = await o.create_key("a", third.id, "k")
    watched = o.watch(caller_of(world, made))
    await o.archive_project("a", project)
    assert watched.done() and o.caller(made.value.encode()) is None


async def test_watchers_that_are_gone_are_forgotten() -> None:
    world = World()
    _, _, made = await with_key(world)
    mine = caller_of(world, made)
    for _ in range(10_000):
        world.organization.unwatch(mine, world.organization.watch(mine))
    assert not world.organization._watchers
    async with asyncio.timeout(5):
        while world.organization._looking is not None:  # noqa: ASYNC110 - it looks once more and stops
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["expiry", "shortened", "grace"])
async def test_open_streams_are_told_when_time_alone_closes_their_key(how: str) -> None:
    world = World()
    o = world.organization
    _, key, made = await with_key(world)
    if how == "expiry":
        await o.update_key("a", key, seconds=60)
    mine = caller_of(world, made)
    watched = o.watch(mine)
    if how == "shortened":
        await o.update_key("a", key, seconds=60)
    elif how == "grace":
        _, fresh = await o.rotate_key("a", key, 60)
        newer = o.watch(caller_of(world, fresh))
    await asyncio.sleep(1.2 * LOOK_SECONDS)
    assert not watched.done()
    world.now += 60
    async with asyncio.timeout(1):
        await watched
    assert o.caller(made.value.encode()) is None
    if how == "grace":
        assert not newer.done()


def caller_of(world: World, made: Made) -> Caller:
    found = world.organization.caller(made.value.encode())
    assert found is not None
    return found


async def test_models_a_project_may_ask() -> None:
    world = World()
    project, _, made = await with_key(world)
    for permissions, allowed in (
        (ModelPermissions("allow_list", frozenset({"a"})), (True, False)),
        (ModelPermissions("deny_list", frozenset({"a"})), (False, True)),
        (ModelPermissions("allow_list", frozenset()), (False, False)), (None, (True, True)),
    ):  # fmt: skip
        await world.organization.update_project("a", project, permissions=permissions)
        for o in (world.organization, world.again().organization):
            caller = o.caller(made.value.encode())
            assert caller is not None and (caller.may_use("a"), caller.may_use("b")) == allowed


async def test_limits_and_spend_limit_are_kept() -> None:
    world = World()
    project, _, _ = await with_key(world)
    limit = ModelLimit(60, 10_000, None, 5, 2)
    await world.organization.set_limit("a", project, "parrot", limit)
    await world.organization.update_project("a", project, spend_limit_cents=1234, name="renamed")
    there = world.again().organization.projects[project]
    assert (there.limits, there.spend_limit_cents, there.name) == ({"parrot": limit}, 1234, "renamed")
    await world.organization.set_limit("a", project, "parrot", None)
    assert not world.again().organization.projects[project].limits


async def test_limits_change_one_by_one() -> None:
    world = World()
    project, _, _ = await with_key(world)
    o = world.organization
    await o.update_limit("a", project, "parrot", {"max_requests_per_1_minute": 5})
    assert await o.update_limit("a", project, "parrot", {"max_concurrent_requests": 2}) == ModelLimit(
        5, None, None, None, 2
    )
    assert world.again().organization.projects[project].limits == {"parrot": ModelLimit(5, None, None, None, 2)}
    before = [*world.stored]
    assert await o.update_limit("a", project, "parrot", {"max_concurrent_requests": 2}) and world.stored == before
    bad: tuple[dict[str, Any], ...] = (
        {"surprise": 1}, {"max_concurrent_requests": -1}, {"max_concurrent_requests": 2.5},
    )  # fmt: skip
    for changes in bad:
        with pytest.raises(AccessError) as caught:
            await o.update_limit("a", project, "parrot", changes)
        assert code(caught) == "ACCESS_INVALID" and world.stored == before
    both: dict[str, int | None] = {"max_requests_per_1_minute": None, "max_concurrent_requests": None}
    await o.update_limit("a", project, "parrot", both)
    assert o.events[-1].type == "rate_limit.deleted" and not world.again().organization.projects[project].limits


async def test_spend_limit_of_the_organisation_is_kept() -> None:
    world = World()
    for cents in (1234, 0, None):
        await world.organization.set_spend_limit("a", cents)
        assert world.organization.spend_limit_cents == world.again().organization.spend_limit_cents == cents
    for wrong in (-1, True, 1.5, 10**13):
        with pytest.raises(AccessError):
            await world.organization.set_spend_limit("a", wrong)  # type: ignore[arg-type]  # what is to be refused


async def test_service_account_can_be_renamed_and_gets_another_role() -> None:
    world = World()
    project, key, _ = await with_key(world)
    id = world.organization.keys[key].owner_id
    await world.organization.update_account("a", id, name="android")
    await world.organization.update_account("a", id, role="owner")
    there = world.again().organization.accounts[id]
    assert (there.name, there.role, there.project_id) == ("android", "owner", project)
    before = [*world.stored]
    for changes in ({}, {"name": ""}, {"role": "root"}, {"project_id": "x"}):
        with pytest.raises(AccessError) as caught:
            await world.organization.update_account("a", id, **changes)
        assert code(caught) == "ACCESS_INVALID" and world.stored == before


async def test_key_can_be_narrowed_and_let_expire_and_its_values_stay() -> None:
    world = World()
    _, key, made = await with_key(world)
    _, second = await world.organization.rotate_key("a", key, 1000)
    await world.organization.update_key("a", key, scopes=["usage.read"])
    await world.organization.update_key("a", key, seconds=100)
    for o in (world.organization, world.again().organization):
        for value in (made.value, second.value):
            caller = o.caller(value.encode())
            assert caller is not None and caller.key.scopes == {"usage.read"}
    bad: tuple[dict[str, Any], ...] = ({}, {"scopes": []}, {"scopes": ["root"]}, {"seconds": 0})
    for wrong in bad:
        with pytest.raises(AccessError) as caught:
            await world.organization.update_key("a", key, **wrong)
        assert code(caught) == "ACCESS_INVALID"
    world.now += 100
    assert world.organization.caller(second.value.encode()) is None
    with pytest.raises(AccessError) as caught:  # expired for good
        await world.organization.update_key("a", key, seconds=100)
    assert code(caught) == "ACCESS_STATE"


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("create_project", ("",), "ACCESS_INVALID"), ("create_project", ("x" * 129,), "ACCESS_INVALID"),
        ("create_project", ("a\nb",), "ACCESS_INVALID"), ("create_project", (7,), "ACCESS_INVALID"),
        ("archive_project", ("proj_none",), "ACCESS_NOT_FOUND"),
        ("create_account", ("proj_none", "n"), "ACCESS_NOT_FOUND"),
        ("create_key", ("svc_acct_none", "n"), "ACCESS_NOT_FOUND"),
        ("update_account", ("x",), "ACCESS_NOT_FOUND"), ("update_key", ("x",), "ACCESS_NOT_FOUND"),
        ("update_limit", ("proj_none", "m", {}), "ACCESS_NOT_FOUND"), ("revoke_key", ("key_none",), "ACCESS_NOT_FOUND"),
        ("rotate_key", ("key_none", 0), "ACCESS_NOT_FOUND"), ("delete_account", ("x",), "ACCESS_NOT_FOUND"),
        ("create_admin_key", ("n", 0), "ACCESS_INVALID"), ("create_admin_key", ("n", True), "ACCESS_INVALID"),
        ("delete_admin_key", ("key_none",), "ACCESS_NOT_FOUND"),
    ],
)  # fmt: skip
async def test_command_that_makes_no_sense_changes_nothing(
    name: str, arguments: tuple[Any, ...], expected: str
) -> None:
    world = World()
    with pytest.raises(AccessError) as caught:
        await getattr(world.organization, name)("a", *arguments)
    assert code(caught) == expected and not world.stored


async def test_archived_project_takes_no_more_commands() -> None:
    world = World()
    project, key, _ = await with_key(world)
    account = world.organization.keys[key].owner_id
    await world.organization.archive_project("a", project)
    before = [*world.stored]
    for call in (
        world.organization.archive_project("a", project), world.organization.create_account("a", project, "n"),
        world.organization.create_key("a", account, "n"), world.organization.update_project("a", project, name="n"),
        world.organization.set_limit("a", project, "m", ModelLimit()),
        world.organization.update_limit("a", project, "m", {"max_concurrent_requests": 1}),
        world.organization.update_account("a", account, name="n"), world.organization.rotate_key("a", key, 0),
        world.organization.update_key("a", key, seconds=1),
    ):  # fmt: skip
        with pytest.raises(AccessError) as caught:
            await call
        assert code(caught) == "ACCESS_STATE"
    assert world.stored == before


@pytest.mark.parametrize("wrong", [{"scopes": []}, {"scopes": ["root"]}, {"seconds": 0}, {"seconds": 10**9}])
async def test_key_with_scopes_or_times_that_do_not_exist(wrong: dict[str, Any]) -> None:
    with pytest.raises(AccessError) as caught:
        await with_key(World(), **wrong)
    assert code(caught) == "ACCESS_INVALID"


async def test_action_that_could_not_be_stored_did_not_happen() -> None:
    world = World()
    project, key, made = await with_key(world)
    world.broken = True
    watched = world.organization.watch(caller_of(world, made))
    for call in (world.organization.revoke_key("a", key), world.organization.archive_project("a", project)):
        with pytest.raises(OSError, match="full"):
            await call
    assert world.organization.caller(made.value.encode()) and not watched.done()
    world.broken = False
    await world.organization.revoke_key("a", key)
    assert world.again().organization.caller(made.value.encode()) is None


async def test_audit_log_is_a_chain_and_names_the_actor() -> None:
    world = World()
    admin, _ = await world.organization.bootstrap()
    await world.organization.create_project(admin.id, "one")
    events = world.organization.events
    assert [(e.type, e.actor) for e in events] == [("api_key.created", "bootstrap"), ("project.created", admin.id)]
    assert (events[0].previous, events[1].previous) == (GENESIS, events[0].hash)


async def test_log_that_was_changed_is_not_replayed() -> None:
    world = World()
    await with_key(world)
    stored = world.stored
    for at in range(len(stored)):
        edited = replace(Event.decode(stored[at]), actor="somebody else").encode()
        for bad in (
            [*stored[:at], *stored[at + 1 :], stored[0]], [*stored[:at], edited, *stored[at + 1 :], edited],
            [*stored[: at + 1], stored[at]], [*stored[:at], stored[at].replace(b'"at":', b'"at": ')],
            [*stored[:at], stored[at].replace(b".created", b".summoned")], [*stored[:at], b"{}"],
            [*stored[:at], b"\xff"],
        ):  # fmt: skip
            with pytest.raises(EventError):
                World(bad)


async def test_any_history_replays_to_the_same_organisation() -> None:
    """Random commands, some of which make no sense; after each a restart shows the same."""
    random_ = random.Random(7)
    world = World()
    o = world.organization
    _, _, made = await with_key(world)
    values = [made.value.encode()]
    for _ in range(300):
        world.now += random_.choice((0, 1, 50, 4000))
        project = random_.choice([*o.projects, "proj_none"])
        account = random_.choice([*o.accounts, "svc_acct_none"])
        key = random_.choice([*o.keys])
        try:
            match random_.randrange(10):
                case 0:
                    await o.create_project("a", "p")
                case 1 | 2:
                    await o.create_account("a", project, "s")
                case 3 | 4 | 5:
                    values.append(
                        (await o.create_key("a", account, "k", seconds=random_.choice((None, 100))))[1].value.encode()
                    )
                case 6:
                    values.append((await o.rotate_key("a", key, random_.choice((0, 60))))[1].value.encode())
                case 7:
                    await o.revoke_key("a", key)
                case 8 if random_.random() < 0.3:
                    await o.archive_project("a", project)
                case 9 if random_.random() < 0.3:
                    await o.delete_account("a", account)
        except AccessError:
            continue
    again = world.again().organization
    for one, two in zip(
        (o.projects, o.accounts, o.keys, o.admin_keys, o._by_digest, o.events),
        (again.projects, again.accounts, again.keys, again.admin_keys, again._by_digest, again.events), strict=True,
    ):  # fmt: skip
        assert one == two
    opened = [o.caller(v) for v in values]
    assert opened == [again.caller(v) for v in values] and any(opened) and not all(opened)
    assert len(o._by_digest) <= 2 * sum(k.revoked_at is None for k in o.keys.values())


def test_pepper_is_the_state_keys_own() -> None:
    one, two = Pepper(bytes(32)), Pepper(bytes(31) + b"\1")
    assert one.digest(b"sk-x") != two.digest(b"sk-x") and one.digest(b"sk-x") == Pepper(bytes(32)).digest(b"sk-x")
    with pytest.raises(ValueError, match="32 bytes"):
        Pepper(bytes(31))
