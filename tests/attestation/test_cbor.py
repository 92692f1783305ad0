"""Deterministic CBOR: one encoding of every value, and nothing a peer sends takes long or raises anything else."""

from __future__ import annotations

import time
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation import cbor
from attestation.errors import FormatError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.binary(max_size=40)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcXYZ-", max_size=30), inner, max_size=4),
    max_leaves=12,
)


def refuse(raw: bytes, **options: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        cbor.decode(raw, max_size=options.pop("max_size", 1 << 20), **options)
    assert caught.value.code == "FORMAT_CBOR"
    return caught.value


@given(VALUES)
def test_what_is_encoded_decodes_to_the_same_value(value: Any) -> None:
    raw = cbor.encode(value)
    assert cbor.decode(raw, max_size=len(raw), max_depth=40) == value


@given(st.binary(max_size=60))
@settings(max_examples=400)
def test_random_bytes_are_one_encoding_or_a_format_error(raw: bytes) -> None:
    try:
        value = cbor.decode(raw, max_size=100)
    except FormatError as err:
        assert err.code == "FORMAT_CBOR"
        return
    assert cbor.encode(value) == raw


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "empty"),
        (b"\x18\x17", "23 in two bytes"),
        (b"\x19\x00\xff", "255 in three bytes"),
        (b"\x1b\x00\x00\x00\x00\xff\xff\xff\xff", "32 bits in nine bytes"),
        (b"\x58\x01a", "a short byte string with a long head"),
        (b"\x5f\x41a\xff", "indefinite bytes"),
        (b"\x9f\x01\xff", "indefinite array"),
        (b"\xbf\x61a\x01\xff", "indefinite map"),
        (b"\xa2\x61b\x01\x61a\x02", "keys out of order"),
        (b"\xa2\x62aa\x01\x61b\x02", "a longer key first"),
        (b"\xa2\x61a\x01\x61a\x02", "a key twice"),
        (b"\xa1\x01\x02", "a key that is no text"),
        (b"\xa1\x41a\x02", "a key of bytes"),
        (b"\xf9\x3c\x00", "half float"),
        (b"\xfb\x3f\xf0\x00\x00\x00\x00\x00\x00", "double"),
        (b"\xf7", "undefined"),
        (b"\xe0", "simple value 0"),
        (b"\xf8\x20", "simple value 32"),
        (b"\xf8\x14", "false in two bytes"),
        (b"\xff", "break"),
        (b"\x1c", "reserved"),
        (b"\x01\x02", "something after the item"),
        (b"\x61\xff", "text that is not UTF-8"),
        (b"\x62\xc0\x80", "overlong UTF-8"),
        (b"\x63\xed\xa0\x80", "a surrogate in UTF-8"),
        (b"\x42a", "shorter than its head says"),
        (b"\x82\x01", "an element is missing"),
        (b"\xa1\x61a", "a value is missing"),
        (b"\xc0\x61a", "tag 0"),
        (b"\xc2\x41\x01", "a bignum"),
        (b"\xd8\x1c\x81\xd8\x1d\x00", "a shared reference to itself"),
        (b"\xd9\xea\x60\x01", "tag 60000 that nobody allowed"),
        (b"\x5b\xff\xff\xff\xff\xff\xff\xff\xff", "2^64 bytes announced"),
        (b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff", "2^63 elements announced"),
        (b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff", "2^64 pairs announced"),
    ],
)
def test_what_has_another_spelling_is_refused(raw: bytes, why: str) -> None:
    refuse(raw)


def test_a_tag_is_read_where_the_caller_names_it_and_nowhere_else() -> None:
    raw = cbor.encode(cbor2.CBORTag(60000, [b"a"]))
    assert cbor.decode(raw, max_size=100, tags=frozenset({60000})).value == (b"a",)
    assert "tag" in refuse(raw, tags=frozenset({60001})).reason


@pytest.mark.parametrize("raw", [b"\x42a", b"\x5b" + b"\xff" * 8, b"\x9b\x7f" + b"\xff" * 7, b"\xbb" + b"\xff" * 8])
def test_a_length_beyond_the_input_is_named_as_that(raw: bytes) -> None:
    assert refuse(raw).reason == "a length beyond the input"


def test_what_follows_the_item_is_named_as_that() -> None:
    assert refuse(b"\x01\x02").reason == "bytes after the item"


def test_depth_beyond_the_cap_is_refused_without_recursion() -> None:
    assert cbor.decode(b"\x81" * 8 + b"\x01", max_size=100)
    assert "deep" in refuse(b"\x81" * 9 + b"\x01").reason
    refuse(b"\x81" * 500_000 + b"\x01")


def test_more_items_than_the_cap_are_refused_at_once() -> None:
    begun = time.perf_counter()
    assert "items" in refuse(b"\x9a" + (4_000_000).to_bytes(4, "big") + bytes(4_000_000), max_size=1 << 23).reason
    assert time.perf_counter() - begun < 1


def test_a_document_longer_than_the_cap_is_refused_before_it_is_read() -> None:
    assert "long" in refuse(b"\xff" * 11, max_size=10).reason


@pytest.mark.parametrize("value", [1.5, 2**64, -(2**64) - 1, {1: 2}, {b"a": 1}, object(), {"a": {1, 2}}])
def test_our_own_values_without_an_encoding_are_a_type_error(value: object) -> None:
    with pytest.raises(TypeError):
        cbor.encode(value)
