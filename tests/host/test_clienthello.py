from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.clienthello import CAP, Hello, HelloReader, NeedMore, NotTLS, dns_name
from tests.host.hellos import (
    SUPPORTED_VERSIONS,
    alpn,
    body,
    extension,
    hello,
    message,
    openssl_hello,
    records,
    server_name,
    vector,
)

Result = NeedMore | Hello | NotTLS


def read(data: bytes) -> Result:
    return HelloReader().feed(data)


def read_in_pieces(data: bytes, size: int) -> Result:
    reader = HelloReader()
    result: Result = NeedMore()
    for at in range(0, len(data), size):
        result = reader.feed(data[at : at + size])
        if not isinstance(result, NeedMore):
            break
    return result


def code(data: bytes) -> str:
    result = read(data)
    assert isinstance(result, NotTLS), result
    return result.code


def test_post_quantum_hello_of_a_real_client_is_read() -> None:
    data = openssl_hello("Chat.Example.ORG", b"h2", b"http/1.1")
    assert len(data) > 1400  # the ML-KEM share is in it: more than one TCP segment on an ethernet
    assert read(data) == Hello(sni="chat.example.org", alpn=(b"h2", b"http/1.1"), ech=False)


def test_hello_without_server_name_is_read() -> None:
    assert read(openssl_hello(None)) == Hello(sni=None, alpn=(), ech=False)
    assert read(hello(None)) == Hello(sni=None, alpn=(), ech=False)


def test_hello_without_extensions_is_read() -> None:
    assert read(records(message(body(None)))) == Hello(sni=None, alpn=(), ech=False)


def test_encrypted_client_hello_is_noticed() -> None:
    assert read(hello("public.example", extension(0xFE0D, b"\0" * 40))) == Hello("public.example", (), ech=True)


@pytest.mark.parametrize("segment", [1, 2, 5, 6, 100, 1459])
@pytest.mark.parametrize("record", [1, 3, 4, 5, 50, 700, 16384])
def test_hello_may_span_segments_and_records(segment: int, record: int) -> None:
    plain = openssl_hello("demo.vouchsafe.test")
    respelled = records(plain[5:], size=record)
    assert read_in_pieces(respelled, segment) == read(plain) == Hello("demo.vouchsafe.test", (), False)


def test_every_truncation_needs_more_and_no_byte_of_it_decides_early() -> None:
    data = openssl_hello("demo.vouchsafe.test")
    reader = HelloReader()
    for at in range(len(data) - 1):
        assert reader.feed(data[at : at + 1]) == NeedMore(), at
    assert isinstance(reader.feed(data[-1:]), Hello)


def test_every_byte_is_kept_for_the_replay() -> None:
    data = hello() + b"\x14\x03\x03\x00\x01\x01early"
    reader = HelloReader()
    assert isinstance(reader.feed(data), Hello)
    assert reader.buffer == data


def test_reader_never_takes_more_than_its_cap() -> None:
    reader = HelloReader()
    reader.feed(hello())
    assert reader.room == CAP - len(hello())
    with pytest.raises(ValueError, match="feed at most"):
        reader.feed(bytes(reader.room + 1))


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n", b"\x80\x2e\x01\x03\x01", b"SSH-2.0-x", b"\0", b"\x17\x03\x03", b"\x15\x03\x01\0\x02"],
)
def test_garbage_is_refused_on_its_first_byte(garbage: bytes) -> None:
    assert code(garbage[:1]) == code(garbage) == "not-tls"


def test_handshake_record_of_another_protocol_version_is_refused() -> None:
    assert code(b"\x16\x02") == "not-tls"
    assert code(b"\x16\xfe\xfd") == "not-tls"  # DTLS


def test_empty_or_oversized_record_is_refused() -> None:
    assert code(b"\x16\x03\x01\x00\x00") == "not-tls"
    assert code(b"\x16\x03\x01\x40\x01") == "not-tls"


def test_handshake_message_that_is_no_client_hello_is_refused() -> None:
    assert code(records(message(body(b""), kind=2))) == "not-tls"


def test_announced_length_above_the_cap_is_refused_before_it_arrives() -> None:
    assert code(records(b"\x01" + (CAP - 8).to_bytes(3, "big"))) == "hello-too-large"
    assert isinstance(read(records(b"\x01" + (CAP - 9).to_bytes(3, "big"))), NeedMore)


def test_record_that_cannot_fit_is_refused_before_it_arrives() -> None:
    first = records(b"\x01" + (16000).to_bytes(3, "big") + bytes(16000 - 10))
    assert code(first + b"\x16\x03\x01\x10\x00") == "hello-too-large"


