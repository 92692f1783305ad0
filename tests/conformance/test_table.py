"""Every case of the conformance table, through the real batch commands: verdict, and exactly the codes written down."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from attestation.client.cli import main
from tests.conformance.expand import FOLDER, grade, inputs, load_blobs, load_cases

COMMANDS = {"tdx": "verify-quote", "gpu": "verify-gpu"}


@cache
def cases() -> list[dict[str, Any]]:
    return load_cases()


@cache
def expanded() -> dict[str, dict[str, Any]]:
    return inputs(cases(), load_blobs())


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_case_has_its_verdict_and_exactly_its_codes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [c for c in cases() if c["kind"] == kind]
    file = tmp_path / "cases.jsonl"
    file.write_text("".join(json.dumps(expanded()[c["id"]]) + "\n" for c in wanted))
    begin = time.monotonic()
    assert main([COMMANDS[kind], "--batch", str(file)]) == 0, "a case is no case, or a policy no policy"
    taken = time.monotonic() - begin
    answers = {a["id"]: a for a in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(answers) == [c["id"] for c in wanted]
    wrong = {c["id"]: told for c in wanted if (told := grade(c, answers[c["id"]]))}
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())
    # Whoever trusts a root from a file must be told so; the one case without a root stands on Intel's own.
    assert {n for n, a in answers.items() if not a["development"]} <= {"tdx/root-not-named"}
    assert taken < 30, f"{len(wanted)} cases took {taken:.0f} s"


def test_table_is_large_enough_and_every_row_is_whole() -> None:
    refused = [c for c in cases() if c["expect"] == "refused"]
    assert len(refused) >= 200
    assert len({c["id"] for c in cases()}) == len(cases())
    for case in cases():
        assert re.fullmatch(r"(tdx|gpu)/[a-z0-9A-Z.-]+", case["id"]) and case["id"].startswith(case["kind"])
        assert case["clause"].strip() and case["why"].strip() and "\n" not in case["why"], case["id"]
        assert (case["expect"] == "refused") == bool(case["code"]) and (case["code"] or not case["also"])


def test_every_refusal_is_one_mutation_away_from_an_accepted_control() -> None:
    accepted = {c["id"] for c in cases() if c["expect"] == "accepted" and c["control"] is None}
    for case in cases():
        assert case["control"] is None or case["control"] in accepted, case["id"]
        assert case["control"] is not None or case["expect"] == "accepted", case["id"]
        # What was mutated stands in one member of the input (two where evidence and its companion change together).
        assert case["control"] is None or 1 <= len(case["patch"]) <= 2, case["id"]


def test_no_two_cases_ask_the_same() -> None:
    seen = Counter(
        json.dumps({k: v for k, v in given.items() if k != "id"}, sort_keys=True) for given in expanded().values()
    )
    assert max(seen.values()) == 1


def test_data_is_small_enough_to_carry_and_every_blob_is_used() -> None:
    sizes = {p.name: p.stat().st_size for p in FOLDER.iterdir() if p.suffix in (".jsonl", ".xz")}
    assert set(sizes) == {"cases.jsonl", "blobs.tar.xz"}
    assert max(sizes.values()) < 900_000 and sum(sizes.values()) < 1_500_000
    named = set(re.findall(r'"(?:base64|hex|text):([0-9a-f]{20})"', (FOLDER / "cases.jsonl").read_text()))
    assert named == set(load_blobs())
