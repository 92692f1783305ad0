"""`aci/1` reports and receipts of a real enclave, recomputed by a second implementation (`aci_reader.py`).

It is written from the published construction alone, with another JCS and another Ed25519 than ours. Both it and our
own code must also give the published values: the numbers below are those of the draft's test vectors.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import dcap_qvl  # type: ignore[import-untyped]  # ships no types
import pytest

from attestation.binding import statement_report_data
from attestation.keyset import keyset_digest
from attestation.receipt import Receipt, signing_input, verify_receipt
from attestation.result import Checks
from attestation.strict_json import jcs
from tests.interop import diagnostic
from tests.interop.leaf import evidence, spki
from tests.interop.service import NAME, NONCE, Exchange, Recorded, peer

READER: Final = Path(__file__).with_name("aci_reader.py")
STEPS: Final = ("signature", "keyset", "request", "response", "order", "chain")
STREAMS: Final = ("stream", "inline")
SERVED: Final = ("plain", *STREAMS)
REFUSED: Final = ("unknown model", "no key")


def ask(*questions: dict[str, Any]) -> list[Any]:  # Any: JSON values
    answers = json.loads(peer(READER, json.dumps(questions).encode()))
    assert len(answers) == len(questions)
    return list(answers)


def keyset(shown: Recorded) -> bytes:
    """The keyset as the bundle carries it."""
    return bytes(diagnostic.read(shown.bundle)["keyset"])


def question(shown: Recorded, exchange: Exchange, **changes: Any) -> dict[str, Any]:
    given = {
        "receipt": exchange.receipt.decode(), "keyset": keyset(shown).decode(), "request": exchange.request,
        "response": exchange.response,
    } | changes  # fmt: skip
    return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in given.items()}


def failed(steps: dict[str, bool]) -> set[str]:
    assert tuple(steps) == STEPS
    return {name for name, good in steps.items() if not good}


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonce", [None, NONCE])
def test_report_names_the_statement_its_quote_commits_to(either: Recorded, nonce: str | None) -> None:
    text = either.reports[nonce].decode()
    attestation = json.loads(text)["attestation"]
    (named,) = ask({"report": text})
    assert named["stated"] == named["computed"]
    expected, other, unasked = ask(
        *({"statement": [named["computed"], n]} for n in (nonce, "f" * 64, None if nonce else NONCE))
    )
    quote = dcap_qvl.parse_quote(bytes.fromhex(attestation["evidence"]["quote"]))
    assert bytes(quote.report.report_data) == bytes.fromhex(expected) + bytes(32)
    assert attestation["report_data"] == expected not in (other, unasked)
    assert (json.loads(text)["api_version"], attestation["tee_type"]) == ("aci/1", "tdx")


def test_report_names_the_key_and_the_keyset_of_the_certificate(either: Recorded) -> None:
    claims = diagnostic.read(evidence(either)[1])
    for text in either.reports.values():
        attestation = json.loads(text)["attestation"]
        shown = attestation["workload_keyset"]
        assert shown == json.loads(keyset(either))
        assert shown["tls_public_keys"] == [{"spki_sha256": hashlib.sha256(spki(either)).hexdigest(), "domain": NAME}]
        assert shown["not_after"] == claims["not-after"] + 600, "the certificate's end and the drain"
        (named,) = ask({"report": text.decode()})
        assert named["computed"] == "sha256:" + claims["keyset"].hex()
        log = bytes.fromhex(attestation["evidence"]["event_log"])
        assert hashlib.sha384(log).digest() == claims["event-log"]


# --- receipts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SERVED, *REFUSED])
def test_receipt_verifies_on_every_step(tdx: Recorded, name: str) -> None:
    exchange = tdx.exchanges[name]
    (steps,) = ask(question(tdx, exchange))
    assert failed(steps) == set()
    document = json.loads(exchange.receipt)
    kinds = [event["type"] for event in document["event_log"]]
    assert ("request.forwarded" in kinds) == (name in SERVED) == (exchange.status == 200)
    assert ("x.stream.chain" in kinds) == (name in STREAMS)
    assert document["model"] == (None if name in REFUSED else "parrot"), "no text of the caller in a receipt"


def test_receipt_in_band_is_the_one_that_is_kept(tdx: Recorded) -> None:
    exchange = tdx.exchanges["inline"]
    body, _, last = exchange.response.rstrip(b"\n").rpartition(b"\n\n: vouchsafe-receipt ")
    assert body.endswith(b"data: [DONE]")
    carried = base64.urlsafe_b64decode(last + b"=" * (-len(last) % 4))
    assert json.loads(carried) == json.loads(exchange.receipt)
    (steps,) = ask(question(tdx, exchange, receipt=carried.decode()))
    assert failed(steps) == set()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def changed(document: Any, path: tuple[Any, ...]) -> str:
    edited = copy.deepcopy(document)
    *way, last = path
    spot = edited
    for key in way:
        spot = spot[key]
    old = spot[last]
    spot[last] = old + 1 if type(old) is int else "x" if not old else old[:-1] + ("0" if old[-1] != "0" else "1")
    return json.dumps(edited)


@pytest.mark.parametrize("name", ["plain", "stream", "unknown model"])
def test_no_changed_value_of_a_receipt_keeps_its_signature(tdx: Recorded, name: str) -> None:
    exchange = tdx.exchanges[name]
    document = json.loads(exchange.receipt)
    paths = list(leaves(document))
    answers = ask(*(question(tdx, exchange, receipt=changed(document, path)) for path in paths))
    assert [path for path, steps in zip(paths, answers, strict=True) if "signature" not in failed(steps)] == []


@pytest.mark.parametrize("name", SERVED)
def test_other_bodies_other_order_and_another_keyset_are_seen(tdx: Recorded, name: str) -> None:
    exchange = tdx.exchanges[name]
    document = json.loads(exchange.receipt)
    document["event_log"].reverse()
    other = json.loads(keyset(tdx))
    other["receipt_signing_keys"][0]["public_key"] = "ab" * 32
    response = bytearray(exchange.response)
    response[len(response) // 2] ^= 1
    chain = {"chain"} if name in STREAMS else set()
    told = ask(
        question(tdx, exchange, request=exchange.request + b" "),
        question(tdx, exchange, response=bytes(response)),
        question(tdx, exchange, response=exchange.response + b"data: more\n\n"),
        question(tdx, exchange, receipt=json.dumps(document)),
        question(tdx, exchange, keyset=json.dumps(other)),
    )
    assert [failed(steps) for steps in told] == [
        {"request"} | chain, {"response"} | chain, {"response"}, {"signature", "order"}, {"signature", "keyset"},
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*SERVED, *REFUSED])
def test_our_own_verifier_says_the_same(tdx: Recorded, name: str) -> None:
    exchange = tdx.exchanges[name]
    checks = Checks()
    verify_receipt(
        Receipt.parse(exchange.receipt), keyset(tdx), request=exchange.request, response=exchange.response,
        checks=checks,
    )  # fmt: skip
    assert not checks.failed


# --- published values -------------------------------------------------------------------------------------------------

REQUEST: Final = b'{"messages":[{"content":"hi","role":"user"}],"model":"demo-model"}'
RESPONSE: Final = b'{"choices":[],"id":"chatcmpl-123"}'
SESSION: Final = "95ad1cb4dd25445808c2e9d116caf420b05703730b506395e8fc1ca6faeae28f"
DIGEST: Final = "sha256:53a5cd44b30dcc51999754c719f2628a041f174ecbf9662a6f8e898a10cd9371"
REPORT_DATA: Final = {
    bytes(range(32)).hex(): "df2174d28130852b413646a3786927b93e94c11d770268b65def8bdba45cb49e",
    None: "0633919ca3f00e97bafaa3304278eb22420cc3ff0d19f87dfca2d3f7508150bc",
}
SIGNING_INPUT: Final = "1bd328e6880a5a12b3915af95ea32111310e04ab9e21ac3d71ce268e33b965c9"
SIGNATURE: Final = "d5b005e093bde3b577faf270b7184b09"
PUBLISHED: Final[dict[str, Any]] = {
    "seeds": ["02" * 32, "03" * 32],
    "subject": "dstack-app://example-app",
    "not_after": 1800000000,
    "tls": ["c0" * 32, "api.example.com"],
    "document": {
        "api_version": "aci/1",
        "receipt_id": "rcpt-0001",
        "chat_id": "chatcmpl-123",
        "model": "demo-model",
        "endpoint": "/v1/chat/completions",
        "method": "POST",
        "served_at": 1750000000,
        "event_log": [
            {"type": "request.received", "body_hash": "sha256:" + hashlib.sha256(REQUEST).hexdigest()},
            {"type": "request.forwarded", "body_hash": "sha256:" + hashlib.sha256(REQUEST).hexdigest()},
            {
                "type": "upstream.verified", "result": "verified", "required": True, "model_id": "demo-model",
                "session_id": SESSION,
            },
            {"type": "response.returned", "body_hash": "sha256:" + hashlib.sha256(RESPONSE).hexdigest()},
        ],
        "key_id": "receipt-1",
    },
}  # fmt: skip


def test_published_values_come_out_of_both_implementations(tdx: Recorded) -> None:
    (theirs,) = ask(PUBLISHED)
    assert theirs["keyset_digest"] == DIGEST == keyset_digest(jcs(theirs["keyset"]))
    for nonce, expected in REPORT_DATA.items():
        assert ask({"statement": [DIGEST, nonce]}) == [expected]
        assert statement_report_data(DIGEST, nonce) == bytes.fromhex(expected) + bytes(32)
    ours = signing_input(PUBLISHED["document"] | {"workload_keyset_digest": DIGEST})
    assert theirs["signing_input"].encode() == ours and hashlib.sha256(ours).hexdigest() == SIGNING_INPUT
    assert theirs["signature"].startswith(SIGNATURE)


def test_published_receipt_verifies_in_both_implementations(tdx: Recorded) -> None:
    (made,) = ask(PUBLISHED)
    document = PUBLISHED["document"] | {"workload_keyset_digest": DIGEST, "signature": made["signature"]}
    raw, keys = json.dumps(document, indent=2).encode(), json.dumps(made["keyset"])
    (steps,) = ask(question(tdx, Exchange(REQUEST, 200, RESPONSE, raw), keyset=keys))
    assert failed(steps) == set()
    checks = Checks()
    verify_receipt(Receipt.parse(raw), keys.encode(), request=REQUEST, response=RESPONSE, checks=checks)
    assert not checks.failed
