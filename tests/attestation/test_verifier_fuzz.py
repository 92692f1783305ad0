"""Mutated evidence: the verifier answers every time, never with a fault of its own, and never accepts what changed.

A seeded sample, the same each run; `VOUCHSAFE_FUZZ_SECONDS` makes it run as long as it says, with other seeds.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from attestation import cbor
from attestation.bundle import Bundle
from attestation.channel import ChannelProof
from attestation.claims import Claims
from attestation.dsse import Envelope, sign
from attestation.errors import FormatError
from attestation.ratls import Leaf, build_leaf
from attestation.result import AttestationResult
from tests.genuine import EXPORTER, NONCE, Genuine, Shown, genuine, operator_key, signer_key

SECONDS = float(os.environ.get("VOUCHSAFE_FUZZ_SECONDS", "0"))
ROUNDS = 25
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**64, 1.5, "", "a", "*", "\ud800", "é", [], {}, [[]], [{}], {"a": 1},
    [1, "x"], "0x10", "sha256:" + "0" * 64, "00" * 32, "00" * 48,
)  # fmt: skip


def bytes_edit(draw: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw or b"\0")
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at, kind = draw.randrange(max(1, len(out))), draw.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at : at + draw.randrange(1, 40)]
        elif kind == 2:
            out[at:at] = draw.randbytes(draw.randrange(1, 20))
        elif kind == 3:
            other = draw.randrange(max(1, len(out)))
            out[at : at + 8] = out[other : other + 8]
        elif kind == 4:
            out[at : at + 4] = draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"null", b"[]", b"-1", b"1e9"))
        else:
            del out[at:]
    return bytes(out)


def value_edit(draw: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: value_edit(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], value_edit(draw, value[at]), *value[at + 1 :]]
    return draw.choice(ODD)


def json_edit(draw: random.Random, raw: bytes) -> bytes:
    return json.dumps(value_edit(draw, json.loads(raw))).encode()


def either(draw: random.Random, raw: bytes) -> bytes:
    return (json_edit if draw.random() < 0.6 else bytes_edit)(draw, raw)


def payload(raw: bytes) -> bytes:
    return base64.b64decode(json.loads(raw)["payload"])


def digest(raw: bytes) -> bytes:
    return hashlib.sha256(payload(raw)).digest()


def draws(seed: int) -> Iterator[random.Random]:
    """A generator per round: `ROUNDS` of them, or as many as the seconds asked for allow."""
    end = time.monotonic() + SECONDS
    number = 0
    while number < ROUNDS or time.monotonic() < end:
        yield random.Random(seed * 1_000_003 + number)
        number += 1


def answer(result: AttestationResult) -> AttestationResult:
    assert "VERIFIER_FAULT" not in result.codes, result.failed
    assert "VERIFIER_INCOMPLETE" not in result.codes, result.failed
    assert result.accepted or not result.claims
    return result


def same_statement(one: bytes, two: bytes) -> bool:
    """Whether two envelopes say the same: key ids, their order and white space are nobody's word."""
    try:
        a, b = Envelope.parse(one), Envelope.parse(two)
    except FormatError:
        return False
    return (a.payload_type, a.payload, sorted(a.signatures)) == (b.payload_type, b.payload, sorted(b.signatures))


HONEST = genuine()


def shown(claims: bytes) -> Claims:
    """Honest names and times outside, *claims* inside."""
    return cast(Claims, Shown(HONEST.claims, claims))


def test_a_mutated_leaf_is_refused() -> None:
    for draw in draws(1):
        leaf = bytes_edit(draw, HONEST.evidence.leaf)
        assert leaf == HONEST.evidence.leaf or not answer(HONEST.verify(leaf=leaf)).accepted


def test_a_mutated_part_in_a_leaf_signed_anew_is_refused() -> None:
    """The holder of the key can put anything into a leaf, and have its TD sign any claims."""
    carried = Leaf.parse(HONEST.evidence.leaf).extension
    for draw in draws(2):
        parts = {"quote": carried.quote, "claims": carried.claims, "gpu": carried.gpu or b""}
        which = draw.choice(sorted(parts))
        parts[which] = bytes_edit(draw, parts[which])[:12_000]
        if parts[which] == getattr(carried, which):
            continue
        if which == "claims" and draw.random() < 0.7:
            parts["quote"] = HONEST.tee.quote(hashlib.sha256(parts["claims"]).digest() + bytes(32))
        leaf = build_leaf(HONEST.key, shown(parts["claims"]), parts["quote"], parts["gpu"])
        result = answer(HONEST.verify(leaf=leaf))
        # The boot id is the one claim that nothing outside of the TD knows.
        assert not result.accepted or (
            which == "claims"
            and dataclasses.replace(Claims.decode(parts["claims"]), boot_id=HONEST.claims.boot_id) == HONEST.claims
        )


