"""Which role a certificate of Intel's SGX PKI plays (Intel SGX PCK Certificate and CRL Profile Specification).

The library that verifies chains accepts any leaf below the root as signer of collateral, a PCK leaf too (tdx facts
§4.3.1). Whoever extracts one PCK key could then declare its own stale platform UpToDate. So the roles are read here and
compared by name, extension and place in the chain.

Pure; trusts nobody. What is read from a certificate is a claim until its chain has been verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

from attestation.errors import FormatError

__all__ = [
    "PLATFORM_CA",
    "PROCESSOR_CA",
    "Certificate",
    "PckExtension",
    "issued_by",
    "pck_extension",
    "read_certificate",
    "signature_holds",
]

INTEL: Final = "Intel Corporation"
PLATFORM_CA: Final = "Intel SGX PCK Platform CA"
PROCESSOR_CA: Final = "Intel SGX PCK Processor CA"
PCK_LEAF: Final = "Intel SGX PCK Certificate"
TCB_SIGNER: Final = "Intel SGX TCB Signing"
SGX_EXTENSION: Final = x509.ObjectIdentifier("1.2.840.113741.1.13.1")


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the role checks read from one certificate. Names are common name and organisation; dates unix seconds."""

    subject: tuple[str, str]
    issuer: tuple[str, str]
    is_ca: bool
    sgx: bytes | None = field(repr=False)
    not_before: int
    not_after: int

    @property
    def is_tcb_signer(self) -> bool:
        return self.subject == (TCB_SIGNER, INTEL) and not self.is_ca and self.sgx is None

    @property
    def is_pck_leaf(self) -> bool:
        return (
            self.subject == (PCK_LEAF, INTEL)
            and not self.is_ca
            and self.sgx is not None
            and self.issuer in ((PLATFORM_CA, INTEL), (PROCESSOR_CA, INTEL))
        )

    @property
    def is_pck_ca(self) -> bool:
        return self.subject in ((PLATFORM_CA, INTEL), (PROCESSOR_CA, INTEL)) and self.is_ca and self.sgx is None


@lru_cache(maxsize=64)
def read_certificate(der: bytes) -> Certificate:
    """Read *der*. Raises `FormatError` `FORMAT_TDX_CERTIFICATE`. Remembered: a client sees the same few again."""
    try:
        cert = x509.load_der_x509_certificate(der)
        constraints = [e.value for e in cert.extensions if isinstance(e.value, x509.BasicConstraints)]
        sgx = [e.value.value for e in cert.extensions if isinstance(e.value, x509.UnrecognizedExtension)
               and e.oid == SGX_EXTENSION]  # fmt: skip
        return Certificate(
            subject=_names(cert.subject),
            issuer=_names(cert.issuer),
            is_ca=any(c.ca for c in constraints),
            sgx=sgx[0] if sgx else None,
            not_before=int(cert.not_valid_before_utc.timestamp()),
            not_after=int(cert.not_valid_after_utc.timestamp()),
        )
    except Exception as err:  # hostile DER: the parser has a dozen kinds of refusal, UnsupportedAlgorithm among them
        raise FormatError("FORMAT_TDX_CERTIFICATE", "a certificate cannot be read") from err


def _names(name: x509.Name) -> tuple[str, str]:
    """Common name and organisation, each standing exactly once; otherwise empty text, which equals no role."""

    def one(oid: x509.ObjectIdentifier) -> str:
        found = name.get_attributes_for_oid(oid)
        return str(found[0].value) if len(found) == 1 else ""

    return one(NameOID.COMMON_NAME), one(NameOID.ORGANIZATION_NAME)


@lru_cache(maxsize=64)
def issued_by(child: bytes, parent: bytes) -> bool:
    """Whether *parent*'s key signed *child* (both DER) and the names chain. Dates are not looked at."""
    try:
        x509.load_der_x509_certificate(child).verify_directly_issued_by(x509.load_der_x509_certificate(parent))
    except Exception:  # hostile DER, as above; InvalidSignature
        return False
    return True


