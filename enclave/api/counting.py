"""How many tokens something is, by the engine's own tokenizer: `/tokenize` and what two other APIs call counting.

Nothing is made and nothing charged, so there is no entry and no receipt; a count is one request to the project's
limits. The model is as explicit, and as much a matter of permission, as everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from enclave.access.keys import bearer
from enclave.access.limits import LimitExceeded
from enclave.access.organization import Caller
from enclave.api import errors, estimate, messages, responses, tokenize
from enclave.api.errors import Refused, engine_refusal
from enclave.api.exchange import Exchange, Gone, header
from enclave.api.requests import parse
from enclave.api.state import STATE_LOCKED
from enclave.engine.base import Engine
from enclave.engine.call import post
from enclave.tenancy import Tenancy, limit_of

__all__ = ["Counting"]

MAX_BODY: Final = 4 << 20
READ_SECONDS: Final = 60.0
INPUT_TOKENS: Final = responses.RESPONSES_PATH + "/input_tokens"

Json = dict[str, Any]  # Any: JSON values
Handler = Callable[[Exchange], Awaitable[None]]
Credential = Callable[[Iterable[tuple[bytes, bytes]]], bytes | None]


class Counting:
    """Three routes; see `enclave.api.inference.Inference` for the arguments."""

    def __init__(self, *, engines: Mapping[str, Engine], tenancy: Callable[[], Tenancy | None]) -> None:
        self._engines, self._tenancy = engines, tenancy

    @property
    def routes(self) -> dict[tuple[str, str], Handler]:
        return {
            ("POST", tokenize.TOKENIZE_PATH): self._tokenize,
            ("POST", INPUT_TOKENS): self._responses,
            ("POST", messages.COUNT_PATH): self._messages,
        }

    async def _tokenize(self, x: Exchange) -> None:
        if (asked := await self._asked(x, bearer)) is None:
            return
        caller, document = asked
        model, request = tokenize.tokenize_request(document)
        engine = self._engine(x, caller, model)
        status, body = await post(engine.app, tokenize.TOKENIZE_PATH, request)
        if status != 200:
            raise Refused(engine_refusal(status, body))
        await x.answer(200, json.dumps(tokenize.tokenized(json.loads(body))).encode("ascii"))

    async def _responses(self, x: Exchange) -> None:
        await self._count(x, responses.input_tokens, responses.counted, bearer)

    async def _messages(self, x: Exchange) -> None:
        x.error_body = messages.error_body
        await self._count(x, messages.count, messages.counted, messages.token)

    async def _count(
        self, x: Exchange, read: Callable[[Json], Json], told: Callable[[int], Json], credential: Credential
    ) -> None:
        if (asked := await self._asked(x, credential)) is None:
            return
        caller, document = asked
        chat = read(document)
        count = await estimate.prompt_tokens(self._engine(x, caller, chat["model"]), chat)
        await x.answer(200, json.dumps(told(count)).encode("ascii"))

    async def _asked(self, x: Exchange, credential: Credential) -> tuple[Caller, Json] | None:
        """Who asks, and the request's JSON; None when the caller has gone."""
        tenancy = self._tenancy()
        if tenancy is None:
            raise Refused(STATE_LOCKED)
        token = credential(x.scope["headers"])
        caller = None if token is None else tenancy.organization.caller(token)
        if caller is None:
            raise Refused(errors.INVALID_KEY)
        if not caller.may("inference"):
            raise Refused(errors.NO_SCOPE)
        try:
            body = await x.read(MAX_BODY, READ_SECONDS)
        except Gone:
            x.outcome = "client_disconnected"
            return None
        kind = (header(x.scope, b"content-type") or b"").split(b";")[0].strip().lower()
        if kind != b"application/json" or header(x.scope, b"content-encoding") not in (None, b"identity"):
            raise Refused(errors.MEDIA_TYPE)
        return caller, parse(body)

    def _engine(self, x: Exchange, caller: Caller, model: str) -> Engine:
        """The model's engine, when the caller may ask it now: one request is counted. Raises Refused."""
        tenancy, engine = self._tenancy(), self._engines.get(model)
        assert tenancy is not None  # it was there before the body came, and does not close while it serves
        if engine is None:
            raise Refused(errors.NO_MODEL)
        if not caller.may_use(model):
            raise Refused(errors.NOT_ALLOWED)
        x.model = model
        if not engine.healthy:
            raise Refused(errors.unavailable(engine.retry_after))
        limit = caller.project.limits.get(model)
        if limit is not None:
            try:
                with tenancy.limiter.admit(caller.project.id, caller.key.id, model, 0, limit_of(limit)):
                    pass
            except LimitExceeded as err:
                raise Refused(errors.over_limit(err.kind, err.limit, err.retry_after_ms)) from None
        return engine
