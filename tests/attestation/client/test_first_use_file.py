"""What is written down of a service met, and what follows from its evidence: read strictly, and from nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from attestation.bundle import Bundle
from attestation.client.first_use import MARK, Identity, Meeting, Meetings, changes, identify
from attestation.errors import FormatError, InputError, RefusedError
from tests.genuine import Genuine, any_reason, genuine

UNPINNED = {"deployment": any_reason("exploring: nobody is pinned"), "release": any_reason("exploring: no manifest")}


def told(**changed: Any) -> Genuine:
    return genuine(**changed, policy=UNPINNED)


GOOD = Identity(*[("one",)] * 9)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Identity)] + ["first", "since"])
@pytest.mark.parametrize("value", [..., None, 1.5, -1, "text", {}, [1], [[]], [""], ["x" * 2000], ["x"] * 65])
def test_every_field_of_a_record_is_read_strictly(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "f"
    Meetings(path).keep("https://a.test", Meeting(1, 2, GOOD))
    raw = json.loads(path.read_text())
    if value is ...:
        del raw["services"]["https://a.test"][field]
    else:
        raw["services"]["https://a.test"][field] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="INPUT_FIRST_USE"):
        Meetings(path).get("https://a.test")


def test_record_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    meetings = Meetings(tmp_path / "f")
    odd = dataclasses.replace(GOOD, operator=("Näme \u2028 \x1b[2J\n\"',", "key " + "0" * 64), devices=())
    meetings.keep("https://a.test", Meeting(1, 2, odd))
    meetings.keep("https://b.test", Meeting(3, 4, GOOD))
    assert Meetings(tmp_path / "f").get("https://a.test") == Meeting(1, 2, odd)
    assert changes(odd, GOOD) and not changes(GOOD, GOOD)
    assert (tmp_path / "f").read_text().lstrip().startswith("{") and MARK in (tmp_path / "f").read_text()


def test_identity_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    """A hostile service must not spoil the file for the others."""
    meetings = Meetings(tmp_path / "f")
    meetings.keep("https://a.test", Meeting(1, 2, GOOD))
    before = (tmp_path / "f").read_bytes()
    for hostile in (("x" * 5000,), ("x",) * 65, ("\ud800",), ("",)):
        with pytest.raises(InputError):
            meetings.keep("https://b.test", Meeting(1, 2, dataclasses.replace(GOOD, names=hostile)))
    assert (tmp_path / "f").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("keyid", ["x y", "\x1b[2J", "k" * 200])
def test_key_id_that_is_none_is_refused(keyid: str) -> None:
    story = told(deployment_edit=lambda raw: json.dumps(_with_key_id(json.loads(raw), keyid)).encode())
    with pytest.raises(FormatError):
        identify(story.verify(), Bundle(story.evidence, story.endorsements))


def test_signature_without_a_key_id_is_called_unnamed() -> None:
    story = told(deployment_edit=lambda raw: json.dumps(_with_key_id(json.loads(raw), None)).encode())
    found = identify(story.verify(), Bundle(story.evidence, story.endorsements))
    assert found.operator == ("Example Operator", "key unnamed")


def _with_key_id(envelope: dict[str, Any], keyid: str | None) -> dict[str, Any]:
    for signature in envelope["signatures"]:
        del signature["keyid"]
        if keyid is not None:
            signature["keyid"] = keyid
    return envelope


def test_name_that_is_too_long_to_be_kept_is_refused() -> None:
    story = told(statement={"operator": "x" * 1001})
    with pytest.raises(FormatError, match="FORMAT_FIRST_USE"):
        identify(story.verify(), Bundle(story.evidence, story.endorsements))


def test_identity_follows_from_the_accepted_evidence_alone() -> None:
    story, other = told(), told(key=1)
    with pytest.raises(RefusedError, match="EVIDENCE_LEAF"):
        identify(story.verify(), Bundle(other.evidence, other.endorsements))
    with pytest.raises(RefusedError, match="EVIDENCE_LEAF"):
        identify(story.verify(name="other.test"), Bundle(story.evidence, story.endorsements))
    found = identify(story.verify(), Bundle(story.evidence, story.endorsements))
    assert found.configuration == (f"sha256:{hashlib.sha256(b'the measured configuration').hexdigest()}",)
    assert len(found.roots) == 3
