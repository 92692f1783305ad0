"""The gateway in front of one echo engine or several, with its state open and one key, as its tests use it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from enclave.access.prices import UNIT, PriceTable
from enclave.access.secrets import Made, Pepper
from enclave.api.app import Gateway
from enclave.api.record import Execution
from enclave.custody import Custody
from enclave.engine.base import ASGIApp, Engine
from enclave.metrics import Metrics
from enclave.receipts import ReceiptStore
from enclave.state import StateConflict
from enclave.tenancy import Slots, Tenancy
from tests.enclave.api.client import API_KEY, Reply

NOW = 1_800_000_000
CONTEXT = 4096
OPENED: list[Tenancy] = []
"""What a test has opened: its conftest closes it."""


class Memory:
    """A backend that forgets with its process. See `enclave.state.base.Backend`."""

    def __init__(self) -> None:
        self.rows: list[bytes] = []
        self.broken = False

    async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
        if self.broken:
            raise OSError("the disk is full")
        if first_seq != len(self.rows):
            raise StateConflict(first_seq - 1, len(self.rows) - 1)
        self.rows += blobs

    async def read(self, from_seq: int, limit: int) -> list[tuple[int, bytes]]:
        return list(enumerate(self.rows))[from_seq : from_seq + limit]

    async def last_seq(self) -> int:
        return len(self.rows) - 1

    async def close(self) -> None:
        return None


def prices(*models: str, input: int = 150_000_000, cached: int = 75_000_000, output: int = 600_000_000) -> PriceTable:
    row = {"input": input, "cached-input": cached, "output": output}
    return PriceTable.parse({"currency": "USD", "unit": UNIT, "models": {id: dict(row) for id in models}})


def known(pepper: Pepper, value: str) -> Made:
    """A key whose value the test chose."""
    return Made(value, pepper.digest(value.encode()), "sk-…test")


async def tenancy_of(
    models: Sequence[str], *, table: PriceTable | None = None, slots: int = 256, backend: Memory | None = None,
    context: int = CONTEXT,
) -> Tenancy:  # fmt: skip
    """An open state with one project, and `API_KEY` in it."""
    made = await Tenancy.create(
        backend or Memory(), os.urandom(32), table or prices(*models), {id: Slots(slots, context) for id in models},
        lambda: NOW,
    )  # fmt: skip
    OPENED.append(made)
    organization = made.organization
    project = await organization.create_project("test", "project")
    account = await organization.create_account("test", project.id, "account")
    pepper = organization._pepper
    pepper.make = lambda kind: known(pepper, API_KEY)  # type: ignore[method-assign]
    await organization.create_key("test", account.id, "key")
    del pepper.make  # type: ignore[method-assign]
    return made


def custody_of(tenancy: Tenancy) -> Custody:
    """As `Custody` is once *tenancy* is open."""
    made = locked_custody()
    made.tenancy = tenancy
    return made


def locked_custody() -> Custody:
    """As it is before anybody has opened the state."""
    return Custody("sqlite:/nowhere", bytes(32), prices("parrot"), {}, lambda: NOW)


def gateway_of(
    custody: Custody, engines: Sequence[Engine] = (), *, ready: bool = True, receipts: ReceiptStore | None = None,
    public: Mapping[tuple[str, str], ASGIApp] | None = None,
) -> Gateway:  # fmt: skip
    served = {engine.model_id: engine for engine in engines}
    return Gateway(
        engines=served,
        executions={id: Execution("sha256:" + "0" * 64, "sha256:" + "1" * 64) for id in served},
        custody=custody,
        receipts=ReceiptStore() if receipts is None else receipts,
        public=public or {},
        ready=lambda: ready,
        metrics=Metrics({id: engine.task for id, engine in served.items()}),
    )


async def gateway(
    *engines: Engine, ready: bool = True, public: Mapping[tuple[str, str], ASGIApp] | None = None,
    tenancy: Tenancy | None = None, receipts: ReceiptStore | None = None, **how: Any,
) -> Gateway:  # fmt: skip
    """In front of *engines*, its state open; *how* as `tenancy_of` takes it."""
    opened = tenancy or await tenancy_of([engine.model_id for engine in engines] or ["parrot"], **how)
    return gateway_of(custody_of(opened), engines, ready=ready, public=public, receipts=receipts)


def events(reply: Reply) -> list[bytes]:
    return [e + b"\n\n" for e in reply.body.split(b"\n\n")[:-1]]
