"""The firmware id in the attestation key's certificate: Hopper's form on genuine certificates, Blackwell's built here.

No genuine Blackwell chain is among the vectors; its extension is built after TCG DICE Attestation Architecture §6.1.1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization

from attestation.errors import FormatError
from attestation.gpu import Report
from attestation.gpu.certificates import Certificate
from attestation.gpu.fwid import COMPOSITE, TCB_INFO, certified_fwid
from tests.attestation.gpu.judge import genuine, tee, told
from tests.devtee.pki import SHA384_OID, der_octets, der_oid, der_sequence, der_small
from tests.vectors import VECTORS, need_vectors

FIRST, SECOND = bytes(range(48)), bytes(48)


def tagged(tag: int, body: bytes) -> bytes:
    head = bytes([tag, len(body)]) if len(body) < 128 else bytes([tag, 0x81, len(body)])
    return head + body


def fwid(digest: bytes, oid: str = SHA384_OID) -> bytes:
    return der_sequence(der_oid(oid), der_octets(digest))


def tcb_info(*fwids: bytes, more: bytes = b"") -> bytes:
    """DiceTcbInfo with vendor [0], svn [3], fwids [6], flags [7]."""
    return der_sequence(tagged(0x80, b"NVIDIA"), tagged(0x83, b"\1"), tagged(0xA6, b"".join(fwids)), more)


def ak(*extensions: tuple[str, bytes]) -> Certificate:
    """A parsed attestation key certificate whose DICE extensions are *extensions*."""
    return replace(Certificate.parse(tee().pki["device-ak-0"].der), extensions=extensions)


def refused(*extensions: tuple[str, bytes]) -> None:
    with pytest.raises(FormatError) as caught:
        certified_fwid(ak(*extensions))
    assert caught.value.code == "FORMAT_GPU_FWID"


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["h100-550.90.07-full", "h100x8-ls10x4-590.12"])
def test_genuine_hopper_certificates_name_the_firmware_of_their_reports(name: str) -> None:
    need_vectors()
    seen = set()
    for device in genuine(VECTORS / "gpu" / name).evidence.devices:
        if device.kind == "gpu":
            value = certified_fwid(Certificate.parse(device.chain[0]))
            assert value == Report.parse(device.report).fwid and value.strip(b"\0")
            seen.add(value)
    assert seen


def test_first_firmware_id_of_blackwell_counts() -> None:
    assert certified_fwid(ak((TCB_INFO, tcb_info(fwid(FIRST), fwid(SECOND), more=tagged(0x87, b"\0\0"))))) == FIRST


def composite(version: int = 1, digest: bytes = FIRST, oid: str = SHA384_OID) -> bytes:
    spki = tee().pki["device-ik-0"].cert.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    return der_sequence(der_small(version), spki, fwid(digest, oid))


def test_the_form_that_the_cases_start_from_is_read() -> None:
    assert certified_fwid(ak((COMPOSITE, composite()))) == FIRST


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("empty", b""),
        ("one byte", b"\x30"),
        ("bytes after it", composite() + b"\0\0"),
        ("cut short", composite()[:-1]),
        ("a length beyond the end", composite()[:2] + bytes([composite()[2] + 1]) + composite()[3:]),
        ("version 2", composite(version=2)),
        ("a digest of 32 bytes", composite(digest=bytes(32))),
        ("SHA-256 named", composite(oid="2.16.840.1.101.3.4.2.1")),
        ("indefinite length", b"\x30\x80" + composite()[3:] + b"\0\0"),
        ("long form of a short length", b"\x30\x82\x00" + composite()[2:]),
        ("a length of 4 GiB", b"\x30\x84\xff\xff\xff\xff"),
        ("a high tag", b"\x1f\x01\x00"),
        ("the digest alone at the end", FIRST),
    ],
)
def test_composite_id_of_another_form_is_refused(name: str, value: bytes) -> None:
    refused((COMPOSITE, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no list", der_sequence(tagged(0x80, b"NVIDIA"))),
        ("an empty list", tcb_info()),
        ("two lists", der_sequence(tagged(0xA6, fwid(FIRST)), tagged(0xA6, fwid(SECOND)))),
        ("a list of something else", tcb_info(der_octets(FIRST))),
        ("SHA-256 first", tcb_info(fwid(bytes(32), "2.16.840.1.101.3.4.2.1"), fwid(FIRST))),
    ],
)
def test_tcb_info_of_another_form_is_refused(name: str, value: bytes) -> None:
    refused((TCB_INFO, value))


def test_none_or_two_sources_of_a_firmware_id_are_refused() -> None:
    refused()
    refused((COMPOSITE, composite()), (TCB_INFO, tcb_info(fwid(FIRST))))


def test_development_machine_has_hoppers_form() -> None:
    device = told().evidence.devices[0]
    assert certified_fwid(Certificate.parse(device.chain[0])) == tee().pki.facts.fwid
