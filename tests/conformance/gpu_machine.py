"""The GPU machine that the table's cases come from: honest inputs, and edits of chains, answers, manifests, reports."""

from __future__ import annotations

import datetime as dt
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from lxml import etree  # type: ignore[import-untyped]  # lxml ships no types
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureConstructionMethod, SignatureMethod
from signxml.signer import XMLSigner

from attestation.policy import GPU_STAGES
from tests.conformance.book import Input, b64
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec, answer
from tests.devtee.pki import Entity, Pki, pem, utc
from tests.devtee.rim import RimSpec
from tests.devtee.tee import DevTee

__all__ = [
    "DAY",
    "DRIVER",
    "FORM",
    "NODE_STAGES",
    "NONCE",
    "NOW",
    "VBIOS",
    "answered",
    "certificates",
    "entry",
    "form",
    "honest",
    "links",
    "made",
    "manifest",
    "manifests",
    "node",
    "ocsp_answer",
    "pdi",
    "recertified",
    "report",
    "responder",
    "signed",
    "stranger",
    "tee",
    "with_chain",
]

NOW = 1_795_000_000
DAY = 86_400
NONCE = bytes(range(100, 132))
DRIVER = "NV_GPU_DRIVER_GH100_550.90.07"
VBIOS = "NV_GPU_VBIOS_1010_0200_882_96009F0001"
NODE_STAGES = [s for s in GPU_STAGES if s not in ("rim", "ocsp_device", "ocsp_rim")]
ISSUERS = {"device-ak-0": "device-ik-0", "device-ik-0": "device-ica", "device-ica": "device-identity",
           "device-identity": "device-root", "device-root": "device-root"}  # fmt: skip
_USAGE = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def form(**fields: Any) -> GpuForm:  # Any: fields of GpuForm
    """A report's form with the device's own nonce fixed, so that reports differ by what they are about."""
    return GpuForm(**({"response_nonce": b"\x5a" * 32} | fields))


FORM = form()


@cache
def tee() -> DevTee:
    """Twelve identities: eight GPUs and, in a node, four switches."""
    return DevTee(Pki.fresh(12))


@cache
def stranger() -> DevTee:
    """Another machine under other keys."""
    return DevTee(Pki.fresh(1))


@cache
def _evidence(index: int) -> bytes:
    return tee().gpu_report(NONCE, index, FORM)[0]


def report(index: int = 0) -> bytes:
    """The honest report of one GPU, the same bytes each time."""
    return _evidence(index)


def entry(index: int = 0, shown: GpuForm | bytes | None = None, **members: object) -> dict[str, object]:
    """One device in NVIDIA's JSON shape; *shown* is a report, or the form of one that the device signs."""
    raw = report(index) if shown is None else shown
    if isinstance(raw, GpuForm):
        raw = tee().gpu_report(NONCE, index, raw)[0]
    chain = b64(tee().pki.device_chain(index))
    given = {"certificate": chain, "evidence": b64(raw), "arch": "HOPPER", "nonce": NONCE.hex()}
    return given | members


@cache
def _answers(gpus: int) -> dict[str, bytes]:
    return tee().ocsp(NOW, gpus=gpus)


def answered(changed: Mapping[str, bytes] | None = None, *, gpus: int = 1) -> dict[str, str]:
    """The honest OCSP answers by name; *changed* replaces some, or adds one."""
    return {name: b64(der) for name, der in (_answers(gpus) | dict(changed or {})).items()}


def ocsp_answer(role: str = "device-ik-0", **spec: Any) -> bytes:  # Any: fields of OcspSpec
    return answer(tee().pki, role, NOW, OcspSpec(**spec))


@cache
def _rims() -> dict[str, bytes]:
    return tee().rims()


def manifest(name: str = DRIVER) -> bytes:
    """The honest manifest of the driver or the VBIOS."""
    return _rims()[name]


def manifests(spec: RimSpec | None = None, **changed: bytes | None) -> dict[str, str]:
    """Both manifests by id: told after *spec*, or the honest ones with `driver` or `vbios` replaced."""
    whole = dict(_rims() if spec is None else tee().rims(spec))
    whole |= {{"driver": DRIVER, "vbios": VBIOS}[n]: raw for n, raw in changed.items() if raw is not None}
    return {name: b64(raw) for name, raw in whole.items()}


