"""Query parameters of the admin API, and the page of a list that they ask for. Pure.

Rows stand in the order in which they were made and have a position. A page is cut between two positions, so a cursor
still works when what it names was deleted meanwhile: whoever lists and deletes by turns misses nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from enclave.api.admin.fields import invalid
from enclave.api.errors import Refusal, Refused

__all__ = ["Ask", "List", "read_list", "read_nothing", "rows_of", "told"]

T = TypeVar("T")

MAX_QUERY: Final = 16 << 10
MAX_PAIRS: Final = 500
MAX_LIMIT: Final = 100
_LIMIT: Final = re.compile(r"[0-9]{1,3}")
_CURSOR: Final = re.compile(r"[\x21-\x7e]{1,160}")
_VALUE: Final = re.compile(r"[\x20-\x7e]{1,160}")


@dataclass(frozen=True, slots=True)
class List:
    """What may be asked of a list beside `limit`, `after`, `before` and `order`.

    one    parameter → the form of its value;  many   parameters that may repeat, written `name` or `name[]`
    """

    limit: int = 20
    newest_first: bool = False
    one: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    many: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A page that was asked for. *one* and *many* hold the filters that were given."""

    limit: int
    newest_first: bool
    after: str | None
    before: str | None
    one: Mapping[str, str]
    many: Mapping[str, frozenset[str]]


def read_nothing(query: bytes) -> None:
    """Raises Refused 400 for any parameter."""
    for name, _ in _pairs(query):
        _unknown(name)


def read_list(query: bytes, of: List) -> Ask:
    """Raises Refused 400 for a parameter that is unknown, stands twice or is not well formed."""
    one: dict[str, str] = {}
    many: dict[str, set[str]] = {}
    forms = {"limit": _LIMIT, "after": _CURSOR, "before": _CURSOR, "order": re.compile("asc|desc"), **of.one}
    for written, value in _pairs(query):
        name = written.removesuffix("[]")
        if name in of.many:
            if not _VALUE.fullmatch(value):
                invalid(name, "1 to 160 printable ASCII characters")
            many.setdefault(name, set()).add(value)
        elif written not in forms:
            _unknown(written)
        elif name in one:
            invalid(name, "one value")
        elif not forms[name].fullmatch(value):
            invalid(name, f"a value of the form {forms[name].pattern}")
        else:
            one[name] = value
    limit = int(one.pop("limit", of.limit))
    if not 1 <= limit <= MAX_LIMIT:
        invalid("limit", f"an integer from 1 to {MAX_LIMIT}")
    order = one.pop("order", "desc" if of.newest_first else "asc")
    after, before = one.pop("after", None), one.pop("before", None)
    return Ask(limit, order == "desc", after, before, one, {name: frozenset(values) for name, values in many.items()})


def rows_of(
    rows: Sequence[T],
    ask: Ask,
    *,
    position: Callable[[T], int],
    at: Callable[[str], int | None],
    keep: Callable[[T], bool] = lambda row: True,
) -> tuple[list[T], bool]:
    """The rows of the page, and whether there are more behind it (before it when `before` alone was given).

    rows   by rising *position*;  at   the position that a cursor names, None for one that never was
    keep   the filter: asked row by row until the page is full
    """
    older, newer = (ask.after, ask.before) if ask.newest_first else (ask.before, ask.after)
    start = 0 if newer is None else bisect_right(rows, _place(ask, newer, at), key=position)
    end = len(rows) if older is None else bisect_left(rows, _place(ask, older, at), key=position)
    # `before` alone asks for the page that ends there: its rows are found from their end.
    backwards = ask.before is not None and ask.after is None
    found: Iterable[T] = (rows[i] for i in range(start, end))
    if ask.newest_first != backwards:
        found = (rows[i] for i in range(end - 1, start - 1, -1))
    kept = list(islice(filter(keep, found), ask.limit + 1))
    shown, more = kept[: ask.limit], len(kept) > ask.limit
    return (shown[::-1] if backwards else shown), more


def told(shown: Sequence[Mapping[str, Any]], more: bool) -> dict[str, Any]:  # Any: JSON values
    """OpenAI's list of objects that have an id."""
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return {"object": "list", "data": list(shown), "first_id": first, "last_id": last, "has_more": more}


def _place(ask: Ask, cursor: str, at: Callable[[str], int | None]) -> int:
    found = at(cursor)
    if found is None:
        invalid("after" if cursor == ask.after else "before", "the id of an object of this list")
    return found


def _pairs(query: bytes) -> list[tuple[str, str]]:
    if not query:
        return []
    try:
        if len(query) > MAX_QUERY:
            raise ValueError
        text = query.decode("ascii")
        return parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=MAX_PAIRS)
    except ValueError:
        raise Refused(Refusal(400, "The query string cannot be read.", code="invalid_query")) from None


def _unknown(name: str) -> None:
    raise Refused(Refusal(400, "Unrecognized query parameter supplied.", code="unknown_parameter", param=name))
