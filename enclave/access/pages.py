"""Pages of OpenAI's usage API: `/v1/organization/usage/{completions,embeddings}` and `/v1/organization/costs`.

Pure functions of a question and the index (`enclave.access.usage`). A question comes from outside and is read strictly.
Buckets are whole minutes, hours or days in UTC: a range is widened to the buckets that it touches, and every bucket
says where it begins and ends. A page ends at its limit of buckets, or after the bucket in which MAX_WORK cells and
results are reached: then it is shorter, and `next_page` goes on. Amounts are integers up to the last step, in which
nano-USD becomes the nearest JSON number; whoever multiplies it by 10^9 and rounds has the integer again (below 4
million USD in one result; above, floating point is too coarse for nano-dollars).

What OpenAI's API knows and this service has not: users, batches, service tiers. Filtering for one gives nothing,
grouping by one gives null (`batch`: false).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from attestation.errors import VouchsafeError
from enclave.access.usage import (
    CACHED,
    CHARGES,
    INPUT,
    NANOUSD,
    OUTPUT,
    REQUESTS,
    SECONDS,
    Cell,
    Group,
    UsageIndex,
    Width,
)

__all__ = ["Page", "Question", "QuestionError", "page"]

Page = Literal["completions", "embeddings", "costs"]
MAX_WORK: Final = 20_000
MAX_VALUES: Final = 100
MAX_PAIRS: Final = 500
_TIME: Final = re.compile(r"[0-9]{1,11}")
_LIMIT: Final = re.compile(r"[0-9]{1,4}")
_NAME: Final = re.compile(r"[\x20-\x7e]{1,160}")
_CURSOR: Final = re.compile(r"page_([0-9]{1,12})")
_LIMITS: Final[dict[Width, tuple[int, int]]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
_COST_LIMITS: Final = (7, 180)

_LISTS: Final[dict[Page, frozenset[str]]] = {
    "completions": frozenset({"project_ids", "user_ids", "api_key_ids", "models", "group_by"}),
    "embeddings": frozenset({"project_ids", "user_ids", "api_key_ids", "models", "group_by"}),
    "costs": frozenset({"project_ids", "api_key_ids", "line_items", "group_by"}),
}
_SINGLE: Final[dict[Page, frozenset[str]]] = {
    "completions": frozenset({"start_time", "end_time", "bucket_width", "limit", "page", "batch"}),
    "embeddings": frozenset({"start_time", "end_time", "bucket_width", "limit", "page"}),
    "costs": frozenset({"start_time", "end_time", "bucket_width", "limit", "page"}),
}
_GROUPS: Final[dict[Page, tuple[str, ...]]] = {
    "completions": ("project_id", "user_id", "api_key_id", "model", "batch", "service_tier"),
    "embeddings": ("project_id", "user_id", "api_key_id", "model"),
    "costs": ("project_id", "line_item", "api_key_id"),
}
LINES: Final = ("input_tokens", "cached_input_tokens", "output_tokens", "requests")
"""Of a model on the costs page, each written `model, line`; in the order of the amounts in a cell."""

Key = tuple[str | None, ...]


class QuestionError(VouchsafeError):
    """`USAGE_QUERY`: the question cannot be answered as it stands (400); *param* names the parameter."""

    def __init__(self, param: str, reason: str, *, expected: object = "") -> None:
        self.param = param
        super().__init__("USAGE_QUERY", f"{param}: {reason}", expected=expected)


@dataclass(frozen=True, slots=True)
class Question:
    """A question that was understood. Times are unix seconds, `end` exclusive; None as a filter lets all pass."""

    kind: Page
    width: Width
    start: int
    end: int
    limit: int
    first: int
    """Start of the first bucket of this page."""
    group_by: frozenset[str]
    projects: frozenset[str] | None = None
    keys: frozenset[str] | None = None
    models: frozenset[str] | None = None
    line_items: frozenset[str] | None = None
    nothing: bool = False
    """A filter asks for what this service does not have."""

    @classmethod
    def parse(cls, kind: Page, pairs: Sequence[tuple[str, str]], *, now: int) -> Question:
        """Query parameters as decoded *pairs*; lists repeat a name or write `name[]`. Raises `QuestionError`."""
        single, lists = _sorted_out(kind, pairs)
        width: Width = _choice("bucket_width", single.get("bucket_width", "1d"), _widths(kind))
        step = SECONDS[width]
        start = _number("start_time", single.get("start_time"), _TIME)
        end = _number("end_time", single["end_time"], _TIME) if "end_time" in single else now + 1
        usual, most = _COST_LIMITS if kind == "costs" else _LIMITS[width]
        limit = _number("limit", single.get("limit", str(usual)), _LIMIT)
        if not 1 <= limit <= most:
            _refuse("limit", "is out of bounds", expected=f"1 to {most}")
        first = start - start % step
        if "page" in single:
            cursor = _CURSOR.fullmatch(single["page"])
            begin = int(cursor.group(1)) if cursor else -1
            if begin % step or not first <= begin < max(end, first + 1):
                _refuse("page", "does not belong to this question", expected="next_page of the answer before")
            first = begin
        groups = lists.get("group_by", frozenset())
        for name in groups:
            _choice("group_by", name, _GROUPS[kind])
        batch = _choice("batch", single["batch"], ("true", "false")) if "batch" in single else "false"
        return cls(
            kind, width, start, end, limit, first, groups, lists.get("project_ids"), lists.get("api_key_ids"),
            lists.get("models"), lists.get("line_items"), bool(lists.get("user_ids")) or batch == "true",
        )  # fmt: skip

    def wants(self, group: Group) -> bool:
        """Whether cells of *group* count."""
        return (
            not self.nothing
            and (self.kind == "costs" or group.operation == self.kind)
            and (self.projects is None or group.project in self.projects)
            and (self.keys is None or group.key_id in self.keys)
            and (self.models is None or group.model in self.models)
        )


def page(index: UsageIndex, question: Question) -> dict[str, Any]:  # Any: JSON values
    """The answer. Raises `QuestionError` for a time whose buckets of this width are no longer kept."""
    level, step = index.levels[question.width], SECONDS[question.width]
    if question.first < level.floor:
        _refuse("start_time", f"buckets of {question.width} are not kept that long", expected=f">= {level.floor}")
    results = _Costs(question) if question.kind == "costs" else _Tokens(question)
    buckets: list[dict[str, Any]] = []  # Any: JSON values
    start, read = question.first, 0
    while start < question.end and len(buckets) < question.limit and read < MAX_WORK:
        cells = level.bucket(start)
        found = results.of(cells)
        read += len(cells) + len(found)
        buckets.append({"object": "bucket", "start_time": start, "end_time": start + step, "results": found})
        start += step
    more = start < question.end
    return {"object": "page", "data": buckets, "has_more": more, "next_page": f"page_{start}" if more else None}


class _Tokens:
    """Results of the two usage pages."""

    def __init__(self, question: Question) -> None:
        self.q = question
        self._keys: dict[Group, Key | None] = {}

    def key(self, group: Group) -> Key | None:
        """Under what a cell of *group* is added up, None when it does not count. Worked out once per group."""
        if group not in self._keys:
            self._keys[group] = _key(self.q, group, None) if self.q.wants(group) else None
        return self._keys[group]

    def of(self, cells: Mapping[Group, Cell[int]]) -> list[dict[str, Any]]:  # Any: JSON values
        sums: dict[Key, list[int]] = {}
        for group, cell in cells.items():
            if (key := self.key(group)) is not None:
                total = sums.setdefault(key, [0, 0, 0, 0])
                total[0] += cell[REQUESTS]
                total[1] += cell[INPUT]
                total[2] += cell[CACHED]
                total[3] += cell[OUTPUT]
        return [self._result(key, *total) for key, total in _sorted(sums)]

    def _result(self, key: Key, requests: int, inputs: int, cached: int, outputs: int) -> dict[str, Any]:
        # Any: JSON values
        result: dict[str, Any] = {  # Any: JSON values
            "object": f"organization.usage.{self.q.kind}.result",
            "input_tokens": inputs,
            "num_model_requests": requests,
        }
        if self.q.kind == "completions":
            result["output_tokens"] = outputs
            result["input_cached_tokens"] = cached
            result["input_uncached_tokens"] = inputs - cached
        return result | _named(self.q, key)


class _Costs:
    """Results of the costs page."""

    def __init__(self, question: Question) -> None:
        self.q = question
        self._by_line = "line_item" in question.group_by
        self._keys: dict[Group, tuple[Key | None, ...]] = {}

    def keys(self, group: Group) -> tuple[Key | None, ...]:
        """Under what each line of a cell of *group* is added up, None for one that does not count."""
        if group not in self._keys:
            items = [f"{group.model}, {line}" for line in LINES]
            wanted = self.q.wants(group)
            self._keys[group] = tuple(
                _key(self.q, group, item)
                if wanted and (self.q.line_items is None or item in self.q.line_items) else None
                for item in items
            )  # fmt: skip
        return self._keys[group]

    def of(self, cells: Mapping[Group, Cell[int]]) -> list[dict[str, Any]]:  # Any: JSON values
        sums: dict[Key, list[int]] = {}
        for group, cell in cells.items():
            quantities = (cell[INPUT] - cell[CACHED], cell[CACHED], cell[OUTPUT], cell[CHARGES])
            for key, quantity, nano in zip(self.keys(group), quantities, cell[NANOUSD], strict=True):
                if quantity and key is not None:
                    total = sums.setdefault(key, [0, 0])
                    total[0] += nano
                    total[1] += quantity
        return [self._result(key, *total) for key, total in _sorted(sums)]

    def _result(self, key: Key, nano: int, quantity: int) -> dict[str, Any]:  # Any: JSON values
        named = _named(self.q, key)
        tokens = self._by_line and str(named["line_item"]).endswith("_tokens")
        return {
            "object": "organization.costs.result",
            # An integer divided by an integer: Python rounds once, to the nearest number there is.
            "amount": {"value": nano / 1_000_000_000, "currency": "usd"},
            "quantity": quantity if self._by_line else None,
            "quantity_unit": "tokens" if tokens else None,
        } | named  # fmt: skip


def _key(q: Question, group: Group, line_item: str | None) -> Key:
    """The group's value under every name that the answer is grouped by, None under the others."""
    values = {"project_id": group.project, "api_key_id": group.key_id, "model": group.model, "line_item": line_item}
    return tuple(values.get(name) if name in q.group_by else None for name in _GROUPS[q.kind])


