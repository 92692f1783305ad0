"""The leaf's profile: every deviation is refused, however well it is signed; hostile bytes raise nothing else."""

from __future__ import annotations

import dataclasses
import datetime
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation import cbor
from attestation.claims import PROFILE
from attestation.errors import FormatError
from attestation.ratls import (
    EXTENSION_OID,
    GPU_MEDIA,
    MAX_LEAF,
    TDX_MEDIA,
    Leaf,
    build_leaf,
    decode_extension,
    encode_extension,
)
from tests.genuine import NAME, NOW, genuine, leaf_key

CONTENT = encode_extension(b"q" * 100, b"c" * 50, b"g" * 20)
START = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
USAGE = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
SAN = x509.SubjectAlternativeName([x509.DNSName(NAME)])
EKU = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
CN = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
Ext = tuple[x509.ExtensionType, bool]


def evidence(content: bytes = CONTENT) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(EXTENSION_OID), content)


HONEST: list[Ext] = [(USAGE, True), (EKU, False), (SAN, True), (evidence(), False)]


def certificate(
    extensions: Sequence[Ext] = HONEST,
    *,
    key: Any = None,
    signer: Any = None,
    subject: x509.Name = CN,
    issuer: x509.Name | None = None,
    seconds: int = 3600,
    digest: Any = None,
    serial: int = 5,
) -> bytes:
    key = key or leaf_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(START)
        .not_valid_after(START + datetime.timedelta(seconds=seconds))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    signing = signer or key
    digest = None if isinstance(signing, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return builder.sign(signing, digest).public_bytes(serialization.Encoding.DER)


def but(index: int, *value: Any) -> list[Ext]:
    """The honest extensions with one replaced; without a value, left out."""
    changed = list(HONEST)
    changed[index : index + 1] = [value] if value else []
    return changed


def name(*pairs: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in pairs])


def flipped(der: bytes) -> bytes:
    return der[:-1] + bytes([der[-1] ^ 1])


def refuse(der: bytes, code: str = "FORMAT_LEAF") -> None:
    with pytest.raises(FormatError) as caught:
        Leaf.parse(der)
    assert caught.value.code == code


def test_the_honest_profile_is_read() -> None:
    leaf = Leaf.parse(certificate())
    assert (leaf.not_before, leaf.not_after, leaf.dns_names) == (NOW, NOW + 3600, (NAME,))
    assert (leaf.extension.quote, leaf.extension.claims, leaf.extension.gpu) == (b"q" * 100, b"c" * 50, b"g" * 20)


