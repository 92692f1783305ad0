"""`/v1/organization/…`: the table of paths, and the way of every call through it.

  (1) the path and method are in the table, or it is a 404
  (2) the bearer token is an admin key that opens now, or it is a 401; keys for inference open nothing here
  (3) query and body are read strictly: a parameter that the operation does not know is a 400 that names it
  (4) the key still opens: it may have been deleted while its body came in
  (5) the operation; its event is durable before the answer leaves

Paths and shapes are OpenAI's, so that its SDKs are the client; `…/api_keys/{key}/rotate` is ours. Runs in the enclave
behind `Gateway`; trusts nobody, and an answer or a log line never repeats what was sent.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, unquote

from enclave.access.keys import bearer
from enclave.access.ledger import Ledger
from enclave.access.organization import AccessError, Organization
from enclave.access.records import AdminKey, ModelLimit
from enclave.api import elsewhere
from enclave.api.admin import fields as f
from enclave.api.admin import operations as op
from enclave.api.admin import usage
from enclave.api.admin.fields import Field, read_fields
from enclave.api.admin.operations import Births, Call, Enforcing
from enclave.api.admin.paging import Ask, List, read_list, read_nothing
from enclave.api.errors import INVALID_KEY, MEDIA_TYPE, NO_RETRY, NO_SCOPE, Refusal, Refused
from enclave.api.exchange import Exchange, Gone, header
from enclave.api.requests import parse

__all__ = ["PREFIX", "Admin"]

PREFIX: Final = "/v1/organization/"
MAX_BODY: Final = 64 << 10
READ_SECONDS: Final = 10.0
_NO_ASK: Final = Ask(1, False, None, None, {}, {})

Run = Callable[..., Awaitable[dict[str, Any]]]  # ...: the call, and one id per `{…}` of the path; Any: JSON values


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table.

    path     below PREFIX; a segment in braces takes an id
    fields   of the body;  unsupported   fields that OpenAI has and this service has no use for
    query    what may be asked of a list; None: it takes no parameter
    """

    method: str
    path: str
    run: Run
    fields: Mapping[str, Field] = field(default_factory=dict)
    unsupported: Collection[str] = ()
    query: List | None = None

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.path.split("/"))

    @property
    def logged(self) -> str:
        """The path as the log may know it."""
        return PREFIX + "/".join("id" if s.startswith("{") else s for s in self.segments)


_RESIDENCY: Final = ("external_key_id", "geography", "residency")
_MEDIA: Final = ("batch_1_day_max_input_tokens", "max_audio_megabytes_per_1_minute", "max_images_per_1_minute")
_SPEND: Final = {
    "threshold_amount": f.CENTS, "currency": f.choice("USD", required=True),
    "interval": f.choice("month", required=True),
}  # fmt: skip
_KINDS: Final = (
    "zero_data_retention", "modified_abuse_monitoring", "enhanced_zero_data_retention",
    "enhanced_modified_abuse_monitoring",
)  # fmt: skip
_RETENTION: Final = {"retention_type": f.choice(*_KINDS, required=True)}
_PROJECT_RETENTION: Final = {"retention_type": f.choice("organization_default", "none", *_KINDS, required=True)}
_PROJECT: Final = "projects/{project}"
_ACCOUNTS: Final = _PROJECT + "/service_accounts"
_ACCOUNT: Final = _ACCOUNTS + "/{account}"
_KEY: Final = _PROJECT + "/api_keys/{key}"

