"""Usage and cost pages: OpenAI's shapes, by buckets in UTC, from sums and without reading entries."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from openai.types.admin.organization import UsageCompletionsResponse, UsageCostsResponse, UsageEmbeddingsResponse

from enclave.access import usage as usage_module
from enclave.access.entries import Entry
from enclave.access.pages import MAX_WORK, Question, QuestionError, page
from enclave.access.prices import Lines, Usage
from enclave.access.usage import Group, UsageIndex
from tests.enclave.access.money import NOON, PRICES, World, nano, some_usage

DAY = 86_400
MIDNIGHT = NOON - NOON % DAY


def entry(time: int, *, project: str = "proj_a", key: str = "key_1", model: str = "parrot", usage: Usage) -> Entry:
    cost = PRICES.cost(model, usage)
    operation: Any = "embeddings" if model == "magpie" else "completions"
    return Entry(1, time, project, key, model, operation, usage, "completed", PRICES.digest, cost, None, b"\0" * 32)


class Books:
    """An index, and the entries that went into it."""

    def __init__(self) -> None:
        self.index, self.entries, self.now = UsageIndex(), list[Entry](), NOON

    def add(self, time: int, usage: Usage, **how: Any) -> None:
        made = entry(time // 60 * 60, usage=usage, **how)
        self.entries.append(made)
        self.index.add(made, PRICES.lines(made.model, usage))

    def ask(self, kind: Any, **how: Any) -> dict[str, Any]:
        pairs = [(n, str(v)) for n, value in how.items() for v in (value if isinstance(value, list) else [value])]
        return page(self.index, Question.parse(kind, pairs, now=self.now))


def some_books(days: int = 3, count: int = 400) -> Books:
    books, seed = Books(), random.Random(7)
    for time in sorted(MIDNIGHT - seed.randrange(days * DAY) for _ in range(count)):
        key = f"key_{seed.randrange(4)}"
        books.add(
            time, some_usage(seed), project=f"proj_{key[-1]}", key=key, model=seed.choice(("parrot", "magpie", "free"))
        )
    return books


# shapes


def test_pages_are_what_openais_own_types_expect() -> None:
    books = some_books()
    groups = ["project_id", "api_key_id", "model"]
    for kind, type, more in (
        ("completions", UsageCompletionsResponse, [*groups, "user_id", "batch", "service_tier"]),
        ("embeddings", UsageEmbeddingsResponse, [*groups, "user_id"]),
        ("costs", UsageCostsResponse, ["project_id", "api_key_id", "line_item"]),
    ):
        for group_by in ([], more):
            answer = books.ask(kind, start_time=MIDNIGHT - 3 * DAY, group_by=group_by)
            read = type.model_validate_json(json.dumps(answer), strict=True)
            assert len(read.data) == 4 and all(b.object == "bucket" for b in read.data)
            results = [r for b in read.data for r in b.results]
            assert results and all(r.object.startswith("organization.") for r in results)
            assert read.object == "page" and not read.has_more and read.next_page is None


def test_result_says_what_was_used_and_by_whom() -> None:
    books = Books()
    books.add(NOON, Usage(100, 40, 7))
    books.add(NOON, Usage(10, 0, 1), key="key_2")
    books.add(NOON, Usage(50), model="magpie")
    (bucket,) = books.ask("completions", start_time=NOON)["data"]
    assert (bucket["start_time"], bucket["end_time"]) == (MIDNIGHT, MIDNIGHT + DAY)
    assert bucket["results"] == [
        {
            "object": "organization.usage.completions.result", "input_tokens": 110, "output_tokens": 8,
            "num_model_requests": 2, "input_cached_tokens": 40, "input_uncached_tokens": 70, "project_id": None,
            "user_id": None, "api_key_id": None, "model": None, "batch": None, "service_tier": None,
        }
    ]  # fmt: skip
    grouped = books.ask("completions", start_time=NOON, group_by=["api_key_id", "batch"])["data"][0]["results"]
    assert [(r["api_key_id"], r["input_tokens"], r["batch"]) for r in grouped] == [
        ("key_1", 100, False), ("key_2", 10, False),
    ]  # fmt: skip
    (embedded,) = books.ask("embeddings", start_time=NOON, group_by="model")["data"][0]["results"]
    assert embedded == {
        "object": "organization.usage.embeddings.result", "input_tokens": 50, "num_model_requests": 1,
        "project_id": None, "user_id": None, "api_key_id": None, "model": "magpie",
    }  # fmt: skip


def test_costs_by_line_item_add_up_and_say_how_much_of_what() -> None:
    books = Books()
    books.add(NOON, Usage(100, 40, 7))
    books.add(NOON, Usage(50), model="magpie")
    results = books.ask("costs", start_time=NOON, group_by="line_item")["data"][0]["results"]
    assert [(r["line_item"], nano(r), r["quantity"], r["quantity_unit"]) for r in results] == [
        ("magpie, input_tokens", 615, 50, "tokens"),
        ("magpie, requests", 1000, 1, None),
        ("parrot, cached_input_tokens", 3000, 40, "tokens"),
        ("parrot, input_tokens", 9000, 60, "tokens"),
        ("parrot, output_tokens", 4200, 7, "tokens"),
    ]
    (total,) = books.ask("costs", start_time=NOON)["data"][0]["results"]
    assert nano(total) == sum(e.cost for e in books.entries) and total["quantity"] is None
    (one,) = books.ask("costs", start_time=NOON, line_items=["parrot, input_tokens", "x"])["data"][0]["results"]
    assert nano(one) == 9000


def test_amount_is_the_number_next_to_the_integer() -> None:
    seed = random.Random(11)
    most = 2**22 * 10**9  # 4.2 million USD in one bucket
    for amount in (0, 1, 10**9, most - 1, *(seed.randrange(most) for _ in range(2000))):
        index = UsageIndex()
        index.add(entry(NOON, usage=Usage(1)), Lines(0, amount, 0, 0))
        pairs = [("start_time", str(NOON))]
        (result,) = page(index, Question.parse("costs", pairs, now=NOON))["data"][0]["results"]
        shown = json.loads(json.dumps(result))["amount"]["value"]
        assert result["amount"]["currency"] == "usd" and round(Fraction(shown) * 10**9) == amount == nano(result)


# buckets


@pytest.mark.parametrize(("width", "seconds"), [("1m", 60), ("1h", 3600), ("1d", DAY)])
@pytest.mark.parametrize("kind", ["completions", "embeddings"])
def test_buckets_hold_exactly_the_entries_of_their_time(kind: str, width: str, seconds: int) -> None:
    books = some_books(days=2)
    expected: Counter[tuple[int, str]] = Counter()
    for e in books.entries:
        if e.operation == kind:
            expected[e.time // seconds * seconds, e.key_id] += e.usage.input_tokens
    found: Counter[tuple[int, str]] = Counter()
    how = {"start_time": MIDNIGHT - 2 * DAY, "bucket_width": width, "group_by": "api_key_id"}
    starts: list[int] = []
    cursor: dict[str, Any] = {}
    while True:
        answer = books.ask(kind, **how, **cursor)
        for bucket in answer["data"]:
            assert bucket["end_time"] - bucket["start_time"] == seconds and bucket["start_time"] % seconds == 0
            starts.append(bucket["start_time"])
            for r in bucket["results"]:
                found[bucket["start_time"], r["api_key_id"]] += r["input_tokens"]
        if not answer["has_more"]:
            break
        cursor = {"page": answer["next_page"]}
    assert +found == +expected
    assert starts == list(range(MIDNIGHT - 2 * DAY, NOON + 1, seconds))


def test_range_is_widened_to_whole_buckets_and_its_end_is_exclusive() -> None:
    books = Books()
    data = books.ask("completions", start_time=NOON, end_time=NOON + 1)["data"]
    assert [b["start_time"] for b in data] == [MIDNIGHT]
    data = books.ask("completions", start_time=MIDNIGHT, end_time=MIDNIGHT + DAY)["data"]
    assert [b["start_time"] for b in data] == [MIDNIGHT]
    data = books.ask("completions", start_time=MIDNIGHT, end_time=MIDNIGHT + DAY + 1)["data"]
    assert [b["start_time"] for b in data] == [MIDNIGHT, MIDNIGHT + DAY]
    assert books.ask("completions", start_time=NOON, end_time=NOON - DAY)["data"] == []


@pytest.mark.parametrize(
    ("kind", "width", "usual", "most"),
    [("completions", "1m", 60, 1440), ("completions", "1h", 24, 168), ("completions", "1d", 7, 31),
     ("costs", "1d", 7, 180)],
)  # fmt: skip
def test_limit_is_a_number_of_buckets(kind: str, width: str, usual: int, most: int) -> None:
    books = Books()
    how = {"start_time": 0, "bucket_width": width}
    assert len(books.ask(kind, **how)["data"]) == usual
    assert len(books.ask(kind, **how, limit=most)["data"]) == most
    for limit in (0, most + 1):
        with pytest.raises(QuestionError) as caught:
            books.ask(kind, **how, limit=limit)
        assert caught.value.param == "limit"


# filters


def test_filters_and_groups_agree() -> None:
    books = some_books()
    how = {"start_time": MIDNIGHT - 3 * DAY}
    for filter, group, attribute in (
        ("project_ids", "project_id", "project"), ("api_key_ids", "api_key_id", "key_id"), ("models", "model", "model"),
    ):  # fmt: skip
        for value in {getattr(e, attribute) for e in books.entries}:
            mine = [e for e in books.entries if getattr(e, attribute) == value and e.operation == "completions"]
            filtered = books.ask("completions", **how, **{filter: [value]})
            grouped = books.ask("completions", **how, group_by=group)
            for answer in (filtered, grouped):
                results = [r for b in answer["data"] for r in b["results"] if r[group] in (None, value)]
                assert sum(r["output_tokens"] for r in results) == sum(e.usage.output_tokens for e in mine)
    both = books.ask("completions", **how, project_ids=["proj_1"], api_key_ids=["key_2"])
    assert all(not b["results"] for b in both["data"])


def test_what_the_service_has_not_gives_nothing() -> None:
    books = some_books()
    for how in ({"user_ids": ["user_1"]}, {"batch": "true"}, {"project_ids": ["proj_none"]}):
        answer = books.ask("completions", start_time=MIDNIGHT - 3 * DAY, **how)
        assert len(answer["data"]) == 4 and not any(b["results"] for b in answer["data"])
    assert any(b["results"] for b in books.ask("completions", start_time=MIDNIGHT - 3 * DAY, batch="false")["data"])


def test_lists_may_be_written_with_brackets_as_openais_clients_do() -> None:
    pairs = [("start_time", "0"), ("project_ids[]", "proj_1"), ("project_ids[]", "proj_2"), ("group_by[]", "model")]
    question = Question.parse("completions", pairs, now=NOON)
    assert question.projects == {"proj_1", "proj_2"} and question.group_by == {"model"}


@pytest.mark.parametrize(
    ("kind", "pairs", "param"),
    [
        ("completions", [], "start_time"),
        ("completions", [("start_time", "")], "start_time"),
        ("completions", [("start_time", "-1")], "start_time"),
        ("completions", [("start_time", "1.5")], "start_time"),
        ("completions", [("start_time", "1" * 12)], "start_time"),
        ("completions", [("start_time", "\u0661")], "start_time"),
        ("completions", [("start_time", "1"), ("start_time", "1")], "start_time"),
        ("completions", [("start_time[]", "1")], "query"),
        ("completions", [("start_time", "1"), ("end_time", "x")], "end_time"),
        ("completions", [("start_time", "1"), ("bucket_width", "2d")], "bucket_width"),
        ("costs", [("start_time", "1"), ("bucket_width", "1h")], "bucket_width"),
        ("completions", [("start_time", "1"), ("limit", "many")], "limit"),
        ("completions", [("start_time", "1"), ("group_by", "line_item")], "group_by"),
        ("embeddings", [("start_time", "1"), ("group_by", "batch")], "group_by"),
        ("embeddings", [("start_time", "1"), ("batch", "true")], "query"),
        ("costs", [("start_time", "1"), ("group_by", "model")], "group_by"),
        ("costs", [("start_time", "1"), ("models", "m")], "query"),
        ("completions", [("start_time", "1"), ("batch", "yes")], "batch"),
        ("completions", [("start_time", "1"), ("secret", "yes")], "query"),
        ("completions", [("start_time", "1"), ("project_ids", "")], "project_ids"),
        ("completions", [("start_time", "1"), ("project_ids", "a\0")], "project_ids"),
        ("completions", [("start_time", "1"), *(("models", f"m{i}") for i in range(101))], "models"),
        ("completions", [("start_time", "1")] * 501, "query"),
        ("completions", [("start_time", "86400"), ("page", "page")], "page"),
        ("completions", [("start_time", "86400"), ("page", "page_0")], "page"),
        ("completions", [("start_time", "86400"), ("page", "page_86401")], "page"),
        ("completions", [("start_time", "86400"), ("end_time", "86401"), ("page", "page_172800")], "page"),
    ],
)
def test_question_that_is_not_understood_is_refused(kind: Any, pairs: list[tuple[str, str]], param: str) -> None:
    with pytest.raises(QuestionError) as caught:
        Question.parse(kind, pairs, now=NOON)
    assert (caught.value.code, caught.value.param) == ("USAGE_QUERY", param)
    assert "secret" not in str(caught.value)


# size


def test_answer_reads_buckets_and_not_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A month by days looks at 31 buckets and their groups, however many entries there were."""
    books = Books()
    for n in range(20_000):
        books.add(MIDNIGHT - 30 * DAY + n * 129, Usage(1), key=f"key_{n % 3}")
    looked: list[int] = []
    honest = usage_module.Level.bucket

    def bucket(self: usage_module.Level, start: int) -> Any:
        cells = honest(self, start)
        looked.append(len(cells))
        return cells

    monkeypatch.setattr(usage_module.Level, "bucket", bucket)
    answer = books.ask("completions", start_time=MIDNIGHT - 30 * DAY, limit=31)
    assert sum(r["num_model_requests"] for b in answer["data"] for r in b["results"]) == 20_000
    assert len(looked) == 31 and sum(looked) <= 31 * 3


