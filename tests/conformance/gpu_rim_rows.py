"""Reference integrity manifests: values, form, signature profile, signers."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree  # type: ignore[import-untyped]  # lxml ships no types
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureMethod

from tests.conformance.book import Book, b64
from tests.conformance.gpu_machine import (
    DAY,
    DRIVER,
    NOW,
    VBIOS,
    entry,
    form,
    manifest,
    manifests,
    signed,
    stranger,
    tee,
)
from tests.devtee.pki import Entity, utc
from tests.devtee.rim import RimSpec

__all__ = ["rim_rows"]

SWID = "ISO/IEC 19770-2:2015"
XMLSIG = "W3C XML Signature 1.1"
TCG = "TCG Reference Integrity Manifest Information Model"
META = '<Meta xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" colloquialVersion="1" product="GH100"/>'

Tree = Any  # lxml ships no types


def rim_rows(book: Book) -> None:
    """All rows about manifests; the control is `one`."""
    _values(book)
    _text(book)
    _profile(book)
    _resources(book)


def _values(book: Book) -> None:
    book.clause = f"{TCG}: measurements"
    mismatch, nine = "GPU_RIM_MISMATCH", bytes([9]) * 48
    for name, told, why in (
        ("vbios-measurement", form(measurements={9: nine}), "other VBIOS firmware"),
        ("driver-measurement", form(measurements={30: nine}), "another driver"),
        ("developer-tools", form(measurements={35: nine}, nvdec0=0xAA), "measurement 35 of a device in developer mode"),
        ("measurement-zero-expected", form(measurements={0: nine}), "zeros are a golden value too"),
        ("measurement-zero-shown", form(measurements={21: bytes(48)}), "zeros in a golden value's place"),
    ):
        book.refuse(f"rim-{name}", "one", mismatch, why, evidence=[entry(0, told)])
    book.refuse(
        "rim-golden-value-of-zeros",
        "one",
        mismatch,
        "a signed manifest with another value",
        rims=manifests(driver=signed(_set(30, Hash0="00" * 48))),
    )
    book.refuse(
        "rim-unknown-word-for-active",
        "one",
        mismatch,
        "what is not plainly inactive is compared",
        rims=manifests(driver=signed(_set(50, Hash0="11" * 48, active="disabled"))),
    )
    book.clause = f"{TCG}: product and version"
    book.refuse(
        "rim-of-another-version",
        "one",
        "GPU_RIM_VERSION",
        "golden values of another driver",
        rims=manifests(driver=signed(_meta("colloquialVersion", "1.2.3"))),
    )
    book.refuse(
        "rim-version-prefix",
        "one",
        "GPU_RIM_VERSION",
        "versions are compared whole",
        rims=manifests(driver=signed(_meta("colloquialVersion", "550.90"))),
    )
    book.refuse(
        "rim-of-another-chip",
        "one",
        "GPU_RIM_PRODUCT",
        "golden values of another chip",
        rims=manifests(driver=signed(_meta("product", "GB100"))),
    )
    exchanged = {DRIVER: b64(manifest(VBIOS)), VBIOS: b64(manifest(DRIVER))}
    book.refuse("rims-exchanged", "one", "GPU_RIM_VERSION", "names decide nothing", rims=exchanged)
    book.clause = f"{TCG}: two manifests for one device"
    book.refuse(
        "rim-index-active-in-both",
        "one",
        "GPU_RIM_OVERLAP",
        "which of two counts would be up to the reader",
        rims=manifests(driver=signed(_set(9, active="True", **_golden(9)))),
    )
    book.refuse(
        "rim-with-nothing-active",
        "one",
        "GPU_RIM_EMPTY",
        "compares nothing, passes all",
        rims=manifests(driver=signed(_inactive(()))),
    )
    book.refuse(
        "rim-with-only-the-skipped-index",
        "one",
        "GPU_RIM_EMPTY",
        "compares nothing while NVDEC0 is off",
        rims=manifests(driver=signed(_inactive((35,)))),
    )


def _text(book: Book) -> None:
    text = manifest()
    signature = _signature(text)
    form_, wrong = "FORMAT_GPU_RIM", "GPU_RIM_SIGNATURE"
    last = rb"<ds:X509Certificate>[^<]*</ds:X509Certificate></ds:X509Data>"
    at = text.index(b'Hash0="', text.index(b'index="7"')) + 7
    edited = text[:at] + bytes([text[at] ^ 1 if chr(text[at]) in "02468" else ord("0")]) + text[at + 1 :]
    if edited == text:
        edited = text[:at] + b"1" + text[at + 1 :]
    other = base64.encodebytes(tee().pki["rim-vbios-l4"].cert.public_bytes(Encoding.DER))
    first = text.index(b"<ds:X509Certificate>") + len(b"<ds:X509Certificate>")
    outer = etree.fromstring(text)
    outer.find("{*}Meta").set("colloquialVersion", "1.2.3")
    old = outer.find("{http://www.w3.org/2000/09/xmldsig#}Signature")
    outer.replace(old, etree.fromstring(text))

    def swap(a: bytes, b: bytes) -> bytes:
        return text.replace(a, b, 1)

    xml = "W3C XML 1.0, one spelling"
    for clause, name, changed, code, why in (
        (xml, "empty", b"", form_, "there is no manifest"),
        (xml, "no-xml", b"<a", form_, "not well formed"),
        (xml, "too-long", text + b"\n" * (1 << 17), form_, "sizes are capped before parsing"),
        (xml, "another-root-element", b"<a>" + text + b"</a>", form_, "not a SoftwareIdentity"),
        (xml, "comment", swap(b"<ds:Signature", b"<!-- x --><ds:Signature"), form_, "canonical form drops comments"),
        (xml, "instruction", swap(b"<ds:Signature", b"<?x y?><ds:Signature"), form_, "for another program"),
        (xml, "cdata", swap(b"<ds:Signature", b"<![CDATA[]]><ds:Signature"), form_, "a second spelling"),
        (xml, "dtd", b'<!DOCTYPE a [<!ENTITY b "c">]>' + text, form_, "entities grow without end"),
        (xml, "outside-dtd", b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x">' + text, form_, "a parser that fetches"),
        (xml, "utf-16", text.decode().encode("utf-16"), form_, "a second encoding"),
        (xml, "utf-7-declared", b'<?xml version="1.0" encoding="UTF-7"?>' + text, form_, "a second encoding"),
        (xml, "byte-beyond-ascii", swap(b"GH100", "GH1ö0".encode()), form_, "a second encoding"),
        (xml, "cr-in-text", swap(b"<ds:DigestValue>", b"<ds:DigestValue>\r\n"), form_, "a second spelling"),
        (xml, "tag-over-two-lines", swap(b" index=", b"\nindex="), form_, "a second spelling"),
        (xml, "blank-at-the-end", text + b" ", form_, "bytes that nobody accounts for"),
        (f"{XMLSIG} §3.2, core validation", "golden-value-edited", edited, wrong, "a value of one's own"),
        (
            f"{XMLSIG} §3.2, core validation",
            "entry-switched-off",
            swap(b'active="True"', b'active="False"'),
            wrong,
            "a comparison switched off",
        ),
        (
            f"{XMLSIG} §3.2, core validation",
            "version-edited",
            swap(b'"550.90.07"', b'"550.90.08"'),
            wrong,
            "another version's name",
        ),
        (
            f"{XMLSIG} §3.2, core validation",
            "certificate-of-another-signer",
            text[:first] + other + text[text.index(b"</ds:X509Certificate>") :],
            wrong,
            "a valid chain, another key",
        ),
        (
            f"{XMLSIG} §4.2, Signature",
            "no-signature",
            text.replace(signature, b""),
            form_,
            "nobody vouches for it",
        ),
        (
            f"{XMLSIG} §4.2, Signature",
            "two-signatures",
            swap(signature, signature * 2),
            form_,
            "which of two counts would be up to the reader",
        ),
        (
            f"{XMLSIG} §4.2, Signature",
            "signature-further-in",
            swap(signature, b"<x>" + signature + b"</x>"),
            form_,
            "it covers another element",
        ),
        (
            f"{XMLSIG} §4.2, Signature",
            "signed-manifest-inside-another",
            etree.tostring(outer),
            form_,
            "read outside, signed inside",
        ),
        (
            f"{XMLSIG} §4.6, Object",
            "object-in-the-signature",
            swap(b"</ds:Signature>", b"<ds:Object/></ds:Signature>"),
            form_,
            "content beside the content",
        ),
        (
            f"{XMLSIG} §4.4, SignedInfo",
            "id-on-signed-info",
            swap(b"<ds:SignedInfo>", b'<ds:SignedInfo Id="a">'),
            form_,
            "something to refer to",
        ),
        (
            f"{XMLSIG} §4.4.3, Reference",
            "reference-to-a-part",
            swap(b'URI=""', b'URI="#a"'),
            form_,
            "the rest would be unsigned",
        ),
        (
            f"{XMLSIG} §4.5, KeyInfo",
            "key-name",
            swap(b"<ds:X509Data>", b"<ds:KeyName>a</ds:KeyName><ds:X509Data>"),
            form_,
            "another way to name a key",
        ),
        (
            f"{XMLSIG} §4.5, KeyInfo",
            "three-certificates",
            re.sub(last, b"</ds:X509Data>", text),
            form_,
            "the root is missing",
        ),
        (
            f"{XMLSIG} §4.2, Signature",
            "text-in-the-signature",
            swap(b"<ds:KeyInfo>", b"x<ds:KeyInfo>"),
            form_,
            "bytes that nobody accounts for",
        ),
        (
            f"{XMLSIG} §4.2, Signature",
            "blank-in-base64",
            swap(b"</ds:DigestValue>", b" </ds:DigestValue>"),
            form_,
            "a second spelling",
        ),
        (
            f"{XMLSIG} §6.2, digests",
            "sha-256-named",
            text.replace(b"xmldsig-more#sha384", b"xmldsig-more#sha256"),
            form_,
            "a weaker digest",
        ),
    ):
        book.clause = clause
        book.refuse(f"rim-{name}", "one", code, why, rims=manifests(driver=changed))


def _profile(book: Book) -> None:
    exclusive = CanonicalizationMethod.EXCLUSIVE_XML_CANONICALIZATION_1_0
    comments = CanonicalizationMethod.CANONICAL_XML_1_1_WITH_COMMENTS
    form_ = "FORMAT_GPU_RIM"
    pki = tee().pki
    key = ec.generate_private_key(ec.SECP384R1())
    own = pki["rim-driver-l4"].cert
    forged = x509.CertificateBuilder(
        own.issuer, own.subject, key.public_key(), own.serial_number, own.not_valid_before_utc, own.not_valid_after_utc,
        list(own.extensions),
    ).sign(key, hashes.SHA384())  # fmt: skip
    for clause, name, changed, code, why in (
        (f"{XMLSIG} §6.2, digests", "digest-sha-512", signed(digest=DigestAlgorithm.SHA512), form_, "one profile"),
        (
            f"{XMLSIG} §6.4, signatures",
            "signature-with-sha-256",
            signed(method=SignatureMethod.ECDSA_SHA256),
            form_,
            "a weaker signature",
        ),
        (
            f"{XMLSIG} §6.5, canonicalization",
            "exclusive-c14n",
            signed(c14n=exclusive),
            form_,
            "namespaces would be unsigned",
        ),
        (f"{XMLSIG} §6.5, canonicalization", "c14n-with-comments", signed(c14n=comments), form_, "one profile"),
        (
            "RFC 5280 §6.1, path validation",
            "chain-out-of-order",
            signed(uppers=("rim-l2", "rim-l3", "rim-root")),
            "GPU_RIM_CHAIN_ISSUER",
            "each is issued by the next",
        ),
        (
            "RFC 5280 §6.1, path validation",
            "chain-ends-in-the-device-root",
            signed(uppers=("rim-l3", "rim-l2", "device-root")),
            "GPU_RIM_CHAIN_ROOT",
            "the vendor's other root",
        ),
        (
            "RFC 5280 §6.1, path validation",
            "chain-with-the-root-twice",
            signed(uppers=("rim-l3", "rim-l2", "rim-root", "rim-root")),
            form_,
            "four certificates and no more",
        ),
        (
            "RFC 5280 §6.1, path validation",
            "signer-certified-by-nobody",
            signed(signer=Entity(key, forged)),
            "GPU_RIM_CHAIN_ISSUER",
            "the signer's name, another key",
        ),
        (
            "RFC 5280 §4.2.1.12, extended key usage",
            "signed-by-a-responder",
            signed(signer=pki["ocsp-rim-l3"]),
            "GPU_RIM_CHAIN_CA",
            "it answers for revocation and must not bless firmware",
        ),
        (
            "RFC 5280 §6.1, path validation",
            "signed-by-an-attestation-key",
            signed(signer=pki["device-ak-0"]),
            "GPU_RIM_CHAIN_ISSUER",
            "a device that blesses itself",
        ),
        (
            "RFC 5280 §6.1, path validation",
            "signed-by-l3",
            signed(signer=pki["rim-l3"]),
            "GPU_RIM_CHAIN_ISSUER",
            "an issuer in the signer's place",
        ),
    ):
        book.clause = clause
        book.refuse(f"rim-{name}", "one", code, why, rims=manifests(driver=changed))
    book.clause = "RFC 5280 §6.1, trust anchor"
    book.refuse(
        "rims-of-another-machine",
        "one",
        "GPU_RIM_CHAIN_ROOT",
        "a root that nobody pinned",
        rims={n: b64(x) for n, x in stranger().rims().items()},
    )
    book.refuse(
        "rim-root-of-the-device-hierarchy",
        "one",
        "GPU_RIM_CHAIN_ROOT",
        "the vendor's other root",
        rim_root=b64(tee().roots_pem["nvidia_device"]),
    )
    book.clause = "RFC 5280 §4.1.2.5, validity"
    times: tuple[tuple[str, RimSpec, str], ...] = (
        ("expired", RimSpec(not_after=utc(NOW - DAY)), "ended yesterday"),
        ("of-the-future", RimSpec(not_before=utc(NOW + DAY)), "begins tomorrow"),
    )
    for name, spec, why in times:
        told = tee().rims(spec)[DRIVER]
        book.refuse(
            f"rim-signer-{name}",
            "one",
            "GPU_RIM_CHAIN_VALIDITY",
            why,
            also=("GPU_OCSP_MISSING",),
            rims=manifests(driver=told),
        )


def _resources(book: Book) -> None:
    book.clause = f"{SWID}: Payload, Resource"
    changes: tuple[tuple[str, Callable[[Tree], object], str], ...] = (
        ("index-twice", _set(5, index="4"), "which of two counts would be up to the reader"),
        ("index-100", _set(5, index="100"), "a report has 64"),
        ("index-05", _set(5, index="05"), "a second spelling"),
        ("index-missing", lambda t: _resource(t, 5).attrib.pop("index"), "a value for nothing"),
        ("resource-of-another-type", _set(5, type="Other"), "not a measurement"),
        ("resource-of-32-bytes", _set(5, size="32"), "SHA-384 has 48"),
        ("more-alternatives-than-values", _set(5, alternatives="2"), "counts that disagree"),
        ("fewer-alternatives-than-values", _set(35, alternatives="1"), "counts that disagree"),
        ("no-alternatives", _set(5, alternatives="0"), "compares nothing"),
        ("17-alternatives", _set(5, alternatives="17"), "numbers are capped"),
        ("digest-of-47-bytes", _set(5, Hash0="00" * 47), "SHA-384 has 48"),
        ("digest-not-hexadecimal", _set(5, Hash0="zz" * 48), "no digest"),
        (
            "no-resources",
            lambda t: [_resource(t, 0).getparent().remove(r) for r in t.findall(".//{*}Resource")],
            "compares nothing",
        ),
        ("65-resources", lambda t: _resource(t, 0).getparent().append(_copy(_resource(t, 5))), "numbers are capped"),
        ("resource-outside-the-payload", lambda t: t.append(_resource(t, 5)), "a value that one reader sees"),
        (
            "two-payloads",
            lambda t: t.find("{*}Payload").addnext(_copy(t.find("{*}Payload"))),
            "which of two counts would be up to the reader",
        ),
        (
            "two-metas",
            lambda t: t.find("{*}Payload").addprevious(etree.fromstring(META)),
            "which of two counts would be up to the reader",
        ),
        ("no-version", lambda t: t.find("{*}Meta").attrib.pop("colloquialVersion"), "golden values of no version"),
    )
    for name, change, why in changes:
        book.refuse(
            f"rim-{name}", "one", "FORMAT_GPU_RIM", f"signed, and still: {why}", rims=manifests(driver=signed(change))
        )


def _signature(text: bytes) -> bytes:
    found = re.search(rb"<ds:Signature.*</ds:Signature>", text, flags=re.S)
    assert found is not None
    return found.group()


def _resource(tree: Tree, index: int) -> Tree:
    return tree.findall(".//{*}Resource")[index]


def _copy(element: Tree) -> Tree:
    return etree.fromstring(etree.tostring(element))


def _set(index: int, /, **attributes: str) -> Callable[[Tree], object]:
    """Attributes of one resource replaced; `Hash0` and so on by their short names."""

    def change(tree: Tree) -> None:
        element = _resource(tree, index)
        long = {str(k).rpartition("}")[2]: k for k in element.attrib}
        for name, value in attributes.items():
            element.set(long.get(name, name), value)

    return change


def _golden(index: int) -> dict[str, str]:
    """The VBIOS manifest's value of one measurement."""
    element = _resource(etree.fromstring(manifest(VBIOS)), index)
    return {"Hash0": next(v for k, v in element.attrib.items() if str(k).endswith("Hash0"))}


def _meta(name: str, value: str) -> Callable[[Tree], object]:
    return lambda tree: tree.find("{*}Meta").set(name, value)


def _inactive(kept: tuple[int, ...]) -> Callable[[Tree], object]:
    """Every resource switched off but those *kept*."""

    def change(tree: Tree) -> None:
        for index, element in enumerate(tree.findall(".//{*}Resource")):
            if index not in kept:
                element.set("active", "False")

    return change
