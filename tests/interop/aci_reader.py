"""A second, minimal reader of `aci/1` attestation reports and receipts, written from the published construction.

Not a test: a program of its own in `.venv-peers`, with JCS (RFC 8785) by `tallipoika` and Ed25519 by PyNaCl; it
imports nothing of ours and shares no line with `attestation/receipt.py`. Standard input is a JSON list of questions,
standard output the list of answers:

    {"report": text}                                     → the digest of its keyset, in both ways of naming it
    {"statement": [keyset digest, nonce or null]}        → the report_data of that statement (hex)
    {"receipt": text, "keyset": text, "request": base64, "response": base64}   → each step: true, false
    {"seeds": [Ed25519 seed, X25519 seed], "tls": [spki hex, domain], "document": receipt without digest}  → vectors
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from typing import Any

from nacl.bindings import crypto_scalarmult_base
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey
from tallipoika.api import canonicalize

RESERVED = ("request.received", "request.forwarded", "upstream.verified", "response.returned")


def digest(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def statement(keyset_digest: str, nonce: str | None) -> str:
    """REPORTDATA's first half: SHA-256 of the compact statement, members in this order."""
    quoted = "null" if nonce is None else f'"{nonce}"'
    text = f'{{"keyset_digest":"{keyset_digest}","nonce":{quoted},"purpose":"aci.report_data.v1"}}'
    return hashlib.sha256(text.encode()).hexdigest()


def report(text: str) -> dict[str, Any]:
    document = json.loads(text)
    return {
        "stated": document["workload_keyset_digest"],
        "computed": digest(canonicalize(document["attestation"]["workload_keyset"])),
    }


def receipt(question: dict[str, str]) -> dict[str, bool]:
    document, keyset = json.loads(question["receipt"]), json.loads(question["keyset"])
    request, response = (base64.b64decode(question[part]) for part in ("request", "response"))
    events = document["event_log"]
    named = {e["type"]: e.get("body_hash") for e in events}
    places = [RESERVED.index(e["type"]) for e in events if e["type"] in RESERVED]
    chain = next((e for e in events if e["type"] == "x.stream.chain"), None)
    covered = response if chain is None else response[: chain["bytes"]]
    after = response[len(covered) :]
    return {
        "signature": signed(document, keyset),
        "keyset": document["workload_keyset_digest"] == digest(canonicalize(keyset))
        and document["served_at"] <= keyset["not_after"],
        "request": named.get("request.received") == digest(request),
        "response": named.get("response.returned") == digest(covered)
        and (not after or (after.startswith(b": vouchsafe-receipt ") and after.find(b"\n\n") == len(after) - 2)),
        "order": events[0]["type"] == RESERVED[0]
        and places == sorted(set(places))
        and RESERVED[3] in named
        and (chain is None or RESERVED[1] in named),
        "chain": chain is None or chained(document["receipt_id"], request, covered, chain),
    }


def signed(document: dict[str, Any], keyset: dict[str, Any]) -> bool:
    """The keyset's entry of that id decides key and algorithm."""
    keys = {k["key_id"]: k["public_key"] for k in keyset["receipt_signing_keys"] if k["algo"] == "ed25519"}
    message = canonicalize({name: value for name, value in document.items() if name != "signature"})
    try:
        VerifyKey(bytes.fromhex(keys[document["key_id"]])).verify(message, bytes.fromhex(document["signature"]))
    except (KeyError, ValueError, BadSignatureError):
        return False
    return True


def chained(receipt_id: str, request: bytes, body: bytes, chain: dict[str, Any]) -> bool:
    name = receipt_id.encode()
    start = b"vouchsafe/sse-chain/v1\0" + len(name).to_bytes(4, "big") + name + hashlib.sha256(request).digest()
    head, marks = hashlib.sha256(start).digest(), []
    parts = body.split(b"\n\n")
    for number, part in enumerate(parts[:-1], 1):
        event = part + b"\n\n"
        head = hashlib.sha256(head + len(event).to_bytes(4, "big") + event).digest()
        if number in (1, 2, 4, 8, 16, 32) or number % 64 == 0:
            marks.append("sha256:" + head.hex())
    return (parts[-1], len(parts) - 1, marks, "sha256:" + head.hex()) == (
        b"", chain["events"], chain["marks"], chain["final"],
    )  # fmt: skip


def vectors(question: dict[str, Any]) -> dict[str, Any]:
    """The published construction from its seeds: keyset, its digest, signing input, signature."""
    signer, e2ee = SigningKey(bytes.fromhex(question["seeds"][0])), bytes.fromhex(question["seeds"][1])
    spki, domain = question["tls"]
    algorithm = "x25519-aes-256-gcm-hkdf-sha256"
    keyset = {
        "subject": question["subject"],
        "not_after": question["not_after"],
        "receipt_signing_keys": [
            {"key_id": "receipt-1", "algo": "ed25519", "public_key": signer.verify_key.encode().hex()}
        ],
        "e2ee_public_keys": [
            {"key_id": "e2ee-1", "algo": algorithm, "public_key": crypto_scalarmult_base(e2ee).hex()}
        ],
        "tls_public_keys": [{"spki_sha256": spki, "domain": domain}],
    }  # fmt: skip
    keyset_digest = digest(canonicalize(keyset))
    document = question["document"] | {"workload_keyset_digest": keyset_digest}
    message = canonicalize(document)
    return {
        "keyset": keyset,
        "keyset_digest": keyset_digest,
        "signing_input": message.decode(),
        "signature": signer.sign(message).signature.hex(),
    }


def answer(question: dict[str, Any]) -> Any:
    if "report" in question:
        return report(question["report"])
    if "statement" in question:
        return statement(*question["statement"])
    if "seeds" in question:
        return vectors(question)
    return receipt(question)


if __name__ == "__main__":
    json.dump([answer(question) for question in json.load(sys.stdin)], sys.stdout)
