"""The state key: made once, asked for after every boot, and never enough to make an old state pass for the latest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from attestation.errors import VouchsafeError
from enclave.access.budgets import Budgets
from enclave.custody import Born, Custody
from enclave.state import Checkpoint
from enclave.tenancy import Slots
from tests.enclave.api.serving import NOW, prices

SECRET = b"s" * 43


class Machine:
    """Boots of one enclave over one storage."""

    def __init__(self, folder: Path) -> None:
        self.path, self.running = folder / "state.db", list[Custody]()

    async def boot(self, *models: str, cost: int = 1_000_000) -> Custody:
        ids = models or ("parrot",)
        table = prices(*ids, input=cost, cached=cost, output=cost)
        made = Custody(
            f"sqlite:{self.path}",
            hashlib.sha256(SECRET).digest(),
            table,
            {id: Slots(4, 100) for id in ids},
            lambda: NOW,
        )
        self.running.append(made)
        await made.look()
        return made

    async def stop(self) -> None:
        while self.running:
            await self.running.pop().close()


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    made = Machine(tmp_path)
    yield made
    await made.stop()


async def refused(what: object) -> str:
    with pytest.raises(VouchsafeError) as err:
        await what  # type: ignore[misc]  # a coroutine
    return err.value.code


async def born(machine: Machine) -> tuple[Custody, Born]:
    custody = await machine.boot()
    assert custody.state == "new" and custody.tenancy is None
    return custody, await custody.bootstrap(SECRET)


async def test_first_boot_makes_the_state_and_later_ones_ask_for_its_key(machine: Machine) -> None:
    custody, made = await born(machine)
    assert custody.state == "open" and custody.tenancy is not None
    assert custody.tenancy.organization.admin(made.admin_key.encode()) is not None
    project = await custody.tenancy.organization.create_project(made.admin_key_id, "kept")
    assert custody.tenancy.epoch == 1
    await machine.stop()

    again = await machine.boot()
    assert again.state == "locked" and again.tenancy is None
    after = await again.unlock(made.state_key, made.checkpoint)
    assert again.state == "open" and again.tenancy is not None and again.tenancy.epoch == 2
    assert after.state_id == made.checkpoint.state_id and after.seq > made.checkpoint.seq
    assert again.tenancy.organization.projects[project.id].name == "kept"
    assert again.tenancy.organization.admin(made.admin_key.encode()) is not None
    assert made.state_key not in machine.path.read_bytes() and made.admin_key.encode() not in machine.path.read_bytes()


async def test_bootstrap_wants_the_secret_and_works_once(machine: Machine) -> None:
    custody = await machine.boot()
    for wrong in (b"", b"x" * 43, SECRET + b"\n"):
        assert await refused(custody.bootstrap(wrong)) == "CUSTODY_SECRET"
    assert custody.state == "new"
    await custody.bootstrap(SECRET)
    assert await refused(custody.bootstrap(SECRET)) == "CUSTODY_STATE"
    await machine.stop()
    assert await refused((await machine.boot()).bootstrap(SECRET)) == "CUSTODY_STATE"


async def test_two_bootstraps_at_once_make_one_state(machine: Machine) -> None:
    custody = await machine.boot()
    results = await asyncio.gather(*(custody.bootstrap(SECRET) for _ in range(3)), return_exceptions=True)
    assert len([r for r in results if isinstance(r, Born)]) == 1
    assert {getattr(r, "code", "") for r in results if not isinstance(r, Born)} == {"CUSTODY_STATE"}


async def test_attempts_are_bounded(machine: Machine) -> None:
    custody, _ = await born(machine)
    results = await asyncio.gather(*(custody.unlock(os.urandom(32), None) for _ in range(9)), return_exceptions=True)
    assert (
        sorted(r.code for r in results if isinstance(r, VouchsafeError))
        == ["CUSTODY_BUSY"] * 5 + ["CUSTODY_SECRET"] * 4
    )


async def test_caller_that_hangs_up_does_not_stop_an_opening_half_way(machine: Machine) -> None:
    _, made = await born(machine)
    await machine.stop()
    custody = await machine.boot()
    asking = asyncio.create_task(custody.unlock(made.state_key, None))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(10):
        while custody.state != "open":  # noqa: ASYNC110 - nobody tells who did not ask
            await asyncio.sleep(0.01)


async def test_another_key_opens_nothing_and_the_right_one_does_afterwards(machine: Machine) -> None:
    _, made = await born(machine)
    await machine.stop()
    custody = await machine.boot()
    assert await refused(custody.unlock(os.urandom(32), None)) == "STATE_KEY"
    assert custody.state == "locked"
    await custody.unlock(made.state_key, made.checkpoint)
    assert await refused(custody.unlock(os.urandom(32), None)) == "CUSTODY_SECRET"


async def test_state_that_was_set_back_is_refused_by_whoever_remembers_a_later_checkpoint(machine: Machine) -> None:
    custody, made = await born(machine)
    assert custody.tenancy is not None
    organization = custody.tenancy.organization
    await machine.stop()
    old = machine.path.with_suffix(".old")
    shutil.copy(machine.path, old)

    custody = await machine.boot()
    await custody.unlock(made.state_key, made.checkpoint)
    assert custody.tenancy is not None
    await custody.tenancy.organization.create_project(made.admin_key_id, "later")
    later = await custody.unlock(made.state_key, made.checkpoint)
    await machine.stop()
    shutil.copy(old, machine.path)

    custody = await machine.boot()
    assert await refused(custody.unlock(made.state_key, later)) == "STATE_ROLLBACK"
    assert custody.state == "locked" and custody.tenancy is None
    await custody.unlock(made.state_key, made.checkpoint)  # who remembers nothing later cannot tell: docs/operate.md
    assert custody.tenancy is not None and organization.projects == custody.tenancy.organization.projects


async def test_open_state_that_is_not_the_remembered_one_is_told(machine: Machine) -> None:
    custody, made = await born(machine)
    assert custody.tenancy is not None
    now = custody.tenancy.checkpoint
    ahead = Checkpoint(now.state_id, now.seq + 1, now.head)
    other = Checkpoint(bytes(16), 0, now.head)
    for wrong in (ahead, other):
        assert await refused(custody.unlock(made.state_key, wrong)) == "STATE_ROLLBACK"
    assert await custody.unlock(made.state_key, now) == now


async def test_deleted_state_is_new_and_its_key_and_checkpoint_say_so(machine: Machine) -> None:
    _, made = await born(machine)
    await machine.stop()
    for path in machine.path.parent.glob("state.db*"):
        path.unlink()
    custody = await machine.boot()
    assert custody.state == "new"
    assert await refused(custody.unlock(made.state_key, made.checkpoint)) == "STATE_ROLLBACK"
    assert await refused(custody.unlock(made.state_key, None)) == "STATE_MISSING"


async def test_changed_row_is_refused(machine: Machine) -> None:
    _, made = await born(machine)
    await machine.stop()
    with closing(sqlite3.connect(machine.path)) as database, database:
        (raw,) = database.execute("SELECT sealed FROM journal WHERE seq = 2").fetchone()
        changed = bytes([*raw[:40], raw[40] ^ 1, *raw[41:]])
        database.execute("UPDATE journal SET sealed = ? WHERE seq = 2", (changed,))
    custody = await machine.boot()
    assert await refused(custody.unlock(made.state_key, None)) == "STATE_RECORD"
    assert custody.state == "locked"


async def test_prices_that_jump_do_not_open_until_they_are_confirmed(machine: Machine) -> None:
    _, made = await born(machine)
    await machine.stop()
    custody = await machine.boot(cost=9_000_000)
    assert await refused(custody.unlock(made.state_key, None)) == "INPUT_PRICE_CHANGE"
    assert custody.state == "locked"
    await machine.stop()
    await (await machine.boot()).unlock(made.state_key, made.checkpoint)


async def test_storage_that_fails_while_serving_is_told_and_charges_nothing_unsaid(machine: Machine) -> None:
    custody, made = await born(machine)
    tenancy = custody.tenancy
    assert tenancy is not None
    failing = asyncio.create_task(custody.wait_failed())
    await tenancy._journal._backend.close()
    held = await tenancy.ledger.reserve(
        "rcpt-1", project="proj_x", key_id="key_x", model="parrot", operation="completions", amount=100,
        budgets=Budgets(),
    )  # fmt: skip
    held.finish("completed")
    with pytest.raises(VouchsafeError):
        await held.wait()
    async with asyncio.timeout(10):
        assert (await failing).startswith(("LEDGER_", "STATE_"))
    await machine.stop()
    again = await machine.boot()
    await again.unlock(made.state_key, made.checkpoint)
    assert again.tenancy is not None and again.tenancy.ledger.spend().spent == 0
