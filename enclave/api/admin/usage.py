"""`/v1/organization/usage/…` and `/costs`: the ledger's sums in OpenAI's pages.

An administrator sees all projects. An inference key with the scope `usage.read` sees its own project and no other: that
is how a tenant's program reads its own bill. What this service never does (images, audio, …) has pages as well, and
nothing ever stands on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from urllib.parse import parse_qsl

from enclave.access.ledger import Ledger
from enclave.access.organization import Caller
from enclave.access.pages import Page, Question, QuestionError, page
from enclave.api.errors import Refusal, Refused

__all__ = ["PAGES", "answer"]

MAX_QUERY: Final = 16 << 10

PAGES: Final[dict[str, Page | None]] = {
    "usage/completions": "completions",
    "usage/embeddings": "embeddings",
    "costs": "costs",
    "usage/audio_speeches": None,
    "usage/audio_transcriptions": None,
    "usage/code_interpreter_sessions": None,
    "usage/file_search_calls": None,
    "usage/images": None,
    "usage/moderations": None,
    "usage/vector_stores": None,
    "usage/web_search_calls": None,
}
"""Path below `/v1/organization/` → which page it is; None: one of nothing."""
_OWN: Final = Refusal(
    403, "This API key may read the usage of its own project only.", "permission_error", "insufficient_scope",
    "project_ids",
)  # fmt: skip


def answer(kind: Page | None, query: bytes, ledger: Ledger, caller: Caller | None) -> dict[str, Any]:  # Any: JSON
    """One page. *caller* None: an administrator. Raises Refused."""
    pairs = _pairs(query)
    try:
        question = Question.parse(kind or "completions", _known(pairs) if kind is None else pairs, now=ledger.now())
        if caller is not None:
            question = _narrowed(question, caller)
        made = page(ledger.usage, question)
    except QuestionError as err:
        message = f"Invalid value. Expected {err.expected}." if err.expected else "Invalid or missing value."
        raise Refused(Refusal(400, message, code="invalid_value", param=err.param)) from None
    if kind is None:
        for bucket in made["data"]:
            bucket["results"] = []
    return made


def _narrowed(question: Question, caller: Caller) -> Question:
    own = frozenset({caller.project.id})
    if question.projects is not None and question.projects != own:
        raise Refused(_OWN)
    return replace(question, projects=own)


def _known(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What pages of nothing are asked by (sizes, sources, …) is as good as unasked, but for the times."""
    return [(n, v) for n, v in pairs if n in ("start_time", "end_time", "bucket_width", "limit", "page")]


def _pairs(query: bytes) -> list[tuple[str, str]]:
    if len(query) > MAX_QUERY:
        raise Refused(Refusal(400, "The query is too long.", code="invalid_value"))
    try:
        text = query.decode("ascii")
        return parse_qsl(text, keep_blank_values=True, strict_parsing=True, max_num_fields=500) if text else []
    except ValueError:
        raise Refused(Refusal(400, "The query cannot be read.", code="invalid_value")) from None
