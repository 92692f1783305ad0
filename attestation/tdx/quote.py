"""A TDX quote, every byte accounted for (Intel TDX DCAP Quoting Library API, appendix "Quote Format", v4 and v5).

Layout, integers little endian:

    v4   header 48 · TD report 584 · sig_len u32 · signature data
    v5   header 48 · body_type u16 · body_size u32 · TD report · sig_len u32 · signature data
    signature data   signature 64 · attestation key 64 · type 6 u16 · size u32 · QE report 384 · QE report signature 64
                     · auth size 32 u16 · auth data 32 · type 5 u16 · size u32 · PEM chain · optional NUL

Signed are header and body (attestation key), attestation key and auth data (through the QE report), QE report (PCK
key). `sig_len`, types and sizes are covered by no signature, so each has exactly one value that is accepted. Nothing is
padded, trimmed or guessed; cutting a platform's padding is the attester's work (`canonical_length`).

Pure; trusts nobody. Holding a `Quote` proves that the bytes have this form, nothing about who made them.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Final

from attestation.errors import FormatError
from attestation.tdx.pem import read_chain

__all__ = ["MAX_QUOTE", "QeReport", "Quote", "TdReport", "canonical_length"]

MAX_QUOTE: Final = 16 * 1024
"""Bytes. Quotes seen are 4,935 to 5,247."""

HEADER: Final = 48
BODY_SIZES: Final = {2: 584, 3: 648, 4: 885}
"""TD report 1.0, 1.5, 1.5 extended: size by body type."""
REPORT_DATA_AT: Final = 520
"""Offset of REPORTDATA (64 bytes) in every TD report."""
KEY_ECDSA_P256: Final = 2
TEE_TDX: Final = 0x81
INTEL_QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
OUTER_TYPE: Final = 6
INNER_TYPE: Final = 5
AUTH_SIZE: Final = 32
CHAIN_AT: Final = 622
"""Offset of the PEM chain in the signature data."""

_TAG: Final = b"vouchsafe/td-quote/v1"


@dataclass(frozen=True, slots=True)
class TdReport:
    """The TD report body by Intel's names. Digests are 48 bytes; attributes are the little-endian numbers.

    The fields of 1.5 are None in a 1.0 body, those of the extended form (`vm_id` and on) are None in 1.0 and 1.5.
    """

    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seamattributes: bytes
    td_attributes: int
    xfam: int
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn2: bytes | None = None
    mrservicetd: bytes | None = None
    vm_id: int | None = None
    td_id: bytes | None = None
    device_info_hash: bytes | None = None
    init_servtd_hash: bytes | None = None
    init_servtd_attributes: bytes | None = None
    init_cpusvn: bytes | None = None
    init_tee_tcb_svn: bytes | None = None
    init_fmspc: bytes | None = None
    servtd_hash: bytes | None = None
    servtd_attributes: bytes | None = None


@dataclass(frozen=True, slots=True)
class QeReport:
    """The quoting enclave's SGX report body (384 bytes, `raw`), reserved fields zero."""

    cpusvn: bytes
    miscselect: int
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    isvprodid: int
    isvsvn: int
    report_data: bytes
    raw: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Quote:
    """A parsed quote. Claims without proof until `appraise` says otherwise.

    version        4 or 5
    user_data      20 bytes; the QE id in the first 16
    body_type      2, 3 or 4 (a v4 body is type 2)
    body           the TD report
    signature, qe_report_signature   r ‖ s, 64 bytes
    attestation_key                  x ‖ y on P-256, 64 bytes
    pck_chain      PCK leaf, PCK CA, root: DER; `pck_chain_pem` is the same as text, without the final NUL
    signed         the bytes under `signature`
    raw            the whole quote
    """

    version: int
    user_data: bytes
    body_type: int
    body: TdReport
    signature: bytes = field(repr=False)
    attestation_key: bytes = field(repr=False)
    qe_report: QeReport = field(repr=False)
    qe_report_signature: bytes = field(repr=False)
    qe_auth_data: bytes = field(repr=False)
    pck_chain: tuple[bytes, ...] = field(repr=False)
    pck_chain_pem: bytes = field(repr=False)
    signed: bytes = field(repr=False)
    raw: bytes = field(repr=False)

    @property
    def identity(self) -> bytes:
        """SHA-256 over what signatures cover, each part with its length: the key under which to remember a verdict.

        A hash of `raw` would not do: an ECDSA signature has a second form and the final NUL may come or go."""
        digest = hashlib.sha256(_TAG)
        parts = (self.signed, self.attestation_key, self.qe_auth_data, self.qe_report.raw, self.pck_chain[0])
        for part in parts:
            digest.update(struct.pack("<I", len(part)))
            digest.update(part)
        return digest.digest()

    @property
    def repeated(self) -> bytes:
        """All bytes but REPORTDATA and `signature`: what another quote of the same TD, quoting enclave and attestation
        key repeats. Where two quotes agree in it, whatever was found about one holds for the other, once its own
        signature is verified; only REPORTDATA is left to compare."""
        at = HEADER + (6 if self.version == 5 else 0) + REPORT_DATA_AT
        data_at = len(self.signed) + 4
        return self.raw[:at] + self.raw[at + 64 : data_at] + self.raw[data_at + 64 :]

    @classmethod
    def parse(cls, raw: bytes) -> Quote:
        """Read *raw*, all of it. Raises `FormatError` (`FORMAT_TDX_…`), naming field, expected and actual value."""
        raw = bytes(raw)
        body_type, body_at, body_size = _frame(raw)
        body_end = body_at + body_size
        sig_len = _u32(raw, body_end)
        data_at = body_end + 4
        if len(raw) != data_at + sig_len:
            raise FormatError(
                "FORMAT_TDX_LENGTH", "the quote's length differs from what sig_len says",
                expected=data_at + sig_len, actual=len(raw),
                hint="the server cuts the padding that platforms append",
            )  # fmt: skip
        if sig_len <= CHAIN_AT:
            raise FormatError("FORMAT_TDX_LENGTH", "no room for a PCK chain", expected=f"> {CHAIN_AT}", actual=sig_len)
        return _parts(cls, raw, body_type, raw[body_at:body_end], raw[data_at:], body_end)


