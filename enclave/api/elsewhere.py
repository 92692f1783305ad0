"""What OpenAI's API has and this service has not: a clear answer, and why.

Static words, chosen by the shape of the path; nothing of the path is repeated. What zero retention forbids says so;
what no model here can do says so; a known path with another method says which it takes. 501 and 5xx are retried by
SDKs unless they are told not to.
"""

from __future__ import annotations

import re
from typing import Final

from enclave.api.errors import NO_RETRY, UNKNOWN_URL, Refusal

__all__ = ["refusal"]

_STORES: Final = (
    "Nothing is stored here: answers, files and conversations are gone when they have been sent, and no setting can "
    "change that."
)
_NO_ENGINE: Final = (
    "No engine here does this. Served are chat completions, completions, embeddings, responses and messages."
)
_ADMIN: Final = (
    "This service has no such object. It administers projects, service accounts, keys, limits, spend limits and logs."
)
_ALERTS: Final = "Spend is not told by mail, which would leave the enclave: ask /v1/organization/costs."

_KEPT: Final = re.compile(
    r"/v1/(?:files|uploads|batches|vector_stores|fine_tuning|evals|threads|assistants|conversations|containers|prompts"
    r"|chatkit|skills|agents|vaults|webhook_endpoints|webhook_event_types|safety|decisions|chat/completions/[^/]+(?:/messages)?|responses/(?!input_tokens$)[^/]+(?:/cancel|/input_items)?"
    r"|messages/batches)(?:/.*)?"
)
_MEDIA: Final = re.compile(
    r"/v1/(?:images|audio|moderations|realtime|videos|video|fine-tunes|edits|engines|live|content_provenance_checks?"
    r"|rerank|score|classify|pooling)(?:/.*)?"
)
_ALERT: Final = re.compile(r"/v1/organization/(?:projects/[^/]+/)?spend_alerts(?:/.*)?")
_ORGANIZATION: Final = re.compile(r"/v1/(?:organization|projects)(?:/.*)?")
_POSTED: Final = re.compile(
    r"/v1/(?:chat/completions|completions|embeddings|responses|responses/input_tokens|messages|messages/count_tokens"
    r"|state/bootstrap|state/unlock)|/tokenize"
)
_GOTTEN: Final = re.compile(r"/v1/models(?:/.+)?|/v1/aci/receipts/.+|/v1/aci/attestation|/v1/state")
_COMPACT: Final = re.compile(r"/v1/responses/compact")


def refusal(method: str, path: str) -> Refusal:
    """For a request that the gateway's table does not have."""
    if _COMPACT.fullmatch(path):
        return _without(_NO_ENGINE)
    for pattern, allowed in ((_POSTED, "POST"), (_GOTTEN, "GET")):
        if pattern.fullmatch(path) and method != allowed:
            return _method(path, allowed)
    if _KEPT.fullmatch(path):
        return Refusal(404, _STORES, code="zero_data_retention")
    if _MEDIA.fullmatch(path):
        return _without(_NO_ENGINE)
    if _ALERT.fullmatch(path):
        return Refusal(404, _ALERTS, code="not_supported")
    if _ORGANIZATION.fullmatch(path):
        return Refusal(404, _ADMIN, code="not_supported")
    return UNKNOWN_URL


def _without(message: str) -> Refusal:
    return Refusal(501, message, "server_error", "not_supported", headers=(NO_RETRY,))


def _method(path: str, allowed: str) -> Refusal:
    if path == "/v1/chat/completions" or path == "/v1/responses":  # their other methods are about what is stored
        message = f"{_STORES} This path takes {allowed}."
    else:
        message = f"This path takes {allowed}."
    return Refusal(405, message, code="method_not_allowed", headers=((b"allow", allowed.encode("ascii")),))
