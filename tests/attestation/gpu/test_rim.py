"""Reference manifests: what the signature covers, what it does not, and that only the signed part is read."""

from __future__ import annotations

import base64
import os
import random
import re
from collections.abc import Callable, Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree  # type: ignore[import-untyped]  # lxml ships no types
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureConstructionMethod, SignatureMethod
from signxml.signer import XMLSigner

from attestation import roots
from attestation.errors import FormatError, RefusedError, VouchsafeError
from attestation.gpu import Report, Rim, rim_ids
from tests.attestation.gpu.judge import NOW, Story, genuine, tee, told
from tests.devtee.gpu import GpuForm
from tests.devtee.pki import Entity
from tests.devtee.rim import RimSpec
from tests.vectors import VECTORS, cases, need_vectors

ALL = os.environ.get("VOUCHSAFE_SWEEP") == "all"
SAMPLE = 250
DRIVER = "NV_GPU_DRIVER_GH100_550.90.07"
LAST_CERTIFICATE = rb"<ds:X509Certificate>[^<]*</ds:X509Certificate></ds:X509Data>"
DS = "{http://www.w3.org/2000/09/xmldsig#}"
ECDSA = SignatureMethod.ECDSA_SHA384
C14N11 = CanonicalizationMethod.CANONICAL_XML_1_1


def root() -> bytes:
    return tee().roots.nvidia_rim


def xml() -> bytes:
    return told().rims[DRIVER]


def refused(text: bytes) -> str:
    with pytest.raises(VouchsafeError) as caught:
        Rim.parse(text, root=root())
    return caught.value.code


def signed(
    tree: etree._Element,
    signer: Entity | None = None,
    uppers: Sequence[str] = ("rim-l3", "rim-l2", "rim-root"),
    *,
    method: SignatureMethod = ECDSA,
    digest: DigestAlgorithm = DigestAlgorithm.SHA384,
    c14n: CanonicalizationMethod = C14N11,
    reference: str | None = None,
) -> bytes:
    """*tree* without its signature, signed anew as whoever holds *signer*."""
    for old in tree.findall(f"{DS}Signature"):
        tree.remove(old)
    signer = signer or tee().pki["rim-driver-l4"]
    tool = XMLSigner(
        method=SignatureConstructionMethod.enveloped, signature_algorithm=method, digest_algorithm=digest,
        c14n_algorithm=c14n,
    )  # fmt: skip
    chain = [signer.cert, *(tee().pki[r].cert for r in uppers)]
    done = tool.sign(tree, key=signer.key, cert=chain, always_add_key_value=False, reference_uri=reference)
    return bytes(etree.tostring(done))


def test_golden_values_and_ids_of_the_real_manifests() -> None:
    need_vectors()
    story = genuine(VECTORS / "gpu" / "h100-550.90.07-full")
    report = Report.parse(story.evidence.devices[0].report)
    assert rim_ids(report) == (DRIVER, "NV_GPU_VBIOS_1010_0200_882_96009F0001")
    driver, vbios = (Rim.parse(story.rims[name], root=roots.NVIDIA_RIM_ROOT) for name in rim_ids(report))
    assert sorted(driver.golden) == [7, *range(21, 41)] and sorted(vbios.golden) == [*range(7), *range(8, 13)]
    assert (driver.version, driver.product, vbios.version) == ("550.90.07", "GH100", "96.00.9F.00.01")
    switch = genuine(VECTORS / "gpu" / "ls10-96.10.55.00.01")
    (name,) = rim_ids(Report.parse(switch.evidence.devices[0].report))
    assert len(Rim.parse(switch.rims[name], root=roots.NVIDIA_RIM_ROOT).golden) == 31


def test_blackwell_asks_for_the_manifests_of_its_chip() -> None:
    raw = told(GpuForm(driver="570.1", extra_opaque=((35, b"GB100\0"),))).evidence.devices[0].report
    assert rim_ids(Report.parse(raw))[0] == "NV_GPU_CC_DRIVER_GB100_570.1"