def canonical_length(raw: bytes) -> int:
    """Length of the quote at the start of *raw*, as the platform returned it with its padding. For the attester.

    Reads the frame only; what follows must be zero bytes. Raises `FormatError`."""
    _, body_at, body_size = _frame(raw, limit=None)
    end = body_at + body_size
    total = end + 4 + _u32(raw, end)
    if not end + 4 + CHAIN_AT < total <= min(len(raw), MAX_QUOTE):
        raise FormatError(
            "FORMAT_TDX_LENGTH", "sig_len points outside of what the platform returned",
            expected=f"<= {min(len(raw), MAX_QUOTE)}", actual=total,
        )  # fmt: skip
    if raw[total:].strip(b"\0"):
        raise FormatError("FORMAT_TDX_LENGTH", "bytes that are not zero follow the quote", expected=total)
    return total


def _frame(raw: bytes, limit: int | None = MAX_QUOTE) -> tuple[int, int, int]:
    """Check the header; body type, offset and size."""
    if limit is not None and len(raw) > limit:
        raise FormatError("FORMAT_TDX_SIZE", "the quote is too long", expected=f"<= {limit} bytes", actual=len(raw))
    if len(raw) < HEADER + 6:
        raise FormatError("FORMAT_TDX_SIZE", "too short for a quote header", expected=f">= {HEADER + 6} bytes",
                          actual=len(raw))  # fmt: skip
    version, key_type, tee_type, reserved, vendor = struct.unpack_from("<HHII16s", raw)
    if version not in (4, 5):
        raise FormatError("FORMAT_TDX_VERSION", "unknown quote version", expected="4 or 5", actual=version)
    _want("FORMAT_TDX_KEY_TYPE", "attestation key type", KEY_ECDSA_P256, key_type)
    _want("FORMAT_TDX_TEE_TYPE", "TEE type", TEE_TDX, tee_type)
    _want("FORMAT_TDX_RESERVED", "reserved bytes of the header", 0, reserved)
    _want("FORMAT_TDX_QE_VENDOR", "QE vendor id", INTEL_QE_VENDOR.hex(), vendor.hex())
    body_type, at, size = 2, HEADER, BODY_SIZES[2]
    if version == 5:
        body_type, size = struct.unpack_from("<HI", raw, HEADER)
        at = HEADER + 6
        if body_type not in BODY_SIZES:
            raise FormatError("FORMAT_TDX_BODY_TYPE", "not a TD report", expected="2, 3 or 4", actual=body_type)
        _want("FORMAT_TDX_BODY_SIZE", f"size of body type {body_type}", BODY_SIZES[body_type], size)
    if len(raw) < at + size + 4:
        raise FormatError("FORMAT_TDX_LENGTH", "the quote ends inside its TD report", expected=f">= {at + size + 4}",
                          actual=len(raw))  # fmt: skip
    return body_type, at, size


