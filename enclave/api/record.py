"""What one exchange leaves behind: its entry in the ledger and its receipt, made together and once.

`settle` charges what the meter has counted and signs a receipt that says so, in one step of the event loop; the ledger
keeps the receipt's digest. The receipt is given out when the entry is durable. A request that was refused before it
reserved anything has a receipt and no entry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

from attestation import receipt
from enclave.access.entries import Entry, Outcome
from enclave.access.ledger import Reservation
from enclave.access.limits import Ticket
from enclave.access.organization import Caller
from enclave.api.errors import Refusal
from enclave.api.exchange import Exchange
from enclave.api.meter import Meter
from enclave.api.requests import Admitted
from enclave.receipts import Durable, ReceiptStore, issue
from enclave.stream import OutStream
from enclave.tenancy import Tenancy

__all__ = ["Execution", "Job", "Record"]

_CACHE: Final = "tenant-salted"


@dataclass(frozen=True, slots=True)
class Execution:
    """What answers: `sha256:…` of the model's weights, and of the release that the quote commits to."""

    weights: str
    release: str


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was let in: what it holds until it is settled."""

    caller: Caller
    admitted: Admitted = field(repr=False)
    execution: Execution
    reservation: Reservation
    ticket: Ticket
    meter: Meter


class Record:
    """The receipt of one exchange, filled as it goes. *caller* None: nobody we know."""

    def __init__(
        self, x: Exchange, store: ReceiptStore, tenancy: Tenancy, caller: Caller | None, received: bytes
    ) -> None:
        self._x, self._store, self._tenancy, self._caller = x, store, tenancy, caller
        self.received = received
        self._events: list[dict[str, Any]] = [receipt.request_received(received)]  # Any: JSON values
        self._job: Job | None = None

    def let_in(self, job: Job) -> None:
        """From here on there is something to settle."""
        self._job = job

    def forwarded(self, a: Admitted) -> None:
        """The request goes to the engine as it was rewritten."""
        rewritten = {"type": "x.request.rewritten", "set": list(a.set), "removed": list(a.removed)}
        self._events += [rewritten, receipt.request_forwarded(hashlib.sha256(a.body).digest())]

    async def refuse(self, refusal: Refusal, outcome: Outcome = "refused") -> None:
        """Refusals have receipts too: stored first, so that whoever reads the answer can fetch it."""
        self.settle(outcome, hashlib.sha256(self._x.error_body(refusal)).digest(), chat_id=None)
        await self._x.refuse(refusal)

    def settle(
        self, outcome: Outcome, returned: bytes, *, chat_id: str | None, stream: OutStream | None = None
    ) -> bytes:
        """Charge, sign, keep. *returned* is the SHA-256 of what was emitted. Returns the receipt; see `durable`."""
        events = [*self._events, receipt.response_returned(returned)]
        if stream is not None:
            events += [receipt.stream_chain_event(stream.chain), receipt.outcome_event(outcome)]
        if self._job is None:
            return self._keep(self._sign(events, chat_id), chat_id, None)
        job, made = self._job, list[bytes]()

        def sign(entry: Entry) -> bytes:
            made.append(self._sign([*events, *self._told(job, entry)], chat_id))
            return hashlib.sha256(made[0]).digest()

        entry = job.reservation.finish(outcome, job.meter.usage(), sign)
        job.ticket.settle(entry.usage.input_tokens + entry.usage.output_tokens)
        self._x.usage = entry.usage
        return self._keep(made[0], chat_id, job.reservation.wait)

    async def durable(self) -> None:
        """Until the entry cannot be lost any more. Raises `LedgerError`."""
        if self._job is not None:
            await self._job.reservation.wait()

    def _told(self, job: Job, entry: Entry) -> list[dict[str, Any]]:  # Any: JSON values
        """`x.usage.metered` and `x.execution`: what was used and charged, and what answered."""
        usage = entry.usage
        metered = {
            "type": "x.usage.metered",
            "input_tokens": usage.input_tokens,
            "cached_input_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "source": job.meter.source,
            "outcome": entry.outcome,
            "price_table": f"sha256:{entry.price_table.hex()}",
            "cost_nanousd": entry.cost,
            "key_ref": self._tenancy.key_ref(entry.key_id),
            "ledger_seq": entry.seq,
            "ledger_prev": f"sha256:{entry.previous.hex()}",
        }
        execution = {
            "type": "x.execution",
            "model_weights": job.execution.weights,
            "release": job.execution.release,
            "prefix_cache": _CACHE,
            "params_digest": f"sha256:{job.admitted.params_digest.hex()}",
            "boot_epoch": self._tenancy.epoch,
            "receipt_seq": self._tenancy.next_receipt(entry.project),
        }
        return [metered, execution]

    def _sign(self, events: list[dict[str, Any]], chat_id: str | None) -> bytes:  # Any: JSON values
        if self._x.receipt_id is None:
            raise RuntimeError("an exchange without receipt id has no receipt")
        return issue(
            self._x.identity,
            receipt_id=self._x.receipt_id,
            chat_id=chat_id,
            model=self._x.model,
            endpoint=self._x.scope["path"],
            method=self._x.scope["method"],
            served_at=self._x.served_at,
            event_log=events,
        )

    def _keep(self, raw: bytes, chat_id: str | None, durable: Durable | None) -> bytes:
        owner = None if self._caller is None else self._caller.key.id
        self._store.add(self._x.receipt_id or "", raw, owner=owner, chat_id=chat_id, durable=durable)
        return raw
