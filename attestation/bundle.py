"""The bundle (ratls facts §3.5): all that one needs to verify a leaf, now or years later, in one canonical file.

Deterministic CBOR map `{leaf, keyset, event-log, collateral, rims, ocsp, release, deployment, status, sha256}`; sha256
covers the map without it. The digest finds damage, it authenticates nothing: every object is verified for itself.
Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from attestation import cbor
from attestation.endorsements import Endorsements
from attestation.errors import FormatError
from attestation.evidence import Evidence

__all__ = ["MAX_BUNDLE", "Bundle"]

MAX_BUNDLE: Final = 4 * 1024 * 1024
MAX_NAMED: Final = 256
"""RIMs or OCSP responses in one bundle: eight GPUs and four switches need 96 at most."""

_TEXTS: Final = ("leaf", "keyset", "event-log", "collateral", "release", "deployment", "status")


@dataclass(frozen=True, slots=True)
class Bundle:
    """Evidence and the endorsements that came with it. Its own time is the claims' not-before."""

    evidence: Evidence
    endorsements: Endorsements

    def encode(self) -> bytes:
        """The file. Raises `FORMAT_BUNDLE` for one that `decode` would refuse."""
        e, n = self.evidence, self.endorsements
        body: dict[str, Any] = {  # Any: CBOR values
            "leaf": e.leaf,
            "keyset": e.keyset,
            "event-log": e.event_log,
            "collateral": n.collateral,
            "rims": dict(n.rims),
            "ocsp": dict(n.ocsp),
            "release": e.release,
            "deployment": e.deployment,
            "status": e.status,
        }
        raw = cbor.encode({**body, "sha256": hashlib.sha256(cbor.encode(body)).digest()})
        if len(raw) > MAX_BUNDLE or len(n.rims) > MAX_NAMED or len(n.ocsp) > MAX_NAMED:
            raise FormatError("FORMAT_BUNDLE", "too long", expected=f"at most {MAX_BUNDLE} bytes", actual=len(raw))
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Bundle:
        """Strict; `FORMAT_BUNDLE` or `FORMAT_CBOR`. A flipped bit anywhere is a refusal."""
        top = cbor.decode(raw, max_size=MAX_BUNDLE)
        if not isinstance(top, dict) or top.keys() != {*_TEXTS, "rims", "ocsp", "sha256"}:
            raise FormatError("FORMAT_BUNDLE", "not the members of a bundle")
        stated = top.pop("sha256")
        actual = hashlib.sha256(cbor.encode(top)).digest()
        if stated != actual:
            raise FormatError("FORMAT_BUNDLE", "the bundle is damaged: its digest does not fit", expected=actual)
        if not all(isinstance(top[key], bytes) for key in _TEXTS):
            raise FormatError("FORMAT_BUNDLE", "a member is not a byte string")
        evidence = Evidence(
            top["leaf"], top["keyset"], top["event-log"], top["release"], top["deployment"], top["status"]
        )
        return cls(evidence, Endorsements(top["collateral"], _named(top["rims"]), _named(top["ocsp"])))


def _named(value: object) -> Mapping[str, bytes]:
    if not isinstance(value, dict) or len(value) > MAX_NAMED or not all(isinstance(v, bytes) for v in value.values()):
        raise FormatError("FORMAT_BUNDLE", f"a map of at most {MAX_NAMED} byte strings is expected")
    return value
