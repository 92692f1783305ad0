"""Serials seen before, and the list at the pinned URL: what a client brings beside the evidence."""

from __future__ import annotations

from typing import Any

import pytest

from attestation.deployment import SerialFloor
from attestation.result import Check, Status
from attestation.statements import UrlStatus, read_status
from tests.genuine import NOW, any_reason, genuine, operator_key, signer_key

URL = "https://status.test/list.json"
ASKED = {"deployment.status-url": URL}
HONEST = SerialFloor(statement=7, status=3)


def check(result: Any, id: str) -> Check:
    found: list[Check] = [c for c in result.checks if c.id == id]
    assert len(found) == 1, id
    return found[0]


@pytest.mark.parametrize(
    "floor", [SerialFloor(), HONEST, SerialFloor(6, 2), SerialFloor(statement=7), SerialFloor(status=3)]
)
def test_serials_that_are_not_lower_than_those_seen_pass(floor: SerialFloor) -> None:
    result = genuine().verify(serial_floor=floor)
    assert result.accepted
    for id in ("deployment.serial-seen", "status.serial-seen"):
        assert check(result, id).status is Status.PASS


@pytest.mark.parametrize(
    ("floor", "codes"),
    [
        (SerialFloor(8, 3), ("DEPLOYMENT_ROLLBACK",)),
        (SerialFloor(7, 4), ("STATUS_ROLLBACK",)),
        (SerialFloor(8, 4), ("DEPLOYMENT_ROLLBACK", "STATUS_ROLLBACK")),
        (SerialFloor(statement=1 << 60), ("DEPLOYMENT_ROLLBACK",)),
    ],
)
def test_an_older_statement_or_list_than_one_seen_before_is_refused(floor: SerialFloor, codes: tuple[str, ...]) -> None:
    result = genuine().verify(serial_floor=floor)
    assert result.codes == codes
    assert result.failed[0].expected.startswith(">= ") and result.failed[0].actual in ("7", "3")


def test_a_client_that_remembers_nothing_is_told_that_nothing_was_compared() -> None:
    result = genuine().verify()
    assert result.accepted
    for id in ("deployment.serial-seen", "status.serial-seen"):
        assert check(result, id).reason == "no serials seen earlier were given"


def test_floors_are_not_asked_of_what_a_policy_leaves_out() -> None:
    floor = SerialFloor(99, 99)
    assert genuine(policy={"deployment": any_reason()}).verify(serial_floor=floor).accepted
    bare = {"deployment.status-list": any_reason(), "deployment.status-url": any_reason()}
    assert genuine(policy=bare).verify(serial_floor=floor).codes == ("DEPLOYMENT_ROLLBACK",)


@pytest.mark.parametrize("step", ["_not_older", "_beside_url"])
def test_a_comparison_that_says_nothing_is_not_taken_for_one_that_passed(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    story = genuine(policy=ASKED)
    monkeypatch.setattr(f"attestation.statements.{step}", lambda *a, **k: None)
    result = story.verify(serial_floor=HONEST, at_url=UrlStatus(3))
    assert result.codes == ("VERIFIER_INCOMPLETE",)
    silent = {"_not_older": "deployment.serial-seen, status.serial-seen", "_beside_url": "status.url"}
    assert result.failed[0].actual == silent[step]


def test_floors_merge_to_the_higher_of_each_kind() -> None:
    assert SerialFloor(7, None).merge(SerialFloor(6, 3)) == SerialFloor(7, 3)
    assert SerialFloor().merge(SerialFloor(None, 0)) == SerialFloor(None, 0)


# --- the list at the pinned URL ---


@pytest.mark.parametrize(
    ("policy", "found", "status", "said"),
    [
        (ASKED, UrlStatus(3), Status.PASS, "not older"),
        (ASKED, UrlStatus(2), Status.PASS, "not older"),
        (ASKED, UrlStatus(4), Status.FAIL, "not older"),
        (ASKED, UrlStatus(None, "TRANSPORT_CONNECT: down"), Status.SKIP, "TRANSPORT_CONNECT: down"),
        (ASKED, None, Status.SKIP, "nobody asked the pinned URL"),
        ({}, UrlStatus(4), Status.SKIP, "the evidence's list is all there is"),
    ],
)
def test_what_the_url_gave_stands_in_the_result(
    policy: dict[str, Any], found: UrlStatus | None, status: Status, said: str
) -> None:
    result = genuine(policy=policy).verify(at_url=found)
    told = check(result, "status.url")
    assert told.status is status and said in told.reason
    assert result.codes == (("STATUS_URL",) if status is Status.FAIL else ())


def test_a_list_counts_when_enough_pinned_keys_signed_it_whatever_its_dates() -> None:
    honest = genuine()
    found = read_status(honest.evidence.status, honest.policy)
    assert found is not None and found.serial == 3
    ended = genuine(status={"issued_at": NOW - 9999, "next_update": NOW - 9000})
    assert read_status(ended.evidence.status, ended.policy) is not None
    release = genuine(status_keys=(), status_release_keys=(0,))
    assert read_status(release.evidence.status, release.policy) is not None
    two = {"deployment.threshold": 2}  # too few operators do not spoil what the signers are enough for
    both = genuine(policy=two, statement_keys=(0, 1), status_keys=(0,), status_release_keys=(0,))
    assert read_status(both.evidence.status, both.policy) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"status_keys": ()}, {"status_keys": (9,)}, {"status_type": "application/json"}, {"status": None},
        {"policy": {"deployment.threshold": 2}, "statement_keys": (0, 1)},
        {"status_edit": lambda raw: raw[:-1]}, {"status_edit": lambda raw: b"null"},
        {"status_edit": lambda raw: genuine().evidence.deployment},
        {"status_edit": lambda raw: raw.replace(b'"keyid":"', b'"keyid":"x')[:100]},
        {"policy": {"deployment": any_reason()}},
        {"policy": {"deployment.status-list": any_reason(), "deployment.status-url": any_reason()}},
        {"policy": {"release": any_reason()}, "status_keys": (), "status_release_keys": (0,)},
    ],
)  # fmt: skip
def test_anything_else_is_no_list(changes: dict[str, Any]) -> None:
    story = genuine(**changes)
    assert read_status(story.evidence.status, story.policy) is None


def test_keys_of_the_two_kinds_do_not_add_up() -> None:
    """One operator of two and one release signer of two are not two of either."""
    two = {"deployment.threshold": 2, "release.threshold": 2}
    story = genuine(policy=two, status_keys=(0,), status_release_keys=(0,), statement_keys=(0, 1), manifest_keys=(0, 1))
    assert read_status(story.evidence.status, story.policy) is None
    assert operator_key(0) != signer_key(0)
