"""One organisation: projects, service accounts and keys, held in memory and changed by events alone.

A command checks, makes an event, has it appended (durable when that returns), and only then takes effect; commands run
one after the other. Replay applies the same events through the same code. Reading takes no lock and no I/O: a request
finds its key by one look-up of a keyed hash.

Whoever holds an open stream can watch its key: `watch` gives a future that is done when the key stops to open.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from enclave.access.checks import (
    AccessError,
    check_name,
    check_number,
    check_role,
    check_scopes,
    find,
    fresh,
    read_permissions,
    room,
    told_permissions,
)
from enclave.access.events import GENESIS, Event, EventError
from enclave.access.records import (
    DEFAULT_SCOPES,
    AdminKey,
    ApiKey,
    ModelLimit,
    Project,
    Role,
    Secret,
    ServiceAccount,
)
from enclave.access.secrets import Made, Pepper, kind_of

__all__ = ["AccessError", "Caller", "Organization"]

MAX_PROJECTS: Final = 1000
MAX_ACCOUNTS: Final = 1000
MAX_KEYS: Final = 10_000
DAY: Final = 86_400
MAX_GRACE: Final = 7 * DAY
MAX_SECONDS: Final = 31_536_000
"""How long a key that expires may last."""
LOOK_SECONDS: Final = 0.5
"""How late a stream may learn that its key has expired."""
MAX_CENTS: Final = 10**12
BOOTSTRAP: Final = "bootstrap"

Append = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, found by a key that opens now. Holding one proves nothing about a moment later: see `watch`.

    digest   of the secret that opened the key
    """

    key: ApiKey
    project: Project
    digest: bytes = field(repr=False)

    def may(self, scope: str) -> bool:
        return scope in self.key.scopes

    def may_use(self, model: str) -> bool:
        """Whether the project's permissions let it ask *model*."""
        return self.project.permissions is None or self.project.permissions.allow(model)


