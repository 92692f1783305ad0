"""Where mutation starts: honest bytes of every format, made at run time by the development TEE; real ones where the
shared vectors are at hand."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import cache

from attestation.dsse import Envelope
from attestation.keyset import keyset_digest
from attestation.ratls import Leaf, encode_extension
from attestation.receipt import (
    outcome_event,
    receipt_document,
    request_forwarded,
    request_received,
    response_returned,
    seal,
    signing_input,
    stream_chain_event,
)
from attestation.sse import StreamChain, chain_comment, inline_comment
from attestation.tdx import append_records
from tests.devtee.eventlog import ccel_log
from tests.devtee.tdx import QuoteForm
from tests.genuine import EXPORTER, NONCE, Genuine, genuine, receipt_key
from tests.host.hellos import SUPPORTED_VERSIONS, alpn, body, server_name, vector
from tests.vectors import VECTORS

__all__ = ["REQUEST", "honest"]

REQUEST = b'{"model":"parrot","messages":[{"role":"user","content":"hi"}],"stream":true}'
MAX_REAL = 16


@cache
def honest() -> Genuine:
    """One enclave with two GPUs."""
    return genuine(gpus=(0, 1))


def _real(pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(VECTORS.glob(pattern))[:MAX_REAL]]


def cbor() -> list[bytes]:
    return [b"\xa0", b"\x80", b"\xa1\x61a\x01", honest().claims.encode(), *extensions()]


def claims() -> list[bytes]:
    plain = genuine(gpus=(), statement=None)
    return [honest().claims.encode(), plain.claims.encode()]


def leaves() -> list[bytes]:
    return [honest().evidence.leaf]


def extensions() -> list[bytes]:
    leaf = Leaf.parse(honest().evidence.leaf).extension
    return [encode_extension(leaf.quote, leaf.claims, gpu) for gpu in (leaf.gpu, None)]


def quotes() -> list[bytes]:
    tee = honest().tee
    forms = [QuoteForm(), QuoteForm(version=5, body="1.0"), QuoteForm(version=5, body="1.5")]
    return [*(tee.quote(bytes(64), form=form) for form in forms), *_real("tdx/*/quote.bin")]


def collaterals() -> list[bytes]:
    return [honest().endorsements.collateral, *_real("tdx/*/collateral.json")[:4]]


def ccels() -> list[bytes]:
    bare = ccel_log(honest().tee.events)
    item = b"an item"
    return [bare, append_records(bare, [(4, 6, hashlib.sha384(item).digest(), item)]), *_real("tdx/*/ccel.bin")]


def dstack_logs() -> list[bytes]:
    digest = hashlib.sha384(b"payload").hexdigest()
    event = {"imr": 3, "event_type": 134217729, "digest": digest, "event": "app-id", "event_payload": "00ff"}
    return [b"[]", json.dumps([event, event]).encode(), *_real("tdx/*/eventlog.json")]


def reports() -> list[bytes]:
    return [honest().tee.gpu_report(NONCE, 0)[0], *_real_reports()]


def _real_reports() -> list[bytes]:
    found = {}
    for name in ("evidence", "switches"):
        for text in _real(f"gpu/*/{name}.json"):
            for entry in json.loads(text):
                raw = base64.b64decode(entry["evidence"])
                found[len(raw)] = raw
    return list(found.values())[:MAX_REAL]


def carried() -> list[bytes]:
    gpu = Leaf.parse(honest().evidence.leaf).extension.gpu
    assert gpu is not None
    return [gpu]


def nvidia_json() -> list[bytes]:
    return [json.dumps(honest().tee.gpu_evidence(NONCE, [0, 1])).encode(), b"[]"]


def certificates() -> list[bytes]:
    return [honest().tee.pki[role].der for role in ("device-ak-0", "device-ik-0", "device-ica", "rim-driver-l4")]


def pem_chains() -> list[bytes]:
    return [honest().tee.pki.device_chain(0)]


def rims() -> list[bytes]:
    return [*honest().endorsements.rims.values(), *_real("gpu/*/rims/*.xml")[:4]]


def ocsp() -> list[bytes]:
    return [*honest().endorsements.ocsp.values(), *_real("gpu/*/ocsp/*.der")]


def bundles() -> list[bytes]:
    return [genuine(gpus=()).bundle(), honest().bundle()]


def answers() -> list[bytes]:
    found = []
    for gpu, others in ((False, 0), (True, 3)):
        proof = honest().channel(nonce=NONCE, exporter=EXPORTER, gpu=gpu, others=others)
        path = [{"side": side, "hash": base64.b64encode(step).decode()} for side, step in proof.path]
        carried = None if proof.gpu is None else base64.b64encode(proof.gpu).decode()
        quote = base64.b64encode(proof.quote).decode()
        found.append(json.dumps({"quote": quote, "path": path, "gpu": carried, "binding": "exporter"}).encode())
    return found


def envelopes() -> list[bytes]:
    evidence = honest().evidence
    return [evidence.release, evidence.deployment or b"", evidence.status or b""]


def _payload(envelope: bytes | None) -> list[bytes]:
    return [Envelope.parse(envelope or b"").payload]


def releases() -> list[bytes]:
    return _payload(honest().evidence.release)


def deployments() -> list[bytes]:
    return _payload(honest().evidence.deployment)


def status_lists() -> list[bytes]:
    return _payload(honest().evidence.status)


def policies() -> list[bytes]:
    return [honest().policy_text.encode(), genuine(gpus=()).policy_text.encode()]


def keysets() -> list[bytes]:
    return [honest().evidence.keyset]


def streams() -> list[bytes]:
    words = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % n for n in range(4)]
    last = [chain_comment("rcpt-1", bytes(32)), b"data: [DONE]\n\n", inline_comment(b"{}")]
    return [b"".join([*words, *last]), b": ping\r\n\r\ndata: a\n\r\n", b"data: half"]


def receipts() -> list[bytes]:
    chain = StreamChain("rcpt-1", hashlib.sha256(REQUEST).digest())
    for event in streams()[0].split(b"\n\n")[:5]:
        chain.update(event + b"\n\n")
    returned = hashlib.sha256(streams()[0]).digest()
    asked = hashlib.sha256(REQUEST).digest()
    plain = [request_received(asked), request_forwarded(asked), response_returned(returned)]
    logs = [plain, [*plain, stream_chain_event(chain), outcome_event("completed")], [plain[0], plain[2]]]
    return [_sealed(log) for log in logs]


def _sealed(log: list[dict[str, object]]) -> bytes:
    document = receipt_document(
        receipt_id="rcpt-1", chat_id="chatcmpl-1", model="parrot",
        keyset_digest=keyset_digest(honest().evidence.keyset), endpoint="/v1/chat/completions", method="POST",
        served_at=honest().now, event_log=log, key_id="receipt-1",
    )  # fmt: skip
    return seal(document, receipt_key().sign(signing_input(document)))


def hellos() -> list[bytes]:
    found = []
    for extensions in (server_name(b"demo.vouchsafe.test") + alpn(b"http/1.1") + SUPPORTED_VERSIONS, b"", None):
        message = b"\x01" + vector(3, body(extensions))
        found.append(b"\x16\x03\x01" + vector(2, message))
        found.append(b"".join(b"\x16\x03\x01" + vector(2, message[i : i + 30]) for i in range(0, len(message), 30)))
    return found


def http_answers() -> list[bytes]:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    return [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", chunked, b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\n\r\n"]


Seeds = Callable[[], list[bytes]]
