"""Receipts of served requests (Attested Confidential Inference `aci/1`, draft 2026-08): keyset, document, chain, check.

A receipt says: the program that holds this Ed25519 key received these request bytes, gave those to the engine, and
emitted these response bytes. The key is named by a keyset, and the keyset by the quote (`Claims.keyset`); so a
receipt is worth what the evidence behind its keyset is worth, and nothing without it. It proves handling: not that
the answer is right, not that anything was deleted, and its `served_at` is the enclave's own word.

`verify_receipt` walks these steps and records each:
  (1) `receipt.signature`      the keyset entry of that `key_id` verifies Ed25519 over JCS(receipt without `signature`)
  (2) `receipt.keyset`         the receipt names this keyset, and was served before the keyset ended
  (3) `receipt.request-hash`   SHA-256 of the request body as sent equals `request.received`
  (4) `receipt.response-hash`  SHA-256 of the response body as received equals `response.returned`
  (5) `receipt.chain`          the stream's events hash to the marks of `x.stream.chain`, as far as this copy goes
  (6) `receipt.outcome`        the stream was completed, by the enclave's own word

Hashed and signed bytes are the JCS form (RFC 8785) of the parsed document; the served encoding is free. Integers
only, ASCII member names. Pure: bytes and values in, values out; runs in the enclave (which signs) and at whoever
checks. It trusts neither the receipt nor the body beside it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.keyset import Keyset, keyset_digest, keyset_document
from attestation.result import Checks
from attestation.sse import SseCutter, StreamChain, mark_count, split_inline
from attestation.strict_json import DIGEST, HEX64, ID, MAX_TEXT, bad, count, exact, jcs, listed, load, short, text

__all__ = [
    "API_VERSION",
    "CHAIN_EVENT",
    "Keyset",
    "Receipt",
    "jcs",
    "keyset_digest",
    "keyset_document",
    "outcome_event",
    "receipt_document",
    "request_forwarded",
    "request_received",
    "response_returned",
    "seal",
    "sealed",
    "signing_input",
    "stream_chain_event",
    "verify_receipt",
]

API_VERSION: Final = "aci/1"
CHAIN_EVENT: Final = "x.stream.chain"
OUTCOME_EVENT: Final = "x.outcome"
COMPLETED: Final = "completed"
CHAIN_ALGO: Final = "sse-chain-v1"

MAX_RECEIPT: Final = 2 << 20
"""Bytes of a receipt as carried: a stream of a million events leaves about 1.2 MB of marks."""
MAX_EVENTS: Final = 64
MAX_FIELDS: Final = 32
MAX_LIST: Final = 1 << 15

_MEMBERS: Final = frozenset(
    {
        "api_version",
        "receipt_id",
        "chat_id",
        "model",
        "workload_keyset_digest",
        "endpoint",
        "method",
        "served_at",
        "event_log",
        "key_id",
        "signature",
    }
)
_PATH: Final = re.compile(r"/[A-Za-z0-9._~/-]{0,255}")
_METHOD: Final = re.compile(r"[A-Z]{1,16}")
_CITE: Final = "ACI aci/1, receipts"
_LAST: Final = b',"workload_keyset_digest":'


# --- making ---------------------------------------------------------------------------------------------------------


def request_received(body_hash: bytes) -> dict[str, Any]:  # Any: JSON values
    """First event, always: SHA-256 (32 bytes) of the request body as it came."""
    return {"type": "request.received", "body_hash": _digest(body_hash)}


def request_forwarded(body_hash: bytes) -> dict[str, Any]:  # Any: JSON values
    """Present when the engine was called: SHA-256 of the exact body it was given. Absent from a refusal."""
    return {"type": "request.forwarded", "body_hash": _digest(body_hash)}


def response_returned(body_hash: bytes) -> dict[str, Any]:  # Any: JSON values
    """Always: SHA-256 of the body bytes emitted, error bodies and SSE framing included."""
    return {"type": "response.returned", "body_hash": _digest(body_hash)}


def stream_chain_event(chain: StreamChain) -> dict[str, Any]:  # Any: JSON values
    """Our extension event for a streamed answer: how much was emitted, and the chain's marks (`attestation.sse`)."""
    return {
        "type": CHAIN_EVENT,
        "algo": CHAIN_ALGO,
        "events": chain.events,
        "bytes": chain.size,
        "every": StreamChain.EVERY,
        "marks": [_digest(m) for m in chain.marks],
        "final": _digest(chain.head),
    }


