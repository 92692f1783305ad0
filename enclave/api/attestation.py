"""Evidence routes: public, because nobody needs a key to verify (ratls facts §3.5, `aci/1` §1 and §3).

    GET  /.well-known/vouchsafe/evidence[?keyset=sha256:…]   evidence of this connection, or older
    POST /.well-known/vouchsafe/channel                       proof that this very connection ends in the TD
    GET  /v1/aci/attestation[?nonce=<64 hex>]                 report for third-party verifiers, with a quote of its own

Runs in the enclave; trusts nobody. Bodies and queries are strict and small. Refusals are raised and rendered by the
gateway.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

from attestation import binding
from attestation.attester import AttesterError
from attestation.channel import CHANNEL_PATH, EVIDENCE_PATH
from attestation.errors import FormatError
from attestation.strict_json import exact, load
from enclave.api.errors import Refusal, Refused
from enclave.channel import Allowance, ChannelProver
from enclave.engine.base import ASGIApp, Receive, Scope, Send
from enclave.identity import Connection, Identity
from enclave.producer import Producer

__all__ = ["ACI_PATH", "Attestation"]

ACI_PATH: Final = "/v1/aci/attestation"
MAX_BODY: Final = 4096
BODY_S: Final = 10.0
NONCED_WAITING: Final = 16
CACHED: Final = 8

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_NONCE: Final = re.compile(r"[0-9a-f]{64}")
_BUSY: Final = Refusal(
    503, "The platform could not sign just now.", "server_error", "attester_busy", headers=((b"retry-after", b"2"),)
)
_UNKNOWN_KEYSET: Final = Refusal(404, "No evidence is kept for this keyset.", "not_found", "not_found")


class Attestation:
    """The three routes.

    bundle   keyset digest → bundle, None when it is not kept any more (`Issuer.bundle`)
    """

    def __init__(
        self,
        bundle: Callable[[str | None], bytes | None],
        producer: Producer,
        prover: ChannelProver,
        *,
        allowance: Allowance | None = None,
    ) -> None:
        self._bundle, self._producer, self._prover = bundle, producer, prover
        self._allowance = allowance or Allowance()
        self._cached: dict[str, asyncio.Task[bytes]] = {}
        self._nonced = 0

    @property
    def routes(self) -> Mapping[tuple[str, str], ASGIApp]:
        """For the gateway's table."""
        return {
            ("GET", EVIDENCE_PATH): self.evidence,
            ("POST", CHANNEL_PATH): self.channel,
            ("GET", ACI_PATH): self.aci,
        }

    async def evidence(self, scope: Scope, receive: Receive, send: Send) -> None:
        digest = _one_query(scope, "keyset", _DIGEST)
        connection: Connection = scope["vouchsafe"]
        # This connection's own evidence by default: a swap in between must not mix two certificates.
        raw = self._bundle(digest) if digest is not None else connection.identity.bundle()
        if raw is None:
            raise Refused(_UNKNOWN_KEYSET)
        await _answer(send, raw, b"application/vnd.vouchsafe.bundle+cbor")

    async def channel(self, scope: Scope, receive: Receive, send: Send) -> None:
        _one_query(scope, "", _DIGEST)
        try:
            request = load(await _body(receive), MAX_BODY, "channel request")
            names = {"nonce", "gpu", "binding"}
            exact(request, names, names, "channel request")
        except FormatError as err:
            raise _bad(err.reason) from None
        nonce = _nonce(request["nonce"])
        if not isinstance(request["gpu"], bool) or request["binding"] not in ("exporter", "key"):
            raise _bad("gpu is true or false, binding is exporter or key")
        try:
            answer = await self._prover.prove(scope["vouchsafe"], nonce, gpu=request["gpu"], bound=request["binding"])
        except AttesterError:
            raise Refused(_BUSY) from None
        await _answer(send, answer, b"application/json")

    async def aci(self, scope: Scope, receive: Receive, send: Send) -> None:
        nonce = _one_query(scope, "nonce", _NONCE)
        connection: Connection = scope["vouchsafe"]
        try:
            if nonce is None:
                report = await self._cacheable(connection.identity)
            else:
                report = await self._fresh(connection, nonce)
        except AttesterError:
            raise Refused(_BUSY) from None
        await _answer(send, report, b"application/json")

    async def _cacheable(self, identity: Identity) -> bytes:
        """The report without a nonce: one quote per certificate, however many ask at once."""
        task = self._cached.get(identity.keyset_digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._report(identity, None))
            self._cached[identity.keyset_digest] = task
            while len(self._cached) > CACHED:
                del self._cached[next(iter(self._cached))]
        return await asyncio.shield(task)

    async def _fresh(self, connection: Connection, nonce: str) -> bytes:
        self._allowance.take(connection)
        if self._nonced >= NONCED_WAITING:
            raise Refused(_BUSY)
        self._nonced += 1
        try:
            return await self._report(connection.identity, nonce)
        finally:
            self._nonced -= 1

    async def _report(self, identity: Identity, nonce: str | None) -> bytes:
        """An `aci/1` attestation report. Its quote is made for this statement and nothing else."""
        report_data = binding.statement_report_data(identity.keyset_digest, nonce)
        quote = await self._producer.quote(report_data)
        report: dict[str, Any] = {  # Any: JSON values
            "api_version": "aci/1",
            "workload_keyset_digest": identity.keyset_digest,
            "attestation": {
                "tee_type": "tdx",
                "workload_keyset": json.loads(identity.keyset),
                "report_data": report_data[:32].hex(),
                "source_provenance": dict(identity.provenance),
                "evidence": {"quote": quote.hex(), "event_log": identity.event_log.hex()},
            },
            "service_capabilities": {"supported_e2ee_versions": [], "serving": "direct"},
        }
        return json.dumps(report, separators=(",", ":")).encode()


def _one_query(scope: Scope, name: str, pattern: re.Pattern[str]) -> str | None:
    """The value of the only query parameter *name*, None without a query. Anything else is a 400."""
    raw = scope.get("query_string", b"")
    if not raw:
        return None
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=1)
    except (ValueError, UnicodeDecodeError):
        raise _bad("the query cannot be read") from None
    if len(pairs) != 1 or pairs[0][0] != name or pattern.fullmatch(pairs[0][1]) is None:
        raise _bad(f"the query takes {name}={pattern.pattern} and nothing else" if name else "no query is expected")
    return str(pairs[0][1])


def _nonce(text: object) -> bytes:
    """32 bytes of base64url without padding, canonical (RFC 4648 §5)."""
    if isinstance(text, str) and len(text) == 43 and text.isascii():
        try:
            raw = base64.urlsafe_b64decode(text + "=")
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) == 32 and base64.urlsafe_b64encode(raw).rstrip(b"=").decode() == text:
            return raw
    raise _bad("nonce is 32 bytes in base64url without padding")


async def _body(receive: Receive) -> bytes:
    """The request's body, at most `MAX_BODY` bytes within `BODY_S` seconds."""
    body = b""
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise _bad("the request ended early")
                body += bytes(message.get("body", b""))
                if len(body) > MAX_BODY:
                    raise Refused(Refusal(413, "The request body is too large.", code="request_too_large"))
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise Refused(Refusal(408, "The request body did not arrive in time.", code="request_timeout")) from None


async def _answer(send: Send, body: bytes, content_type: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _bad(reason: str) -> Refused:
    return Refused(Refusal(400, reason[:1].upper() + reason[1:] + ".", code="invalid_value"))
