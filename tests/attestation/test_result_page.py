"""docs/result.md names the fields that results really have."""

from __future__ import annotations

import re
from pathlib import Path

from tests.genuine import genuine

PAGE = (Path(__file__).resolve().parents[2] / "docs/result.md").read_text()


def named(pattern: str) -> set[str]:
    return {name for row in re.findall(pattern, PAGE, re.MULTILINE) for name in re.findall(r"`([a-z_]+)`", row)}


def test_every_field_of_a_result_is_on_the_page_and_no_other() -> None:
    assert named(r"^\| (`.*?`) \|") == set(genuine().verify().as_json())


def test_every_claim_of_an_accepted_enclave_is_on_the_page() -> None:
    story = genuine()
    found = story.verify_channel(story.channel()).as_json()["claims"]
    assert named(r"^(Claims of a whole enclave:[^.]*)\.") == set(found)
