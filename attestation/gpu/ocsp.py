"""Revocation of NVIDIA's certificates by OCSP answers that somebody carried here (RFC 6960).

An answer counts for a certificate when

    (1) it is successful and speaks of one certificate: this serial, under SHA-384 of this issuer's name and key
    (2) it is signed (ECDSA P-384, SHA-384) by a responder whose certificate comes with it, which the issuer of the
        checked certificate issued itself, with extended key usage OCSPSigning, no CA, valid at the time (§4.2.2.2)
    (3) it says good: certificateHold and unknown are refusals
    (4) thisUpdate <= now <= nextUpdate, both present

Answers are found by what they speak of; the names they come under decide nothing, so an answer for another certificate
cannot stand in (a defect of NVIDIA's verifier). An authentic "revoked" wins over any "good", stale or not. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

from attestation.errors import FormatError, RefusedError
from attestation.gpu.certificates import Certificate, bit_string, issued

__all__ = ["OcspAnswers"]

MAX_ANSWER: Final = 8192
MAX_ANSWERS: Final = 256
_ECDSA_SHA384: Final = "1.2.840.10045.4.3.3"
_ALGORITHM: Final = bytes.fromhex("300a06082a8648ce3d040303")
"""DER of AlgorithmIdentifier ecdsa-with-SHA384 (RFC 5758 §3.2)."""
_Id = tuple[int, bytes, bytes]


class OcspAnswers:
    """OCSP answers by the certificate they speak of. Holding one proves nothing: `check` judges."""

    def __init__(self, answers: Mapping[str, bytes]) -> None:
        """Answers that are no OCSP answers are counted and left out: a needed one is then missing."""
        self._found: dict[_Id, list[bytes]] = {}
        self._unusable = 0
        if len(answers) > MAX_ANSWERS:
            raise FormatError(
                "FORMAT_GPU_OCSP", "too many OCSP answers", expected=f"at most {MAX_ANSWERS}", actual=len(answers)
            )
        for der in answers.values():
            answer = _parse(der)
            if answer is None:
                self._unusable += 1
            else:
                self._found.setdefault(_id(answer), []).append(der)

    def check(self, cert: Certificate, issuer: Certificate, *, now: int) -> int:
        """(1) to (4) for *cert*; unix seconds of nextUpdate. Raises `RefusedError`: GPU_OCSP_MISSING, _RESPONDER,
        _SIGNATURE, _REVOKED, _STATUS, _WINDOW."""
        ders = self._found.get((cert.parsed.serial_number, *_issuer_hashes(issuer.der)), [])
        if not ders:
            raise RefusedError(
                "GPU_OCSP_MISSING", f"no OCSP answer for {cert.name}", expected="an answer for this very certificate",
                actual=f"none ({self._unusable} unusable)",
            )  # fmt: skip
        end, problem = 0, None
        for der in ders:
            try:
                end = max(end, _judge(der, cert, issuer, now))
            except RefusedError as err:
                if err.code == "GPU_OCSP_REVOKED":
                    raise
                problem = problem or err
        if not end and problem is not None:
            raise problem
        return end


def _judge(der: bytes, cert: Certificate, issuer: Certificate, now: int) -> int:
    answer = _parse(der)
    assert answer is not None  # only parsed answers are kept
    responder = _authentic(der, issuer.der)  # (2)
    if isinstance(responder, str):
        raise RefusedError(responder, f"the OCSP answer for {cert.name} is not signed by a responder of its issuer")
    status = answer.certificate_status
    if status is ocsp.OCSPCertStatus.REVOKED:  # (3)
        reason = answer.revocation_reason
        raise RefusedError(
            "GPU_OCSP_REVOKED", f"{cert.name} is revoked", expected="good",
            actual=reason.value if reason is not None else "revoked",
        )  # fmt: skip
    if status is not ocsp.OCSPCertStatus.GOOD:
        raise RefusedError("GPU_OCSP_STATUS", f"nothing is known of {cert.name}", expected="good", actual=status.name)
    if not responder.not_before <= now <= responder.not_after:
        raise RefusedError(
            "GPU_OCSP_RESPONDER", f"the responder for {cert.name} is not valid at the time",
            expected=f"{responder.not_before} to {responder.not_after}", actual=now,
        )  # fmt: skip
    begin, end = _seconds(answer.this_update_utc), _seconds(answer.next_update_utc)
    if not 0 < begin <= now <= end:  # (4)
        raise RefusedError(
            "GPU_OCSP_WINDOW", f"the OCSP answer for {cert.name} is not for this time", expected=f"{begin} to {end}",
            actual=now, hint="fetch a fresh answer: they are valid for a day",
        )  # fmt: skip
    return end


@lru_cache(maxsize=512)
def _authentic(der: bytes, issuer: bytes) -> Certificate | str:
    """(2) but for the time: the responder's certificate, or the code of what is wrong. A fact about bytes."""
    answer = _parse(der)
    if answer is None or len(answer.certificates) != 1:
        return "GPU_OCSP_RESPONDER"
    try:
        responder = Certificate.parse(answer.certificates[0].public_bytes(serialization.Encoding.DER))
    except FormatError:
        return "GPU_OCSP_RESPONDER"
    allowed = ExtendedKeyUsageOID.OCSP_SIGNING.dotted_string in responder.purposes
    if not allowed or responder.ca or not responder.signs_data:
        return "GPU_OCSP_RESPONDER"
    if not issued(responder.der, issuer):
        return "GPU_OCSP_RESPONDER"
    named = answer.responder_key_hash == _sha1(responder) or answer.responder_name == responder.parsed.subject
    if not named or answer.signature_algorithm_oid.dotted_string != _ECDSA_SHA384:
        return "GPU_OCSP_SIGNATURE"
    try:
        # The signature follows what is signed and has no unused bits (X.690 §8.6.2): the library overlooks them.
        if answer.tbs_response_bytes + _ALGORITHM + bit_string(answer.signature) not in der:
            return "GPU_OCSP_SIGNATURE"
        responder.key.verify(answer.signature, answer.tbs_response_bytes, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return "GPU_OCSP_SIGNATURE"
    return responder


@lru_cache(maxsize=512)
def _parse(der: bytes) -> ocsp.OCSPResponse | None:
    """A successful answer about one certificate under SHA-384, everything we read decoded; None for anything else."""
    if len(der) > MAX_ANSWER:
        return None
    try:
        answer = ocsp.load_der_ocsp_response(der)
        if answer.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL or len(list(answer.responses)) != 1:
            return None
        if not isinstance(answer.hash_algorithm, hashes.SHA384):
            return None
        _ = answer.certificate_status, answer.revocation_reason, answer.certificates, answer.signature_algorithm_oid
        _ = answer.this_update_utc, answer.next_update_utc, answer.responder_key_hash, answer.responder_name
        # Extensions that may be critical are not understood here; a nonce in a cached answer is nobody's.
        if any(e.critical for e in (*answer.extensions, *answer.single_extensions)):
            return None
    except Exception:  # the library raises several kinds for malformed DER; all of them mean "no answer"
        return None
    return answer


def _id(answer: ocsp.OCSPResponse) -> _Id:
    return answer.serial_number, answer.issuer_name_hash, answer.issuer_key_hash


@lru_cache(maxsize=64)
def _issuer_hashes(issuer: bytes) -> tuple[bytes, bytes]:
    cert = Certificate.parse(issuer)
    return _digest(cert.parsed.subject.public_bytes(), hashes.SHA384()), _digest(cert.key_bits, hashes.SHA384())


def _sha1(cert: Certificate) -> bytes:
    return _digest(cert.key_bits, hashes.SHA1())  # noqa: S303  # RFC 6960 KeyHash: a name, not a proof


def _digest(data: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def _seconds(moment: datetime | None) -> int:
    return 0 if moment is None else int(moment.timestamp())
