"""Answers of the routes that need no engine: models and receipts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from enclave.api.errors import NO_CREDENTIAL, NO_MODEL, NO_RECEIPT, Refused
from enclave.receipts import ReceiptStore

__all__ = ["model_list", "model_object", "receipt_answer"]


def model_list(ids: Iterable[str], created: int) -> bytes:
    """`GET /v1/models`: ours, because vLLM's shows the path of the weights."""
    return _json({"object": "list", "data": [_model(id, created) for id in ids]})


def model_object(ids: Iterable[str], id: str, created: int) -> bytes:
    """`GET /v1/models/{id}`. Raises Refused 404 `model_not_found`."""
    if id not in ids:
        raise Refused(NO_MODEL)
    return _json(_model(id, created))


async def receipt_answer(store: ReceiptStore, id: str, *, token: bytes | None, owner: str | None) -> bytes:
    """`GET /v1/aci/receipts/{id}` (aci/1). No credential is 401; a wrong one is 404 exactly like an unknown id, so
    that a stranger learns not even that a receipt exists."""
    raw = await store.get(id, owner)
    if raw is not None:
        return raw
    raise Refused(NO_CREDENTIAL if token is None else NO_RECEIPT)


def _model(id: str, created: int) -> dict[str, Any]:  # Any: JSON values
    return {"id": id, "object": "model", "created": created, "owned_by": "vouchsafe", "zero_data_retention": True}


def _json(document: dict[str, Any]) -> bytes:  # Any: JSON values
    return json.dumps(document).encode("ascii")
