"""An operator's web server for status lists: HTTPS on loopback under an authority made for one test run."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.attestation.client.ratls_server import Server

__all__ = ["LIST", "WebServer", "trusting"]

LIST = "GET /status.json"


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, *, ca: bool
) -> x509.Certificate:
    def named(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName(name)]
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(minutes=30))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(signer, hashes.SHA256())
    )


@cache
def _authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    return _certificate("throw-away authority", key, "throw-away authority", key, ca=True), key


def trusting() -> ssl.SSLContext:
    """What a client trusts that knows this run's authority alone."""
    return ssl.create_default_context(cadata=_authority()[0].public_bytes(Encoding.PEM).decode())


class WebServer(Server):
    """`routes["GET /status.json"]` is what it publishes."""

    def __init__(self, name: str = "status.test") -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        super().__init__(_certificate(name, key, "throw-away authority", _authority()[1], ca=False), key)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/status.json"
