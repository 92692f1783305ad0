"""The certificate of a real enclave, read field by field by OpenSSL and by a CBOR decoder that nobody here wrote.

`openssl` (s_client, x509, asn1parse, pkey, dgst) says what the X.509 holds; `cbor-diag` says what the extension holds;
`hashlib` recomputes what the fields commit to. Only at the end is each claim compared with what `Claims.decode` makes
of the same bytes. The other RA-TLS implementation that can be installed reads it in `test_ratls_peer.py`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from attestation.binding import report_data
from attestation.claims import Claims, GpuNonce, GpuStateClaim, ModelClaim
from tests.interop import diagnostic
from tests.interop.diagnostic import Tagged
from tests.interop.leaf import PROFILE, REPORT_DATA, elements, evidence, extension, spki, x509
from tests.interop.service import NAME, Recorded, openssl

CLAIMS = {
    "pubkey-hash", "profile", "not-before", "not-after", "dns-names", "boot-id", "release", "deployment", "config",
    "event-log", "gpu", "gpu-nonce", "gpu-state", "keyset", "role", "models",
}  # fmt: skip


# --- what OpenSSL says ------------------------------------------------------------------------------------------------


def test_handshake_is_tls_13_with_one_certificate(either: Recorded) -> None:
    assert "New, TLSv1.3" in either.handshake and "Peer signature type: ECDSA" in either.handshake
    assert either.handshake.count("BEGIN CERTIFICATE") == 1


def test_form_is_the_profiles(either: Recorded) -> None:
    text = x509(either, "-text", "-certopt", "ext_parse")
    assert "Version: 3 (0x2)" in text and text.count("ecdsa-with-SHA256") == 2
    assert "NIST CURVE: P-256" in text and "Public-Key: (256 bit)" in text
    assert x509(either, "-subject", "-issuer", "-nameopt", "RFC2253") == f"subject=CN={NAME}\nissuer=CN={NAME}\n"
    assert 1 << 64 < int(x509(either, "-serial").partition("=")[2], 16) < 1 << 159


def test_extensions_are_four_and_the_evidence_is_one_non_critical_octet_string(either: Recorded) -> None:
    known = x509(either, "-ext", "subjectAltName,keyUsage,extendedKeyUsage,basicConstraints,authorityKeyIdentifier")
    lines = [line.strip() for line in known.splitlines()]
    assert lines == [
        "X509v3 Key Usage: critical", "Digital Signature",
        "X509v3 Extended Key Usage:", "TLS Web Server Authentication",
        "X509v3 Subject Alternative Name: critical", f"DNS:{NAME}",
    ]  # fmt: skip
    (listing,) = (i for i, e in enumerate(elements(either)) if e.kind == "cont [ 3 ]")
    inside = elements(either)[listing + 2 :]
    assert sum(e.depth == 4 and e.kind == "SEQUENCE" for e in inside) == 4
    assert len(extension(either)) > 5000


def test_certificate_is_signed_by_its_own_key_and_by_no_changed_byte(either: Recorded) -> None:
    parts, at = elements(either), str(either.folder / "leaf.der")
    body, signature = parts[1], parts[-1]
    assert (body.kind, body.depth, signature.kind, signature.depth) == ("SEQUENCE", 1, "BIT STRING", 1)
    cut = {"tbs": body, "sig": signature}
    for name, part in cut.items():
        out = str(either.folder / f"{name}.bin")
        openssl("asn1parse", "-in", at, "-inform", "DER", "-strparse", str(part.offset), "-noout", "-out", out)
    (either.folder / "spki.pem").write_text(x509(either, "-pubkey"))
    tbs = (either.folder / "tbs.bin").read_bytes()
    assert tbs == either.leaf[body.offset : body.offset + body.head + body.size]
    judge = (
        "dgst", "-sha256", "-verify", str(either.folder / "spki.pem"), "-signature", str(either.folder / "sig.bin"),
    )  # fmt: skip
    assert openssl(*judge, stdin=tbs) == b"Verified OK\n"
    for place in (20, len(tbs) // 2, len(tbs) - 1):
        changed = tbs[:place] + bytes([tbs[place] ^ 1]) + tbs[place + 1 :]
        assert openssl(*judge, stdin=changed, status=1) == b"Verification failure\n"


# --- what the CBOR decoder says ---------------------------------------------------------------------------------------


NOT_DETERMINISTIC = {
    "a length that is not the shortest": "1817",
    "an indefinite length": "5f4101ff",
    "keys out of order": "a2616201616101",
    "a longer key first": "a262616101616201",
    "a key twice": "a2616101616101",
    "a float": "f97e00",
    "bytes after the item": "0100",
}


@pytest.mark.parametrize("raw", NOT_DETERMINISTIC.values(), ids=NOT_DETERMINISTIC.keys())
def test_decoder_sees_what_is_not_deterministic(tdx: Recorded, raw: str) -> None:
    """Otherwise its silence about our bytes would mean nothing."""
    with pytest.raises((ValueError, AssertionError)):
        diagnostic.read(bytes.fromhex(raw))


def test_decoder_reads_the_published_example_of_a_tagged_pair(tdx: Recorded) -> None:
    """The only byte-exact example of this item that its other implementers publish."""
    assert diagnostic.read(bytes.fromhex("d9ea608244010203044405060708")) == Tagged(60000, [b"\1\2\3\4", b"\5\6\7\x08"])


GRAMINE_SPKI = bytes.fromhex(
    "3076301006072a8648ce3d020106052b810400220362000471175934940456216c01770d57f89d92176b28c5fa00fb3ee3cc"
    "c2bee0735a264883145b6f3cb7a3d5c3636efc4229f3e55004c4f274e77ff8b061166689da45fc5e1884a6b85fd0413e5fe8"
    "a27ceca0ef4bcbb6c4c11666238ce7145a63e239"
)
GRAMINE_CLAIMS = bytes.fromhex(
    "a16b7075626b65792d686173685824820158205a5a5b2d177433048e9d62409d1acc4ec526c06e294d09e69a36cff9369e4851"
)
GRAMINE_REPORT_DATA = bytes.fromhex("d8673446fe0f6842d4af0d182c8751d7e967039116deff5f85a43b2ca90c2831")
GRAMINE_HEAD = bytes.fromhex("d9ea608259127e")
"""Values out of the certificate that Gramine's developers published for the CCC's interoperability tests (repository
interoperable-ra-tls, gramine-cert.pem): the key, the claims, the first half of the SGX quote's REPORTDATA, and how
extension 2.23.133.5.4.9 begins: tag 60000, a pair, a byte string of 0x127e bytes."""


def test_rules_are_those_of_a_certificate_that_another_implementation_published(tdx: Recorded) -> None:
    """Key → pubkey-hash → claims → REPORTDATA come out as Gramine made them, by the rules of our own certificate."""
    assert diagnostic.read(diagnostic.read(GRAMINE_CLAIMS)["pubkey-hash"]) == [1, hashlib.sha256(GRAMINE_SPKI).digest()]
    assert report_data(GRAMINE_CLAIMS) == GRAMINE_REPORT_DATA + bytes(32)
    quote = evidence(tdx)[0]
    assert extension(tdx)[:7] == GRAMINE_HEAD[:5] + len(quote).to_bytes(2, "big")


def test_quote_covers_the_claims_as_carried(either: Recorded) -> None:
    quote, claims, _ = evidence(either)
    assert quote[REPORT_DATA] == hashlib.sha256(claims).digest() + bytes(32)
    assert diagnostic.read(claims).keys() == CLAIMS


def test_claims_name_the_key_times_and_names_that_openssl_sees(either: Recorded) -> None:
    claims = diagnostic.read(evidence(either)[1])
    assert diagnostic.read(claims["pubkey-hash"]) == [7, hashlib.sha384(spki(either)).digest()]
    shown = x509(either, "-startdate", "-enddate", "-dateopt", "iso_8601")
    times = [int(datetime.datetime.fromisoformat(line.partition("=")[2]).timestamp()) for line in shown.split("\n")[:2]]
    assert times == [claims["not-before"], claims["not-after"]] and 0 < times[1] - times[0] <= 3600
    names = re.findall(r"DNS:([^,\s]+)", x509(either, "-ext", "subjectAltName"))
    assert names == claims["dns-names"] == sorted(names) and claims["profile"] == PROFILE


def test_claims_name_the_documents_that_are_served(either: Recorded) -> None:
    claims, bundle = diagnostic.read(evidence(either)[1]), diagnostic.read(either.bundle)

    def payload(name: str) -> bytes:
        return base64.b64decode(json.loads(bundle[name])["payload"], validate=True)

    assert bundle["leaf"] == either.leaf
    assert claims["release"] == hashlib.sha256(payload("release")).digest()
    assert claims["deployment"] == hashlib.sha256(payload("deployment")).digest()
    assert claims["config"] == hashlib.sha256(either.made.config.read_bytes()).digest()
    assert claims["event-log"] == hashlib.sha384(bundle["event-log"]).digest()
    assert claims["keyset"] == hashlib.sha256(bundle["keyset"]).digest()


def test_gpu_evidence_is_for_this_key(enclave: Callable[[int], Recorded]) -> None:
    _, raw, gpu = evidence(enclave(1))
    claims = diagnostic.read(raw)
    assert gpu is not None and claims["gpu"] == hashlib.sha384(gpu).digest()
    stream = zlib.decompressobj()
    inflated = stream.decompress(gpu)
    assert stream.eof and stream.unused_data == b""
    content = diagnostic.read(inflated)
    assert content.keys() == {"chains", "devices"} and [d["kind"] for d in content["devices"]] == ["gpu"]
    made_from, k = claims["gpu-nonce"], hashlib.sha384(spki(enclave(1))).digest()
    issued = made_from["issued-at"]
    nonce = hashlib.sha256(b"vouchsafe/gpu-nonce/v1" + k + issued.to_bytes(8, "big") + made_from["salt"]).digest()
    assert content["devices"][0]["report"][4:36] == nonce, "SPDM GET_MEASUREMENTS, nonce at offset 4"
    assert 0 <= claims["not-before"] - issued <= 600
    assert claims["gpu-state"] == {
        "count": 1, "switches": 0, "mode": "spt", "cc": True, "dev-tools": False, "ready": True, "production": True,
    }  # fmt: skip


def test_every_claim_is_what_our_decoder_says(either: Recorded) -> None:
    _, raw, gpu = evidence(either)
    theirs: dict[str, Any] = diagnostic.read(raw)
    nonce, state = theirs["gpu-nonce"], theirs["gpu-state"]
    expected = {
        "key_hash": diagnostic.read(theirs["pubkey-hash"])[1],
        "not_before": theirs["not-before"],
        "not_after": theirs["not-after"],
        "dns_names": tuple(theirs["dns-names"]),
        "boot_id": theirs["boot-id"],
        "release": theirs["release"],
        "deployment": theirs["deployment"],
        "config": theirs["config"],
        "event_log": theirs["event-log"],
        "gpu": theirs["gpu"],
        "gpu_nonce": nonce and GpuNonce(nonce["issued-at"], nonce["salt"]),
        "gpu_state": state
        and GpuStateClaim(
            state["count"], state["switches"], state["mode"], state["cc"], state["dev-tools"], state["ready"],
            state["production"],
        ),
        "keyset": theirs["keyset"],
        "role": theirs["role"],
        "models": tuple(ModelClaim(m["id"], m["weights"]) for m in theirs["models"]),
    }  # fmt: skip
    ours = Claims.decode(raw)
    assert {f.name: getattr(ours, f.name) for f in fields(ours)} == expected
    assert (gpu is None) == (theirs["gpu"] is None) == (either.gpus == 0)
    assert len(theirs["boot-id"]) == 16 and theirs["role"] == "both" and theirs["models"][0]["id"] == "parrot"
