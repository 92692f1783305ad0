"""The ledger's bytes: entries, and the records that the journal keeps of them. Strict to read, in JCS form.

An **entry** is one settled request. The entries of a project form a chain: each names the hash of the one before, the
first a hash of the project's id, so that a customer who has them sees that none is missing, added or changed. `seq` is
the project's own: a common one would show what others do.

A **record** is what the journal keeps: `table` (a price table comes into force), `held` (a request is being served, and
what it has used), `progress` (what it has used by now), `settled` (its entry). Pure; trusts nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, get_args

from attestation.errors import VouchsafeError
from attestation.strict_json import DIGEST, ID
from enclave.access.prices import MAX_NANOUSD, MODEL_ID, PriceTable, Usage

__all__ = [
    "MINUTE", "OUTCOMES", "UNBILLED", "Entry", "Held", "LedgerError", "Operation", "Outcome", "Progress", "Record",
    "Settled", "check_held", "decode_record", "encode_record", "entries_of", "follows", "genesis", "hash_of",
]  # fmt: skip

T = TypeVar("T")

MINUTE: Final = 60
Operation = Literal["completions", "embeddings"]
"""Which of OpenAI's usage pages a request belongs to; chat, responses and messages are completions."""
Outcome = Literal["completed", "client_disconnected", "key_revoked", "upstream_error", "refused", "gateway_restart"]
UNBILLED: Final[frozenset[Outcome]] = frozenset({"upstream_error", "refused"})
"""The engine failed, or refused the request: no tokens are entered and nothing is charged."""

OPERATIONS: Final = frozenset(get_args(Operation))
OUTCOMES: Final = frozenset(get_args(Outcome))
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), sort_keys=True)
_TAG: Final = b"vouchsafe/ledger/v1"
MAX_TIME: Final = 2**37
_COUNTS: Final = ("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens")


class LedgerError(VouchsafeError):
    """A ledger that cannot go on, or was asked for what cannot be. `LEDGER_…`, listed in `enclave.access.ledger`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One settled request. Says who used how much of what and what it cost; nothing of what was said.

    seq          1, 2, 3, … in its project;  time   unix seconds of the settlement, down to the minute
    usage        what is charged for
    cost         nano-USD: the price of `usage` in `price_table` (32 bytes), or what was reserved if that is less
    receipt      SHA-256 of the signed receipt; None after a restart, when there was nobody left to give one to
    previous     hash of the project's entry before
    """

    seq: int
    time: int
    project: str
    key_id: str
    model: str
    operation: Operation
    usage: Usage
    outcome: Outcome
    price_table: bytes
    cost: int
    receipt: bytes | None
    previous: bytes
    _encoded: list[bytes] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def hash(self) -> bytes:
        """SHA-256(tag ‖ bytes): what the project's next entry names."""
        return hash_of(self.encode())

    def document(self) -> dict[str, Any]:  # Any: JSON values
        u = self.usage
        return {
            "seq": self.seq, "time": self.time, "project": self.project, "key_id": self.key_id, "model": self.model,
            "operation": self.operation, "outcome": self.outcome, "cost_nanousd": self.cost,
            "input_tokens": u.input_tokens, "cached_input_tokens": u.cached_tokens,
            "output_tokens": u.output_tokens, "reasoning_tokens": u.reasoning_tokens,
            "price_table": _digest(self.price_table), "prev_hash": _digest(self.previous),
            "receipt": None if self.receipt is None else _digest(self.receipt),
        }  # fmt: skip

    def encode(self) -> bytes:
        """JCS, about 540 bytes: three digests in hex, two ids, and names that need no legend."""
        if not self._encoded:  # made once: it is written, hashed, and compared after reading
            self._encoded.append(_canonical(self.document()))
        return self._encoded[0]

    @classmethod
    def decode(cls, raw: bytes) -> Entry:
        """The inverse of `encode`; no other form is read. Raises `LedgerError`."""
        return _strictly(raw, _entry, Entry.encode)


@dataclass(frozen=True, slots=True)
class Held:
    """A request that is being served: whose, what was reserved (nano-USD), and what it had used by then."""

    request_id: str
    project: str
    key_id: str
    model: str
    operation: Operation
    price_table: bytes
    amount: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Progress:
    """What a held request has used by now."""

    request_id: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Settled:
    request_id: str
    entry: Entry


Record = PriceTable | Held | Progress | Settled


def genesis(project: str) -> bytes:
    """What the first entry of *project* names as the hash before it."""
    return hash_of(b"\0" + project.encode())


def hash_of(raw: bytes) -> bytes:
    return hashlib.sha256(_TAG + raw).digest()


def check_held(held: Held) -> Held:
    """*held*, or `LedgerError` (`LEDGER_VALUE`) when a later opening could not read it back."""
    try:
        for id in (held.request_id, held.project, held.key_id):
            _id(id)
        _model(held.model)
        _one(held.operation, OPERATIONS)
        _number(held.amount, 0, MAX_NANOUSD)
    except (ValueError, TypeError, AttributeError):
        raise LedgerError(
            "LEDGER_VALUE", "the ledger cannot hold this request", expected="ids of [A-Za-z0-9._:-], nano-USD < 2^53"
        ) from None
    return held


