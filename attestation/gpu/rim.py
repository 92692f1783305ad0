"""Reference integrity manifests: NVIDIA's signed golden measurements of one driver, VBIOS or switch BIOS.

A RIM is SWID XML (ISO/IEC 19770-2) with an enveloped XML signature (W3C XML Signature 1.1):

    (1) ASCII, at most 128 KiB, no DTD, entity, comment, CDATA or processing instruction
    (2) one Signature, the root's child; one Reference with URI ""; transforms enveloped and C14N 1.1; ECDSA P-384 with
        SHA-384; four certificates and nothing else in KeyInfo
    (3) the certificates chain to the pinned root: L4 signer, L3, L2, root
    (4) the signature verifies; everything below is read from the signed element alone
    (5) 64 or fewer Measurement entries of 48 bytes, each index once, at least one active
    (6) all certificates valid at the time

(1) to (5) do not depend on the time and are memoised, so that eight GPUs pay for a RIM once; (6) is judged per call.
The carrier of a RIM is not trusted, nor is its name: version and product are compared with the report. Pure.

lxml and signxml are imported when the first RIM is read: they are a fifth of what `import attestation.verifier` costs,
and evidence without a GPU never needs them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from attestation.errors import FormatError, RefusedError
from attestation.gpu.certificates import Certificate, check_chain
from attestation.gpu.report import DIGEST_SIZE, OFF, Report

__all__ = ["Rim", "compare", "rim_ids", "rim_versions"]

MAX_RIM: Final = 128 * 1024
SIGNERS: Final = 3
"""L4, L3 and L2: what lies below the root, and what OCSP is asked about."""
_MAX_ENTRIES: Final = 64
_MAX_ALTERNATIVES: Final = 16
_NVDEC0_INDEX: Final = 35

_SWID: Final = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_HASH: Final = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash"
_DS: Final = "{http://www.w3.org/2000/09/xmldsig#}"
_C14N11: Final = "http://www.w3.org/2006/12/xml-c14n11"
_DECLARATION: Final = re.compile(rb"""<\?xml version=["']1\.0["'] encoding=["'](?:UTF-8|utf-8|ASCII)["'] ?\?>\s*""")
_BROKEN_TAG: Final = re.compile(rb"<[^<>\t\n]*[\t\n]")
_HEX: Final = re.compile(r"[0-9a-f]{96}")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]?")
_SIGNED_INFO: Final = (
    ("SignedInfo", {}),
    ("CanonicalizationMethod", {"Algorithm": _C14N11}),
    ("SignatureMethod", {"Algorithm": "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"}),
    ("Reference", {"URI": ""}),
    ("Transforms", {}),
    ("Transform", {"Algorithm": "http://www.w3.org/2000/09/xmldsig#enveloped-signature"}),
    ("Transform", {"Algorithm": _C14N11}),
    ("DigestMethod", {"Algorithm": "http://www.w3.org/2001/04/xmldsig-more#sha384"}),
    ("DigestValue", {}),
    ("SignatureValue", {}),
    ("KeyInfo", {}),
    ("X509Data", {}),
    *((("X509Certificate", {}),) * (SIGNERS + 1)),
)
"""The elements of a RIM's Signature with their attributes, in document order; nothing else may stand there."""


@dataclass(frozen=True, slots=True)
class Rim:
    """A manifest whose signature chains to the pinned root. It proves what NVIDIA calls good, for whatever version and
    product it names; whether it is still valid is asked with `valid_at`.

    version, product   as `Meta` says: "550.90.07", "GH100"
    golden             allowed values (48 bytes) of each active measurement, by index
    chain              L4, L3, L2, root
    """

    version: str
    product: str
    golden: Mapping[int, tuple[bytes, ...]]
    chain: tuple[Certificate, ...]

    @classmethod
    def parse(cls, xml: bytes, *, root: bytes) -> Rim:
        """(1) to (5) against *root* (DER). Raises `FormatError` FORMAT_GPU_RIM, FORMAT_GPU_CERTIFICATE and
        `RefusedError` GPU_RIM_CHAIN_…, GPU_RIM_SIGNATURE, GPU_RIM_EMPTY."""
        return _parse(xml, root)

    def valid_at(self, now: int) -> int:
        """(6). The end of the shortest validity; raises `RefusedError` GPU_RIM_CHAIN_VALIDITY."""
        check_chain([c.der for c in self.chain[:-1]], root=self.chain[-1].der, length=SIGNERS, now=now,
                    code="GPU_RIM_CHAIN")  # fmt: skip
        return min(c.not_after for c in self.chain)


