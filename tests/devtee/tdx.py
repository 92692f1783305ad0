"""TDX evidence and its collateral, byte for byte as Intel's quote library and PCS would give them, under test keys.

Quotes: versions 4 and 5 with TD reports 1.0 and 1.5 (Intel TDX DCAP quote format appendix). Collateral: TCB info v3,
QE identity v2, both CRLs, in the JSON shape that dcap-qvl reads. Everything a verifier looks at is a field with an
honest default, so that a test says in one line which lie it tells.

Pure: keys and the time are arguments, nothing is read or written.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.devtee.pki import Pki, pem, utc

__all__ = ["CollateralSpec", "QuoteForm", "Td", "collateral", "measured", "quote", "tdreport_body"]

QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
AUTH_DATA: Final = bytes(range(32))
DAY: Final = 86400
TEE_TCB_SVN: Final = bytes([5, 1, 4]) + bytes(13)
"""TDX module SVN 5 of major version 1 ("TDX_01"), SEAMLDR SVN 4."""
OLD_TEE_TCB_SVN: Final = bytes([3, 1, 4]) + bytes(13)
"""A module two SVNs older: matches the OutOfDate level. In `tee_tcb_svn` beside a current `tee_tcb_svn2` it means
that the TD must be relaunched."""


def measured(label: str) -> bytes:
    """48 bytes that stand for the measurement of something simulated: SHA-384 of its name, the same everywhere."""
    return hashlib.sha384(b"vouchsafe devtee: " + label.encode()).digest()


@dataclass(frozen=True, slots=True)
class Td:
    """The TD report body: what the simulated CPU says about the TD. Registers 48 bytes, masks as integers."""

    tee_tcb_svn: bytes = TEE_TCB_SVN
    mrseam: bytes = measured("TDX module 1.5")
    mrsignerseam: bytes = bytes(48)
    seam_attributes: int = 0
    td_attributes: int = 0x10000000
    xfam: int = 0x600E7
    mrtd: bytes = measured("OVMF")
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    rtmr: tuple[bytes, bytes, bytes, bytes] = (bytes(48), bytes(48), bytes(48), bytes(48))
    tee_tcb_svn2: bytes = TEE_TCB_SVN
    mrservicetd: bytes = bytes(48)


@dataclass(frozen=True, slots=True)
class QuoteForm:
    """How the quote is written around the report, and what the quoting enclave claims.

    version 4 or 5; body "1.0" or "1.5" (only version 5 carries 1.5); padding: zero bytes after the quote as older
    quote services and clouds add; nul: the PEM chain ends in NUL; signer: the role that signs the QE report
    ("intel-pck"); chain: roles of the certificates carried.
    """

    version: Literal[4, 5] = 4
    body: Literal["1.0", "1.5"] = "1.0"
    padding: int = 0
    nul: bool = True
    header_reserved: int = 0
    qe_vendor: bytes = QE_VENDOR
    user_data: bytes = bytes(20)
    qe_miscselect: int = 0
    qe_attributes: bytes = bytes.fromhex("1500000000000000e700000000000000")
    qe_mrsigner: bytes = measured("TD QE signer")[:32]
    qe_prod_id: int = 2
    qe_svn: int = 4
    qe_report_tail: bytes = bytes(32)
    auth_data: bytes = AUTH_DATA
    signer: str = "intel-pck"
    chain: tuple[str, ...] = ("intel-pck", "intel-platform-ca", "intel-root")


@dataclass(frozen=True, slots=True)
class CollateralSpec:
    """What the collateral says. Ages and lifetimes in seconds, counted from the `now` given to `collateral`.

    tcb_status, module_status, qe_status: status of the level this platform, TDX module and QE match.
    revoked: roles on the CRLs ("intel-pck", "intel-platform-ca", "intel-tcb-signing").
    tcb_signer, qe_signer: the roles that sign ("intel-pck" is the role confusion of tdx.md §4.3.1).
    pck_chain: also carry `pck_certificate_chain` beside the quote.
    None for an identity means this PKI's own.
    """

    tcb_status: str = "UpToDate"
    module_status: str = "UpToDate"
    qe_status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    qe_advisories: tuple[str, ...] = ()
    evaluation: int = 20
    qe_evaluation: int | None = None
    age: int = 3600
    lifetime: int = 30 * DAY
    qe_age: int | None = None
    qe_lifetime: int | None = None
    crl_age: int = 3600
    crl_lifetime: int = 30 * DAY
    crl_number: int = 1
    revoked: frozenset[str] = frozenset()
    tcb_signer: str = "intel-tcb-signing"
    qe_signer: str = "intel-tcb-signing"
    tcb_id: str = "TDX"
    tcb_type: int = 0
    tcb_version: int = 3
    qe_id: str = "TD_QE"
    fmspc: bytes | None = None
    pce_id: bytes | None = None
    qe_mrsigner: bytes = field(default=measured("TD QE signer")[:32])
    pck_chain: bool = False


def tdreport_body(report_data: bytes, td: Td, version: Literal["1.0", "1.5"] = "1.0") -> bytes:
    """584 bytes (1.0) or 648 (1.5), TDX module ABI TDREPORT fields in quote order."""
    if len(report_data) != 64:
        raise ValueError(f"report data must be 64 bytes, not {len(report_data)}")
    body = b"".join(
        (
            td.tee_tcb_svn,
            td.mrseam,
            td.mrsignerseam,
            td.seam_attributes.to_bytes(8, "little"),
            td.td_attributes.to_bytes(8, "little"),
            td.xfam.to_bytes(8, "little"),
            td.mrtd,
            td.mrconfigid,
            td.mrowner,
            td.mrownerconfig,
            *td.rtmr,
            report_data,
        )
    )
    if version == "1.5":
        body += td.tee_tcb_svn2 + td.mrservicetd
    if len(body) != {"1.0": 584, "1.5": 648}[version]:
        raise ValueError("a register of the TD has the wrong length")
    return body


def quote(pki: Pki, report_data: bytes, td: Td, form: QuoteForm) -> bytes:
    """A signed quote. Canonical unless *form* says otherwise."""
    if form.version == 4 and form.body != "1.0":
        raise ValueError("a version 4 quote carries TD report 1.0 only")
    header = b"".join(
        (
            form.version.to_bytes(2, "little"),
            (2).to_bytes(2, "little"),
            (0x81).to_bytes(4, "little"),
            form.header_reserved.to_bytes(4, "little"),
            form.qe_vendor,
            form.user_data,
        )
    )
    body = tdreport_body(report_data, td, form.body)
    if form.version == 5:
        body = {"1.0": 2, "1.5": 3}[form.body].to_bytes(2, "little") + len(body).to_bytes(4, "little") + body
    ak = pki["intel-ak"].key
    ak_raw = ak.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)[1:]
    qe_report = _qe_report(ak_raw, form, pki)
    chain = pem([pki[r].cert for r in form.chain]) + (b"\0" if form.nul else b"")
    inner = b"".join(
        (
            qe_report,
            # A quoting enclave has its key certified once and repeats that in every quote: the same bytes here too.
            _sign(pki[form.signer].key, qe_report, deterministic=True),
            len(form.auth_data).to_bytes(2, "little"),
            form.auth_data,
            (5).to_bytes(2, "little"),
            len(chain).to_bytes(4, "little"),
            chain,
        )
    )
    signature = b"".join(
        (_sign(ak, header + body), ak_raw, (6).to_bytes(2, "little"), len(inner).to_bytes(4, "little"), inner)
    )
    return header + body + len(signature).to_bytes(4, "little") + signature + bytes(form.padding)


def _qe_report(ak_raw: bytes, form: QuoteForm, pki: Pki) -> bytes:
    """The SGX report (384 bytes) in which the quoting enclave binds the attestation key (DCAP quote format, A.4)."""
    report = b"".join(
        (
            pki.facts.sgx_svn,
            form.qe_miscselect.to_bytes(4, "little"),
            bytes(28),
            form.qe_attributes,
            measured("TD QE enclave")[:32],
            bytes(32),
            form.qe_mrsigner,
            bytes(96),
            form.qe_prod_id.to_bytes(2, "little"),
            form.qe_svn.to_bytes(2, "little"),
            bytes(60),
            hashlib.sha256(ak_raw + form.auth_data).digest(),
            form.qe_report_tail,
        )
    )
    if len(report) != 384:
        raise ValueError("a field of the QE report has the wrong length")
    return report


def _sign(key: ec.EllipticCurvePrivateKey, message: bytes, *, deterministic: bool = False) -> bytes:
    """ECDSA P-256 with SHA-256, raw r ‖ s."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=deterministic)))
    return r.to_bytes(32) + s.to_bytes(32)


