"""How one record is sealed and how records hang together. Pure but for randomness; the rules are these.

    header   row 0    magic ‖ u16be(format) ‖ state_id (16) ‖ u64be(created) ‖ HMAC-SHA256(header key, all before)
    record   row n    nonce (12) ‖ AES-256-GCM-SIV(record key, nonce, text, AAD)
             text     flags (1) ‖ u32be(length) ‖ record ‖ zeros, to 5 + one of SIZES
             AAD      tag ‖ state_id ‖ u64be(n) ‖ head_{n-1}
    head_0   SHA-256(tag ‖ 0^32 ‖ row 0)
    head_n   SHA-256(tag ‖ head_{n-1} ‖ row n)
    keys     HKDF-SHA256(state key, info = tag of the purpose), for records with salt = state_id

The header holds nothing secret, so it has a MAC: unlike AES-GCM-SIV, HMAC commits to its key, and two keys never open
the same header. Row n opens only as row n behind exactly the rows before it, so what is missing, swapped, repeated,
changed or from another journal does not open. The nonce is random and the mode resists its misuse: when the host sets
an enclave back, or two enclaves write at once, two records are sealed under the same key and number.

SIZES are few, so that a row's size tells little: an entry of the ledger, a limit and a new API key look alike. Flag
`MORE` says that the append goes on with the next row: a journal cut in the midst of one is seen to be.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.operator_state import CHECKPOINT_SIZE, Checkpoint
from enclave.state.base import StateError

__all__ = ["CHECKPOINT_SIZE", "FORMAT", "KEY_SIZE", "MAX_RECORD", "SIZES", "Checkpoint", "Header", "Sealer"]

FORMAT: Final = 1
KEY_SIZE: Final = 32
SIZES: Final = (512, 4096, 65536)
MAX_RECORD: Final = SIZES[-1]

_MAGIC: Final = b"vouchsafe/state\x00"
_HEADER: Final = struct.Struct(">16sH16sQ")
_TEXT: Final = struct.Struct(">BI")
_MORE: Final = 1
_NONCE: Final = 12
_TAG: Final = 16
_BLOBS: Final = frozenset(_NONCE + _TEXT.size + size + _TAG for size in SIZES)

_HEAD_TAG: Final = b"vouchsafe/state-head/v1\x00"
_AAD_TAG: Final = b"vouchsafe/state-record/v1\x00"
_HEADER_INFO: Final = b"vouchsafe/state-header-key/v1"
_RECORD_INFO: Final = b"vouchsafe/state-record-key/v1"


@dataclass(frozen=True, slots=True)
class Header:
    """Row 0. `created` is unix seconds by the guest's clock. One that `open` returned was made under the given key."""

    state_id: bytes
    created: int

    def seal(self, key: bytes) -> bytes:
        """The row's bytes."""
        body = _HEADER.pack(_MAGIC, FORMAT, self.state_id, self.created)
        return body + _header_mac(key, body)

    @classmethod
    def open(cls, key: bytes, raw: bytes) -> Header:
        """Read row 0. `STATE_HEADER` when it is none, `STATE_KEY` when *key* did not make it."""
        body, mac = raw[: _HEADER.size], raw[_HEADER.size :]
        if len(raw) != _HEADER.size + 32 or not raw.startswith(_MAGIC):
            raise StateError(
                "STATE_HEADER",
                "the first row is no header of a journal",
                expected=f"{_HEADER.size + 32} bytes",
                actual=len(raw),
                hint="the stored state was damaged or is something else: restore it from a copy",
            )
        _, version, state_id, created = _HEADER.unpack(body)
        if version != FORMAT:
            raise StateError(
                "STATE_HEADER",
                "the journal has a format that this release does not know",
                expected=FORMAT,
                actual=version,
                hint="start the release that wrote it, or a later one",
            )
        if not hmac.compare_digest(mac, _header_mac(key, body)):
            raise StateError(
                "STATE_KEY",
                "the state key did not make this journal, or its header was changed",
                hint="hand over the key that this state was set up with",
            )
        return cls(state_id, created)


class Sealer:
    """Seals and opens the records of one journal. Holds the record key: no text, no copy, no pickle."""

    __slots__ = ("__aead", "state_id")

    def __init__(self, key: bytes, state_id: bytes) -> None:
        self.state_id = state_id
        self.__aead = AESGCMSIV(_derive(key, _RECORD_INFO, state_id))

    def __repr__(self) -> str:
        return "<Sealer>"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("a state key does not leave this process")

    def seal(self, seq: int, head: bytes, record: bytes, *, more: bool) -> bytes:
        """Row *seq* behind *head*. `STATE_TOO_LONG` beyond `MAX_RECORD`."""
        room = sealed_size(len(record)) - _NONCE - _TAG
        text = (_TEXT.pack(_MORE if more else 0, len(record)) + record).ljust(room, b"\x00")
        nonce = os.urandom(_NONCE)
        return nonce + self.__aead.encrypt(nonce, text, self._aad(seq, head))

    def open(self, seq: int, head: bytes, blob: bytes) -> tuple[bytes, bool]:
        """The record in row *seq* behind *head*, and whether its append goes on. `STATE_RECORD` otherwise."""
        if len(blob) not in _BLOBS:
            raise _refused(seq, "has a size that no record has")
        try:
            text = self.__aead.decrypt(blob[:_NONCE], blob[_NONCE:], self._aad(seq, head))
        except InvalidTag:
            raise _refused(seq, "does not open where it lies") from None
        flags, length = _TEXT.unpack_from(text)
        end = _TEXT.size + length
        # Only the holder of the key can get here; one record still has one form.
        if flags & ~_MORE or length > MAX_RECORD or len(blob) != sealed_size(length) or any(text[end:]):
            raise _refused(seq, "is not in the one form that this release writes")
        return text[_TEXT.size : end], flags == _MORE

    def _aad(self, seq: int, head: bytes) -> bytes:
        return b"".join((_AAD_TAG, self.state_id, seq.to_bytes(8, "big"), head))


def sealed_size(length: int) -> int:
    """Bytes of the row that holds a record of *length* bytes. `STATE_TOO_LONG` when no size is large enough."""
    for size in SIZES:
        if length <= size:
            return _NONCE + _TEXT.size + size + _TAG
    raise StateError("STATE_TOO_LONG", "a record is too long", expected=f"<= {MAX_RECORD} bytes", actual=length)


def next_head(head: bytes, row: bytes) -> bytes:
    """The head after *row*, 32 bytes; before the header it is 32 zeros."""
    return hashlib.sha256(_HEAD_TAG + head + row).digest()


def _header_mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(_derive(key, _HEADER_INFO, None), body, "sha256")


def _derive(key: bytes, info: bytes, salt: bytes | None) -> bytes:
    if len(key) != KEY_SIZE:
        raise ValueError(f"a state key has {KEY_SIZE} bytes")
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(key)


def _refused(seq: int, what: str) -> StateError:
    return StateError(
        "STATE_RECORD",
        f"record {seq} {what}",
        hint="the stored state was changed, reordered or mixed with another: restore it from a copy",
    )
