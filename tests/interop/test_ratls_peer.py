"""Our TDX-only certificate read by another RA-TLS implementation: the Trusted Network Gateway (TNG, `tng-sdk` on PyPI).

TNG carries its evidence where the CCC's interoperable RA-TLS has it: extension 2.23.133.5.4.9, a CBOR tag over
[evidence, claims]. Its verifier, in Rust with rustls, (1) finishes TLS 1.3, (2) checks that the certificate is signed
by its own key, (3) finds the extension, (4) decodes tag and pair, and (5) hands the evidence to the verifier of that
tag. Of tags it has two of its own (0xC0C000, 0x17A000) and none for a bare Intel quote, 60000: so it reads our
certificate through step (4) and then says that it has no verifier for tag 0xea60. That sentence is what the test asks
for; the other cases show that each earlier step is really taken, because breaking it gives another sentence.

What else was looked for, among the packages of PyPI, npm and Debian: `gramine-ratls` needs Gramine's native library,
which Debian does not have; `intel-sgx-ra` reads extension 1.2.840.113741.1337.6 with SGX quotes; `dstack-sdk`,
`@phala/dstack-sdk`, `secretvm-verify`, `dk-tee-attestation` and `cvm-attest` read quotes and reports but no certificate
extension; `@tinfoilsh/verifier` reads SEV-SNP documents; `confido-atls` could not be installed; librats, rats-rs and
attested-tls are in none of the three.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from attestation.ratls import EXTENSION_OID, Leaf, decode_extension, encode_extension
from attestation.tdx import rtmr3_items
from enclave.boot_steps import seal
from enclave.clock import Clock
from enclave.identity import Identity
from enclave.issuer import Issuer
from enclave.keys import KeyRing
from enclave.producer import Producer
from tests.enclave.machine import surroundings
from tests.interop.service import PEERS, missing

SECONDS = 60.0


def issued(folder: Path) -> Identity:
    """A certificate of the production issuer, in this process: its TLS context can then be served under TNG's ALPN."""
    with surroundings(folder) as around:
        settings = around.settings
        issuer = Issuer(settings, around.policy, KeyRing(), Producer(around.tdx, None), Clock())
        items = rtmr3_items(around.made.release, settings.digest, [(m.id, m.weights) for m in settings.models])
        issuer.event_log, issuer.release_digest = seal(around.tdx, items), around.made.release
        return asyncio.run(issuer.issue())


def other(content: bytes | None, *, signer: ec.EllipticCurvePrivateKey | None = None) -> SSL.Context:
    """A server whose certificate has *content* in the extension (None: no extension), signed by *signer* or itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1 << 70, now - datetime.timedelta(minutes=1), now + datetime.timedelta(hours=1)
    )
    if content is not None:
        oid = x509.ObjectIdentifier(EXTENSION_OID)
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, content), critical=False)
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_privatekey(key)
    context.use_certificate(builder.sign(signer or key, hashes.SHA256()))
    return context


@contextmanager
def serving(context: SSL.Context) -> Iterator[int]:
    """A TLS server on loopback that finishes handshakes, speaks any ALPN and drops what it is sent; its port."""
    context.set_alpn_select_callback(lambda connection, offered: offered[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                with plain:
                    tls = SSL.Connection(context, plain)
                    tls.set_accept_state()
                    try:
                        tls.do_handshake()
                        while tls.recv(65536):
                            pass
                    except (SSL.Error, OSError):
                        continue

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on: TNG does not say which one it got when it is asked for any."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def answers(folder: Path, servers: Mapping[str, SSL.Context]) -> dict[str, str]:
    """What TNG says of each server's certificate: one client process, one ingress per server."""
    with ExitStack() as stack:
        ports = {name: stack.enter_context(serving(context)) for name, context in servers.items()}
        ingress = dict(zip(servers, free_ports(len(servers)), strict=True))
        verify = {"as_addr": "http://127.0.0.1:9/", "policy_ids": ["default"], "trusted_certs_paths": [trusted(folder)]}
        entries = [
            {"mapping": {"in": _at(ingress[name]), "out": _at(ports[name])}, "rats_tls": {}, "verify": verify}
            for name in servers
        ]
        log = folder / "tng.log"
        with log.open("wb") as out:
            process = stack.enter_context(
                subprocess.Popen(
                    [PEERS / "tng", "launch", "--config-content", json.dumps({"add_ingress": entries})],
                    stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                    env={"RUST_LOG": "info", "HOME": str(folder), "PATH": "/usr/bin:/bin", "NO_COLOR": "1"},
                )
            )  # fmt: skip
            stack.callback(process.terminate)
            said = Log(log, process)
            said.wait(r"All services are ready")
            for name, port in ingress.items():
                with socket.create_connection(("127.0.0.1", port), 10) as client:
                    client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                    said.wait(_verdict(ports[name]))
        return {name: said.wait(_verdict(port))[1].strip() for name, port in ports.items()}


