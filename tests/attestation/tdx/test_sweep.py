"""One changed byte, anywhere, is a refusal: in a real v4 quote, a real v5 quote, and each field of the collateral.

`make test` takes a seeded sample of the offsets; with VOUCHSAFE_SWEEP=all every offset of every byte is tried. Nothing
is listed as unsigned: what no signature covers (lengths, types, the spelling of PEM and hex, the final NUL) has one
accepted form, and a changed byte is another.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator

import pytest

from attestation.tdx import Quote
from attestation.tdx.collateral import KEYS
from tests.attestation.tdx.judge import Case
from tests.vectors import VECTORS, need_vectors

ALL = os.environ.get("VOUCHSAFE_SWEEP") == "all"
SAMPLE = 250
FRAME = {"v4": range(630, 640), "v5": range(46, 60)}
"""Offsets that are always tried: lengths and types that nothing signs."""

QUOTES = {"v4": "bb7c69487f-eval20", "v5": "cf77a6e91e-eval18"}


def offsets(length: int, always: list[int], seed: str) -> Iterator[int]:
    if ALL:
        yield from range(length)
        return
    yield from always
    yield from random.Random(seed).sample(range(length), min(SAMPLE, length))


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_no_changed_byte_of_a_real_quote_is_accepted(version: str) -> None:
    need_vectors()
    case = Case.read(VECTORS / "tdx" / QUOTES[version])
    data = 636 if version == "v4" else 54 + 648 + 4
    always = [*FRAME[version], *range(data + 126, data + 136), *range(data + 580, data + 586),
              *range(data + 614, data + 650), len(case.quote) - 1, len(case.quote) - 2]  # fmt: skip
    assert case.judge().accepted
    pick = random.Random(version)
    tried = 0
    for offset in offsets(len(case.quote), always, version):
        masks = range(1, 256) if offset in always and ALL else [1 << pick.randrange(8), 0x20]
        for mask in set(masks):
            quote = bytearray(case.quote)
            quote[offset] ^= mask
            verdict = case.judge(quote=bytes(quote), event_log=None)
            assert not verdict.accepted, f"offset {offset} ^ {mask:#x} was accepted"
            tried += 1
    assert tried > 2 * SAMPLE


@pytest.mark.parametrize("field", KEYS)
def test_no_changed_character_of_the_collateral_is_accepted(field: str) -> None:
    need_vectors()
    case = Case.read(VECTORS / "tdx" / QUOTES["v4"])
    collateral = json.loads(case.collateral)
    text: str = collateral[field]
    pick = random.Random(field)
    count = len(text) if ALL else 60
    for offset in [0, len(text) - 1, len(text) - 2, *pick.sample(range(len(text)), min(count, len(text)))]:
        for other in {chr(ord(text[offset]) ^ 1), chr(ord(text[offset]) ^ 0x20)}:
            changed = text[:offset] + other + text[offset + 1 :]
            verdict = case.judge(collateral=json.dumps(collateral | {field: changed}).encode(), event_log=None)
            assert not verdict.accepted, f"{field}[{offset}] = {other!r} was accepted"


def test_sweep_can_see_an_acceptance() -> None:
    """Positive control: the same loop accepts what was not changed."""
    need_vectors()
    case = Case.read(VECTORS / "tdx" / QUOTES["v4"])
    assert case.judge(quote=bytes(bytearray(case.quote)), event_log=None).accepted
    assert Quote.parse(case.quote).raw == case.quote
