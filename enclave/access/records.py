"""What an organisation consists of, as values: projects, service accounts, keys, and what limits them.

Times are unix seconds, amounts integer cents, ids ours (`proj_…`, `svc_acct_…`, `key_…`). No field holds a key's value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["SCOPES", "AdminKey", "ApiKey", "ModelLimit", "ModelPermissions", "Project", "Secret", "ServiceAccount"]

SCOPES: Final = frozenset({"inference", "models.read", "receipts.read", "usage.read"})
"""What an inference key can be good for. A key without stated scopes has the first three."""
DEFAULT_SCOPES: Final = frozenset({"inference", "models.read", "receipts.read"})

Role = Literal["owner", "member", "none"]


@dataclass(frozen=True, slots=True)
class ModelLimit:
    """Limits of one model in one project; None: not limited. OpenAI's `project.rate_limit`, and our own last two."""

    max_requests_per_1_minute: int | None = None
    max_tokens_per_1_minute: int | None = None
    max_requests_per_1_day: int | None = None
    max_tokens_per_1_day: int | None = None
    max_concurrent_requests: int | None = None


@dataclass(frozen=True, slots=True)
class ModelPermissions:
    """Which models a project may ask. `allow_list` of nothing allows nothing."""

    mode: Literal["allow_list", "deny_list"]
    model_ids: frozenset[str]

    def allow(self, model: str) -> bool:
        return (model in self.model_ids) == (self.mode == "allow_list")


@dataclass(frozen=True, slots=True)
class Project:
    id: str
    name: str
    created_at: int
    archived_at: int | None = None
    permissions: ModelPermissions | None = None
    limits: dict[str, ModelLimit] = field(default_factory=dict)
    spend_limit_cents: int | None = None

    @property
    def active(self) -> bool:
        return self.archived_at is None


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    id: str
    project_id: str
    name: str
    role: Role
    created_at: int


@dataclass(frozen=True, slots=True)
class Secret:
    """One value that opens a key: its keyed hash, and when it stops to; None: with the key."""

    digest: bytes = field(repr=False)
    redacted: str
    until: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An inference key of a service account. At most two secrets: the newest, and one that a rotation left in grace."""

    id: str
    project_id: str
    owner_id: str
    name: str
    secrets: tuple[Secret, ...]
    scopes: frozenset[str]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None

    def open_at(self, now: int, digest: bytes) -> bool:
        """Whether the secret with *digest* opens it at *now*."""
        if self.revoked_at is not None or (self.expires_at is not None and now >= self.expires_at):
            return False
        return any(s.digest == digest and (s.until is None or now < s.until) for s in self.secrets)


@dataclass(frozen=True, slots=True)
class AdminKey:
    """A key for administration: opens `/v1/organization/…` and nothing else."""

    id: str
    name: str
    secret: Secret
    created_at: int
    expires_at: int | None = None
