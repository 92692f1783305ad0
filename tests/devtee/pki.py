"""The private PKI of one development machine: keys, certificates and the numbers that name the platform.

Made fresh on each machine, kept in the state directory (0700, files 0600), never committed. The certificates have
the shapes and, for Intel's roles, the very CN and O of the genuine ones, because role checks compare them; every one
says in its OU, or at the start of its CN, that it is simulated. Nothing here is trusted by anybody who does not name
these roots on purpose: production code compiles the genuine ones in.

Sources: SGX PCK Certificate and CRL Profile; RFC 5280; RFC 6960 §4.2.2.2 (delegated OCSP responders); DICE
certificate profiles (OID 2.23.133.5.4.1).
"""

from __future__ import annotations

import datetime as dt
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["Entity", "Facts", "Pki", "der_octets", "der_oid", "der_sequence", "der_small", "pem", "utc"]

MARK: Final = "SIMULATED NOT INTEL"
NOT_BEFORE: Final = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
NOT_AFTER: Final = dt.datetime(2049, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
FOREVER: Final = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"
FWID_EXTENSION: Final = "2.23.133.5.4.1"
SHA384_OID: Final = "2.16.840.1.101.3.4.2.2"
MAX_GPUS: Final = 16
PEM_SIZE: Final = 5120
"""What `nvmlDeviceGetConfComputeGpuCertificate` has room for: the whole device chain must fit."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A key with its certificate. Holding one means being able to sign as that role on this machine's PKI."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    cert: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the PCK certificate says about the platform, random per PKI.

    fmspc (6 bytes), ppid and piid (16), pce_id (2), component SVNs as the CPU reports them (16 each), pcesvn.
    fwid is the digest (48 bytes) in every attestation key certificate and report.
    """

    fmspc: bytes
    ppid: bytes
    piid: bytes
    fwid: bytes
    pce_id: bytes = b"\0\0"
    sgx_svn: bytes = bytes([4, 4, 2, 2, 4, 1, 0, 5]) + bytes(8)
    pcesvn: int = 11

    @classmethod
    def fresh(cls) -> Facts:
        """Random identities. The FMSPC begins with 0x99, a value no genuine platform is known to use."""
        return cls(
            fmspc=b"\x99" + secrets.token_bytes(3) + b"\0\0",
            ppid=secrets.token_bytes(16),
            piid=secrets.token_bytes(16),
            fwid=secrets.token_bytes(48),
        )


@dataclass(frozen=True, slots=True)
class Pki:
    """Every signer of one machine by role name; `gpus` counts the device identities in it.

    Intel: intel-root, intel-platform-ca, intel-pck, intel-tcb-signing, and the key intel-ak (its certificate is
    never shown: a quote carries the bare public key).
    Device: device-root, device-identity, device-ica, device-ik-N, device-ak-N.
    RIM: rim-root, rim-l2, rim-l3, rim-driver-l4, rim-vbios-l4.
    Responders: ocsp-<issuer> for each issuer above whose certificates are asked about.
    """

    facts: Facts
    entities: dict[str, Entity]
    gpus: int

    def __getitem__(self, role: str) -> Entity:
        return self.entities[role]

    @classmethod
    def fresh(cls, gpus: int = 8) -> Pki:
        """A whole new PKI with identities for *gpus* devices (at most 16)."""
        if not 1 <= gpus <= MAX_GPUS:
            raise ValueError(f"gpus must be 1 to {MAX_GPUS}, not {gpus}")
        facts = Facts.fresh()
        made = _intel(facts) | _device(facts, gpus) | _rim()
        for issuer in ("device-root", "device-identity", "device-ica", "rim-root", "rim-l2", "rim-l3"):
            made[f"ocsp-{issuer}"] = _responder(made[issuer], issuer)
        pki = cls(facts, made, gpus)
        for index in range(gpus):
            if len(pki.device_chain(index)) > PEM_SIZE:
                raise AssertionError("the device chain does not fit NVML's buffer")
        return pki

    def device_chain(self, index: int) -> bytes:
        """PEM of one GPU: AK, IK, ICA, Identity, root, as NVML returns it (no newline at the end)."""
        roles = (f"device-ak-{index}", f"device-ik-{index}", "device-ica", "device-identity", "device-root")
        return pem([self[r].cert for r in roles]).rstrip(b"\n")

    def save(self, path: Path) -> None:
        """Write everything to one file, 0600, in place at once: a reader sees a whole PKI or none."""
        text = json.dumps(
            {
                "facts": {
                    "fmspc": self.facts.fmspc.hex(),
                    "ppid": self.facts.ppid.hex(),
                    "piid": self.facts.piid.hex(),
                    "fwid": self.facts.fwid.hex(),
                },
                "gpus": self.gpus,
                "entities": {
                    name: {
                        "key": e.key.private_bytes(
                            serialization.Encoding.PEM,
                            serialization.PrivateFormat.PKCS8,
                            serialization.NoEncryption(),
                        ).decode(),
                        "cert": e.cert.public_bytes(serialization.Encoding.PEM).decode(),
                    }
                    for name, e in self.entities.items()
                },
            }
        )
        fresh = path.with_suffix(f".{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            handle.write(text)
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Pki:
        """Read what `save` wrote."""
        stored = json.loads(path.read_text())
        entities = {}
        for name, pair in stored["entities"].items():
            key = serialization.load_pem_private_key(pair["key"].encode(), None)
            cert = x509.load_pem_x509_certificate(pair["cert"].encode())
            entities[name] = Entity(cast(ec.EllipticCurvePrivateKey, key), cert)
        ids = {name: bytes.fromhex(value) for name, value in stored["facts"].items()}
        facts = Facts(fmspc=ids["fmspc"], ppid=ids["ppid"], piid=ids["piid"], fwid=ids["fwid"])
        return cls(facts, entities, stored["gpus"])


def pem(certs: Sequence[x509.Certificate]) -> bytes:
    """PEM of a chain, leaf first."""
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certs)


def utc(seconds: int) -> dt.datetime:
    """Unix seconds as an aware datetime."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def _name(cn: str, org: str, *, unit: str | None = None, serial: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, cn), x509.NameAttribute(NameOID.ORGANIZATION_NAME, org)]
    if unit is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    parts.append(x509.NameAttribute(NameOID.COUNTRY_NAME, "US"))
    if serial is not None:
        parts.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, serial))
    return x509.Name(parts)


def issue(
    subject: x509.Name,
    issuer: Entity | None,
    curve: ec.EllipticCurve,
    *,
    ca: bool,
    path_length: int | None = None,
    serial: int | None = None,
    not_before: dt.datetime = NOT_BEFORE,
    not_after: dt.datetime = NOT_AFTER,
    usage: Sequence[str] = (),
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> Entity:
    """One certificate below *issuer*, or self-signed without one. The digest follows the signer's curve."""
    key = ec.generate_private_key(curve)
    signer = issuer.key if issuer else key
    named = {f: f in usage for f in _USAGES} | dict.fromkeys(("encipher_only", "decipher_only"), False)
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    above = x509.SubjectKeyIdentifier.from_public_key(signer.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.cert.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(serial if serial is not None else x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(x509.KeyUsage(**named), critical=True)
        .add_extension(own, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(above), critical=False)
    )
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    digest = hashes.SHA384() if isinstance(signer.curve, ec.SECP384R1) else hashes.SHA256()
    return Entity(key, builder.sign(signer, digest))


_USAGES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_CA: Final = ("key_cert_sign", "crl_sign")
_SIGN: Final = ("digital_signature", "content_commitment")


def _intel(facts: Facts) -> dict[str, Entity]:
    """Root → Platform CA → PCK leaf; root → TCB signing (SGX PCK profile §1.3)."""
    org, curve = "Intel Corporation", ec.SECP256R1()

    def name(cn: str) -> x509.Name:
        return _name(cn, org, unit=MARK)

    def crl(url: str) -> tuple[x509.ExtensionType, bool]:
        point = x509.DistributionPoint([x509.UniformResourceIdentifier(url)], None, None, None)
        return x509.CRLDistributionPoints([point]), False

    root_crl = crl("https://devtee.invalid/root.crl")
    root = issue(name("Intel SGX Root CA"), None, curve, ca=True, path_length=1, usage=_CA, extra=[root_crl])
    platform = issue(
        name("Intel SGX PCK Platform CA"), root, curve, ca=True, path_length=0, usage=_CA, extra=[root_crl]
    )
    pck = issue(
        name("Intel SGX PCK Certificate"),
        platform,
        curve,
        ca=False,
        usage=_SIGN,
        extra=[
            crl("https://devtee.invalid/pck.crl"),
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_EXTENSION), sgx_extension(facts)), False),
        ],
    )
    tcb = issue(name("Intel SGX TCB Signing"), root, curve, ca=False, usage=_SIGN, extra=[root_crl])
    ak = issue(name("attestation key"), None, curve, ca=False, usage=_SIGN)
    return {
        "intel-root": root,
        "intel-platform-ca": platform,
        "intel-pck": pck,
        "intel-tcb-signing": tcb,
        "intel-ak": ak,
    }


