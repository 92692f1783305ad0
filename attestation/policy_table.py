"""A TOML table read field by field: what is not there, of another kind, too permissive or left unread is an error.

The reader of policies (`attestation.policy`), apart from what a policy says. There is no default; a check is left out
only by `{ any = "the reason" }`, which becomes a `Skip`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from attestation.errors import PolicyError

__all__ = ["Skip", "Table"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Skip:
    """A check left out on purpose, with the reason that every result prints. Written `{ any = "why" }`."""

    why: str


class Table:
    """A TOML table read field by field; what is left unread at the end is an unknown key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:  # Any: TOML values
        self._values, self._where, self._seen = values, where, set[str]()

    def name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def bad(self, key: str, expected: str, actual: object, code: str = "POLICY_VALUE") -> NoReturn:
        raise PolicyError(
            code, f"policy field {self.name(key)} cannot be used", expected=expected, actual=actual,
            hint='to leave a check out on purpose write { any = "the reason" }',
        )  # fmt: skip

    def take(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:  # Any: checked against kind
        self._seen.add(key)
        if key not in self._values:
            self.bad(key, expected, "nothing", "POLICY_MISSING")
        value = self._values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.bad(key, expected, f"{value!r}")
        return value

    def rule(self, key: str, read: Callable[[str], T]) -> T | Skip:
        """A field that may be `{ any = "why" }`."""
        value = self._values.get(key)
        return self._skip(key, value) if isinstance(value, dict) else read(key)

    def section(self, key: str, read: Callable[[Table], T]) -> T | Skip:
        """A table that may be `{ any = "why" }` instead."""
        value = self._values.get(key)
        return self._skip(key, value) if isinstance(value, dict) and "any" in value else read(self.table(key))

    def _skip(self, key: str, value: Mapping[str, Any]) -> Skip:  # Any: TOML values
        self._seen.add(key)
        why = value.get("any")
        if set(value) != {"any"} or not isinstance(why, str) or len(why.strip()) < 8 or not why.isprintable():
            self.bad(key, '{ any = "a reason of at least eight characters" } and nothing beside it', f"{value!r}")
        return Skip(why.strip())

    def text(self, key: str) -> str:
        value = self.take(key, str, "text")
        if not value or "*" in value:
            self.bad(key, "text without a wildcard", f"{value!r}")
        return str(value)

    def number(self, key: str, low: int = 0) -> int:
        value = self.take(key, int, f"a whole number >= {low}")
        if value < low:
            self.bad(key, f"a whole number >= {low}", value)
        return int(value)

    def texts(self, key: str, *, empty: bool = False) -> list[str]:
        value = self.take(key, list, "a list of texts")
        if not value and not empty:
            self.bad(key, "a list that is not empty", "[]", "POLICY_EMPTY")
        if not all(isinstance(v, str) and v and "*" not in v for v in value):
            self.bad(key, "texts without wildcards", f"{value!r}")
        if len(set(value)) != len(value):
            self.bad(key, "each entry once", f"{value!r}")
        return list(value)

    def hexes(self, key: str, size: int) -> frozenset[bytes]:
        return frozenset(self._hex(key, v, size) for v in self.texts(key))

    def hex(self, key: str, size: int) -> bytes:
        value = self.text(key)
        return bytes(size) if value == "zero" else self._hex(key, value, size)

    def masks(self, key: str) -> frozenset[int]:
        values = self.texts(key)
        if not all(re.fullmatch(r"0x[0-9a-f]{1,16}", v) for v in values):
            self.bad(key, 'hexadecimal numbers such as "0x10000000"', values)
        return frozenset(int(v, 16) for v in values)

    def word(self, key: str, words: tuple[str, ...]) -> Any:  # Any: one of a Literal's words
        value = self.text(key)
        if value not in words:
            self.bad(key, " | ".join(words), value)
        return value

    def table(self, key: str) -> Table:
        return Table(self.take(key, dict, f"a table [{self.name(key)}]"), self.name(key))

    def done(self) -> None:
        unknown = sorted(set(self._values) - self._seen)
        if unknown:
            raise PolicyError(
                "POLICY_UNKNOWN_KEY", f"policy key {self.name(unknown[0])} is not known",
                expected=f"only {', '.join(sorted(self._seen))}", actual=unknown[0], hint="is it misspelt?",
            )  # fmt: skip

    def _hex(self, key: str, value: str, size: int) -> bytes:
        if not re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", value):
            self.bad(key, f"{size} bytes in lower-case hex", value)
        return bytes.fromhex(value)