def test_hello_in_one_byte_records_meets_the_cap_and_not_more() -> None:
    slow = records(message(body(extension(21, bytes(8000)))), size=1)
    assert code(slow[:CAP]) == "hello-too-large"


def test_largest_hello_within_the_cap_is_read() -> None:
    room = CAP - 2 * 5 - len(message(body(extension(21, b""))))
    data = records(message(body(extension(21, bytes(room)))))
    assert len(data) == CAP
    assert isinstance(read(data), Hello)


def test_second_handshake_message_behind_the_hello_is_refused() -> None:
    assert code(records(message(body(b"")) + b"\x0b")) == "bad-hello"


@pytest.mark.parametrize(
    "content",
    [
        body(b"", version=b"\x02\x03"),
        body(b"", session=bytes(33)),
        body(b"", suites=b""),
        body(b"", suites=b"\x13\x01\x13"),
        body(b"", compression=b""),
        body(None) + b"\0",
        body(b"") + b"\0",
        body(b"\0\x2b\0\x05\0"),
        body(b"\0"),
        body(SUPPORTED_VERSIONS)[:-1],
        b"",
        body(extension(16, b"")),
        body(extension(16, vector(2, b"\x05h2"))),
        body(extension(16, vector(2, b"\0\0"))),
        body(extension(16, vector(2, b"\x02h2") + b"\0")),
        body(extension(0, b"")),
        body(extension(0, vector(2, b""))),
        body(extension(0, vector(2, b"\0" + vector(2, b"a.b")) + b"\0")),
        body(extension(0, vector(2, b"\0" + vector(2, b"a.b") + b"\0"))),
        body(extension(0, vector(2, b"\0\0\x04a.b"))),
    ],
)
def test_hello_with_one_wrong_length_is_refused(content: bytes) -> None:
    assert code(records(message(content))) == "bad-hello"


def test_extension_given_twice_is_refused() -> None:
    assert code(records(message(body(server_name(b"a.test") + server_name(b"b.test"))))) == "bad-hello"
    assert code(records(message(body(alpn(b"h2") + alpn(b"h3"))))) == "bad-hello"


def test_second_name_in_one_extension_is_refused() -> None:
    two = extension(0, vector(2, (b"\0" + vector(2, b"a.test")) * 2))
    assert code(records(message(body(two)))) == "bad-hello"


def test_server_name_of_another_type_is_refused() -> None:
    assert code(records(message(body(server_name(b"a.test", kind=1))))) == "bad-sni"


@pytest.mark.parametrize(
    "name",
    [
        b"a.test.", b".a.test", b"a..test", b"-a.test", b"a-.test", b"a_b.test", b"a b.test", b"a\0.test", b"a\n.test",
        b"*.a.test", "straße.test".encode(), b"10.0.0.1", b"1", b"[::1]", b"::1", b"a" * 64 + b".test",
        b".".join([b"a" * 49] * 5) + b".abcde", b"demo:443",
    ],
)  # fmt: skip
def test_server_name_with_bad_syntax_is_refused(name: bytes) -> None:
    assert code(records(message(body(server_name(name))))) == "bad-sni"


@pytest.mark.parametrize(
    "name",
    [b"localhost", b"a.test", b"xn--strae-oqa.test", b"r3---sn-x.example", b"1.2.3.com", b"a" * 63 + b".test"],
)
def test_server_name_with_good_syntax_is_kept(name: bytes) -> None:
    assert dns_name(name) == name.decode()
    assert read(hello(name.decode())) == Hello(name.decode(), (), False)


def test_reason_holds_none_of_the_peers_bytes() -> None:
    result = read(records(message(body(server_name(b"secret_canary.test")))))
    assert isinstance(result, NotTLS)
    assert "canary" not in result.reason


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_get_an_answer_and_never_an_exception(data: bytes) -> None:
    for raw in (data, b"\x16\x03\x01" + data, records(b"\x01" + data or b"\x01"), records(message(data or b"\0"))):
        assert isinstance(read(raw[:CAP]), NeedMore | Hello | NotTLS)


def test_every_flipped_byte_of_a_real_hello_gets_an_answer_whatever_the_segments() -> None:
    data = openssl_hello("demo.vouchsafe.test", b"h2")
    dice = random.Random(6)
    for at in range(len(data)):
        wrong = bytearray(data)
        wrong[at] ^= dice.randrange(1, 256)
        whole = read(bytes(wrong))
        assert isinstance(whole, NeedMore | Hello | NotTLS)
        assert whole == read_in_pieces(bytes(wrong), dice.randrange(1, 300))
