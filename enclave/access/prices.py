"""What a request costs: a price table of integers, named by its own digest.

Runs in the enclave; the table is part of the measured configuration. A price is **nano-USD per 1,000,000 tokens**
(0.15 USD per million is 150_000_000): whole nano-USD per token could not say 0.0125 USD per million. The rule:

    line  = (tokens * price + 500_000) // 1_000_000      nano-USD, rounded half up, once per line and request
    cost  = request + line(input - cached) + line(cached) + line(output)
    nothing used, nothing charged: without a token the fixed price per request does not apply either

Every line of a request is an integer, so costs by line add up to costs. Reasoning tokens are output tokens. A model
without prices is refused, an explicit 0 is a price.

The digest is SHA-256 of the table's JCS form. Receipts and ledger entries name it, and every table that was ever used
stands in the ledger, so that anyone who holds entries can work out each cost again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NoReturn

from attestation.errors import InputError, VouchsafeError
from attestation.strict_json import DIGEST, jcs

__all__ = ["CENT", "CHANGE_FACTOR", "MAX_NANOUSD", "ZERO", "Lines", "Price", "PriceError", "PriceTable", "Usage"]

CENT: Final = 10_000_000
"""nano-USD."""
MAX_NANOUSD: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps: 9 million USD."""
MAX_TOKENS: Final = 2_000_000_000
"""Of one kind in one request."""
MAX_PRICE: Final = 1_000_000_000_000
"""nano-USD per million tokens: 1000 USD. Three lines of MAX_TOKENS stay below MAX_NANOUSD."""
MAX_REQUEST: Final = 1_000_000_000_000
"""nano-USD per request."""
MAX_MODELS: Final = 64
CHANGE_FACTOR: Final = 4
"""A price that moves by more than this, up or down, is taken for a slip of the pen until it is confirmed."""

UNIT: Final = "nano-usd-per-million-tokens"
_MILLION: Final = 1_000_000
MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")