def rim_ids(report: Report) -> tuple[str, ...]:
    """Ids of the RIMs that *report* must be compared with; NVIDIA's service and `GpuEndorsements` keep them so.

    A GPU: driver, then VBIOS. A switch: its BIOS (LS10 reports name no project: it is NVIDIA's one board)."""
    version = report.vbios_version.replace(".", "")
    if report.kind == "switch":
        return (f"NV_SWITCH_BIOS_5612_0002_890_{version}",)
    prefix = "NV_GPU_DRIVER_GH100" if report.chip == "GH100" else f"NV_GPU_CC_DRIVER_{report.chip}"
    return (
        f"{prefix}_{report.driver_version}",
        f"NV_GPU_VBIOS_{report.project}_{report.project_sku}_{report.chip_sku}_{version}".upper(),
    )


def rim_versions(report: Report) -> tuple[str, ...]:
    """The version that each RIM of `rim_ids` must name, in that order."""
    return (report.driver_version, report.vbios_version) if report.kind == "gpu" else (report.vbios_version,)


def compare(report: Report, rim: Rim, version: str) -> int:
    """Every active golden value of *rim* against *report*; how many there are. Raises `RefusedError`: GPU_RIM_VERSION,
    GPU_RIM_PRODUCT, GPU_RIM_MISMATCH."""
    if rim.version.upper() != version.upper():
        raise RefusedError("GPU_RIM_VERSION", "the RIM is for another version", expected=version, actual=rim.version)
    if rim.product != report.chip:
        raise RefusedError("GPU_RIM_PRODUCT", "the RIM is for another chip", expected=report.chip, actual=rim.product)
    golden = dict(rim.golden)
    if report.nvdec0 == OFF:
        # NVIDIA's rule: with the video decoder off its firmware is not loaded, so there is nothing to measure.
        golden.pop(_NVDEC0_INDEX, None)
    if not golden:
        raise RefusedError("GPU_RIM_EMPTY", "the RIM has nothing to compare with")
    wrong = sorted(i for i, allowed in golden.items() if report.measurements.get(i) not in allowed)
    if wrong:
        raise RefusedError(
            "GPU_RIM_MISMATCH", "measurements differ from the golden values", expected=f"{len(golden)} that match",
            actual=f"measurement {', '.join(map(str, wrong))} differs",
            hint="the device runs other firmware than this version's, or is in developer mode",
        )  # fmt: skip
    return len(golden)


@lru_cache(maxsize=64)
def _parse(xml: bytes, root: bytes) -> Rim:
    tree = _tree(xml)  # (1)
    signature = _signature(tree)  # (2)
    texts = [_base64(e) for e in signature.iter(f"{_DS}X509Certificate")]
    if texts[-1] != root:
        raise RefusedError("GPU_RIM_CHAIN_ROOT", "the RIM's last certificate is not the pinned root")
    # (3) at a time when the signer is valid: this part must not depend on the clock.
    signer = Certificate.parse(texts[0])
    chain = check_chain(texts[:-1], root=root, length=SIGNERS, now=_common(texts), code="GPU_RIM_CHAIN")
    signed = _verified(xml, signer)  # (4)
    version, product = _meta(signed)
    return Rim(version, product, MappingProxyType(_golden(signed)), chain)  # (5)


def _common(ders: Sequence[bytes]) -> int:
    """A second at which all certificates are valid, if there is one."""
    return max(Certificate.parse(der).not_before for der in ders)


def _tree(xml: bytes) -> Any:  # Any: lxml ships no types
    from lxml import etree  # type: ignore[import-untyped]  # lxml ships no types

    if len(xml) > MAX_RIM:
        raise _bad("it is too long", expected=f"at most {MAX_RIM} bytes", actual=len(xml))
    body = xml[m.end() :] if (m := _DECLARATION.match(xml)) else xml
    # Without "<!" and "<?" there is no DTD, no entity, no comment and no CDATA, whatever a parser's defaults are.
    if not body.isascii() or b"<!" in body or b"<?" in body:
        raise _bad("only plain ASCII elements may stand in it (no DTD, comment, CDATA or instruction)")
    # XML reads these as other spellings of the same document; no signature covers them, so one spelling is accepted.
    if b"\r" in body or _BROKEN_TAG.search(body) or not body.startswith(b"<") or body.removesuffix(b"\n")[-1:] != b">":
        raise _bad("white space other than single lines of tags and text")
    try:
        return etree.fromstring(body, _parser())
    except (etree.XMLSyntaxError, ValueError):
        raise _bad("not well-formed XML") from None


def _parser() -> Any:  # Any: lxml ships no types
    from lxml import etree

    return etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, attribute_defaults=False,
        huge_tree=False, encoding="ascii",
    )  # fmt: skip


