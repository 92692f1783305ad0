"""Refusals in OpenAI's error shape: four keys, `code` a string or null, no exception text, no echo of the request.

    {"error": {"message": str, "type": str, "param": str | null, "code": str | null}}

A message is written here or is the engine's own answer to the same caller (4xx only); it goes inside the attested
channel to whoever sent the request, and never to a log: telemetry takes the code alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

__all__ = [
    "Refusal",
    "Refused",
    "engine_refusal",
    "error_event",
    "other_task",
    "over_limit",
    "refusal_from_engine_event",
    "unavailable",
]

_PARAM: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\[\]-]{0,63}")
MAX_MESSAGE: Final = 600
NO_RETRY: Final = (b"x-should-retry", b"false")
CLOSE: Final = (b"connection", b"close")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is an error, rendered once by the gateway.

    headers   extra response headers, for retries
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        param = self.param if self.param is not None and _PARAM.fullmatch(self.param) else None
        return json.dumps(
            {"error": {"message": self.message, "type": self.type, "param": param, "code": self.code}}
        ).encode("utf-8")


class Refused(Exception):
    """Carries a Refusal up to the gateway. Made anew each time: an exception keeps the frames it passed through, so a
    shared one would keep the last request."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal.code)


UNKNOWN_URL: Final = Refusal(404, "Unknown request URL.", code="unknown_url")
INVALID_KEY: Final = Refusal(
    401,
    "Incorrect API key provided.",
    code="invalid_api_key",
    headers=((b"www-authenticate", b"Bearer"),),
)
NO_MODEL: Final = Refusal(404, "The model does not exist or you do not have access to it.", code="model_not_found")
NOT_ALLOWED: Final = Refusal(
    403, "Your project does not have access to this model.", "permission_error", "model_not_allowed", "model"
)
NO_SCOPE: Final = Refusal(
    403, "This API key does not have the scope for this request.", "permission_error", "insufficient_scope"
)
TOO_LARGE: Final = Refusal(413, "The request body is too large.", code="request_too_large", headers=(NO_RETRY, CLOSE))
TOO_SLOW: Final = Refusal(
    408, "The request body did not arrive in time.", code="request_timeout", headers=(NO_RETRY, CLOSE)
)
MEDIA_TYPE: Final = Refusal(
    415, "The request body must be application/json without content-encoding.", code="unsupported_media_type"
)
NOT_JSON: Final = Refusal(400, "The request body is not one JSON object.", code="invalid_json")
UNAVAILABLE: Final = Refusal(
    503, "The engine of this model is not available.", "server_error", "engine_unavailable", headers=(NO_RETRY,)
)
BUSY: Final = Refusal(
    503, "Too many requests are being served.", "server_error", "overloaded", headers=((b"retry-after", b"1"),)
)
INTERNAL: Final = Refusal(500, "The server had an error while processing the request.", "server_error", "server_error")
NO_CREDENTIAL: Final = Refusal(401, "A receipt needs the API key of its request.", "unauthorized", "unauthorized")
NO_RECEIPT: Final = Refusal(404, "No such receipt.", "not_found", "not_found")


def unavailable(retry_after: int | None) -> Refusal:
    """503 for one model: come back in *retry_after* seconds, or do not (None)."""
    if retry_after is None:
        return UNAVAILABLE
    return replace(UNAVAILABLE, headers=((b"retry-after", str(retry_after).encode("ascii")),))


def other_task(path: str, serving: Sequence[str]) -> Refusal:
    """404 for a model that is served here, but not on this route; *serving* are those that are."""
    named = f"Models that do: {', '.join(serving)}." if serving else "No model here does."
    message = f"This model is not served on {path}. {named}"
    return Refusal(404, message, code="model_not_supported", param="model")


def over_limit(
    kind: str, limit: int, retry_after_ms: int | None, headers: Iterable[tuple[bytes, bytes]] = ()
) -> Refusal:
    """429 for a limit of the project, with the time until the request fits; None: it never will."""
    what = kind.replace("_", " ")
    if retry_after_ms is None:
        message = f"The request is larger than the limit of {what}: {limit}."
        retry: tuple[tuple[bytes, bytes], ...] = (NO_RETRY,)
    else:
        seconds = -(-retry_after_ms // 1000)
        message = f"The limit of {what} is reached: {limit}. Try again in {seconds} s."
        retry = ((b"retry-after-ms", str(retry_after_ms).encode()), (b"retry-after", str(seconds).encode()))
    return Refusal(429, message, "rate_limit_error", "rate_limit_exceeded", headers=(*retry, *headers))


def engine_refusal(status: int, body: bytes) -> Refusal:
    """Our form of an engine's error answer. Its words are kept for 4xx only, where they are about the caller's own
    input; a 5xx gets a sentence of ours, because the engine's may quote an exception."""
    if status == 503:
        return UNAVAILABLE
    error = _error(body)
    message = error.get("message")
    text = message[:MAX_MESSAGE] if isinstance(message, str) and message else "The engine refused the request."
    param = error.get("param")
    name = param.removeprefix("body.") if isinstance(param, str) else None
    if status == 501:
        return Refusal(400, "The engine does not support this request.", code="unsupported_parameter", param=name)
    if status not in (400, 413, 422):  # 5xx; or 401, 404 and the like: the engine sees only requests it must know
        return INTERNAL
    too_long = "context length" in text or "max_model_len" in text
    return Refusal(400, text, code="context_length_exceeded" if too_long else "invalid_value", param=name)


def refusal_from_engine_event(event: bytes) -> Refusal | None:
    """The refusal that an SSE event of the engine announces, None when it is an ordinary event.

    vLLM reports a failure in mid-stream as `data: {"error": …}` and then says `[DONE]` as if all were well."""
    if b'"error"' not in event[:24]:
        return None
    error = _error(event.removeprefix(b"data:").strip())
    if not error:
        return None
    status = error.get("code")
    return engine_refusal(status if isinstance(status, int) else 500, event.removeprefix(b"data:").strip())


def error_event(refusal: Refusal) -> bytes:
    """The last event of a stream that failed: no `[DONE]` follows it, and the connection is cut."""
    return b"data: " + refusal.body() + b"\n\n"


def _error(body: bytes) -> Mapping[str, Any]:  # Any: JSON values
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) else {}
