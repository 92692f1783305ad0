"""The operator's side of an enclave's state, over a connection that has been verified.

Runs on the operator's machine. A secret leaves it only inside a connection whose other end the policy has accepted,
channel proof included, and only when that end is in the state in which it can use it. What comes back is checked before
it replaces anything: an enclave that is genuine can still be handed an old state by its host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

from attestation.client.openai import attested_client
from attestation.client.session import AttestedSession
from attestation.errors import FormatError, RefusedError, TransportError
from attestation.operator_state import Checkpoint, KeyFile

__all__ = ["Born", "OperatorState"]

MAX_ANSWER: Final = 16 * 1024
_ADMIN_KEY: Final = re.compile(r"sk-admin-[A-Za-z0-9_-]{43}")
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_HINTS: Final = {
    "state_open": "it has been set up: `vouchsafe unlock` remembers its present checkpoint",
    "state_locked": "there is a state already: `vouchsafe unlock` opens it with its key",
    "state_new": "nothing is stored there: a first boot, or the storage was deleted (docs/operate.md)",
    "invalid_secret": "is this the secret whose bootstrap-sha256 stands in the configuration?",
    "invalid_state_key": "this key belongs to another state; the file of the right one opens it",
    "state_rollback": 'do not go on: see "rollback suspected" in docs/operate.md',
    "state_damaged": 'see "rollback suspected" in docs/operate.md',
    "state_unavailable": "mend the storage on the host, then try again",
}


@dataclass(frozen=True, slots=True)
class Born:
    """What an enclave gives once, to whoever brought the secret."""

    admin_key_id: str
    admin_key: str = field(repr=False)
    key_file: KeyFile


class OperatorState:
    """One service. Every call verifies before it sends; `NotAttested` otherwise."""

    def __init__(self, session: AttestedSession) -> None:
        self._session = session
        self._origin = session.target.origin

    def state(self) -> str:
        """`new`, `locked` or `open`."""
        answer = self._ask("GET", "/v1/state", None)
        if answer.get("state") not in ("new", "locked", "open"):
            raise _malformed("state")
        return str(answer["state"])

    def bootstrap(self, secret: str) -> Born:
        """Make the state. Raises `RefusedError` for what the enclave refuses; `TransportError` `STATE_UNKNOWN` when the
        connection ends after the secret was sent, and nobody here knows whether the state was made."""
        answer = self._ask("POST", "/v1/state/bootstrap", {"secret": secret}, unknown=True)
        admin = answer.get("admin_key")
        if not isinstance(admin, dict):
            raise _malformed("admin_key")
        id, value = admin.get("id"), admin.get("value")
        if not isinstance(id, str) or not isinstance(value, str) or not _ID.fullmatch(id):
            raise _malformed("admin_key")
        if not _ADMIN_KEY.fullmatch(value):
            raise _malformed("admin_key.value")
        return Born(id, value, KeyFile(self._origin, _hex(answer, "state_key", 32), _checkpoint(answer)))

    def unlock(self, kept: KeyFile) -> KeyFile:
        """Open the state with *kept*, or ask an open one how far it has come; *kept* with the checkpoint that is
        current now. Raises `RefusedError` `STATE_ROLLBACK` when that one does not go on from the kept one."""
        body = {"state_key": kept.state_key.hex(), "checkpoint": kept.checkpoint.encode().hex()}
        now = _checkpoint(self._ask("POST", "/v1/state/unlock", body))
        before = kept.checkpoint
        same = now.seq == before.seq and now.head == before.head
        if now.state_id != before.state_id or now.seq < before.seq or (now.seq == before.seq and not same):
            raise RefusedError(
                "STATE_ROLLBACK", "the service tells an earlier or another state than the one remembered",
                expected=f"record {before.seq} or later", actual=f"record {now.seq}", hint=_HINTS["state_rollback"],
            )  # fmt: skip
        return KeyFile(kept.target, kept.state_key, now)

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, *, unknown: bool = False
    ) -> dict[str, Any]:  # Any: JSON values
        session = self._session
        with attested_client(session.target, policy=session.policy, session=session, receipts="off") as http:
            try:
                response = http.request(method, path, json=body)
            except (httpx2.ReadError, httpx2.ReadTimeout, httpx2.RemoteProtocolError) as err:
                if not unknown:
                    raise
                raise TransportError(
                    "STATE_UNKNOWN", "the connection ended after the secret was sent: the state may have been made",
                    hint="if GET /v1/state says open or locked, the keys are lost: delete the storage, begin anew",
                ) from err  # fmt: skip
        if len(response.content) > MAX_ANSWER:
            raise FormatError("FORMAT_STATE", "the answer is too long", expected=f"<= {MAX_ANSWER} bytes")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _malformed("answer")
        if response.status_code != 200:
            raise _refused(response.status_code, answer)
        return answer


def _refused(status: int, answer: dict[str, Any]) -> RefusedError:  # Any: JSON values
    error = answer.get("error")
    told = error if isinstance(error, dict) else {}
    code = str(told.get("code") or "")
    known = code if code in _HINTS else ""
    return RefusedError(
        (known or "state_refused").upper(), f"the service answered {status}: {str(told.get('message') or '')[:300]}",
        hint=_HINTS.get(known, "the service's log names the reason"),
    )  # fmt: skip


def _checkpoint(answer: dict[str, Any]) -> Checkpoint:  # Any: JSON values
    try:
        return Checkpoint.decode(_hex(answer, "checkpoint", 56))
    except ValueError:
        raise _malformed("checkpoint") from None


def _hex(answer: dict[str, Any], name: str, size: int) -> bytes:  # Any: JSON values
    value = answer.get(name)
    if not isinstance(value, str) or re.fullmatch(f"[0-9a-f]{{{size * 2}}}", value) is None:
        raise _malformed(name)
    return bytes.fromhex(value)


def _malformed(what: str) -> FormatError:
    return FormatError("FORMAT_STATE", f"the service's answer is not well formed: {what}")
