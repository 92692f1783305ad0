"""The outgoing stream: however the engine chunks it, the same bytes leave, and the end is honest."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.sse import SseCutter, StreamChain
from enclave import stream
from enclave.api.meter import Meter
from enclave.stream import OutStream, PlainTeller

REQUEST = hashlib.sha256(b"request").digest()
EVENT = st.text(alphabet="abc {}é", max_size=12).map(lambda t: f'data: {{"id":"x","t":"{t}"}}\n\n'.encode())
FINAL = b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}\n\n'
ONE = b'data: {"id":"x"}\n\n'


def out_stream() -> OutStream:
    meter = Meter()
    return OutStream("rcpt-1", REQUEST, PlainTeller(meter, wants_usage=False), meter)


@settings(max_examples=200)
@given(st.lists(EVENT, max_size=80), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_any_chunking_gives_the_same_bytes_chain_and_hash(events: list[bytes], sizes: list[int]) -> None:
    body = b"".join(events) + FINAL + b"data: [DONE]\n\n"
    whole, chunked = out_stream(), out_stream()
    expected = b"".join(whole.feed(body))
    got = b""
    at = turn = 0
    while at < len(body):
        step = sizes[turn % len(sizes)]
        got += b"".join(chunked.feed(body[at : at + step]))
        at, turn = at + step, turn + 1
    assert got == expected
    assert (chunked.chain.head, chunked.chain.marks, chunked.done) == (whole.chain.head, whole.chain.marks, True)
    assert chunked.body_hash == hashlib.sha256(got).digest()
    again = StreamChain("rcpt-1", REQUEST)
    for event in SseCutter(limit=1 << 20).feed(got):
        again.update(event)
    assert (again.head, again.events, again.size) == (whole.chain.head, len(events) + 2, len(got))


def test_nothing_is_given_back_after_done() -> None:
    out = out_stream()
    made = b"".join(out.feed(ONE + FINAL + b"data: [DONE]\n\n" + ONE))
    assert made.endswith(b"data: [DONE]\n\n")
    assert list(out.feed(ONE)) == []
    assert out.body_hash == hashlib.sha256(made).digest()


def test_end_without_done_is_a_failure() -> None:
    for given_bytes in (b"", ONE, FINAL + b"data: [DO", FINAL + b"data: [DONE]", ONE + b"data: [DONE]\n\n"):
        out = out_stream()
        list(out.feed(given_bytes))
        out.end()
        assert out.failed is not None
        assert not out.done
        assert b"[DONE]" not in out.error()


def test_error_of_the_engine_stops_the_stream_and_hides_its_words() -> None:
    out = out_stream()
    error = b'data: {"error": {"message": "secret", "type": "InternalServerError", "code": 500}}\n\n'
    assert list(out.feed(ONE + error + FINAL + b"data: [DONE]\n\n")) == [ONE]
    assert out.failed is not None
    assert not out.done
    assert b"secret" not in out.error()


def test_word_error_in_an_answer_is_no_error() -> None:
    out = out_stream()
    event = b'data: {"id":"x","choices":[{"delta":{"content":"{\\"error\\": 1}"}}]}\n\n'
    assert list(out.feed(event)) == [event]
    assert out.failed is None


def test_event_without_end_and_stream_without_end_are_failures(monkeypatch: object) -> None:
    out = out_stream()
    for _ in range(stream.MAX_EVENT // (1 << 20) + 1):
        list(out.feed(b"x" * (1 << 20)))
    assert out.failed is not None


def test_chat_id_is_that_of_the_first_event() -> None:
    for event, expected in (
        (b'data: {"id":"chatcmpl-1"}\n\n', "chatcmpl-1"),
        (b'data: {"id":7}\n\n', None),
        (b"data: x\n\n", None),
        (b": comment\n\n", None),
    ):
        out = out_stream()
        list(out.feed(event))
        list(out.feed(b'data: {"id":"later"}\n\n'))
        assert out.chat_id == expected
