"""A served identity without a machine behind it, and a TLS client that says what it sees. For tests of the channel.

The leaf is real (own key, real claims), the quote inside is not: what verifies evidence is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from OpenSSL import SSL

from attestation import binding
from attestation.binding import EXPORTER_LABEL
from attestation.claims import Claims, ModelClaim
from attestation.keyset import keyset_digest, keyset_document
from attestation.strict_json import jcs
from enclave.identity import Identity
from enclave.keys import CertificateKey, ReceiptKey
from enclave.server import bind, make_server
from enclave.settings import Listen
from enclave.tls import Endpoint, TlsLimits, server_context

NAME = "demo.vouchsafe.test"


def make_claims(spki: bytes, *, lifetime: int = 3600, keyset: bytes = bytes(32), now: int | None = None) -> Claims:
    start = int(time.time()) if now is None else now
    return Claims(
        key_hash=binding.key_hash(spki), not_before=start, not_after=start + lifetime, dns_names=(NAME,),
        boot_id=bytes(16), release=bytes(32), deployment=None, config=bytes(32), event_log=bytes(48), gpu=None,
        gpu_nonce=None, gpu_state=None, keyset=keyset, role="both",
        models=(ModelClaim("parrot", "sha256:" + "0" * 64),),
    )  # fmt: skip


def make_identity(*, lifetime: int = 3600, now: int | None = None) -> Identity:
    key, signer = CertificateKey(), ReceiptKey(0)
    spki_sha256 = hashlib.sha256(key.spki).digest()
    keyset = jcs(
        keyset_document(None, int(time.time()) + lifetime + 600, signer.key_id, signer.public, spki_sha256, NAME)
    )
    claims = make_claims(key.spki, lifetime=lifetime, keyset=hashlib.sha256(keyset).digest(), now=now)
    leaf, context = key.leaf(claims, b"no quote", None), server_context()
    key.install(context, leaf)
    return Identity(
        leaf=leaf, claims=claims, claims_bytes=claims.encode(), key_hash=claims.key_hash, keyset=keyset,
        keyset_digest=keyset_digest(keyset), not_before=claims.not_before, not_after=claims.not_after,
        event_log=b"log", provenance={"repo_commit": "0"}, evidence_bundle=b"bundle of " + claims.key_hash,
        receipt_signer=signer, context=context,
    )  # fmt: skip


@dataclass
class Served:
    """A running server: where it listens, and what it shares."""

    path: Path
    endpoint: Endpoint
    server: Any
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], Any]) -> Any:
        """Run *function* in the server's loop."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)


@contextlib.contextmanager
def serving(
    app: Any, folder: Path, current: Callable[[], Identity], *, limits: TlsLimits | None = None, drain_s: int = 1,
    now: Callable[[], int] = lambda: int(time.time()), uvloop: bool = False, leaf_drain_s: int = 600,
) -> Iterator[Served]:  # fmt: skip
    """Serve *app* on a UNIX socket in *folder*, in a thread of its own."""
    failures: list[int] = []
    endpoint = Endpoint(current, now, limits=limits, drain_s=leaf_drain_s, failed=lambda: failures.append(1))
    endpoint.failures = failures  # type: ignore[attr-defined]  # for assertions
    server = make_server(app, endpoint, drain_s=drain_s)
    private = folder / "sock"
    private.mkdir(mode=0o700, exist_ok=True)
    sock = bind(Listen("unix", path=private / "enclave.sock"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[sock])

    def run() -> None:
        factory = None
        if uvloop:
            import uvloop as fast

            factory = fast.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(private / "enclave.sock", endpoint, server, loops[0])
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"


def wait_until(holds: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def client_context() -> SSL.Context:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_NONE)
    return context


class Client:
    """A blocking TLS client over a UNIX socket."""

    def __init__(
        self, path: Path, *, context: SSL.Context | None = None, name: str | None = NAME,
        alpn: list[bytes] | None = None, session: Any = None, handshake: bool = True,
    ) -> None:  # fmt: skip
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self.tls = SSL.Connection(context or client_context(), self.sock)
        if name is not None:
            self.tls.set_tlsext_host_name(name.encode())
        if alpn is not None:
            self.tls.set_alpn_protos(alpn)
        if session is not None:
            self.tls.set_session(session)
        self.tls.set_connect_state()
        if handshake:
            self.tls.do_handshake()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def leaf(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        certificate = self.tls.get_peer_certificate(as_cryptography=True)
        assert certificate is not None
        return certificate.public_bytes(Encoding.DER)

    def exporter(self, nonce: bytes) -> bytes:
        return self.tls.export_keying_material(EXPORTER_LABEL, 32, nonce)

    def send(self, data: bytes) -> None:
        self.tls.sendall(data)

    def get(self, path: str = "/", *, method: str = "GET", body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        length = f"content-length: {len(body)}\r\n" if body or method == "POST" else ""
        self.send(f"{method} {path} HTTP/1.1\r\nhost: {NAME}\r\n{length}{headers}\r\n".encode() + body)
        return self.answer()

    def answer(self) -> tuple[int, bytes]:
        """Status and body of one answer with a content-length; its header in `self.header`."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.tls.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        self.header = head.lower()
        length = next(int(h.split(b":")[1]) for h in self.header.split(b"\r\n") if h.startswith(b"content-length"))
        while len(body) < length:
            body += self.tls.recv(65536)
        return int(head.split(b" ")[1]), body

    def read_all(self) -> tuple[bytes, str]:
        """Everything until the end, and how it ended: `notify` (close_notify) or `cut`."""
        data = b""
        while True:
            try:
                data += self.tls.recv(65536)
            except SSL.ZeroReturnError:
                return data, "notify"
            except (SSL.SysCallError, SSL.Error, ConnectionResetError):
                return data, "cut"


async def plain(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


__all__ = [
    "NAME", "Client", "Served", "client_context", "make_claims", "make_identity", "open_files", "plain", "replace",
    "serving", "wait_until",
]  # fmt: skip
