"""`/v1/state`: where the operator's client brings the bootstrap secret, or the state key after a boot.

    GET  /v1/state             new, locked or open; for anybody
    POST /v1/state/bootstrap   {"secret"}: the first admin key and the state key, once
    POST /v1/state/unlock      {"state_key", "checkpoint"}: opens the state if it extends that checkpoint

No API key stands before these: in `new` and `locked` there is none. What they ask for is 128 bits and more of secret.
`vouchsafe bootstrap` and `vouchsafe unlock` send them, after they have verified who will read them. Nothing that was
sent is ever repeated; what is wrong with the stored state is said by its code alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from attestation.errors import InputError, VouchsafeError
from enclave import telemetry
from enclave.api.errors import MEDIA_TYPE, NO_RETRY, Refusal, Refused
from enclave.api.exchange import Exchange, Gone, header
from enclave.api.requests import parse
from enclave.custody import Custody
from enclave.state import Checkpoint

__all__ = ["STATE_LOCKED", "StateRoutes"]

PREFIX: Final = "/v1/state"
MAX_BODY: Final = 4096
READ_SECONDS: Final = 10.0
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{22,256}")
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_CHECKPOINT: Final = re.compile(r"[0-9a-f]{112}")

STATE_LOCKED: Final = Refusal(
    503, "The service waits for its operator to open its state.", "server_error", "state_locked", headers=(NO_RETRY,)
)
_BUSY: Final = Refusal(
    503, "Too many attempts at once.", "server_error", "state_busy", headers=((b"retry-after", b"1"),)
)
_DAMAGED: Final = 'The stored state cannot be used as it is; see docs/operate.md, "rollback suspected".'
_STORAGE: Final = frozenset({"STATE_UNAVAILABLE", "STATE_STORAGE", "STATE_LOCKED", "STATE_BUSY", "LEDGER_FAILED"})


class StateRoutes:
    """The three routes, over *custody*."""

    def __init__(self, custody: Custody) -> None:
        self._custody = custody

    @property
    def routes(self) -> dict[tuple[str, str], Callable[[Exchange], Awaitable[None]]]:
        return {
            ("GET", PREFIX): self.show,
            ("POST", PREFIX + "/bootstrap"): self.bootstrap,
            ("POST", PREFIX + "/unlock"): self.unlock,
        }

    async def show(self, x: Exchange) -> None:
        await _say(x, {"object": "state", "state": self._custody.state})

    async def bootstrap(self, x: Exchange) -> None:
        body = await _body(x, {"secret"})
        if body is None:
            return
        secret = _text(body, "secret", _SECRET, "the bootstrap secret: 22 to 256 characters of base64url")
        try:
            born = await self._custody.bootstrap(secret.encode("ascii"))
        except VouchsafeError as err:
            raise Refused(_refusal(err, self._custody.state, "invalid_secret")) from None
        telemetry.event("state", state="open", how="bootstrap")
        await _say(
            x,
            {
                "object": "state.bootstrap",
                "admin_key": {"id": born.admin_key_id, "value": born.admin_key},
                "state_key": born.state_key.hex(),
                "checkpoint": born.checkpoint.encode().hex(),
            },
        )

    async def unlock(self, x: Exchange) -> None:
        body = await _body(x, {"state_key", "checkpoint"})
        if body is None:
            return
        key = bytes.fromhex(_text(body, "state_key", _KEY, "64 lower-case hex digits"))
        at_least = None
        if body.get("checkpoint") is not None:
            raw = bytes.fromhex(_text(body, "checkpoint", _CHECKPOINT, "112 lower-case hex digits, or null"))
            try:
                at_least = Checkpoint.decode(raw)
            except ValueError:
                raise Refused(_invalid("checkpoint", "a checkpoint")) from None
        before = self._custody.state
        try:
            checkpoint = await self._custody.unlock(key, at_least)
        except VouchsafeError as err:
            telemetry.event("state", state=self._custody.state, how="unlock", code=err.code)
            raise Refused(_refusal(err, self._custody.state, "invalid_state_key")) from None
        if before != "open":
            telemetry.event("state", state="open", how="unlock")
        await _say(x, {"object": "state.unlock", "state": "open", "checkpoint": checkpoint.encode().hex()})


def _refusal(err: VouchsafeError, state: str, wrong: str) -> Refusal:
    """The codes that the operator's client knows. `actual` may hold what was sent or stored: it stays here."""
    if err.code in ("CUSTODY_SECRET", "STATE_KEY"):
        return Refusal(401, "This secret does not open this state.", code=wrong, headers=(NO_RETRY,))
    if err.code in ("CUSTODY_STATE", "STATE_EXISTS", "STATE_MISSING"):
        return Refusal(409, f"The state is {state}.", code=f"state_{state}", headers=(NO_RETRY,))
    if err.code == "CUSTODY_BUSY":
        return _BUSY
    if err.code in ("STATE_ROLLBACK", "STATE_TRUNCATED", "STATE_GAP"):
        return Refusal(409, f"{err.code}: {_DAMAGED}", code="state_rollback", headers=(NO_RETRY,))
    if isinstance(err, InputError):  # the measured configuration's, which is public
        return Refusal(409, f"{err.code}: {err.reason}; {err.hint}.", code="state_configuration", headers=(NO_RETRY,))
    if err.code in _STORAGE:
        return Refusal(503, f"{err.code}: the storage does not take or give its records.", "server_error",
                       "state_unavailable", headers=(NO_RETRY,))  # fmt: skip
    return Refusal(409, f"{err.code}: {_DAMAGED}", code="state_damaged", headers=(NO_RETRY,))


async def _body(x: Exchange, fields: set[str]) -> Mapping[str, Any] | None:  # Any: JSON values
    """None when the caller has gone."""
    try:
        raw = await x.read(MAX_BODY, READ_SECONDS)
    except Gone:
        x.outcome = "client_disconnected"
        return None
    kind = (header(x.scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if kind != b"application/json" or header(x.scope, b"content-encoding") not in (None, b"identity"):
        raise Refused(MEDIA_TYPE)
    body = parse(raw)
    for name in body.keys() - fields:
        raise Refused(Refusal(400, "Unrecognized request argument supplied.", code="unknown_parameter", param=name))
    return body


def _text(body: Mapping[str, Any], name: str, pattern: re.Pattern[str], what: str) -> str:  # Any: JSON values
    value = body.get(name)
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise Refused(_invalid(name, what))
    return value


def _invalid(name: str, what: str) -> Refusal:
    return Refusal(400, f"Invalid value: expected {what}.", code="invalid_value", param=name)


async def _say(x: Exchange, document: dict[str, Any]) -> None:  # Any: JSON values
    await x.answer(200, json.dumps(document).encode("ascii"))