def _named(q: Question, key: Key) -> dict[str, Any]:  # Any: JSON values
    named: dict[str, Any] = dict(zip(_GROUPS[q.kind], key, strict=True))  # Any: JSON values
    if "batch" in q.group_by:
        named["batch"] = False
    return named


def _sorted(sums: dict[Key, list[int]]) -> list[tuple[Key, list[int]]]:
    return sorted(sums.items(), key=lambda item: tuple(part or "" for part in item[0]))


# reading a question


def _sorted_out(kind: Page, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, str], dict[str, frozenset[str]]]:
    single: dict[str, str] = {}
    lists: dict[str, set[str]] = {}
    if len(pairs) > MAX_PAIRS:
        _refuse("query", "has too many parameters", expected=f"<= {MAX_PAIRS}")
    for written, value in pairs:
        name = written.removesuffix("[]")
        if name in _LISTS[kind]:
            if _NAME.fullmatch(value) is None:
                _refuse(name, "is not well formed", expected="1 to 160 printable ASCII characters")
            lists.setdefault(name, set()).add(value)
        elif written not in _SINGLE[kind]:
            _refuse("query", "has a parameter that this page does not know",
                    expected=", ".join(sorted(_SINGLE[kind] | _LISTS[kind])))  # fmt: skip
        elif name in single:
            _refuse(name, "stands twice")
        else:
            single[name] = value
    for name, values in lists.items():
        if len(values) > MAX_VALUES:
            _refuse(name, "has too many values", expected=f"<= {MAX_VALUES}")
    return single, {name: frozenset(values) for name, values in lists.items()}


def _widths(kind: Page) -> tuple[Width, ...]:
    return ("1d",) if kind == "costs" else ("1m", "1h", "1d")


def _choice(param: str, value: str, allowed: Sequence[str]) -> Any:  # Any: the caller's Literal
    if value not in allowed:
        _refuse(param, "is not known", expected=", ".join(allowed))
    return value


def _number(param: str, value: str | None, form: re.Pattern[str]) -> int:
    if value is None:
        _refuse(param, "is missing")
    if form.fullmatch(value) is None:
        _refuse(param, "is not a number", expected="a whole number, not negative")
    return int(value)


def _refuse(param: str, reason: str, *, expected: object = "") -> NoReturn:
    raise QuestionError(param, reason, expected=expected)
