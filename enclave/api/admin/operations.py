"""The operations of the admin API: each a function of a call and the ids in its path, which answers with JSON.

Whatever is named in a path is looked up under its project: an id of another project is as unknown as one that never
was. Commands raise `AccessError` for what the organisation refuses; `routes` turns that into an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from enclave.access.checks import find
from enclave.access.events import Event
from enclave.access.organization import AccessError, Organization
from enclave.access.records import ApiKey, ModelLimit, ModelPermissions, Project, ServiceAccount
from enclave.api.admin import shapes
from enclave.api.admin.fields import NO_LIMIT, invalid
from enclave.api.admin.paging import Ask, List, rows_of, told
from enclave.api.errors import Refusal, Refused

__all__ = ["Births", "Call", "Enforcing"]

Json = dict[str, Any]  # Any: JSON values
Enforcing = Callable[[str | None, int], bool]
"""Whether a spend limit in cents, of a project or (None) of the organisation, stops requests now."""

WHAT_IS_KEPT: Final = Refusal(
    403, "Nothing is retained here, and no setting can change that.", "permission_error", "zero_data_retention",
    "retention_type",
)  # fmt: skip
_AUDIT_ID: Final = re.compile(r"audit_log-([0-9]{8,12})")
_SECONDS: Final = re.compile(r"[0-9]{1,11}")
_BOOLEAN: Final = re.compile(r"true|false")

PLAIN: Final = List()
LIMITS: Final = List(limit=100)
PROJECTS: Final = List(one={"include_archived": _BOOLEAN})
KEYS: Final = List(one={"owner_project_access": re.compile("active|inactive|any")})
AUDIT: Final = List(
    newest_first=True,
    one={f"effective_at[{how}]": _SECONDS for how in ("gt", "gte", "lt", "lte")} | {"tenant_only": _BOOLEAN},
    many=("project_ids", "event_types", "actor_ids", "actor_emails", "resource_ids"),
)


class Births:
    """When each object was made, as the number of its event: the position of its row, also after it was deleted."""

    def __init__(self, organization: Organization) -> None:
        self._organization = organization
        self._born: dict[str, int] = {}
        self._seen = 0

    def of(self, id: str) -> int | None:
        events = self._organization.events
        while self._seen < len(events):
            event = events[self._seen]
            self._seen = event.number
            if event.type.endswith(".created"):
                self._born[event.subject] = event.number
        return self._born.get(id)


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated call. *actor* is the id of its admin key; *body* and *ask* have been read strictly."""

    organization: Organization
    models: Sequence[str]
    enforcing: Enforcing
    births: Births
    actor: str
    body: Json
    ask: Ask

    def project(self, id: str) -> Project:
        return find(self.organization.projects, id, "project")

    def account(self, project: str, id: str) -> ServiceAccount:
        self.project(project)
        found = find(self.organization.accounts, id, "service account")
        if found.project_id != project:
            raise AccessError("ACCESS_NOT_FOUND", "no such service account")
        return found

    def key(self, project: str, id: str) -> ApiKey:
        self.project(project)
        found = find(self.organization.keys, id, "key")
        if found.project_id != project or found.revoked_at is not None:
            raise AccessError("ACCESS_NOT_FOUND", "no such key")
        return found

    def page(self, rows: Sequence[Any], shape: Callable[[Any], Json]) -> Json:  # Any: records that have an id
        """The page of *rows*, given in the order in which they were made."""
        shown, more = rows_of(rows, self.ask, position=lambda row: self.births.of(row.id) or 0, at=self.births.of)
        return told([shape(row) for row in shown], more)


# projects


async def list_projects(c: Call) -> Json:
    everything = c.ask.one.get("include_archived") == "true"
    return c.page([p for p in c.organization.projects.values() if everything or p.active], shapes.project)


async def create_project(c: Call) -> Json:
    return shapes.project(await c.organization.create_project(c.actor, c.body["name"]))


async def get_project(c: Call, project: str) -> Json:
    return shapes.project(c.project(project))


async def update_project(c: Call, project: str) -> Json:
    if not c.body:
        return shapes.project(c.project(project))
    return shapes.project(await c.organization.update_project(c.actor, project, **c.body))


async def archive_project(c: Call, project: str) -> Json:
    return shapes.project(await c.organization.archive_project(c.actor, project))


# service accounts


async def list_accounts(c: Call, project: str) -> Json:
    id = c.project(project).id
    return c.page([a for a in c.organization.accounts.values() if a.project_id == id], shapes.account)


