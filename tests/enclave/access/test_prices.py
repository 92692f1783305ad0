"""Prices: what a table may say, what a request costs by it, and that a slip of the pen is caught."""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
from typing import Any

import pytest
import rfc8785

from attestation.errors import InputError
from enclave.access.prices import MAX_NANOUSD, MAX_PRICE, MAX_REQUEST, MAX_TOKENS, Price, PriceError, PriceTable, Usage

CONFIG = """
[prices]
currency = "USD"
unit = "nano-usd-per-million-tokens"
[prices.models.parrot]
input = 150_000_000
cached-input = 75_000_000
output = 600_000_000
[prices.models."org/magpie:v1"]
input = 12_500_000
cached-input = 0
output = 0
request = 1000
"""


def document(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = tomllib.loads(CONFIG)["prices"]
    return {**made, **changes}


def table(**prices: Price) -> PriceTable:
    return PriceTable(prices)


def test_table_of_the_configuration_is_read_and_named_by_the_digest_of_its_jcs_form() -> None:
    made = PriceTable.parse(document())
    assert made.models["parrot"] == Price(150_000_000, 75_000_000, 600_000_000, 0)
    assert made.models["org/magpie:v1"] == Price(12_500_000, 0, 0, 1000)
    assert made.digest == hashlib.sha256(made.encode()).digest()
    assert made.encode() == rfc8785.dumps(json.loads(made.encode()))
    assert PriceTable.decode(made.encode()) == made
    # A table with its `request` written out is the same table, and so is one that confirms a change.
    spelled = document()
    spelled["models"]["parrot"]["request"] = 0
    assert PriceTable.parse(spelled).digest == made.digest
    assert PriceTable.parse(document(confirms="sha256:" + "0" * 64)).digest == made.digest
    other = document()
    other["models"]["parrot"]["output"] += 1
    assert PriceTable.parse(other).digest != made.digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"currency": "EUR"}, "prices.currency"),
        ({"unit": "usd"}, "prices.unit"),
        ({"surprise": 1}, "prices.surprise"),
        ({"models": {}}, "prices.models"),
        ({"models": []}, "prices.models"),
        ({"models": {f"m{i}": {"input": 0, "cached-input": 0, "output": 0} for i in range(65)}}, "prices.models"),
        ({"models": {"a b": {"input": 0, "cached-input": 0, "output": 0}}}, "prices.models"),
        ({"models": {"m": {"input": 1, "output": 1}}}, "prices.models.m.cached-input: is missing"),
        ({"models": {"m": {"input": 1, "cached-input": 1}}}, "prices.models.m.output: is missing"),
        ({"models": {"m": {"input": 1, "cached-input": 1, "output": 1, "x": 1}}}, "prices.models.m.x"),
        ({"models": {"m": {"input": 1.5, "cached-input": 1, "output": 1}}}, "prices.models.m.input"),
        ({"models": {"m": {"input": True, "cached-input": 1, "output": 1}}}, "prices.models.m.input"),
        ({"models": {"m": {"input": -1, "cached-input": 1, "output": 1}}}, "prices.models.m.input"),
        ({"models": {"m": {"input": 1, "cached-input": 1, "output": MAX_PRICE + 1}}}, "prices.models.m.output"),
        ({"models": {"m": {"input": 1, "cached-input": 1, "output": 1, "request": MAX_REQUEST + 1}}}, "m.request"),
        ({"models": {"m": 5}}, "prices.models.m"),
        ({"confirms": "yes"}, "prices.confirms"),
    ],
)
def test_anything_else_is_refused_and_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match="INPUT_PRICES") as caught:
        PriceTable.parse(document(**change))
    assert named in caught.value.reason


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"models": {}}', b"[" * 100_000])
def test_stored_table_in_another_form_is_refused(raw: bytes) -> None:
    with pytest.raises(InputError):
        PriceTable.decode(raw)
    with pytest.raises(InputError):
        PriceTable.decode(PriceTable.parse(document()).encode() + b" ")


def test_model_without_a_price_is_refused_and_an_explicit_zero_is_a_price() -> None:
    made = PriceTable.parse(document())
    for ask in (
        lambda: made.price("unknown"),
        lambda: made.cost("unknown", Usage()),
        lambda: made.ceiling("unknown", 0, 0),
    ):
        with pytest.raises(PriceError) as caught:
            ask()
        assert caught.value.code == "PRICE_UNKNOWN"
    free = table(m=Price(0, 0, 0))
    assert free.cost("m", Usage(10, 0, 10)) == free.ceiling("m", 10, 10) == 0


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (Usage(1, 0, 0), 150),
        (Usage(1, 1, 0), 75),
        (Usage(100, 40, 7), 60 * 150 + 40 * 75 + 7 * 600),
        (Usage(100, 40, 7, 7), 60 * 150 + 40 * 75 + 7 * 600),  # reasoning is output, and not counted twice
        (Usage(), 0),
    ],
)
def test_cost_is_the_sum_of_its_lines(usage: Usage, cost: int) -> None:
    assert PriceTable.parse(document()).cost("parrot", usage) == cost