def outcome_event(outcome: str) -> dict[str, Any]:  # Any: JSON values
    """Our extension event for a streamed answer: `completed`, `client_disconnected` or `upstream_error`. The receipt
    of a stream that broke off must not look like that of a whole one."""
    return {"type": OUTCOME_EVENT, "outcome": outcome}


def receipt_document(
    *,
    receipt_id: str,
    chat_id: str | None,
    model: str | None,
    keyset_digest: str,
    endpoint: str,
    method: str,
    served_at: int,
    event_log: Sequence[Mapping[str, Any]],  # Any: JSON values
    key_id: str,
) -> dict[str, Any]:  # Any: JSON values
    """A receipt without its signature. *model* is a registered id or None: user text has no place in a receipt."""
    return {
        "api_version": API_VERSION,
        "receipt_id": receipt_id,
        "chat_id": chat_id,
        "model": model,
        "workload_keyset_digest": keyset_digest,
        "endpoint": endpoint,
        "method": method,
        "served_at": served_at,
        "event_log": [dict(e) for e in event_log],
        "key_id": key_id,
    }


def signing_input(document: Mapping[str, Any]) -> bytes:  # Any: JSON values
    """What the receipt key signs: JCS of the document without `signature`."""
    return jcs({k: v for k, v in document.items() if k != "signature"})


def seal(document: Mapping[str, Any], signature: bytes) -> bytes:  # Any: JSON values
    """The receipt as served: JCS of the document with its Ed25519 signature (64 bytes)."""
    if len(signature) != 64:
        raise ValueError("an Ed25519 signature is 64 bytes")
    return jcs({**document, "signature": signature.hex()})


def sealed(document: Mapping[str, Any], sign: Callable[[bytes], bytes]) -> bytes:  # Any: JSON values
    """`seal` of *document* with what *sign* makes of its `signing_input`, in one pass: only one member of a receipt
    sorts behind `signature`."""
    signed = signing_input(document)
    head, last, tail = signed.rpartition(_LAST)
    signature = sign(signed)
    if len(signature) != 64 or not last:
        raise ValueError("an Ed25519 signature is 64 bytes, and a receipt names its keyset")
    return b'%b,"signature":"%b"%b%b' % (head, signature.hex().encode("ascii"), last, tail)