async def create_account(c: Call, project: str) -> Json:
    """With a first key, unless that is not wanted; such an account has the role "none", as at OpenAI."""
    seconds, bare = c.body.get("expires_in_seconds"), c.body.get("create_service_account_only", False)
    if bare and seconds is not None:
        invalid("expires_in_seconds", "null when create_service_account_only is true")
    o = c.organization
    made = await o.create_account(c.actor, project, c.body["name"], "none" if bare else "member")
    if bare:
        return {**shapes.account(made), "api_key": None}
    try:
        key, secret = await o.create_key(c.actor, made.id, "Secret Key", seconds=seconds)
    except AccessError:
        await o.delete_account(c.actor, made.id)  # half of what was asked for is not what was asked for
        raise
    return {**shapes.account(made), "api_key": shapes.new_key(key, secret.value)}


async def get_account(c: Call, project: str, account: str) -> Json:
    return shapes.account(c.account(project, account))


async def update_account(c: Call, project: str, account: str) -> Json:
    found = c.account(project, account)
    if not c.body:
        return shapes.account(found)
    return shapes.account(await c.organization.update_account(c.actor, found.id, **c.body))


async def delete_account(c: Call, project: str, account: str) -> Json:
    found = c.account(project, account)
    await c.organization.delete_account(c.actor, found.id)
    return shapes.deleted("organization.project.service_account", found.id)


async def create_key(c: Call, project: str, account: str) -> Json:
    owner = c.account(project, account)
    key, made = await c.organization.create_key(
        c.actor, owner.id, c.body.get("name", "Secret Key"), scopes=c.body.get("scopes"),
        seconds=c.body.get("expires_in_seconds"),
    )  # fmt: skip
    return shapes.new_key(key, made.value)


# keys


def _shape(c: Call, key: ApiKey) -> Json:
    project = c.organization.projects[key.project_id]
    return shapes.api_key(key, c.organization.accounts[key.owner_id], active=project.active)


async def list_keys(c: Call, project: str) -> Json:
    access = "active" if c.project(project).active else "inactive"
    wanted = c.ask.one.get("owner_project_access", "any") in (access, "any")
    keys = [k for k in c.organization.keys.values() if k.project_id == project and k.revoked_at is None]
    return c.page(keys if wanted else [], lambda key: _shape(c, key))


async def get_key(c: Call, project: str, key: str) -> Json:
    return _shape(c, c.key(project, key))


async def update_key(c: Call, project: str, key: str) -> Json:
    found = c.key(project, key)
    if not c.body:
        return _shape(c, found)
    changed = await c.organization.update_key(
        c.actor, found.id, scopes=c.body.get("scopes"), seconds=c.body.get("expires_in_seconds")
    )
    return _shape(c, changed)


async def rotate_key(c: Call, project: str, key: str) -> Json:
    """Ours: a new value for a key, in `value`; the old one opens it until `previous_value_expires_at`."""
    found = c.key(project, key)
    changed, made = await c.organization.rotate_key(c.actor, found.id, c.body["grace_seconds"])
    return {**_shape(c, changed), "value": made.value, "previous_value_expires_at": changed.secrets[1].until}


async def delete_key(c: Call, project: str, key: str) -> Json:
    found = c.key(project, key)
    await c.organization.revoke_key(c.actor, found.id)
    return shapes.deleted("organization.project.api_key", found.id)


# admin keys


async def list_admin_keys(c: Call) -> Json:
    return c.page(list(c.organization.admin_keys.values()), shapes.admin_key)


async def create_admin_key(c: Call) -> Json:
    key, made = await c.organization.create_admin_key(c.actor, c.body["name"], c.body.get("expires_in_seconds"))
    return {**shapes.admin_key(key), "value": made.value}


async def get_admin_key(c: Call, key: str) -> Json:
    return shapes.admin_key(find(c.organization.admin_keys, key, "admin key"))


async def delete_admin_key(c: Call, key: str) -> Json:
    await c.organization.delete_admin_key(c.actor, key)
    return shapes.deleted("organization.admin_api_key", key)


# limits


async def list_limits(c: Call, project: str) -> Json:
    limits = c.project(project).limits
    places = {shapes.limit_id(model): i for i, model in enumerate(c.models)}
    shown, more = rows_of(range(len(c.models)), c.ask, position=lambda i: i, at=places.get)
    return told([shapes.rate_limit(c.models[i], limits.get(c.models[i], ModelLimit())) for i in shown], more)


async def update_limit(c: Call, project: str, limit: str) -> Json:
    c.project(project)
    model = next((m for m in c.models if shapes.limit_id(m) == limit), None)
    if model is None:
        raise AccessError("ACCESS_NOT_FOUND", "no such rate limit")
    changes = {name: None if value == NO_LIMIT else value for name, value in c.body.items()}
    return shapes.rate_limit(model, await c.organization.update_limit(c.actor, project, model, changes))


