"""DSSE: a signature covers type and bytes, each pinned key counts once, and the envelope has one strict form."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from attestation.dsse import MAX_ENVELOPE, Envelope, key_id, public_bytes, sign, small_order
from attestation.errors import FormatError

KEYS = [Ed25519PrivateKey.generate() for _ in range(3)]
PINNED = [public_bytes(k) for k in KEYS]
TYPE, PAYLOAD = "application/vnd.example+json", b'{"a": 1}'


def opened(raw: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(raw)
    return value


def closed(**changes: Any) -> bytes:
    return json.dumps(opened(sign(TYPE, PAYLOAD, KEYS[:1])) | changes).encode()


def refuse(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        Envelope.parse(raw)
    assert caught.value.code == "FORMAT_DSSE"


def test_who_signed_is_told_and_nobody_else() -> None:
    envelope = Envelope.parse(sign(TYPE, PAYLOAD, KEYS[:2]))
    assert (envelope.payload_type, envelope.payload) == (TYPE, PAYLOAD)
    assert envelope.signers(PINNED) == frozenset(PINNED[:2])
    assert envelope.signers(PINNED[2:]) == frozenset()
    assert envelope.signers([]) == frozenset()


def test_the_signature_covers_the_encoding_of_the_specification() -> None:
    """The example of the DSSE protocol: PAE over type and payload with their lengths."""
    message = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    signature = base64.b64encode(KEYS[0].sign(message)).decode()
    raw = {
        "payloadType": "http://example.com/HelloWorld",
        "payload": base64.b64encode(b"hello world").decode(),
        "signatures": [{"sig": signature}],
    }
    assert Envelope.parse(json.dumps(raw).encode()).signers(PINNED) == frozenset(PINNED[:1])


def test_one_key_never_counts_twice() -> None:
    once = opened(sign(TYPE, PAYLOAD, KEYS[:1]))["signatures"][0]
    again = opened(sign(TYPE, PAYLOAD, KEYS[:1]))["signatures"][0] | {"keyid": key_id(PINNED[1])}
    envelope = Envelope.parse(closed(signatures=[once, once, again]))
    assert len(envelope.signers(PINNED)) == 1
    assert len(envelope.signers([*PINNED, *PINNED])) == 1


def test_a_key_id_decides_nothing() -> None:
    signatures = opened(sign(TYPE, PAYLOAD, KEYS[:1]))["signatures"]
    signatures[0]["keyid"] = "somebody else"
    assert Envelope.parse(closed(signatures=signatures)).signers(PINNED) == frozenset(PINNED[:1])


@pytest.mark.parametrize("changes", [{"payloadType": TYPE + "x"}, {"payload": base64.b64encode(b'{"a": 2}').decode()}])
def test_another_type_or_payload_under_the_same_signature_has_no_signer(changes: dict[str, Any]) -> None:
    assert Envelope.parse(closed(**changes)).signers(PINNED) == frozenset()


def test_length_prefixes_keep_type_and_payload_apart() -> None:
    moved = sign(TYPE + " 8 x", PAYLOAD, KEYS[:1])
    signatures = opened(moved)["signatures"]
    assert Envelope.parse(closed(signatures=signatures)).signers(PINNED) == frozenset()


SIG = opened(sign(TYPE, PAYLOAD, KEYS[:1]))["signatures"][0]["sig"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b"null", b"\xff", sign(TYPE, PAYLOAD, KEYS)[:-1], sign(TYPE, PAYLOAD, KEYS) + b"}",
        closed(extra=1), closed(payload=None), closed(payload=7), closed(payloadType=7), closed(payloadType=None),
        closed(payload="eyJh"[:-1]), closed(payload="eyJ*"), closed(payload="eyJh\n"), closed(payload="eyI="),
        closed(payload="eyK="), closed(signatures=None), closed(signatures={}), closed(signatures=[1]),
        closed(signatures=[{}]), closed(signatures=[{"sig": 1}]), closed(signatures=[{"sig": SIG, "cert": ""}]),
        closed(signatures=[{"sig": SIG, "keyid": 1}]), closed(signatures=[{"sig": SIG[:-4]}]),
        closed(signatures=[{"sig": ""}]), closed(signatures=[{"sig": SIG}] * 33), closed(payloadType="\ud800"),
        sign(TYPE, PAYLOAD, KEYS).replace(b'"payloadType"', b'"payload":"","payloadType"', 1),
        b" " * (MAX_ENVELOPE + 1), b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_envelope_is_refused(raw: bytes) -> None:
    if b'"eyI="' in raw:  # the canonical spelling of two bytes; the case after it has a stray bit
        assert Envelope.parse(raw).payload == b'{"'
    else:
        refuse(raw)


@given(st.integers(0, len(sign(TYPE, PAYLOAD, KEYS[:1])) - 1), st.integers(1, 255))
def test_a_changed_byte_never_leaves_a_signer_of_other_bytes(at: int, bits: int) -> None:
    raw = bytearray(sign(TYPE, PAYLOAD, KEYS[:1]))
    raw[at] ^= bits
    try:
        envelope = Envelope.parse(bytes(raw))
    except FormatError:
        return
    if envelope.signers(PINNED):
        assert (envelope.payload_type, envelope.payload) == (TYPE, PAYLOAD)


def test_under_a_key_of_small_order_anybody_signs_and_we_know_those_keys() -> None:
    """32 zero bytes look like a placeholder. The forger tries messages until one fits: here, 64 at most."""
    neutral = bytes([1]) + bytes(31)
    points = [neutral, bytes(32), bytes(31) + b"\x80", b"\xec" + b"\xff" * 30 + b"\x7f"]
    weak = Ed25519PublicKey.from_public_bytes(bytes(32))
    forged = 0
    for number in range(64):
        for point in points:
            try:
                weak.verify(point + bytes(32), b"message %d" % number)
            except Exception:
                continue
            forged += 1
    assert forged > 0
    assert all(small_order(p) for p in points)
    assert not any(small_order(p) for p in PINNED)


def test_the_list_of_small_order_points_is_complete() -> None:
    """Recomputed: a point P is weak exactly when 8·P is the neutral element."""
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p

    def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        product = d * a[0] * b[0] * a[1] * b[1] % p
        x = (a[0] * b[1] + a[1] * b[0]) * pow(1 + product, -1, p) % p
        y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, p) % p
        return x, y

    def weak(y: int) -> bool:
        """Whether both points of this y lie in the subgroup of order 8."""
        square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
        root = pow(square, (p + 3) // 8, p)
        root = root if root * root % p == square else root * pow(2, (p - 1) // 4, p) % p
        if root * root % p != square:
            return False
        point = (root, y % p)
        for _ in range(3):
            point = add(point, point)
        return point == (0, 1)

    from attestation.dsse import _SMALL_ORDER

    assert all(weak(y) for y in _SMALL_ORDER)
    reduced = {y % p for y in _SMALL_ORDER}
    assert len(reduced) == 5  # y = 0, 1, -1 and ± that of order 8: the eight points, by sign of x
    non_canonical = {y for y in (0, 1, p - 1, *reduced) if y + p < 2**255}
    assert {y + p for y in non_canonical} <= _SMALL_ORDER
