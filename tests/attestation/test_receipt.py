"""Receipts: the published `aci/1` vectors come out exactly, and every edit of a receipt or a body is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation import receipt as r
from attestation.binding import statement_report_data
from attestation.errors import FormatError
from attestation.result import Checks, Status
from attestation.sse import SseCutter, StreamChain, chain_comment, inline_comment, mark_count, split_inline

SIGNER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
PUBLIC = SIGNER.public_key().public_bytes_raw()
E2EE = "5dfedd3b6bd47f6fa28ee15d969d5bb0ea53774d488bdaf9df1c6e0124b3ef22"
REQUEST = b'{"messages":[{"content":"hi","role":"user"}],"model":"demo-model"}'
RESPONSE = b'{"choices":[],"id":"chatcmpl-123"}'
SESSION = "95ad1cb4dd25445808c2e9d116caf420b05703730b506395e8fc1ca6faeae28f"


def sha(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def keyset() -> dict[str, Any]:
    doc = r.keyset_document(
        "dstack-app://example-app", 1800000000, "receipt-1", PUBLIC, b"\xc0" * 32, "api.example.com"
    )
    doc["e2ee_public_keys"] = [
        {"key_id": "e2ee-1", "algo": "x25519-aes-256-gcm-hkdf-sha256", "public_key": E2EE},
    ]
    return doc


def document() -> dict[str, Any]:
    return r.receipt_document(
        receipt_id="rcpt-0001",
        chat_id="chatcmpl-123",
        model="demo-model",
        keyset_digest=r.keyset_digest(r.jcs(keyset())),
        endpoint="/v1/chat/completions",
        method="POST",
        served_at=1750000000,
        event_log=[
            r.request_received(sha(REQUEST)),
            r.request_forwarded(sha(REQUEST)),
            {
                "type": "upstream.verified",
                "result": "verified",
                "required": True,
                "model_id": "demo-model",
                "session_id": SESSION,
            },
            r.response_returned(sha(RESPONSE)),
        ],
        key_id="receipt-1",
    )


def sealed(doc: dict[str, Any]) -> bytes:
    return r.seal(doc, SIGNER.sign(r.signing_input(doc)))


def verified(raw: bytes, *, request: bytes | None = REQUEST, response: bytes | None = RESPONSE, **kw: Any) -> Checks:
    checks = Checks()
    r.verify_receipt(r.Receipt.parse(raw), r.jcs(keyset()), request=request, response=response, checks=checks, **kw)
    return checks


def codes(checks: Checks) -> list[str]:
    return [c.code for c in checks.failed]


# --- published vectors ------------------------------------------------------------------------------------------------


def test_published_keyset_digest_comes_out() -> None:
    expected = "sha256:53a5cd44b30dcc51999754c719f2628a041f174ecbf9662a6f8e898a10cd9371"
    assert r.keyset_digest(r.jcs(keyset())) == expected
    assert r.Keyset.parse(json.dumps(keyset(), indent=3).encode()).digest == expected


def test_published_report_data_comes_out() -> None:
    digest = r.keyset_digest(r.jcs(keyset()))
    nonce = bytes(range(32)).hex()
    fresh = bytes.fromhex("df2174d28130852b413646a3786927b93e94c11d770268b65def8bdba45cb49e")
    cached = bytes.fromhex("0633919ca3f00e97bafaa3304278eb22420cc3ff0d19f87dfca2d3f7508150bc")
    assert statement_report_data(digest, nonce) == fresh + bytes(32)
    assert statement_report_data(digest, None) == cached + bytes(32)


def test_published_signing_input_and_signature_come_out() -> None:
    signed = r.signing_input(document())
    assert sha(signed).hex() == "1bd328e6880a5a12b3915af95ea32111310e04ab9e21ac3d71ce268e33b965c9"
    assert SIGNER.sign(signed).hex().startswith("d5b005e093bde3b577faf270b7184b09")


def test_published_receipt_verifies_in_any_encoding() -> None:
    raw = sealed(document())
    spaced = json.dumps(dict(reversed(json.loads(raw).items())), indent=2).encode()
    for encoding in (raw, spaced):
        checks = verified(encoding)
        assert not checks.failed
        assert {c.id for c in checks if c.status is Status.PASS} == {
            "receipt.signature",
            "receipt.keyset",
            "receipt.request-hash",
            "receipt.response-hash",
        }


# --- edits ------------------------------------------------------------------------------------------------------------


def test_every_changed_leaf_of_a_receipt_is_refused() -> None:
    original = json.loads(sealed(document()))

    def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return [leaf for k, v in items for leaf in leaves(v, (*path, k))]
        return [path]

    for path in leaves(original):
        edited = json.loads(json.dumps(original))
        node = edited
        for step in path[:-1]:
            node = node[step]
        old = node[path[-1]]
        flipped = "0" if str(old)[-1:] != "0" else "1"
        if isinstance(old, bool):
            node[path[-1]] = not old
        elif isinstance(old, int):
            node[path[-1]] = old + 1
        else:
            node[path[-1]] = old[:-1] + flipped
        try:
            checks = verified(json.dumps(edited).encode())
        except FormatError as err:
            assert err.code == "FORMAT_RECEIPT"
        else:
            assert {"RECEIPT_SIGNATURE", "RECEIPT_KEY_UNKNOWN"} & set(codes(checks)), path


def test_receipt_of_another_keyset_is_refused() -> None:
    other = {**document(), "workload_keyset_digest": "sha256:" + "0" * 64}
    assert codes(verified(sealed(other))) == ["RECEIPT_KEYSET"]


def test_receipt_served_after_the_keyset_ended_is_refused() -> None:
    assert codes(verified(sealed({**document(), "served_at": 1800000001}))) == ["RECEIPT_KEYSET_EXPIRED"]


def test_receipt_under_a_key_outside_the_keyset_is_refused() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
    doc = document()
    assert codes(verified(r.seal(doc, stranger.sign(r.signing_input(doc))))) == ["RECEIPT_SIGNATURE"]
    assert codes(verified(sealed({**document(), "key_id": "e2ee-1"}))) == ["RECEIPT_KEY_UNKNOWN"]


def test_changed_bodies_are_refused_and_absent_bodies_are_skips() -> None:
    raw = sealed(document())
    assert codes(verified(raw, request=REQUEST + b" ")) == ["RECEIPT_REQUEST_HASH"]
    assert codes(verified(raw, response=RESPONSE[:-1])) == ["RECEIPT_RESPONSE_HASH"]
    skipped = [c.id for c in verified(raw, request=None, response=None) if c.status is Status.SKIP]
    assert skipped == ["receipt.request-hash", "receipt.response-hash", "receipt.chain"]


def test_malformed_keyset_is_a_failed_check_not_an_exception() -> None:
    checks = Checks()
    r.verify_receipt(r.Receipt.parse(sealed(document())), b"{}", request=None, response=None, checks=checks)
    assert codes(checks) == ["FORMAT_RECEIPT"]


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d.__setitem__(name, value)


def _log(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda d: change(d["event_log"])


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_set("extra", 1), id="unknown-member"),
        pytest.param(lambda d: d.pop("chat_id"), id="missing-member"),
        pytest.param(_set("api_version", "aci/2"), id="other-version"),
        pytest.param(_set("served_at", 1.5), id="float"),
        pytest.param(_set("served_at", True), id="boolean-for-integer"),
        pytest.param(_set("served_at", -1), id="negative-time"),
        pytest.param(_set("served_at", 2**53), id="integer-too-large"),
        pytest.param(_set("served_at", 10**4000), id="integer-of-4000-digits"),
        pytest.param(_set("signature", "AB" * 64), id="upper-case-hex"),
        pytest.param(_set("signature", "ab" * 63), id="short-signature"),
        pytest.param(_set("workload_keyset_digest", "0" * 64), id="bare-digest"),
        pytest.param(_set("model", "x" * 1025), id="long-text"),
        pytest.param(_set("model", "\ud800"), id="lone-surrogate"),
        pytest.param(_set("receipt_id", "a b"), id="id-with-space"),
        pytest.param(_log(lambda e: e.reverse()), id="events-out-of-order"),
        pytest.param(_log(lambda e: e.append(dict(e[-1]))), id="returned-twice"),
        pytest.param(_log(lambda e: e.pop()), id="no-returned"),
        pytest.param(_log(lambda e: e.pop(0)), id="no-received"),
        pytest.param(_log(lambda e: e[0].update(note="x")), id="reserved-event-with-more"),
        pytest.param(_log(lambda e: e[0].update(body_hash="sha256:00")), id="short-hash"),
        pytest.param(_log(lambda e: e.append({"type": "x.a", "deep": {"a": 1}})), id="event-not-flat"),
        pytest.param(_log(lambda e: e.append({"no": "type"})), id="event-without-type"),
        pytest.param(_log(lambda e: e.append({"type": "x.é", "é": 1})), id="member-name-not-ascii"),
        pytest.param(_log(lambda e: e.extend([{"type": "x.a"}] * 64)), id="too-many-events"),
    ],
)
def test_malformed_receipt_is_refused(edit: Callable[[dict[str, Any]], Any]) -> None:
    doc = json.loads(sealed(document()))
    edit(doc)
    with pytest.raises(FormatError, match="FORMAT_RECEIPT"):
        r.Receipt.parse(_dumps(doc))


def _dumps(doc: dict[str, Any]) -> bytes:
    """JSON with integers of any length: `json` refuses to print more than 4300 digits only on newer versions."""
    return json.dumps(doc).encode()


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(sealed(document())[:-1] + b',"model":"demo-model"}', id="duplicate-member"),
        pytest.param(sealed(document()) + b" x", id="trailing-data"),
        pytest.param(sealed(document()).replace(b"1750000000", b"17500000e2"), id="exponent"),
        pytest.param(sealed(document()).replace(b"1750000000", b"NaN"), id="nan"),
        pytest.param(b"\xff", id="not-utf8"),
        pytest.param(b"[]", id="not-an-object"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(sealed(document()).ljust(r.MAX_RECEIPT + 1), id="oversized"),
    ],
)
def test_ambiguous_or_oversized_json_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError, match="FORMAT_RECEIPT"):
        r.Receipt.parse(raw)


@given(st.binary(max_size=200))
def test_random_bytes_never_parse_and_never_crash(raw: bytes) -> None:
    for parser in (r.Receipt.parse, r.Keyset.parse):
        with pytest.raises(FormatError):
            parser(raw)


def test_keyset_with_one_key_id_twice_is_refused() -> None:
    doc = keyset()
    doc["receipt_signing_keys"].append({**doc["receipt_signing_keys"][0], "public_key": "00" * 32})
    with pytest.raises(FormatError):
        r.Keyset.parse(json.dumps(doc).encode())


def test_unknown_events_and_unknown_key_algorithms_are_kept_and_ignored() -> None:
    doc = document()
    doc["event_log"].insert(1, {"type": "x.anything", "n": 3, "list": ["a"]})
    assert not verified(sealed(doc)).failed
    ks = keyset()
    ks["receipt_signing_keys"].append({"key_id": "pq-1", "algo": "ml-dsa-65", "public_key": "whatever"})
    assert r.Keyset.parse(r.jcs(ks)).signing_keys == {"receipt-1": PUBLIC}


def test_floats_can_not_be_signed() -> None:
    with pytest.raises(ValueError, match="integers"):
        r.signing_input({**document(), "served_at": 1.0})


# --- streams ----------------------------------------------------------------------------------------------------------

EVENTS = [f'data: {{"n":{n}}}\n\n'.encode() for n in range(150)]


def stream(events: list[bytes]) -> tuple[bytes, bytes]:
    """Body and sealed receipt of a stream of *events*, as an enclave makes them."""
    chain = StreamChain("rcpt-0001", sha(REQUEST))
    for event in events:
        chain.update(event)
    body = b"".join(events)
    doc = document()
    doc["event_log"] = [
        r.request_received(sha(REQUEST)),
        r.request_forwarded(sha(REQUEST)),
        r.response_returned(sha(body)),
        r.stream_chain_event(chain),
    ]
    return body, sealed(doc)


def test_chain_is_the_formula_of_its_description() -> None:
    chain = StreamChain("rcpt-0001", b"\x01" * 32)
    head = sha(b"vouchsafe/sse-chain/v1\x00" + b"\x00\x00\x00\x09rcpt-0001" + b"\x01" * 32)
    assert chain.head == head
    marks = []
    for number, event in enumerate(EVENTS, start=1):
        chain.update(event)
        head = sha(head + len(event).to_bytes(4, "big") + event)
        if number in (1, 2, 4, 8, 16, 32) or number % 64 == 0:
            marks.append(head)
    assert (chain.head, chain.marks, chain.events) == (head, marks, 150)
    assert [mark_count(n) for n in (0, 1, 3, 32, 63, 64, 150)] == [0, 1, 2, 6, 6, 7, 8]


def test_whole_stream_verifies() -> None:
    body, raw = stream(EVENTS)
    checks = verified(raw, response=body)
    assert not checks.failed
    assert [c.status for c in checks if c.id == "receipt.chain"] == [Status.PASS]


def test_stream_without_events_verifies() -> None:
    body, raw = stream([])
    assert not verified(raw, response=body).failed


def test_cut_copy_is_refused_unless_the_caller_says_it_is_cut() -> None:
    _, raw = stream(EVENTS)
    copy = b"".join(EVENTS[:70]) + b"data: {"
    assert codes(verified(raw, response=copy)) == ["RECEIPT_RESPONSE_CUT"]
    checks = verified(raw, response=copy, allow_cut=True)
    assert not checks.failed
    chain = next(c for c in checks if c.id == "receipt.chain")
    assert chain.status is Status.PASS
    assert "up to event 64 of 150" in chain.reason
    assert next(c for c in checks if c.id == "receipt.response-hash").status is Status.SKIP


def test_edit_before_the_last_mark_of_a_cut_copy_is_refused() -> None:
    _, raw = stream(EVENTS)
    copy = b"".join(EVENTS[:70]).replace(b'"n":40', b'"n":41')
    assert codes(verified(raw, response=copy, allow_cut=True)) == ["RECEIPT_CHAIN"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: b.replace(b'"n":149', b'"n":148'), id="last-event-edited"),
        pytest.param(lambda b: b + b"data: more\n\n", id="event-added"),
        pytest.param(lambda b: b + b"\n", id="byte-added"),
        pytest.param(lambda b: EVENTS[1] + EVENTS[0] + b"".join(EVENTS[2:]), id="events-swapped"),
    ],
)
def test_changed_whole_stream_is_refused(change: Callable[[bytes], bytes]) -> None:
    body, raw = stream(EVENTS)
    assert set(codes(verified(raw, response=change(body), allow_cut=True))) == {
        "RECEIPT_RESPONSE_HASH",
        "RECEIPT_CHAIN",
    }


def test_inline_receipt_is_set_aside_and_nothing_else_is() -> None:
    body, raw = stream([*EVENTS, b"data: [DONE]\n\n"])
    whole = body + inline_comment(raw)
    assert split_inline(whole) == (body, raw)
    assert not verified(raw, response=whole).failed
    for extra in (b": comment\n\n", b"data: x\n\n" + inline_comment(raw), inline_comment(raw) + b"data: x\n\n"):
        assert "RECEIPT_RESPONSE_HASH" in codes(verified(raw, response=body + extra))
    assert split_inline(b"data: : vouchsafe-receipt AAAA\n\n") == (b"data: : vouchsafe-receipt AAAA\n\n", None)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"algo": "other"}, id="algo"),
        pytest.param({"every": 65}, id="every"),
        pytest.param({"events": 20}, id="fewer-events-than-marks"),
        pytest.param({"marks": []}, id="no-marks"),
        pytest.param({"final": "00"}, id="final"),
        pytest.param({"more": 1}, id="unknown-member"),
    ],
)
def test_malformed_chain_event_is_refused(edit: dict[str, Any]) -> None:
    _, raw = stream(EVENTS)
    doc = json.loads(raw)
    doc["event_log"][-1].update(edit)
    with pytest.raises(FormatError):
        r.Receipt.parse(json.dumps(doc).encode())


PIECES = st.lists(
    st.sampled_from([b"data: x", b"\n", b"\r\n", b"\r", b": c", b"\n\n", b"\r\n\r\n", b"data: \xff\xfe"]), max_size=60
)


@settings(max_examples=300)
@given(PIECES, st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_any_chunking_gives_the_same_events(pieces: list[bytes], sizes: list[int]) -> None:
    body = b"".join(pieces)
    whole = SseCutter(limit=1 << 20)
    expected = list(whole.feed(body))
    chunked = SseCutter(limit=1 << 20)
    events: list[bytes] = []
    at = turn = 0
    while at < len(body):
        step = sizes[turn % len(sizes)]
        events += chunked.feed(body[at : at + step])
        at, turn = at + step, turn + 1
    assert events == expected
    assert chunked.rest == whole.rest
    assert b"".join(events) + chunked.rest == body
    assert all(e.endswith((b"\n\n", b"\n\r\n")) for e in events)


def test_events_end_with_a_blank_line_of_either_kind() -> None:
    body = b"a\n\nb\r\n\r\nc\n\r\nd\re\r\rf\n\n\n\ng"
    cutter = SseCutter(limit=1 << 10)
    assert list(cutter.feed(body)) == [b"a\n\n", b"b\r\n\r\n", b"c\n\r\n", b"d\re\r\rf\n\n", b"\n\n"]
    assert cutter.rest == b"g"


@pytest.mark.parametrize("chunk", [b"x" * 33, b"data: " + b"x" * 30 + b"\n\n"])
def test_event_over_the_limit_is_refused(chunk: bytes) -> None:
    cutter = SseCutter(limit=32)
    with pytest.raises(FormatError, match="FORMAT_SSE_EVENT"):
        list(cutter.feed(chunk))


def test_comments_are_comments() -> None:
    assert chain_comment("rcpt-1", b"\xab" * 32) == b": vouchsafe receipt=rcpt-1 chain=" + b"ab" * 32 + b"\n\n"
    comment = inline_comment(b'{"a":"?>"}')
    assert comment.startswith(b": vouchsafe-receipt ")
    assert base64.urlsafe_b64decode(comment[20:-2] + b"==") == b'{"a":"?>"}'


@pytest.mark.parametrize("outcome", ["client_disconnected", "upstream_error"])
def test_stream_that_broke_has_a_receipt_that_does_not_pass_for_a_whole_one(outcome: str) -> None:
    body, raw = stream(EVENTS[:3])
    doc = {k: v for k, v in json.loads(raw).items() if k != "signature"}
    doc["event_log"].append(r.outcome_event(outcome))
    broken = sealed(doc)
    assert codes(verified(broken, response=body)) == ["RECEIPT_OUTCOME"]
    checks = verified(broken, response=body, allow_cut=True)
    assert not checks.failed
    assert [c.reason for c in checks if c.id == "receipt.outcome"] == [f"the stream was not completed: {outcome}"]
    doc["event_log"][-1] = r.outcome_event("completed")
    assert not verified(sealed(doc), response=body).failed


def test_outcome_stands_once_and_in_its_shape() -> None:
    _, raw = stream(EVENTS[:3])
    for more in ([r.outcome_event("completed")] * 2, [{**r.outcome_event("completed"), "x": 1}], [r.outcome_event("")]):
        doc = json.loads(raw)
        doc["event_log"] += more
        with pytest.raises(FormatError):
            r.Receipt.parse(json.dumps(doc).encode())
