"""Device chains and firmware ids, one rule broken at a time."""

from __future__ import annotations

from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from tests.conformance.book import Book, b64
from tests.conformance.gpu_machine import (
    DAY,
    NOW,
    certificates,
    entry,
    form,
    recertified,
    stranger,
    tee,
    with_chain,
)
from tests.devtee.pki import FWID_EXTENSION, SHA384_OID, der_octets, der_oid, der_sequence, der_small, utc

__all__ = ["chain_rows"]

PKIX = "RFC 5280"
DICE = "TCG DICE Certificate Profiles"
UNKNOWN = ObjectIdentifier("2.999.7")  # the arc for examples (ITU-T X.660)
TCB_INFO = ObjectIdentifier("2.23.133.5.4.1.1")
COMPOSITE = ObjectIdentifier(FWID_EXTENSION)
SHA256_OID = "2.16.840.1.101.3.4.2.1"
NAMES = {"device-ak-0": "ak", "device-ik-0": "ik", "device-ica": "ica", "device-identity": "identity"}

Extensions = list[tuple[x509.ExtensionType, bool]]


def chain_rows(book: Book) -> None:
    """All rows about chains and firmware ids; the control is `one`."""
    _whole(book)
    _certificates(book)
    _firmware(book)


def _whole(book: Book) -> None:
    book.clause = f"{PKIX} §6.1, path validation"
    ak, ik, ica, identity, root = certificates()
    length, issuer = "GPU_CHAIN_LENGTH", "GPU_CHAIN_ISSUER"
    foreign = stranger().pki["device-root"].cert
    for name, chain, code, also, why in (
        ("without-identity", [ak, ik, ica, root], length, (), "a level is missing"),
        ("leaf-and-root", [ak, root], length, (), "three levels are missing"),
        ("root-alone", [root], length, (), "no device at all"),
        ("of-six", [ak, ik, ica, identity, identity, root], length, (), "a level too many"),
        ("out-of-order", [ak, ica, ik, identity, root], issuer, ("GPU_OCSP_MISSING",), "each is issued by the next"),
        (
            "identity-twice",
            [ak, ik, identity, identity, root],
            issuer,
            ("GPU_OCSP_MISSING",),
            "each is issued by the next",
        ),
        (
            "ends-in-a-foreign-root",
            [ak, ik, ica, identity, foreign],
            length,
            (),
            "a root that issued nothing here is no root",
        ),
        (
            "leaf-is-the-identity-key",
            [ik, ik, ica, identity, root],
            issuer,
            ("FORMAT_GPU_FWID", "GPU_SIGNATURE"),
            "the identity key signs keys, not reports",
        ),
    ):
        book.refuse(f"chain-{name}", "one", code, why, also=also, evidence=with_chain(chain))
    for name, pem, why in (
        ("of-another-machine", stranger().roots_pem["nvidia_device"], "a root that nobody here chains to"),
        ("of-the-rim-hierarchy", tee().roots_pem["nvidia_rim"], "the vendor's other root certifies no devices"),
    ):
        book.refuse(f"root-{name}", "one", issuer, why, also=("GPU_OCSP_MISSING",), root=b64(pem))
    book.refuse(
        "root-not-named",
        "one",
        issuer,
        "throw-away keys are nothing under NVIDIA's own root",
        also=("GPU_OCSP_MISSING",),
        root=None,
    )
    whole = stranger().gpu_evidence(bytes(range(100, 132)), [0], form())
    book.refuse(
        "device-of-another-machine",
        "one",
        issuer,
        "a whole device under a root that nobody pinned",
        also=("GPU_OCSP_MISSING",),
        evidence=whole,
    )


def _without(kind: type[x509.ExtensionType], extensions: Extensions) -> Extensions:
    return [(v, c) for v, c in extensions if not isinstance(v, kind)]


def _with(more: tuple[x509.ExtensionType, bool]) -> Callable[[Extensions], Extensions]:
    return lambda extensions: [*extensions, more]


def _constrained(path_length: int) -> Callable[[Extensions], Extensions]:
    new = (x509.BasicConstraints(True, path_length), True)
    return lambda extensions: [new, *_without(x509.BasicConstraints, extensions)]


def _usage(*names: str) -> x509.KeyUsage:
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: name in names for name in every})


