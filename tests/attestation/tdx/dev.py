"""Quotes and collateral under test keys, honest or lying: one machine for the whole run, one moment in time."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.attestation.tdx.judge import Verdict, judge
from tests.devtee.pki import Pki
from tests.devtee.tdx import CollateralSpec, QuoteForm, Td
from tests.devtee.tee import DevTee

NOW = 1_795_000_000
"""2026-11-18. Every lie is told around it."""
DAY = 86_400
REPORT_DATA = bytes(range(64))


@cache
def tee() -> DevTee:
    return DevTee(Pki.fresh(1))


def tell(
    *,
    form: QuoteForm | None = None,
    td: Td | None = None,
    spec: CollateralSpec | None = None,
    version: Any = None,
    now: int = NOW,
    quote: bytes | None = None,
    collateral: bytes | None = None,
    **how: Any,
) -> Verdict:
    """Have the machine tell one story and judge it; without arguments it is the honest one."""
    m = tee()
    return judge(
        quote if quote is not None else m.quote(REPORT_DATA, form=form, td=td, version=version),
        collateral if collateral is not None else m.collateral(NOW, spec),
        now,
        root=how.pop("root", m.roots.intel),
        **how,
    )


def sign(message: bytes) -> bytes:
    """r ‖ s by the machine's attestation key."""
    r, s = decode_dss_signature(tee().pki["intel-ak"].key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def extended_quote(**fields: bytes) -> bytes:
    """A v5 quote with the 885-byte body (TD report 1.5 extended): fields by name, zero when not given."""
    plain = tee().quote(REPORT_DATA, form=QuoteForm(version=5, body="1.5"))
    sizes = {
        "vm_id": 1, "td_id": 32, "device_info_hash": 48, "init_servtd_hash": 48, "init_servtd_attributes": 8,
        "init_cpusvn": 16, "init_tee_tcb_svn": 16, "init_fmspc": 12, "servtd_hash": 48, "servtd_attributes": 8,
    }  # fmt: skip
    more = b"".join(fields.get(name, bytes(size)) for name, size in sizes.items())
    signed = plain[:48] + struct.pack("<HI", 4, 885) + plain[54 : 54 + 648] + more
    data = plain[54 + 648 + 4 :]
    return signed + struct.pack("<I", len(data)) + sign(signed) + data[64:]
