"""Certificates of NVIDIA's two hierarchies (device identity, RIM signing): P-384 with SHA-384 throughout (RFC 5280).

    (1) every certificate parses strictly, with a P-384 key and an ECDSA-SHA384 signature
    (2) each is issued by the next: names and signature; the last by the pinned root, compared as DER by the caller
    (3) all but the leaf are CAs with keyCertSign, path lengths hold; the leaf is none, may sign data, and has no
        extended key usage: an OCSP responder of the same issuer is no RIM signer
    (4) no critical extension that is not understood
    (5) all are valid at the time, the root included

(1) to (4) do not depend on the time and are memoised; (5) is judged on every call. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from attestation.errors import FormatError, RefusedError

__all__ = ["Certificate", "bit_string", "check_chain", "issued", "split_pem"]

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----(?:\n|$)")
_MAX_PEM_CERTIFICATES: Final = 8
_ECDSA_SHA384: Final = "1.2.840.10045.4.3.3"
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS.dotted_string,
        ExtensionOID.KEY_USAGE.dotted_string,
        ExtensionOID.EXTENDED_KEY_USAGE.dotted_string,
        "2.23.133.5.4.1",  # DICE composite device id: the FWID, read in `fwid`
        "2.23.133.5.4.1.1",  # DiceTcbInfo: the same on Blackwell; DICE asks for it to be critical
    }
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate of either hierarchy, strictly parsed. Proves nothing before `check_chain`.

    purposes                extended key usages, dotted
    not_before, not_after   unix seconds
    extensions              raw value by dotted OID, for those `cryptography` does not decode
    """

    der: bytes
    parsed: x509.Certificate
    key: ec.EllipticCurvePublicKey
    ca: bool
    path_length: int | None
    signs_certificates: bool
    signs_data: bool
    purposes: frozenset[str]
    not_before: int
    not_after: int
    extensions: tuple[tuple[str, bytes], ...]

    @property
    def serial(self) -> str:
        """The serial number as whole bytes of hex."""
        number = self.parsed.serial_number
        return number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big").hex()

    @property
    def common_name(self) -> str:
        found = self.parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(found[0].value) if len(found) == 1 else ""

    @property
    def name(self) -> str:
        return self.common_name or self.serial

    @property
    def key_bits(self) -> bytes:
        """The subjectPublicKey bit string: what OCSP's issuerKeyHash hashes (RFC 6960 §4.1.1)."""
        return self.key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)

    @classmethod
    def parse(cls, der: bytes) -> Certificate:
        """(1), and the extensions of (3) and (4). Raises `FormatError` FORMAT_GPU_CERTIFICATE."""
        return _parse(der)


def split_pem(text: bytes) -> tuple[bytes, ...]:
    """DER of each certificate of a PEM chain with nothing between them. Raises `FormatError` FORMAT_GPU_PEM."""
    parts = _PEM.findall(text)
    if b"".join(parts) != text or not 1 <= len(parts) <= _MAX_PEM_CERTIFICATES:
        raise FormatError(
            "FORMAT_GPU_PEM", "not a PEM chain", expected=f"1 to {_MAX_PEM_CERTIFICATES} certificates, nothing else",
            actual=f"{len(parts)} certificates in {len(text)} bytes",
        )  # fmt: skip
    try:
        return tuple(x509.load_pem_x509_certificate(p).public_bytes(serialization.Encoding.DER) for p in parts)
    except Exception as err:  # not all of the library's refusals are ValueErrors (InvalidVersion is none)
        why = f"a certificate of the PEM chain does not parse ({type(err).__name__})"
        raise FormatError("FORMAT_GPU_PEM", why) from None


def bit_string(value: bytes) -> bytes:
    """DER of *value* as a BIT STRING without unused bits: how a P-384 signature (at most 104 bytes) must stand.

    Raises `ValueError` for more than 126 bytes."""
    if len(value) > 126:
        raise ValueError("too long for a P-384 signature")
    return bytes((0x03, len(value) + 1, 0)) + value


@lru_cache(maxsize=512)
def issued(der: bytes, issuer: bytes) -> bool:
    """(2) for one pair: *der* names *issuer* and carries its signature. A fact about bytes, hence memoised."""
    try:
        child, parent = Certificate.parse(der), Certificate.parse(issuer)
        child.parsed.verify_directly_issued_by(parent.parsed)
    except (FormatError, InvalidSignature, ValueError, TypeError):
        return False
    return True


