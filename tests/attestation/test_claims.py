"""Claims: one encoding, every key required, no other known, each of its own type, size and order."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation import cbor
from attestation.claims import Claims, GpuNonce, GpuStateClaim, ModelClaim
from attestation.errors import FormatError

HONEST = Claims(
    key_hash=b"k" * 48,
    not_before=1_795_000_000,
    not_after=1_795_003_600,
    dns_names=("a.test", "b.test"),
    boot_id=b"b" * 16,
    release=b"r" * 32,
    deployment=b"d" * 32,
    config=b"c" * 32,
    event_log=b"e" * 48,
    gpu=b"g" * 48,
    gpu_nonce=GpuNonce(1_794_999_990, b"s" * 32),
    gpu_state=GpuStateClaim(1, 0, "spt", True, False, True, True),
    keyset=b"y" * 32,
    role="both",
    models=(ModelClaim("parrot", "sha256:" + "0a" * 32), ModelClaim("org/m-2:x", "verity-sha256:" + "0b" * 32)),
)


def top(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = cbor2.loads(HONEST.encode())
    return value | {k.replace("_", "-"): v for k, v in changes.items()}


def refuse(value: object, code: str = "FORMAT_CLAIMS") -> None:
    raw = cbor.encode(value)
    with pytest.raises(FormatError) as caught:
        Claims.decode(raw)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "claims",
    [
        HONEST,
        dataclasses.replace(HONEST, gpu=None, gpu_nonce=None, gpu_state=None),
        dataclasses.replace(HONEST, deployment=None, models=(), role="gateway"),
    ],
)
def test_claims_decode_to_what_was_encoded(claims: Claims) -> None:
    assert Claims.decode(claims.encode()) == claims


KEYS = sorted(cbor2.loads(HONEST.encode()))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_required(key: str) -> None:
    value = top()
    del value[key]
    refuse(value)


def test_an_unknown_key_is_refused() -> None:
    refuse(top() | {"note": 1})


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("wrong", [1.5, True, -1, "", b"", [], {}, [[]], "x" * 300, b"x" * 300, 2**63])
def test_each_key_has_one_type(key: str, wrong: Any) -> None:
    if isinstance(wrong, float):
        raw = cbor2.dumps(top() | {key: wrong}, canonical=True)
        with pytest.raises(FormatError):
            Claims.decode(raw)
    elif (key, wrong) == ("models", []):
        assert Claims.decode(cbor.encode(top(models=[]))).models == ()
    else:
        inner = key == "pubkey-hash" and isinstance(wrong, bytes)  # CBOR inside CBOR
        refuse(top() | {key: wrong}, "FORMAT_CBOR" if inner else "FORMAT_CLAIMS")


@pytest.mark.parametrize("key", [k for k in KEYS if k not in ("deployment", "gpu", "gpu-nonce", "gpu-state")])
def test_null_stands_only_where_the_profile_says_so(key: str) -> None:
    refuse(top() | {key: None})


@pytest.mark.parametrize("key", ["boot-id", "release", "deployment", "config", "event-log", "gpu", "keyset"])
def test_each_digest_has_its_length(key: str) -> None:
    value = top()
    refuse(top() | {key: value[key] + b"x"})
    refuse(top() | {key: value[key][:-1]})


@pytest.mark.parametrize(
    "gone",
    [("gpu",), ("gpu-nonce",), ("gpu-state",), ("gpu", "gpu-nonce"), ("gpu-nonce", "gpu-state"), ("gpu", "gpu-state")],
)
def test_gpu_claims_stand_together_or_not_at_all(gone: tuple[str, ...]) -> None:
    refuse(top() | dict.fromkeys(gone))


@pytest.mark.parametrize(
    "names",
    [
        ["b.test", "a.test"], ["a.test", "a.test"], ["*.test"], ["A.test"], ["a..test"], [".test"], ["a.test."],
        ["-a.test"], ["a-.test"], ["ä.test"], ["a_b.test"], ["a.test\n"], ["a" * 64 + ".test"], ["a." * 127 + "test"],
        ["a b"], [f"n{i:02}.test" for i in range(17)], [b"a.test"], [],
    ],
)  # fmt: skip
def test_names_are_sorted_lower_case_labels_without_wildcards(names: list[Any]) -> None:
    refuse(top(dns_names=names))


@pytest.mark.parametrize(
    "value",
    [
        cbor.encode([8, b"k" * 48]), cbor.encode([7, b"k" * 47]), cbor.encode([7, b"k" * 48, 1]), cbor.encode([7]),
        cbor.encode([True, b"k" * 48]), cbor.encode({"7": b"k" * 48}), cbor.encode(7),
    ],
)  # fmt: skip
def test_the_key_hash_is_sha384_in_the_ccc_form(value: bytes) -> None:
    refuse(top(pubkey_hash=value))


def test_the_key_hash_inside_is_deterministic_cbor_too() -> None:
    refuse(top(pubkey_hash=b"\x82\x18\x07" + cbor.encode(b"k" * 48)), "FORMAT_CBOR")


@pytest.mark.parametrize(
    "changes",
    [
        {"profile": "urn:uuid:00000000-0000-0000-0000-000000000000"}, {"not_after": 1_795_000_000}, {"role": "admin"},
        {"role": ["both"]}, {"not_before": 2**53}, {"gpu_nonce": {"issued-at": 1}},
        {"gpu_nonce": {"issued-at": 1, "salt": b"s" * 31}}, {"gpu_nonce": {"issued-at": True, "salt": b"s" * 32}},
        {"models": [{"id": "a"}]}, {"models": [{"id": "a", "weights": "sha256:" + "0A" * 32}]},
        {"models": [{"id": "a", "weights": "md5:" + "0a" * 16}]},
        {"models": [{"id": "a", "weights": "sha256:" + "0a" * 32 + "\n"}]},
        {"models": [{"id": "", "weights": "sha256:" + "0a" * 32}]},
        {"models": [{"id": "a b", "weights": "sha256:" + "0a" * 32}]},
        {"models": [{"id": "a", "weights": "sha256:" + "0a" * 32}] * 2},
        {"models": [{"id": f"m{i}", "weights": "sha256:" + "0a" * 32} for i in range(17)]},
    ],
)  # fmt: skip
def test_values_out_of_their_range_are_refused(changes: dict[str, Any]) -> None:
    refuse(top(**changes))


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("count", True), ("count", -1), ("switches", "0"), ("mode", "off"), ("mode", None), ("cc", 1), ("dev-tools", 0),
        ("ready", "yes"), ("production", None), ("extra", 1),
    ],
)  # fmt: skip
def test_the_driver_state_is_exact(key: str, wrong: Any) -> None:
    refuse(top(gpu_state=top()["gpu-state"] | {key: wrong}))


def test_claims_that_decode_would_refuse_are_never_encoded() -> None:
    for changes in ({"key_hash": b"k"}, {"dns_names": ()}, {"role": "admin"}, {"gpu": None}):
        with pytest.raises(FormatError):
            dataclasses.replace(HONEST, **changes).encode()


@given(st.integers(0, len(HONEST.encode()) - 1), st.integers(1, 255))
@settings(max_examples=300)
def test_a_changed_byte_is_refused_or_means_other_claims(at: int, bits: int) -> None:
    raw = bytearray(HONEST.encode())
    raw[at] ^= bits
    with contextlib.suppress(FormatError):
        assert Claims.decode(bytes(raw)) != HONEST
