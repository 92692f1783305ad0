"""The inference routes: what a caller may ask, and which of the engine's routes answers it.

A surface is a path of ours. Two are answered in another form than the engine's chat: they come with a translation
(`enclave.api.dialect`) and end as a chat request like any other, so nothing reaches an engine by a second road.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from enclave.access.entries import Operation
from enclave.access.keys import bearer
from enclave.api import messages, responses
from enclave.api.dialect import Dialect
from enclave.api.embeddings import EMBEDDINGS
from enclave.api.errors import Refusal
from enclave.api.requests import CHAT, COMPLETIONS, Route

__all__ = ["SURFACES", "Surface"]

Headers = Iterable[tuple[bytes, bytes]]
Translate = Callable[..., tuple[dict[str, Any], Dialect]]  # (document, *, id, created); Any: JSON values


@dataclass(frozen=True, slots=True)
class Surface:
    """One inference route.

    path        what is asked;  route   what the engine is asked
    operation   the usage page it stands on;  name   of the operation in metrics (OpenTelemetry GenAI)
    translate   None when the engine's form is the caller's; `prefix` begins the ids of its answers then
    token       finds the caller's credential;  error_body   how an error looks on this route
    """

    path: str
    route: Route
    operation: Operation = "completions"
    translate: Translate | None = None
    prefix: str = ""
    token: Callable[[Headers], bytes | None] = bearer
    error_body: Callable[[Refusal], bytes] = Refusal.body


SURFACES: Final = (
    Surface(CHAT.path, CHAT),
    Surface(COMPLETIONS.path, COMPLETIONS),
    Surface(EMBEDDINGS.path, EMBEDDINGS, operation="embeddings"),
    Surface(responses.RESPONSES_PATH, CHAT, translate=responses.translate, prefix="resp_"),
    Surface(
        messages.MESSAGES_PATH, CHAT, translate=messages.translate, prefix="msg_", token=messages.token,
        error_body=messages.error_body,
    ),
)  # fmt: skip
