"""The status list at the URL a policy pins: it can make a client stricter, and nothing it serves makes it laxer.

The operator's web server is a real HTTPS server under an authority of its own; the service is a real enclave's evidence
over real TLS.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import ssl
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL

from attestation.client.session import AttestedSession
from attestation.client.status import MAX_STATUS, StatusLists, fetch_status
from attestation.deployment import salted
from attestation.errors import TransportError
from attestation.result import Check
from tests.attestation.client.enclave import FETCH, served, session_for, show
from tests.attestation.client.ratls_server import Server, answer, plain_certificate
from tests.attestation.client.talking import Send, both_roads, refused, talk
from tests.attestation.client.web import LIST, WebServer, trusting
from tests.genuine import NOW, SALT, Genuine, genuine, machine

DENIED = {"platforms": [salted(SALT, machine().facts.piid)]}


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as running:
        yield running


def told(web: WebServer, **changes: Any) -> Genuine:
    """An enclave whose clients' policy pins *web*."""
    return genuine(**{**changes, "policy": {"deployment.status-url": web.url, **changes.get("policy", {})}})


def listed(**fields: Any) -> bytes:
    """A status list of the operator's, newer than the one in the honest evidence (serial 3) unless a field says so."""
    keys = fields.pop("keys_that_sign", (0,))
    return genuine(status={"serial": 4, **fields}, status_keys=keys).evidence.status


def client(server: Server, story: Genuine, **changes: Any) -> AttestedSession:
    return session_for(server, story, **{"fetch_list": partial(fetch_status, context=trusting()), **changes})


def said(session: AttestedSession, id: str = "status.url") -> Check:
    assert session.last_result is not None
    return next(c for c in session.last_result.checks if c.id == id)


# --- what is judged ---


@both_roads
def test_a_newer_list_at_the_url_is_the_one_that_is_judged(web: WebServer, send: Send) -> None:
    story = told(web)
    with served(story) as server:
        web.routes[LIST] = answer(listed())
        session = client(server, story)
        send(session, server)
        assert session.last_result is not None and session.last_result.claims["status_serial"] == 4
        assert said(session).status == "pass" and said(session).actual == "4"
        kept = session.newest_bundle()
        assert kept is not None and kept.evidence.status == listed(), "saved evidence has the list that was judged"


@both_roads
def test_a_withdrawal_that_the_host_holds_back_is_found_at_the_url(web: WebServer, send: Send) -> None:
    story = told(web)
    with served(story) as server:
        web.routes[LIST] = answer(listed(**DENIED))
        refused(client(server, story), server, "STATUS_DENIED", send)
        talk(session_for(server, story, fetch_list=fetch_status), server)  # the control: nobody could ask the URL


def test_the_url_is_a_second_road_for_a_service_that_brings_no_list(web: WebServer) -> None:
    story = told(web, status=None)
    with served(story) as server:
        web.routes[LIST] = answer(listed())
        talk(client(server, story), server)


def test_an_older_list_at_the_url_does_not_replace_the_evidences(web: WebServer) -> None:
    story = told(web, status=DENIED)
    with served(story) as server:
        web.routes[LIST] = answer(listed(serial=2))
        refused(client(server, story), server, "STATUS_DENIED")


def test_a_newer_list_that_has_ended_is_not_replaced_by_an_older_current_one(web: WebServer) -> None:
    """By its serial it is the newer one; what it took back may still be taken back."""
    story = told(web)
    with served(story) as server:
        web.routes[LIST] = answer(listed(issued_at=NOW - 3600, next_update=NOW - 1))
        refused(client(server, story), server, "STATUS_EXPIRED")


def test_a_list_signed_again_under_its_serial_is_the_newer_one(web: WebServer) -> None:
    story = told(web)
    late = NOW + 3200  # past the evidence's list, not past the certificate
    with served(story) as server:
        web.routes[LIST] = answer(listed(serial=3, issued_at=NOW + 100, next_update=NOW + 3700))
        talk(client(server, story, clock=lambda: late), server)


def test_a_policy_without_a_url_asks_nobody() -> None:
    story = genuine()

    def never(url: str) -> bytes:
        raise AssertionError(url)

    with served(story) as server:
        session = session_for(server, story, fetch_list=never)
        talk(session, server)
        assert said(session).status == "skip"


# --- what a URL may answer without any effect ---

