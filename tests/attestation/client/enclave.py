"""A genuine enclave's face to the network, for tests of clients: real evidence, real channel proofs, real receipts.

The evidence is `tests.genuine`'s, signed by the development TEE; the TLS end is `Server`, which counts application
bytes. What a relay or a broken enclave would do instead is one argument or one route away.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from cryptography import x509

from attestation.channel import CHANNEL_PATH, EVIDENCE_PATH, ChannelProof
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from attestation.keyset import keyset_digest
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
from tests.attestation.client.ratls_server import Connection, Server, answer, chunked
from tests.genuine import NAME, Genuine, genuine, leaf_key, receipt_key

FETCH = f"GET {EVIDENCE_PATH}"
PROVE = f"POST {CHANNEL_PATH}"
CHAT = "POST /v1/chat/completions"
LABEL = b"EXPORTER-vouchsafe-conn-v1"
DONE = b"data: [DONE]\n\n"


def served(story: Genuine, **server: Any) -> Server:
    """*story*'s certificate, evidence and channel proofs."""
    running = Server(**server)
    show(running, story)
    return running


def show(running: Server, story: Genuine) -> None:
    """Let *running* be *story* from now on."""
    shown = story.story.certificate_key
    key = story.key if shown is None else leaf_key(shown)
    running.use(x509.load_der_x509_certificate(story.evidence.leaf), key)
    running.routes[FETCH] = answer(story.bundle())
    running.routes[PROVE] = lambda connection, body: prove(story, connection, body)


def prove(story: Genuine, connection: Connection, body: bytes, **lies: Any) -> bytes:
    request = json.loads(body)
    nonce = base64.urlsafe_b64decode(request["nonce"] + "=")
    exporter = connection.exporter(LABEL, nonce)
    told: dict[str, Any] = {"gpu": request["gpu"], "binding_": request["binding"], **lies}
    return answer(proof_json(story.channel(nonce=nonce, exporter=exporter, **told)))


def proof_json(proof: ChannelProof) -> bytes:
    return json.dumps(
        {
            "quote": base64.b64encode(proof.quote).decode(),
            "path": [{"side": s, "hash": base64.b64encode(h).decode()} for s, h in proof.path],
            "gpu": None if proof.gpu is None else base64.b64encode(proof.gpu).decode(),
            "binding": proof.binding,
        }
    ).encode()


def session_for(running: Server, story: Genuine, *, warm: bool = True, **changes: Any) -> AttestedSession:
    """A client of *running* that asks for what *story*'s client asks for; *warm*: it has the bundle already."""
    changes = {"clock": lambda: story.now, "seconds": 5.0, **changes}
    target = Target(changes.pop("name", NAME), 443, running.address)
    session = AttestedSession(target, changes.pop("policy", story.policy), **changes)
    if warm:
        from attestation.bundle import Bundle

        session.offer(Bundle(story.evidence, story.endorsements))
    return session


@dataclasses.dataclass
class Chat:
    """A chat route that answers with *words* and a receipt, honest unless a function says otherwise.

    edit_document   of the receipt before it is signed;  edit_sealed   of the receipt's bytes
    edit_stream     of the whole stream as sent;  inline   whether the receipt comes in band
    """

    story: Genuine
    words: Sequence[str] = ("The host ", "sees nothing.")
    edit_document: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document
    edit_sealed: Callable[[bytes], bytes] = lambda sealed: sealed
    edit_stream: Callable[[list[bytes]], list[bytes]] = lambda events: events
    inline: bool = True
    key: int = 0
    answered: int = 0

    def install(self, running: Server) -> Chat:
        running.routes[CHAT] = self
        return self

    def __call__(self, connection: Connection, body: bytes) -> bytes:
        self.answered += 1
        name = f"rcpt-{self.answered}"
        if json.loads(body).get("stream"):
            return self._streamed(name, body)
        reply = json.dumps(
            self._completion("chat.completion", message={"role": "assistant", "content": "".join(self.words)})
        )
        sealed = self._seal(name, body, reply.encode(), None)
        connection.server.routes[f"GET /v1/aci/receipts/{name}"] = answer(sealed)
        return answer(reply.encode(), headers=f"x-receipt-id: {name}\r\n")

    def _streamed(self, name: str, body: bytes) -> bytes:
        events = [
            b"data: " + json.dumps(self._completion("chat.completion.chunk", delta={"content": w})).encode() + b"\n\n"
            for w in self.words
        ]
        chain = StreamChain(name, hashlib.sha256(body).digest())
        for event in events:
            chain.update(event)
        events += [chain_comment(name, chain.head), DONE]
        chain.update(events[-2])
        chain.update(events[-1])
        sealed = self._seal(name, body, b"".join(events), chain)
        if self.inline:
            events.append(inline_comment(sealed))
        return chunked(*self.edit_stream(events), headers=f"x-receipt-id: {name}\r\n")

    def _seal(self, name: str, body: bytes, reply: bytes, chain: StreamChain | None) -> bytes:
        received, returned = hashlib.sha256(body).digest(), hashlib.sha256(reply).digest()
        events = [request_received(received), request_forwarded(received), response_returned(returned)]
        if chain is not None:
            events += [stream_chain_event(chain), outcome_event("completed")]
        document = self.edit_document(
            receipt_document(
                receipt_id=name, chat_id="chatcmpl-1", model="parrot",
                keyset_digest=keyset_digest(self.story.evidence.keyset), endpoint="/v1/chat/completions", method="POST",
                served_at=self.story.now, event_log=events, key_id=self._key_id(),
            )
        )  # fmt: skip
        return self.edit_sealed(seal(document, receipt_key(self.key).sign(signing_input(document))))

    def _key_id(self) -> str:
        return str(json.loads(self.story.evidence.keyset)["receipt_signing_keys"][0]["key_id"])

    @staticmethod
    def _completion(kind: str, **choice: Any) -> dict[str, Any]:
        choices = [{"index": 0, "finish_reason": None, **choice}]
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "parrot", "choices": choices}


__all__ = ["CHAT", "FETCH", "PROVE", "Chat", "genuine", "proof_json", "prove", "served", "session_for", "show"]