def _signature(tree: Any) -> Any:  # Any: lxml ships no types
    found = list(tree.iter(f"{_DS}Signature"))
    if tree.tag != f"{_SWID}SoftwareIdentity" or len(found) != 1 or found[0].getparent() is not tree:
        raise _bad("not a SoftwareIdentity with one Signature of its own", actual=f"{len(found)} signatures")
    elements = [(e.tag, dict(e.attrib)) for e in found[0].iter()]
    if elements != [(f"{_DS}Signature", {}), *((_DS + tag, attributes) for tag, attributes in _SIGNED_INFO)]:
        raise _bad("its Signature has another form than NVIDIA's")
    gaps = [e.text for e in found[0].iter() if len(e)] + [e.tail for e in found[0].iterdescendants()]
    if any((gap or "").strip() for gap in gaps):
        raise _bad("text between the elements of its Signature")
    return found[0]


def _base64(element: Any) -> bytes:  # Any: lxml ships no types
    """The one strict reading: no character but the alphabet and newlines, no unused bits."""
    text = (element.text or "").replace("\n", "")
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if not value or base64.b64encode(value).decode() != text:
        raise _bad(f"{element.tag.removeprefix(_DS)} is not base64")
    return value


def _verified(xml: bytes, signer: Certificate) -> Any:  # Any: lxml ships no types
    """The signed element, re-read from the very bytes that were digested."""
    from lxml import etree
    from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureMethod
    from signxml.exceptions import SignXMLException
    from signxml.verifier import SignatureConfiguration, XMLVerifier

    tree = _tree(xml)
    for name in ("DigestValue", "SignatureValue"):
        for element in tree.iter(_DS + name):
            _base64(element)
    config = SignatureConfiguration(
        require_x509=True,
        location="./",
        expect_references=1,
        signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
        digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
        default_reference_c14n_method=CanonicalizationMethod.CANONICAL_XML_1_1,
        verification_time=datetime.fromtimestamp(signer.not_before, UTC),
    )
    try:
        result = XMLVerifier().verify(tree, x509_cert=signer.parsed, parser=_parser(), expect_config=config)
    except (SignXMLException, etree.LxmlError, ValueError) as err:
        raise RefusedError("GPU_RIM_SIGNATURE", f"the RIM's signature does not verify ({type(err).__name__})") from None
    if isinstance(result, list) or result.signed_xml is None or result.signed_xml.tag != f"{_SWID}SoftwareIdentity":
        raise RefusedError("GPU_RIM_SIGNATURE", "the RIM's signature covers something else")
    return result.signed_xml


def _meta(signed: Any) -> tuple[str, str]:  # Any: lxml ships no types
    found = signed.findall(f"{_SWID}Meta")
    version, product = ("", "") if len(found) != 1 else (found[0].get("colloquialVersion"), found[0].get("product"))
    if not version or not product:
        raise _bad("no Meta with one version and product")
    return str(version), str(product)


def _golden(signed: Any) -> dict[int, tuple[bytes, ...]]:  # Any: lxml ships no types
    payloads = signed.findall(f"{_SWID}Payload")
    entries = list(signed.iter(f"{_SWID}Resource"))
    if len(payloads) != 1 or list(payloads[0]) != entries or not 1 <= len(entries) <= _MAX_ENTRIES:
        raise _bad(f"not one Payload of 1 to {_MAX_ENTRIES} resources", actual=len(entries))
    seen: set[int] = set()
    golden = {}
    for entry in entries:
        index = _number(entry.get("index"))
        if entry.get("type") != "Measurement" or entry.get("size") != str(DIGEST_SIZE) or index in seen:
            raise _bad(f"resource {index} is not a measurement of {DIGEST_SIZE} bytes, or stands twice")
        seen.add(index)
        values = _alternatives(entry, index)
        # Whatever is not plainly inactive counts: an unknown word must not switch a comparison off.
        if entry.get("active") != "False":
            golden[index] = values
    if not golden:
        raise RefusedError("GPU_RIM_EMPTY", "the RIM has no active measurement")
    return golden


def _alternatives(entry: Any, index: int) -> tuple[bytes, ...]:  # Any: lxml ships no types
    count = _number(entry.get("alternatives"))
    names = [f"{_HASH}{n}" for n in range(count)]
    present = {name for name in entry.attrib if name.startswith(_HASH)}
    if not 1 <= count <= _MAX_ALTERNATIVES or present != set(names):
        raise _bad(f"resource {index} has other values than it counts", expected=count, actual=len(present))
    values = [entry.get(name) for name in names]
    if not all(_HEX.fullmatch(value) for value in values):
        raise _bad(f"resource {index} holds something else than hexadecimal digests")
    return tuple(bytes.fromhex(value) for value in values)


def _number(text: str | None) -> int:
    if text is None or not _NUMBER.fullmatch(text):
        raise _bad("a number is missing or malformed", actual=text or "nothing")
    return int(text)


def _bad(reason: str, *, expected: object = "", actual: object = "") -> FormatError:
    return FormatError("FORMAT_GPU_RIM", f"the RIM cannot be used: {reason}", expected=expected, actual=actual)