def _parts(cls: type[Quote], raw: bytes, body_type: int, body: bytes, data: bytes, body_end: int) -> Quote:
    """The signature data (offsets in the module docstring), and the quote put together."""
    outer_type, outer_size = struct.unpack_from("<HI", data, 128)
    auth_size = struct.unpack_from("<H", data, 582)[0]
    inner_type, inner_size = struct.unpack_from("<HI", data, 616)
    _want("FORMAT_TDX_CERTIFICATION", "outer certification type", OUTER_TYPE, outer_type)
    _want("FORMAT_TDX_CERTIFICATION", "outer certification size", len(data) - 134, outer_size)
    _want("FORMAT_TDX_QE_AUTH", "size of the QE authentication data", AUTH_SIZE, auth_size)
    _want("FORMAT_TDX_CERTIFICATION", "inner certification type", INNER_TYPE, inner_type)
    _want("FORMAT_TDX_CERTIFICATION", "inner certification size", len(data) - CHAIN_AT, inner_size)
    pem = data[CHAIN_AT:].removesuffix(b"\0")
    return cls(
        version=struct.unpack_from("<H", raw)[0],
        user_data=raw[28:48],
        body_type=body_type,
        body=_td_report(body),
        signature=data[0:64],
        attestation_key=data[64:128],
        qe_report=_qe_report(data[134:518]),
        qe_report_signature=data[518:582],
        qe_auth_data=data[584:616],
        pck_chain=read_chain(pem, 3, 3, code="FORMAT_TDX_PCK_CHAIN", what="the PCK chain"),
        pck_chain_pem=pem,
        signed=raw[:body_end],
        raw=raw,
    )


def _td_report(b: bytes) -> TdReport:
    """TD report 1.0, 1.5 or 1.5 extended by its length, which the caller has checked (Intel TDX Module ABI)."""
    base = (
        *struct.unpack_from("<16s48s48s8sQQ48s48s48s48s", b),
        (b[328:376], b[376:424], b[424:472], b[472:520]),
        b[REPORT_DATA_AT:584],
    )
    more = struct.unpack_from("<16s48s", b, 584) if len(b) >= 648 else ()
    rest = struct.unpack_from("<B32s48s48s8s16s16s12s48s8s", b, 648) if len(b) >= 885 else ()
    return TdReport(*base, *more, *rest)


def _qe_report(b: bytes) -> QeReport:
    """An SGX report body (Intel SDM vol. 3D, REPORT structure): reserved ranges must be zero."""
    for low, high in ((20, 48), (96, 128), (160, 256), (260, 320)):
        if any(b[low:high]):
            raise FormatError("FORMAT_TDX_RESERVED", f"reserved bytes {low} to {high - 1} of the QE report",
                              expected="zero", actual=b[low:high])  # fmt: skip
    cpusvn, miscselect = struct.unpack_from("<16sI", b)
    isvprodid, isvsvn = struct.unpack_from("<HH", b, 256)
    return QeReport(cpusvn, miscselect, b[48:64], b[64:96], b[128:160], isvprodid, isvsvn, b[320:384], b)


def _u32(raw: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", raw, at)[0])


def _want(code: str, what: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise FormatError(code, f"{what} is another", expected=expected, actual=actual)