class PriceError(VouchsafeError):
    """A request that cannot be priced. `PRICE_UNKNOWN` (the model has no price: 503), `PRICE_TOKENS` (too many)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, as the engine counted them. Raises ValueError for what cannot be.

    cached_tokens   of the input, found in the prefix cache;  reasoning_tokens   of the output
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= MAX_TOKENS:
                raise ValueError(f"{name} is an integer from 0 to {MAX_TOKENS}")
        if self.cached_tokens > self.input_tokens or self.reasoning_tokens > self.output_tokens:
            raise ValueError("cached tokens are input tokens, reasoning tokens are output tokens")


ZERO: Final = Usage()


@dataclass(frozen=True, slots=True)
class Lines:
    """What one request costs, line by line, in nano-USD."""

    request: int
    input: int
    cached_input: int
    output: int

    @property
    def total(self) -> int:
        return self.request + self.input + self.cached_input + self.output

    def at_most(self, most: int) -> Lines:
        """The same lines cut down to *most* altogether, the last line first."""
        if self.total <= most:
            return self
        parts = []
        for line in (self.request, self.input, self.cached_input, self.output):
            parts.append(min(line, most))
            most -= parts[-1]
        return Lines(*parts)


@dataclass(frozen=True, slots=True)
class Price:
    """Prices of one model: nano-USD per 1,000,000 tokens; `request` in nano-USD."""

    input: int
    cached_input: int
    output: int
    request: int = 0

    def lines(self, usage: Usage) -> Lines:
        if usage.input_tokens == usage.output_tokens == 0:
            return Lines(0, 0, 0, 0)
        return Lines(
            self.request,
            _line(usage.input_tokens - usage.cached_tokens, self.input),
            _line(usage.cached_tokens, self.cached_input),
            _line(usage.output_tokens, self.output),
        )

    def ceiling(self, input_tokens: int, output_tokens: int) -> int:
        """The most that any usage up to these counts can cost, however its input divides into cached and not."""
        dearer = max(self.input, self.cached_input)
        if self.input % _MILLION == self.cached_input % _MILLION == 0:
            inputs = input_tokens * dearer // _MILLION
        else:  # two lines rounded half up: together at most 1 above the whole part of their sum
            inputs = input_tokens * dearer // _MILLION + 1
        return self.request + inputs + _line(output_tokens, self.output)


@dataclass(frozen=True, slots=True)
class PriceTable:
    """All prices, in USD. Holding one proves that every number was understood; not that anybody agreed to it.

    digest     32 bytes, over everything but `confirms`
    confirms   digest of the table that this one may differ from by more than CHANGE_FACTOR, None without
    """

    models: Mapping[str, Price]
    confirms: bytes | None = None
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))
        object.__setattr__(self, "digest", hashlib.sha256(self.encode()).digest())

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> PriceTable:  # Any: TOML or JSON values
        """The `[prices]` table of the configuration, or its JSON. Raises `InputError`, naming the field.

        currency = "USD"                           unit = "nano-usd-per-million-tokens"
        confirms = "sha256:…"                      # only for one big change: digest of the table before
        [prices.models.parrot]
        input = 150_000_000                        cached-input = 75_000_000
        output = 600_000_000                       request = 0      # optional
        """
        top = _fields(document, "prices", {"currency", "unit", "models"}, {"confirms"})
        for key, wanted in (("currency", "USD"), ("unit", UNIT)):
            if top[key] != wanted:
                _refuse(f"prices.{key}", "is not known", expected=wanted, actual=top[key])
        rows = top["models"]
        if not isinstance(rows, Mapping) or not 1 <= len(rows) <= MAX_MODELS:
            _refuse("prices.models", "wrong number of models", expected=f"1 to {MAX_MODELS} tables")
        for id in rows:
            if not isinstance(id, str) or MODEL_ID.fullmatch(id) is None:
                _refuse("prices.models", "is not keyed by model ids", expected="letters, digits, . _ / : -", actual=id)
        return cls({id: _price(f"prices.models.{id}", row) for id, row in rows.items()}, _confirms(top))

    @classmethod
    def decode(cls, raw: bytes) -> PriceTable:
        """The inverse of `encode`; only the canonical form is read. Raises `InputError`."""
        try:
            table = cls.parse(json.loads(raw))
        except (ValueError, RecursionError):
            _refuse("prices", "is not JSON")
        if table.encode() != raw:
            _refuse("prices", "is not in JCS form")
        return table

    def encode(self) -> bytes:
        """JCS. Without `confirms`: to confirm a change is not to make another table."""
        models = {
            id: {"input": p.input, "cached-input": p.cached_input, "output": p.output, "request": p.request}
            for id, p in self.models.items()
        }
        return jcs({"currency": "USD", "unit": UNIT, "models": models})

    def price(self, model: str) -> Price:
        """Raises `PriceError`: a model without a price must not be served, least of all for nothing."""
        found = self.models.get(model)
        if found is None:
            raise PriceError("PRICE_UNKNOWN", "the model has no price", hint="add it to [prices.models]")
        return found

    def lines(self, model: str, usage: Usage) -> Lines:
        """nano-USD by line. Raises `PriceError`."""
        return self.price(model).lines(usage)

    def cost(self, model: str, usage: Usage) -> int:
        """nano-USD. Raises `PriceError`."""
        return self.price(model).lines(usage).total

    def ceiling(self, model: str, prompt_tokens: int, max_output_tokens: int, n: int = 1) -> int:
        """nano-USD that *n* answers of at most *max_output_tokens* each to one prompt cannot exceed.

        A prompt counts once for all its answers. Raises `PriceError`, `PRICE_TOKENS` when the counts are out of bounds.
        """
        for count in (prompt_tokens, max_output_tokens, n):
            if type(count) is not int or not 0 <= count <= MAX_TOKENS:
                raise PriceError("PRICE_TOKENS", "a number of tokens is out of bounds", expected=f"0 to {MAX_TOKENS}")
        if max_output_tokens * n > MAX_TOKENS:
            raise PriceError("PRICE_TOKENS", "the request may use too many tokens", expected=f"<= {MAX_TOKENS}")
        return self.price(model).ceiling(prompt_tokens, max_output_tokens * n)

    def must_follow(self, previous: bytes, last: Mapping[str, Price]) -> None:
        """Raise `InputError` for an unconfirmed jump. A slip of one digit would empty budgets, or give all away.

        previous   digest of the table before;  last   the last price of every model that ever had one, so that
                   taking a model out and putting it back is no way around
        """
        if self.confirms == previous:
            return
        for id, new in sorted(self.models.items()):
            old = last.get(id)
            for name in Price.__slots__ if old is not None else ():
                before, now = getattr(old, name), getattr(new, name)
                if max(before, now) > CHANGE_FACTOR * min(before, now):
                    raise InputError(
                        "INPUT_PRICE_CHANGE",
                        f"prices.models.{id}: {name} changes by more than a factor of {CHANGE_FACTOR}",
                        expected=before,
                        actual=now,
                        hint=f'correct it, or say `confirms = "sha256:{previous.hex()}"` under [prices]',
                    )


def _line(tokens: int, price: int) -> int:
    return (tokens * price + _MILLION // 2) // _MILLION


def _price(where: str, row: object) -> Price:
    values = {"request": 0, **_fields(row, where, {"input", "cached-input", "output"}, {"request"})}
    for key, value in values.items():
        most = MAX_REQUEST if key == "request" else MAX_PRICE
        if type(value) is not int or not 0 <= value <= most:
            _refuse(f"{where}.{key}", "is no price", expected=f"an integer from 0 to {most}", actual=value)
    return Price(values["input"], values["cached-input"], values["output"], values["request"])


def _confirms(top: Mapping[str, Any]) -> bytes | None:  # Any: TOML or JSON values
    value = top.get("confirms")
    if "confirms" in top and not (isinstance(value, str) and DIGEST.fullmatch(value)):
        _refuse("prices.confirms", "is no digest", expected="sha256: and 64 lower-case hex digits")
    return None if value is None else bytes.fromhex(value.removeprefix("sha256:"))


def _fields(value: object, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:  # Any: as above
    if not isinstance(value, Mapping):
        _refuse(where, "is no table")
    for key in sorted(required - value.keys()):
        _refuse(f"{where}.{key}", "is missing", hint="say 0 for what costs nothing")
    for key in value.keys() - required - optional:
        _refuse(f"{where}.{key}", "is not a key that this release knows", hint="remove it, or correct its spelling")
    return dict(value)


def _refuse(where: str, reason: str, *, expected: object = "", actual: object = "", hint: str = "") -> NoReturn:
    raise InputError("INPUT_PRICES", f"{where}: {reason}", expected=expected, actual=actual, hint=hint)
