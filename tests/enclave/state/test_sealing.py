"""The sealed format, byte for byte, computed here a second time; sizes; checkpoints."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from hypothesis import given
from hypothesis import strategies as st

from enclave.state import MAX_RECORD, Checkpoint, StateError
from enclave.state.sealing import SIZES, Header, Sealer, next_head
from tests.enclave.state.stored import KEY, NOW, OTHER_KEY

ID = bytes(range(16))
HEAD = hashlib.sha256(b"some head").digest()


def hkdf(key: bytes, info: bytes, salt: bytes) -> bytes:
    """RFC 5869, one block: written out, so that it is not the library that the code uses."""
    pseudorandom = hmac.digest(salt, key, "sha256")
    return hmac.digest(pseudorandom, info + b"\x01", "sha256")


def open_by_hand(seq: int, head: bytes, blob: bytes) -> bytes:
    aead = AESGCMSIV(hkdf(KEY, b"vouchsafe/state-record-key/v1", ID))
    data = b"vouchsafe/state-record/v1\x00" + ID + seq.to_bytes(8, "big") + head
    return aead.decrypt(blob[:12], blob[12:], data)


def test_header_is_what_the_format_says() -> None:
    raw = Header(ID, NOW).seal(KEY)
    body = b"vouchsafe/state\x00" + b"\x00\x01" + ID + NOW.to_bytes(8, "big")
    assert raw == body + hmac.digest(hkdf(KEY, b"vouchsafe/state-header-key/v1", bytes(32)), body, "sha256")
    assert Header.open(KEY, raw) == Header(ID, NOW)


def test_record_is_what_the_format_says() -> None:
    blob = Sealer(KEY, ID).seal(7, HEAD, b"entry", more=True)
    text = open_by_hand(7, HEAD, blob)
    assert text == b"\x01" + b"\x00\x00\x00\x05" + b"entry" + bytes(507)
    assert next_head(HEAD, blob) == hashlib.sha256(b"vouchsafe/state-head/v1\x00" + HEAD + blob).digest()


def test_sizes_are_three_and_tell_no_more() -> None:
    sealer = Sealer(KEY, ID)
    lengths = [0, 1, 511, 512, 513, 4096, 4097, MAX_RECORD]
    sizes = [len(sealer.seal(1, HEAD, b"x" * n, more=False)) - 33 for n in lengths]
    assert sizes == [512, 512, 512, 512, 4096, 4096, 65536, 65536]
    assert set(sizes) == set(SIZES)
    with pytest.raises(StateError, match="STATE_TOO_LONG"):
        sealer.seal(1, HEAD, b"x" * (MAX_RECORD + 1), more=False)


def test_two_seals_of_the_same_record_in_the_same_place_differ() -> None:
    sealer = Sealer(KEY, ID)
    assert sealer.seal(1, HEAD, b"x", more=False) != sealer.seal(1, HEAD, b"x", more=False)


@given(st.binary(max_size=5000), st.booleans(), st.integers(1, 2**62))
def test_what_was_sealed_opens(record: bytes, more: bool, seq: int) -> None:
    sealer = Sealer(KEY, ID)
    assert sealer.open(seq, HEAD, sealer.seal(seq, HEAD, record, more=more)) == (record, more)


@pytest.mark.parametrize("what", ["key", "id", "seq", "head", "size"])
def test_record_opens_only_where_it_lies(what: str) -> None:
    blob = Sealer(KEY, ID).seal(7, HEAD, b"entry", more=False)
    sealer = Sealer(OTHER_KEY if what == "key" else KEY, bytes(16) if what == "id" else ID)
    with pytest.raises(StateError) as caught:
        sealer.open(8 if what == "seq" else 7, bytes(32) if what == "head" else HEAD, blob[what == "size" :])
    assert caught.value.code == "STATE_RECORD"
    assert "entry" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"\x02" + b"\x00\x00\x00\x05" + b"entry" + bytes(507),
        b"\x00" + b"\x00\x00\x00\x05" + b"entry" + bytes(506) + b"\x01",
        b"\x00" + b"\x00\x00\x02\x01" + bytes(512),
        b"\x00" + b"\xff\xff\xff\xff" + bytes(512),
        b"\x00" + b"\x00\x00\x00\x05" + b"entry" + bytes(4091),
    ],
    ids=["flag", "padding", "length", "long", "size"],
)
def test_record_in_another_form_is_refused_even_under_the_key(text: bytes) -> None:
    aead = AESGCMSIV(hkdf(KEY, b"vouchsafe/state-record-key/v1", ID))
    data = b"vouchsafe/state-record/v1\x00" + ID + (7).to_bytes(8, "big") + HEAD
    with pytest.raises(StateError, match="STATE_RECORD"):
        Sealer(KEY, ID).open(7, HEAD, bytes(12) + aead.encrypt(bytes(12), text, data))


@given(st.binary(max_size=700), st.sampled_from([b"", Header(ID, NOW).seal(KEY)[:18]]))
def test_bytes_of_the_hosts_choosing_are_refused_by_code(raw: bytes, start: bytes) -> None:
    with pytest.raises(StateError, match=r"STATE_(HEADER|KEY)"):
        Header.open(KEY, start + raw)
    with pytest.raises(StateError, match="STATE_RECORD"):
        Sealer(KEY, ID).open(1, HEAD, raw.ljust(545, b"x") if start else raw)


def test_sealer_has_no_text_copy_or_pickle() -> None:
    sealer = Sealer(KEY, ID)
    assert repr(sealer) == "<Sealer>"
    for leave in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            leave(sealer)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Sealer(bytes(size), ID)
    with pytest.raises(ValueError, match="32 bytes"):
        Header(ID, NOW).seal(bytes(size))


def test_checkpoint_has_one_form() -> None:
    point = Checkpoint(ID, 7, HEAD)
    assert point.encode() == ID + (7).to_bytes(8, "big") + HEAD
    assert Checkpoint.decode(point.encode()) == point
    for raw in (b"", point.encode()[:-1], point.encode() + b"\x00", ID + b"\xff" * 8 + HEAD):
        with pytest.raises(ValueError, match="checkpoint"):
            Checkpoint.decode(raw)