def encode_record(record: Record) -> bytes:
    """JCS."""
    match record:
        case PriceTable():
            return _canonical({"record": "table", "table": json.loads(record.encode())})
        case Held():
            document = {
                "record": "held", "id": record.request_id, "project": record.project, "key_id": record.key_id,
                "model": record.model, "operation": record.operation, "price_table": _digest(record.price_table),
                "amount": record.amount, "usage": _list(record.usage),
            }  # fmt: skip
            return _canonical(document)
        case Progress():
            return _canonical({"record": "progress", "id": record.request_id, "usage": _list(record.usage)})
        case Settled():
            entry = record.entry.encode()
            return b'{"entry":%b,"id":"%b","record":"settled"}' % (entry, record.request_id.encode("ascii"))


def decode_record(raw: bytes) -> Record:
    """The inverse of `encode_record`; no other form is read. Raises `LedgerError`, `LEDGER_RECORD`."""
    return _strictly(raw, _record, encode_record)


def entries_of(records: Iterable[bytes], project: str) -> Iterator[Entry]:
    """The chain of *project* among the journal's *records*, checked link by link. Raises `LedgerError`."""
    seq, head = 0, genesis(project)
    for raw in records:
        record = decode_record(raw)
        if isinstance(record, Settled) and record.entry.project == project:
            follows(record.entry, seq, head)
            seq, head = record.entry.seq, record.entry.hash
            yield record.entry


def follows(entry: Entry, seq: int, head: bytes) -> None:
    """Raise `LedgerError` unless *entry* is the next one behind number *seq* with hash *head*."""
    if entry.seq != seq + 1 or entry.previous != head:
        raise LedgerError("LEDGER_CHAIN", "an entry does not follow the one before", expected=seq + 1, actual=entry.seq)


def _canonical(document: Mapping[str, Any]) -> bytes:  # Any: JSON values
    # ASCII names and values, integers only (every type here sees to it): this is JCS, ten times faster than a library.
    return _ENCODER.encode(document).encode("ascii")


def _strictly(raw: bytes, read: Callable[[Any], T], write: Callable[[T], bytes]) -> T:  # Any: JSON values
    try:
        made = read(json.loads(raw))
        if write(made) == raw:
            return made
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, VouchsafeError):
        pass
    raise LedgerError(
        "LEDGER_RECORD", "a record of the ledger cannot be read", expected="a record of this release",
        hint='was the state written by another release, or changed? see docs/operate.md, "rollback suspected"',
    )  # fmt: skip


def _record(d: dict[str, Any]) -> Record:  # Any: JSON values, all checked here or by what they become
    match d["record"]:
        case "table":
            return PriceTable.parse(d["table"])
        case "held":
            amount = _number(d["amount"], 0, MAX_NANOUSD)
            return Held(
                _id(d["id"]), _id(d["project"]), _id(d["key_id"]), _model(d["model"]), _one(d["operation"], OPERATIONS),
                _bytes(d["price_table"]), amount, Usage(*d["usage"]),
            )  # fmt: skip
        case "progress":
            return Progress(_id(d["id"]), Usage(*d["usage"]))
        case "settled":
            return Settled(_id(d["id"]), _entry(d["entry"]))
    raise ValueError("a record of unknown kind")


def _entry(d: dict[str, Any]) -> Entry:  # Any: JSON values, all checked here or by what they become
    return Entry(
        seq=_number(d["seq"], 1, 2**53 - 1), time=_number(d["time"], 0, MAX_TIME),
        project=_id(d["project"]), key_id=_id(d["key_id"]), model=_model(d["model"]),
        operation=_one(d["operation"], OPERATIONS), usage=Usage(*(d[name] for name in _COUNTS)),
        outcome=_one(d["outcome"], OUTCOMES), price_table=_bytes(d["price_table"]),
        cost=_number(d["cost_nanousd"], 0, MAX_NANOUSD),
        receipt=None if d["receipt"] is None else _bytes(d["receipt"]), previous=_bytes(d["prev_hash"]),
    )  # fmt: skip


def _list(usage: Usage) -> list[int]:
    return [usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens]


def _digest(value: bytes) -> str:
    return f"sha256:{value.hex()}"


def _bytes(value: str) -> bytes:
    if DIGEST.fullmatch(value) is None:
        raise ValueError("not a digest")
    return bytes.fromhex(value[7:])


def _id(value: str) -> str:
    if ID.fullmatch(value) is None:
        raise ValueError("not an id")
    return value


def _model(value: str) -> str:
    if MODEL_ID.fullmatch(value) is None:
        raise ValueError("not a model id")
    return value


def _number(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError("a number out of bounds")
    return value


def _one(value: str, words: frozenset[str]) -> Any:  # Any: the caller's Literal
    if value not in words:
        raise ValueError("a word that is not known")
    return value
