"""The gateway: everything that arrives in the attested channel enters here, and what is not in its table is a 404.

One table, `(method, exact path) → handler`. Attestation and health routes are given to it ready-made and need no key;
models, inference and receipts are its own and do. What stands under `/v1/organization/` has a table of its own and a
kind of key of its own (`enclave.api.admin`). No other pattern matching, no sub-application, no websocket. Runs in the
enclave behind the TLS server, which puts the connection into `scope["vouchsafe"]`; it trusts nothing that a client
sends and tells the log only what `Exchange.log` names.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from enclave.access import KeyCheck
from enclave.access.keys import bearer
from enclave.api.admin import Admin
from enclave.api.admin.routes import PREFIX
from enclave.api.embeddings import EMBEDDINGS
from enclave.api.errors import INTERNAL, INVALID_KEY, UNKNOWN_URL, Refused
from enclave.api.exchange import Exchange
from enclave.api.inference import Inference
from enclave.api.openai import model_list, model_object, receipt_answer
from enclave.api.requests import CHAT, COMPLETIONS
from enclave.engine.base import ASGIApp, Engine, Receive, Scope, Send
from enclave.receipts import ReceiptStore

__all__ = ["Gateway"]

Handler = Callable[[Exchange], Awaitable[None]]
_MODELS: Final = "/v1/models/"
_RECEIPTS: Final = "/v1/aci/receipts/"


class Gateway:
    """ASGI app for all traffic.

    engines   model id → engine, as configured
    access    who may ask
    receipts  where receipts are kept
    public    routes that need no key: attestation and health
    ready     false until the boot has passed every stage, and again when the enclave stops
    admin     what answers under `/v1/organization/`; without it nothing is there
    """

    def __init__(
        self,
        *,
        engines: Mapping[str, Engine],
        access: KeyCheck,
        receipts: ReceiptStore,
        public: Mapping[tuple[str, str], ASGIApp],
        ready: Callable[[], bool],
        admin: Admin | None = None,
    ) -> None:
        self._engines = dict(engines)
        self._access = access
        self._receipts = receipts
        self._admin = admin
        self._created = int(time.time())
        inference = Inference(engines=self._engines, access=access, receipts=receipts, ready=ready)
        self._table: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._list_models,
            ("POST", CHAT.path): lambda x: inference.serve(x, CHAT),
            ("POST", COMPLETIONS.path): lambda x: inference.serve(x, COMPLETIONS),
            ("POST", EMBEDDINGS.path): lambda x: inference.serve(x, EMBEDDINGS),
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
        return own if self._admin is None else own | self._admin.routes

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

    def _find(self, x: Exchange) -> Handler:
        method, path = x.scope["method"], x.scope["path"]
        handler = self._table.get((method, path))
        if handler is not None and x.scope.get("raw_path") in (None, path.encode("utf-8")):
            x.route = path
            return handler
        if self._admin is not None and path.startswith(PREFIX):
            return self._admin.serve
        for (verb, prefix), named in self._named.items():
            if method == verb and path.startswith(prefix) and len(path) > len(prefix):
                x.route = prefix + "id"
                return lambda x: named(x, path[len(prefix) :])
        return _unknown

    async def _list_models(self, x: Exchange) -> None:
        self._require_key(x)
        await x.answer(200, model_list(self._engines, self._created))

    async def _get_model(self, x: Exchange, id: str) -> None:
        self._require_key(x)
        await x.answer(200, model_object(self._engines, id, self._created))

    async def _get_receipt(self, x: Exchange, id: str) -> None:
        token = bearer(x.scope["headers"])
        await x.answer(200, receipt_answer(self._receipts, id, token=token, key_digest=self._access.allowed(token)))

    def _require_key(self, x: Exchange) -> None:
        if self._access.allowed(bearer(x.scope["headers"])) is None:
            raise Refused(INVALID_KEY)


def _public(app: ASGIApp) -> Handler:
    async def handle(x: Exchange) -> None:
        await app(x.scope, x.receive, x.pass_on)

    return handle


async def _unknown(x: Exchange) -> None:
    raise Refused(UNKNOWN_URL)


async def _lifespan(receive: Receive, send: Send) -> None:
    """Nothing starts or stops with the server: boot owns the engines."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
