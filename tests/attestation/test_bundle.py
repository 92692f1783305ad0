"""The bundle: one canonical file; no byte of it can be changed unnoticed."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest

from attestation import cbor
from attestation.bundle import MAX_BUNDLE, Bundle
from attestation.endorsements import Endorsements
from attestation.errors import FormatError
from attestation.evidence import Evidence
from tests.genuine import genuine

SMALL = Bundle(
    Evidence(b"leaf", b"keyset", b"log", b"release", b"", b""),
    Endorsements(b"collateral", {"a": b"1", "b": b"2"}, {"x": b"3"}),
)


def sealed(**changes: Any) -> bytes:
    """A bundle with changed members whose digest fits."""
    body = cbor.decode(SMALL.encode(), max_size=MAX_BUNDLE)
    del body["sha256"]
    body = {k: v for k, v in (body | changes).items() if v is not ...}
    return cbor.encode({**body, "sha256": hashlib.sha256(cbor.encode(body)).digest()})


def refuse(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        Bundle.decode(raw)
    assert caught.value.code in ("FORMAT_BUNDLE", "FORMAT_CBOR")


def test_a_bundle_is_read_back_and_written_the_same() -> None:
    raw = SMALL.encode()
    assert Bundle.decode(raw) == SMALL
    assert Bundle.decode(raw).encode() == raw
    assert Bundle.decode(sealed()) == SMALL


def test_a_genuine_bundle_verifies_offline_from_its_bytes_alone() -> None:
    honest = genuine(name=None)
    read = Bundle.decode(honest.bundle())
    assert (read.evidence, read.endorsements) == (honest.evidence, honest.endorsements)


def test_every_byte_of_a_small_bundle_is_covered() -> None:
    raw = SMALL.encode()
    for at in range(len(raw)):
        for bits in (1, 2, 0x20, 0x80, 0xFF):
            changed = bytearray(raw)
            changed[at] ^= bits
            refuse(bytes(changed))


def test_a_flipped_byte_of_a_genuine_bundle_is_refused_wherever_it_stands() -> None:
    raw = genuine().bundle()
    draw = random.Random(11)
    for at in draw.sample(range(len(raw)), 400):
        changed = bytearray(raw)
        changed[at] ^= draw.randrange(1, 256)
        refuse(bytes(changed))


def test_a_cut_or_longer_bundle_is_refused() -> None:
    raw = SMALL.encode()
    for size in range(len(raw)):
        refuse(raw[:size])
    refuse(raw + b"\0")
    refuse(b"\0" * (MAX_BUNDLE + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"leaf": ...}, {"status": ...}, {"extra": b""}, {"leaf": "text"}, {"leaf": None}, {"deployment": 1},
        {"collateral": {}}, {"rims": []}, {"rims": {"a": "1"}}, {"rims": {"a": None}}, {"ocsp": {"a": {}}},
        {"ocsp": None}, {"rims": {str(i): b"" for i in range(257)}},
    ],
)  # fmt: skip
def test_a_bundle_of_another_shape_is_refused_though_its_digest_fits(changes: dict[str, Any]) -> None:
    refuse(sealed(**changes))


def test_a_bundle_without_its_digest_or_with_another_is_refused() -> None:
    body = cbor.decode(SMALL.encode(), max_size=MAX_BUNDLE)
    refuse(cbor.encode({k: v for k, v in body.items() if k != "sha256"}))
    for wrong in (bytes(32), b"", None, "text", 1):
        refuse(cbor.encode(body | {"sha256": wrong}))


def test_a_bundle_that_nobody_could_read_is_never_written() -> None:
    with pytest.raises(FormatError):
        Bundle(SMALL.evidence, Endorsements(bytes(MAX_BUNDLE))).encode()
    with pytest.raises(FormatError):
        Bundle(SMALL.evidence, Endorsements(b"", {str(i): b"" for i in range(257)})).encode()