# --- parsed forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chain:
    """`x.stream.chain` of a receipt: counts, and 32-byte heads after events 1, 2, 4 … 32, every 64th, the last."""

    events: int
    size: int
    """bytes"""
    marks: tuple[bytes, ...]
    final: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt, parsed and well-formed. Nothing in it is believed before `verify_receipt` has passed.

    received, forwarded, returned   32-byte body hashes; `forwarded` is None when the engine was not called
    chain       the stream's chain, None for an answer that was not streamed
    outcome     how the stream ended, None for an answer that was not streamed
    event_log   every event as signed, unknown types included
    signed      the bytes under the signature
    """

    receipt_id: str
    chat_id: str | None
    model: str | None
    keyset_digest: str
    endpoint: str
    method: str
    served_at: int
    key_id: str
    received: bytes
    forwarded: bytes | None
    returned: bytes
    chain: Chain | None
    outcome: str | None
    event_log: tuple[Mapping[str, Any], ...] = field(repr=False)  # Any: JSON values
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @classmethod
    def parse(cls, raw: bytes) -> Receipt:
        """Parse strictly: exact members, integers only, no duplicate member, reserved events in their known shape."""
        doc = load(raw, MAX_RECEIPT, "receipt")
        exact(doc, _MEMBERS, _MEMBERS, "receipt")
        if doc["api_version"] != API_VERSION:
            bad("api_version", expected=API_VERSION, actual=doc["api_version"])
        events = tuple(_event(e) for e in listed(doc["event_log"], "event_log", limit=MAX_EVENTS))
        received, forwarded, returned = _reserved(events)
        return cls(
            receipt_id=text(doc["receipt_id"], ID, "receipt_id"),
            chat_id=short(doc["chat_id"], "chat_id"),
            model=short(doc["model"], "model"),
            keyset_digest=text(doc["workload_keyset_digest"], DIGEST, "workload_keyset_digest"),
            endpoint=text(doc["endpoint"], _PATH, "endpoint"),
            method=text(doc["method"], _METHOD, "method"),
            served_at=count(doc["served_at"], "served_at"),
            key_id=text(doc["key_id"], ID, "key_id"),
            received=received,
            forwarded=forwarded,
            returned=returned,
            chain=_chain(events),
            outcome=_outcome(events),
            event_log=events,
            signed=signing_input(doc),
            signature=bytes.fromhex(text(doc["signature"], HEX64, "signature")),
        )


# --- verification -----------------------------------------------------------------------------------------------------


def verify_receipt(
    receipt: Receipt,
    keyset: bytes,
    *,
    request: bytes | None,
    response: bytes | None,
    checks: Checks,
    allow_cut: bool = False,
) -> None:
    """Record steps (1) to (6) in *checks*.

    keyset     the keyset document, as served; the caller has found its digest in verified evidence
    request, response   body bytes as sent and as received, None when the caller has not kept them (recorded as skips)
    allow_cut  the caller knows that its copy of a stream ends early (its connection broke, or it hung up): the copy
               is then checked up to the last mark it reaches, and step (4) is a skip instead of a failure
    """
    parsed = checks.parse("receipt.keyset", lambda: Keyset.parse(keyset), reason="the keyset parses", cite=_CITE)
    if parsed is None:
        return
    _check_signature(receipt, parsed, checks)
    checks.equal(  # (2)
        "receipt.keyset",
        parsed.digest,
        receipt.keyset_digest,
        code="RECEIPT_KEYSET",
        reason="the receipt names this keyset",
        cite=_CITE,
    )
    checks.require(
        "receipt.keyset",
        receipt.served_at <= parsed.not_after,
        code="RECEIPT_KEYSET_EXPIRED",
        reason="the request was served before the keyset ended",
        expected=f"at most {parsed.not_after}",
        actual=receipt.served_at,
        cite=_CITE,
    )
    _check_outcome(receipt, checks, allow_cut=allow_cut)
    if request is None:  # (3)
        checks.skip("receipt.request-hash", "the request body was not given", cite=_CITE)
    else:
        checks.equal(
            "receipt.request-hash",
            receipt.received,
            hashlib.sha256(request).digest(),
            code="RECEIPT_REQUEST_HASH",
            reason="the request as sent is the request as received",
            cite=_CITE,
        )
    if response is None:
        checks.skip("receipt.response-hash", "the response body was not given", cite=_CITE)
        checks.skip("receipt.chain", "the response body was not given", cite=_CITE)
        return
    covered = _covered(receipt, response)
    _check_response(receipt, covered, checks, allow_cut=allow_cut)
    _check_chain(receipt, covered, checks)


def _check_signature(receipt: Receipt, keyset: Keyset, checks: Checks) -> None:
    """(1) The keyset alone decides key and algorithm: a receipt that could name one would choose its own judge."""
    public = keyset.signing_keys.get(receipt.key_id)
    if public is None:
        checks.require(
            "receipt.signature",
            False,
            code="RECEIPT_KEY_UNKNOWN",
            reason="the keyset holds the receipt's key",
            expected=sorted(keyset.signing_keys),
            actual=receipt.key_id,
            cite=_CITE,
        )
        return
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(receipt.signature, receipt.signed)
        good = True
    except (InvalidSignature, ValueError):
        good = False
    checks.require(
        "receipt.signature",
        good,
        code="RECEIPT_SIGNATURE",
        reason="the receipt key signed this receipt (Ed25519)",
        actual=f"SHA-256 of the signed bytes {hashlib.sha256(receipt.signed).hexdigest()}",
        cite=_CITE,
    )


def _check_outcome(receipt: Receipt, checks: Checks, *, allow_cut: bool) -> None:
    """(6) A broken stream has an honest receipt: it verifies as such only for a reader who says that it knows."""
    if receipt.outcome is None:
        return
    if receipt.outcome != COMPLETED and allow_cut:
        checks.skip("receipt.outcome", f"the stream was not completed: {receipt.outcome}", cite=_CITE)
        return
    checks.equal(
        "receipt.outcome",
        COMPLETED,
        receipt.outcome,
        code="RECEIPT_OUTCOME",
        reason="the enclave says that the stream was completed",
        cite=_CITE,
    )


def _covered(receipt: Receipt, response: bytes) -> bytes:
    """The part of *response* that the receipt speaks of: all of it, less an in-band receipt after the stream's end.

    Only that one comment is set aside, and only past the bytes the chain counts, so nothing a client would read as
    content can hide there."""
    if receipt.chain is None or len(response) <= receipt.chain.size:
        return response
    body, inline = split_inline(response)
    return body if inline is not None else response


def _check_response(receipt: Receipt, covered: bytes, checks: Checks, *, allow_cut: bool) -> None:
    """(4)"""
    cut = receipt.chain is not None and len(covered) < receipt.chain.size
    if receipt.chain is not None and cut:
        size = f"{len(covered)} of {receipt.chain.size} bytes"
        if allow_cut:
            checks.skip("receipt.response-hash", f"this copy of the stream is cut: {size}", cite=_CITE)
            return
        checks.require(
            "receipt.response-hash",
            False,
            code="RECEIPT_RESPONSE_CUT",
            reason="this copy holds the whole stream",
            expected=f"{receipt.chain.size} bytes",
            actual=size,
            cite=_CITE,
        )
        return
    checks.equal(
        "receipt.response-hash",
        receipt.returned,
        hashlib.sha256(covered).digest(),
        code="RECEIPT_RESPONSE_HASH",
        reason="the response as received is the response as emitted",
        cite=_CITE,
    )


def _check_chain(receipt: Receipt, covered: bytes, checks: Checks) -> None:
    """(5) Recompute every mark that this copy reaches; whole copies must reach `final` with nothing left over."""
    if receipt.chain is None:
        checks.skip("receipt.chain", "the answer was not streamed", cite=_CITE)
        return
    chain = StreamChain(receipt.receipt_id, receipt.received)
    cutter = SseCutter(limit=len(covered) + 1)
    for event in cutter.feed(covered):
        chain.update(event)
    whole = len(covered) >= receipt.chain.size
    expected = receipt.chain.marks[: len(chain.marks)]
    good = tuple(chain.marks) == expected
    if whole:
        good = good and (chain.events, chain.size) == (receipt.chain.events, receipt.chain.size)
        good = good and chain.head == receipt.chain.final and not cutter.rest
    past = len(covered) - chain.marked_bytes
    if whole:
        reason = f"all {receipt.chain.events} events of the stream hash to the chain"
    else:
        reason = (
            f"the stream hashes to the chain up to event {chain.marked_events} of {receipt.chain.events}; "
            f"the last {past} bytes of this copy lie past that mark and are not covered"
        )
    checks.require(
        "receipt.chain",
        good,
        code="RECEIPT_CHAIN",
        reason=reason,
        expected=receipt.chain.final if whole else f"{len(expected)} marks",
        actual=chain.head if whole else f"{sum(a == b for a, b in zip(chain.marks, expected, strict=False))} equal",
        cite=_CITE,
    )


# --- parsing ----------------------------------------------------------------------------------------------------------


def _digest(raw: bytes) -> str:
    if len(raw) != 32:
        raise ValueError("a body hash is 32 bytes")
    return "sha256:" + raw.hex()


def _event(value: object) -> Mapping[str, Any]:  # Any: JSON values
    """One flat event: strings, integers, booleans, null, or lists of strings."""
    if not isinstance(value, dict) or len(value) > MAX_FIELDS or not isinstance(value.get("type"), str):
        bad("event", expected=f"a flat object of at most {MAX_FIELDS} members with a type")
    for name, inner in value.items():
        if isinstance(inner, list):
            if len(inner) > MAX_LIST or not all(isinstance(i, str) and len(i) <= MAX_TEXT for i in inner):
                bad("event", expected="lists of short strings only")
        elif isinstance(inner, dict) or (isinstance(inner, str) and len(inner) > MAX_TEXT) or len(name) > 64:
            bad("event", expected="flat, short members")
    return value


def _reserved(events: Sequence[Mapping[str, Any]]) -> tuple[bytes, bytes | None, bytes]:  # Any: JSON values
    """Hashes of the three reserved events of a direct service, in their order; each at most once."""
    order = ("request.received", "request.forwarded", "upstream.verified", "response.returned")
    found: dict[str, bytes] = {}
    last = -1
    for event in events:
        kind = event["type"]
        if kind not in order:
            continue
        place = order.index(kind)
        if place <= last:
            bad("event_log", expected=f"each of {', '.join(order)} at most once, in this order")
        last = place
        if kind != "upstream.verified":
            exact(dict(event), {"type", "body_hash"}, {"type", "body_hash"}, kind)
            found[kind] = bytes.fromhex(text(event["body_hash"], DIGEST, "body_hash")[7:])
    if not events or events[0]["type"] != "request.received" or "response.returned" not in found:
        bad("event_log", expected="request.received first, and response.returned")
    return found["request.received"], found.get("request.forwarded"), found["response.returned"]


def _outcome(events: Sequence[Mapping[str, Any]]) -> str | None:  # Any: JSON values
    """`x.outcome`, when present: at most once."""
    named = [e for e in events if e["type"] == OUTCOME_EVENT]
    if not named:
        return None
    if len(named) > 1:
        bad(OUTCOME_EVENT, expected="at most once")
    exact(dict(named[0]), {"type", "outcome"}, {"type", "outcome"}, OUTCOME_EVENT)
    return text(named[0]["outcome"], ID, "outcome")


def _chain(events: Sequence[Mapping[str, Any]]) -> Chain | None:  # Any: JSON values
    """`x.stream.chain`, when present: at most once, with exactly the marks that its event count asks for."""
    named = [e for e in events if e["type"] == CHAIN_EVENT]
    if not named:
        return None
    if len(named) > 1:
        bad(CHAIN_EVENT, expected="at most once")
    event = dict(named[0])
    members = {"type", "algo", "events", "bytes", "every", "marks", "final"}
    exact(event, members, members, CHAIN_EVENT)
    if event["algo"] != CHAIN_ALGO or event["every"] != StreamChain.EVERY:
        bad(CHAIN_EVENT, expected=f"{CHAIN_ALGO} with a mark every {StreamChain.EVERY}")
    events_count = count(event["events"], "events")
    marks = listed(event["marks"], "marks", limit=MAX_LIST)
    if len(marks) != mark_count(events_count):
        bad(CHAIN_EVENT, expected=f"{mark_count(events_count)} marks for {events_count} events", actual=len(marks))
    return Chain(
        events=events_count,
        size=count(event["bytes"], "bytes"),
        marks=tuple(bytes.fromhex(text(m, DIGEST, "mark")[7:]) for m in marks),
        final=bytes.fromhex(text(event["final"], DIGEST, "final")[7:]),
    )
