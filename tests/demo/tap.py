"""What somebody on the host can record. A process of the demo and the tests; the relay has no such option.

    python -m tests.demo.tap carry     --to 127.0.0.1:P --record FILE
    python -m tests.demo.tap terminate --to 127.0.0.1:P --record FILE --name NAME [--mimic]

`carry` sits in front of the relay and writes down every byte that passes, both ways: what the host can see.
`terminate` is the attack: it ends TLS with a key of its own, talks to the relay as an unverifying client, and writes
down the plain bytes. With `--mimic` its certificate carries the genuine enclave's evidence, copied. It prints
`tap: listening on HOST:PORT`. Ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import select
import signal
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

MAX_RECORD = 64 * 1024 * 1024


class Record:
    """Bytes as they passed, one file, bounded."""

    def __init__(self, path: Path) -> None:
        self._file, self._left, self._lock = path.open("wb"), MAX_RECORD, threading.Lock()

    def write(self, data: bytes) -> None:
        with self._lock:
            self._file.write(data[: max(self._left, 0)])
            self._left -= len(data)
            self._file.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tap")
    parser.add_argument("mode", choices=["carry", "terminate"])
    parser.add_argument("--to", required=True)
    parser.add_argument("--record", required=True, type=Path)
    parser.add_argument("--name", default="localhost")
    parser.add_argument("--mimic", action="store_true")
    o = parser.parse_args(argv)
    host, _, port = o.to.rpartition(":")
    onward = (host, int(port))
    record = Record(o.record)
    wrap = terminating(onward, o.name, mimic=o.mimic) if o.mode == "terminate" else None
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(f"tap: listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, onward, record, wrap), daemon=True).start()


Wrap = Callable[[socket.socket, socket.socket], tuple[socket.socket, socket.socket]]


def serve(near: socket.socket, onward: tuple[str, int], record: Record, wrap: Wrap | None) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(near)
        try:
            far = stack.enter_context(socket.create_connection(onward, timeout=10))
            far.settimeout(None)
            if wrap:
                near, far = wrap(near, far)
                stack.enter_context(near)
                stack.enter_context(far)
        except OSError as err:  # a verifying client hangs up in the handshake: that is the point
            print(f"tap: no connection: {type(err).__name__}", file=sys.stderr, flush=True)
            return
        if isinstance(near, ssl.SSLSocket) and isinstance(far, ssl.SSLSocket):
            turn_by_turn(near, far, record)
            return
        up = threading.Thread(target=copy, args=(near, far, record), daemon=True)
        up.start()
        copy(far, near, record)
        up.join(5)


def copy(source: socket.socket, target: socket.socket, record: Record) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(65536):
            record.write(data)
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def turn_by_turn(near: ssl.SSLSocket, far: ssl.SSLSocket, record: Record) -> None:
    """Both directions in one thread: OpenSSL lets no two threads use one connection, even to read and to write."""
    other = {near: far, far: near}
    with contextlib.suppress(OSError, ValueError):
        while True:
            ready = [end for end in other if end.pending()] or select.select(list(other), [], [])[0]
            for end in ready:
                end.setblocking(False)
                try:
                    data = end.recv(65536)
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):  # part of a record, or no data of the user's
                    continue
                finally:
                    end.setblocking(True)
                if not data:
                    return
                record.write(data)
                other[end].sendall(data)


def terminating(onward: tuple[str, int], name: str, *, mimic: bool) -> Wrap:
    """A wrap that ends TLS here and opens it again towards the relay, verifying nothing."""
    careless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    careless.check_hostname, careless.verify_mode = False, ssl.CERT_NONE
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(forged(onward, name, careless, mimic=mimic))
        file.flush()
        server.load_cert_chain(file.name)

    def wrap(near: socket.socket, far: socket.socket) -> tuple[socket.socket, socket.socket]:
        return server.wrap_socket(near, server_side=True), careless.wrap_socket(far, server_hostname=name)

    return wrap


def forged(onward: tuple[str, int], name: str, careless: ssl.SSLContext, *, mimic: bool) -> bytes:
    """Key and certificate (PEM) of the attacker; with *mimic*, times, names and evidence of the genuine one."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start, end = now, now + datetime.timedelta(minutes=50)
    evidence = None
    if mimic:
        with (
            socket.create_connection(onward, timeout=10) as raw,
            careless.wrap_socket(raw, server_hostname=name) as tls,
        ):
            genuine = x509.load_der_x509_certificate(tls.getpeercert(True) or b"")
        start, end, subject = genuine.not_valid_before_utc, genuine.not_valid_after_utc, genuine.subject
        evidence = genuine.extensions.get_extension_for_oid(x509.ObjectIdentifier("2.23.133.5.4.9")).value
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), start, end)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
    )
    if evidence is not None:
        builder = builder.add_extension(evidence, critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)


if __name__ == "__main__":
    raise SystemExit(main())