def _certificates(book: Book) -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    unread, right = "FORMAT_GPU_CERTIFICATE", "GPU_CHAIN_CA"
    past, future = utc(NOW - DAY), utc(NOW + DAY)
    for role, name in NAMES.items():
        # Without a chain to the root that it brings, the root in the evidence counts as one certificate too many.
        last = role == "device-identity"
        also = ("GPU_CHAIN_LENGTH",) if last else ()
        book.clause = f"{PKIX} §4.1.2.5, validity"
        book.refuse(
            f"{name}-expired",
            "one",
            "GPU_CHAIN_VALIDITY",
            "ended yesterday",
            evidence=with_chain(recertified(role, end=past)),
        )
        book.refuse(
            f"{name}-of-the-future",
            "one",
            "GPU_CHAIN_VALIDITY",
            "begins tomorrow",
            evidence=with_chain(recertified(role, begin=future)),
        )
        book.clause = f"{PKIX} §4.2, critical extensions"
        critical = (x509.UnrecognizedExtension(UNKNOWN, b"\x30\x00"), True)
        book.refuse(
            f"{name}-critical-extension-nobody-knows",
            "one",
            unread,
            "must be refused by whoever does not know it",
            also=also,
            evidence=with_chain(recertified(role, edit=_with(critical))),
        )
        book.clause = f"{PKIX} §4.1.1.3, signature"
        book.refuse(
            f"{name}-signed-by-a-stranger",
            "one",
            "GPU_CHAIN_LENGTH" if last else "GPU_CHAIN_ISSUER",
            "certified by nobody",
            evidence=with_chain(recertified(role, signer=other)),
        )
        book.refuse(
            f"{name}-signed-with-sha-256",
            "one",
            unread,
            "the hierarchy signs with SHA-384",
            also=also,
            evidence=with_chain(recertified(role, digest=hashes.SHA256())),
        )
        book.clause = f"{PKIX} §4.1.2.4, issuer"
        stranger_name = stranger().pki["rim-root"].cert.subject
        book.refuse(
            f"{name}-names-another-issuer",
            "one",
            "GPU_CHAIN_LENGTH" if last else "GPU_CHAIN_ISSUER",
            "names chain as keys do",
            evidence=with_chain(recertified(role, issuer=stranger_name)),
        )
    book.clause = f"{PKIX} §4.1.2.7, key"
    book.refuse(
        "ak-with-a-p-256-key",
        "one",
        unread,
        "the hierarchy has P-384 keys",
        evidence=with_chain(recertified("device-ak-0", public=small)),
    )
    book.refuse(
        "ak-with-another-key",
        "one",
        "GPU_SIGNATURE",
        "a certificate for a key that did not sign",
        evidence=with_chain(recertified("device-ak-0", public=other.public_key())),
    )
    for role, name in list(NAMES.items())[1:]:
        book.clause = f"{PKIX} §4.2.1.9, basic constraints"
        for what, edit in (
            ("no-ca", lambda e: [(x509.BasicConstraints(False, None), True), *_without(x509.BasicConstraints, e)]),
            ("without-basic-constraints", lambda e: _without(x509.BasicConstraints, e)),
        ):
            book.refuse(
                f"{name}-{what}",
                "one",
                right,
                "an issuer that may not issue",
                evidence=with_chain(recertified(role, edit=edit)),
            )
        book.clause = f"{PKIX} §4.2.1.3, key usage"
        for what, edit in (
            ("without-cert-sign", lambda e: [(_usage("crl_sign"), True), *_without(x509.KeyUsage, e)]),
            ("without-key-usage", lambda e: _without(x509.KeyUsage, e)),
        ):
            book.refuse(
                f"{name}-{what}",
                "one",
                right,
                "an issuer that may not issue",
                evidence=with_chain(recertified(role, edit=edit)),
            )
    book.clause = f"{PKIX} §4.2.1.9, path length"
    for role, name, most in (
        ("device-ica", "ica", 0),
        ("device-identity", "identity", 1),
        ("device-identity", "identity", 0),
    ):
        book.refuse(
            f"{name}-path-length-{most}",
            "one",
            right,
            "more levels below than it may have",
            evidence=with_chain(
                recertified(
                    role,
                    edit=_constrained(most),
                )
            ),
        )
    book.clause = f"{PKIX} §4.2.1.3, key usage"
    for what, edit, why in (
        (
            "a-ca",
            lambda e: [(x509.BasicConstraints(True, None), True), *_without(x509.BasicConstraints, e)],
            "a CA that signs reports",
        ),
        (
            "without-digital-signature",
            lambda e: [(_usage("key_agreement"), True), *_without(x509.KeyUsage, e)],
            "a key that may not sign",
        ),
        ("without-key-usage", lambda e: _without(x509.KeyUsage, e), "a key that may do anything"),
        (
            "with-an-extended-purpose",
            lambda e: [*e, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING]), False)],
            "a responder that signs reports",
        ),
    ):
        book.refuse(f"ak-{what}", "one", right, why, evidence=with_chain(recertified("device-ak-0", edit=edit)))
    book.clause = f"{PKIX} §6.1.3, time"
    book.refuse(
        "judged-before-the-chain-began",
        "one",
        "GPU_CHAIN_VALIDITY",
        "everything has its time",
        also=("GPU_RIM_CHAIN_VALIDITY", "GPU_OCSP_RESPONDER"),
        at=1_546_300_800,
    )
    book.refuse("judged-two-days-later", "one", "GPU_OCSP_WINDOW", "answers are for a day", at=NOW + 2 * DAY)