@pytest.mark.parametrize("member", ["keyset", "event_log", "release", "deployment", "status"])
def test_a_mutated_document_is_refused_unless_it_says_the_same(member: str) -> None:
    honest = getattr(HONEST.evidence, member)
    for draw in draws(3):
        raw = bytes_edit(draw, honest) if member == "event_log" else either(draw, honest)
        result = answer(HONEST.verify(**{member: raw}))
        assert not result.accepted or raw == honest or same_statement(raw, honest)


@pytest.mark.parametrize("member", ["collateral", "rims", "ocsp"])
def test_mutated_endorsements_are_refused(member: str) -> None:
    honest = HONEST.endorsements
    for draw in draws(4):
        if member == "collateral":
            changed: Any = either(draw, honest.collateral)
            same = _object(changed) == _object(honest.collateral)
        else:
            table = dict(getattr(honest, member))
            name = draw.choice(sorted(table))
            table[name] = bytes_edit(draw, table[name])
            changed, same = table, table == getattr(honest, member)
        endorsements = dataclasses.replace(honest, **{member: changed})
        assert not answer(HONEST.verify(endorsements=endorsements)).accepted or same


def _object(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


@pytest.mark.parametrize("what", ["release", "deployment", "status"])
def test_hostile_documents_under_good_signatures_raise_nothing(what: str) -> None:
    """An operator or signer who has gone mad can refuse service; he cannot crash a client."""
    key = signer_key() if what == "release" else operator_key()
    honest = getattr(HONEST.evidence, what)
    for draw in draws(5):
        raw = sign(json.loads(honest)["payloadType"], either(draw, payload(honest)), [key])
        changes: dict[str, Any] = {f"{what}_edit": _constant(raw)}
        if what != "status":
            changes["claims_edit"] = _naming(what, digest(raw))
        answer(genuine(**changes).verify())


def _constant(raw: bytes) -> Callable[[bytes], bytes]:
    return lambda _: raw


def _naming(member: str, value: bytes) -> Callable[[Any], Any]:
    return lambda claims: dataclasses.replace(claims, **{member: value})


def test_a_mutated_bundle_is_refused_or_is_the_same() -> None:
    raw = HONEST.bundle()
    for draw in draws(6):
        changed = bytes_edit(draw, raw)
        try:
            assert Bundle.decode(changed).encode() == changed == raw
        except FormatError as err:
            assert err.code in ("FORMAT_CBOR", "FORMAT_BUNDLE")


def test_a_mutated_channel_answer_is_refused_or_says_the_same() -> None:
    proof, first = HONEST.channel(others=2, place=1), HONEST.verify()
    honest = {
        "quote": base64.b64encode(proof.quote).decode(),
        "path": [{"side": side, "hash": base64.b64encode(node).decode()} for side, node in proof.path],
        "gpu": None,
        "binding": "exporter",
    }
    for draw in draws(7):
        raw = either(draw, json.dumps(honest).encode())
        try:
            read = ChannelProof.from_answer(raw, nonce=NONCE, exporter=EXPORTER)
        except FormatError as err:
            assert err.code == "FORMAT_CHANNEL"
            continue
        result = answer(HONEST.verify_channel(read, first=first))
        assert not result.accepted or read == proof


def test_random_claims_of_the_right_shape_raise_nothing() -> None:
    honest = cbor.decode(HONEST.claims.encode(), max_size=1 << 16)
    for draw in draws(8):
        edited = value_edit(draw, honest)
        try:
            raw = cbor.encode(edited)
        except (TypeError, ValueError):
            continue
        quote = HONEST.tee.quote(hashlib.sha256(raw).digest() + bytes(32))
        carried = Leaf.parse(HONEST.evidence.leaf).extension.gpu
        leaf = build_leaf(HONEST.key, shown(raw), quote, carried)
        answer(HONEST.verify(leaf=leaf))


def test_the_honest_evidence_is_accepted_or_nothing_above_means_anything() -> None:
    assert isinstance(HONEST, Genuine)
    assert HONEST.verify().accepted