def test_a_manifest_of_another_chip_is_refused() -> None:
    tree = etree.fromstring(xml())
    tree.find("{*}Meta").set("product", "GB100")
    story = told()
    verdict = Story(**{**vars(story), "rims": {**story.rims, DRIVER: signed(tree)}}).judge()
    assert "GPU_RIM_PRODUCT" in verdict.codes


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("empty", lambda t: b"", "FORMAT_GPU_RIM"),
        ("no XML", lambda t: b"<a", "FORMAT_GPU_RIM"),
        ("too long", lambda t: t + b"\n" * (1 << 17), "FORMAT_GPU_RIM"),
        ("another root element", lambda t: b"<a>" + t + b"</a>", "FORMAT_GPU_RIM"),
        ("golden value edited", lambda t: edit_golden(t), "GPU_RIM_SIGNATURE"),
        ("entry switched off", lambda t: t.replace(b'active="True"', b'active="False"', 1), "GPU_RIM_SIGNATURE"),
        ("version edited", lambda t: t.replace(b'"550.90.07"', b'"550.90.08"', 1), "GPU_RIM_SIGNATURE"),
        ("no signature", lambda t: re.sub(rb"<ds:Signature.*</ds:Signature>", b"", t, flags=re.S), "FORMAT_GPU_RIM"),
        ("two signatures", lambda t: t.replace(b"</ds:Signature>", b"</ds:Signature>" + sig(t)), "FORMAT_GPU_RIM"),
        ("signature further in", lambda t: t.replace(sig(t), b"<x>" + sig(t) + b"</x>"), "FORMAT_GPU_RIM"),
        ("a comment", lambda t: t.replace(b"<ds:Signature", b"<!-- x --><ds:Signature"), "FORMAT_GPU_RIM"),
        ("an instruction", lambda t: t.replace(b"<ds:Signature", b"<?x y?><ds:Signature"), "FORMAT_GPU_RIM"),
        ("CDATA", lambda t: t.replace(b"<ds:Signature", b"<![CDATA[]]><ds:Signature"), "FORMAT_GPU_RIM"),
        ("a DTD", lambda t: b'<!DOCTYPE a [<!ENTITY b "c">]>' + t, "FORMAT_GPU_RIM"),
        ("an outside DTD", lambda t: b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x">' + t, "FORMAT_GPU_RIM"),
        ("UTF-16", lambda t: t.decode().encode("utf-16"), "FORMAT_GPU_RIM"),
        ("UTF-7 declared", lambda t: b'<?xml version="1.0" encoding="UTF-7"?>' + t, "FORMAT_GPU_RIM"),
        ("a byte beyond ASCII", lambda t: t.replace(b"GH100", "GH1ö0".encode(), 1), "FORMAT_GPU_RIM"),
        ("CR LF", lambda t: t.replace(b"\n", b"\r\n"), "FORMAT_GPU_RIM"),
        ("a tag over two lines", lambda t: t.replace(b" index=", b"\nindex=", 1), "FORMAT_GPU_RIM"),
        ("a blank at the end", lambda t: t + b" ", "FORMAT_GPU_RIM"),
        ("two newlines at the end", lambda t: t + b"\n\n", "FORMAT_GPU_RIM"),
        (
            "an Object in the signature",
            lambda t: t.replace(b"</ds:Signature>", b"<ds:Object/></ds:Signature>"),
            "FORMAT_GPU_RIM",
        ),
        (
            "an Id on the signature",
            lambda t: t.replace(b"<ds:SignedInfo>", b'<ds:SignedInfo Id="a">'),
            "FORMAT_GPU_RIM",
        ),
        (
            "a KeyValue",
            lambda t: t.replace(b"<ds:X509Data>", b"<ds:KeyName>a</ds:KeyName><ds:X509Data>"),
            "FORMAT_GPU_RIM",
        ),
        ("text in the signature", lambda t: t.replace(b"<ds:KeyInfo>", b"x<ds:KeyInfo>"), "FORMAT_GPU_RIM"),
        ("blanks in base64", lambda t: t.replace(b"</ds:DigestValue>", b" </ds:DigestValue>"), "FORMAT_GPU_RIM"),
        ("three certificates", lambda t: re.sub(LAST_CERTIFICATE, b"</ds:X509Data>", t), "FORMAT_GPU_RIM"),
        ("a reference to a part", lambda t: t.replace(b'URI=""', b'URI="#a"'), "FORMAT_GPU_RIM"),
        ("SHA-256 digests", lambda t: t.replace(b"xmldsig-more#sha384", b"xmldsig-more#sha256"), "FORMAT_GPU_RIM"),
    ],
)
def test_changed_manifest_is_refused(name: str, change: Callable[[bytes], bytes], code: str) -> None:
    assert refused(change(xml())) == code


def sig(text: bytes) -> bytes:
    found = re.search(rb"<ds:Signature.*</ds:Signature>", text, flags=re.S)
    assert found is not None
    return found.group()


def edit_golden(text: bytes) -> bytes:
    at = text.index(b'index="7"')
    at = text.index(b'Hash0="', at) + 7
    return text[:at] + bytes([text[at] ^ 1 if chr(text[at]) in "02468" else ord("0")]) + text[at + 1 :]


def test_xml_declaration_of_plain_encodings_is_read() -> None:
    assert Rim.parse(b'<?xml version="1.0" encoding="UTF-8"?>\n' + xml() + b"\n", root=root()).version == "550.90.07"