DEVIATIONS: dict[str, Callable[[], bytes]] = {
    "P-384 key": lambda: certificate(key=ec.generate_private_key(ec.SECP384R1())),
    "RSA key": lambda: certificate(key=rsa.generate_private_key(65537, 2048)),
    "Ed25519 key": lambda: certificate(key=ed25519.Ed25519PrivateKey.generate()),
    "signed by another key": lambda: certificate(signer=leaf_key(1)),
    "signed with SHA-384": lambda: certificate(digest=hashes.SHA384()),
    "a flipped signature": lambda: flipped(certificate()),
    "another issuer": lambda: certificate(issuer=name((NameOID.COMMON_NAME, "Some CA"))),
    "no common name": lambda: certificate(subject=x509.Name([])),
    "another common name": lambda: certificate(subject=name((NameOID.COMMON_NAME, "other.test"))),
    "an organisation beside it": lambda: certificate(
        subject=name((NameOID.COMMON_NAME, NAME), (NameOID.ORGANIZATION_NAME, "Bank"))
    ),
    "an organisation in its place": lambda: certificate(subject=name((NameOID.ORGANIZATION_NAME, NAME))),
    "valid for an hour and a second": lambda: certificate(seconds=3601),
    "valid for a year": lambda: certificate(seconds=365 * 86400),
    "no key usage": lambda: certificate(but(0)),
    "key usage not critical": lambda: certificate(but(0, USAGE, False)),
    "may sign certificates": lambda: certificate(
        but(0, x509.KeyUsage(True, False, False, False, False, True, False, False, False), True)
    ),
    "key encipherment too": lambda: certificate(
        but(0, x509.KeyUsage(True, False, True, False, False, False, False, False, False), True)
    ),
    "no extended key usage": lambda: certificate(but(1)),
    "client authentication too": lambda: certificate(
        but(1, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    ),
    "client authentication instead": lambda: certificate(
        but(1, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    ),
    "extended key usage critical": lambda: certificate(but(1, EKU, True)),
    "no subject alternative name": lambda: certificate(but(2)),
    "names not critical": lambda: certificate(but(2, SAN, False)),
    "an address among the names": lambda: certificate(
        but(2, x509.SubjectAlternativeName([x509.DNSName(NAME), x509.RFC822Name("a@b.test")]), True)
    ),
    "only a URI": lambda: certificate(
        but(2, x509.SubjectAlternativeName([x509.UniformResourceIdentifier("https://a.test")]), True)
    ),
    "no evidence": lambda: certificate(but(3)),
    "evidence critical": lambda: certificate(but(3, evidence(), True)),
    "basic constraints too": lambda: certificate(
        [*HONEST, (x509.BasicConstraints(ca=True, path_length=None), True)]
    ),
    "an unknown extension too": lambda: certificate(
        [*HONEST, (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), False)]
    ),
    "a byte behind it": lambda: certificate() + b"\0",
    "a byte missing": lambda: certificate()[:-1],
    "empty": lambda: b"",
    "PEM": lambda: b"-----BEGIN CERTIFICATE-----\n",
}  # fmt: skip


@pytest.mark.parametrize("what", DEVIATIONS)
def test_a_certificate_outside_of_the_profile_is_refused(what: str) -> None:
    refuse(DEVIATIONS[what]())


def test_evidence_that_stands_twice_is_refused() -> None:
    """The library that makes certificates will not write one: a neighbour's OID is changed, and all signed anew."""
    neighbour = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.23.133.5.4.8"), CONTENT)
    both = x509.load_der_x509_certificate(certificate([*HONEST, (neighbour, False)])).tbs_certificate_bytes
    twice = both.replace(bytes.fromhex("0606678105050408"), bytes.fromhex("0606678105050409"))
    assert twice != both
    refuse(_signed(twice))


def test_a_negative_or_zero_serial_number_is_refused() -> None:
    tbs = x509.load_der_x509_certificate(certificate(serial=5)).tbs_certificate_bytes
    at = tbs.index(b"\x02\x01\x05")
    for value in (b"\x00", b"\x85"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library only warns
            refuse(_signed(tbs[: at + 2] + value + tbs[at + 3 :]))


def test_a_version_1_certificate_is_refused() -> None:
    tbs = x509.load_der_x509_certificate(certificate()).tbs_certificate_bytes
    for version in (b"\x00", b"\x01", b"\x03"):
        refuse(_signed(tbs.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01" + version, 1)))


def test_a_compressed_point_is_refused() -> None:
    """The key hash covers the SPKI in one spelling; a second one would be a second name of the same key."""
    der, spki = certificate(), leaf_key().public_key()
    plain = spki.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    short = spki.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    old = b"\x03\x42\x00" + plain
    assert old in der
    rebuilt = _resized(der, old, b"\x03" + bytes([len(short) + 1]) + b"\x00" + short)
    assert x509.load_der_x509_certificate(rebuilt).public_key() == spki
    refuse(rebuilt)


def _tlv(tag: int, body: bytes) -> bytes:
    size = len(body)
    return bytes([tag]) + (bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")) + body


def _signed(tbs: bytes) -> bytes:
    """A certificate of *tbs*, signed by the honest leaf's key."""
    signature = leaf_key().sign(tbs, ec.ECDSA(hashes.SHA256()))
    return _tlv(0x30, tbs + bytes.fromhex("300a06082a8648ce3d040302") + _tlv(0x03, b"\0" + signature))


def _resized(der: bytes, old: bytes, new: bytes) -> bytes:
    """*der* with the SPKI's BIT STRING replaced and signed anew: lengths of SPKI and TBS corrected."""
    tbs = x509.load_der_x509_certificate(der).tbs_certificate_bytes
    at = tbs.index(old)
    algorithm = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
    start = at - len(algorithm) - 2
    assert tbs[start] == 0x30
    return _signed(_tlv(0x30, tbs[4:start] + _tlv(0x30, algorithm + new) + tbs[at + len(old) :]))


def test_the_rebuilding_helper_makes_leaves_that_are_read() -> None:
    """Or the test above would pass for a broken signature."""
    plain = (
        leaf_key().public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )
    old = b"\x03\x42\x00" + plain
    assert Leaf.parse(_resized(certificate(), old, old)).dns_names == (NAME,)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "FORMAT_CBOR"),
        (b"\xf6", "FORMAT_EXTENSION"),
        (CONTENT + b"\0", "FORMAT_CBOR"),
        (cbor.encode([b"q", b"c"]), "FORMAT_EXTENSION"),
        (cbor.encode(cbor2.CBORTag(60001, [b"q", b"c"])), "FORMAT_CBOR"),
        (cbor.encode(cbor2.CBORTag(60000, [b"q"])), "FORMAT_EXTENSION"),
        (cbor.encode(cbor2.CBORTag(60000, [b"q", b"c", b"x"])), "FORMAT_EXTENSION"),
        (cbor.encode(cbor2.CBORTag(60000, [b"q", "c"])), "FORMAT_EXTENSION"),
        (cbor.encode(cbor2.CBORTag(60000, cbor2.CBORTag(60000, [b"q", b"c"]))), "FORMAT_EXTENSION"),
        (cbor.encode(cbor2.CBORTag(60000, [b"q" * 17000, b"c"])), "FORMAT_EXTENSION"),
        (cbor.encode(cbor2.CBORTag(60000, [b"q", b"c" * 17000])), "FORMAT_EXTENSION"),
        (cbor.encode({"__cmwc_t": PROFILE, "gpu": [GPU_MEDIA, b"g"]}), "FORMAT_EXTENSION"),
        (b"\x81" * 30_000, "FORMAT_CBOR"),
        (b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff", "FORMAT_CBOR"),
        (b"\x5b\x00\x00\x00\xff\xff\xff\xff\xff", "FORMAT_CBOR"),
        (bytes(MAX_LEAF + 1), "FORMAT_CBOR"),
    ],
)  # fmt: skip
def test_a_malformed_extension_is_refused(content: bytes, code: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_extension(content)
    assert caught.value.code == code
    if len(content) < 20_000 and content:
        refuse(certificate(but(3, evidence(content), False)), code)


INNER = cbor.encode(cbor2.CBORTag(60000, [b"q", b"c"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"__cmwc_t": "urn:uuid:00000000-0000-0000-0000-000000000000"},
        {"__cmwc_t": 1},
        {"extra": [GPU_MEDIA, b"g"]},
        {"tdx": [GPU_MEDIA, INNER]},
        {"tdx": [TDX_MEDIA, b"\x80"]},
        {"tdx": [TDX_MEDIA, "text"]},
        {"tdx": [TDX_MEDIA, INNER, 1]},
        {"tdx": TDX_MEDIA},
        {"gpu": [TDX_MEDIA, b"g"]},
        {"gpu": [GPU_MEDIA]},
        {"gpu": None},
    ],
)
def test_a_collection_with_another_member_is_refused(changes: dict[str, Any]) -> None:
    honest = {"__cmwc_t": PROFILE, "tdx": [TDX_MEDIA, INNER], "gpu": [GPU_MEDIA, b"g"]}
    assert decode_extension(cbor.encode(honest)).gpu == b"g"
    with pytest.raises(FormatError):
        decode_extension(cbor.encode(honest | changes))


def test_tdx_alone_is_the_ccc_form() -> None:
    raw = encode_extension(b"q", b"c", None)
    assert raw == bytes.fromhex("d9ea60") + cbor.encode([b"q", b"c"])
    assert decode_extension(raw).gpu is None


@given(st.binary(max_size=80))
@settings(max_examples=200)
def test_random_extensions_raise_nothing_but_a_format_error(raw: bytes) -> None:
    try:
        found = decode_extension(raw)
    except FormatError:
        return
    assert encode_extension(found.quote, found.claims, found.gpu) == raw


def test_a_leaf_with_one_gpu_fits_the_first_flight() -> None:
    """13,056 bytes: with the rest of the flight, ten segments and no further round trip."""
    assert len(genuine().evidence.leaf) <= 13_056
    assert len(genuine(gpus=()).evidence.leaf) <= 13_056


def test_eight_gpus_fit_every_tls_stack() -> None:
    honest = genuine(gpus=tuple(range(8)))
    assert honest.verify().codes == ()
    assert len(honest.evidence.leaf) <= MAX_LEAF


def test_a_leaf_too_long_is_neither_built_nor_read() -> None:
    honest = genuine()
    with pytest.raises(FormatError, match="too long"):
        build_leaf(honest.key, honest.claims, b"q" * 16_000, b"g" * 16_000)
    refuse(bytes(MAX_LEAF + 1))


def test_a_first_name_longer_than_a_common_name_is_refused_with_words() -> None:
    honest = genuine()
    claims = dataclasses.replace(honest.claims, dns_names=("a" * 60 + ".test",))
    with pytest.raises(FormatError) as caught:
        build_leaf(honest.key, claims, b"q", None)
    assert caught.value.code == "FORMAT_LEAF"


def test_a_changed_byte_of_a_leaf_raises_nothing_but_a_format_error() -> None:
    der = genuine().evidence.leaf
    draw = random.Random(7)
    for at in {*range(700), *draw.sample(range(len(der)), 600)} & {*range(len(der))}:
        for bits in (1, 0x80, 0xFF):
            changed = bytearray(der)
            changed[at] ^= bits
            with pytest.raises(FormatError):
                Leaf.parse(bytes(changed))