def test_page_that_would_take_long_is_cut_at_a_bucket_and_goes_on() -> None:
    books = Books()
    for day in range(4):
        for n in range(MAX_WORK // 2):
            books.add(MIDNIGHT - (4 - day) * DAY, Usage(1), key=f"key_{n}")
    answers = [books.ask("completions", start_time=MIDNIGHT - 4 * DAY, group_by="api_key_id")]
    while answers[-1]["has_more"]:
        cursor = answers[-1]["next_page"]
        answers.append(books.ask("completions", start_time=MIDNIGHT - 4 * DAY, group_by="api_key_id", page=cursor))
    assert [len(a["data"]) for a in answers] == [1, 1, 1, 1, 1]
    assert sum(r["num_model_requests"] for a in answers for b in a["data"] for r in b["results"]) == 2 * MAX_WORK


def test_old_minutes_are_dropped_and_a_question_about_them_is_refused() -> None:
    books = Books()
    first = MIDNIGHT - 20 * DAY
    for day in range(20):
        books.add(first + day * DAY, Usage(1))
    minutes = books.index.levels["1m"]
    assert len(minutes._buckets) == 9 and minutes.floor == first + 10 * DAY + 60
    with pytest.raises(QuestionError) as caught:
        books.ask("completions", start_time=first, bucket_width="1m")
    assert caught.value.param == "start_time"
    kept = books.ask("completions", start_time=minutes.floor, bucket_width="1m", limit=1440)
    assert sum(r["num_model_requests"] for b in kept["data"] for r in b["results"]) == 1
    days = books.ask("completions", start_time=first, limit=31)
    assert sum(r["num_model_requests"] for b in days["data"] for r in b["results"]) == 20


def test_group_is_kept_once() -> None:
    books = some_books()
    held = {id(g) for level in books.index.levels.values() for b in level._buckets.values() for g in b}
    assert len(held) == len({Group(e.project, e.key_id, e.model, e.operation) for e in books.entries})


async def test_every_settled_request_counts_as_one() -> None:
    world = await World().open()
    for outcome in ("completed", "upstream_error", "refused", "client_disconnected"):
        await (await world.reserve()).settle(outcome, Usage(10, 0, 5))  # type: ignore[arg-type]
    (result,) = world.results("completions", start_time=NOON)
    assert (result["num_model_requests"], result["output_tokens"]) == (4, 10)
