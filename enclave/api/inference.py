"""One request to a model, from key to settlement: the one road to every engine.

(1) the key is found, the body is read within bounds and hashed
(2) the request is translated where its route has another form, admitted and rewritten (`requests`); the engine is
    chosen by the model id alone
(3) what it may use at most is worked out (`estimate`), counted against the project's limits and reserved in the
    ledger; a request that does not fit is refused before an engine has seen it
(4) the engine answers (`call`); entry and receipt say what was used (`record`)
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final

from attestation.errors import VouchsafeError
from enclave.access.budgets import BudgetExceeded
from enclave.access.entries import LedgerError
from enclave.access.limits import LimitExceeded, Ticket
from enclave.access.organization import Caller
from enclave.access.prices import PriceError
from enclave.access.records import ModelLimit
from enclave.api import errors, estimate
from enclave.api.call import Call
from enclave.api.dialect import Dialect
from enclave.api.errors import NO_RETRY, Refusal, Refused
from enclave.api.exchange import Exchange, Gone, header
from enclave.api.meter import Meter
from enclave.api.record import Execution, Job, Record
from enclave.api.requests import Admitted, admit, parse
from enclave.api.state import STATE_LOCKED
from enclave.api.surfaces import Surface
from enclave.engine.base import Engine
from enclave.receipts import ReceiptStore, new_receipt_id
from enclave.tenancy import Tenancy, limit_of

__all__ = ["Inference"]

MAX_BODY: Final = 4 << 20
MAX_RUNNING: Final = 1024
READ_SECONDS: Final = 60.0
_NO_LIMIT: Final = ModelLimit()


class Inference:
    """Serves the inference routes; see `Gateway` for the arguments."""

    def __init__(
        self,
        *,
        engines: Mapping[str, Engine],
        executions: Mapping[str, Execution],
        tenancy: Callable[[], Tenancy | None],
        receipts: ReceiptStore,
        ready: Callable[[], bool],
        limited: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._engines, self._executions, self._tenancy = engines, executions, tenancy
        self._receipts, self._ready, self._limited = receipts, ready, limited
        self._salt_key = secrets.token_bytes(32)
        self._running = 0
        self._failing: dict[str, asyncio.Future[str]] = {}

    async def serve(self, x: Exchange, surface: Surface) -> None:
        x.error_body = surface.error_body
        tenancy = self._tenancy()
        if tenancy is None:
            raise Refused(STATE_LOCKED)
        token = surface.token(x.scope["headers"])  # (1)
        caller = None if token is None else tenancy.organization.caller(token)
        try:
            body = await x.read(MAX_BODY, READ_SECONDS)
        except Gone:
            x.outcome = "client_disconnected"
            return
        x.receipt_id = new_receipt_id()
        record = Record(x, self._receipts, tenancy, caller, hashlib.sha256(body).digest())
        answer_id = surface.prefix + x.receipt_id.removeprefix("rcpt-")
        try:
            if caller is None:
                raise Refused(errors.INVALID_KEY)
            admitted, dialect = self._admit(x, surface, body, caller, answer_id)
            engine = self._engine(admitted.model, surface)
            job = await self._let_in(tenancy, caller, admitted, engine, surface, x.receipt_id)
        except Refused as refused:
            await record.refuse(refused.refusal)
            return
        record.let_in(job)
        self._running += 1
        try:
            with job.ticket:
                await Call(x, record, job, tenancy, engine, self._dead(engine), dialect, answer_id).run(
                    surface.route.path, tenancy.queues[admitted.model]
                )
        finally:
            self._running -= 1
            if job.reservation.entry is None:  # a fault of ours: whoever was not answered pays nothing
                with contextlib.suppress(LedgerError):  # a ledger that has failed settles at its next opening
                    job.reservation.finish("upstream_error")
                job.ticket.settle(0)

    def _admit(
        self, x: Exchange, surface: Surface, body: bytes, caller: Caller, answer_id: str
    ) -> tuple[Admitted, Dialect | None]:
        """(2)"""
        if not caller.may("inference"):
            raise Refused(errors.NO_SCOPE)
        kind = (header(x.scope, b"content-type") or b"").split(b";")[0].strip().lower()
        if kind != b"application/json" or header(x.scope, b"content-encoding") not in (None, b"identity"):
            raise Refused(errors.MEDIA_TYPE)
        document, dialect = parse(body), None
        named = document.get("model")
        x.model = named if isinstance(named, str) and named in self._engines else None
        if surface.translate is not None:
            document, dialect = surface.translate(document, id=answer_id, created=int(time.time()))
        admitted = admit(
            surface.route, document, known=self._engines.__contains__, allowed=caller.may_use,
            salt_key=self._salt_key, key_id=caller.key.id,
        )  # fmt: skip
        x.stream = admitted.stream
        return admitted, dialect

    def _dead(self, engine: Engine) -> asyncio.Future[str]:
        """Done when *engine* has failed for good: one wait for all its requests."""
        found = self._failing.get(engine.model_id)
        if found is None:
            found = self._failing[engine.model_id] = asyncio.ensure_future(engine.wait_failed())
        return found

    def _engine(self, model: str, surface: Surface) -> Engine:
        """The model's own engine, and no other, whatever state it is in."""
        engine = self._engines[model]
        if engine.task != surface.route.task:
            serving = [id for id, other in self._engines.items() if other.task == surface.route.task]
            raise Refused(errors.other_task(surface.path, serving))
        if not engine.healthy:
            raise Refused(errors.unavailable(engine.retry_after))
        if not self._ready():
            raise Refused(errors.UNAVAILABLE)
        if self._running >= MAX_RUNNING:
            raise Refused(errors.BUSY)
        return engine

    async def _let_in(
        self, tenancy: Tenancy, caller: Caller, admitted: Admitted, engine: Engine, surface: Surface, id: str
    ) -> Job:
        """(3)"""
        model, document = admitted.model, admitted.document
        context = tenancy.models[model].context
        most = estimate.bound(document, context)
        limit = caller.project.limits.get(model)
        try:
            amount = tenancy.ledger.prices.ceiling(model, most.prompt, most.output, most.answers)
            counted = limit is not None and (
                limit.max_tokens_per_1_minute is not None or limit.max_tokens_per_1_day is not None
            )
            if counted or not tenancy.roomy(caller, amount):
                # Counting a prompt is work: not for a request that has no chance.
                tenancy.limiter.check(caller.project.id, caller.key.id, model, limit_of(limit or _NO_LIMIT))
                if amount:
                    tenancy.check_spend(caller)
                most = await estimate.exact(engine, document, context)
                amount = tenancy.ledger.prices.ceiling(model, most.prompt, most.output, most.answers)
            ticket = self._ticket(tenancy, caller, model, most.total)
            try:
                reservation = await tenancy.ledger.reserve(
                    id, project=caller.project.id, key_id=caller.key.id, model=model, operation=surface.operation,
                    amount=amount, budgets=tenancy.budgets(caller),
                )  # fmt: skip
            except BaseException:
                ticket.settle(0)
                ticket.release()
                raise
        except (LimitExceeded, BudgetExceeded, PriceError, LedgerError) as err:
            self._limited(err.kind if isinstance(err, LimitExceeded) else err.code)
            raise Refused(_refusal(err, self._headers(tenancy, caller, model))) from None
        meter = Meter(document.get("n") or 1, len(estimate.prompts_of(document)) if "prompt" in document else 1)
        reservation.progress(meter.usage)
        return Job(caller, admitted, self._executions[model], reservation, ticket, meter)

    def _ticket(self, tenancy: Tenancy, caller: Caller, model: str, tokens: int) -> Ticket:
        limit = limit_of(caller.project.limits.get(model, _NO_LIMIT))
        return tenancy.limiter.admit(caller.project.id, caller.key.id, model, tokens, limit)

    def _headers(self, tenancy: Tenancy, caller: Caller, model: str) -> list[tuple[bytes, bytes]]:
        limit = limit_of(caller.project.limits.get(model, _NO_LIMIT))
        return tenancy.limiter.headers(caller.project.id, model, limit)


def _refusal(err: VouchsafeError, headers: list[tuple[bytes, bytes]]) -> Refusal:
    """Why a request was not let in. None of it names an amount of money."""
    if isinstance(err, LimitExceeded):
        return errors.over_limit(err.kind, err.limit, err.retry_after_ms, headers)
    if isinstance(err, BudgetExceeded):
        message = f"The spend limit of the {err.scope} is reached for this month."
        return Refusal(429, message, "insufficient_quota", "insufficient_quota", headers=(NO_RETRY, *headers))
    if err.code == "PRICE_TOKENS":
        return Refusal(400, "The request may use too many tokens.", code="invalid_value", param="max_tokens")
    if err.code == "LEDGER_FULL":
        return errors.BUSY
    return Refusal(503, "The service cannot account for this request.", "server_error", err.code.lower(),
                   headers=(NO_RETRY,))  # fmt: skip
