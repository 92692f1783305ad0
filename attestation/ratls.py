"""The RA-TLS leaf and its extension (ratls facts §3.1, §3.2): one self-signed certificate that carries the evidence.

Extension 2.23.133.5.4.9 (CCC interoperable RA-TLS), non-critical, once, deterministic CBOR. TDX alone is the CCC form,
`60000([quote, claims])`; with a GPU it is a CMW collection of that item and of NVIDIA's evidence. Parsing a leaf
proves only that it has the profile's form and is signed by its own key: what the evidence says is judged in `verifier`.
Pure.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NoReturn

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID

from attestation import cbor
from attestation.claims import MAX_CLAIMS, PROFILE, Claims
from attestation.errors import FormatError

__all__ = [
    "EXTENSION_OID",
    "MAX_LEAF",
    "MAX_LIFETIME",
    "Extension",
    "Leaf",
    "build_leaf",
    "decode_extension",
    "encode_extension",
]

EXTENSION_OID: Final = "2.23.133.5.4.9"
CCC_TAG: Final = 60000
CMW_TYPE: Final = "__cmwc_t"
TDX_MEDIA: Final = "application/vnd.vouchsafe.ccc-evidence+cbor"
GPU_MEDIA: Final = "application/vnd.vouchsafe.nvidia-evidence"
MAX_LEAF: Final = 30 * 1024
"""Java's handshake limit is 32 KiB; the server refuses to start above this."""
MAX_LIFETIME: Final = 3600
MAX_COMMON_NAME: Final = 64
MAX_QUOTE: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Extension:
    """The evidence a leaf carries, undecided: canonical quote, claims as carried, GPU evidence as carried or None."""

    quote: bytes
    claims: bytes
    gpu: bytes | None


def encode_extension(quote: bytes, claims: bytes, gpu: bytes | None) -> bytes:
    """Content of the extension."""
    tdx = cbor.encode(cbor2.CBORTag(CCC_TAG, [quote, claims]))
    if gpu is None:
        return tdx
    return cbor.encode({CMW_TYPE: PROFILE, "tdx": [TDX_MEDIA, tdx], "gpu": [GPU_MEDIA, gpu]})