def _at(port: int) -> dict[str, str | int]:
    return {"host": "127.0.0.1", "port": port}


def _verdict(port: int) -> str:
    """The causes under TNG's error line for the server at *port*."""
    return rf"Failed to connect to upstream 127\.0\.0\.1:{port} via trusted tunnel\s+Caused by:\n((?: {{4}}.*\n)+)"


@dataclass(frozen=True)
class Log:
    path: Path
    process: subprocess.Popen[bytes]

    def wait(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + SECONDS
        while (found := re.search(pattern, text := self.path.read_text(errors="replace"))) is None:
            assert time.monotonic() < deadline and self.process.poll() is None, text[-3000:]
            time.sleep(0.02)
        return found


def trusted(folder: Path) -> str:
    """TNG wants an anchor for the tokens of its attestation service; it never gets as far as needing it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "unused")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
    path = folder / "anchor.pem"
    path.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return str(path)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("r")
    identity = issued(folder)
    carried = Leaf.parse(identity.leaf).extension
    content = encode_extension(carried.quote, carried.claims, None)
    assert decode_extension(content) == carried
    pair = [carried.quote, carried.claims]
    return answers(
        folder,
        {
            "ours": identity.context,
            "the same evidence in another certificate": other(content),
            "signed by another key": other(content, signer=ec.generate_private_key(ec.SECP256R1())),
            "no extension": other(None),
            "another tag": other(cbor2.dumps(cbor2.CBORTag(60001, pair))),
            "three parts": other(cbor2.dumps(cbor2.CBORTag(60000, [*pair, b""]))),
            "no tag": other(cbor2.dumps(pair)),
            "cut short": other(content[:-1]),
            "with a GPU": other(encode_extension(carried.quote, carried.claims, b"evidence")),
        },
    )


NO_VERIFIER = "Failed to parse evidence from DICE cert (cbor_tag={tag:#x})"
SAID = {
    "ours": NO_VERIFIER.format(tag=60000),
    "the same evidence in another certificate": NO_VERIFIER.format(tag=60000),
    "signed by another key": "CertVerifySignatureFailed",
    "no extension": "CertExtractExtensionFailed",
    "another tag": NO_VERIFIER.format(tag=60001),
    "three parts": "expected an array with length 2",
    "no tag": "invalid type: sequence, expected tag",
    "cut short": "UnexpectedEof",
    "with a GPU": "invalid type: map, expected tag",
}


@pytest.mark.parametrize("name", SAID)
def test_peer_reads_the_certificate_as_far_as_it_is_made_to(told: Mapping[str, str], name: str) -> None:
    """`ours` is read through signature, extension, tag and pair; each other case stops at the step that it breaks. The
    CMW collection with a GPU is a form of ours that a CCC reader refuses, instead of reading half of it."""
    assert SAID[name] in told[name]
