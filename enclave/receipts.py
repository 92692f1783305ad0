"""Receipts of this enclave: made, signed and kept for a bounded time, in memory only.

A receipt names the keyset of the connection on which its request came, and is signed by that certificate's receipt
key through a signer: this file never sees a private key. The store is bounded by count, bytes and age; a receipt is
given only to the credential of its request, because the hash of a body confirms a guess of a short prompt.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from attestation import receipt

__all__ = ["ReceiptStore", "Signer", "SigningIdentity", "issue", "new_receipt_id"]

MAX_COUNT: Final = 16384
MAX_BYTES: Final = 64 << 20
MAX_PUBLIC: Final = 256
KEEP_SECONDS: Final = 20 * 60


Durable = Callable[[], Awaitable[None]]
"""Returns when a receipt's entry in the ledger cannot be lost any more; raises when it could not be kept."""


class Signer(Protocol):
    """A receipt key that can sign and cannot be read."""

    @property
    def key_id(self) -> str: ...

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""


class SigningIdentity(Protocol):
    """What receipts need of the identity of a connection."""

    @property
    def keyset_digest(self) -> str: ...

    @property
    def receipt_signer(self) -> Signer: ...


def new_receipt_id() -> str:
    """128 random bits: the id alone must not be guessable."""
    return "rcpt-" + secrets.token_hex(16)


def issue(
    identity: SigningIdentity,
    *,
    receipt_id: str,
    chat_id: str | None,
    model: str | None,
    endpoint: str,
    method: str,
    served_at: int,
    event_log: Sequence[Mapping[str, Any]],  # Any: JSON values
) -> bytes:
    """The signed receipt, JSON (JCS)."""
    document = receipt.receipt_document(
        receipt_id=receipt_id,
        chat_id=chat_id,
        model=model,
        keyset_digest=identity.keyset_digest,
        endpoint=endpoint,
        method=method,
        served_at=served_at,
        event_log=event_log,
        key_id=identity.receipt_signer.key_id,
    )
    return receipt.sealed(document, identity.receipt_signer.sign)


@dataclass(frozen=True, slots=True)
class _Entry:
    raw: bytes = field(repr=False)
    owner: str | None
    chat_id: str | None
    expires: float
    durable: Durable | None


class ReceiptStore:
    """Receipts by id for 20 minutes, oldest out first when count or bytes run over.

    Refusals of callers without a valid key live in a small room of their own: a flood of them can not push out the
    receipts of customers.
    """

    def __init__(
        self,
        *,
        max_count: int = MAX_COUNT,
        max_bytes: int = MAX_BYTES,
        max_public: int = MAX_PUBLIC,
        keep_seconds: float = KEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept = _Room(max_count, max_bytes)
        self._public = _Room(max_public, max_bytes // 16)
        self._keep = keep_seconds
        self._clock = clock
        self._sweeping: asyncio.TimerHandle | None = None

    def add(
        self, receipt_id: str, raw: bytes, *, owner: str | None, chat_id: str | None = None,
        durable: Durable | None = None,
    ) -> None:  # fmt: skip
        """Keep *raw* for the API key with the id *owner*, for anybody who knows the receipt's id when it is None; from
        when *durable* is done, at once without."""
        now = self._clock()
        room = self._public if owner is None else self._kept
        room.add(receipt_id, _Entry(raw, owner, chat_id, now + self._keep, durable))
        self.sweep()

    async def get(self, id: str, owner: str | None) -> bytes | None:
        """The receipt with that receipt id or chat id, None when unknown, expired or of another key, and when its
        entry in the ledger could not be made durable."""
        self.sweep()
        for room in (self._kept, self._public):
            entry = room.get(id)
            if entry is None or entry.owner not in (None, owner):
                continue
            if entry.durable is not None:
                try:
                    await entry.durable()
                except Exception:  # its entry is lost, so it says what is not so
                    return None
            return entry.raw
        return None

    def sweep(self) -> None:
        """Drop what has expired, and come back when the next one does: an idle enclave forgets too."""
        now = self._clock()
        for room in (self._kept, self._public):
            room.drop_expired(now)
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        if len(self) and (loop := _running_loop()) is not None:
            self._sweeping = loop.call_later(self._keep, self.sweep)

    def __len__(self) -> int:
        return len(self._kept.entries) + len(self._public.entries)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Room:
    """Entries in order of arrival, which is the order of expiry: one lifetime for all."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self._by_chat: dict[str, str] = {}
        self._size = 0
        self._max_count = max_count
        self._max_bytes = max_bytes

    def add(self, receipt_id: str, entry: _Entry) -> None:
        if len(entry.raw) > self._max_bytes:
            return
        self.entries[receipt_id] = entry
        self._size += len(entry.raw)
        if entry.chat_id is not None:
            self._by_chat[entry.chat_id] = receipt_id
        while len(self.entries) > self._max_count or self._size > self._max_bytes:
            self._drop_oldest()

    def get(self, id: str) -> _Entry | None:
        return self.entries.get(id) or self.entries.get(self._by_chat.get(id, ""))

    def drop_expired(self, now: float) -> None:
        while self.entries and next(iter(self.entries.values())).expires <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        receipt_id, entry = self.entries.popitem(last=False)
        self._size -= len(entry.raw)
        if entry.chat_id is not None and self._by_chat.get(entry.chat_id) == receipt_id:
            del self._by_chat[entry.chat_id]
