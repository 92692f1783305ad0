"""No byte of a real device chain can change unseen, and neither can the bits that the library overlooks.

Reports, RIMs and OCSP answers are swept beside their other tests. A seeded sample here; with VOUCHSAFE_SWEEP=all every
offset. Nothing in a certificate is legitimately unsigned.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.x509 import ocsp

from tests.attestation.gpu.judge import Story, genuine
from tests.vectors import VECTORS, need_vectors

pytestmark = [
    pytest.mark.vectors,
    # The library warns of certificates that it means to refuse one day; a sweep makes many of those.
    pytest.mark.filterwarnings("ignore"),
]

ALL = os.environ.get("VOUCHSAFE_SWEEP") == "all"
SAMPLE = 60
NAMES = ("AK", "IK", "Provisioner ICA", "Identity")


def story(name: str, *stages: str) -> Story:
    need_vectors()
    found = genuine(VECTORS / "gpu" / name).with_policy(require=frozenset(stages))
    assert found.judge().accepted
    return found


@pytest.mark.parametrize("place", range(4), ids=NAMES)
def test_no_changed_byte_of_a_real_certificate_is_accepted(place: int) -> None:
    asked = story("h100-550.90.07-full", "parse", "signature", "chain", "fwid")
    chain = asked.evidence.devices[0].chain
    der, dice, tried = chain[place], random.Random(NAMES[place]), 0
    signature = len(der) - len(x509.load_der_x509_certificate(der).signature)
    frame = [*range(4), *range(signature - 16, signature + 8), len(der) - 1]
    for at in range(len(der)) if ALL else sorted({*frame, *dice.sample(range(len(der)), SAMPLE)}):
        byte = der[at]
        for value in {byte ^ 1, byte ^ 0x80, byte ^ 0xFF, (byte + 1) & 255, 0, dice.randrange(256)} - {byte}:
            tried += 1
            raw = der[:at] + bytes([value]) + der[at + 1 :]
            verdict = asked.with_device(0, chain=(*chain[:place], raw, *chain[place + 1 :])).judge()
            assert not verdict.accepted, f"offset {at} was accepted as {value:#x}"
    assert tried > 5 * SAMPLE
    for raw in (der + b"\0", der[:-1], b"\0" + der, b""):
        assert not asked.with_device(0, chain=(*chain[:place], raw, *chain[place + 1 :])).judge().accepted


@pytest.mark.parametrize("place", [2, 3], ids=["Provisioner ICA", "Identity"])
def test_unused_bits_before_a_certificates_signature_are_refused(place: int) -> None:
    """The library overlooks them when the last bit of the signature is zero, as in these two."""
    asked = story("h100-550.90.07-full", "chain")
    chain = asked.evidence.devices[0].chain
    raw = bytearray(chain[place])
    signature = x509.load_der_x509_certificate(chain[place]).signature
    at = len(raw) - len(signature) - 1
    assert raw[at] == 0 and signature[-1] & 1 == 0
    raw[at] = 1
    issuer = x509.load_der_x509_certificate((*chain, asked.device_root)[place + 1])
    x509.load_der_x509_certificate(bytes(raw)).verify_directly_issued_by(issuer)  # the library does not mind
    verdict = asked.with_device(0, chain=(*chain[:place], bytes(raw), *chain[place + 1 :])).judge()
    assert verdict.codes == ["FORMAT_GPU_CERTIFICATE"]


def test_unused_bits_before_an_answers_signature_are_refused() -> None:
    asked = story("h100-550.90.07-device-ocsp", "ocsp_device")
    changed_one = 0
    for name in ("device-ik", "device-ica", "device-identity"):
        der = asked.ocsp[name]
        answer = ocsp.load_der_ocsp_response(der)
        if answer.signature[-1] & 1:
            continue
        changed_one += 1
        at = der.index(answer.signature) - 1
        raw = der[:at] + b"\1" + der[at + 1 :]
        assert der[at] == 0 and ocsp.load_der_ocsp_response(raw).signature == answer.signature
        assert replace(asked, ocsp={**asked.ocsp, name: raw}).judge().codes == ["GPU_OCSP_SIGNATURE"]
    assert changed_one
