"""Whatever comes over the wire: an answer below 500 in OpenAI's shape or a closed connection; not a word of it is kept.

The real TLS server, the real gateway, an echo that would repeat anything. Every case carries a word that must not be
found in the log; after every case the service still answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from OpenSSL import SSL

from enclave.engine.echo import EchoEngine
from enclave.tls import TlsLimits
from tests.enclave.api.client import API_KEY, CHAT
from tests.enclave.api.serving import OPENED, gateway, tenancy_of
from tests.enclave.support import Client, Served, make_identity, serving

CANARY = "canary7f3a"
KEY = f"authorization: Bearer {API_KEY}\r\ncontent-type: application/json\r\n"
ROUTES = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize")


class Late:
    """The gateway, made in the server's own loop when the first request comes."""

    def __init__(self) -> None:
        self.app: Any = None
        self.engine = EchoEngine("parrot")
        self._lock: asyncio.Lock | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if self.app is None:
                await self.engine.start()
                tenancy = await tenancy_of(["parrot"])
                OPENED.remove(tenancy)  # it lives in the server's loop and ends with it
                self.app = await gateway(self.engine, tenancy=tenancy)
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def late() -> Late:
    return Late()


@pytest.fixture(scope="module")
def served(late: Late, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    identity = make_identity()
    limits = TlsLimits(body_s=1.0, header_s=5.0, watch_s=0.1)
    with serving(late, tmp_path_factory.mktemp("b"), lambda: identity, limits=limits) as running:
        yield running


@pytest.fixture(autouse=True)
def still_answers_and_says_nothing(served: Served, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    with Client(served.path) as client:
        status, text = client.get(CHAT, method="POST", body=body(CHAT), headers=KEY)
        assert status == 200 and b"fine" in text
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err


def body(path: str, text: str = "fine", **fields: Any) -> bytes:
    if path in ("/v1/completions", "/tokenize"):
        document: dict[str, Any] = {"model": "parrot", "prompt": text}
    elif path == "/v1/responses":
        document = {"model": "parrot", "input": text}
    else:
        document = {"model": "parrot", "messages": [{"role": "user", "content": text}]}
        if path == "/v1/messages":
            document["max_tokens"] = 9
    return json.dumps({**document, **fields}).encode()


def refused(served: Served, path: str, raw: bytes, headers: str = KEY) -> tuple[int, Any]:
    """Status and error of POST *path*; the connection may be closed before all of *raw* was taken."""
    with Client(served.path) as client:
        with contextlib.suppress(SSL.Error, OSError):
            client.send(
                f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(raw)}\r\n\r\n".encode() + raw
            )
        status, text = client.answer()
    document = json.loads(text)
    assert "error" in document and set(document["error"]) >= {"message", "type"}, text[:200]
    assert CANARY.encode() not in text
    return status, document["error"]


BODIES = {
    "empty": b"",
    "text": f"{CANARY}".encode(),
    "list": f'["{CANARY}"]'.encode(),
    "number": b"7",
    "cut short": f'{{"model": "parrot", "{CANARY}'.encode(),
    "not UTF-8": b'{"model": "parrot", "x": "\xff' + CANARY.encode() + b'"}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"model": "parrot"}'.encode("utf-16"),
    "lone surrogate": b'{"model": "parrot", "x": "\\ud800' + CANARY.encode() + b'"}',
    "member twice": b'{"model": "parrot", "model": "' + CANARY.encode() + b'"}',
    "not a number": b'{"model": "parrot", "temperature": NaN}',
    "infinite": b'{"model": "parrot", "temperature": 1e9999}',
    "huge integer": b'{"model": "parrot", "seed": ' + b"9" * 400 + b"}",
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep within": b'{"model": "parrot", "tools": ' + b"[" * 500 + b"]" * 500 + b"}",
    "NUL behind": b'{"model": "parrot"}\x00',
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", BODIES)
def test_body_that_is_not_one_sane_object(served: Served, path: str, name: str) -> None:
    status, _ = refused(served, path, BODIES[name])
    assert 400 <= status < 500


@pytest.mark.parametrize("path", ROUTES)
def test_ten_megabytes_are_not_read(served: Served, late: Late, path: str) -> None:
    late.engine.calls.clear()
    raw = body(path, CANARY + "x" * (10 << 20))
    with Client(served.path) as client:
        with contextlib.suppress(SSL.Error, OSError):
            client.send(f"POST {path} HTTP/1.1\r\nhost: x\r\n{KEY}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        with contextlib.suppress(SSL.Error, OSError, ConnectionError):  # what lies unread can take the answer with it
            assert client.answer()[0] == 413
    assert not late.engine.calls


VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1.5, -0.0, "", CANARY, "\0" + CANARY, [], [CANARY], {}, {CANARY: CANARY}, [[[]]],
]  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "input", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "stream",
    "stream_options", "user", "store", "provider", "tools", "response_format", "cache_salt", "metadata", CANARY,
)  # fmt: skip


