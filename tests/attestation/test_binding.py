"""The formulas: recomputed here from the text of the profile, and no two purposes can be taken for each other."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation import binding
from attestation.cbor import encode

K = hashlib.sha384(b"spki").digest()
X, NONCE, SALT = (hashlib.sha256(t).digest() for t in (b"exporter", b"nonce", b"salt"))
G = hashlib.sha384(b"gpu").digest()
CLAIMS = encode({"a": 1})
ACI_KEYSET = "sha256:53a5cd44b30dcc51999754c719f2628a041f174ecbf9662a6f8e898a10cd9371"


def test_report_data_of_a_certificate_is_the_claims_hash_and_zeros() -> None:
    assert binding.report_data(CLAIMS) == hashlib.sha256(CLAIMS).digest() + bytes(32)


def test_gpu_nonce_is_tagged_and_covers_key_time_and_salt() -> None:
    wanted = hashlib.sha256(b"vouchsafe/gpu-nonce/v1" + K + (1_795_000_000).to_bytes(8, "big") + SALT).digest()
    assert binding.gpu_nonce(K, 1_795_000_000, SALT) == wanted


def test_gpu_nonce_of_a_connection_is_another() -> None:
    assert (
        binding.connection_gpu_nonce(K, X, NONCE) == hashlib.sha256(b"vouchsafe/gpu-conn/v1" + K + X + NONCE).digest()
    )


def test_connection_leaf_covers_key_exporter_nonce_claims_and_gpu() -> None:
    claims = hashlib.sha256(CLAIMS).digest()
    wanted = hashlib.sha512(b"vouchsafe/conn/v1" + K + X + NONCE + claims + G).digest()
    assert binding.connection_leaf(K, X, NONCE, CLAIMS, G, "exporter") == wanted
    bare = hashlib.sha512(b"vouchsafe/conn-key/v1" + K + bytes(32) + NONCE + claims + bytes(48)).digest()
    assert binding.connection_leaf(K, None, NONCE, CLAIMS, None, "key") == bare


def test_an_exporter_of_zeros_does_not_give_the_key_binding() -> None:
    exporter = binding.connection_leaf(K, bytes(32), NONCE, CLAIMS, None, "exporter")
    assert exporter != binding.connection_leaf(K, None, NONCE, CLAIMS, None, "key")


@pytest.mark.parametrize(
    "call",
    [
        lambda: binding.gpu_nonce(K[:-1], 0, SALT),
        lambda: binding.gpu_nonce(K, 0, SALT + b"a"),
        lambda: binding.connection_gpu_nonce(K, X + b"a", NONCE),
        lambda: binding.connection_gpu_nonce(K, X, NONCE[:-1]),
        lambda: binding.connection_leaf(K, X[:-1], NONCE, CLAIMS, None, "exporter"),
        lambda: binding.connection_leaf(K, X, NONCE, CLAIMS, G[:-1], "exporter"),
        lambda: binding.connection_leaf(K, None, NONCE, CLAIMS, None, "exporter"),
        lambda: binding.connection_leaf(K, X, NONCE, CLAIMS, None, "key"),
        lambda: binding.merkle_node(bytes(64), bytes(63)),
        lambda: binding.merkle_root(bytes(63), ()),
        lambda: binding.merkle_root(bytes(64), [("left", bytes(64))] * 11),
        lambda: binding.merkle_paths([]),
        lambda: binding.merkle_paths([bytes(64)] * 1025),
    ],
)
def test_a_part_of_another_length_is_refused_never_padded(call: Any) -> None:
    with pytest.raises(ValueError, match=r"part|exporter|path|tree"):
        call()


def test_the_same_bytes_split_differently_give_another_value() -> None:
    one = binding.connection_gpu_nonce(K, X, NONCE)
    assert one != binding.connection_gpu_nonce(K, NONCE, X)


def test_certificate_quotes_begin_with_a_map_and_statements_with_a_brace() -> None:
    """What keeps quotes of one kind from being taken for another: the first byte of every preimage."""
    assert 0xA0 <= CLAIMS[0] <= 0xBF
    assert b"{"[0] == 0x7B
    assert not any(0xA0 <= label[0] <= 0xBF or label[0] == 0x7B for label in (b"vouchsafe/conn/v1",))


@pytest.mark.parametrize(
    ("nonce", "wanted"),
    [
        (bytes(range(32)).hex(), "df2174d28130852b413646a3786927b93e94c11d770268b65def8bdba45cb49e"),
        (None, "0633919ca3f00e97bafaa3304278eb22420cc3ff0d19f87dfca2d3f7508150bc"),
    ],
)
def test_aci_statement_has_the_published_report_data(nonce: str | None, wanted: str) -> None:
    assert binding.statement_report_data(ACI_KEYSET, nonce) == bytes.fromhex(wanted) + bytes(32)


@given(st.integers(1, 17), st.data())
def test_every_leaf_has_a_path_to_the_root_and_no_other_leaf_fits_it(count: int, data: Any) -> None:
    leaves = [hashlib.sha512(bytes([n])).digest() for n in range(count)]
    root, paths = binding.merkle_paths(leaves)
    assert [binding.merkle_root(leaf, path) for leaf, path in zip(leaves, paths, strict=True)] == [root] * count
    assert all(len(p) <= 5 for p in paths)
    at = data.draw(st.integers(0, count - 1))
    foreign = hashlib.sha512(b"foreign").digest()
    assert binding.merkle_root(foreign, paths[at]) != root
    if count > 1:
        other = (at + 1) % count
        assert binding.merkle_root(leaves[other], paths[at]) != root
        side, sibling = paths[at][0]
        turned = [("right" if side == "left" else "left", sibling), *paths[at][1:]]
        assert binding.merkle_root(leaves[at], turned) != root
        assert binding.merkle_root(leaves[at], paths[at][:-1]) != root


def test_a_tree_of_1024_fits_the_longest_path() -> None:
    leaves = [hashlib.sha512(n.to_bytes(2, "big")).digest() for n in range(1024)]
    root, paths = binding.merkle_paths(leaves)
    assert {len(p) for p in paths} == {binding.MAX_PATH}
    assert binding.merkle_root(leaves[777], paths[777]) == root


def test_a_node_is_not_a_leaf() -> None:
    """A node's preimage has its own label: an inner node cannot be shown as somebody's leaf."""
    left, right = bytes(64), bytes([1]) * 64
    assert binding.merkle_node(left, right) == hashlib.sha512(b"vouchsafe/conn-node/v1" + left + right).digest()
    assert binding.merkle_node(left, right) != hashlib.sha512(left + right).digest()
