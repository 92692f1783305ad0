"""OCSP answers count for the certificate they speak of, by the hand of its issuer, at their time, for nothing else."""

from __future__ import annotations

import datetime as dt
import os
import random
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import FormatError, RefusedError
from attestation.gpu import OcspAnswers
from attestation.gpu.certificates import Certificate
from tests.attestation.gpu.judge import NOW, genuine, tee
from tests.devtee.ocsp import OcspSpec, answer
from tests.devtee.pki import Entity, utc
from tests.vectors import VECTORS, need_vectors

ALL = os.environ.get("VOUCHSAFE_SWEEP") == "all"
SAMPLE = 250
DAY = 86_400


def cert(role: str) -> Certificate:
    return Certificate.parse(tee().pki[role].der)


def refused(*answers: bytes, role: str = "device-ik-0", issuer: str = "device-ica", now: int = NOW) -> str:
    with pytest.raises(RefusedError) as caught:
        OcspAnswers({str(i): a for i, a in enumerate(answers)}).check(cert(role), cert(issuer), now=now)
    return caught.value.code


def responder(
    *, issuer: str = "device-ica", usages: list[x509.ObjectIdentifier] | None = None, ca: bool = False,
    signs: bool = True, years: tuple[int, int] = (2020, 2049),
) -> Entity:  # fmt: skip
    """A responder of one's own making, certified by *issuer*."""
    key = ec.generate_private_key(ec.SECP384R1())
    begin, end = (dt.datetime(year, 1, 1, tzinfo=dt.UTC) for year in years)
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    builder = x509.CertificateBuilder(
        tee().pki[issuer].cert.subject, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SIM responder")]),
        key.public_key(), x509.random_serial_number(), begin, end,
    )  # fmt: skip
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    builder = builder.add_extension(x509.KeyUsage(**{**usage, "digital_signature": signs, "crl_sign": True}), True)
    wanted = [ExtendedKeyUsageOID.OCSP_SIGNING] if usages is None else usages
    if wanted:
        builder = builder.add_extension(x509.ExtendedKeyUsage(wanted), critical=True)
    return Entity(key, builder.sign(tee().pki[issuer].key, hashes.SHA384()))


def made(
    by: Entity,
    *,
    shown: Entity | None = None,
    encoding: ocsp.OCSPResponderEncoding = ocsp.OCSPResponderEncoding.HASH,
    role: str = "device-ik-0",
    issuer: str = "device-ica",
    algorithm: hashes.HashAlgorithm | None = None,
    digest: hashes.HashAlgorithm | None = None,
    certificates: bool = True,
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
        .responder_id(encoding, by.cert)
    )
    if certificates:
        builder = builder.certificates([(shown or by).cert])
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(by.key, digest or hashes.SHA384()).public_bytes(serialization.Encoding.DER)


def test_answer_of_a_delegated_responder_counts() -> None:
    own = responder()
    end = OcspAnswers({"any name": made(own)}).check(cert("device-ik-0"), cert("device-ica"), now=NOW)
    assert end == NOW + DAY


def test_answer_counts_to_the_second_of_its_window() -> None:
    good = answer(tee().pki, "device-ik-0", NOW, OcspSpec(age=0, lifetime=100))
    found = OcspAnswers({"a": good})
    for now in (NOW, NOW + 100):
        assert found.check(cert("device-ik-0"), cert("device-ica"), now=now) == NOW + 100
    for now in (NOW - 1, NOW + 101):
        assert refused(good, now=now) == "GPU_OCSP_WINDOW"


