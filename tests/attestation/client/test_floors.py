"""Serials of statements and status lists: what one run has accepted, no later run accepts an older one of."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from attestation.client.floor import SerialFloors, operator_scope
from attestation.deployment import SerialFloor
from attestation.dsse import public_bytes
from tests.attestation.client.enclave import PROVE, served, session_for, show
from tests.attestation.client.talking import Send, both_roads, refused, talk
from tests.genuine import NOW, Genuine, any_reason, genuine, operator_key

OLDER: dict[str, tuple[dict[str, Any], str]] = {
    "statement": ({"statement": {"serial": 6}}, "DEPLOYMENT_ROLLBACK"),
    "status list": ({"status": {"serial": 2}}, "STATUS_ROLLBACK"),
}
older = pytest.mark.parametrize(("changes", "code"), OLDER.values(), ids=OLDER.keys())


def accepted(story: Genuine, folder: Path | None, **changes: Any) -> None:
    with served(story) as server:
        talk(session_for(server, story, cache_dir=folder, **changes), server)


@both_roads
@older
def test_older_document_than_one_accepted_in_an_earlier_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], code: str, send: Send
) -> None:
    accepted(genuine(), tmp_path)
    old = genuine(**changes)
    with served(old) as server:
        refused(session_for(server, old, cache_dir=tmp_path), server, code, send)
        send(session_for(server, old), server)  # the control: a client that remembers nothing


@older
def test_same_and_newer_documents_are_accepted(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    accepted(genuine(**changes), tmp_path)
    for _ in range(2):
        accepted(genuine(), tmp_path)


def test_older_statement_is_refused_on_a_certificate_that_was_accepted_before_the_newer_was_seen() -> None:
    """Two enclaves behind one name: the one whose certificate still carries the older statement."""
    old, new = genuine(), genuine(key=1, statement={"serial": 8})
    with served(old) as server:
        session = session_for(server, old)
        talk(session, server)
        show(server, new)
        talk(session, server)
        show(server, old)
        error = refused(session, server, "DEPLOYMENT_ROLLBACK")
        assert error.result is not None and error.result.failed[0].expected == ">= 8"


def test_known_certificate_is_not_judged_again_while_nothing_newer_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story)
        talk(session, server)
        monkeypatch.setattr("attestation.client.session.verify", None)
        talk(session, server)
        assert server.requests.count(PROVE) == 2


def test_refused_result_raises_no_floor(tmp_path: Path) -> None:
    """Else one list with a high serial, of an enclave that is refused anyway, would lock out the honest one."""
    bad = genuine(statement={"serial": 99, "roles": ["gateway"]}, status={"serial": 99})
    with served(bad) as server:
        refused(session_for(server, bad, cache_dir=tmp_path), server, "DEPLOYMENT_ROLE")
    assert not list(tmp_path.glob("serials-*"))
    accepted(genuine(), tmp_path)


def test_floor_is_of_one_operator_key_set_and_one_name(tmp_path: Path) -> None:
    accepted(genuine(), tmp_path)
    old = genuine(statement={"serial": 6})
    pinned = {"deployment.operators": [public_bytes(operator_key(n)).hex() for n in (0, 1, 7)]}
    other_keys = genuine(statement={"serial": 6}, policy=pinned)
    accepted(other_keys, tmp_path)
    spare = "spare.vouchsafe.test"
    renamed = genuine(statement={"serial": 6}, names=(spare,))
    accepted(renamed, tmp_path, name=spare)
    assert len(list(tmp_path.glob("serials-*.json"))) == 3
    scopes = {operator_scope(s.policy, n) for s in (old, other_keys) for n in ("a.test", "b.test")}
    assert len(scopes) == 4 and operator_scope(genuine(policy={"deployment": any_reason()}).policy, "a.test") == ""


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", '{"statement": -1, "status": 1}', '{"statement": true, "status": 1}', '{"statement": 9}',
        '{"statement": "9", "status": "9"}', '{"statement": 9.5, "status": 9}', "{" * 3000, "[" * 4000, "9" * 4096,
        "\xff",
    ],
)  # fmt: skip
def test_damaged_floor_counts_as_empty_and_is_made_anew(tmp_path: Path, content: str) -> None:
    accepted(genuine(), tmp_path)
    path = next(tmp_path.glob("serials-*.json"))
    path.write_text(content, encoding="latin-1")
    accepted(genuine(statement={"serial": 6}), tmp_path)
    assert json.loads(path.read_text()) == {"statement": 6, "status": 3}


def test_floor_that_somebody_raised_refuses_and_never_accepts(tmp_path: Path) -> None:
    story = genuine()
    accepted(story, tmp_path)
    next(tmp_path.glob("serials-*.json")).write_text('{"statement": 1000, "status": null}')
    with served(story) as server:
        refused(session_for(server, story, cache_dir=tmp_path), server, "DEPLOYMENT_ROLLBACK")


def test_floor_of_another_process_is_not_lowered(tmp_path: Path) -> None:
    policy = genuine().policy
    one, two = SerialFloors(tmp_path, policy, "a.test"), SerialFloors(tmp_path, policy, "a.test")
    one.raise_to(SerialFloor(9, 9))
    two.raise_to(SerialFloor(5, 12))
    assert two.floor == SerialFloor(9, 12) == SerialFloors(tmp_path, policy, "a.test").floor


def test_floor_without_a_folder_is_kept_in_memory() -> None:
    floors = SerialFloors(None, genuine().policy, "a.test")
    floors.raise_to(SerialFloor(9, 9))
    floors.raise_to(SerialFloor(5, 12))
    assert floors.floor == SerialFloor(9, 12)


def test_floors_hold_while_many_connections_raise_them(tmp_path: Path) -> None:
    policy = genuine().policy
    floors = SerialFloors(tmp_path, policy, "a.test")
    threads = [threading.Thread(target=floors.raise_to, args=(SerialFloor(n, n),)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    floors.raise_to(SerialFloor(19, 19))
    assert SerialFloors(tmp_path, policy, "a.test").floor == SerialFloor(19, 19)
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"], "nothing is left beside it"


def test_folder_that_cannot_be_written_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    accepted(genuine(), tmp_path / "file" / "cache")
    assert (tmp_path / "file").read_text() == "in the way"


def test_cache_folder_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        accepted(genuine(), tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_statement_that_ends_is_followed_by_one_of_the_same_serial(tmp_path: Path) -> None:
    """Renewal: other dates under the same serial."""
    accepted(genuine(), tmp_path)
    accepted(genuine(statement={"not_after": NOW + 2 * 86400}), tmp_path)
