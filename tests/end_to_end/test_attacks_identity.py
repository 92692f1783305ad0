"""Genuine enclaves that are not the one meant: another name, role, configuration, operator, machine; or withdrawn, or
vouched for by what has run out. The attacker here needs no key: it only leads the client's bytes to the wrong place,
so the enclave proves its own channel honestly and nothing but the named check stands in the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from attestation.client.session import AttestedSession
from attestation.deployment import salted
from tests.attestation.client.enclave import FETCH, served, session_for, show
from tests.attestation.client.ratls_server import Server
from tests.attestation.client.talking import Send, both_roads, talk
from tests.end_to_end.attacks import THROUGH, check, stops
from tests.genuine import CONFIG, NAME, NOW, SALT, Genuine, genuine, gpu_serial, machine

DAY = 86400


@contextlib.contextmanager
def reached(wrong: Genuine, **client: Any) -> Iterator[tuple[AttestedSession, Server]]:
    """A client that dials NAME under the honest policy reaches *wrong*."""
    with served(wrong) as server:
        yield session_for(server, wrong, **{"name": NAME, "policy": genuine().policy, **client}), server


def instead(wrong: Genuine, **client: Any) -> Callable[[], Any]:
    return lambda: reached(wrong, **client)


def as_gateway(claims: Any) -> Any:
    return dataclasses.replace(claims, role="gateway")


@both_roads
def test_enclave_of_the_operator_under_another_name(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diversion: the operator's own spare, same release, same configuration. Only the name tells them apart."""
    wrong = genuine(names=("spare.vouchsafe.test",))
    stops(instead(wrong), "LEAF_NAME", (check("leaf.name"), THROUGH), monkeypatch=monkeypatch, send=send)


