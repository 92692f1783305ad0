"""The state key: made here, given away once, and asked for after every boot.

TDX seals nothing across boots, so the key of the stored state lives in this process's memory and at the operator's:

    new      nothing is stored. `bootstrap`, with the secret whose hash is in the measured configuration, makes the key
             and the journal, and answers with the first admin key and the state key. Once: the journal is there then.
    locked   something is stored. `unlock`, with the key, opens it. A checkpoint that comes along must be part of it:
             what the host set back is refused.
    open     a right key is answered with the present checkpoint, for whoever keeps it until the next boot.

Runs in the enclave; callers come through the attested channel and are believed nothing but a secret. A host that
deletes the storage makes it `new`, where only the bootstrap secret helps, and nobody's key opens anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from attestation.errors import VouchsafeError
from enclave.access.prices import PriceTable
from enclave.state import KEY_SIZE, Backend, Checkpoint, StateError, open_backend
from enclave.tenancy import Slots, Tenancy

__all__ = ["Born", "Custody", "CustodyError"]

MAX_ATTEMPTS: Final = 4
"""Callers that wait for a turn; each may cost a look at the storage."""

T = TypeVar("T")
State = Literal["new", "locked", "open"]


class CustodyError(VouchsafeError):
    """`CUSTODY_STATE` not in this state; `CUSTODY_SECRET` not the secret, or not the key; `CUSTODY_BUSY`."""


@dataclass(frozen=True, slots=True)
class Born:
    """What `bootstrap` gives to its caller, and nobody else ever."""

    admin_key_id: str
    admin_key: str = field(repr=False)
    state_key: bytes = field(repr=False)
    checkpoint: Checkpoint


class Custody:
    """One storage and its key. `look` first.

    tenancy   what the state holds, None while it is not open
    """

    def __init__(
        self, url: str, bootstrap_sha256: bytes, prices: PriceTable, models: Mapping[str, Slots],
        clock: Callable[[], int], opened: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._url, self._secret, self._prices = url, bootstrap_sha256, prices
        self._models, self._clock, self._opened = dict(models), clock, opened
        self._backend: Backend | None = None
        self._stored = False
        self._key_digest = b""
        self._lock = asyncio.Lock()
        self._attempts = 0
        self._is_open = asyncio.Event()
        self.tenancy: Tenancy | None = None

    @property
    def state(self) -> State:
        return "open" if self.tenancy is not None else "locked" if self._stored else "new"

    async def look(self) -> State:
        """Connect to the storage and see whether anything is there. Raises `InputError`, `StateError`."""
        self._stored = await (await self._storage()).last_seq() >= 0
        return self.state

    async def wait_failed(self) -> str:
        """Return, with a word that says why, when an open state has failed."""
        await self._is_open.wait()
        assert self.tenancy is not None
        return await asyncio.shield(self.tenancy.failed)

    async def bootstrap(self, secret: bytes) -> Born:
        """Make the state. Raises `CustodyError`, `StateError`, `LedgerError`."""
        if not hmac.compare_digest(hashlib.sha256(secret).digest(), self._secret):
            raise CustodyError("CUSTODY_SECRET", "this is not the bootstrap secret")
        return await self._alone(self._bootstrap)

    async def unlock(self, key: bytes, at_least: Checkpoint | None) -> Checkpoint:
        """Open the state; the checkpoint at its end. Raises `CustodyError`, and what `Tenancy.open` raises."""
        return await self._alone(lambda: self._unlock(key, at_least))

    async def close(self) -> None:
        """Close whatever is open. Idempotent."""
        if self.tenancy is not None:
            await self.tenancy.close()
        await self._let_go()

    async def _bootstrap(self) -> Born:
        if self.state != "new":
            raise CustodyError("CUSTODY_STATE", "there is state already", actual=self.state)
        key = secrets.token_bytes(KEY_SIZE)
        tenancy = await Tenancy.create(await self._storage(), key, self._prices, self._models, self._clock)
        self._stored = True
        try:
            admin, made = await tenancy.organization.bootstrap()
        except BaseException:
            await tenancy.close()
            raise
        self._open(key, tenancy)
        return Born(admin.id, made.value, key, tenancy.checkpoint)

    async def _unlock(self, key: bytes, at_least: Checkpoint | None) -> Checkpoint:
        if self.tenancy is not None:
            if not hmac.compare_digest(hashlib.sha256(key).digest(), self._key_digest):
                raise CustodyError("CUSTODY_SECRET", "this is not the key of the state")
            return self._remembered(self.tenancy.checkpoint, at_least)
        tenancy = await Tenancy.open(await self._storage(), key, at_least, self._prices, self._models, self._clock)
        self._open(key, tenancy)
        return tenancy.checkpoint

    @staticmethod
    def _remembered(now: Checkpoint, at_least: Checkpoint | None) -> Checkpoint:
        if at_least is not None and (at_least.state_id != now.state_id or at_least.seq > now.seq):
            raise StateError("STATE_ROLLBACK", "the state that is open does not extend the checkpoint",
                             expected=at_least.seq, actual=now.seq)  # fmt: skip
        return now

    def _open(self, key: bytes, tenancy: Tenancy) -> None:
        self._key_digest, self._stored, self.tenancy = hashlib.sha256(key).digest(), True, tenancy
        self._is_open.set()
        self._opened()

    async def _storage(self) -> Backend:
        if self._backend is None:
            self._backend = await open_backend(self._url)
        return self._backend

    async def _let_go(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    async def _alone(self, run: Callable[[], Awaitable[T]]) -> T:
        """One attempt at a time. It goes on when its caller hangs up: half an opening is none."""
        if self._attempts >= MAX_ATTEMPTS:
            raise CustodyError("CUSTODY_BUSY", "too many attempts at once")
        self._attempts += 1

        async def attempt() -> T:
            try:
                async with self._lock:
                    return await run()
            except BaseException:
                if self.tenancy is None:
                    await self._let_go()  # a journal that failed has closed it, or left it in the midst of a read
                raise
            finally:
                self._attempts -= 1

        return await asyncio.shield(asyncio.ensure_future(attempt()))
