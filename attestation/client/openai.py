"""Attested HTTP clients for the OpenAI SDK (3.x, on httpx2): `OpenAI(http_client=attested_client(...))`.

The transport talks to one service and to nothing else: another scheme, host or port, as a redirect or a mistyped base
URL would ask for, is refused before anything is dialled. It asks for receipts in band, records the exact bytes of each
inference request and answer, and verifies the receipt when the answer ends; an answer without one is an error. Closing
a finished stream first reads its rest, so that the next request finds the connection open (the sync SDK stops at
`[DONE]` and would otherwise cost a handshake per stream). No proxy or trust setting of the environment is followed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import httpx2

from attestation.client.handshake import NotAttested
from attestation.client.receipts import (
    CREDENTIALS,
    MAX_REST,
    RECEIPT_ID,
    Exchange,
    ReceiptRecorder,
    ReceiptRefused,
    receipt_due,
)
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from attestation.errors import InputError, RefusedError, VouchsafeError
from attestation.policy import Policy

__all__ = [
    "AsyncAttestedClient",
    "AsyncAttestedTransport",
    "AttestedClient",
    "AttestedTransport",
    "async_attested_client",
    "attested_client",
]

Receipts = Literal["verify", "off"]

TIMEOUT: Final = httpx2.Timeout(600.0, connect=30.0)
MAX_RECEIPT: Final = 4 * 1024 * 1024
_ASK: Final = (b"x-vouchsafe-receipt", b"inline")


class AttestedClient(httpx2.Client):
    """An `httpx2.Client` whose every connection is attested. `session` has the verdict, `receipts` the latest one."""

    session: AttestedSession
    receipts: ReceiptRecorder


class AsyncAttestedClient(httpx2.AsyncClient):
    """The async twin of `AttestedClient`."""

    session: AttestedSession
    receipts: ReceiptRecorder


def attested_client(
    target: Target | str,
    *,
    policy: Policy,
    connect: tuple[str, int] | None = None,
    receipts: Receipts = "verify",
    cache_dir: Path | None = None,
    session: AttestedSession | None = None,
    timeout: httpx2.Timeout = TIMEOUT,
) -> AttestedClient:
    """A client for *target* (`https://name:port`) under *policy*; *connect* dials another address than the name's.

    With `receipts="verify"` every inference answer is checked when it ends, and `ReceiptRefused` raised when its
    receipt is missing or says something else. Refused connections raise the library's ConnectError (`find` tells why).
    """
    session = session or AttestedSession(target, policy, connect=connect, cache_dir=cache_dir)
    recorder = ReceiptRecorder()
    transport = AttestedTransport(session, recorder if receipts == "verify" else None)
    client = AttestedClient(transport=transport, base_url=session.target.origin, timeout=timeout, trust_env=False)
    client.session, client.receipts = session, recorder
    return client


def async_attested_client(
    target: Target | str,
    *,
    policy: Policy,
    connect: tuple[str, int] | None = None,
    receipts: Receipts = "verify",
    cache_dir: Path | None = None,
    session: AttestedSession | None = None,
    timeout: httpx2.Timeout = TIMEOUT,
) -> AsyncAttestedClient:
    """As `attested_client`, for `AsyncOpenAI(http_client=…)`."""
    session = session or AttestedSession(target, policy, connect=connect, cache_dir=cache_dir)
    recorder = ReceiptRecorder()
    transport = AsyncAttestedTransport(session, recorder if receipts == "verify" else None)
    client = AsyncAttestedClient(transport=transport, base_url=session.target.origin, timeout=timeout, trust_env=False)
    client.session, client.receipts = session, recorder
    return client


class _Road:
    """What both transports share: where requests may go, and the record of one exchange."""

    def __init__(self, session: AttestedSession, recorder: ReceiptRecorder | None) -> None:
        self.session, self.recorder = session, recorder

    def route(self, request: httpx2.Request, body: bytes) -> httpx2.Request:
        """*request* as dialled: to the target or nowhere, the name in SNI, the receipt asked for."""
        target, url = self.session.target, request.url
        port = url.port or {"https": 443, "http": 80}.get(url.scheme)
        if url.scheme != "https" or url.host.lower().removesuffix(".") != target.name or port != target.port:
            raise InputError(
                "INPUT_TARGET",
                "this client is for another service",
                expected=target.origin,
                actual=f"{url.scheme}://{url.host}:{port}",
                hint="make one client per service; is the base URL right?",
            )
        host, dialled = target.address
        headers = [(k, v) for k, v in request.headers.raw if k.lower() not in (b"accept-encoding", _ASK[0])]
        headers.append((b"Accept-Encoding", b"identity"))  # receipts speak of the bytes as sent
        if self.recorder is not None and _is_inference(request):
            headers.append(_ASK)
        if not any(k.lower() == b"content-length" for k, _ in headers) and body:
            headers = [(k, v) for k, v in headers if k.lower() != b"transfer-encoding"]
            headers.append((b"Content-Length", str(len(body)).encode()))
        return httpx2.Request(
            request.method,
            url.copy_with(host=host, port=dialled),
            headers=headers,
            stream=httpx2.ByteStream(body),
            extensions={**request.extensions, "sni_hostname": target.name},
        )

    def begin(self, request: httpx2.Request, body: bytes, response: httpx2.Response) -> Exchange | None:
        """The record of this answer, None when it is none that a receipt is due for."""
        if self.recorder is None or not _is_inference(request) or response.status_code != 200:
            return None
        connection = _connection(response)
        leaf = hashlib.sha256(connection.leaf).digest()
        bundle = self.session.bundle(leaf)
        if bundle is None:
            raise RefusedError("EVIDENCE_NONE", "the evidence of this connection is not kept any more")
        exchange = Exchange(request.method, request.url.path, leaf, bundle.evidence.keyset, body)
        exchange.receipt_id = response.headers.get("x-receipt-id", "")
        self.recorder.last = exchange
        return exchange

    def receipt_request(self, request: httpx2.Request, exchange: Exchange) -> httpx2.Request:
        """GET the receipt of an answer that was not streamed, with the same credential, on the same road."""
        if not RECEIPT_ID.fullmatch(exchange.receipt_id):
            raise ReceiptRefused(
                RefusedError("RECEIPT_MISSING", "the answer names no receipt", expected="header X-Receipt-Id")
            )
        url = f"{self.session.target.origin}/v1/aci/receipts/{exchange.receipt_id}"
        keep = (*CREDENTIALS, "user-agent")
        headers = {k: v for k, v in request.headers.items() if k.lower() in keep}
        extensions = {"timeout": request.extensions["timeout"]} if "timeout" in request.extensions else {}
        return self.route(
            httpx2.Request("GET", url, headers={**headers, "Host": self.session.target.host}, extensions=extensions),
            b"",
        )


def _is_inference(request: httpx2.Request) -> bool:
    return receipt_due(request.method, request.url.path)


def _is_stream(response: httpx2.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith("text/event-stream")


def _connection(response: httpx2.Response) -> Any:  # Any: an AttestedSocket or AttestedObject
    stream = response.extensions["network_stream"]
    found = stream.get_extra_info("ssl_object") or stream.get_extra_info("socket")
    if not hasattr(found, "attestation"):
        raise RefusedError("CLIENT_INTERNAL", "the answer did not come over an attested connection")
    return found


def _settle(exchange: Exchange) -> None:
    """The answer is complete: its receipt must be there and say the same."""
    exchange.complete = True
    verdict = exchange.verify()
    if not verdict.accepted:
        raise ReceiptRefused.from_verdict(verdict)


def _receipt_body(response: httpx2.Response, parts: list[bytes]) -> bytes | None:
    return b"".join(parts) if response.status_code == 200 else None


class _Done:
    """Sees a stream's end where it is not recorded: see `stream_ends`."""

    def __init__(self) -> None:
        self._tail, self.done = b"\n", False

    def take(self, chunk: bytes) -> None:
        text = self._tail + chunk
        self.done = self.done or b"\ndata: [DONE]" in text or b"\n: vouchsafe receipt=" in text
        self._tail = text[-24:]


