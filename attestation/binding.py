"""Every formula that ties one thing to another (ratls facts §3.4). Nothing else computes a REPORTDATA or a GPU nonce.

Each part has a fixed length and each purpose its own label, so no two inputs give the same string, and no quote of one
kind can be taken for another: preimages of certificate quotes begin with a CBOR map byte (0xa0 to 0xbf), those of
`aci/1` statements with `{`, those of connection leaves and nodes with our labels.

k is SHA-384 of the leaf's SubjectPublicKeyInfo (DER), the one key hash used everywhere. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Final, Literal

__all__ = [
    "EXPORTER_LABEL",
    "EXPORTER_SIZE",
    "MAX_PATH",
    "connection_gpu_nonce",
    "connection_leaf",
    "gpu_digest",
    "gpu_nonce",
    "key_hash",
    "merkle_node",
    "merkle_paths",
    "merkle_root",
    "report_data",
    "statement_report_data",
]

EXPORTER_LABEL: Final = b"EXPORTER-vouchsafe-conn-v1"
EXPORTER_SIZE: Final = 32
MAX_PATH: Final = 10
"""Longest Merkle path a verifier walks: one quote serves at most 1024 waiting connections."""

Side = Literal["left", "right"]


def key_hash(spki: bytes) -> bytes:
    """k: SHA-384 of a DER SubjectPublicKeyInfo."""
    return hashlib.sha384(spki).digest()


def gpu_digest(carried: bytes) -> bytes:
    """SHA-384 of GPU evidence as carried (compressed): checked before anything is inflated."""
    return hashlib.sha384(carried).digest()


def gpu_nonce(k: bytes, issued_at: int, salt: bytes) -> bytes:
    """The one nonce of all devices of one certificate: 32 bytes that no client chose."""
    return hashlib.sha256(b"vouchsafe/gpu-nonce/v1" + _fixed(k, 48) + _u64(issued_at) + _fixed(salt, 32)).digest()


def report_data(claims: bytes) -> bytes:
    """REPORTDATA of a certificate's quote, 64 bytes: SHA-256 of the claims as carried, then zeros (CCC RA-TLS)."""
    return hashlib.sha256(claims).digest() + bytes(32)


def connection_gpu_nonce(k: bytes, exporter: bytes, nonce: bytes) -> bytes:
    """Nonce for GPU evidence made for one connection, 32 bytes."""
    parts = _fixed(k, 48) + _fixed(exporter, EXPORTER_SIZE) + _fixed(nonce, 32)
    return hashlib.sha256(b"vouchsafe/gpu-conn/v1" + parts).digest()


def connection_leaf(
    k: bytes,
    exporter: bytes | None,
    nonce: bytes,
    claims: bytes,
    fresh_gpu: bytes | None,
    binding: Literal["exporter", "key"],
) -> bytes:
    """What a connection's quote commits to, 64 bytes.

    exporter    32 bytes of this connection's TLS exporter; None exactly for binding `key`
    nonce       32 bytes that the client drew for this connection
    claims      the claims of this connection's certificate as carried
    fresh_gpu   SHA-384 of GPU evidence made for this connection, or None
    """
    if (exporter is None) != (binding == "key"):
        raise ValueError("the exporter is given exactly for the exporter binding")
    label = {"exporter": b"vouchsafe/conn/v1", "key": b"vouchsafe/conn-key/v1"}[binding]
    x = bytes(EXPORTER_SIZE) if exporter is None else _fixed(exporter, EXPORTER_SIZE)
    g = bytes(48) if fresh_gpu is None else _fixed(fresh_gpu, 48)
    parts = _fixed(k, 48) + x + _fixed(nonce, 32) + hashlib.sha256(claims).digest() + g
    return hashlib.sha512(label + parts).digest()


def merkle_node(left: bytes, right: bytes) -> bytes:
    """Parent of two 64-byte nodes."""
    return hashlib.sha512(b"vouchsafe/conn-node/v1" + _fixed(left, 64) + _fixed(right, 64)).digest()


def merkle_root(leaf: bytes, path: Sequence[tuple[Side, bytes]]) -> bytes:
    """Root above *leaf*; *path* lists (side of the sibling, sibling), lowest first."""
    if len(path) > MAX_PATH:
        raise ValueError("a Merkle path is too long")
    node = _fixed(leaf, 64)
    for side, sibling in path:
        node = merkle_node(sibling, node) if side == "left" else merkle_node(node, sibling)
    return node


def merkle_paths(leaves: Sequence[bytes]) -> tuple[bytes, list[list[tuple[Side, bytes]]]]:
    """Root over *leaves* (1 to 1024 of them) and each leaf's path. A node without a sibling moves up unchanged."""
    if not 1 <= len(leaves) <= 1 << MAX_PATH:
        raise ValueError("a tree has 1 to 1024 leaves")
    level = [_fixed(leaf, 64) for leaf in leaves]
    at = list(range(len(leaves)))
    paths: list[list[tuple[Side, bytes]]] = [[] for _ in leaves]
    while len(level) > 1:
        for i, position in enumerate(at):
            sibling = position ^ 1
            if sibling < len(level):
                paths[i].append(("left" if sibling < position else "right", level[sibling]))
            at[i] = position >> 1
        level = [
            merkle_node(level[i], level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)
        ]
    return level[0], paths


def statement_report_data(keyset_digest: str, nonce: str | None) -> bytes:
    """REPORTDATA of an `aci/1` attestation report, 64 bytes.

    keyset_digest   `sha256:<hex>`;  nonce   64 lower-case hex digits, or None for the cacheable form
    """
    statement = {"keyset_digest": keyset_digest, "nonce": nonce, "purpose": "aci.report_data.v1"}
    return hashlib.sha256(json.dumps(statement, separators=(",", ":")).encode()).digest() + bytes(32)


def _fixed(value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise ValueError(f"a part of a binding must have {size} bytes, not {len(value)}")
    return value


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "big")
