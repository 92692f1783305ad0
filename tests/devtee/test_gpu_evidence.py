"""GPU evidence has the very shape of a genuine H100's, and its signatures hold under the machine's own roots."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from lxml import etree  # type: ignore[import-untyped]  # lxml ships no types
from signxml.verifier import XMLVerifier

from tests.devtee.gpu import DRIVER_ACTIVE, VBIOS_ACTIVE, GpuForm
from tests.devtee.ocsp import OcspSpec, answer_request
from tests.devtee.rim import RimSpec
from tests.devtee.tee import DevTee
from tests.vectors import VECTORS, need_vectors

NOW: Final = 1_795_000_000
NONCE: Final = bytes(range(32))


@pytest.fixture(scope="module")
def tee(tmp_path_factory: pytest.TempPathFactory) -> DevTee:
    return DevTee.create(tmp_path_factory.mktemp("tee") / "state", gpus=2)


def verify_report(report: bytes, chain: bytes) -> None:
    """Raises `InvalidSignature`."""
    key = x509.load_pem_x509_certificates(chain)[0].public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    raw = report[-96:]
    der = encode_dss_signature(int.from_bytes(raw[:48]), int.from_bytes(raw[48:]))
    key.verify(der, report[:-96], ec.ECDSA(hashes.SHA384()))


def opaque(report: bytes) -> list[tuple[int, bytes]]:
    start = 45 + int.from_bytes(report[42:45], "little") + 32
    end = start + 2 + int.from_bytes(report[start : start + 2], "little")
    assert end == len(report) - 96
    found, at = [], start + 2
    while at < end:
        kind, size = struct.unpack_from("<HH", report, at)
        found.append((kind, report[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


@pytest.mark.vectors
def test_report_has_the_bytes_of_a_genuine_one_but_for_values(tee: DevTee) -> None:
    need_vectors()
    case = VECTORS / "gpu" / "h100-550.90.07-full" / "evidence.json"
    genuine = base64.b64decode(json.loads(case.read_text())[0]["evidence"])
    report, chain = tee.gpu_report(NONCE)
    assert len(report) == len(genuine) == 4117
    assert report[:4] == genuine[:4] and report[36:45] == genuine[36:45]
    for at in range(45, 45 + 3520, 55):
        assert report[at : at + 7] == genuine[at : at + 7]
    own, real = opaque(report), opaque(genuine)
    assert [(k, len(v)) for k, v in own] == [(k, len(v)) for k, v in real]
    same = {k for k, _ in real} - {12, 20}
    assert [(k, v) for k, v in own if k in same] == [(k, v) for k, v in real if k in same]
    verify_report(report, chain)


def test_chain_has_five_levels_and_ends_in_the_root(tee: DevTee) -> None:
    report, text = tee.gpu_report(NONCE)
    chain = x509.load_pem_x509_certificates(text)
    assert len(chain) == 5 and len(text) <= 5120
    for lower, upper in zip(chain, [*chain[1:], chain[-1]], strict=True):
        lower.verify_directly_issued_by(upper)
        assert isinstance(lower.public_key(), ec.EllipticCurvePublicKey)
    assert hashlib.sha256(tee.roots.nvidia_device).digest() == chain[-1].fingerprint(hashes.SHA256())
    assert chain[1].serial_number.to_bytes(9)[0] == 0x41
    extension = chain[0].extensions.get_extension_for_oid(x509.ObjectIdentifier("2.23.133.5.4.1")).value
    assert isinstance(extension, x509.UnrecognizedExtension)
    assert extension.value[-48:] == dict(opaque(report))[20] == tee.pki.facts.fwid


def test_two_gpus_have_two_identities_and_one_may_be_shown_twice(tee: DevTee) -> None:
    first, second, again = tee.gpu_evidence(NONCE, [0, 1, 0])
    assert first["certificate"] == again["certificate"] != second["certificate"]
    assert first["evidence"] != again["evidence"]


def test_report_signed_by_another_gpu_does_not_verify(tee: DevTee) -> None:
    with pytest.raises(InvalidSignature):
        verify_report(*tee.gpu_report(NONCE, 0, GpuForm(signer=1)))


def test_forms_lie_under_a_good_signature(tee: DevTee) -> None:
    lie = GpuForm(
        measurements={35: b"\1" * 48, 13: b"\2" * 48}, nvdec0=0xAA, protected_pcie=0xAA, feature_flag=2,
        driver="535.0", fwid=b"",
    )  # fmt: skip
    report, chain = tee.gpu_report(NONCE, 0, lie)
    verify_report(report, chain)
    said = dict(opaque(report))
    assert (said[11], said[21], said[36], said[3]) == (b"\xaa", b"\xaa", b"\2\0", b"535.0\0") and 20 not in said
    assert report[45 + 35 * 55 + 7 :][:48] == b"\1" * 48 and report[45 + 13 * 55 + 7 :][:48] == b"\2" * 48


def test_rims_verify_and_golden_values_equal_the_report(tee: DevTee) -> None:
    report, _ = tee.gpu_report(NONCE)
    made = tee.rims()
    assert set(made) == {"NV_GPU_DRIVER_GH100_550.90.07", "NV_GPU_VBIOS_1010_0200_882_96009F0001"}
    seen: list[int] = []
    for text in made.values():
        root = _verified(tee, text)
        resources = root.findall(".//{*}Resource")
        assert len(resources) == 64
        for r in resources:
            if r.get("active") == "False":
                continue
            index = int(r.get("index"))
            allowed = [v for k, v in r.items() if k.endswith("}Hash" + k[-1])]
            assert len(allowed) == int(r.get("alternatives"))
            assert report[45 + index * 55 + 7 :][:48].hex() in allowed
            seen.append(index)
    assert sorted(seen) == sorted(DRIVER_ACTIVE + VBIOS_ACTIVE)


def test_edited_rim_does_not_verify(tee: DevTee) -> None:
    text = tee.rims()["NV_GPU_DRIVER_GH100_550.90.07"].replace(b'index="63"', b'index="62"')
    with pytest.raises(Exception, match=r"(?i)digest"):
        _verified(tee, text)


def test_rims_can_name_wrong_versions_values_and_overlaps(tee: DevTee) -> None:
    made = tee.rims(RimSpec(driver="1.2.3", values={35: b"\7" * 48}, both=frozenset({50})))
    driver = _verified(tee, made["NV_GPU_DRIVER_GH100_550.90.07"])
    assert driver.find("{*}Meta").get("colloquialVersion") == "1.2.3"
    assert b"07" * 48 in made["NV_GPU_DRIVER_GH100_550.90.07"]
    for text in made.values():
        assert _verified(tee, text).find('.//{*}Resource[@index="50"]').get("active") == "True"


def _verified(tee: DevTee, text: bytes) -> etree._Element:
    root = etree.fromstring(text)
    ca = tee.roots_pem["nvidia_rim"]
    chain = [_certificate(e.text) for e in root.findall(".//{*}X509Certificate")]
    for lower, upper in zip(chain, [*chain[1:], x509.load_pem_x509_certificate(ca)], strict=True):
        lower.verify_directly_issued_by(upper)
    result = XMLVerifier().verify(root, x509_cert=chain[0])
    assert not isinstance(result, list)
    return result.signed_xml


def _certificate(text: str) -> x509.Certificate:
    return x509.load_der_x509_certificate(base64.b64decode(text))


def _good(tee: DevTee, answer: bytes, role: str, issuer: str, at: int = NOW) -> bool:
    """RFC 6960 §3.2, with NVIDIA's SHA-384 certificate ids."""
    got = ocsp.load_der_ocsp_response(answer)
    responder = got.certificates[0]
    try:
        responder.verify_directly_issued_by(tee.pki[issuer].cert)
        key = responder.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(got.signature, got.tbs_response_bytes, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    start, end = got.this_update_utc, got.next_update_utc
    return (
        got.certificate_status is ocsp.OCSPCertStatus.GOOD
        and got.serial_number == tee.pki[role].cert.serial_number
        and isinstance(got.hash_algorithm, hashes.SHA384)
        and end is not None
        and start.timestamp() <= at <= end.timestamp()
    )


ROLES: Final = {
    "device-ik": ("device-ik-0", "device-ica"),
    "device-ik1": ("device-ik-1", "device-ica"),
    "device-ica": ("device-ica", "device-identity"),
    "device-identity": ("device-identity", "device-root"),
    "rim-driver-l4": ("rim-driver-l4", "rim-l3"),
    "rim-driver-l3": ("rim-l3", "rim-l2"),
    "rim-driver-l2": ("rim-l2", "rim-root"),
    "rim-vbios-l4": ("rim-vbios-l4", "rim-l3"),
}


def test_ocsp_answers_are_good_for_a_day(tee: DevTee) -> None:
    answers = tee.ocsp(NOW, gpus=2)
    assert set(answers) == set(ROLES)
    for name, (role, issuer) in ROLES.items():
        assert _good(tee, answers[name], role, issuer), name
        assert not _good(tee, answers[name], role, issuer, NOW + 86400), name
        assert not _good(tee, answers[name], role, issuer, NOW - 3600), name


@pytest.mark.parametrize("spec", [
    OcspSpec(revoked=frozenset({"device-ik-0"})),
    OcspSpec(on_hold=frozenset({"device-ik-0"})),
    OcspSpec(unknown=frozenset({"device-ik-0"})),
    OcspSpec(swapped=(("device-ik", "device-ik-1"),)),
    OcspSpec(responder=(("device-ik-0", "rim-l3"),)),
    OcspSpec(age=2 * 86400),
    OcspSpec(age=-3600),
])  # fmt: skip
def test_ocsp_answers_can_lie(tee: DevTee, spec: OcspSpec) -> None:
    assert not _good(tee, tee.ocsp(NOW, spec=spec)["device-ik"], "device-ik-0", "device-ica")


def test_ocsp_echoes_a_nonce_and_refuses_strangers(tee: DevTee, tmp_path: Path) -> None:
    other = DevTee.create(tmp_path / "other", gpus=1)
    for machine, status in ((tee, "SUCCESSFUL"), (other, "UNAUTHORIZED")):
        request = (
            ocsp.OCSPRequestBuilder()
            .add_certificate(machine.pki["device-ik-0"].cert, machine.pki["device-ica"].cert, hashes.SHA384())
            .add_extension(x509.OCSPNonce(NONCE), critical=False)
            .build()
        )
        got = ocsp.load_der_ocsp_response(answer_request(tee.pki, request.public_bytes(Encoding.DER), NOW, OcspSpec()))
        assert got.response_status.name == status
        if status == "SUCCESSFUL":
            assert got.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce == NONCE
