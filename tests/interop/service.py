"""What a real enclave serves, recorded once for implementations that nobody here wrote.

The whole boot runs in a process of its own on the development TEE: production issuer, production attesters, the echo
engine in place of vLLM. The certificate is fetched by the `openssl` command line, everything else by Python's own
`ssl` and `http.client`: no client of ours has a part in it. Nothing is believed here; the tests are the judges.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.demo.provision import Provisioned, provision
from tests.devtee.running import REPOSITORY, running_machine
from tests.enclave.machine import EnclaveProcess, model_directory
from tests.enclave.support import NAME

__all__ = ["NAME", "NONCE", "PEERS", "Exchange", "Recorded", "openssl", "peer", "record"]

PEERS: Final = REPOSITORY / ".venv-peers" / "bin"
NONCE: Final = bytes(range(32)).hex()
CHAT: Final = "/v1/chat/completions"


@dataclass(frozen=True)
class Exchange:
    """One request of inference: its body, the answer's body as received, and the receipt (JSON) fetched afterwards."""

    request: bytes
    status: int
    response: bytes
    receipt: bytes


@dataclass(frozen=True)
class Recorded:
    """What one enclave served. The enclave is gone; the files in *folder* stay.

    leaf         `leaf.der` in *folder*, as OpenSSL's client received it;  handshake   what that client printed
    bundle       GET /.well-known/vouchsafe/evidence
    reports      GET /v1/aci/attestation, by nonce (None: without one)
    exchanges    by name: `plain`, `stream`, `inline`, `unknown model`, `no key`
    """

    folder: Path
    gpus: int
    made: Provisioned
    roots: Mapping[str, bytes]
    leaf: bytes
    handshake: str
    bundle: bytes
    reports: Mapping[str | None, bytes]
    exchanges: Mapping[str, Exchange]


class _Unix(http.client.HTTPSConnection):
    """HTTPS over a UNIX socket. Believes any certificate: the tests look at it afterwards."""

    def __init__(self, path: Path) -> None:
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        self._path = path
        super().__init__(NAME, timeout=30, context=self._tls)

    def connect(self) -> None:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        plain.settimeout(self.timeout)
        plain.connect(str(self._path))
        self.sock = self._tls.wrap_socket(plain, server_hostname=NAME)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        self.request(method, path, body, dict(headers or {}))
        answer = self.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()


def record(folder: Path, gpus: int) -> Recorded:
    """Boot an enclave with *gpus* GPUs, ask it everything, stop it."""
    state, path = folder / "tee", folder / "s" / "e.sock"
    with running_machine(state, "--gpus", str(max(1, gpus))):
        made = provision(
            folder / "made", state, model_directory(folder / "model"), None, "parrot", f"unix:{path}", NAME, gpus=gpus
        )
        with EnclaveProcess(made.config, state) as enclave:
            tenant = enclave.set_up(made, path)
            handshake = openssl(
                "s_client", "-unix", str(path), "-servername", NAME, "-tls1_3", "-showcerts", stdin=b"",
            ).decode()  # fmt: skip
            leaf = openssl("x509", "-outform", "DER", stdin=handshake.encode())
            wire = _Unix(path)
            try:
                bundle = _get(wire, "/.well-known/vouchsafe/evidence")
                reports = {n: _get(wire, "/v1/aci/attestation" + (f"?nonce={n}" if n else "")) for n in (None, NONCE)}
                exchanges = {name: _exchange(wire, tenant.api_key, name) for name in _REQUESTS}
            finally:
                wire.close()
    (folder / "leaf.der").write_bytes(leaf)
    roots = {name: pem.read_bytes() for name in ("intel",) for pem in [state / "roots" / f"{name}.pem"]}
    return Recorded(folder, gpus, made, roots, leaf, handshake, bundle, reports, exchanges)


_REQUESTS: Final[Mapping[str, tuple[dict[str, object], dict[str, str]]]] = {
    "plain": ({}, {}),
    "stream": ({"stream": True}, {}),
    "inline": ({"stream": True}, {"X-Vouchsafe-Receipt": "inline"}),
    "unknown model": ({"model": "another"}, {}),
    "no key": ({}, {}),
}
_WORDS: Final = " ".join(f"word{n} ünï" for n in range(80))  # more than 64 events, so that the chain has later marks


def _exchange(wire: _Unix, api_key: str, name: str) -> Exchange:
    body, more = _REQUESTS[name]
    question = {"model": "parrot", "messages": [{"role": "user", "content": _WORDS}]}
    request = json.dumps(question | body, indent=1, ensure_ascii=False).encode()
    key = {} if name == "no key" else {"authorization": f"Bearer {api_key}"}
    status, headers, response = wire.ask("POST", CHAT, request, {"content-type": "application/json"} | key | more)
    found, _, receipt = wire.ask("GET", f"/v1/aci/receipts/{headers['x-receipt-id']}", headers=key)
    assert found == 200, receipt
    return Exchange(request, status, response, receipt)


def _get(wire: _Unix, path: str) -> bytes:
    status, _, body = wire.ask("GET", path)
    assert status == 200, body[:500]
    return body


def openssl(*arguments: str, stdin: bytes | None = None, status: int = 0) -> bytes:
    """Standard output of the `openssl` command line; its exit status must be *status*."""
    done = subprocess.run(["openssl", *arguments], input=stdin, capture_output=True, timeout=60)
    assert done.returncode == status, (arguments, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout


def peer(program: Path, stdin: bytes, *arguments: str) -> bytes:
    """Standard output of a program of this folder that runs in `.venv-peers`, without our packages on its path."""
    done = subprocess.run(
        [PEERS / "python", "-I", program, *arguments], input=stdin, capture_output=True, timeout=60, cwd=program.parent
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout


def missing() -> str:
    """Why these tests cannot run here, or nothing."""
    if shutil.which("openssl") is None:
        return "there is no `openssl` command: `make system` installs it"
    if not (PEERS / "python").exists() or not os.access(PEERS / "tng", os.X_OK):
        return "the peers are not installed: run tests/interop/setup_peers.sh"
    return ""