def _firmware(book: Book) -> None:
    book.clause = f"{DICE}: firmware id"
    book.refuse(
        "fwid-left-out", "one", "GPU_FWID", "drivers before 550 do not report it", evidence=[entry(0, form(fwid=b""))]
    )
    book.refuse(
        "fwid-of-other-firmware",
        "one",
        "GPU_FWID",
        "the key was certified for other firmware",
        evidence=[entry(0, form(fwid=bytes(48)))],
    )
    fwid = tee().pki.facts.fwid
    spki = tee().pki["device-ik-0"].cert.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def one(digest: bytes = fwid, oid: str = SHA384_OID) -> bytes:
        return der_sequence(der_oid(oid), der_octets(digest))

    def composite(version: int = 1, inner: bytes = one()) -> bytes:
        return der_sequence(der_small(version), spki, inner)

    def tcb_info(*fwids: bytes) -> bytes:
        body = b"".join(fwids)
        return der_sequence(b"\xa6" + (bytes([len(body)]) if len(body) < 128 else bytes([0x81, len(body)])) + body)

    def told(*extensions: tuple[ObjectIdentifier, bytes]) -> list[dict[str, object]]:
        more: Extensions = [(x509.UnrecognizedExtension(oid, value), False) for oid, value in extensions]
        return with_chain(recertified("device-ak-0", edit=lambda e: [*_without(x509.UnrecognizedExtension, e), *more]))

    good = composite()
    book.accept(
        "fwid-in-blackwells-form",
        "one",
        "DiceTcbInfo: the first of its firmware ids counts",
        evidence=told((TCB_INFO, tcb_info(one(), one(bytes(48))))),
    )
    book.refuse(
        "fwid-second-in-blackwells-form",
        "one",
        "GPU_FWID",
        "the second firmware id does not count",
        evidence=told((TCB_INFO, tcb_info(one(bytes(48)), one()))),
    )
    book.refuse(
        "fwid-certified-for-other-firmware",
        "one",
        "GPU_FWID",
        "another digest in the certificate",
        evidence=told((COMPOSITE, composite(inner=one(bytes(48))))),
    )
    book.clause = f"{DICE}; X.690 §8.1, §10.1 (DER)"
    values: tuple[tuple[str, tuple[tuple[ObjectIdentifier, bytes], ...], str], ...] = (
        ("absent", (), "no firmware id at all"),
        (
            "from-two-sources",
            ((COMPOSITE, good), (TCB_INFO, tcb_info(one()))),
            "which of two counts would be up to the reader",
        ),
        ("empty", ((COMPOSITE, b""),), "no value"),
        ("with-bytes-after-it", ((COMPOSITE, good + b"\0\0"),), "bytes that nobody accounts for"),
        ("cut-short", ((COMPOSITE, good[:-1]),), "a length beyond the end"),
        ("version-2", ((COMPOSITE, composite(version=2)),), "a version nobody knows"),
        ("digest-of-32-bytes", ((COMPOSITE, composite(inner=one(bytes(32)))),), "SHA-384 has 48"),
        ("sha-256-named", ((COMPOSITE, composite(inner=one(oid=SHA256_OID))),), "another algorithm"),
        ("indefinite-length", ((COMPOSITE, b"\x30\x80" + good[3:] + b"\0\0"),), "BER is not DER"),
        ("length-in-long-form", ((COMPOSITE, b"\x30\x82\x00" + good[2:]),), "a second spelling"),
        ("length-of-4-gib", ((COMPOSITE, b"\x30\x84\xff\xff\xff\xff"),), "an allocation of the peer's choice"),
        ("digest-alone", ((COMPOSITE, fwid),), "the last 48 bytes of anything"),
        ("tcb-info-without-list", ((TCB_INFO, der_sequence(b"\x80\x06NVIDIA")),), "no firmware id"),
        ("tcb-info-empty-list", ((TCB_INFO, tcb_info()),), "no firmware id"),
        ("tcb-info-of-something-else", ((TCB_INFO, tcb_info(der_octets(fwid))),), "no digest with its algorithm"),
        ("tcb-info-sha-256-first", ((TCB_INFO, tcb_info(one(bytes(32), SHA256_OID), one())),), "the first counts"),
    )
    for name, extensions, why in values:
        book.refuse(f"fwid-certified-{name}", "one", "FORMAT_GPU_FWID", why, evidence=told(*extensions))
