"""Who uses the service, within which limits, and what it has cost: all that exists once the state is open.

One journal (`enclave.state`) keeps three kinds of records, told apart by their first byte: what happened to the
organisation, the ledger's, and one for each time the journal was opened. Opening replays them; nothing is served
before that is done. Runs in the enclave, in its one event loop. A journal that fails ends the enclave: `failed` is
done then, and what was not durable has not been charged and has no receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from enclave.access.budgets import BudgetExceeded, Budgets
from enclave.access.fair import FairQueue
from enclave.access.ledger import Ledger
from enclave.access.limits import Limiter, RateLimit
from enclave.access.organization import Caller, Organization
from enclave.access.prices import PriceTable
from enclave.access.records import ModelLimit
from enclave.access.secrets import Pepper
from enclave.state import Backend, Checkpoint, Journal, StateError

__all__ = ["Tenancy", "limit_of"]

_ORGANIZATION: Final = b"o"
_LEDGER: Final = b"l"
_OPENED: Final = b"b"
_REF_TAG: Final = b"vouchsafe/key-ref/v1"


@dataclass(frozen=True, slots=True)
class Slots:
    """What a model's engine takes: requests at a time, tokens of a prompt and its answer together."""

    requests: int
    context: int


class Tenancy:
    """Made by `create` and `open`; `close` it.

    organization, limiter, ledger   see their modules;  queues   model id → who gets its engine's next slot
    epoch   how often the journal has been opened, this time included: grows by one with every boot
    failed  done, with a word that says why, when the journal has failed and nothing can be served any more
    """

    def __init__(
        self, state_key: bytes, prices: PriceTable, models: Mapping[str, Slots], clock: Callable[[], int]
    ) -> None:
        self.organization = Organization(Pepper(state_key), self._append_event, clock)
        self.limiter, self.ledger = Limiter(), Ledger(prices, clock)
        self.models = dict(models)
        self.queues = {id: FairQueue(slots.requests) for id, slots in models.items()}
        self.epoch = 0
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ref_key = HKDF(hashes.SHA256(), 32, salt=None, info=_REF_TAG).derive(state_key)
        self._receipts: Counter[str] = Counter()
        self._journal: Journal
        self._flusher: asyncio.Task[None] | None = None

    @classmethod
    async def create(
        cls, backend: Backend, state_key: bytes, prices: PriceTable, models: Mapping[str, Slots],
        clock: Callable[[], int],
    ) -> Tenancy:  # fmt: skip
        """With a new journal in empty storage. Raises `StateError`, `LedgerError`."""
        made = cls(state_key, prices, models, clock)
        journal = await Journal.create(backend, state_key, clock(), apply=made._replay)
        await made._begin(journal)
        return made

    @classmethod
    async def open(
        cls, backend: Backend, state_key: bytes, at_least: Checkpoint | None, prices: PriceTable,
        models: Mapping[str, Slots], clock: Callable[[], int],
    ) -> Tenancy:  # fmt: skip
        """From the journal that is there; it must extend *at_least*. Raises `StateError`, `EventError`, `LedgerError`
        for records that cannot be trusted, `InputError` when the prices jump unconfirmed."""
        made = cls(state_key, prices, models, clock)
        await made._begin(await Journal.open(backend, state_key, at_least=at_least, apply=made._replay))
        return made

    @property
    def checkpoint(self) -> Checkpoint:
        """The end of what is durable."""
        return self._journal.checkpoint

    def key_ref(self, key_id: str) -> str:
        """How receipts name a key: whoever has the key's receipts sees that they are of one key, and not which."""
        return hmac.new(self._ref_key, key_id.encode(), hashlib.sha256).hexdigest()[:32]

    def next_receipt(self, project: str) -> int:
        """The number of the project's next receipt in this epoch: 1, 2, 3, …"""
        self._receipts[project] += 1
        return self._receipts[project]

    def budgets(self, caller: Caller) -> Budgets:
        """The spend limits that hold for *caller* at this moment."""
        return Budgets(self.organization.spend_limit_cents, caller.project.spend_limit_cents)

    def roomy(self, caller: Caller, amount: int) -> bool:
        """Whether *amount* nano-USD are so little that a bound will do for the exact figure: as many requests as the
        ledger lets in, each reserving as much, would still fit every limit. Nobody is refused for a loose bound then.
        """
        limits = self.budgets(caller)
        pairs = ((None, limits.organization), (caller.project.id, limits.project))
        return all(cap is None or self.ledger.spend(scope).fits(amount * 1024, cap) for scope, cap in pairs)

    def check_spend(self, caller: Caller) -> None:
        """Raise `BudgetExceeded` when a limit stops everything that costs anything."""
        limits = self.budgets(caller)
        for scope, project, cap in (
            ("organization", None, limits.organization), ("project", caller.project.id, limits.project),
        ):  # fmt: skip
            if cap is not None and self.ledger.spend(project).enforcing(cap):
                raise BudgetExceeded(scope)

    async def close(self) -> None:
        """Settle what is open, write it, let go of the storage. Idempotent."""
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
        with contextlib.suppress(StateError, Exception):  # a journal that failed cannot be closed any better
            await self.ledger.close()
        await self._journal.close()

    async def _begin(self, journal: Journal) -> None:
        self._journal = journal
        try:
            self.epoch += 1
            await journal.append([_OPENED + str(self.epoch).encode("ascii")])
            await self.ledger.begin(self._append_records)
        except BaseException:
            await journal.close()
            raise
        self._flusher = asyncio.get_running_loop().create_task(self._run(), name="ledger")

    async def _run(self) -> None:
        try:
            await self.ledger.run()
        except Exception as err:
            if not self.failed.done():
                self.failed.set_result(getattr(err, "code", type(err).__name__))

    def _replay(self, number: int, record: bytes) -> None:
        kind, body = record[:1], record[1:]
        if kind == _ORGANIZATION:
            self.organization.replay(body)
        elif kind == _LEDGER:
            self.ledger.replay(body)
        elif kind == _OPENED and body == str(self.epoch + 1).encode("ascii"):
            self.epoch += 1
        else:
            raise StateError(
                "STATE_RECORD", f"record {number} is of no kind that this release knows",
                hint="was the state written by a later release?",
            )  # fmt: skip

    async def _append_event(self, event: bytes) -> None:
        await self._journal.append([_ORGANIZATION + event])

    def _append_records(self, records: Sequence[bytes]) -> Awaitable[object]:
        return self._journal.append([_LEDGER + record for record in records])


@lru_cache(4096)
def limit_of(limit: ModelLimit) -> RateLimit:
    """What the limiter is given for what the organisation keeps."""
    return RateLimit(*(getattr(limit, name) for name in ModelLimit.__slots__))
