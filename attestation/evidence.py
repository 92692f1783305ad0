"""Evidence (RFC 9334 §8.1) of one certificate: claims of the other side, in bytes, undecided.

The leaf carries quote, claims and GPU evidence; the other objects are named in the claims by digest and may come from
anywhere. Holding one proves nothing: see `verifier.verify`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Evidence"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """leaf        DER certificate
    keyset       `aci/1` keyset, JCS
    event_log    CCEL up to its end marker, then our RTMR3 records
    release      DSSE envelope of the release manifest
    deployment   DSSE envelope of the operator's deployment statement, empty when there is none
    status       DSSE envelope of the status list, empty when there is none
    """

    leaf: bytes
    keyset: bytes
    event_log: bytes
    release: bytes
    deployment: bytes
    status: bytes