class AttestedTransport(httpx2.BaseTransport):
    """Sync transport to one attested service. *recorder* None: receipts are neither asked for nor checked."""

    def __init__(self, session: AttestedSession, recorder: ReceiptRecorder | None) -> None:
        self._road = _Road(session, recorder)
        self._inner = httpx2.HTTPTransport(verify=session.context(), trust_env=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        body = b"".join(request.stream)
        response = self._inner.handle_request(self._road.route(request, body))
        try:
            exchange = self._road.begin(request, body, response)
            if exchange is None or _is_stream(response):
                return _with(response, _Stream(response, exchange))
            parts = []
            assert isinstance(response.stream, httpx2.SyncByteStream)
            for chunk in response.stream:
                exchange.take(chunk)
                parts.append(chunk)
            response.stream.close()
            exchange.receipt = self._fetch(request, exchange)
            _settle(exchange)
            return _with(response, httpx2.ByteStream(b"".join(parts)))
        except BaseException:
            response.close()
            raise

    def _fetch(self, request: httpx2.Request, exchange: Exchange) -> bytes | None:
        response = self._inner.handle_request(self._road.receipt_request(request, exchange))
        assert isinstance(response.stream, httpx2.SyncByteStream)
        parts, size = [], 0
        try:
            for chunk in response.stream:
                size += len(chunk)
                if size > MAX_RECEIPT:
                    raise ReceiptRefused(RefusedError("RECEIPT_TOO_LONG", "the receipt is too long"))
                parts.append(chunk)
        finally:
            response.stream.close()
        return _receipt_body(response, parts)

    def close(self) -> None:
        self._inner.close()


class _Stream(httpx2.SyncByteStream):
    """A body that is recorded while it is read, and read to its end when it is closed after `[DONE]`."""

    def __init__(self, response: httpx2.Response, exchange: Exchange | None) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        self._inner, self._exchange = response.stream, exchange
        self._chunks = iter(self._inner)
        self._watch = _Done()
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        while not self._ended:
            chunk = self._next()
            if chunk is not None:
                yield chunk

    def _next(self) -> bytes | None:
        chunk = next(self._chunks, None)
        if chunk is None:
            self._ended = True
            if self._exchange is not None:
                self._exchange.find_inline()
                _settle(self._exchange)
            return None
        self._watch.take(chunk)
        if self._exchange is not None:
            self._exchange.take(chunk)
        return chunk

    def close(self) -> None:
        try:
            rest = 0
            while self._watch.done and not self._ended and rest <= MAX_REST:
                rest += len(self._next() or b"")
        finally:
            self._ended = True
            self._inner.close()


class AsyncAttestedTransport(httpx2.AsyncBaseTransport):
    """Async transport to one attested service; see `AttestedTransport`."""

    def __init__(self, session: AttestedSession, recorder: ReceiptRecorder | None) -> None:
        self._road = _Road(session, recorder)
        self._inner = httpx2.AsyncHTTPTransport(verify=session.context(), trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        body = b"".join([part async for part in request.stream])
        await self._prepare()
        response = await self._inner.handle_async_request(self._road.route(request, body))
        try:
            exchange = self._road.begin(request, body, response)
            if exchange is None or _is_stream(response):
                return _with(response, _AsyncStream(response, exchange))
            parts = []
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            async for chunk in response.stream:
                exchange.take(chunk)
                parts.append(chunk)
            await response.stream.aclose()
            exchange.receipt = await self._fetch(request, exchange)
            _settle(exchange)
            return _with(response, httpx2.ByteStream(b"".join(parts)))
        except BaseException:
            await asyncio.shield(response.aclose())
            raise

    async def _prepare(self) -> None:
        """Fetch what is missing in a thread: inside the handshake it would hold up the whole event loop."""
        if not self._road.session.prepared:
            try:
                await asyncio.to_thread(self._road.session.prepare)
            except VouchsafeError as err:
                raise httpx2.ConnectError(str(err)) from NotAttested(err)

    async def _fetch(self, request: httpx2.Request, exchange: Exchange) -> bytes | None:
        response = await self._inner.handle_async_request(self._road.receipt_request(request, exchange))
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        parts, size = [], 0
        try:
            async for chunk in response.stream:
                size += len(chunk)
                if size > MAX_RECEIPT:
                    raise ReceiptRefused(RefusedError("RECEIPT_TOO_LONG", "the receipt is too long"))
                parts.append(chunk)
        finally:
            await response.stream.aclose()
        return _receipt_body(response, parts)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _AsyncStream(httpx2.AsyncByteStream):
    """The async twin of `_Stream`."""

    def __init__(self, response: httpx2.Response, exchange: Exchange | None) -> None:
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        self._inner, self._exchange = response.stream, exchange
        self._chunks = aiter(self._inner)
        self._watch = _Done()
        self._ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self._ended:
            chunk = await self._next()
            if chunk is not None:
                yield chunk

    async def _next(self) -> bytes | None:
        chunk = await anext(self._chunks, None)
        if chunk is None:
            self._ended = True
            if self._exchange is not None:
                self._exchange.find_inline()
                _settle(self._exchange)
            return None
        self._watch.take(chunk)
        if self._exchange is not None:
            self._exchange.take(chunk)
        return chunk

    async def aclose(self) -> None:
        try:
            rest = 0
            while self._watch.done and not self._ended and rest <= MAX_REST:
                rest += len(await self._next() or b"")
        finally:
            self._ended = True
            await self._inner.aclose()


def _with(response: httpx2.Response, stream: httpx2.SyncByteStream | httpx2.AsyncByteStream) -> httpx2.Response:
    """*response* with another body stream; head and extensions stay."""
    return httpx2.Response(
        response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
    )
