"""The TDX machine that the table's cases come from: honest inputs, and edits of quotes and collateral."""

from __future__ import annotations

import json
import struct
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.attestation.tdx.dev import NOW, REPORT_DATA, tee
from tests.conformance.book import Input, b64
from tests.devtee.pki import SGX_EXTENSION, Entity, Pki, issue, sgx_extension
from tests.devtee.tdx import CollateralSpec, QuoteForm
from tests.devtee.tee import DevTee

__all__ = [
    "collateral", "flip", "grow", "honest", "named", "platform", "put", "quote", "signed_by", "stranger", "td_quote",
]  # fmt: skip

_GROUPS = {
    "tcb_info": ("tcb_info", "tcb_info_issuer_chain", "tcb_info_signature"),
    "qe_identity": ("qe_identity", "qe_identity_issuer_chain", "qe_identity_signature"),
}


@cache
def quote(form: QuoteForm | None = None) -> bytes:
    """The machine's quote in *form*, the same bytes each time."""
    return tee().quote(REPORT_DATA, form=form)


def td_quote(form: QuoteForm | None = None, **fields: Any) -> str:  # Any: fields of Td
    """A signed quote of a TD with some fields changed, base64."""
    return b64(tee().quote(REPORT_DATA, td=tee().changed(**fields), form=form))


@cache
def _collateral() -> str:
    return tee().collateral(NOW).decode()


def honest(raw: bytes | None = None, **members: object) -> Input:
    """A whole input that is accepted."""
    given: Input = {"quote": b64(quote() if raw is None else raw), "collateral": json.loads(_collateral()), "at": NOW}
    return given | {"root": b64(tee().roots.intel), "min_tcb_evaluation": 20} | members


def collateral(spec: CollateralSpec, machine: DevTee | None = None) -> dict[str, str]:
    """The machine's collateral told after *spec*; what says the same as the honest one is the honest one, so that a
    case differs by what it is about and not by another ECDSA nonce."""
    told: dict[str, str] = json.loads((machine or tee()).collateral(NOW, spec))
    true: dict[str, str] = json.loads(_collateral())
    for name, members in _GROUPS.items():
        if all(told[m] == true[m] for m in (name, f"{name}_issuer_chain")):
            told |= {m: true[m] for m in members}
    for name in ("root_ca_crl", "pck_crl"):
        lists = [x509.load_der_x509_crl(bytes.fromhex(c[name])).tbs_certlist_bytes for c in (told, true)]
        if lists[0] == lists[1]:
            told[name] = true[name]
    return told


@cache
def stranger() -> DevTee:
    """Another machine under other keys."""
    return DevTee(Pki.fresh(1))


def named(cn: str, *organisations: str) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, cn)]
    return x509.Name(parts + [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organisations])


def signed_by(subject: x509.Name, **how: Any) -> dict[str, str]:  # Any: arguments of pki.issue
    """Collateral signed by a certificate with *subject*, which the genuine root issued."""
    odd: Entity = issue(
        subject, tee().pki["intel-root"], ec.SECP256R1(), ca=how.pop("ca", False), usage=("digital_signature",), **how
    )
    pki = tee().pki
    machine = DevTee(Pki(pki.facts, pki.entities | {"odd": odd}, pki.gpus))
    return collateral(CollateralSpec(tcb_signer="odd", qe_signer="odd"), machine)


def platform(cn: str = "Intel SGX PCK Certificate", *, extension: bool = True, **how: Any) -> bytes:  # Any: as above
    """The machine's quote with another PCK certificate, made by the genuine PCK CA, whose key signs the QE report."""
    pki = tee().pki
    sgx = x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_EXTENSION), sgx_extension(pki.facts))
    usage = ("digital_signature",)
    leaf = issue(
        named(cn, "Intel Corporation"), pki[how.pop("issuer", "intel-platform-ca")], ec.SECP256R1(),
        ca=how.pop("ca", False), usage=usage, extra=[(sgx, False)] if extension else [], **how,
    )  # fmt: skip
    machine = DevTee(Pki(pki.facts, pki.entities | {"intel-pck": leaf}, pki.gpus))
    return machine.quote(REPORT_DATA, td=tee().td)


def put(raw: bytes, at: int, form: str, value: int) -> bytes:
    """*raw* with one number overwritten."""
    out = bytearray(raw)
    struct.pack_into(form, out, at, value)
    return bytes(out)


def flip(raw: bytes, at: int) -> bytes:
    """*raw* with the lowest bit of one byte changed."""
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def grow(raw: bytes, tail: bytes) -> bytes:
    """A v4 quote with *tail* after its PEM chain and every length adjusted, which no signature covers."""
    size = struct.unpack_from("<I", raw, 632)[0] + len(tail)
    raw = put(raw + tail, 632, "<I", size)
    return put(put(raw, 636 + 130, "<I", size - 134), 636 + 618, "<I", size - 622)
