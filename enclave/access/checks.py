"""What a command may name and say: look-ups and checks that raise `AccessError`. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, TypeVar

from attestation.errors import VouchsafeError
from enclave.access.records import SCOPES, ModelPermissions, Role

__all__ = [
    "AccessError", "check_name", "check_number", "check_role", "check_scopes", "find", "fresh", "read_permissions",
    "room", "told_permissions",
]  # fmt: skip

MAX_NAME: Final = 128

T = TypeVar("T")


class AccessError(VouchsafeError):
    """A command that cannot be carried out. `ACCESS_NOT_FOUND`, `ACCESS_INVALID`, `ACCESS_TOO_MANY`, `ACCESS_STATE`."""


def find(table: dict[str, T], id: str, what: str) -> T:
    found = table.get(id)
    if found is None:
        raise AccessError("ACCESS_NOT_FOUND", f"no such {what}")
    return found


def fresh(table: dict[str, Any], id: str) -> str:  # Any: the table's own values
    if id in table:
        raise ValueError("an id stands twice")
    return id


def room(table: Any, most: int, what: str) -> None:  # Any: sized
    if len(table) >= most:
        raise AccessError("ACCESS_TOO_MANY", f"too many {what}", expected=f"<= {most}")


def check_name(text: object) -> str:
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_NAME or not text.isprintable():
        raise AccessError("ACCESS_INVALID", "name", expected=f"1 to {MAX_NAME} printable characters")
    return text


def check_role(role: object) -> Role:
    if role not in ("owner", "member", "none"):
        raise AccessError("ACCESS_INVALID", "role", expected="owner, member or none")
    return role


def check_scopes(wanted: Iterable[str]) -> frozenset[str]:
    scopes = frozenset(wanted)
    if not scopes or not scopes <= SCOPES:
        raise AccessError("ACCESS_INVALID", "scopes", expected=sorted(SCOPES))
    return scopes


def check_number(what: str, value: object, low: int, high: int) -> None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise AccessError("ACCESS_INVALID", what, expected=f"an integer from {low} to {high}")


def told_permissions(permissions: ModelPermissions | None) -> dict[str, Any] | None:  # Any: JSON values
    if permissions is None:
        return None
    mode: Literal["allow_list", "deny_list"] = permissions.mode
    return {"mode": mode, "model_ids": sorted(permissions.model_ids)}


def read_permissions(told: dict[str, Any] | None) -> ModelPermissions | None:  # Any: JSON values
    return None if told is None else ModelPermissions(told["mode"], frozenset(told["model_ids"]))