def _device(facts: Facts, gpus: int) -> dict[str, Entity]:
    """Five levels, P-384: Device Identity CA → GH100 Identity → Provisioner ICA → IK (per GPU) → AK (per boot)."""
    curve, org = ec.SECP384R1(), "NVIDIA Corporation"
    root = issue(_name("SIM NVIDIA Device Identity CA", "NVIDIA"), None, curve, ca=True, usage=_CA, not_after=FOREVER)
    identity = issue(_name("SIM GH100 Identity", org), root, curve, ca=True, usage=_CA, not_after=FOREVER)
    ica = issue(_name("SIM GH100 Provisioner ICA 1", org), identity, curve, ca=True, usage=_CA, not_after=FOREVER)
    made = {"device-root": root, "device-identity": identity, "device-ica": ica}
    for index in range(gpus):
        ik_serial = b"\x41" + secrets.token_bytes(8)
        ak_serial = b"\x51" + secrets.token_bytes(19)
        ik = issue(
            _name("SIM GH100 A01 GSP BROM", org, serial=ik_serial.hex().upper()),
            ica, curve, ca=True, usage=("key_cert_sign",), serial=int.from_bytes(ik_serial), not_after=FOREVER,
        )  # fmt: skip
        ak = issue(
            _name("SIM GH100 A01 GSP FMC LF", org, serial=ak_serial.hex().upper()),
            ik, curve, ca=False, usage=("digital_signature",), serial=int.from_bytes(ak_serial), not_after=FOREVER,
            extra=[(fwid_extension(ik, facts.fwid), False)],
        )  # fmt: skip
        made |= {f"device-ik-{index}": ik, f"device-ak-{index}": ak}
    return made