_OPERATIONS: Final = (
    Operation("GET", "projects", op.list_projects, query=op.PROJECTS),
    Operation("POST", "projects", op.create_project, {"name": f.text(required=True)}, _RESIDENCY),
    Operation("GET", _PROJECT, op.get_project),
    Operation("POST", _PROJECT, op.update_project, {"name": f.text()}, _RESIDENCY),
    Operation("POST", _PROJECT + "/archive", op.archive_project),
    Operation("GET", _ACCOUNTS, op.list_accounts, query=op.PLAIN),
    Operation(
        "POST", _ACCOUNTS, op.create_account,
        {"name": f.text(required=True), "create_service_account_only": f.boolean(), "expires_in_seconds": f.EXPIRY},
    ),
    Operation("GET", _ACCOUNT, op.get_account),
    Operation("POST", _ACCOUNT, op.update_account, {"name": f.text(), "role": f.choice("member", "owner")}),
    Operation("DELETE", _ACCOUNT, op.delete_account),
    Operation(
        "POST", _ACCOUNT + "/api_keys", op.create_key,
        {"name": f.text(), "scopes": f.texts(), "expires_in_seconds": f.EXPIRY},
    ),
    Operation("GET", _PROJECT + "/api_keys", op.list_keys, query=op.KEYS),
    Operation("GET", _KEY, op.get_key),
    Operation("POST", _KEY, op.update_key, {"scopes": f.texts(), "expires_in_seconds": f.EXPIRY}),
    Operation("DELETE", _KEY, op.delete_key),
    Operation("POST", _KEY + "/rotate", op.rotate_key, {"grace_seconds": f.GRACE}),
    Operation("GET", "admin_api_keys", op.list_admin_keys, query=op.PLAIN),
    Operation(
        "POST", "admin_api_keys", op.create_admin_key,
        {"name": f.text(required=True), "expires_in_seconds": f.EXPIRY},
    ),
    Operation("GET", "admin_api_keys/{key}", op.get_admin_key),
    Operation("DELETE", "admin_api_keys/{key}", op.delete_admin_key),
    Operation("GET", _PROJECT + "/rate_limits", op.list_limits, query=op.LIMITS),
    Operation(
        "POST", _PROJECT + "/rate_limits/{limit}", op.update_limit,
        {name: f.limit() for name in ModelLimit.__slots__}, _MEDIA,
    ),
    Operation("GET", _PROJECT + "/model_permissions", op.get_permissions),
    Operation(
        "POST", _PROJECT + "/model_permissions", op.update_permissions,
        {"mode": f.choice("allow_list", "deny_list", required=True), "model_ids": f.texts(required=True)},
    ),
    Operation("DELETE", _PROJECT + "/model_permissions", op.delete_permissions),
    Operation("GET", "spend_limit", op.get_spend_limit),
    Operation("POST", "spend_limit", op.update_spend_limit, _SPEND),
    Operation("DELETE", "spend_limit", op.delete_spend_limit),
    Operation("GET", _PROJECT + "/spend_limit", op.get_project_spend_limit),
    Operation("POST", _PROJECT + "/spend_limit", op.update_project_spend_limit, _SPEND),
    Operation("DELETE", _PROJECT + "/spend_limit", op.delete_project_spend_limit),
    Operation("GET", "data_retention", op.get_retention),
    Operation("POST", "data_retention", op.update_retention, _RETENTION),
    Operation("GET", _PROJECT + "/data_retention", op.get_project_retention),
    Operation("POST", _PROJECT + "/data_retention", op.update_project_retention, _PROJECT_RETENTION),
    Operation("GET", "audit_logs", op.list_audit_logs, query=op.AUDIT),
)  # fmt: skip