NONSENSE: dict[str, tuple[bytes, str]] = {
    "nothing": (answer(b""), "no status list"),
    "text": (answer(b"hello"), "no status list"),
    "deep": (answer(b"[" * 100_000), "no status list"),
    "not signed by the operator": (answer(listed(keys_that_sign=(9,))), "no status list"),
    "not signed at all": (answer(listed(keys_that_sign=())), "no status list"),
    "a statement": (answer(genuine().evidence.deployment), "no status list"),
    "an edited list": (answer(listed().replace(b'"payload":"', b'"payload":"eyJ')), "no status list"),
    "a list that cannot be read": (answer(json.dumps({"payload": 1}).encode()), "no status list"),
    "too long": (answer(b"x" * (MAX_STATUS + 1)), "FORMAT_ANSWER_SIZE"),
    "endlessly long": (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n" + b"x" * (1 << 18), "FORMAT_ANSWER"),
    "a long head": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, "FORMAT_ANSWER"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9\r\n\r\n" * 4, "FORMAT_ANSWER"),
    "an error": (answer(listed(), status="500 No"), "TRANSPORT_STATUS"),
    "no such file": (answer(b"", status="404 Not Found"), "TRANSPORT_STATUS"),
    "cut": (b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\nconnection: close\r\n\r\n{", "FORMAT_ANSWER"),
    "an end": (b"", "FORMAT_ANSWER"),
    "a redirect elsewhere": (answer(b"", status="302 Found", headers="location: https://127.0.0.1:1/\r\n"), "_STATUS"),
    "a redirect to plain HTTP": (answer(b"", status="301 M", headers="location: http://127.0.0.1/\r\n"), "_STATUS"),
}  # fmt: skip


@pytest.mark.parametrize(("reply", "why"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_at_the_url_changes_nothing_and_the_result_says_so(web: WebServer, reply: bytes, why: str) -> None:
    def respond(connection: Any, body: bytes) -> bytes:
        if not reply:
            return b""
        connection.tls.sendall(reply)
        return b""  # and end: a cut answer is over

    good, bad = told(web), told(web, status=DENIED)
    web.routes[LIST] = respond
    with served(good) as server:
        session = client(server, good)
        talk(session, server)
        assert said(session).status == "skip" and why in said(session).reason, said(session).reason
        assert session.last_result is not None and session.last_result.claims["status_serial"] == 3
    with served(bad) as server:
        refused(client(server, bad), server, "STATUS_DENIED")


def test_redirect_is_not_followed_even_to_the_same_server(web: WebServer) -> None:
    web.routes[LIST] = answer(b"", status="302 Found", headers=f"location: {web.url}2\r\n")
    web.routes[LIST + "2"] = answer(listed())
    with pytest.raises(TransportError, match="TRANSPORT_STATUS"):
        fetch_status(web.url, context=trusting())
    assert web.requests == [LIST]


def test_server_that_the_trust_store_does_not_know_is_not_asked(web: WebServer) -> None:
    web.routes[LIST] = answer(listed())
    with pytest.raises(TransportError, match="TRANSPORT_CONNECT"):
        fetch_status(web.url)
    with Server(*plain_certificate("127.0.0.1")) as impostor, pytest.raises(TransportError, match="certificate"):
        fetch_status(f"https://127.0.0.1:{impostor.port}/status.json", context=trusting())
    assert web.received == b""


def test_certificate_for_another_name_is_not_taken(web: WebServer) -> None:
    with pytest.raises(TransportError, match="TRANSPORT_CONNECT"):
        fetch_status(web.url.replace("127.0.0.1", "localhost"), context=trusting())
    assert web.received == b""


def test_request_is_fixed_and_free_of_credentials(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", "/nonexistent")
    web.routes[LIST] = answer(listed())
    assert fetch_status(web.url, context=trusting()) == listed()
    assert web.received.decode() == (
        f"GET /status.json HTTP/1.1\r\nHost: 127.0.0.1:{web.port}\r\nAccept-Encoding: identity\r\n"
        "User-Agent: vouchsafe\r\nConnection: close\r\n\r\n"
    )


def test_server_that_drips_its_answer_is_given_up(web: WebServer) -> None:
    def drip(connection: Any, body: bytes) -> bytes:
        for _ in range(200):
            connection.tls.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.02)
        return b""

    web.routes[LIST] = drip
    with pytest.raises(TransportError, match="TRANSPORT_DEADLINE"):
        fetch_status(web.url, context=trusting(), seconds=0.3)


def test_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/status.json"
        with pytest.raises(TransportError, match="TRANSPORT_DEADLINE"):
            fetch_status(url, context=trusting(), seconds=0.2)


@pytest.mark.parametrize(
    "url", [f"https://{'a' * 63}.{'b' * 190}/", "https://nobody.invalid/", "https://x.invalid:99999/"]
)
def test_name_that_cannot_be_looked_up_is_an_answer_too(url: str) -> None:
    with pytest.raises(TransportError, match="TRANSPORT_CONNECT"):
        fetch_status(url, seconds=2)


def test_old_tls_is_not_spoken() -> None:
    """The machine's own defaults hold: TLS 1.2 at least."""
    assert trusting().minimum_version >= ssl.TLSVersion.TLSv1_2
    with WebServer() as web:
        web.max_version = SSL.TLS1_2_VERSION
        web.routes[LIST] = answer(listed())
        assert fetch_status(web.url, context=trusting()) == listed()


@pytest.mark.parametrize("error", [RuntimeError("secret"), MemoryError(), RecursionError(), KeyError("x")])
def test_fetcher_that_breaks_does_not_break_the_client(web: WebServer, error: Exception) -> None:
    def broken(url: str) -> bytes:
        raise error

    story = told(web)
    with served(story) as server:
        session = client(server, story, fetch_list=broken)
        talk(session, server)
        assert type(error).__name__ in said(session).reason and "secret" not in said(session).reason


# --- when it is asked ---


def test_url_is_asked_before_the_first_connection_and_when_its_list_has_ended(web: WebServer) -> None:
    story = told(web)
    clock = [float(story.now)]
    with served(story) as server:
        web.routes[LIST] = answer(listed(next_update=NOW + 1000))
        session = client(server, story, clock=lambda: clock[0])
        for _ in range(3):
            talk(session, server)
        assert web.requests == [LIST]
        clock[0] = NOW + 1001.0
        web.routes[LIST] = answer(listed(serial=5, issued_at=NOW + 900, next_update=NOW + 3600, **DENIED))
        refused(session, server, "STATUS_DENIED")
        assert web.requests == [LIST] * 2


def test_url_that_is_down_is_asked_again_after_a_minute_and_does_not_slow_every_connection(web: WebServer) -> None:
    story = told(web)
    clock = [float(story.now)]
    with served(story) as server:
        web.routes[LIST] = answer(b"", status="503 Busy")
        session = client(server, story, clock=lambda: clock[0])
        for _ in range(3):
            talk(session, server)
        assert web.requests == [LIST]
        clock[0] += 61
        web.routes[LIST] = answer(listed(**DENIED))
        refused(session, server, "STATUS_DENIED")  # a certificate accepted a minute ago is judged anew
        clock[0] -= 30
        refused(session, server, "STATUS_DENIED")


def test_evidences_list_serves_only_as_long_as_it_is_current_when_the_url_is_down(web: WebServer) -> None:
    story = told(web)
    clock = [float(story.now)]
    with served(story) as server:
        web.routes[LIST] = answer(b"", status="503 Busy")
        session = client(server, story, clock=lambda: clock[0])
        talk(session, server)
        clock[0] = NOW + 3001.0
        refused(session, server, "STATUS_EXPIRED")


def test_newer_list_in_one_enclaves_evidence_counts_for_the_next_one() -> None:
    first, second = genuine(status={"serial": 9, **DENIED}), genuine(key=1)
    with served(second) as server:
        session = session_for(server, second)
        talk(session, server)
        show(server, first)
        refused(session, server, "STATUS_DENIED")
        show(server, second)
        refused(session, server, "STATUS_DENIED")


# --- between runs ---


def test_list_of_the_url_is_kept_between_runs_and_spares_the_next_one_the_question(
    web: WebServer, tmp_path: Path
) -> None:
    story = told(web)
    with served(story) as server:
        web.routes[LIST] = answer(listed(**DENIED))
        refused(client(server, story, cache_dir=tmp_path), server, "STATUS_DENIED")
        web.routes[LIST] = answer(b"", status="503 Busy")
        refused(client(server, story, cache_dir=tmp_path), server, "STATUS_DENIED")
        assert web.requests == [LIST]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 10, b"x" * (MAX_STATUS + 10)])
def test_damaged_list_on_disk_counts_as_none(web: WebServer, tmp_path: Path, content: bytes) -> None:
    story = told(web)
    with served(story) as server:
        web.routes[LIST] = answer(listed())
        talk(client(server, story, cache_dir=tmp_path), server)
        path = next(tmp_path.glob("status-*.json"))
        path.write_bytes(content)
        talk(client(server, story, cache_dir=tmp_path), server)
        assert web.requests == [LIST] * 2 and path.read_bytes() == listed()


def test_evidence_fetched_over_the_connection_may_heal_a_list_that_is_too_old() -> None:
    old, new = genuine(status={"serial": 2}), genuine()
    with served(new) as server:
        session = session_for(server, new)
        talk(session, server)
        fresh = session_for(server, old)
        fresh._serial_floors = session._serial_floors
        talk(fresh, server)
        assert server.requests.count(FETCH) == 1


def test_lists_are_ordered_by_serial_then_by_date(web: WebServer) -> None:
    story = told(web)
    answers = [listed(), listed(serial=3), listed(serial=4, next_update=NOW + 3000), listed(serial=5)]
    lists = StatusLists(story.policy, None, "x", lambda url: answers[0])
    lists.refresh(NOW)
    seen = [lists.newest(dataclasses.replace(story.evidence, status=raw)).status for raw in [*answers, b"junk", b""]]
    assert seen == [answers[0], answers[0], answers[0], answers[3], answers[3], answers[3]]
    assert lists.serial == 5
