"""Highest CRL numbers seen, kept between runs: a CRL older than one seen hides revocations (TDX facts §5, item 6).

One small JSON file per Intel root in the cache folder. It holds nothing secret and only ever makes the client stricter:
a file that cannot be read counts as empty, one that was tampered with can refuse a service but never accept one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from attestation.tdx import CrlNumbers

__all__ = ["CrlFloor"]

_NAMES = ("root", "platform", "processor")


class CrlFloor:
    """The floor for one Intel root (DER); in memory alone when *folder* is None."""

    def __init__(self, folder: Path | None, intel_root: bytes) -> None:
        name = f"crl-{hashlib.sha256(intel_root).hexdigest()[:32]}.json"
        self._path = folder / name if folder is not None else None
        self.numbers = self._read()

    def raise_to(self, seen: CrlNumbers) -> None:
        """Keep the higher of both, for each issuer. Call it only with numbers of an accepted result."""
        merged = self._read().merge(self.numbers).merge(seen)
        if merged == self.numbers and (self._path is None or self._path.exists()):
            return
        self.numbers = merged
        if self._path is None:
            return
        # A cache that cannot be written is no reason to refuse a service.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = self._path.with_suffix(".new")
            beside.write_text(json.dumps({n: getattr(merged, n) for n in _NAMES}), encoding="ascii")
            beside.replace(self._path)

    def _read(self) -> CrlNumbers:
        if self._path is None:
            return CrlNumbers()
        try:
            with self._path.open("rb") as file:
                found = json.loads(file.read(4096))
            values = [found[n] for n in _NAMES]
        except (OSError, ValueError, KeyError, TypeError):
            return CrlNumbers()
        if not all(v is None or (type(v) is int and v >= 0) for v in values):
            return CrlNumbers()
        return CrlNumbers(*values)
