"""Revocation: answers, what they speak of, their time, and who may sign them."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.conformance.book import Book
from tests.conformance.gpu_machine import DAY, NOW, answered, made, ocsp_answer, responder, tee
from tests.devtee.pki import utc

__all__ = ["ocsp_rows"]

OCSP = "RFC 6960"


def ocsp_rows(book: Book) -> None:
    """All rows about answers and responders; the controls are `one` and `two`."""
    _answers(book)
    _responders(book)


def _answers(book: Book) -> None:
    book.clause = f"{OCSP} §2.2, status"
    revoked, one = "GPU_OCSP_REVOKED", frozenset({"device-ik-0"})
    roles = {"device-ik": "device-ik-0", "device-ica": "device-ica", "device-identity": "device-identity",
             "rim-driver-l4": "rim-driver-l4", "rim-driver-l3": "rim-l3", "rim-driver-l2": "rim-l2",
             "rim-vbios-l4": "rim-vbios-l4"}  # fmt: skip
    for name, role in roles.items():
        new = ocsp_answer(role, revoked=frozenset({role}))
        book.refuse(f"ocsp-{name}-revoked", "one", revoked, "its key is known to be out", ocsp=answered({name: new}))
    for name in ("device-ik", "rim-driver-l4"):
        role = roles[name]
        book.refuse(
            f"ocsp-{name}-on-hold",
            "one",
            revoked,
            "certificateHold is revoked",
            ocsp=answered({name: ocsp_answer(role, on_hold=frozenset({role}))}),
        )
        book.refuse(
            f"ocsp-{name}-unknown",
            "one",
            "GPU_OCSP_STATUS",
            "unknown is not good",
            ocsp=answered({name: ocsp_answer(role, unknown=frozenset({role}))}),
        )
    second = ocsp_answer("device-ik-1", revoked=frozenset({"device-ik-1"}))
    book.refuse(
        "ocsp-second-device-revoked",
        "two",
        revoked,
        "each device for itself",
        ocsp=answered({"device-ik1": second}, gpus=2),
    )
    stale = ocsp_answer(revoked=one, age=30 * DAY)
    book.refuse(
        "ocsp-stale-revocation-beside-good",
        "one",
        revoked,
        "revocation does not grow old",
        ocsp=answered({"another": stale}),
    )
    book.clause = f"{OCSP} §3.2, time"
    for name in ("device-ik", "device-identity", "rim-vbios-l4"):
        role = roles[name]
        book.refuse(
            f"ocsp-{name}-stale",
            "one",
            "GPU_OCSP_WINDOW",
            "an old answer hides a revocation",
            ocsp=answered({name: ocsp_answer(role, age=2 * DAY)}),
        )
        book.refuse(
            f"ocsp-{name}-of-the-future",
            "one",
            "GPU_OCSP_WINDOW",
            "an answer dated ahead lives longer",
            ocsp=answered({name: ocsp_answer(role, age=-60)}),
        )
    own = responder()
    book.refuse(
        "ocsp-without-next-update",
        "one",
        "GPU_OCSP_WINDOW",
        "an answer without an end",
        ocsp=answered({"device-ik": made(own, next_update=False)}),
    )
    book.clause = f"{OCSP} §3.2, the certificate asked about"
    missing = "GPU_OCSP_MISSING"
    unauthorised = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.UNAUTHORIZED)
    for name, answer, why in (
        ("of-another-device", ocsp_answer("device-ik-1"), "a genuine good answer for another certificate"),
        ("of-its-issuer", ocsp_answer("device-ica"), "a genuine good answer for another certificate"),
        (
            "another-issuer-in-the-id",
            made(responder(issuer="device-identity"), issuer="device-identity"),
            "serial numbers repeat between issuers",
        ),
        ("sha-1-certificate-id", made(own, algorithm=hashes.SHA1()), "NVIDIA's service names certificates by SHA-384"),
        (
            "critical-extension",
            made(own, extension=x509.OCSPNonce(b"n" * 16)),
            "must be refused by whoever does not know it",
        ),
        ("unauthorized", unauthorised.public_bytes(Encoding.DER), "a refusal to answer"),
        ("empty", b"", "no answer"),
        ("no-der", b"\x30\x03", "no answer"),
        ("of-9000-bytes", bytes(9000), "sizes are capped"),
    ):
        book.refuse(f"ocsp-answer-{name}", "one", missing, why, ocsp=answered({"device-ik": answer}))
    many = answered() | {f"x{n}": "" for n in range(260)}
    book.refuse("ocsp-267-answers", "one", "FORMAT_GPU_OCSP", "numbers are capped", also=(missing,), ocsp=many)
    shuffled = {f"x{n}": text for n, text in enumerate(reversed(answered().values()))}
    book.accept("ocsp-answers-under-other-names", "one", "an answer is found by what it speaks of", ocsp=shuffled)
    forged = ocsp_answer(revoked=one, responder=(("device-ik-0", "rim-l3"),))
    book.accept(
        "ocsp-forged-revocation-beside-good",
        "one",
        "anybody could stop a service with it",
        ocsp=answered({"another": forged}),
    )


def _responders(book: Book) -> None:
    book.clause = f"{OCSP} §4.2.2.2, authorized responders"
    code, wrong = "GPU_OCSP_RESPONDER", "GPU_OCSP_SIGNATURE"
    purpose = [ExtendedKeyUsageOID.SERVER_AUTH]
    for name, answer, why in (
        ("without-ocsp-signing", made(responder(purposes=())), "not a responder"),
        ("of-another-purpose", made(responder(purposes=purpose)), "a TLS server"),
        ("of-another-issuer", ocsp_answer(responder=(("device-ik-0", "device-identity"),)), "each issuer has its own"),
        ("of-the-rim-side", ocsp_answer(responder=(("device-ik-0", "rim-l3"),)), "each issuer has its own"),
        ("a-ca", made(responder(ca=True)), "more right than it needs"),
        ("not-for-signatures", made(responder(signs=False)), "a key that may not sign"),
        ("expired", made(responder(years=(2020, 2025))), "its time has ended"),
        ("of-the-future", made(responder(years=(2030, 2040))), "its time has not begun"),
        ("the-issuer-itself", made(tee().pki["device-ica"]), "NVIDIA delegates"),
        ("the-device-itself", made(tee().pki["device-ak-0"]), "a device that answers for itself"),
        ("without-certificate", made(responder(), certified=False), "nobody to check the signature with"),
    ):
        book.refuse(f"ocsp-responder-{name}", "one", code, why, ocsp=answered({"device-ik": answer}))
    book.clause = f"{OCSP} §3.2, signature"
    raw = ocsp_answer()
    shown = tee().pki["ocsp-device-ica"]
    for name, answer, why in (
        ("sha-256", made(responder(), digest=hashes.SHA256()), "the hierarchy signs with SHA-384"),
        ("of-another-responder", made(responder(), shown=shown), "a certificate beside another's signature"),
        (
            "edited",
            raw.replace(
                ocsp.load_der_ocsp_response(raw).signature, _flipped(ocsp.load_der_ocsp_response(raw).signature)
            ),
            "a signature that does not hold",
        ),
        (
            "over-an-edited-date",
            raw.replace(
                utc(NOW - 600).strftime("%Y%m%d%H%M%SZ").encode(), utc(NOW - 599).strftime("%Y%m%d%H%M%SZ").encode()
            ),
            "an answer made younger",
        ),
    ):
        book.refuse(f"ocsp-signature-{name}", "one", wrong, why, ocsp=answered({"device-ik": answer}))


def _flipped(signature: bytes) -> bytes:
    return signature[:-1] + bytes([signature[-1] ^ 1])