class Admin:
    """Serves everything under PREFIX.

    models      ids of the models served here, in the order in which their limits are listed
    ledger      says what was spent
    """

    def __init__(self, organization: Organization, models: Collection[str], ledger: Ledger) -> None:
        self._organization = organization
        self._models = tuple(models)
        self._ledger = ledger
        self._enforcing: Enforcing = lambda project, cents: ledger.spend(project).enforcing(cents)
        self._births = Births(organization)

    @staticmethod
    def routes() -> frozenset[tuple[str, str]]:
        """Every (method, path) there is; ids are in braces."""
        pages = frozenset(("GET", PREFIX + path) for path in usage.PAGES)
        return pages | frozenset((o.method, PREFIX + o.path) for o in _OPERATIONS)

    async def serve(self, x: Exchange) -> None:
        """Answer *x*, whose path begins with PREFIX, or raise Refused."""
        page = x.scope["path"].removeprefix(PREFIX)
        if x.scope["method"] == "GET" and page in usage.PAGES:
            await self._page(x, page)
            return
        operation, ids = _find(x)  # (1)
        x.route = operation.logged
        self._key(x)  # (2)
        query = x.scope.get("query_string", b"")
        if operation.query is None:  # (3)
            read_nothing(query)
        ask = _NO_ASK if operation.query is None else read_list(query, operation.query)
        try:
            body = await _body(x, operation) if operation.method == "POST" else {}
        except Gone:
            x.outcome = "client_disconnected"
            return
        key = self._key(x)  # (4)
        call = Call(self._organization, self._models, self._enforcing, self._births, key.id, body, ask)
        try:
            answer = await operation.run(call, *ids)  # (5)
        except AccessError as err:
            raise Refused(_refusal(err)) from None
        await x.answer(200, json.dumps(answer).encode("ascii"))

    async def _page(self, x: Exchange, path: str) -> None:
        """A page of sums, to an administrator or to a key of a project that may read its own."""
        x.route = PREFIX + path
        token = bearer(x.scope["headers"])
        admin = None if token is None else self._organization.admin(token)
        caller = None if token is None else self._organization.caller(token)
        if admin is None and caller is None:
            raise Refused(INVALID_KEY)
        if caller is not None and not caller.may("usage.read"):
            raise Refused(NO_SCOPE)
        made = usage.answer(usage.PAGES[path], x.scope.get("query_string", b""), self._ledger, caller)
        await x.answer(200, json.dumps(made).encode("ascii"))

    def _key(self, x: Exchange) -> AdminKey:
        token = bearer(x.scope["headers"])
        key = None if token is None else self._organization.admin(token)
        if key is None:
            raise Refused(INVALID_KEY)
        return key


def _find(x: Exchange) -> tuple[Operation, tuple[str, ...]]:
    """The row for a request and the ids in its path. Read from the path as it was sent: an id may hold an escaped "/"
    (a model's in a rate limit), and nothing else is written with escapes."""
    path = x.scope.get("raw_path") or quote(x.scope["path"]).encode("ascii")
    sent = path.decode("ascii", "replace").removeprefix(PREFIX).split("/")
    for operation in _OPERATIONS:
        segments = operation.segments
        if operation.method != x.scope["method"] or len(segments) != len(sent):
            continue
        pairs = list(zip(segments, sent, strict=True))
        if all(s == given or (s.startswith("{") and given) for s, given in pairs):
            return operation, tuple(unquote(given) if s == "{limit}" else given for s, given in pairs if s[0] == "{")
    raise Refused(elsewhere.refusal(x.scope["method"], x.scope["path"]))


async def _body(x: Exchange, operation: Operation) -> dict[str, Any]:  # Any: JSON values
    body = await x.read(MAX_BODY, READ_SECONDS)
    if header(x.scope, b"content-encoding") not in (None, b"identity"):
        raise Refused(MEDIA_TYPE)
    if not body and not any(given.required for given in operation.fields.values()):
        return {}
    kind = (header(x.scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refused(MEDIA_TYPE)
    return read_fields(parse(body), operation.fields, operation.unsupported)


def _refusal(err: AccessError) -> Refusal:
    """Its words are ours (`reason`, `expected`, `hint`); `actual` may quote what was sent and stays here. None of
    these goes away by asking again, and SDKs would: they repeat 409 and 429 unless told otherwise."""
    message = err.reason[:1].upper() + err.reason[1:] + (f"; {err.hint}." if err.hint else ".")
    if err.code == "ACCESS_NOT_FOUND":
        return Refusal(404, message, code="not_found")
    if err.code == "ACCESS_TOO_MANY":
        return Refusal(429, message, code="limit_reached", headers=(NO_RETRY,))
    if err.code == "ACCESS_STATE":
        return Refusal(409, message, code="conflict", headers=(NO_RETRY,))
    expected = f" Expected {err.expected}." if err.expected else ""
    return Refusal(400, f"Invalid value.{expected}", code="invalid_value", param=err.reason)