@both_roads
def test_enclave_that_gives_itself_a_name_the_operator_did_not_sign(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = genuine(statement={"dns_names": ["spare.vouchsafe.test"]})
    stops(instead(wrong), "DEPLOYMENT_NAME", (check("deployment.names"), THROUGH), monkeypatch=monkeypatch, send=send)


@both_roads
def test_enclave_of_another_role(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = genuine(claims_edit=as_gateway)
    stops(instead(wrong), "DEPLOYMENT_ROLE", (check("deployment.role"), THROUGH), monkeypatch=monkeypatch, send=send)


@both_roads
def test_enclave_of_a_role_that_is_granted_but_not_wanted(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway of the operator's, where the client's policy asks for one that plays both parts."""
    wrong = genuine(claims_edit=as_gateway, statement={"roles": ["both", "gateway"]})
    stops(instead(wrong), "DEPLOYMENT_ROLE", (check("deployment.role"), THROUGH), monkeypatch=monkeypatch, send=send)


@both_roads
def test_enclave_with_a_configuration_the_operator_did_not_sign(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host starts the genuine image with a file of its own, for example with another API key in it. RTMR3, event
    log and claims agree with that file."""
    wrong = genuine(config=bytes(32))
    assert wrong.claims.config != CONFIG
    stops(
        instead(wrong), "DEPLOYMENT_CONFIG", (check("deployment.config"), THROUGH), monkeypatch=monkeypatch, send=send
    )


@both_roads
def test_enclave_of_another_operator(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement and status list are in order, but for who signed them. Three layers: the statement's keys, the list's
    keys, and the question whether the statement stands without the keys that the list withdraws."""
    wrong = genuine(statement_keys=(7,), status_keys=(7,))
    stops(
        instead(wrong), "DEPLOYMENT_OPERATOR", (check("deployment.signers"), "STATUS_SIGNER"),
        (check("status.signers"), "STATUS_DENIED"), (check("status.operator-keys"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_enclave_on_a_machine_the_operator_did_not_enrol(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The genuine image and a copy of the operator's statement, on somebody else's machine."""
    wrong = genuine(statement={"platforms": [("piid", b"enrolled machine")]})
    stops(
        instead(wrong), "DEPLOYMENT_PLATFORM", (check("deployment.platform"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_enclave_with_gpus_the_operator_did_not_enrol(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = genuine(statement={"gpus": [gpu_serial(machine(), 1)]})
    stops(instead(wrong), "DEPLOYMENT_GPUS", (check("deployment.gpus"), THROUGH), monkeypatch=monkeypatch, send=send)


@both_roads
def test_enclave_of_a_release_that_nobody_the_client_trusts_has_signed(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another image, measured honestly. Behind the signers stands the status list's own look at them."""
    wrong = genuine(manifest_keys=(7,))
    stops(
        instead(wrong), "RELEASE_SIGNERS", (check("release.signers"), "STATUS_DENIED"),
        (check("status.release-keys"), THROUGH), monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


WITHDRAWN: dict[str, dict[str, Any]] = {
    "platform": {"platforms": [salted(SALT, machine().facts.piid)]},
    "platform by its PPID": {"platforms": [salted(SALT, machine().facts.ppid)]},
    "GPU": {"gpus": [salted(SALT, gpu_serial(machine(), 0))]},
    "configuration": {"configs": [CONFIG]},
    "release": {"releases": [genuine().claims.release]},
    "statement": {"statements": [genuine().claims.deployment]},
}


@both_roads
@pytest.mark.parametrize("denied", WITHDRAWN.values(), ids=WITHDRAWN.keys())
def test_enclave_on_the_status_list(denied: dict[str, Any], send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = genuine(status=denied)
    stops(instead(wrong), "STATUS_DENIED", (check("status.denied"), THROUGH), monkeypatch=monkeypatch, send=send)


@both_roads
def test_stale_deployment_statement(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator has not renewed it: the enclave has left its fleet. Behind the date stands the verdict's own end."""
    wrong = genuine(statement={"not_before": NOW - 8 * DAY, "not_after": NOW - DAY})
    stops(
        instead(wrong), "DEPLOYMENT_DATES", (check("deployment.dates"), "CHANNEL_EXPIRED"),
        (check("channel.time"), THROUGH), monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_statement_older_than_the_pinned_serial(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced before it ran out, for example because it listed a machine too many."""
    wrong = genuine(statement={"serial": 6})
    pinned = genuine(policy={"deployment.min-serial": 7}).policy
    stops(
        instead(wrong, policy=pinned), "DEPLOYMENT_SERIAL", (check("deployment.serial"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_stale_status_list(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host withholds the operator's newer list. The client asks for the evidence again before it refuses."""
    wrong = genuine(status={"issued_at": NOW - 3700, "next_update": NOW - 100})
    stops(
        instead(wrong), "STATUS_EXPIRED", (check("status.current"), "CHANNEL_EXPIRED"),
        (check("channel.time"), THROUGH), monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_status_list_that_runs_out_while_the_client_keeps_its_verdict(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict is kept until the earliest end of what it rests on, and no longer."""
    story = genuine(status={"issued_at": NOW - 600, "next_update": NOW + 120})

    @contextlib.contextmanager
    def attack() -> Iterator[tuple[AttestedSession, Server]]:
        clock = [float(NOW + 60)]
        with served(story) as server:
            session = session_for(server, story, clock=lambda: clock[0])
            talk(session, server)
            for connection in server.connections:  # what came before does not count
                connection.app_bytes.clear()
                connection.requests.clear()
            clock[0] = NOW + 121.0
            yield session, server

    stops(
        attack, "STATUS_EXPIRED", (check("status.current"), "CHANNEL_EXPIRED"), (check("channel.time"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_newer_list_that_was_published_in_time_is_fetched_and_accepted(send: Send) -> None:
    """The counterpart: what heals a stale list is a newer one, and the client asks for it by itself."""
    stale = genuine(status={"issued_at": NOW - 3700, "next_update": NOW - 100})
    fresh = genuine(status={"issued_at": NOW - 100, "next_update": NOW + 3400, "serial": 4})
    with served(stale) as server:
        session = session_for(server, stale)
        show(server, dataclasses.replace(fresh, evidence=dataclasses.replace(fresh.evidence, leaf=stale.evidence.leaf)))
        assert b"404" in send(session, server)
        assert FETCH in server.requests
