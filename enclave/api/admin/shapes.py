"""OpenAI's admin objects made of ours. Pure; a key's value comes in from its maker and goes out once.

What OpenAI's shapes have and this service does not: users (a key's owner is a service account, an admin key's is
itself), when a key was last used (`last_used_at` is always null), IP addresses in the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from enclave.access.events import Event
from enclave.access.records import AdminKey, ApiKey, ModelLimit, ModelPermissions, Project, ServiceAccount
from enclave.api.admin.fields import NO_LIMIT

__all__ = [
    "account", "admin_key", "api_key", "audit_log", "deleted", "limit_id", "new_key", "permissions", "project",
    "rate_limit", "retention", "spend_limit", "subject_of",
]  # fmt: skip

Json = dict[str, Any]  # Any: JSON values

_SHOWN: Final = (
    "name", "role", "scopes", "kind", "owner", "expires_at", "permissions", "spend_limit_cents", *ModelLimit.__slots__,
)  # fmt: skip
"""What the audit log tells of an event's data. A digest of a key is not told."""


def project(p: Project) -> Json:
    return {
        "object": "organization.project", "id": p.id, "name": p.name, "created_at": p.created_at,
        "archived_at": p.archived_at, "status": "active" if p.active else "archived",
    }  # fmt: skip


def account(a: ServiceAccount) -> Json:
    return {
        "object": "organization.project.service_account",
        "id": a.id, "name": a.name, "role": a.role, "created_at": a.created_at,
    }  # fmt: skip


def new_key(key: ApiKey, value: str) -> Json:
    """A key of a service account with its value."""
    return {
        "object": "organization.project.service_account.api_key", "id": key.id, "name": key.name,
        "created_at": key.created_at, "expires_at": key.expires_at, "value": value,
    }  # fmt: skip


def api_key(key: ApiKey, owner: ServiceAccount, *, active: bool) -> Json:
    """*active*: whether the project lets its keys in."""
    told = {"id": owner.id, "name": owner.name, "role": owner.role, "created_at": owner.created_at}
    return {
        "object": "organization.project.api_key", "id": key.id, "name": key.name,
        "redacted_value": key.secrets[0].redacted, "created_at": key.created_at, "expires_at": key.expires_at,
        "last_used_at": None, "scopes": sorted(key.scopes), "owner_project_access": "active" if active else "inactive",
        "owner": {"type": "service_account", "service_account": told},
    }  # fmt: skip


def admin_key(key: AdminKey) -> Json:
    owner = {
        "type": "service_account", "object": "organization.service_account", "id": key.id, "name": key.name,
        "role": "owner", "created_at": key.created_at,
    }  # fmt: skip
    return {
        "object": "organization.admin_api_key", "id": key.id, "name": key.name, "redacted_value": key.secret.redacted,
        "created_at": key.created_at, "expires_at": key.expires_at, "last_used_at": None, "owner": owner,
    }  # fmt: skip


def limit_id(model: str) -> str:
    return "rl-" + model


def rate_limit(model: str, limit: ModelLimit) -> Json:
    """All five as integers: two of them are required ones, and a client that reads null as 0 would be wrong."""
    told = {name: getattr(limit, name) for name in ModelLimit.__slots__}
    numbers = {name: NO_LIMIT if value is None else value for name, value in told.items()}
    return {"object": "project.rate_limit", "id": limit_id(model), "model": model, **numbers}


def permissions(given: ModelPermissions | None) -> Json:
    """None were set: a list of denied models with nothing on it says the same."""
    mode = "deny_list" if given is None else given.mode
    ids = [] if given is None else sorted(given.model_ids)
    return {"object": "project.model_permissions", "mode": mode, "model_ids": ids}


def spend_limit(level: str, cents: int, *, enforcing: bool) -> Json:
    """*level*: "organization" or "project"."""
    return {
        "object": f"{level}.spend_limit", "threshold_amount": cents, "currency": "USD", "interval": "month",
        "enforcement": {"status": "enforcing" if enforcing else "inactive"},
    }  # fmt: skip


def retention(level: str) -> Json:
    return {"object": f"{level}.data_retention", "type": "zero_data_retention"}


def deleted(object: str, id: str | None = None) -> Json:
    return {"object": f"{object}.deleted", **({} if id is None else {"id": id}), "deleted": True}


def audit_log(e: Event, projects: Mapping[str, Project]) -> Json:
    """One entry of the audit log; `chain` is ours: its number, its hash, and the hash of the one before."""
    row: Json = {
        "id": e.id, "type": e.type, "effective_at": e.at,
        "actor": {"type": "api_key", "api_key": {"id": e.actor}},
        e.type: {"id": subject_of(e), **_details(e)},
        "chain": {"number": e.number, "hash": e.hash.hex(), "previous": e.previous.hex()},
    }  # fmt: skip
    if e.project in projects:
        row["project"] = {"id": e.project, "name": projects[e.project].name}
    return row


def subject_of(e: Event) -> str:
    """The id of what an event is about, as the API names it."""
    return limit_id(e.subject) if e.type.startswith("rate_limit.") else e.subject


def _details(e: Event) -> Json:
    shown = {name: e.data[name] for name in _SHOWN if name in e.data}
    if e.type.startswith("project.") and "name" in shown:
        shown["title"] = shown["name"]  # OpenAI has both
    if "until" in e.data:
        shown |= {"redacted_value": e.data["redacted"], "previous_value_expires_at": e.data["until"]}
    if e.type.endswith(".created"):
        return {"data": shown}
    return {"changes_requested": shown} if e.type.endswith(".updated") else {}
