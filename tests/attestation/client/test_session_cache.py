"""What a session remembers of a service: bundles, verdicts, CRL numbers; never beyond their time, always verified."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from attestation.bundle import Bundle
from attestation.errors import FormatError
from attestation.verifier import verify
from tests.attestation.client.enclave import FETCH, PROVE, served, session_for, show
from tests.attestation.client.ratls_server import answer
from tests.attestation.client.talking import Send, both_roads, refused, talk
from tests.devtee.tdx import CollateralSpec
from tests.genuine import genuine


def test_empty_cache_is_filled_by_one_unverified_fetch_that_sends_only_the_fixed_request() -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story, warm=False)
        talk(session, server)
        assert [c.requests for c in server.connections] == [[PROVE, "POST /v1/x"], [FETCH]]
        fetch = bytes(server.connections[1].app_bytes)
        assert fetch == b"GET /.well-known/vouchsafe/evidence HTTP/1.1\r\nHost: demo.vouchsafe.test\r\n" + (
            b"Accept-Encoding: identity\r\n\r\n"
        )


def test_known_certificate_costs_the_channel_proof_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from attestation.client import session as module

    story = genuine()
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return verify(*arguments, **named)

    monkeypatch.setattr(module, "verify", counted)
    with served(story) as server:
        session = session_for(server, story)
        for _ in range(3):
            talk(session, server)
        assert len(calls) == 1
        assert server.requests.count(PROVE) == 3 and FETCH not in server.requests


def test_verdict_is_not_reused_beyond_its_end() -> None:
    story = genuine()
    clock = [float(story.now)]
    with served(story) as server:
        session = session_for(server, story, clock=lambda: clock[0])
        talk(session, server)
        clock[0] = story.now + 7200
        refused(session, server, "LEAF_EXPIRED")


@both_roads
def test_new_certificate_is_judged_before_its_documents_are_asked_for_on_the_same_connection(send: Send) -> None:
    first, second = genuine(), genuine(key=1, issued_at=1_795_000_000 + 30)
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        show(server, second)
        assert b"404" in send(session, server)
        assert server.connections[-1].requests == [FETCH, PROVE, "POST /v1/x"]


def test_new_certificate_with_a_bad_quote_is_refused_without_a_byte() -> None:
    first = genuine()
    second = genuine(key=1, td={"td_attributes": 0x10000001})
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        before = len(server.received)
        show(server, second)
        refused(session, server, "TDX_ATTRIBUTES")
        assert len(server.received) == before


def test_evidence_of_another_certificate_is_refused() -> None:
    first, second = genuine(), genuine(key=1)
    with served(second) as server:
        server.routes[FETCH] = answer(first.bundle())
        refused(session_for(server, first), server, "EVIDENCE_LEAF")
        assert server.requests == [FETCH]


def test_documents_that_do_not_fit_the_certificate_are_refused_after_they_were_fetched() -> None:
    first, second = genuine(), genuine(key=1, event_log_edit=lambda log: log + b"\0")
    with served(first) as server:
        session = session_for(server, first)
        show(server, second)
        error = refused(session, server, "EVIDENCE_DIGEST")
        assert error.result is not None and server.requests == [FETCH]
        assert session.bundle(hashlib.sha256(second.evidence.leaf).digest()) is None


def test_revocation_list_older_than_one_seen_before_is_refused() -> None:
    first = genuine(collateral=CollateralSpec(crl_number=5))
    second = genuine(key=1, collateral=CollateralSpec(crl_number=4))
    with served(first) as server:
        session = session_for(server, first)
        talk(session, server)
        show(server, second)
        refused(session, server, "TDX_CRL_ROLLBACK")


def test_revocation_list_older_than_one_seen_in_an_earlier_run_is_refused(tmp_path: Path) -> None:
    first = genuine(collateral=CollateralSpec(crl_number=5))
    second = genuine(key=1, collateral=CollateralSpec(crl_number=4))
    with served(first) as server:
        talk(session_for(server, first, cache_dir=tmp_path), server)
    for bundle in tmp_path.glob("*.bundle"):
        bundle.unlink()
    with served(second) as server:
        refused(session_for(server, second, cache_dir=tmp_path), server, "TDX_CRL_ROLLBACK")
    with served(second) as server:  # the control: a client that has seen nothing has nothing to compare with
        talk(session_for(server, second), server)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"root": -1}', '{"root": true, "platform": 1, "processor": 1}', "x" * 9999]
)
def test_damaged_crl_numbers_on_disk_count_as_none(tmp_path: Path, content: str) -> None:
    story = genuine()
    with served(story) as server:
        talk(session_for(server, story, cache_dir=tmp_path), server)
        path = next(tmp_path.glob("crl-*.json"))
        path.write_text(content)
        talk(session_for(server, story, cache_dir=tmp_path), server)
        assert '"root": 1' in path.read_text()


def test_damaged_bundle_is_refused() -> None:
    story = genuine()
    raw = bytearray(story.bundle())
    raw[len(raw) // 2] ^= 1
    with served(story) as server:
        server.routes[FETCH] = answer(bytes(raw))
        session = session_for(server, story, warm=False)
        refused(session, server, "FORMAT_BUNDLE")
        with pytest.raises(FormatError):
            session.prepare()


def test_bundle_on_disk_serves_the_next_program_without_network(tmp_path: Path) -> None:
    story = genuine()
    with served(story) as server:
        talk(session_for(server, story, cache_dir=tmp_path), server)
        again = session_for(server, story, warm=False, cache_dir=tmp_path)
        before = server.requests.count(FETCH)
        talk(again, server)
        assert server.requests.count(FETCH) == before


def test_tampered_cache_on_disk_is_not_believed(tmp_path: Path) -> None:
    story = genuine()
    with served(story) as server:
        talk(session_for(server, story, cache_dir=tmp_path), server)
        path = next(tmp_path.glob("*.bundle"))
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
        path.write_bytes(raw)
        again = session_for(server, story, warm=False, cache_dir=tmp_path)
        talk(again, server)
        assert FETCH in server.requests


def test_cache_stays_bounded() -> None:
    story = genuine()
    with served(story) as server:
        session = session_for(server, story)
        for n in range(50):
            evidence = dataclasses.replace(story.evidence, leaf=b"%d" % n)
            session.offer(Bundle(evidence, story.endorsements))
        assert len(session._bundles) <= 16