class Organization:
    """See the module. *append* stores one event durably; *clock* gives unix seconds."""

    def __init__(self, pepper: Pepper, append: Append, clock: Callable[[], int]) -> None:
        self._pepper, self._append, self._clock = pepper, append, clock
        self._lock = asyncio.Lock()
        self._events: list[Event] = []
        self._head = GENESIS
        self.projects: dict[str, Project] = {}
        self.accounts: dict[str, ServiceAccount] = {}
        self.keys: dict[str, ApiKey] = {}
        self.admin_keys: dict[str, AdminKey] = {}
        self.spend_limit_cents: int | None = None
        self._by_digest: dict[bytes, str] = {}
        self._admin_by_digest: dict[bytes, str] = {}
        self._watchers: dict[str, dict[asyncio.Future[None], bytes]] = {}
        self._looking: asyncio.TimerHandle | None = None

    # reading

    @property
    def bootstrapped(self) -> bool:
        """Whether there ever was an admin key."""
        return bool(self._events)

    @property
    def events(self) -> Sequence[Event]:
        """The audit log, oldest first."""
        return self._events

    def caller(self, token: bytes) -> Caller | None:
        """Who *token* (an inference key's value) belongs to; None for an unknown, expired or revoked one."""
        if kind_of(token) != "inference":
            return None
        digest = self._pepper.digest(token)
        key = self.keys.get(self._by_digest.get(digest, ""))
        if key is None or not key.open_at(self._clock(), digest):
            return None
        project = self.projects[key.project_id]
        return Caller(key, project, digest) if project.active else None

    def admin(self, token: bytes) -> AdminKey | None:
        """The admin key with this value, None for an unknown or expired one."""
        if kind_of(token) != "admin":
            return None
        key = self.admin_keys.get(self._admin_by_digest.get(self._pepper.digest(token), ""))
        now = self._clock()
        return None if key is None or (key.expires_at is not None and now >= key.expires_at) else key

    def watch(self, caller: Caller) -> asyncio.Future[None]:
        """Done when what let *caller* in would not let it in any more: at once when its key is revoked or deleted or
        its project archived, within LOOK_SECONDS when key or secret expire. Forget it with `unwatch`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if not self._opens(caller.key.id, caller.digest):
            future.set_result(None)
            return future
        self._watchers.setdefault(caller.key.id, {})[future] = caller.digest
        if self._looking is None:
            self._looking = loop.call_later(LOOK_SECONDS, self._look)
        return future

    def unwatch(self, caller: Caller, future: asyncio.Future[None]) -> None:
        waiting = self._watchers.get(caller.key.id)
        if waiting is not None:
            waiting.pop(future, None)
            if not waiting:
                del self._watchers[caller.key.id]

    def _opens(self, key_id: str, digest: bytes) -> bool:
        key = self.keys.get(key_id)
        return key is not None and key.open_at(self._clock(), digest) and self.projects[key.project_id].active

    def _look(self) -> None:
        """Once in a while, as long as anybody watches: time alone closes keys too."""
        for id, waiting in list(self._watchers.items()):
            for future, digest in list(waiting.items()):
                if not self._opens(id, digest):
                    del waiting[future]
                    _done(future)
            if not waiting:
                del self._watchers[id]
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(LOOK_SECONDS, self._look) if self._watchers else None

    # commands

    async def bootstrap(self) -> tuple[AdminKey, Made]:
        """The first admin key. Raises `AccessError` when there ever was one: that it works once is kept in the log."""
        async with self._lock:
            if self.bootstrapped:
                raise AccessError("ACCESS_STATE", "the organisation has been set up already")
            return await self._new_admin_key(BOOTSTRAP, "first admin key", None)

    async def create_admin_key(self, actor: str, name: str, seconds: int | None = None) -> tuple[AdminKey, Made]:
        async with self._lock:
            check_number("expires_in_seconds", seconds, 1, MAX_SECONDS)
            room(self.admin_keys, MAX_KEYS, "admin keys")
            return await self._new_admin_key(
                actor, check_name(name), None if seconds is None else self._clock() + seconds
            )

    async def delete_admin_key(self, actor: str, id: str) -> None:
        """The last one that lasts another day cannot be deleted: nobody could administer the organisation then."""
        async with self._lock:
            find(self.admin_keys, id, "admin key")
            now = self._clock()
            left = [
                k for k in self.admin_keys.values() if k.id != id and (k.expires_at is None or k.expires_at > now + DAY)
            ]
            if not left:
                raise AccessError("ACCESS_STATE", "this is the last admin key", hint="create another one first")
            await self._do("api_key.deleted", actor, id, "", {"kind": "admin"})

    async def create_project(self, actor: str, name: str) -> Project:
        async with self._lock:
            room(self.projects, MAX_PROJECTS, "projects")
            id = _new_id("proj")
            await self._do("project.created", actor, id, id, {"name": check_name(name)})
            return self.projects[id]

    async def update_project(self, actor: str, id: str, **changes: Any) -> Project:  # Any: as named below
        """*changes*: name, permissions (ModelPermissions or None), spend_limit_cents (int or None)."""
        async with self._lock:
            self._active_project(id)
            data: dict[str, Any] = {}  # Any: JSON values
            if "name" in changes:
                data["name"] = check_name(changes["name"])
            if "permissions" in changes:
                data["permissions"] = told_permissions(changes["permissions"])
            if "spend_limit_cents" in changes:
                check_number("threshold_amount", changes["spend_limit_cents"], 0, MAX_CENTS)
                data["spend_limit_cents"] = changes["spend_limit_cents"]
            if not data or changes.keys() - data.keys():
                raise AccessError("ACCESS_INVALID", "nothing to change, or nothing that can be changed")
            await self._do("project.updated", actor, id, id, data)
            return self.projects[id]

    async def archive_project(self, actor: str, id: str) -> Project:
        """For good: its keys stop to open at once."""
        async with self._lock:
            self._active_project(id)
            await self._do("project.archived", actor, id, id, {})
            return self.projects[id]

    async def set_spend_limit(self, actor: str, cents: int | None) -> None:
        """What the whole organisation may spend in a calendar month; None: no limit."""
        async with self._lock:
            check_number("threshold_amount", cents, 0, MAX_CENTS)
            await self._do("organization.updated", actor, "organization", "", {"spend_limit_cents": cents})

    async def set_limit(self, actor: str, project_id: str, model: str, limit: ModelLimit | None) -> None:
        """Limits of *model* in a project; None removes them."""
        async with self._lock:
            self._active_project(project_id)
            await self._limit(actor, project_id, model, limit)

    async def update_limit(
        self, actor: str, project_id: str, model: str, changes: Mapping[str, int | None]
    ) -> ModelLimit:
        """Change some limits of *model* and leave the others; None: not limited. What changes nothing is no event."""
        async with self._lock:
            before = self._active_project(project_id).limits.get(model, ModelLimit())
            if changes.keys() - set(ModelLimit.__slots__):
                raise AccessError("ACCESS_INVALID", "limits", expected=list(ModelLimit.__slots__))
            after = replace(before, **changes)
            if after != before:
                await self._limit(actor, project_id, model, None if after == ModelLimit() else after)
            return after

    async def create_account(self, actor: str, project_id: str, name: str, role: Role = "member") -> ServiceAccount:
        async with self._lock:
            self._active_project(project_id)
            room([a for a in self.accounts.values() if a.project_id == project_id], MAX_ACCOUNTS, "service accounts")
            id = _new_id("svc_acct")
            data = {"name": check_name(name), "role": check_role(role)}
            await self._do("service_account.created", actor, id, project_id, data)
            return self.accounts[id]

    async def update_account(self, actor: str, id: str, **changes: Any) -> ServiceAccount:  # Any: as named below
        """*changes*: name, role."""
        async with self._lock:
            account = find(self.accounts, id, "service account")
            self._active_project(account.project_id)
            if not changes or changes.keys() - {"name", "role"}:
                raise AccessError("ACCESS_INVALID", "nothing to change, or nothing that can be changed")
            check: dict[str, Callable[[object], str]] = {"name": check_name, "role": check_role}
            data = {what: check[what](value) for what, value in changes.items()}
            await self._do("service_account.updated", actor, id, account.project_id, data)
            return self.accounts[id]

    async def delete_account(self, actor: str, id: str) -> None:
        """Its keys stop to open at once."""
        async with self._lock:
            account = find(self.accounts, id, "service account")
            await self._do("service_account.deleted", actor, id, account.project_id, {})

    async def create_key(
        self, actor: str, account_id: str, name: str, *, scopes: Iterable[str] | None = None, seconds: int | None = None
    ) -> tuple[ApiKey, Made]:
        """A new inference key; its value is in the second part and nowhere else."""
        async with self._lock:
            account = find(self.accounts, account_id, "service account")
            self._active_project(account.project_id)
            room([k for k in self.keys.values() if k.revoked_at is None], MAX_KEYS, "keys")
            check_number("expires_in_seconds", seconds, 1, MAX_SECONDS)
            wanted = DEFAULT_SCOPES if scopes is None else check_scopes(scopes)
            id, made = _new_id("key"), self._pepper.make("inference")
            data = {
                "kind": "inference", "owner": account_id, "name": check_name(name), "scopes": sorted(wanted),
                "digest": made.digest.hex(), "redacted": made.redacted,
                "expires_at": None if seconds is None else self._clock() + seconds,
            }  # fmt: skip
            await self._do("api_key.created", actor, id, account.project_id, data)
            return self.keys[id], made

    async def update_key(
        self, actor: str, id: str, *, scopes: Iterable[str] | None = None, seconds: int | None = None
    ) -> ApiKey:
        """Replace its scopes, or let it expire *seconds* from now; None leaves as it is. Not for one that expired."""
        async with self._lock:
            key = self._live_key(id)
            self._active_project(key.project_id)
            now = self._clock()
            if key.expires_at is not None and now >= key.expires_at:
                raise AccessError("ACCESS_STATE", "the key has expired")
            check_number("expires_in_seconds", seconds, 1, MAX_SECONDS)
            data: dict[str, Any] = {}  # Any: JSON values
            if scopes is not None:
                data["scopes"] = sorted(check_scopes(scopes))
            if seconds is not None:
                data["expires_at"] = now + seconds
            if not data:
                raise AccessError("ACCESS_INVALID", "nothing to change, or nothing that can be changed")
            await self._do("api_key.updated", actor, id, key.project_id, data)
            return self.keys[id]

    async def rotate_key(self, actor: str, id: str, grace: int) -> tuple[ApiKey, Made]:
        """A new value for the same key. The old one opens it for *grace* seconds more; one before that no longer."""
        async with self._lock:
            key = self._live_key(id)
            self._active_project(key.project_id)
            check_number("grace_seconds", grace, 0, MAX_GRACE)
            made = self._pepper.make("inference")
            data = {"digest": made.digest.hex(), "redacted": made.redacted, "until": self._clock() + grace}
            await self._do("api_key.updated", actor, id, key.project_id, data)
            return self.keys[id], made

    async def revoke_key(self, actor: str, id: str) -> None:
        """It stops to open now; watchers of its open streams are told."""
        async with self._lock:
            key = self._live_key(id)
            await self._do("api_key.deleted", actor, id, key.project_id, {"kind": "inference"})

    # events

    def replay(self, raw: bytes) -> None:
        """The next stored event. Raises `EventError` when it does not follow the last one, or cannot be applied."""
        self._take(Event.decode(raw))

    async def _do(self, type: str, actor: str, subject: str, project: str, data: dict[str, Any]) -> None:
        # Any: JSON values
        event = Event(len(self._events) + 1, type, self._clock(), actor, subject, project, data, self._head)
        await self._append(event.encode())
        self._take(event)

    def _take(self, event: Event) -> None:
        if event.number != len(self._events) + 1 or event.previous != self._head:
            raise EventError("an event does not follow the one before", expected=len(self._events) + 1,
                             actual=event.number)  # fmt: skip
        try:
            _APPLY[event.type](self, event)
        except (KeyError, TypeError, ValueError) as err:
            raise EventError(f"event {event.number} cannot be applied: {type(err).__name__}") from None
        self._events.append(event)
        self._head = event.hash

    async def _new_admin_key(self, actor: str, name: str, expires_at: int | None) -> tuple[AdminKey, Made]:
        id, made = _new_id("key"), self._pepper.make("admin")
        data = {"kind": "admin", "name": name, "digest": made.digest.hex(), "redacted": made.redacted,
                "expires_at": expires_at}  # fmt: skip
        await self._do("api_key.created", actor, id, "", data)
        return self.admin_keys[id], made

    async def _limit(self, actor: str, project_id: str, model: str, limit: ModelLimit | None) -> None:
        if limit is None:
            await self._do("rate_limit.deleted", actor, model, project_id, {})
            return
        data = {name: getattr(limit, name) for name in ModelLimit.__slots__}
        for name, value in data.items():
            check_number(name, value, 0, 2**53 - 1)
        await self._do("rate_limit.updated", actor, model, project_id, data)

    def _active_project(self, id: str) -> Project:
        project = find(self.projects, id, "project")
        if not project.active:
            raise AccessError("ACCESS_STATE", "the project is archived")
        return project

    def _live_key(self, id: str) -> ApiKey:
        key = find(self.keys, id, "key")
        if key.revoked_at is not None:
            raise AccessError("ACCESS_NOT_FOUND", "no such key")
        return key

    # one function per event; each may raise KeyError, TypeError or ValueError for an event that makes no sense

    def _organization_updated(self, e: Event) -> None:
        self.spend_limit_cents = e.data["spend_limit_cents"]

    def _project_created(self, e: Event) -> None:
        self.projects[fresh(self.projects, e.subject)] = Project(e.subject, e.data["name"], e.at)

    def _project_updated(self, e: Event) -> None:
        changes: dict[str, Any] = dict(e.data)  # Any: JSON values
        if "permissions" in changes:
            changes["permissions"] = read_permissions(changes["permissions"])
        self.projects[e.subject] = replace(self.projects[e.subject], **changes)

    def _project_archived(self, e: Event) -> None:
        self.projects[e.subject] = replace(self.projects[e.subject], archived_at=e.at)
        self._tell(k.id for k in self.keys.values() if k.project_id == e.subject)

    def _limit_updated(self, e: Event) -> None:
        project = self.projects[e.project]
        limits = {**project.limits, e.subject: ModelLimit(**e.data)}
        self.projects[e.project] = replace(project, limits=limits)

    def _limit_deleted(self, e: Event) -> None:
        project = self.projects[e.project]
        self.projects[e.project] = replace(project, limits={k: v for k, v in project.limits.items() if k != e.subject})

    def _account_created(self, e: Event) -> None:
        made = ServiceAccount(e.subject, self.projects[e.project].id, e.data["name"], e.data["role"], e.at)
        self.accounts[fresh(self.accounts, e.subject)] = made

    def _account_updated(self, e: Event) -> None:
        self.accounts[e.subject] = replace(self.accounts[e.subject], **e.data)

    def _account_deleted(self, e: Event) -> None:
        del self.accounts[e.subject]
        for key in [k for k in self.keys.values() if k.owner_id == e.subject and k.revoked_at is None]:
            self._revoke(key, e.at)

    def _key_created(self, e: Event) -> None:
        d = e.data
        secret = Secret(bytes.fromhex(d["digest"]), d["redacted"])
        if d["kind"] == "admin":
            id = fresh(self.admin_keys, e.subject)
            self.admin_keys[id] = AdminKey(id, d["name"], secret, e.at, d["expires_at"])
            self._admin_by_digest[secret.digest] = id
            return
        owner = self.accounts[d["owner"]]
        id = fresh(self.keys, e.subject)
        self.keys[id] = ApiKey(
            id, owner.project_id, owner.id, d["name"], (secret,), frozenset(d["scopes"]), e.at, d["expires_at"]
        )
        self._by_digest[secret.digest] = id

    def _key_updated(self, e: Event) -> None:
        key, d = self.keys[e.subject], e.data
        if "digest" not in d:  # no rotation
            expires, scopes = d.get("expires_at", key.expires_at), frozenset(d.get("scopes", key.scopes))
            self.keys[key.id] = replace(key, expires_at=expires, scopes=scopes)
            return
        newest, *older = key.secrets
        for secret in older:
            del self._by_digest[secret.digest]
        fresh = Secret(bytes.fromhex(d["digest"]), d["redacted"])
        self.keys[key.id] = replace(key, secrets=(fresh, replace(newest, until=d["until"])))
        self._by_digest[fresh.digest] = key.id

    def _key_deleted(self, e: Event) -> None:
        if e.data["kind"] == "admin":
            key = self.admin_keys.pop(e.subject)
            del self._admin_by_digest[key.secret.digest]
        else:
            self._revoke(self.keys[e.subject], e.at)

    def _revoke(self, key: ApiKey, at: int) -> None:
        for secret in key.secrets:
            del self._by_digest[secret.digest]
        self.keys[key.id] = replace(key, revoked_at=at)
        self._tell([key.id])

    def _tell(self, key_ids: Iterable[str]) -> None:
        for id in key_ids:
            for future in self._watchers.pop(id, ()):
                _done(future)


_APPLY: Final[dict[str, Callable[[Organization, Event], None]]] = {
    "organization.updated": Organization._organization_updated,
    "project.created": Organization._project_created,
    "project.updated": Organization._project_updated,
    "project.archived": Organization._project_archived,
    "rate_limit.updated": Organization._limit_updated,
    "rate_limit.deleted": Organization._limit_deleted,
    "service_account.created": Organization._account_created,
    "service_account.updated": Organization._account_updated,
    "service_account.deleted": Organization._account_deleted,
    "api_key.created": Organization._key_created,
    "api_key.updated": Organization._key_updated,
    "api_key.deleted": Organization._key_deleted,
}


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
