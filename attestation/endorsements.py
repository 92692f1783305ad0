"""Endorsements (RFC 9334 §8.2): what Intel and NVIDIA say of their hardware. They sign it; the carrier is not trusted.

The server offers them as hints in its bundle; a client that fetched its own uses those instead. Freshness is judged by
the verifier's own clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Endorsements"]


@dataclass(frozen=True, slots=True)
class Endorsements:
    """collateral   `QuoteCollateralV3` JSON (TCB info, QE identity, CRLs and their chains), empty when absent
    rims          RIM id → SWID XML
    ocsp          any name → OCSP response (DER); a response is found by what it is for, never by its name
    """

    collateral: bytes
    rims: Mapping[str, bytes] = field(default_factory=dict)
    ocsp: Mapping[str, bytes] = field(default_factory=dict)