@pytest.mark.parametrize(
    ("name", "entity", "code"),
    [
        ("no OCSPSigning", {"usages": []}, "GPU_OCSP_RESPONDER"),
        ("another purpose", {"usages": [ExtendedKeyUsageOID.SERVER_AUTH]}, "GPU_OCSP_RESPONDER"),
        ("certified by another issuer", {"issuer": "device-identity"}, "GPU_OCSP_RESPONDER"),
        ("a CA", {"ca": True}, "GPU_OCSP_RESPONDER"),
        ("not for signatures", {"signs": False}, "GPU_OCSP_RESPONDER"),
        ("expired", {"years": (2020, 2025)}, "GPU_OCSP_RESPONDER"),
        ("of the future", {"years": (2030, 2040)}, "GPU_OCSP_RESPONDER"),
    ],
)
def test_responder_without_the_right_is_refused(name: str, entity: dict[str, Any], code: str) -> None:
    assert refused(made(responder(**entity))) == code


def test_the_issuer_itself_is_no_responder() -> None:
    """RFC 6960 allows it; NVIDIA delegates. A CA key that signs answers would be a surprise, so it is refused."""
    assert refused(made(tee().pki["device-ica"])) == "GPU_OCSP_RESPONDER"


def test_the_device_cannot_answer_for_itself() -> None:
    assert refused(made(tee().pki["device-ak-0"])) == "GPU_OCSP_RESPONDER"


@pytest.mark.parametrize(
    ("name", "how", "code"),
    [
        ("no certificate comes with it", {"certificates": False}, "GPU_OCSP_RESPONDER"),
        ("names another responder than it shows", {"shown": "ocsp-device-ica"}, "GPU_OCSP_SIGNATURE"),
        ("SHA-256 signature", {"digest": hashes.SHA256()}, "GPU_OCSP_SIGNATURE"),
        ("SHA-1 certificate id", {"algorithm": hashes.SHA1()}, "GPU_OCSP_MISSING"),
        ("no nextUpdate", {"next_update": False}, "GPU_OCSP_WINDOW"),
        ("a critical extension", {"extension": x509.OCSPNonce(b"n" * 16)}, "GPU_OCSP_MISSING"),
        ("another serial", {"role": "device-ik-1"}, "GPU_OCSP_MISSING"),
        ("another issuer in the id", {"issuer": "device-identity"}, "GPU_OCSP_MISSING"),
    ],
)
def test_answer_of_another_form_is_refused(name: str, how: dict[str, Any], code: str) -> None:
    if isinstance(how.get("shown"), str):
        how = {**how, "shown": tee().pki[how["shown"]]}
    assert refused(made(responder(), **how)) == code


def test_certificate_of_a_responder_beside_the_signature_of_another_is_refused() -> None:
    """Both bear one name, so only the signature tells them apart."""
    true, false = responder(), responder()
    by_name = ocsp.OCSPResponderEncoding.NAME
    assert OcspAnswers({"a": made(true, encoding=by_name)}).check(cert("device-ik-0"), cert("device-ica"), now=NOW)
    assert refused(made(false, shown=true, encoding=by_name)) == "GPU_OCSP_SIGNATURE"


def test_answer_that_names_another_responder_is_refused_though_its_signature_holds() -> None:
    """One byte of the responder id changed before signing: the answer is cut open and signed again."""
    own = responder()
    raw = made(own)
    old = ocsp.load_der_ocsp_response(raw)
    named = old.responder_key_hash
    assert named is not None
    tbs = old.tbs_response_bytes.replace(named, bytes([named[0] ^ 1]) + named[1:])
    new = b""
    while len(new) != len(old.signature):  # 101 to 104 bytes, mostly 103: the lengths around it must stay true
        new = own.key.sign(tbs, ec.ECDSA(hashes.SHA384()))
    forged = raw.replace(old.tbs_response_bytes, tbs).replace(old.signature, new)
    shown = ocsp.load_der_ocsp_response(forged)
    own.key.public_key().verify(shown.signature, shown.tbs_response_bytes, ec.ECDSA(hashes.SHA384()))
    assert refused(forged) == "GPU_OCSP_SIGNATURE"


