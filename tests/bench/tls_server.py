"""One of two HTTPS servers that differ in their TLS alone, for a benchmark of handshakes.

    python -m tests.bench.tls_server enclave|stdlib LEAF

Both are uvicorn on the same event loop with the same application and a certificate like LEAF (DER), evidence and all,
under a key of their own. `enclave` ends TLS as the enclave does (`enclave.tls`), `stdlib` as uvicorn does by itself.
Prints `ready PORT` and serves until it is killed.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from attestation import binding
from attestation.claims import Claims
from attestation.ratls import Leaf, build_leaf
from enclave.boot import _loop_factory
from enclave.identity import Identity
from enclave.keys import CertificateKey, ReceiptKey
from enclave.server import bind, make_server
from enclave.settings import Listen
from enclave.tls import Endpoint, server_context
from tests.enclave.support import plain


async def app(scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI
    await plain(send, 200, b"ok")


def ours(like: Leaf) -> uvicorn.Server:
    key = CertificateKey()
    claims = replace(Claims.decode(like.extension.claims), key_hash=binding.key_hash(key.spki))
    leaf, context = key.leaf(claims, like.extension.quote, like.extension.gpu), server_context()
    key.install(context, leaf)
    identity = Identity(
        leaf=leaf, claims=claims, claims_bytes=claims.encode(), key_hash=claims.key_hash, keyset=b"", keyset_digest="",
        not_before=claims.not_before, not_after=claims.not_after, event_log=b"", provenance={}, evidence_bundle=b"",
        receipt_signer=ReceiptKey(0), context=context,
    )  # fmt: skip
    return make_server(app, Endpoint(lambda: identity, lambda: int(time.time())), drain_s=1)


def theirs(like: Leaf, folder: Path) -> uvicorn.Server:
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    claims = replace(Claims.decode(like.extension.claims), key_hash=binding.key_hash(spki))
    leaf = build_leaf(key, claims, like.extension.quote, like.extension.gpu)
    (folder / "leaf.pem").write_bytes(x509.load_der_x509_certificate(leaf).public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return uvicorn.Server(
        uvicorn.Config(
            app, ssl_certfile=folder / "leaf.pem", ssl_keyfile=folder / "key.pem", http="httptools", ws="none",
            lifespan="off", interface="asgi3", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=60,
        )
    )  # fmt: skip


def main() -> None:
    kind, file = sys.argv[1], Path(sys.argv[2])
    like = Leaf.parse(file.read_bytes())
    with tempfile.TemporaryDirectory(prefix="vouchsafe-bench-") as folder:
        server = ours(like) if kind == "enclave" else theirs(like, Path(folder))
        sock: socket.socket = bind(Listen("tcp", host="127.0.0.1"))
        print("ready", sock.getsockname()[1], flush=True)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(server.serve(sockets=[sock]))


if __name__ == "__main__":
    main()
