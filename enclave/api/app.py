"""The gateway: everything that arrives in the attested channel enters here, and what is not in its table is a 404.

One table, `(method, exact path) → handler`. Attestation and health routes are given to it ready-made and need no key;
models, inference and receipts are its own and do. What stands under `/v1/organization/` has a table of its own and a
kind of key of its own (`enclave.api.admin`), `/v1/state` what comes before any key (`enclave.api.state`). No other
pattern matching, no sub-application, no websocket. Runs in the enclave behind the TLS server, which puts the connection
into `scope["vouchsafe"]`; it trusts nothing that a client sends and tells the log only what `Exchange.log` names.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from enclave.access.keys import bearer
from enclave.access.organization import Caller
from enclave.api import elsewhere, messages
from enclave.api.admin import Admin
from enclave.api.admin.routes import PREFIX
from enclave.api.counting import Counting
from enclave.api.errors import INTERNAL, INVALID_KEY, NO_SCOPE, Refused
from enclave.api.exchange import Exchange
from enclave.api.inference import Inference
from enclave.api.openai import model_list, model_object, receipt_answer
from enclave.api.record import Execution
from enclave.api.state import STATE_LOCKED, StateRoutes
from enclave.api.surfaces import SURFACES
from enclave.custody import Custody
from enclave.engine.base import ASGIApp, Engine, Receive, Scope, Send
from enclave.metrics import Metrics
from enclave.receipts import ReceiptStore
from enclave.tenancy import Tenancy

__all__ = ["Gateway"]

Handler = Callable[[Exchange], Awaitable[None]]
_MODELS: Final = "/v1/models/"
_RECEIPTS: Final = "/v1/aci/receipts/"


class Gateway:
    """ASGI app for all traffic.

    engines   model id → engine, as configured;  executions   model id → what receipts say of it
    custody   the state: until it is open, what needs it answers 503
    receipts  where receipts are kept
    public    routes that need no key: attestation, health, metrics
    ready     false until the boot has passed every stage, and again when the enclave stops
    metrics   is told of every request
    """

    def __init__(
        self,
        *,
        engines: Mapping[str, Engine],
        executions: Mapping[str, Execution],
        custody: Custody,
        receipts: ReceiptStore,
        public: Mapping[tuple[str, str], ASGIApp],
        ready: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self._engines = dict(engines)
        self._custody = custody
        self._receipts = receipts
        self._metrics = metrics
        self._created = int(time.time())
        self._admin: tuple[Tenancy, Admin] | None = None
        inference = Inference(
            engines=self._engines, executions=executions, tenancy=lambda: custody.tenancy, receipts=receipts,
            ready=ready, limited=metrics.limited,
        )  # fmt: skip
        counting = Counting(engines=self._engines, tenancy=lambda: custody.tenancy)
        state = StateRoutes(custody)
        self._table: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._list_models,
            **{("POST", s.path): partial(inference.serve, surface=s) for s in SURFACES},
            **counting.routes,
            **state.routes,
        }
        self._named: dict[tuple[str, str], Callable[[Exchange, str], Awaitable[None]]] = {
            ("GET", _MODELS): self._get_model,
            ("GET", _RECEIPTS): self._get_receipt,
        }
        for key, app in public.items():
            if key in self._table or key[1].startswith((PREFIX, *(prefix for _, prefix in self._named))):
                raise ValueError(f"route {key} stands twice")
            self._table[key] = _public(app)

    @property
    def routes(self) -> frozenset[tuple[str, str]]:
        """Every route there is, as (method, path); ids are in braces."""
        own = frozenset(self._table) | {(method, prefix + "{id}") for method, prefix in self._named}
        return own | Admin.routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http":
            # Before the handshake is accepted this is an HTTP 403: there is no websocket here.
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(Exchange(scope, receive, send))

    async def _http(self, x: Exchange) -> None:
        try:
            await self._find(x)(x)
        except Refused as refused:
            await x.refuse(refused.refusal)
        except Exception:
            # A fault of ours. Its text may quote the request, so neither caller nor log gets it.
            x.code, x.outcome = INTERNAL.code, "fault"
            if x.status is None:
                await x.refuse(INTERNAL)
        finally:
            x.log()
            self._metrics.request(
                route=x.route, model=x.model, status=x.status or 0, code=x.code, outcome=x.outcome,
                stream=bool(x.stream), seconds=x.seconds, first_seconds=x.first_seconds,
                input_tokens=x.usage.input_tokens, output_tokens=x.usage.output_tokens,
            )  # fmt: skip

    def _find(self, x: Exchange) -> Handler:
        method, path = x.scope["method"], x.scope["path"]
        handler = self._table.get((method, path))
        if handler is not None and x.scope.get("raw_path") in (None, path.encode("utf-8")):
            x.route = path
            return handler
        if path.startswith(PREFIX):
            return self._administer
        for (verb, prefix), named in self._named.items():
            if method == verb and path.startswith(prefix) and len(path) > len(prefix):
                x.route = prefix + "id"
                return lambda x: named(x, path[len(prefix) :])
        return _unknown

    async def _administer(self, x: Exchange) -> None:
        tenancy = self._open()
        if self._admin is None or self._admin[0] is not tenancy:
            self._admin = (tenancy, Admin(tenancy.organization, list(self._engines), tenancy.ledger))
        await self._admin[1].serve(x)

    async def _list_models(self, x: Exchange) -> None:
        caller = self._caller(x, "models.read")
        await x.answer(200, model_list(filter(caller.may_use, self._engines), self._created))

    async def _get_model(self, x: Exchange, id: str) -> None:
        caller = self._caller(x, "models.read")
        await x.answer(200, model_object(filter(caller.may_use, self._engines), id, self._created))

    async def _get_receipt(self, x: Exchange, id: str) -> None:
        organization, token = self._open().organization, messages.token(x.scope["headers"])
        caller = None if token is None else organization.caller(token)
        owner = caller.key.id if caller is not None and caller.may("receipts.read") else None
        await x.answer(200, await receipt_answer(self._receipts, id, token=token, owner=owner))

    def _caller(self, x: Exchange, scope: str) -> Caller:
        organization, token = self._open().organization, bearer(x.scope["headers"])
        caller = None if token is None else organization.caller(token)
        if caller is None:
            raise Refused(INVALID_KEY)
        if not caller.may(scope):
            raise Refused(NO_SCOPE)
        return caller

    def _open(self) -> Tenancy:
        if self._custody.tenancy is None:
            raise Refused(STATE_LOCKED)
        return self._custody.tenancy


def _public(app: ASGIApp) -> Handler:
    async def handle(x: Exchange) -> None:
        await app(x.scope, x.receive, x.pass_on)

    return handle


async def _unknown(x: Exchange) -> None:
    raise Refused(elsewhere.refusal(x.scope["method"], x.scope["path"]))


async def _lifespan(receive: Receive, send: Send) -> None:
    """Nothing starts or stops with the server: boot owns the engines."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
