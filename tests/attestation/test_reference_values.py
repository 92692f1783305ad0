"""Release manifests: what is not exactly one is refused, so that no register, date or root is read by chance."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from attestation.errors import FormatError
from attestation.reference_values import MAX_MANIFEST, ReleaseManifest, new_manifest

WEIGHTS = [("parrot", "sha256:" + "0a" * 32, "verity-sha256:" + "0b" * 32), ("other", "sha256:" + "0c" * 32, None)]
PAYLOAD = new_manifest(
    name="cvm", version="1", source_commit="c" * 40, subjects=[("a", bytes(32))], mrtd=b"m" * 48,
    rtmrs=[[b"0" * 48, b"a" * 48], [b"1" * 48], [b"2" * 48]], td_attributes=[0x10000000], xfam=[0x600E7],
    mrseam=[b"s" * 48], drivers=["550.90.07"], vbios=["96.00"], weights=WEIGHTS,
    not_before=datetime(2026, 1, 1, tzinfo=UTC), max_age_days=30,
)  # fmt: skip


def changed(path: str, value: Any) -> bytes:
    top = json.loads(PAYLOAD)
    *parents, last = path.split(".")
    table = top
    for parent in parents:
        table = table[int(parent)] if parent.isdigit() else table[parent]
    if value is ...:
        del table[last]
    else:
        table[int(last) if last.isdigit() else last] = value
    return json.dumps(top).encode()


def test_a_manifest_says_what_was_put_in() -> None:
    m = ReleaseManifest.parse(PAYLOAD)
    assert (m.mrtd, m.rtmr0) == (frozenset({b"m" * 48}), frozenset({b"0" * 48, b"a" * 48}))
    assert (m.td_attributes, m.xfam, m.mrseam) == ({0x10000000}, {0x600E7}, {b"s" * 48})
    assert m.weights["parrot"] == {"sha256:" + "0a" * 32, "verity-sha256:" + "0b" * 32}
    assert m.not_after - m.not_before == 30 * 86400
    assert m.not_before == 1767225600


def test_members_that_only_auditors_read_may_stand_beside() -> None:
    assert ReleaseManifest.parse(changed("predicate.source", {"anything": [1.5]}))


DIGEST = "0d" * 48


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"), ("_type", ...), ("predicateType", "https://slsa.dev"),
        ("predicate", []), ("predicate", ...), ("predicate.image", None), ("predicate.tdx", ...),
        ("predicate.gpu", ...), ("predicate.image.version", ""), ("predicate.image.version", 1),
        ("predicate.image.name", "x" * 257), ("predicate.tdx.mrtd", None), ("predicate.tdx.mrtd", ...),
        ("predicate.tdx.mrtd", []), ("predicate.tdx.mrtd", DIGEST[:-2]), ("predicate.tdx.mrtd", DIGEST.upper()),
        ("predicate.tdx.mrtd", [DIGEST] * 65), ("predicate.tdx.mrtd", DIGEST + "\n"), ("predicate.tdx.mrtd", {}),
        ("predicate.tdx.rtmr", [DIGEST] * 3), ("predicate.tdx.rtmr", [DIGEST] * 4), ("predicate.tdx.rtmr.0", []),
        ("predicate.tdx.rtmr.1", None), ("predicate.tdx.rtmr.2", "*"), ("predicate.tdx.rtmr", None),
        ("predicate.tdx.tdAttributes", ["10000000"]), ("predicate.tdx.tdAttributes", [268435456]),
        ("predicate.tdx.tdAttributes", ...), ("predicate.tdx.xfamAllowed", "0x600e7"),
        ("predicate.tdx.xfamAllowed", ["0x" + "f" * 17]), ("predicate.tdx.moduleAllowList", [DIGEST, 1]),
        ("predicate.tdx.moduleAllowList", [[DIGEST]]), ("predicate.gpu.driver", [""]), ("predicate.gpu.driver", [1]),
        ("predicate.gpu.driver", ["1"] * 257), ("predicate.gpu.vbios", "96"), ("predicate.weights", {}),
        ("predicate.weights", [1]), ("predicate.weights", ...), ("predicate.weights.0.model", ...),
        ("predicate.weights.0.fileListDigest", []), ("predicate.weights.0.fileListDigest", {}),
        ("predicate.weights.0.fileListDigest", "sha256:" + "0A" * 32), ("predicate.weights.0.rootHash", [1]),
        ("predicate.weights.0.rootHash", "sha256:" + "0a" * 32), ("predicate.weights.1.fileListDigest", ...),
        ("predicate.weights.1.model", "parrot"), ("predicate.notBefore", 1767225600), ("predicate.notBefore", ""),
        ("predicate.notBefore", "2026-01-01"), ("predicate.notBefore", "2026-01-01T00:00:00"),
        ("predicate.notBefore", "2026-W01-1T00:00:00Z"), ("predicate.notBefore", "2026-13-01T00:00:00Z"),
        ("predicate.notBefore", "0001-01-01T00:00:00+14:00"), ("predicate.notBefore", "\uff19999-01-01T00:00:00Z"),
        ("predicate.maxAgeDays", 0), ("predicate.maxAgeDays", 3651), ("predicate.maxAgeDays", True),
        ("predicate.maxAgeDays", 1.5), ("predicate.maxAgeDays", "30"), ("predicate.maxAgeDays", ...),
    ],
)  # fmt: skip
def test_a_manifest_with_another_value_is_refused(path: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        ReleaseManifest.parse(changed(path, value))
    assert caught.value.code == "FORMAT_RELEASE"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"\xff", b"{", b"[" * 100_000, PAYLOAD.replace(b'"predicateType"', b'"_type": "", "predicateType"'),
        PAYLOAD.replace(b'"maxAgeDays": 30', b'"maxAgeDays": 30, "maxAgeDays": 3000'),
        PAYLOAD.replace(b'"maxAgeDays": 30', b'"maxAgeDays": ' + b"9" * 5000), b" " * (MAX_MANIFEST + 1) + PAYLOAD,
    ],
)  # fmt: skip
def test_what_is_no_json_of_ours_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        ReleaseManifest.parse(raw)
    assert caught.value.code == "FORMAT_RELEASE"