def decode_extension(raw: bytes) -> Extension:
    """Strict inverse of `encode_extension`. `FORMAT_EXTENSION` or `FORMAT_CBOR`."""
    value = cbor.decode(raw, max_size=MAX_LEAF, tags=frozenset({CCC_TAG}))
    if isinstance(value, cbor2.CBORTag):
        return Extension(*_tagged(value), gpu=None)
    if not isinstance(value, dict) or value.keys() != {CMW_TYPE, "tdx", "gpu"}:
        _bad("neither a CCC evidence item nor our CMW collection")
    if value[CMW_TYPE] != PROFILE:
        _bad("an unknown CMW collection type", PROFILE, value[CMW_TYPE])
    tdx, gpu = _record(value["tdx"], TDX_MEDIA), _record(value["gpu"], GPU_MEDIA)
    inner = cbor.decode(tdx, max_size=MAX_LEAF, tags=frozenset({CCC_TAG}))
    if not isinstance(inner, cbor2.CBORTag):
        _bad("the tdx record is not a CCC evidence item")
    return Extension(*_tagged(inner), gpu=gpu)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of the profile: form and self-signature checked, evidence not.

    spki                    DER SubjectPublicKeyInfo
    not_before, not_after   unix seconds;  dns_names   the SAN's names in order
    """

    der: bytes
    spki: bytes
    not_before: int
    not_after: int
    dns_names: tuple[str, ...]
    extension: Extension

    @classmethod
    @lru_cache(maxsize=32)
    def parse(cls, der: bytes) -> Leaf:
        """Raises `FORMAT_LEAF` (or the code of the extension) for anything outside the profile.

        Remembered: a client reads the same certificate for every connection that shows it."""
        if len(der) > MAX_LEAF:
            _bad_leaf("too long", f"at most {MAX_LEAF} bytes", len(der))
        try:
            cert = x509.load_der_x509_certificate(der)
            names = _profile(cert)
            spki = cert.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            if spki not in cert.tbs_certificate_bytes:
                _bad_leaf("key", "an uncompressed point, in the one spelling that the key hash covers", "another")
            return cls(
                der=der,
                spki=spki,
                not_before=int(cert.not_valid_before_utc.timestamp()),
                not_after=int(cert.not_valid_after_utc.timestamp()),
                dns_names=names,
                extension=decode_extension(_evidence(cert)),
            )
        except FormatError:
            raise
        except Exception as err:
            # The library refuses hostile DER with many classes, several of them plain Exceptions (InvalidVersion,
            # UnsupportedAlgorithm, UnsupportedGeneralNameType): whatever it says, these bytes are no leaf of ours.
            raise FormatError("FORMAT_LEAF", f"not a certificate of the profile ({type(err).__name__})") from None


def build_leaf(key: ec.EllipticCurvePrivateKey, claims: Claims, quote: bytes, gpu: bytes | None) -> bytes:
    """The leaf (DER) for *claims*, signed by *key*, whose SPKI the claims already name. `FORMAT_LEAF` when it would be
    too long, or when the first name is: it becomes the common name, which X.520 limits to 64 characters."""
    if len(claims.dns_names[0]) > MAX_COMMON_NAME:
        _bad_leaf("first DNS name", f"at most {MAX_COMMON_NAME} characters", len(claims.dns_names[0]))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, claims.dns_names[0])])
    content = encode_extension(quote, claims.encode(), gpu)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(claims.not_before))
        .not_valid_after(_time(claims.not_after))
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in claims.dns_names]), critical=True)
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(EXTENSION_OID), content), critical=False)
    )
    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    if len(der) > MAX_LEAF:
        _bad_leaf("too long for TLS stacks in use", f"at most {MAX_LEAF} bytes", len(der))
    return der


def _profile(cert: x509.Certificate) -> tuple[str, ...]:
    """Names of a certificate of §3.1, or a refusal."""
    if cert.version is not x509.Version.v3 or cert.serial_number <= 0:
        _bad_leaf("version and serial number", "v3, above zero", f"{cert.version.name}, {cert.serial_number}")
    key = cert.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        _bad_leaf("key", "P-256", type(key).__name__)
    if cert.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        _bad_leaf("signature algorithm", "ecdsa-with-SHA256", cert.signature_algorithm_oid.dotted_string)
    if cert.issuer != cert.subject:
        _bad_leaf("issuer", "self-signed", "another issuer")
    try:
        key.verify(cert.signature, cert.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        _bad_leaf("self-signature", "valid", "invalid")
    known = {
        "2.5.29.15": True,  # keyUsage, critical
        "2.5.29.37": False,  # extKeyUsage
        "2.5.29.17": True,  # subjectAltName, critical
        EXTENSION_OID: False,
    }
    seen = {e.oid.dotted_string: e.critical for e in cert.extensions}
    if len(cert.extensions) != len(known) or seen != known:
        _bad_leaf("extensions", sorted(known), sorted(seen))
    if cert.extensions.get_extension_for_class(x509.KeyUsage).value != _key_usage():
        _bad_leaf("keyUsage", "digitalSignature", "another usage")
    if list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) != [ExtendedKeyUsageOID.SERVER_AUTH]:
        _bad_leaf("extKeyUsage", "serverAuth", "another usage")
    san = list(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    names = tuple(n.value for n in san if isinstance(n, x509.DNSName))
    if len(names) != len(san) or not names:
        _bad_leaf("subjectAltName", "DNS names only", "another kind of name")
    common = [a.value for a in cert.subject]
    if common != [names[0]] or cert.subject.rdns[0].get_attributes_for_oid(NameOID.COMMON_NAME) == []:
        _bad_leaf("subject", f"CN={names[0]} and nothing else", cert.subject.rfc4514_string())
    lifetime = int((cert.not_valid_after_utc - cert.not_valid_before_utc).total_seconds())
    if not 0 < lifetime <= MAX_LIFETIME:
        _bad_leaf("validity", f"at most {MAX_LIFETIME} s", lifetime)
    return names


def _evidence(cert: x509.Certificate) -> bytes:
    value = cert.extensions.get_extension_for_oid(x509.ObjectIdentifier(EXTENSION_OID)).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def _tagged(item: cbor2.CBORTag) -> tuple[bytes, bytes]:
    pair = item.value
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(p, bytes) for p in pair)):
        _bad("a CCC evidence item is [quote bstr, claims bstr]")
    quote, claims = pair
    if len(quote) > MAX_QUOTE or len(claims) > MAX_CLAIMS:
        _bad("a part is too long", f"quote <= {MAX_QUOTE}, claims <= {MAX_CLAIMS}", f"{len(quote)}, {len(claims)}")
    return quote, claims


def _record(value: Any, media: str) -> bytes:  # Any: a CBOR value, checked here
    if not (isinstance(value, list) and len(value) == 2 and value[0] == media and isinstance(value[1], bytes)):
        _bad("a CMW record is [media type, bstr]", media)
    return bytes(value[1])


def _key_usage() -> x509.KeyUsage:
    return x509.KeyUsage(True, False, False, False, False, False, False, False, False)


def _time(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _bad(why: str, expected: object = "", actual: object = "") -> NoReturn:
    raise FormatError("FORMAT_EXTENSION", why, expected=expected, actual=actual)


def _bad_leaf(what: str, expected: object, actual: object) -> NoReturn:
    raise FormatError("FORMAT_LEAF", f"certificate: {what}", expected=expected, actual=actual)