def honest(count: int = 1, **members: object) -> Input:
    """A whole input of *count* GPUs that is accepted."""
    given: Input = {
        "evidence": [entry(n) for n in range(count)], "switches": [], "nonce": NONCE.hex(), "at": NOW, "mode": "spt",
        "count": [count, 0], "require": list(GPU_STAGES), "rims": manifests(), "ocsp": answered(gpus=count),
        "root": b64(tee().roots_pem["nvidia_device"]), "rim_root": b64(tee().roots_pem["nvidia_rim"]),
    }  # fmt: skip
    return given | members


# --- certificates ---


def certificates(index: int = 0) -> list[x509.Certificate]:
    """AK, IK, ICA, Identity and root of one GPU."""
    roles = (f"device-ak-{index}", f"device-ik-{index}", "device-ica", "device-identity", "device-root")
    return [tee().pki[r].cert for r in roles]


def with_chain(chain: Sequence[x509.Certificate] | bytes) -> list[dict[str, object]]:
    """The honest GPU's evidence beside another chain."""
    text = chain if isinstance(chain, bytes) else pem(chain).rstrip(b"\n")
    return [entry(certificate=b64(text))]


def recertified(
    role: str,
    *,
    begin: dt.datetime | None = None,
    end: dt.datetime | None = None,
    edit: Callable[[list[tuple[x509.ExtensionType, bool]]], list[tuple[x509.ExtensionType, bool]]] = lambda e: e,
    issuer: x509.Name | None = None,
    signer: Any = None,  # Any: private keys of several algorithms
    public: Any = None,  # Any: public keys of several algorithms
    digest: hashes.SHA256 | hashes.SHA384 | None = None,
) -> list[x509.Certificate]:
    """GPU 0's chain with the certificate of *role* written anew, one thing about it changed."""
    old = tee().pki[role].cert
    builder = x509.CertificateBuilder(
        issuer or old.issuer, old.subject, public or old.public_key(), old.serial_number,
        begin or old.not_valid_before_utc, end or old.not_valid_after_utc,
    )  # fmt: skip
    for value, critical in edit([(e.value, e.critical) for e in old.extensions]):
        builder = builder.add_extension(value, critical=critical)
    new = builder.sign(signer or tee().pki[ISSUERS[role]].key, digest or hashes.SHA384())
    return [new if cert == old else cert for cert in certificates()]


# --- revocation ---


def responder(
    *,
    issuer: str = "device-ica",
    purposes: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.OCSP_SIGNING,),
    ca: bool = False,
    signs: bool = True,
    years: tuple[int, int] = (2020, 2049),
) -> Entity:
    """A responder of one's own making, certified by *issuer*."""
    key = ec.generate_private_key(ec.SECP384R1())
    begin, end = (dt.datetime(year, 1, 1, tzinfo=dt.UTC) for year in years)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SIM responder")])
    builder = x509.CertificateBuilder(
        tee().pki[issuer].cert.subject, name, key.public_key(), x509.random_serial_number(), begin, end
    )
    usage = dict.fromkeys(_USAGE, False) | {"digital_signature": signs, "crl_sign": True}
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
    return Entity(key, builder.sign(tee().pki[issuer].key, hashes.SHA384()))


def made(
    by: Entity,
    *,
    shown: Entity | None = None,
    role: str = "device-ik-0",
    issuer: str = "device-ica",
    algorithm: hashes.HashAlgorithm | None = None,
    digest: hashes.HashAlgorithm | None = None,
    certified: bool = True,
    next_update: bool = True,
    extension: x509.ExtensionType | None = None,
) -> bytes:
    """An answer signed by *by* that says good; *shown* is the certificate that comes with it, if another."""
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=tee().pki[role].cert,
            issuer=tee().pki[issuer].cert,
            algorithm=algorithm or hashes.SHA384(),
            cert_status=ocsp.OCSPCertStatus.GOOD,
            this_update=utc(NOW - 60),
            next_update=utc(NOW + DAY) if next_update else None,
            revocation_time=None,
            revocation_reason=None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, by.cert)
    )
    if certified:
        builder = builder.certificates([(shown or by).cert])
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(by.key, digest or hashes.SHA384()).public_bytes(Encoding.DER)