def signature_holds(key: bytes | ec.EllipticCurvePublicKey, signature: bytes, signed: bytes) -> bool:
    """ECDSA P-256 with SHA-256; *key* is x ‖ y, or a key; *signature* is r ‖ s."""
    try:
        if isinstance(key, bytes):
            key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key)
        der = utils.encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
        key.verify(der, signed, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        return False
    return True


def certificate_key(der: bytes) -> ec.EllipticCurvePublicKey | None:
    """The P-256 key of a certificate, None when it has another."""
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except Exception:  # hostile DER, as above
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) else None


@dataclass(frozen=True, slots=True)
class PckExtension:
    """The SGX extension of a PCK certificate. Flags are None where a Processor CA issued it.

    ppid, platform_instance_id 16 bytes; fmspc 6; pce_id 2
    """

    ppid: bytes
    fmspc: bytes
    pce_id: bytes
    platform_instance_id: bytes | None
    dynamic_platform: bool | None
    cached_keys: bool | None
    smt_enabled: bool | None


@lru_cache(maxsize=64)
def pck_extension(sgx: bytes) -> PckExtension:
    """Read the extension's DER (PCK Certificate Profile §1.3.5): sequences of {OID, value}, one level of nesting used.

    Raises `FormatError` `FORMAT_TDX_CERTIFICATE`."""
    try:
        items = _pairs(sgx)
        config = _pairs(items[7]) if 7 in items else {}
        found = PckExtension(
            ppid=_octets(items[1], 16),
            fmspc=_octets(items[4], 6),
            pce_id=_octets(items[3], 2),
            platform_instance_id=_octets(items[6], 16) if 6 in items else None,
            dynamic_platform=_flag(config.get(1)),
            cached_keys=_flag(config.get(2)),
            smt_enabled=_flag(config.get(3)),
        )
    except (KeyError, IndexError, ValueError) as err:
        raise FormatError("FORMAT_TDX_CERTIFICATE", "the SGX extension of the PCK certificate cannot be read") from err
    return found


_SGX_ARC: Final = bytes.fromhex("2a864886f84d010d01")


def _tlv(der: bytes, at: int) -> tuple[int, bytes, int]:
    """One DER element: tag, content, offset behind it."""
    tag, length, at = der[at], der[at + 1], at + 2
    if length >= 0x80:
        count = length & 0x7F
        if not 1 <= count <= 2:
            raise ValueError("length of a length")
        length, at = int.from_bytes(der[at : at + count], "big"), at + count
    if at + length > len(der):
        raise ValueError("cut element")
    return tag, der[at : at + length], at + length


def _pairs(der: bytes) -> dict[int, bytes]:
    """A SEQUENCE of SEQUENCE {OID, value}: last arc of the OID → the value's whole encoding."""
    tag, body, end = _tlv(der, 0)
    if tag != 0x30 or end != len(der):
        raise ValueError("not a sequence")
    found: dict[int, bytes] = {}
    at = 0
    while at < len(body):
        tag, pair, at = _tlv(body, at)
        oid_tag, oid, value_at = _tlv(pair, 0)
        if tag != 0x30 or oid_tag != 0x06 or not oid.startswith(_SGX_ARC) or oid[-1] in found:
            raise ValueError("not a pair of ours")
        found[oid[-1]] = pair[value_at:]
    return found


def _octets(der: bytes, size: int) -> bytes:
    tag, body, end = _tlv(der, 0)
    if tag != 0x04 or len(body) != size or end != len(der):
        raise ValueError("not an octet string of that size")
    return body


def _flag(der: bytes | None) -> bool | None:
    if der is None:
        return None
    tag, body, _ = _tlv(der, 0)
    if tag != 0x01 or len(body) != 1:
        raise ValueError("not a boolean")
    return body != b"\0"