def collateral(pki: Pki, now: int, spec: CollateralSpec) -> bytes:
    """`QuoteCollateralV3` as JSON. The signatures cover the exact compact text inside."""
    tcb_text = json.dumps(_tcb_info(pki, now, spec), separators=(",", ":"))
    qe_text = json.dumps(_qe_identity(now, spec), separators=(",", ":"))
    root = pki["intel-root"]
    answer = {
        "pck_crl_issuer_chain": pem([pki["intel-platform-ca"].cert, root.cert]).decode(),
        "root_ca_crl": _crl(pki, "intel-root", ("intel-platform-ca", "intel-tcb-signing"), now, spec).hex(),
        "pck_crl": _crl(pki, "intel-platform-ca", ("intel-pck",), now, spec).hex(),
        "tcb_info_issuer_chain": _issuer_chain(pki, spec.tcb_signer),
        "tcb_info": tcb_text,
        "tcb_info_signature": _sign(pki[spec.tcb_signer].key, tcb_text.encode()).hex(),
        "qe_identity_issuer_chain": _issuer_chain(pki, spec.qe_signer),
        "qe_identity": qe_text,
        "qe_identity_signature": _sign(pki[spec.qe_signer].key, qe_text.encode()).hex(),
    }
    if spec.pck_chain:
        roles = ("intel-pck", "intel-platform-ca", "intel-root")
        answer["pck_certificate_chain"] = pem([pki[r].cert for r in roles]).decode()
    return json.dumps(answer).encode()


