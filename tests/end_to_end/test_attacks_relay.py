"""Relays that terminate TLS themselves: with their own key, with a stolen one, with proofs made for somebody else."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from attestation import binding
from attestation.client import session as session_module
from attestation.client.session import AttestedSession
from attestation.policy import ChannelPolicy, Policy, Skip
from tests.attestation.client.enclave import PROVE, prove, served, session_for, show
from tests.attestation.client.plain_talking import Plain
from tests.attestation.client.ratls_server import Connection, Server, answer
from tests.attestation.client.talking import Send, both_roads, talk
from tests.attestation.test_verifier_channel import other_platform
from tests.end_to_end.attacks import THROUGH, Defence, check, dress, impostor, replaced, stops
from tests.genuine import NOW, Genuine, any_reason, genuine

PROOF = check("channel.report-data")
"""The verifier's comparison of the connection's quote with nonce, exporter and key."""

leaf_of = binding.connection_leaf


def exporter_free(
    k: bytes, exporter: bytes | None, nonce: bytes, claims: bytes, gpu: bytes | None, bound: binding.Binding
) -> bytes:
    """The proof's formula without the exporter, at enclave and client: what a nonce alone would give."""
    return leaf_of(k, None if exporter is None else bytes(32), nonce, claims, gpu, bound)


GPU_NONCE = replaced(importlib.import_module("attestation.gpu.appraise"), "_nonce", lambda device, nonce: "")
"""The comparison of the GPU report's nonce with the one made from the key."""
EXPORTER: Defence = replaced(binding, "connection_leaf", exporter_free)


def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks for no channel proof."""
    connectable = session_module._connectable

    def lax(policy: Policy, *rest: Any) -> Policy:
        return replace(connectable(policy, *rest), channel=ChannelPolicy(Skip("taken out"), False))

    monkeypatch.setattr(session_module, "_connectable", lax)


def constant_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client draws the same nonce each time."""
    monkeypatch.setattr(os, "urandom", lambda size: b"\x2a" * size)


@contextlib.contextmanager
def between(
    story: Genuine, arm: Callable[[Server, Server], None], **client: Any
) -> Iterator[tuple[AttestedSession, Server]]:
    """A relay between a client of *story* and the enclave itself, both running; *arm* (relay, enclave) sets it up."""
    with served(story) as enclave, impostor(enclave) as relay:
        arm(relay, enclave)
        yield session_for(relay, story, **client), relay


def stolen(story: Genuine) -> Callable[[Server, Server], None]:
    """The relay has certificate and key of the enclave; its answers stay what it forwards."""

    def arm(relay: Server, _enclave: Server) -> None:
        routes = dict(relay.routes)
        show(relay, story)
        relay.routes.update(routes)

    return arm


