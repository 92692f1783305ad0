"""Sealed state: a journal that the host stores and cannot read. Start with `Journal` and `open_backend`.

async with await Journal.open(await open_backend(url), state_key, at_least=known, apply=ledger.apply) as journal:
    checkpoint = await journal.append([record])
"""

from enclave.state.base import Backend, StateConflict, StateError
from enclave.state.journal import Apply, Journal
from enclave.state.location import open_backend
from enclave.state.sealing import KEY_SIZE, MAX_RECORD, Checkpoint

__all__ = [
    "KEY_SIZE",
    "MAX_RECORD",
    "Apply",
    "Backend",
    "Checkpoint",
    "Journal",
    "StateConflict",
    "StateError",
    "open_backend",
]