async def get_permissions(c: Call, project: str) -> Json:
    return shapes.permissions(c.project(project).permissions)


async def update_permissions(c: Call, project: str) -> Json:
    # A slip of the pen in a list of denied models would allow what was to be denied.
    if not set(c.body["model_ids"]) <= set(c.models):
        invalid("model_ids", "ids of models that are served here")
    given = ModelPermissions(c.body["mode"], frozenset(c.body["model_ids"]))
    return shapes.permissions((await c.organization.update_project(c.actor, project, permissions=given)).permissions)


async def delete_permissions(c: Call, project: str) -> Json:
    """Also when there are none."""
    if c.project(project).permissions is not None:
        await c.organization.update_project(c.actor, project, permissions=None)
    return shapes.deleted("project.model_permissions")


def _limited(cents: int | None) -> int:
    if cents is None:
        raise AccessError("ACCESS_NOT_FOUND", "no spend limit is set")
    return cents


def _spend(c: Call, project: str | None, cents: int | None) -> Json:
    limit = _limited(cents)
    level = "organization" if project is None else "project"
    return shapes.spend_limit(level, limit, enforcing=c.enforcing(project, limit))


async def get_spend_limit(c: Call) -> Json:
    return _spend(c, None, c.organization.spend_limit_cents)


async def update_spend_limit(c: Call) -> Json:
    await c.organization.set_spend_limit(c.actor, c.body["threshold_amount"])
    return _spend(c, None, c.body["threshold_amount"])


async def delete_spend_limit(c: Call) -> Json:
    _limited(c.organization.spend_limit_cents)
    await c.organization.set_spend_limit(c.actor, None)
    return shapes.deleted("organization.spend_limit")


async def get_project_spend_limit(c: Call, project: str) -> Json:
    return _spend(c, project, c.project(project).spend_limit_cents)


async def update_project_spend_limit(c: Call, project: str) -> Json:
    cents = c.body["threshold_amount"]
    await c.organization.update_project(c.actor, project, spend_limit_cents=cents)
    return _spend(c, project, cents)


async def delete_project_spend_limit(c: Call, project: str) -> Json:
    _limited(c.project(project).spend_limit_cents)
    await c.organization.update_project(c.actor, project, spend_limit_cents=None)
    return shapes.deleted("project.spend_limit")


# retention


async def get_retention(c: Call) -> Json:
    return shapes.retention("organization")


async def update_retention(c: Call) -> Json:
    if c.body["retention_type"] != "zero_data_retention":
        raise Refused(WHAT_IS_KEPT)
    return shapes.retention("organization")


async def get_project_retention(c: Call, project: str) -> Json:
    c.project(project)
    return shapes.retention("project")


async def update_project_retention(c: Call, project: str) -> Json:
    c.project(project)
    if c.body["retention_type"] not in ("zero_data_retention", "organization_default"):
        raise Refused(WHAT_IS_KEPT)
    return shapes.retention("project")


# the audit log


async def list_audit_logs(c: Call) -> Json:
    """Newest first. What this service does not have (users' mail addresses, tenants) matches nothing."""
    events = c.organization.events
    keep = _filter(c.ask.one, c.ask.many)

    def at(cursor: str) -> int | None:
        form = _AUDIT_ID.fullmatch(cursor)
        number = int(form.group(1)) if form else 0
        return number if 1 <= number <= len(events) and events[number - 1].id == cursor else None

    shown, more = rows_of(events, c.ask, position=lambda e: e.number, at=at, keep=keep)
    return told([shapes.audit_log(e, c.organization.projects) for e in shown], more)


def _filter(one: Mapping[str, str], many: Mapping[str, frozenset[str]]) -> Callable[[Event], bool]:
    if "actor_emails" in many or one.get("tenant_only") == "true":
        return lambda e: False
    above = max(
        [int(v) + (how == "gt") for how in ("gt", "gte") if (v := one.get(f"effective_at[{how}]")) is not None],
        default=0,
    )
    below = min(
        [int(v) - (how == "lt") for how in ("lt", "lte") if (v := one.get(f"effective_at[{how}]")) is not None],
        default=10**12,
    )
    projects, types = many.get("project_ids"), many.get("event_types")
    actors, subjects = many.get("actor_ids"), many.get("resource_ids")

    def keep(e: Event) -> bool:
        return (
            above <= e.at <= below
            and (projects is None or e.project in projects)
            and (types is None or e.type in types)
            and (actors is None or e.actor in actors)
            and (subjects is None or shapes.subject_of(e) in subjects)
        )

    return keep