def _rim() -> dict[str, Entity]:
    """CoRIM signing root → L2 → L3 → one signer for the driver's RIM and one for the VBIOS's."""
    curve, org = ec.SECP384R1(), "NVIDIA Corporation"
    root = issue(_name("SIM NVIDIA CoRIM signing Root CA", "NVIDIA"), None, curve, ca=True, usage=_CA)
    l2 = issue(_name("SIM Reference Value GH100 CA", org), root, curve, ca=True, usage=_CA)
    l3 = issue(_name("SIM Reference Value L3 GH100 002", org), l2, curve, ca=True, path_length=0, usage=_CA)
    made = {"rim-root": root, "rim-l2": l2, "rim-l3": l3}
    for which in ("driver", "vbios"):
        made[f"rim-{which}-l4"] = rim_signer(l3)
    return made


def rim_signer(l3: Entity, *, not_before: dt.datetime = NOT_BEFORE, not_after: dt.datetime = NOT_AFTER) -> Entity:
    """A RIM signer (L4), with a validity of one's choosing for the case of an expired one."""
    return issue(
        _name("SIM HCC RIM L4 Signer", "NVIDIA Corporation"), l3, ec.SECP384R1(),
        ca=False, usage=("digital_signature",), not_before=not_before, not_after=not_after,
    )  # fmt: skip


def _responder(issuer: Entity, role: str) -> Entity:
    """A delegated OCSP responder: issued by the very CA whose certificates it answers for (RFC 6960 §4.2.2.2)."""
    return issue(
        _name(f"SIM OCSP Responder {role}", "NVIDIA Corporation"),
        issuer,
        ec.SECP384R1(),
        ca=False,
        usage=("digital_signature",),
        extra=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]), True), (x509.OCSPNoCheck(), False)],
    )


def der_sequence(*parts: bytes) -> bytes:
    return _tlv(0x30, b"".join(parts))


def der_octets(value: bytes) -> bytes:
    return _tlv(0x04, value)


def der_small(value: int, tag: int = 0x02) -> bytes:
    """An INTEGER (or ENUMERATED, tag 0x0a) that is not negative."""
    return _tlv(tag, value.to_bytes(value.bit_length() // 8 + 1))


def der_oid(dotted: str) -> bytes:
    arcs = [int(a) for a in dotted.split(".")]
    body = bytearray()
    for arc in [arcs[0] * 40 + arcs[1], *arcs[2:]]:
        low = [arc & 0x7F]
        while arc := arc >> 7:
            low.append(0x80 | arc & 0x7F)
        body += bytes(reversed(low))
    return _tlv(0x06, bytes(body))


def _tlv(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < 0x80:
        return bytes([tag, size]) + body
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + body


def sgx_extension(facts: Facts) -> bytes:
    """The SGX extension of a PCK certificate (SGX PCK profile §1.3.5), a platform certificate with all three flags."""

    def item(suffix: str, value: bytes) -> bytes:
        return der_sequence(der_oid(f"{SGX_EXTENSION}.{suffix}"), value)

    components = [item(f"2.{i}", der_small(svn)) for i, svn in enumerate(facts.sgx_svn, 1)]
    tcb = der_sequence(
        *components, item("2.17", der_small(facts.pcesvn)), item("2.18", der_octets(facts.sgx_svn))
    )  # CPUSVN: the profile calls its layout opaque, genuine leaves repeat the components
    true = b"\x01\x01\xff"
    return der_sequence(
        item("1", der_octets(facts.ppid)),
        item("2", tcb),
        item("3", der_octets(facts.pce_id)),
        item("4", der_octets(facts.fmspc)),
        item("5", der_small(1, 0x0A)),
        item("6", der_octets(facts.piid)),
        item("7", der_sequence(item("7.1", true), item("7.2", true), item("7.3", true))),
    )


def fwid_extension(ik: Entity, fwid: bytes) -> x509.UnrecognizedExtension:
    """TCG DICE composite device id: version, the device's public key, and the firmware digest in the last 48 bytes."""
    spki = ik.cert.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    body = der_sequence(der_small(1), spki, der_sequence(der_oid(SHA384_OID), der_octets(fwid)))
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(FWID_EXTENSION), body)