def test_fixed_price_is_for_requests_that_used_something() -> None:
    made = PriceTable.parse(document())
    assert made.cost("org/magpie:v1", Usage(2)) == 1000 + 25
    assert made.cost("org/magpie:v1", Usage()) == 0


@pytest.mark.parametrize(
    ("tokens", "price", "line"),
    [(1, 499_999, 0), (1, 500_000, 1), (3, 500_000, 2), (1, 1_499_999, 1), (1, 1_500_000, 2), (2, 12_500_000, 25)],
)
def test_line_is_rounded_half_up(tokens: int, price: int, line: int) -> None:
    assert table(m=Price(price, 0, 0)).cost("m", Usage(tokens)) == line
    assert table(m=Price(0, price, 0)).cost("m", Usage(tokens, tokens)) == line
    assert table(m=Price(0, 0, price)).cost("m", Usage(0, 0, tokens)) == line


def test_every_line_is_rounded_by_itself() -> None:
    lines = table(m=Price(500_000, 500_000, 500_000)).lines("m", Usage(2, 1, 1))
    assert (lines.input, lines.cached_input, lines.output, lines.total) == (1, 1, 1, 3)


def test_lines_are_cut_from_the_last_one() -> None:
    lines = table(m=Price(1_000_000, 1_000_000, 1_000_000, 5)).lines("m", Usage(20, 10, 30))
    assert [lines.at_most(n).total for n in (0, 5, 14, 45, 100)] == [0, 5, 14, 45, 55]
    assert lines.at_most(14).request == 5 and lines.at_most(14).input == 9


def test_no_usage_within_the_counts_costs_more_than_the_ceiling() -> None:
    seed = random.Random(1)
    tight = 0
    for _ in range(300):
        exact = seed.random() < 0.3
        made = table(m=Price(*(seed.randrange(5) * (1_000_000 if exact else 250_000) for _ in range(3)),
                             seed.randrange(3)))  # fmt: skip
        prompt, output, n = seed.randrange(6), seed.randrange(4), seed.randrange(1, 4)
        costs = [
            made.cost("m", Usage(p, c, o))
            for p in range(prompt + 1)
            for c in range(p + 1)
            for o in range(output * n + 1)
        ]
        ceiling = made.ceiling("m", prompt, output, n)
        assert max(costs) <= ceiling <= max(costs) + 1 + made.price("m").request
        tight += max(costs) == ceiling
    assert tight > 100


def test_largest_request_stays_an_integer_that_json_keeps() -> None:
    dearest = table(m=Price(MAX_PRICE, MAX_PRICE, MAX_PRICE, MAX_REQUEST))
    assert dearest.ceiling("m", MAX_TOKENS, MAX_TOKENS) <= MAX_NANOUSD
    assert dearest.cost("m", Usage(MAX_TOKENS, 0, MAX_TOKENS)) <= MAX_NANOUSD
    for counts in ((MAX_TOKENS + 1, 0, 1), (0, MAX_TOKENS, 2), (-1, 0, 1), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(PriceError) as caught:
            dearest.ceiling("m", *counts)
        assert caught.value.code == "PRICE_TOKENS"


@pytest.mark.parametrize(
    "counts",
    [(-1,), (1, 2), (0, 0, 0, 1), (0, 0, 5, 6), (True,), (1.0,), ("1",), (None,), (MAX_TOKENS + 1,)],
)
def test_usage_that_cannot_be_is_refused(counts: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        Usage(*counts)


# changes


def follow(old: Price, new: Price, *, confirmed: bool = False) -> None:
    before = table(m=old, other=Price(1, 1, 1))
    after = PriceTable({"m": new}, before.digest if confirmed else None)
    after.must_follow(before.digest, before.models)


OLD = Price(1000, 500, 4000, 10)


@pytest.mark.parametrize(
    "new",
    [
        Price(4001, 500, 4000, 10), Price(249, 500, 4000, 10), Price(1000, 0, 4000, 10), Price(1000, 500, 40_000, 10),
        Price(1000, 500, 4000, 0), Price(1000, 500, 4000, 41),
    ],
)  # fmt: skip
def test_jump_of_a_price_needs_confirmation(new: Price) -> None:
    with pytest.raises(InputError) as caught:
        follow(OLD, new)
    assert caught.value.code == "INPUT_PRICE_CHANGE"
    assert table(m=OLD, other=Price(1, 1, 1)).digest.hex() in caught.value.hint
    follow(OLD, new, confirmed=True)


@pytest.mark.parametrize("new", [OLD, Price(4000, 2000, 16_000, 40), Price(250, 125, 1000, 3)])
def test_small_change_needs_none(new: Price) -> None:
    follow(OLD, new)


def test_confirmation_is_for_one_change_only() -> None:
    first = table(m=Price(1, 1, 1))
    with pytest.raises(InputError):
        PriceTable({"m": Price(100, 100, 100)}, first.digest).must_follow(b"\1" * 32, first.models)
