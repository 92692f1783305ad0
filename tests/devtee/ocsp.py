"""Revocation answers: one delegated responder per issuer, valid for 24 hours, with a revoked set.

The certificate id is SHA-384, as NVIDIA's service and verifiers use it; a nonce is echoed when one was sent. The
answers can lie in the ways a verifier must notice: about another certificate, too old, of the future, signed by a
responder that some other issuer made.

Source: RFC 6960. Pure: the time is an argument.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp

from tests.devtee.pki import Pki, utc

__all__ = ["OcspSpec", "answer", "responses"]

DAY: Final = 86400
ISSUERS: Final = {
    "device-identity": "device-root",
    "device-ica": "device-identity",
    "rim-l2": "rim-root",
    "rim-l3": "rim-l2",
    "rim-driver-l4": "rim-l3",
    "rim-vbios-l4": "rim-l3",
}
_RIM_FILES: Final = {
    "rim-driver-l4": "rim-driver-l4",
    "rim-driver-l3": "rim-l3",
    "rim-driver-l2": "rim-l2",
    "rim-vbios-l4": "rim-vbios-l4",
}


@dataclass(frozen=True, slots=True)
class OcspSpec:
    """What the answers say. Seconds, counted from the `now` given to `responses`.

    revoked: roles answered "revoked" ("device-ik-0", "rim-driver-l4", …); on_hold: the same with certificateHold.
    unknown: roles answered "unknown". swapped: file name → role whose certificate the answer is really about.
    responder: role → issuer whose responder signs instead of the right one.
    """

    age: int = 600
    lifetime: int = DAY
    revoked: frozenset[str] = frozenset()
    on_hold: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    swapped: tuple[tuple[str, str], ...] = ()
    responder: tuple[tuple[str, str], ...] = ()


def issuer_of(role: str) -> str:
    return "device-ica" if role.startswith("device-ik-") else ISSUERS[role]


def responses(pki: Pki, now: int, gpus: int, spec: OcspSpec) -> dict[str, bytes]:
    """Every answer a verifier of *gpus* GPUs with shared RIMs needs, DER by name."""
    wanted = {"device-ica": "device-ica", "device-identity": "device-identity"} | _RIM_FILES
    wanted |= {f"device-ik{index or ''}": f"device-ik-{index}" for index in range(gpus)}
    wanted |= dict(spec.swapped)
    return {name: answer(pki, role, now, spec) for name, role in wanted.items()}


def answer(pki: Pki, role: str, now: int, spec: OcspSpec, nonce: bytes | None = None) -> bytes:
    """One answer about the certificate of *role*."""
    issuer = issuer_of(role)
    responder = pki[f"ocsp-{dict(spec.responder).get(role, issuer)}"]
    start = utc(now - spec.age)
    status, reason, when = ocsp.OCSPCertStatus.GOOD, None, None
    if role in spec.unknown:
        status = ocsp.OCSPCertStatus.UNKNOWN
    elif role in spec.revoked | spec.on_hold:
        status, when = ocsp.OCSPCertStatus.REVOKED, start
        reason = x509.ReasonFlags.certificate_hold if role in spec.on_hold else x509.ReasonFlags.key_compromise
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            cert=pki[role].cert,
            issuer=pki[issuer].cert,
            algorithm=hashes.SHA384(),
            cert_status=status,
            this_update=start,
            next_update=start + dt.timedelta(seconds=spec.lifetime),
            revocation_time=when,
            revocation_reason=reason,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, responder.cert)
        .certificates([responder.cert])
    )
    if nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return builder.sign(responder.key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)


def answer_request(pki: Pki, request: bytes, now: int, spec: OcspSpec) -> bytes:
    """Answer a DER request as the service does. A serial that is not ours is `unauthorized`."""
    asked = ocsp.load_der_ocsp_request(request)
    try:
        nonce = asked.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
    except x509.ExtensionNotFound:
        nonce = None
    for role, entity in pki.entities.items():
        if (role in ISSUERS or role.startswith("device-ik-")) and entity.cert.serial_number == asked.serial_number:
            return answer(pki, role, now, spec, nonce)
    refused = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.UNAUTHORIZED)
    return refused.public_bytes(serialization.Encoding.DER)
