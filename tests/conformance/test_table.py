"""Every case of the conformance table, through the real batch commands: verdict, and exactly the codes written down."""

from __future__ import annotations

import base64
import json
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from attestation.bundle import Bundle
from attestation.client.cli import main
from attestation.endorsements import Endorsements
from attestation.evidence import Evidence
from tests.conformance.expand import FOLDER, grade, inputs, load_blobs, load_cases
from tests.conformance.make import hardware
from tests.conformance.page import README, written

COMMANDS = {"tdx": "verify-quote", "gpu": "verify-gpu"}
"""Kinds that have a batch command. A bundle is verified one by one, as people do."""


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


def saved(given: dict[str, Any], folder: Path) -> list[str]:
    """The command line for a case of kind `bundle`, its files written to *folder*."""
    raw = {n: base64.b64decode(v) for n, v in given["bundle"].items() if isinstance(v, str)}
    named = {k: {n: base64.b64decode(v) for n, v in given["bundle"][k].items()} for k in ("rims", "ocsp")}
    evidence = Evidence(raw["leaf"], raw["keyset"], raw["event-log"], raw["release"], raw["deployment"], raw["status"])
    endorsements = Endorsements(raw["collateral"], named["rims"], named["ocsp"])
    (folder / "saved.bundle").write_bytes(Bundle(evidence, endorsements).encode())
    (folder / "policy.toml").write_text(given["policy"])
    files = [str(folder / "saved.bundle"), "--policy", str(folder / "policy.toml")]
    return ["verify", *files, "--at", str(given["at"]), "--name", given["name"], "--json"]


def test_every_bundle_has_its_verdict_and_exactly_its_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {}
    for case in (c for c in cases() if c["kind"] == "bundle"):
        status = main(saved(expanded()[case["id"]], tmp_path))
        answer = json.loads(capsys.readouterr().out)
        told = grade(case, answer)
        if told or status != {"accepted": 0, "refused": 1}[case["expect"]] or not answer["development"]:
            wrong[case["id"]] = f"{told} (exit status {status})"
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())


def test_table_is_large_enough_and_every_row_is_whole() -> None:
    refused = [c for c in cases() if c["expect"] == "refused"]
    assert len(refused) >= 200
    assert len({c["id"] for c in cases()}) == len(cases())
    for case in cases():
        assert re.fullmatch(r"(tdx|gpu|bundle)/[a-z0-9A-Z.-]+", case["id"]) and case["id"].startswith(case["kind"])
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


def test_the_page_has_the_numbers_and_clauses_of_the_table() -> None:
    page = README.read_text("utf-8")
    assert page == written(page, cases()), "run python -m tests.conformance.make"
    assert "| `tdx`, TDX quotes |" in page and page.count("<!-- end -->") == 2


def test_every_code_of_the_verifiers_page_is_in_the_table_or_among_the_gaps_with_its_reason() -> None:
    told = set()
    for line in (FOLDER.parents[1] / "docs" / "verification.md").read_text("utf-8").splitlines():
        if line.startswith("| `"):
            told |= set(re.findall(r"`([A-Z]+_[A-Z_0-9]+)`", " ".join(line.split("|")[1:3])))
    assert len(told) > 100
    gaps = README.read_text("utf-8").split("## Gaps")[1]
    admitted = set(
        re.findall(r"`([A-Z]+_[A-Z_0-9]+)`", " ".join(x.split("|")[1] for x in gaps.splitlines() if x[:3] == "| `"))
    )
    asked = {c["code"] for c in cases()} - {""}
    assert told - asked - admitted == set(), "add a case, or a row under Gaps"
    assert admitted & asked == set(), "no gap any more"
    assert asked <= told, "codes that the verifier's page does not know"


def test_a_table_made_anew_asks_the_same() -> None:
    """Row by row, all but the bytes: what is committed is what these files say."""
    made: list[dict[str, Any]] = []
    for kind in ("tdx", "gpu"):
        made += [{**row, "patch": sorted(row["patch"])} for row in hardware(kind).rows]
    kept = [{**c, "patch": sorted(c["patch"])} for c in cases() if c["kind"] != "bundle"]
    assert made == kept, "run python -m tests.conformance.make"


def test_a_wrong_answer_is_told() -> None:
    case = next(c for c in cases() if c["also"])
    right = {"verdict": "refused", "codes": [case["code"], *case["also"]]}
    assert grade(case, right) == "" == grade(case, {**right, "codes": [case["code"]]}, strict=False)
    for wrong in (
        None,
        {**right, "verdict": "accepted"},
        {**right, "codes": case["also"]},
        {**right, "codes": [case["code"]]},
    ):
        assert grade(case, wrong)
    assert grade(case, {**right, "codes": case["also"]}, strict=False)