def _issuer_chain(pki: Pki, role: str) -> str:
    above = ["intel-platform-ca", "intel-root"] if role == "intel-pck" else ["intel-root"]
    return pem([pki[r].cert for r in [role, *above]]).decode()


def _iso(seconds: int) -> str:
    return utc(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def _level(tcb: Mapping[str, Any], date: str, status: str, advisories: tuple[str, ...]) -> dict[str, Any]:  # Any: JSON
    level: dict[str, Any] = {"tcb": tcb, "tcbDate": date, "tcbStatus": status}
    return level | ({"advisoryIDs": list(advisories)} if advisories else {})


def _tcb_info(pki: Pki, now: int, spec: CollateralSpec) -> dict[str, Any]:  # Any: JSON
    """TCB info v3 with two levels: the one this platform matches, and an older one that is OutOfDate."""
    facts = pki.facts

    def tcb(tdx_svn: bytes) -> dict[str, Any]:
        return {
            "sgxtcbcomponents": [{"svn": s} for s in facts.sgx_svn],
            "pcesvn": facts.pcesvn,
            "tdxtcbcomponents": [{"svn": s} for s in tdx_svn],
        }

    plain = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    old = ("INTEL-SA-00000",)
    # The components of a module with a major version are matched by its identity below; [0] and [1] follow Intel's
    # own tables, where a level names the module SVN as a floor and 0 for the major version.
    current, older = bytes([5, 0, 4]) + bytes(13), bytes([2, 0, 2]) + bytes(13)
    return {
        "id": spec.tcb_id,
        "version": spec.tcb_version,
        "issueDate": _iso(now - spec.age),
        "nextUpdate": _iso(now - spec.age + spec.lifetime),
        "fmspc": (spec.fmspc or facts.fmspc).hex().upper(),
        "pceId": (spec.pce_id or facts.pce_id).hex().upper(),
        "tcbType": spec.tcb_type,
        "tcbEvaluationDataNumber": spec.evaluation,
        "tdxModule": plain,
        "tdxModuleIdentities": [
            {
                "id": "TDX_01",
                **plain,
                "tcbLevels": [
                    _level({"isvsvn": 5}, "2026-08-12T00:00:00Z", spec.module_status, ()),
                    _level({"isvsvn": 2}, "2025-05-14T00:00:00Z", "OutOfDate", old),
                ],
            }
        ],
        "tcbLevels": [
            _level(tcb(current), "2026-08-12T00:00:00Z", spec.tcb_status, spec.advisories),
            _level(tcb(older), "2025-05-14T00:00:00Z", "OutOfDate", old),
        ],
    }


def _qe_identity(now: int, spec: CollateralSpec) -> dict[str, Any]:  # Any: JSON
    age = spec.age if spec.qe_age is None else spec.qe_age
    lifetime = spec.lifetime if spec.qe_lifetime is None else spec.qe_lifetime
    return {
        "id": spec.qe_id,
        "version": 2,
        "issueDate": _iso(now - age),
        "nextUpdate": _iso(now - age + lifetime),
        "tcbEvaluationDataNumber": spec.evaluation if spec.qe_evaluation is None else spec.qe_evaluation,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": spec.qe_mrsigner.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [
            _level({"isvsvn": 4}, "2026-08-12T00:00:00Z", spec.qe_status, spec.qe_advisories),
            _level({"isvsvn": 1}, "2025-05-14T00:00:00Z", "OutOfDate", ("INTEL-SA-00000",)),
        ],
    }


def _crl(pki: Pki, issuer: str, covers: tuple[str, ...], now: int, spec: CollateralSpec) -> bytes:
    """DER of one CRL (SGX PCK profile §2): who of *covers* is revoked stands in the spec."""
    signer = pki[issuer]
    start = utc(now - spec.crl_age)
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.cert.subject)
        .last_update(start)
        .next_update(start + dt.timedelta(seconds=spec.crl_lifetime))
        .add_extension(x509.CRLNumber(spec.crl_number), critical=False)
        .add_extension(aki, critical=False)
    )
    for role in covers:
        if role in spec.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(pki[role].cert.serial_number)
            builder = builder.add_revoked_certificate(entry.revocation_date(start).build())
    return builder.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
