"""The gateway in front of one echo engine or several, as its tests use it."""

from __future__ import annotations

import hashlib

from enclave.access import KeyCheck
from enclave.api.app import Gateway
from enclave.engine.base import ASGIApp, Engine
from enclave.receipts import ReceiptStore
from tests.enclave.api.client import API_KEY, Reply


def gateway(*engines: Engine, ready: bool = True, public: dict[tuple[str, str], ASGIApp] | None = None) -> Gateway:
    return Gateway(
        engines={engine.model_id: engine for engine in engines},
        access=KeyCheck(hashlib.sha256(API_KEY.encode()).hexdigest()),
        receipts=ReceiptStore(),
        public=public or {},
        ready=lambda: ready,
    )


def events(reply: Reply) -> list[bytes]:
    return [e + b"\n\n" for e in reply.body.split(b"\n\n")[:-1]]