def test_authentic_revocation_wins_over_every_good_answer() -> None:
    pki = tee().pki
    good = answer(pki, "device-ik-0", NOW, OcspSpec())
    for spec in (OcspSpec(revoked=frozenset({"device-ik-0"})),
                 OcspSpec(revoked=frozenset({"device-ik-0"}), age=30 * DAY)):  # fmt: skip
        bad = answer(pki, "device-ik-0", NOW, spec)
        assert refused(good, bad) == refused(bad, good) == "GPU_OCSP_REVOKED"


def test_forged_revocation_does_not_hide_a_good_answer() -> None:
    """Anybody could stop a service with it."""
    pki = tee().pki
    spec = OcspSpec(revoked=frozenset({"device-ik-0"}), responder=(("device-ik-0", "rim-l3"),))
    answers = {"a": answer(pki, "device-ik-0", NOW, spec), "b": answer(pki, "device-ik-0", NOW, OcspSpec())}
    assert OcspAnswers(answers).check(cert("device-ik-0"), cert("device-ica"), now=NOW) > NOW


def test_stale_answer_does_not_hide_a_fresh_one() -> None:
    pki = tee().pki
    answers = {str(age): answer(pki, "device-ik-0", NOW, OcspSpec(age=age)) for age in (3 * DAY, 60, -DAY)}
    end = OcspAnswers(answers).check(cert("device-ik-0"), cert("device-ica"), now=NOW)
    assert end == NOW - 60 + DAY


def test_unusable_answers_are_left_out_and_counted() -> None:
    unauthorised = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.UNAUTHORIZED)
    junk = (b"", b"\x30\x03", b"\0" * 9000, unauthorised.public_bytes(serialization.Encoding.DER))
    with pytest.raises(RefusedError) as caught:
        OcspAnswers(dict(enumerate(junk))).check(cert("device-ik-0"), cert("device-ica"), now=NOW)  # type: ignore[arg-type]
    assert caught.value.code == "GPU_OCSP_MISSING" and "4 unusable" in caught.value.actual
    good = answer(tee().pki, "device-ik-0", NOW, OcspSpec())
    assert OcspAnswers({"junk": b"x", "good": good}).check(cert("device-ik-0"), cert("device-ica"), now=NOW)


def test_too_many_answers_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(FormatError, match="FORMAT_GPU_OCSP"):
        OcspAnswers({str(i): b"" for i in range(257)})


@pytest.mark.vectors
@pytest.mark.parametrize("name", ["device-ik", "device-ica", "device-identity"])
def test_no_changed_byte_of_a_real_answer_is_accepted(name: str) -> None:
    need_vectors()
    story = genuine(VECTORS / "gpu" / "h100-550.90.07-device-ocsp")
    chain = [Certificate.parse(d) for d in (*story.evidence.devices[0].chain, story.device_root)]
    number = ("device-ik", "device-ica", "device-identity").index(name) + 1
    raw = story.ocsp[name]
    assert OcspAnswers({name: raw}).check(chain[number], chain[number + 1], now=story.now) > story.now
    pick = random.Random(name)
    frame = range(60)
    for at in range(len(raw)) if ALL else [*frame, *pick.sample(range(len(raw)), SAMPLE)]:
        for value in {raw[at] ^ (1 << pick.randrange(8)), raw[at] ^ 0x20}:
            changed = raw[:at] + bytes([value]) + raw[at + 1 :]
            with pytest.raises(RefusedError):
                OcspAnswers({name: changed}).check(chain[number], chain[number + 1], now=story.now)
    with pytest.raises(RefusedError):
        OcspAnswers({name: raw + b"\0"}).check(chain[number], chain[number + 1], now=story.now)


def honest() -> bytes:
    return answer(tee().pki, "device-ik-0", NOW, OcspSpec())


@given(
    st.binary(max_size=400)
    | st.builds(
        lambda a, b, c: c[:a] + b + c[a:], st.integers(0, 1000), st.binary(min_size=1, max_size=40), st.builds(honest)
    )
)
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore")  # the library warns of certificates that it means to refuse one day
def test_random_bytes_are_refused_and_never_crash(raw: bytes) -> None:
    assert refused(raw).startswith("GPU_OCSP_")
