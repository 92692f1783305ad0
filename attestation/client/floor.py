"""Highest numbers seen, kept between runs: what is older than something seen before may hide what was taken back.

CRL numbers per Intel root (TDX facts §5, item 6); serials of deployment statements and status lists per operator key
set and service name (RA-TLS profile §3.8). Small JSON files in the cache folder, which hold nothing secret and only
ever make the client stricter: one that cannot be read counts as empty, one that was tampered with can refuse a service
but never accept one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attestation.deployment import SerialFloor
from attestation.policy import Policy, Skip
from attestation.tdx import CrlNumbers

__all__ = ["CrlFloor", "SerialFloors", "operator_scope", "replace_file"]

MAX_FILE: Final = 4096
_CRLS: Final = ("root", "platform", "processor")
_SERIALS: Final = ("statement", "status")


class CrlFloor:
    """The floor for one Intel root (DER); in memory alone when *folder* is None."""

    def __init__(self, folder: Path | None, intel_root: bytes) -> None:
        name = f"crl-{hashlib.sha256(intel_root).hexdigest()[:32]}.json"
        self._path = folder / name if folder is not None else None
        self.numbers = CrlNumbers(**_read(self._path, _CRLS))

    def raise_to(self, seen: CrlNumbers) -> None:
        """Keep the higher of both, for each issuer. Call it only with numbers of an accepted result."""
        merged = CrlNumbers(**_read(self._path, _CRLS)).merge(self.numbers).merge(seen)
        _write(self._path, {n: getattr(merged, n) for n in _CRLS}, {n: getattr(self.numbers, n) for n in _CRLS})
        self.numbers = merged


class SerialFloors:
    """The floor for one service under the operator keys that *policy* pins. `floor` is None when it pins none.

    One operator key set has one line of serials: a list or statement of another line would stand in its way."""

    def __init__(self, folder: Path | None, policy: Policy, name: str) -> None:
        scope = operator_scope(policy, name)
        self._path = folder / f"serials-{scope}.json" if folder is not None and scope else None
        self.floor = SerialFloor(**_read(self._path, _SERIALS)) if scope else None

    def raise_to(self, seen: SerialFloor) -> None:
        """Keep the higher of both, for each kind. Call it only with serials of an accepted result."""
        if self.floor is None:
            return
        merged = SerialFloor(**_read(self._path, _SERIALS)).merge(self.floor).merge(seen)
        _write(self._path, {n: getattr(merged, n) for n in _SERIALS}, {n: getattr(self.floor, n) for n in _SERIALS})
        self.floor = merged


def operator_scope(policy: Policy, name: str) -> str:
    """A file name's worth of *name* under the operator keys of *policy*; "" when it pins none."""
    if isinstance(policy.deployment, Skip):
        return ""
    keys = sorted(policy.deployment.operators)  # 32 bytes each
    tagged = b"vouchsafe/operator-scope/v1" + len(keys).to_bytes(4, "big") + b"".join(keys) + name.encode()
    return hashlib.sha256(tagged).hexdigest()[:32]


def replace_file(path: Path, raw: bytes) -> None:
    """Replace in one step, or leave it: a cache that cannot be written is no reason to refuse a service."""
    beside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside.write_bytes(raw)
        beside.replace(path)


def _read(path: Path | None, names: tuple[str, ...]) -> dict[str, int | None]:
    """Whole numbers by name; all None when there is no such file, or anything is wrong with it."""
    nothing: dict[str, int | None] = dict.fromkeys(names)
    if path is None:
        return nothing
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_FILE))
        values = {n: found[n] for n in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return nothing
    return values if all(v is None or (type(v) is int and v >= 0) for v in values.values()) else nothing


def _write(path: Path | None, numbers: Mapping[str, int | None], before: Mapping[str, int | None]) -> None:
    if path is not None and (numbers != before or not os.path.lexists(path)):
        replace_file(path, json.dumps(dict(numbers)).encode("ascii"))