@both_roads
def test_relay_with_its_own_key_that_forwards_genuine_evidence(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers: claims, GPU nonce and keyset name the enclave's key, and the proof is of another connection."""
    story = genuine()
    stops(
        lambda: between(story, lambda relay, _: dress(relay, story, 1)), "CLAIMS_KEY",
        (check("claims.key"), "GPU_NONCE"), (GPU_NONCE, "KEYSET_KEY"),
        (check("keyset.tls-key"), "CHANNEL_REPORT_DATA"), (PROOF, THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_relay_with_a_stolen_key_that_forwards_the_proof_of_its_own_connection(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live man in the middle. It is the exporter in the formula that stops it: the nonce is the client's own."""
    story = genuine()
    stops(
        lambda: between(story, stolen(story)), "CHANNEL_REPORT_DATA", (EXPORTER, THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_relay_with_a_stolen_key_and_no_enclave_to_ask(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    story = genuine()

    def alone(relay: Server, enclave: Server) -> None:
        stolen(story)(relay, enclave)
        del relay.routes[PROVE]

    stops(
        lambda: between(story, alone), "TRANSPORT_STATUS", (unasked, THROUGH), monkeypatch=monkeypatch, send=send
    )  # fmt: skip


@both_roads
def test_relay_with_an_old_stolen_certificate(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is current. Behind the date stand the end of the verdict and the channel proof."""
    later = NOW + 3700
    story = genuine(now=later, status={"issued_at": NOW + 3600, "next_update": NOW + 7200})
    stops(
        lambda: between(story, stolen(story)), "LEAF_EXPIRED", (check("leaf.valid-now"), "CHANNEL_EXPIRED"),
        (check("channel.time"), "CHANNEL_REPORT_DATA"), (PROOF, THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


def recording(story: Genuine, bound: binding.Binding) -> Callable[[Server, Server], None]:
    """The relay hands the enclave's answer to the first connection, an honest one, to all later ones."""

    def arm(relay: Server, enclave: Server) -> None:
        stolen(story)(relay, enclave)
        kept: list[bytes] = []

        def replay(connection: Connection, body: bytes) -> bytes:
            kept.append(prove(story, connection, body))
            return kept[0]

        relay.routes[PROVE] = replay
        first = session_for(relay, story)
        talk(first if bound == "exporter" else Plain(first), relay)  # type: ignore[arg-type]  # as talk uses it
        for connection in relay.connections:  # what came before the attack does not count
            connection.app_bytes.clear()
            connection.requests.clear()

    return arm


@both_roads
def test_replayed_channel_proof(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonce and exporter each stop it alone."""
    story = genuine()
    stops(
        lambda: between(story, recording(story, "exporter")), "CHANNEL_REPORT_DATA",
        (constant_nonce, "CHANNEL_REPORT_DATA"), (EXPORTER, THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_replayed_key_bound_proof(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a plain `ssl` object the nonce alone stops it."""
    story = genuine(policy={"channel.proof": "key"})

    @contextlib.contextmanager
    def attack() -> Iterator[Any]:
        with between(story, recording(story, "key")) as (session, relay):
            yield Plain(session), relay

    stops(attack, "CHANNEL_REPORT_DATA", (constant_nonce, THROUGH), monkeypatch=monkeypatch, send=send)


def other_path(story: Genuine) -> Callable[[Server, Server], None]:
    """The enclave serves several connections with one quote; the relay hands the client the path of another one."""

    def arm(relay: Server, enclave: Server) -> None:
        stolen(story)(relay, enclave)

        def tree(connection: Connection, body: bytes) -> bytes:
            mine, theirs = (prove(story, connection, body, others=5, place=place) for place in (3, 2))
            one, two = (json.loads(raw.partition(b"\r\n\r\n")[2]) for raw in (mine, theirs))
            return answer(json.dumps(one | {"path": two["path"]}).encode())

        enclave.routes[PROVE] = tree

    return arm


@both_roads
def test_merkle_path_of_another_connection(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the exporter were not in the leaf, a path of another place leads to another root."""
    story = genuine()
    stops(
        lambda: between(story, other_path(story)), "CHANNEL_REPORT_DATA",
        (EXPORTER, "CHANNEL_REPORT_DATA"), (PROOF, THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_merkle_proof_of_the_relays_own_connection(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    story = genuine()

    def arm(relay: Server, enclave: Server) -> None:
        stolen(story)(relay, enclave)
        enclave.routes[PROVE] = lambda c, body: prove(story, c, body, others=5, place=3)

    stops(
        lambda: between(story, arm), "CHANNEL_REPORT_DATA", (EXPORTER, THROUGH), monkeypatch=monkeypatch, send=send
    )  # fmt: skip


@both_roads
def test_proof_signed_by_another_td_of_the_same_release(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TD that the attacker runs signs over this very connection: it shows other registers."""
    story = genuine()

    def arm(relay: Server, enclave: Server) -> None:
        stolen(story)(relay, enclave)
        relay.routes[PROVE] = lambda c, body: prove(story, c, body, td={"rtmr": (b"\x01" * 48,) * 4})

    stops(
        lambda: between(story, arm), "CHANNEL_TD", (check("channel.same-td"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip


@both_roads
def test_proof_signed_on_another_platform(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same image, same claims, on a machine of the attacker's: a broken one elsewhere cannot sign for this one."""
    story = genuine(policy={"tdx.platforms": any_reason()})

    def arm(relay: Server, enclave: Server) -> None:
        stolen(story)(relay, enclave)
        relay.routes[PROVE] = lambda c, body: prove(story, c, body, tee=other_platform(story))

    stops(
        lambda: between(story, arm), "CHANNEL_PLATFORM", (check("channel.same-platform"), THROUGH),
        monkeypatch=monkeypatch, send=send,
    )  # fmt: skip