def check_chain(ders: Sequence[bytes], *, root: bytes, length: int, now: int, code: str) -> tuple[Certificate, ...]:
    """The certificates of *ders* (leaf first) and *root*, all checks passed at *now*.

    length  how many certificates *ders* must hold, the root not counted
    code    prefix of the refusal codes
    Raises `FormatError` FORMAT_GPU_CERTIFICATE, `RefusedError` <code>_LENGTH, _ISSUER, _CA, _VALIDITY.
    """
    if len(ders) != length:
        raise RefusedError(
            f"{code}_LENGTH", "the chain has another number of certificates", expected=f"{length} below the root",
            actual=len(ders),
        )  # fmt: skip
    chain = tuple(Certificate.parse(der) for der in (*ders, root))
    for lower, upper in zip(chain, (*chain[1:], chain[-1]), strict=True):
        if not issued(lower.der, upper.der):
            raise RefusedError(
                f"{code}_ISSUER", "a certificate is not issued by the next", expected=upper.name, actual=lower.name
            )
    for depth, cert in enumerate(chain):
        leaf_right = cert.signs_data and not cert.ca and not cert.signs_certificates and not cert.purposes
        right = cert.ca and cert.signs_certificates if depth else leaf_right
        # Certificates between this CA and the leaf (RFC 5280 §4.2.1.9).
        if not right or (depth and cert.path_length is not None and cert.path_length < depth - 1):
            raise RefusedError(
                f"{code}_CA", "a certificate may not do what the chain needs", actual=cert.name,
                expected="CA with keyCertSign" if depth else "no CA, digitalSignature, no extended use",
            )  # fmt: skip
        if not cert.not_before <= now <= cert.not_after:
            raise RefusedError(
                f"{code}_VALIDITY", f"a certificate is not valid at the time: {cert.name}",
                expected=f"{cert.not_before} to {cert.not_after}", actual=now,
            )  # fmt: skip
    return chain


@lru_cache(maxsize=512)
def _parse(der: bytes) -> Certificate:
    try:
        cert = x509.load_der_x509_certificate(der)
        key = cert.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise ValueError("the key is not P-384")
        if cert.signature_algorithm_oid.dotted_string != _ECDSA_SHA384:
            raise ValueError("the signature is not ECDSA with SHA-384")
        if not isinstance(cert.signature_hash_algorithm, hashes.SHA384) or cert.version is not x509.Version.v3:
            raise ValueError("not a version 3 certificate")
        # The library overlooks unused bits of the outer bit string; no byte may change unseen (X.690 §8.6.2).
        if not der.endswith(bit_string(cert.signature)):
            raise ValueError("the signature is not a whole number of bytes")
        ca, path_length, signs_certificates, signs_data = False, None, False, False
        purposes: frozenset[str] = frozenset()
        raw = []
        for extension in cert.extensions:
            if extension.critical and extension.oid.dotted_string not in _UNDERSTOOD:
                raise ValueError(f"critical extension {extension.oid.dotted_string} is not understood")
            value = extension.value
            if isinstance(value, x509.BasicConstraints):
                ca, path_length = value.ca, value.path_length
            elif isinstance(value, x509.KeyUsage):
                signs_certificates, signs_data = value.key_cert_sign, value.digital_signature
            elif isinstance(value, x509.ExtendedKeyUsage):
                purposes = frozenset(oid.dotted_string for oid in value)
            elif isinstance(value, x509.UnrecognizedExtension):
                raw.append((extension.oid.dotted_string, value.value))
        begin, end = int(cert.not_valid_before_utc.timestamp()), int(cert.not_valid_after_utc.timestamp())
        _ = cert.subject, cert.issuer, cert.serial_number  # decoded here, so that no later use can raise
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as err:
        raise FormatError("FORMAT_GPU_CERTIFICATE", f"a certificate cannot be used: {_one_line(err)}") from None
    except Exception as err:  # an algorithm that the library does not support
        raise FormatError("FORMAT_GPU_CERTIFICATE", f"a certificate cannot be used: {type(err).__name__}") from None
    return Certificate(
        der, cert, key, ca, path_length, signs_certificates, signs_data, purposes, begin, end, tuple(raw)
    )


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:120] or type(err).__name__