@pytest.mark.parametrize("path", [*ROUTES, "/v1/embeddings", "/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_any_value_anywhere_is_answered_below_500(served: Served, path: str) -> None:
    with Client(served.path) as client:
        for name in FIELDS:
            for value in VALUES:
                if (name, value) == ("stream", True):
                    continue  # an answer of another form, and no bad input
                raw = body(path, **{name: value})
                status, text = client.get(path, method="POST", body=raw, headers=KEY)
                assert status < 500, (name, value, text[:300])
                if status >= 400:
                    assert set(json.loads(text)) >= {"error"}


def test_ten_thousand_messages_are_one_request_like_any_other(served: Served) -> None:
    raw = json.dumps({"model": "parrot", "messages": [{"role": "user", "content": "fine"}] * 10_000}).encode()
    with Client(served.path) as client:
        assert client.get(CHAT, method="POST", body=raw, headers=KEY)[0] in (200, 400)


def test_body_that_comes_slowly_is_given_up(served: Served) -> None:
    with Client(served.path) as client:
        client.send(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{KEY}content-length: 900\r\n\r\n{CANARY}".encode())
        data, _ = client.read_all()
    assert data == b"" or b" 408 " in data


@pytest.mark.parametrize(
    "head",
    [
        "a: b\r\n" * 20_000,
        f"cookie: {CANARY}" + "x" * 100_000 + "\r\n",
        "content-length: 5\r\ncontent-length: 6\r\n",
        "content-length: -1\r\n",
        "content-length: " + "9" * 40 + "\r\n",
        "content-length: 5\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: gzip\r\n",
        f"x y: {CANARY}\r\n",
        f"x: {CANARY}\x00\r\n",
    ],
    ids=range(9),
)
def test_head_that_makes_no_sense_is_refused_or_hung_up_on(served: Served, late: Late, head: str) -> None:
    late.engine.calls.clear()
    with Client(served.path) as client:
        with contextlib.suppress(SSL.Error, OSError):
            client.send(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{KEY}{head}\r\nhello".encode())
        data, _ = client.read_all()
    assert data == b"" or data.split(b" ")[1][:1] == b"4", data[:200]
    assert not late.engine.calls


@pytest.mark.parametrize(
    "line",
    [
        f"GET /{CANARY}%00 HTTP/1.1", f"GET /v1/models/{CANARY} HTTP/1.1", "GET /v1/../v1/models HTTP/1.1",
        "GET //v1/models HTTP/1.1", f"BREW /{CANARY} HTTP/1.1", f"GET /v1/models?{CANARY}=%ff HTTP/1.1",
        f"GET /v1/organization/{CANARY} HTTP/1.1", f"DELETE /v1/responses/{CANARY} HTTP/1.1",
    ],
)  # fmt: skip
def test_path_that_is_none(served: Served, line: str) -> None:
    with Client(served.path) as client:
        client.send(f"{line}\r\nhost: x\r\n{KEY}\r\n".encode())
        status, text = client.answer()
    assert status < 500 and CANARY.encode() not in text
