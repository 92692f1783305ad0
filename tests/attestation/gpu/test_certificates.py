"""What a certificate of NVIDIA's hierarchies may be and do: one chain of test keys, with one rule broken at a time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from attestation.errors import FormatError, RefusedError
from attestation.gpu.certificates import Certificate, bit_string, check_chain

NOW = 1_795_000_000
NAMES = ("AK", "IK", "ICA", "Identity", "Root")
DICE = ObjectIdentifier("2.23.133.5.4.1")
UNKNOWN = ObjectIdentifier("2.999.7")  # the arc for examples (ITU-T X.660)


@cache
def key(name: str) -> Any:  # Any: private keys of several algorithms
    if name == "RSA":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1() if name == "P-256" else ec.SECP384R1())


@dataclass(frozen=True)
class Form:
    """One certificate. `issuer` names it, `signer` is the key that signs; None for the next in the chain."""

    ca: bool | None = True
    path_length: int | None = None
    usage: bool | None = True
    """keyCertSign on a CA, digitalSignature on the leaf; None leaves the extension out."""
    own_key: str | None = None
    issuer: str | None = None
    signer: str | None = None
    digest: hashes.SHA256 | hashes.SHA384 = field(default_factory=hashes.SHA384)
    begin: int = NOW - 1000
    end: int = NOW + 1000
    extra: tuple[tuple[ObjectIdentifier, bool], ...] = ()


def chain(*changes: tuple[int, Callable[[Form], Form]]) -> tuple[list[bytes], bytes]:
    """Four certificates, leaf first, and the root; each change is applied to the form at its place (4 is the root)."""
    forms = [Form(ca=False), Form(), Form(), Form(), Form()]
    for place, change in changes:
        forms[place] = change(forms[place])
    ders = [made(place, form) for place, form in enumerate(forms)]
    return ders[:4], ders[4]


def made(place: int, form: Form) -> bytes:
    above = NAMES[min(place + 1, 4)]
    name, issuer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (NAMES[place], form.issuer or above)
    )
    begin, end = (dt.datetime.fromtimestamp(t, dt.UTC) for t in (form.begin, form.end))
    public = key(form.own_key or NAMES[place]).public_key()
    builder = x509.CertificateBuilder(issuer, name, public, 0x4100 + place, begin, end)
    if form.ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(form.ca, form.path_length), critical=True)
    if form.usage is not None:
        usage = {"digital_signature": place == 0, "key_cert_sign": place > 0}
        if not form.usage:
            usage = {"digital_signature": place > 0, "key_cert_sign": False}
        others = (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        )
        builder = builder.add_extension(
            x509.KeyUsage(crl_sign=True, **usage, **dict.fromkeys(others, False)), critical=True
        )
    for oid, critical in form.extra:
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, b"\x30\x00"), critical=critical)
    signed = builder.sign(key(form.signer or above), form.digest)
    return signed.public_bytes(serialization.Encoding.DER)


def code(*changes: tuple[int, Callable[[Form], Form]]) -> str:
    ders, root = chain(*changes)
    with pytest.raises((FormatError, RefusedError)) as refused:
        check_chain(ders, root=root, length=4, now=NOW, code="GPU_CHAIN")
    return str(refused.value.code)


def test_chain_that_keeps_every_rule_is_accepted() -> None:
    ders, root = chain(
        (0, lambda f: replace(f, extra=((DICE, True),))), (2, lambda f: replace(f, extra=((UNKNOWN, False),)))
    )
    found = check_chain(ders, root=root, length=4, now=NOW, code="GPU_CHAIN")
    assert [c.common_name for c in found] == list(NAMES) and found[1].serial == "4101"


@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_critical_extension_that_is_not_understood_is_refused(place: int) -> None:
    """RFC 5280 §4.2: whoever does not know a critical extension must refuse the certificate."""
    assert code((place, lambda f: replace(f, extra=((UNKNOWN, True),)))) == "FORMAT_GPU_CERTIFICATE"


@pytest.mark.parametrize("place", range(5), ids=NAMES)
@pytest.mark.parametrize("offset", [-2000, 2000], ids=["expired", "not yet valid"])
def test_certificate_outside_its_time_is_refused(place: int, offset: int) -> None:
    change = (place, lambda f: replace(f, begin=f.begin + offset, end=f.end + offset))
    assert code(change) == "GPU_CHAIN_VALIDITY"


@pytest.mark.parametrize("place", range(1, 5), ids=NAMES[1:])
@pytest.mark.parametrize(
    "fields", [{"ca": False}, {"ca": None}, {"usage": False}, {"usage": None}], ids=lambda f: f"{f}"
)
def test_issuer_that_may_not_issue_is_refused(place: int, fields: dict[str, Any]) -> None:
    assert code((place, lambda f: replace(f, **fields))) == "GPU_CHAIN_CA"


@pytest.mark.parametrize("fields", [{"ca": True}, {"usage": False}, {"usage": None}], ids=lambda f: f"{f}")
def test_leaf_that_is_a_ca_or_may_not_sign_data_is_refused(fields: dict[str, Any]) -> None:
    assert code((0, lambda f: replace(f, **fields))) == "GPU_CHAIN_CA"


def test_path_lengths_hold() -> None:
    lengths = [(place, lambda f, n=place - 1: replace(f, path_length=n)) for place in range(1, 5)]
    ders, root = chain(*lengths)
    check_chain(ders, root=root, length=4, now=NOW, code="GPU_CHAIN")
    for place in range(2, 5):
        assert code((place, lambda f, n=place - 2: replace(f, path_length=n))) == "GPU_CHAIN_CA"  # type: ignore[misc]


@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_signature_of_another_key_and_name_of_another_issuer_are_refused(place: int) -> None:
    assert code((place, lambda f: replace(f, signer="stranger"))) == "GPU_CHAIN_ISSUER"
    assert code((place, lambda f: replace(f, issuer="stranger"))) == "GPU_CHAIN_ISSUER"


@pytest.mark.parametrize("name", ["P-256", "RSA"])
@pytest.mark.parametrize("place", range(4), ids=NAMES[:4])
def test_key_that_is_not_p384_is_refused(place: int, name: str) -> None:
    changes = [(place, lambda f: replace(f, own_key=name))]
    changes += [(place - 1, lambda f: replace(f, signer=name))] if place else []
    assert code(*changes) == "FORMAT_GPU_CERTIFICATE"


@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_signature_over_another_digest_is_refused(place: int) -> None:
    assert code((place, lambda f: replace(f, digest=hashes.SHA256()))) == "FORMAT_GPU_CERTIFICATE"


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_chain_of_another_length_is_refused(count: int) -> None:
    ders, root = chain()
    with pytest.raises(RefusedError, match="GPU_CHAIN_LENGTH"):
        check_chain([*ders, root][:count], root=root, length=4, now=NOW, code="GPU_CHAIN")


def test_root_that_the_chain_brings_does_not_replace_the_pinned_one() -> None:
    ders, _ = chain()
    _, pinned = chain((4, lambda f: replace(f, own_key="stranger", signer="stranger")))
    with pytest.raises(RefusedError, match="GPU_CHAIN_ISSUER"):
        check_chain(ders, root=pinned, length=4, now=NOW, code="GPU_CHAIN")


def test_remembered_certificates_are_judged_at_each_time_anew() -> None:
    ders, root = chain()
    check_chain(ders, root=root, length=4, now=NOW, code="GPU_CHAIN")
    with pytest.raises(RefusedError, match="GPU_CHAIN_VALIDITY"):
        check_chain(ders, root=root, length=4, now=NOW + 1001, code="GPU_CHAIN")


def test_bytes_after_a_certificate_are_refused() -> None:
    (leaf, *_), _ = chain()
    with pytest.raises(FormatError):
        Certificate.parse(leaf + b"\0")


def test_bit_string_is_the_der_of_whole_bytes() -> None:
    assert bit_string(b"\xaa\xbb") == bytes.fromhex("030300aabb")
    with pytest.raises(ValueError, match="too long"):
        bit_string(bytes(127))