def test_signature_that_covers_something_else_is_refused() -> None:
    """Wrapping: a signed manifest hidden inside another whose values one would like to see read."""
    inner, outer = etree.fromstring(xml()), etree.fromstring(xml())
    outer.find("{*}Meta").set("colloquialVersion", "1.2.3")
    signature = outer.find(f"{DS}Signature")
    outer.replace(signature, inner)
    assert refused(etree.tostring(outer)) == "FORMAT_GPU_RIM"
    outer.append(signature)
    assert refused(etree.tostring(outer)) in ("FORMAT_GPU_RIM", "GPU_RIM_SIGNATURE")


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"digest": DigestAlgorithm.SHA512}, "FORMAT_GPU_RIM"),
        ({"method": SignatureMethod.ECDSA_SHA256}, "FORMAT_GPU_RIM"),
        ({"c14n": CanonicalizationMethod.EXCLUSIVE_XML_CANONICALIZATION_1_0}, "FORMAT_GPU_RIM"),
        ({"c14n": CanonicalizationMethod.CANONICAL_XML_1_1_WITH_COMMENTS}, "FORMAT_GPU_RIM"),
        ({"uppers": ("rim-l2", "rim-l3", "rim-root")}, "GPU_RIM_CHAIN_ISSUER"),
        ({"uppers": ("rim-l3", "rim-l2", "device-root")}, "GPU_RIM_CHAIN_ROOT"),
        ({"uppers": ("rim-l3", "rim-l2")}, "FORMAT_GPU_RIM"),
        ({"uppers": ("rim-l3", "rim-l2", "rim-root", "rim-root")}, "FORMAT_GPU_RIM"),
    ],
)
def test_other_signature_profile_is_refused(how: dict[str, object], code: str) -> None:
    assert refused(signed(etree.fromstring(xml()), **how)) == code  # type: ignore[arg-type]  # a row of the table


@pytest.mark.parametrize("role", ["ocsp-rim-l3", "device-ak-0", "rim-l3"])
def test_another_certificate_of_the_same_house_signs_no_manifest(role: str) -> None:
    """L3 also issued an OCSP responder: its key answers for revocation and must not bless firmware."""
    code = refused(signed(etree.fromstring(xml()), tee().pki[role]))
    assert code in ("GPU_RIM_CHAIN_CA", "GPU_RIM_CHAIN_ISSUER")
    if role == "ocsp-rim-l3":
        assert code == "GPU_RIM_CHAIN_CA"


def test_signer_certified_by_nobody_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    own = tee().pki["rim-driver-l4"].cert
    cert = (
        x509.CertificateBuilder(own.issuer, own.subject, key.public_key(), own.serial_number, own.not_valid_before_utc,
                                own.not_valid_after_utc, list(own.extensions)).sign(key, hashes.SHA384())
    )  # fmt: skip
    assert refused(signed(etree.fromstring(xml()), Entity(key, cert))) == "GPU_RIM_CHAIN_ISSUER"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index twice", lambda r: r[5].set("index", "4")),
        ("index 100", lambda r: r[5].set("index", "100")),
        ("index 05", lambda r: r[5].set("index", "05")),
        ("no index", lambda r: r[5].attrib.pop("index")),
        ("another type", lambda r: r[5].set("type", "Other")),
        ("32 bytes", lambda r: r[5].set("size", "32")),
        ("more alternatives than values", lambda r: r[5].set("alternatives", "2")),
        ("fewer alternatives than values", lambda r: r[35].set("alternatives", "1")),
        ("no alternatives", lambda r: r[5].set("alternatives", "0")),
        ("17 alternatives", lambda r: r[5].set("alternatives", "17")),
        ("a digest of 47 bytes", lambda r: r[5].set(hash0(r[5]), "00" * 47)),
        ("no hexadecimal", lambda r: r[5].set(hash0(r[5]), "zz" * 48)),
        ("no resources", lambda r: [e.getparent().remove(e) for e in r]),
        ("65 resources", lambda r: r[5].getparent().append(etree.fromstring(etree.tostring(r[5])))),
        ("a resource outside the payload", lambda r: r[5].getparent().getparent().append(r[5])),
        ("two payloads", lambda r: r[5].getparent().addnext(etree.fromstring(etree.tostring(r[5].getparent())))),
        ("two metas", lambda r: r[5].getparent().addprevious(etree.fromstring(META))),
        ("no version", lambda r: r[5].getparent().getparent().find("{*}Meta").attrib.pop("colloquialVersion")),
    ],
)
def test_signed_manifest_of_another_form_is_refused(
    name: str, change: Callable[[list[etree._Element]], object]
) -> None:
    tree = etree.fromstring(xml())
    change(tree.findall(".//{*}Resource"))
    assert refused(signed(tree)) == "FORMAT_GPU_RIM"


META = '<Meta xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" colloquialVersion="1" product="GH100"/>'


def hash0(element: etree._Element) -> str:
    return next(str(k) for k in element.attrib if k.endswith("Hash0"))