# --- manifests ---


def signed(
    change: Callable[[Any], object] = lambda tree: None,  # Any: lxml ships no types
    signer: Entity | None = None,
    uppers: Sequence[str] = ("rim-l3", "rim-l2", "rim-root"),
    *,
    method: SignatureMethod = SignatureMethod.ECDSA_SHA384,
    digest: DigestAlgorithm = DigestAlgorithm.SHA384,
    c14n: CanonicalizationMethod = CanonicalizationMethod.CANONICAL_XML_1_1,
) -> bytes:
    """The driver's manifest after *change*, signed anew by whoever holds *signer*."""
    tree = etree.fromstring(re.sub(rb"<ds:Signature.*</ds:Signature>", b"", manifest(), flags=re.S))
    change(tree)
    signer = signer or tee().pki["rim-driver-l4"]
    tool = XMLSigner(
        method=SignatureConstructionMethod.enveloped, signature_algorithm=method, digest_algorithm=digest,
        c14n_algorithm=c14n,
    )  # fmt: skip
    chain = [signer.cert, *(tee().pki[r].cert for r in uppers)]
    return bytes(etree.tostring(tool.sign(tree, key=signer.key, cert=chain, always_add_key_value=False)))


# --- a protected-PCIe node ---


def pdi(name: str, number: int) -> bytes:
    """The id (8 bytes) of a simulated switch or GPU."""
    return name.encode().ljust(7, b"-") + bytes([number + 1])


def links(switches: Sequence[int] = (0, 1, 2, 3)) -> bytes:
    """18 links of a GPU: five, five, four and four to four switches, in the GPU's byte order."""
    order = [*switches] * 4 + [switches[0], switches[1]]
    return b"".join(pdi("switch", n) for n in order)


def switch_report(index: int, own: bytes, sees: bytes) -> bytes:
    """An LS10 report of 31 blocks by the key of identity *index*: VBIOS, its own PDI, the GPUs it sees."""
    record = b"".join(struct.pack("<BBHBH", i, 1, 51, 1, 48) + bytes(48) for i in range(1, 32))
    opaque = b"".join(
        struct.pack("<HH", kind, len(value)) + value
        for kind, value in ((6, b"96.10.73.00.01\0"), (22, own), (26, sees.ljust(128, b"\0")))
    )
    head = bytes([0x11, 0xE0, 0x01, 0xFF]) + NONCE + b"\0" + bytes([0x11, 0x60, 0, 0, 31])
    body = head + len(record).to_bytes(3, "little") + record + b"\x5a" * 32 + struct.pack("<H", len(opaque)) + opaque
    r, s = decode_dss_signature(tee().pki[f"device-ak-{index}"].key.sign(body, ec.ECDSA(hashes.SHA384())))
    return body + r.to_bytes(48) + s.to_bytes(48)


@cache
def _node_gpu(index: int, shown: bytes) -> bytes:
    more = ((22, shown),) if shown else ()
    return tee().gpu_report(NONCE, index, form(protected_pcie=0xAA, feature_flag=2, extra_opaque=more))[0]


_node_switch = cache(switch_report)


def node(
    gpus: Sequence[int] = range(8),
    switches: Sequence[int] = range(4),
    *,
    linked: dict[int, bytes] | None = None,
    own: dict[int, bytes] | None = None,
    sees: dict[int, bytes] | None = None,
) -> Input:
    """`evidence` and `switches` of a node; what some devices say may be replaced, by number."""
    everyone = b"".join(pdi("gpu", n) for n in range(8))
    shown = [entry(n, _node_gpu(n, (linked or {}).get(n, links()))) for n in gpus]
    boxes = []
    for n in switches:
        # A switch gives its own PDI in the other byte order than GPUs give it.
        raw = _node_switch(8 + n, (own or {}).get(n, pdi("switch", n)[::-1]), (sees or {}).get(n, everyone))
        boxes.append(entry(8 + n, raw) | {"arch": "LS10"})
    return {"evidence": shown, "switches": boxes}
