"""Reference Values (RFC 9334 §8.3): the signed release manifest says what a genuine release must measure to.

An in-toto Statement v1 in a DSSE envelope (measurement facts §10). `ReleaseManifest.parse` reads the payload only; who
signed it is asked of the envelope, by keys that a policy pins. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn

from attestation.claims import PROFILE
from attestation.errors import FormatError

__all__ = ["MAX_MANIFEST", "RELEASE_PAYLOAD_TYPE", "ReleaseManifest", "new_manifest"]

RELEASE_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = f"{PROFILE}:release/v1"
MAX_MANIFEST: Final = 256 * 1024

_DATE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class ReleaseManifest:
    """What a verifier needs of a manifest. Registers are sets of 48 bytes; RTMR3 follows from release, config, weights.

    version, source_commit   names for people
    mrtd, rtmr0..2           allowed values
    td_attributes, xfam      allowed values, empty when the manifest leaves them to the policy
    mrseam                   allowed TDX module measurements, empty likewise
    drivers, vbios           allowed GPU versions
    weights                  model id → roots (verity-sha256:… and sha256:…) that this release may serve
    not_before, not_after    unix seconds
    """

    name: str
    version: str
    source_commit: str
    mrtd: frozenset[bytes]
    rtmr0: frozenset[bytes]
    rtmr1: frozenset[bytes]
    rtmr2: frozenset[bytes]
    td_attributes: frozenset[int]
    xfam: frozenset[int]
    mrseam: frozenset[bytes]
    drivers: frozenset[str]
    vbios: frozenset[str]
    weights: Mapping[str, frozenset[str]]
    not_before: int
    not_after: int

    @classmethod
    def parse(cls, payload: bytes) -> ReleaseManifest:
        """`FORMAT_RELEASE` for anything that is no release/v1. Members that only an auditor reads may stand beside."""
        top = _load(payload)
        if top.get("_type") != STATEMENT_TYPE or top.get("predicateType") != PREDICATE_TYPE:
            _bad("not a release statement", PREDICATE_TYPE, str(top.get("predicateType")))
        predicate = _table(top, "predicate")
        image, tdx, gpu = _table(predicate, "image"), _table(predicate, "tdx"), _table(predicate, "gpu")
        registers = tdx.get("rtmr")
        if not isinstance(registers, list) or len(registers) != 4 or registers[3] is not None:
            _bad("tdx.rtmr", "three registers and null (RTMR3 follows from the claims)", str(registers)[:60])
        not_before = _time(predicate, "notBefore")
        return cls(
            name=_text(image, "name"),
            version=_text(image, "version"),
            source_commit=_text(image, "sourceCommit"),
            mrtd=_digests(tdx.get("mrtd"), "tdx.mrtd"),
            rtmr0=_digests(registers[0], "tdx.rtmr[0]"),
            rtmr1=_digests(registers[1], "tdx.rtmr[1]"),
            rtmr2=_digests(registers[2], "tdx.rtmr[2]"),
            td_attributes=_masks(tdx, "tdAttributes"),
            xfam=_masks(tdx, "xfamAllowed"),
            mrseam=frozenset(_digest(v, "tdx.moduleAllowList") for v in _list(tdx, "moduleAllowList")),
            drivers=frozenset(_texts(gpu, "driver")),
            vbios=frozenset(_texts(gpu, "vbios")),
            weights=_weights(_list(predicate, "weights")),
            not_before=not_before,
            not_after=not_before + 86400 * _days(predicate),
        )


def new_manifest(
    *,
    name: str,
    version: str,
    source_commit: str,
    subjects: Sequence[tuple[str, bytes]],
    mrtd: bytes,
    rtmrs: Sequence[Sequence[bytes]],
    td_attributes: Sequence[int],
    xfam: Sequence[int],
    mrseam: Sequence[bytes],
    drivers: Sequence[str],
    vbios: Sequence[str],
    weights: Sequence[tuple[str, str, str | None]],
    not_before: datetime,
    max_age_days: int,
) -> bytes:
    """Payload of a release manifest, which `ReleaseManifest.parse` accepts.

    subjects   (artefact name, SHA-256);  rtmrs   allowed values of RTMR0, 1 and 2
    weights    (model id, file-list digest `sha256:…`, verity root `verity-sha256:…` or None)
    not_before aware;  max_age_days counts from it
    """
    predicate = {
        "image": {"name": name, "version": version, "sourceCommit": source_commit},
        "tdx": {
            "mrtd": mrtd.hex(),
            "rtmr": [[v.hex() for v in values] for values in rtmrs] + [None],
            "tdAttributes": [hex(v) for v in td_attributes],
            "xfamAllowed": [hex(v) for v in xfam],
            "moduleAllowList": [v.hex() for v in mrseam],
        },
        "gpu": {"driver": list(drivers), "vbios": list(vbios), "ccMode": "on"},
        "weights": [
            {"model": m, "fileListDigest": files, **({"rootHash": root} if root else {})} for m, files, root in weights
        ],
        "notBefore": not_before.isoformat(),
        "maxAgeDays": max_age_days,
    }
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": n, "digest": {"sha256": d.hex()}} for n, d in subjects],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    payload = json.dumps(statement, indent=1).encode()
    ReleaseManifest.parse(payload)
    return payload


def _load(payload: bytes) -> dict[str, Any]:  # Any: JSON values, each checked where it is read
    if len(payload) > MAX_MANIFEST:
        _bad("too long", f"at most {MAX_MANIFEST} bytes", len(payload))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            _bad("a member stands twice", "", "")
        return dict(pairs)

    try:
        top = json.loads(payload.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        _bad("not JSON in UTF-8", "", "")
    if not isinstance(top, dict):
        _bad("not an object", "", "")
    return top


def _bad(what: str, expected: object, actual: object) -> NoReturn:
    raise FormatError("FORMAT_RELEASE", f"release manifest: {what}", expected=expected, actual=actual)


def _table(t: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = t.get(key)
    if not isinstance(value, dict):
        _bad(key, "an object", type(value).__name__)
    return value


def _list(t: Mapping[str, Any], key: str) -> list[Any]:
    value = t.get(key)
    if not isinstance(value, list) or len(value) > 256:
        _bad(key, "a list of at most 256", type(value).__name__)
    return value


def _text(t: Mapping[str, Any], key: str) -> str:
    value = t.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        _bad(key, "a short text", type(value).__name__)
    return value


def _texts(t: Mapping[str, Any], key: str) -> list[str]:
    values = _list(t, key)
    if not all(isinstance(v, str) and v for v in values):
        _bad(key, "texts", "another type")
    return values


def _digest(value: object, what: str) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{96}", value):
        _bad(what, "48 bytes in hex", str(value)[:20])
    return bytes.fromhex(value)


def _digests(value: object, what: str) -> frozenset[bytes]:
    """One digest or a list of several; never none: an absent register is a manifest that measures nothing."""
    values = value if isinstance(value, list) else [value]
    if not 0 < len(values) <= 64:
        _bad(what, "one or several digests", len(values))
    return frozenset(_digest(v, what) for v in values)


def _masks(t: Mapping[str, Any], key: str) -> frozenset[int]:
    values = _texts(t, key)
    if not all(re.fullmatch(r"0x[0-9a-f]{1,16}", v) for v in values):
        _bad(key, "hexadecimal numbers", values)
    return frozenset(int(v, 16) for v in values)


def _weights(entries: list[Any]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            _bad("weights", "objects", type(entry).__name__)
        model = _text(entry, "model")
        files, verity = entry.get("fileListDigest"), entry.get("rootHash")
        for value, form in ((files, r"sha256:[0-9a-f]{64}"), (verity, r"verity-sha256:[0-9a-f]{64}")):
            if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
                _bad(f"weights of {model}", form, type(value).__name__)
        if files is None and verity is None:
            _bad(f"weights of {model}", "fileListDigest or rootHash", "neither")
        if model in found:
            _bad("weights", "each model once", model)
        found[model] = frozenset(v for v in (files, verity) if v is not None)
    return found


def _time(t: Mapping[str, Any], key: str) -> int:
    text = _text(t, key)
    try:
        value = datetime.fromisoformat(text) if _DATE.fullmatch(text) else None
        seconds = int(value.timestamp()) if value is not None else -1
    except (ValueError, OverflowError):
        seconds = -1
    if seconds < 0:
        _bad(key, "RFC 3339 with an offset, after 1970", text)
    return seconds


def _days(t: Mapping[str, Any]) -> int:
    value = t.get("maxAgeDays")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 3650:
        _bad("maxAgeDays", "1 to 3650", value)
    return value
