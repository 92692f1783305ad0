"""A caller without a network: drives an ASGI app directly, with a connection whose identity signs real receipts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation import receipt
from attestation.result import Checks
from enclave.engine.base import ASGIApp, Message

API_KEY = "sk-" + "test-0123456789-" + "a" * 27
CHAT = "/v1/chat/completions"


class Signer:
    """An Ed25519 receipt key of the test run."""

    key_id = "receipt-1"

    def __init__(self, seed: int = 1) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)

    @property
    def public(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


class Identity:
    """What the gateway needs of `enclave.identity.Identity`."""

    def __init__(self, seed: int = 1) -> None:
        self.receipt_signer = Signer(seed)
        public = self.receipt_signer.public
        document = receipt.keyset_document("vouchsafe", 2**40, "receipt-1", public, bytes([seed]) * 32, "demo.test")
        self.keyset = receipt.jcs(document)
        self.keyset_digest = receipt.keyset_digest(self.keyset)


@dataclass
class Connection:
    identity: Identity = field(default_factory=Identity)


@dataclass
class Reply:
    """What came back. *complete* is false when the app left its answer unfinished: the server cuts the connection."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        made = self.json()
        assert set(made) == {"error"}
        error: dict[str, Any] = made["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] is None or isinstance(error["code"], str)
        return error


class Caller:
    """One client on one connection.

    hang_up_after   after so many body writes the client is gone
    """

    def __init__(self, app: ASGIApp, *, key: str | None = API_KEY, connection: Connection | None = None) -> None:
        self.app = app
        self.key = key
        self.connection = connection or Connection()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] = {},
        chunks: list[bytes] | None = None,
        hang_up_after: int | None = None,
    ) -> Reply:
        parts = chunks if chunks is not None else [body or b""]
        sent = {"content-type": "application/json", **headers}
        if self.key is not None:
            sent.setdefault("authorization", f"Bearer {self.key}")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in sent.items()],
            "client": None,
            "server": None,
            "vouchsafe": self.connection,
        }
        reply = Reply()
        gone = asyncio.Event()

        async def receive() -> Message:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                assert reply.status == 0, "two answers"
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                assert len(reply.headers) == len(message["headers"]), "a header stands twice"
            else:
                assert not reply.complete, "bytes after the end"
                if message.get("body"):
                    reply.writes.append(message["body"])
                reply.complete = not message.get("more_body", False)
            if reply.complete or (hang_up_after is not None and len(reply.writes) >= hang_up_after):
                gone.set()
                await asyncio.sleep(0)

        await self.app(scope, receive, send)
        return reply

    async def post(self, path: str, document: Any, **kw: Any) -> Reply:
        return await self.request("POST", path, json.dumps(document).encode(), **kw)

    async def get(self, path: str, **kw: Any) -> Reply:
        return await self.request("GET", path, **kw)

    async def chat(self, text: str = "hello world", *, headers: Mapping[str, str] = {}, **fields: Any) -> Reply:
        return await self.post(CHAT, chat_body(text, **fields), headers=headers)

    async def receipt(self, reply: Reply) -> bytes:
        """The receipt of an earlier answer."""
        fetched = await self.get("/v1/aci/receipts/" + reply.headers["x-receipt-id"])
        assert fetched.status == 200
        return fetched.body

    def verify(self, raw: bytes, *, request: bytes | None, response: bytes | None, allow_cut: bool = False) -> Checks:
        checks = Checks()
        receipt.verify_receipt(
            receipt.Receipt.parse(raw),
            self.connection.identity.keyset,
            request=request,
            response=response,
            checks=checks,
            allow_cut=allow_cut,
        )
        return checks


def chat_body(text: str = "hello world", **fields: Any) -> dict[str, Any]:
    return {"model": "parrot", "messages": [{"role": "user", "content": text}], **fields}