def test_unknown_word_for_active_counts_as_active() -> None:
    tree = etree.fromstring(xml())
    tree.findall(".//{*}Resource")[50].set("active", "disabled")
    assert 50 in Rim.parse(signed(tree), root=root()).golden


def test_time_is_asked_on_every_use_though_the_signature_is_remembered() -> None:
    rim = Rim.parse(xml(), root=root())
    assert Rim.parse(xml(), root=root()) is rim, "the second GPU pays for the manifest again"
    assert rim.valid_at(NOW) > NOW
    for wrong in (0, 1 << 33):
        with pytest.raises(RefusedError, match="GPU_RIM_CHAIN_VALIDITY"):
            rim.valid_at(wrong)
    with pytest.raises(RefusedError, match="GPU_RIM_CHAIN_ROOT"):
        Rim.parse(xml(), root=tee().roots.nvidia_device)


def test_signers_that_were_never_valid_together_are_refused() -> None:
    before = tee().pki["rim-l3"].cert.not_valid_before_utc
    early = tee().rims(RimSpec(not_before=before.replace(year=2009), not_after=before.replace(year=2010)))
    assert refused(early[DRIVER]) == "GPU_RIM_CHAIN_VALIDITY"


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["h100-550.90.07-full", "ls10-96.10.55.00.01"])
def test_no_changed_byte_of_a_real_manifest_is_accepted(name: str) -> None:
    """Nothing is listed as unsigned: white space in tags and line ends, which no signature covers, has one form."""
    need_vectors()
    (text, *_) = genuine(VECTORS / "gpu" / name).rims.values()
    Rim.parse(text, root=roots.NVIDIA_RIM_ROOT)
    pick = random.Random(name)
    blanks = [m.start() for m in re.finditer(rb"\s", text)]
    signature = range(text.index(b"<ds:Signature"), len(text))
    some = [*pick.sample(range(len(text)), SAMPLE), *pick.sample(signature, SAMPLE), *pick.sample(blanks, 60)]
    for at in range(len(text)) if ALL else [*some, len(text) - 1, len(text) - 2]:
        values = {text[at] ^ (1 << pick.randrange(8)), *(b"\t\n\r " if at in blanks or ALL else b"")} - {text[at]}
        for value in values:
            changed = text[:at] + bytes([value]) + text[at + 1 :]
            with pytest.raises((FormatError, RefusedError)):
                Rim.parse(changed, root=roots.NVIDIA_RIM_ROOT)


@pytest.mark.vectors
def test_unused_bits_of_base64_are_refused() -> None:
    """`Bp4=` and `Bp5=` decode to the same bytes; one spelling is accepted."""
    need_vectors()
    text = genuine(VECTORS / "gpu" / "h100-550.90.07-full").rims[DRIVER]
    assert text.count(b"Bp4=\n") == 1 and base64.b64decode(b"Bp4=") == base64.b64decode(b"Bp5=")
    with pytest.raises(FormatError, match="FORMAT_GPU_RIM"):
        Rim.parse(text.replace(b"Bp4=\n", b"Bp5=\n"), root=roots.NVIDIA_RIM_ROOT)


@pytest.mark.vectors
def test_all_real_manifests_have_the_form_asked_for() -> None:
    need_vectors()
    seen = set()
    for folder in cases("gpu"):
        for file in folder.glob("rims/*.xml"):
            if folder.name != "neg-ls10-rim-digest":
                Rim.parse(file.read_bytes(), root=roots.NVIDIA_RIM_ROOT)
                seen.add(file.name)
    assert len(seen) == 4


def test_certificates_in_a_manifest_are_the_ones_it_was_signed_under() -> None:
    """The second signer's certificate beside the first one's signature: a valid chain, another key."""
    own = base64.encodebytes(tee().pki["rim-driver-l4"].cert.public_bytes(serialization.Encoding.DER))
    text = xml()
    first = text.index(b"<ds:X509Certificate>") + len(b"<ds:X509Certificate>")
    end = text.index(b"</ds:X509Certificate>")
    other = base64.encodebytes(tee().pki["rim-vbios-l4"].cert.public_bytes(serialization.Encoding.DER))
    assert base64.b64decode(text[first:end]) == base64.b64decode(own)
    assert refused(text[:first] + other + text[end:]) == "GPU_RIM_SIGNATURE"


SOLID = st.binary(min_size=1, max_size=40).filter(lambda b: b.strip() != b"")
"""White space added where XML ignores it changes nothing that is read; anything else must not pass."""


@given(st.binary(max_size=400) | st.builds(lambda at, b: xml()[:at] + b + xml()[at:], st.integers(0, 20_000), SOLID))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused_and_never_crash(raw: bytes) -> None:
    assert refused(raw).startswith(("FORMAT_GPU_", "GPU_RIM_"))
