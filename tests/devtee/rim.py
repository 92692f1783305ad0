"""Reference integrity manifests: SWID XML as NVIDIA's service serves it, signed by this machine's RIM signers.

64 measurement resources, the TCG RIM attributes in `Meta`, an enveloped XML signature (ECDSA P-384 with SHA-384,
C14N 1.1, one Reference with URI "") and four certificates in X509Data. Passes NVIDIA's schema; measured in
`tests/interop`.

Sources: ISO/IEC 19770-2:2015; TCG Reference Integrity Manifest Information Model; W3C XML Signature 1.1. Pure.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from lxml import etree  # type: ignore[import-untyped]  # lxml ships no types
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureConstructionMethod, SignatureMethod
from signxml.signer import XMLSigner

from tests.devtee.gpu import (
    BLOCKS,
    DRIVER_ACTIVE,
    VBIOS_ACTIVE,
    GpuForm,
    driver_rim_id,
    golden,
    sha384,
    vbios_rim_id,
)
from tests.devtee.pki import NOT_AFTER, NOT_BEFORE, Pki, rim_signer

__all__ = ["RimSpec", "rims"]

_SWID: Final = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_HASH: Final = "http://www.w3.org/2001/04/xmlenc#sha384"
_TCG: Final = "https://trustedcomputinggroup.org/resource/tcg-reference-integrity-manifest-rim-information-model/"


@dataclass(frozen=True, slots=True)
class RimSpec:
    """What the RIMs say.

    form: names the RIM ids (versions, project). driver, vbios: the versions written inside, None for the form's.
    values: golden values by index that replace the right ones. both: indices made active in both RIMs (an error).
    active: None for the genuine sets, or a set for both files. not_before, not_after: validity of a signer made
    for the occasion.
    """

    form: GpuForm = field(default_factory=GpuForm)
    driver: str | None = None
    vbios: str | None = None
    values: Mapping[int, bytes] = field(default_factory=dict)
    both: frozenset[int] = frozenset()
    active: frozenset[int] | None = None
    not_before: dt.datetime | None = None
    not_after: dt.datetime | None = None


def rims(pki: Pki, spec: RimSpec) -> dict[str, bytes]:
    """XML of both RIMs by id."""
    made = {}
    for which, identifier, version, active in (
        ("driver", driver_rim_id(spec.form), spec.driver or spec.form.driver, DRIVER_ACTIVE),
        ("vbios", vbios_rim_id(spec.form), spec.vbios or spec.form.vbios, VBIOS_ACTIVE),
    ):
        chosen = (spec.active if spec.active is not None else frozenset(active)) | spec.both
        made[identifier] = _signed(pki, which, _tree(version, chosen, spec.values), spec)
    return made


def _tree(version: str, active: frozenset[int], values: Mapping[int, bytes]) -> etree._Element:
    root = etree.Element(f"{{{_SWID}}}SoftwareIdentity", nsmap={None: _SWID, "ns0": _SWID, "ns2": _HASH})
    tag = sha384(f"devtee {version}".encode()).hex()
    for key, value in (
        ("corpus", "false"), ("name", "GH100"), ("patch", "false"), ("supplemental", "false"), ("tagId", tag),
        ("version", "1.0"), ("tagVersion", "0"),
    ):  # fmt: skip
        root.set(key, value)
    entity = etree.SubElement(root, f"{{{_SWID}}}Entity")
    entity.set("name", "SIM NVIDIA Corporation")
    entity.set("role", "softwareCreator tagCreator")
    meta = etree.SubElement(root, f"{{{_SWID}}}Meta", nsmap={"ns1": _TCG})
    for key, value in (
        ("colloquialVersion", version), ("edition", "GPU"), ("product", "GH100"), ("revision", "r1"),
        ("PayloadType", "direct"), (f"{{{_TCG}}}BindingSpec", "RIMIM"), (f"{{{_TCG}}}BindingSpecVersion", "1.01"),
        (f"{{{_TCG}}}PlatformManufacturerId", "5703"),
        (f"{{{_TCG}}}PlatformManufacturerStr", "SIM NVIDIA Corporation"), (f"{{{_TCG}}}PlatformModel", "GH100"),
        (f"{{{_TCG}}}FirmwareManufacturer", "SIM NVIDIA Corporation"),
        (f"{{{_TCG}}}FirmwareManufacturerId", "5703"),
    ):  # fmt: skip
        meta.set(key, value)
    payload = etree.SubElement(root, f"{{{_SWID}}}Payload")
    for index in range(BLOCKS):
        allowed = [bytes(48)]
        if index in active:
            allowed = [values[index]] if index in values else golden(index)
        resource = etree.SubElement(payload, f"{{{_SWID}}}Resource")
        resource.set("type", "Measurement")
        resource.set("index", str(index))
        resource.set("active", str(index in active))
        resource.set("alternatives", str(len(allowed)))
        for number, digest in enumerate(allowed):
            resource.set(f"{{{_HASH}}}Hash{number}", digest.hex())
        resource.set("name", f"Measurement_{index}")
        resource.set("size", "48")
    return root


def _signed(pki: Pki, which: str, root: etree._Element, spec: RimSpec) -> bytes:
    signer = pki[f"rim-{which}-l4"]
    if spec.not_before is not None or spec.not_after is not None:
        signer = rim_signer(
            pki["rim-l3"], not_before=spec.not_before or NOT_BEFORE, not_after=spec.not_after or NOT_AFTER
        )
    chain: list[x509.Certificate] = [signer.cert, *(pki[r].cert for r in ("rim-l3", "rim-l2", "rim-root"))]
    tool = XMLSigner(
        method=SignatureConstructionMethod.enveloped,
        signature_algorithm=SignatureMethod.ECDSA_SHA384,
        digest_algorithm=DigestAlgorithm.SHA384,
        c14n_algorithm=CanonicalizationMethod.CANONICAL_XML_1_1,
    )
    done = tool.sign(root, key=signer.key, cert=chain, always_add_key_value=False)
    return bytes(etree.tostring(done))
