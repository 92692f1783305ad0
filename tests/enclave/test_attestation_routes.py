"""Evidence over HTTP: bundle, channel proof in single and Merkle form, `aci/1` report; and what a flood gets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from attestation import binding
from attestation.channel import ChannelProof, channel_request
from attestation.keyset import Keyset
from attestation.tdx import Quote
from enclave.api.attestation import Attestation
from enclave.api.errors import Refused
from enclave.api.health import health_routes
from enclave.channel import Allowance, ChannelProver
from enclave.identity import Connection, Identity
from enclave.producer import Producer
from tests.enclave.machine import Surroundings, surroundings
from tests.enclave.support import make_identity

NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    with surroundings(tmp_path_factory.mktemp("r")) as made:
        yield made


class FixedConnection(Connection):
    """A connection whose exporter is known: the TLS behind it is tested in test_tls.py and test_boot.py."""

    def __init__(self, identity: Identity, number: int = 0) -> None:
        super().__init__(identity, None)  # type: ignore[arg-type]  # the exporter is overridden
        self.number = number

    def exporter(self, nonce: bytes) -> bytes:
        return hashlib.sha256(b"exporter" + nonce + bytes([self.number])).digest()


class Routes:
    """The three routes over one machine, with a fresh prover."""

    def __init__(self, around: Surroundings, **options: Any) -> None:
        self.tdx = around.tdx
        self.tdx.asked.clear()
        self.producer = Producer(around.tdx, None)
        self.prover = ChannelProver(self.producer, **options)
        self.identity = make_identity()
        self.kept = {"sha256:" + "a" * 64: b"older bundle"}
        self.app = Attestation(lambda d: self.kept.get(d or ""), self.producer, self.prover)

    async def ask(
        self, method: str, path: str, *, query: str = "", body: bytes = b"", connection: Connection | None = None
    ) -> bytes:
        """Body of a 200. Raises `Refused` as the gateway would see it."""
        parts, sent = [body[:100], body[100:]], list[Any]()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"query_string": query.encode(), "vouchsafe": connection or FixedConnection(self.identity)}
        await self.app.routes[method, path](scope, receive, send)
        assert sent[0]["status"] == 200
        return bytes(sent[1]["body"])

    async def prove(self, connection: Connection, nonce: bytes = NONCE, bound: str = "exporter") -> ChannelProof:
        body = channel_request(nonce, gpu=False, binding=bound)  # type: ignore[arg-type]  # a test's own literal
        answer = await self.ask("POST", "/.well-known/vouchsafe/channel", body=body, connection=connection)
        exporter = connection.exporter(nonce) if bound == "exporter" else None
        return ChannelProof.from_answer(answer, nonce=nonce, exporter=exporter)


def expected(identity: Identity, proof: ChannelProof) -> bytes:
    """REPORTDATA as a verifier computes it (ratls facts §3.4)."""
    leaf = binding.connection_leaf(
        identity.key_hash, proof.exporter, proof.nonce, identity.claims_bytes, None, proof.binding
    )
    return binding.merkle_root(leaf, proof.path)


# --- channel proof ----------------------------------------------------------------------------------------------------


async def test_single_proof_is_a_quote_over_the_leaf_itself(around: Surroundings) -> None:
    routes = Routes(around)
    proof = await routes.prove(FixedConnection(routes.identity))
    assert proof.path == () and proof.gpu is None
    assert Quote.parse(proof.quote).body.report_data == expected(routes.identity, proof)


async def test_key_bound_proof_uses_its_own_label(around: Surroundings) -> None:
    routes = Routes(around)
    proof = await routes.prove(FixedConnection(routes.identity), bound="key")
    assert Quote.parse(proof.quote).body.report_data == expected(routes.identity, proof)
    bound = await routes.prove(FixedConnection(routes.identity))
    assert Quote.parse(bound.quote).body.report_data != Quote.parse(proof.quote).body.report_data


async def test_connections_that_wait_together_share_one_quote(around: Surroundings) -> None:
    routes = Routes(around)
    connections = [FixedConnection(routes.identity, n) for n in range(7)]
    proofs = await asyncio.gather(*(routes.prove(c) for c in connections))
    assert len(routes.tdx.asked) == routes.prover.quotes == 1
    assert len({p.quote for p in proofs}) == 1
    for proof in proofs:
        assert Quote.parse(proof.quote).body.report_data == expected(routes.identity, proof)
    # a path of another connection does not fit
    mixed = ChannelProof(NONCE, proofs[0].exporter, proofs[0].quote, proofs[1].path, None, "exporter")
    assert Quote.parse(mixed.quote).body.report_data != expected(routes.identity, mixed)


async def test_a_callers_binder_is_never_signed(around: Surroundings) -> None:
    """Whatever a request holds, the CPU signs hashes under our labels, made from our own socket and key."""
    routes = Routes(around)
    await routes.prove(FixedConnection(routes.identity), nonce=b"\xff" * 32)
    assert all(asked.hex().find("ff" * 16) < 0 for asked in routes.tdx.asked)
    body = json.loads(channel_request(NONCE, gpu=False, binding="exporter"))
    for extra in ("exporter", "binder", "report_data"):
        with pytest.raises(Refused) as refused:
            await routes.ask("POST", "/.well-known/vouchsafe/channel", body=json.dumps({**body, extra: "00"}).encode())
        assert refused.value.refusal.status == 400
    assert len(routes.tdx.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b"{", b"\xff", b'{"nonce":"AA","gpu":false,"binding":"exporter"}',
        channel_request(NONCE, gpu=False, binding="exporter").replace(b"AAEC", b"AA=C"),
        channel_request(NONCE, gpu=False, binding="exporter").replace(b"Hh8", b"Hh9"),  # not the canonical last digit
        channel_request(NONCE, gpu=False, binding="exporter").replace(b"false", b"0"),
        channel_request(NONCE, gpu=False, binding="exporter").replace(b'"exporter"', b'"none"'),
        channel_request(NONCE, gpu=False, binding="exporter")[:-1] + b',"gpu":true}',
        channel_request(NONCE[:31], gpu=False, binding="exporter"),
        channel_request(NONCE + b"1", gpu=False, binding="exporter"),
    ],
)  # fmt: skip
async def test_malformed_request_is_a_400_and_costs_no_quote(around: Surroundings, body: bytes) -> None:
    routes = Routes(around)
    with pytest.raises(Refused) as refused:
        await routes.ask("POST", "/.well-known/vouchsafe/channel", body=body)
    assert refused.value.refusal.status == 400
    assert routes.tdx.asked == []


async def test_long_body_is_a_413(around: Surroundings) -> None:
    with pytest.raises(Refused) as refused:
        await Routes(around).ask("POST", "/.well-known/vouchsafe/channel", body=b" " * 5000)
    assert refused.value.refusal.status == 413


async def test_a_connection_that_asks_too_often_gets_429_and_others_do_not(around: Surroundings) -> None:
    now = [0.0]
    routes = Routes(around, allowance=Allowance(burst=2, refill_s=10, clock=lambda: now[0]))
    greedy, other = FixedConnection(routes.identity, 1), FixedConnection(routes.identity, 2)
    await routes.prove(greedy)
    await routes.prove(greedy)
    with pytest.raises(Refused) as refused:
        await routes.prove(greedy)
    assert refused.value.refusal.status == 429
    assert dict(refused.value.refusal.headers)[b"retry-after"] == b"10"
    await routes.prove(other)
    now[0] = 10.0
    await routes.prove(greedy)


async def test_a_full_queue_gets_503_with_retry_after_and_the_rest_is_served(around: Surroundings) -> None:
    routes = Routes(around, queue=3)
    around.tdx.delay = 0.2
    try:
        first = asyncio.create_task(routes.prove(FixedConnection(routes.identity, 0)))
        await asyncio.sleep(0.05)  # the first is with the CPU; three may wait
        rest = [asyncio.create_task(routes.prove(FixedConnection(routes.identity, n))) for n in range(1, 6)]
        done = await asyncio.gather(first, *rest, return_exceptions=True)
    finally:
        around.tdx.delay = 0.0
    refused = [d for d in done if isinstance(d, Refused)]
    assert [r.refusal.status for r in refused] == [503, 503]
    assert all(dict(r.refusal.headers)[b"retry-after"] for r in refused)
    assert sum(isinstance(d, ChannelProof) for d in done) == 4 and len(routes.tdx.asked) == 2


async def test_quotes_have_a_pause_between_them_whatever_clients_do(around: Surroundings) -> None:
    import time

    routes = Routes(around, pause=0.1)
    began = time.monotonic()
    for n in range(3):
        await routes.prove(FixedConnection(routes.identity, n))
    assert time.monotonic() - began >= 0.2


async def test_a_silent_platform_is_a_503_and_the_next_request_works(around: Surroundings) -> None:
    routes = Routes(around)
    around.tdx.fails = True
    try:
        with pytest.raises(Refused) as refused:
            await routes.prove(FixedConnection(routes.identity))
        assert refused.value.refusal.status == 503
    finally:
        around.tdx.fails = False
    await routes.prove(FixedConnection(routes.identity))


async def test_a_client_that_leaves_frees_its_place(around: Surroundings) -> None:
    routes = Routes(around, queue=2)
    around.tdx.delay = 0.1
    try:
        first = asyncio.create_task(routes.prove(FixedConnection(routes.identity, 0)))
        await asyncio.sleep(0.03)
        gone = asyncio.create_task(routes.prove(FixedConnection(routes.identity, 1)))
        await asyncio.sleep(0.03)
        gone.cancel()
        await first
        await asyncio.sleep(0.15)
    finally:
        around.tdx.delay = 0.0
    assert len(routes.tdx.asked) == 1, "nobody waited for a second quote"


# --- bundle -----------------------------------------------------------------------------------------------------------


async def test_bundle_is_that_of_the_connections_own_certificate(around: Surroundings) -> None:
    routes = Routes(around)
    assert await routes.ask("GET", "/.well-known/vouchsafe/evidence") == routes.identity.bundle()
    older = await routes.ask("GET", "/.well-known/vouchsafe/evidence", query="keyset=sha256:" + "a" * 64)
    assert older == b"older bundle"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("keyset=sha256:" + "b" * 64, 404), ("keyset=sha256:" + "A" * 64, 400), ("keyset=", 400), ("other=1", 400),
        ("keyset", 400), ("keyset=sha256:" + "a" * 64 + "&x=1", 400), ("%ff=%fe", 400),
    ],
)  # fmt: skip
async def test_other_queries_are_refused(around: Surroundings, query: str, status: int) -> None:
    with pytest.raises(Refused) as refused:
        await Routes(around).ask("GET", "/.well-known/vouchsafe/evidence", query=query)
    assert refused.value.refusal.status == status


# --- aci/1 ------------------------------------------------------------------------------------------------------------


async def test_report_binds_keyset_and_nonce_in_a_quote_of_its_own(around: Surroundings) -> None:
    routes = Routes(around)
    nonce = "00" * 31 + "2a"
    report = json.loads(await routes.ask("GET", "/v1/aci/attestation", query=f"nonce={nonce}"))
    attestation = report["attestation"]
    digest = Keyset.parse(json.dumps(attestation["workload_keyset"]).encode()).digest
    assert digest == report["workload_keyset_digest"] == routes.identity.keyset_digest
    statement = f'{{"keyset_digest":"{digest}","nonce":"{nonce}","purpose":"aci.report_data.v1"}}'
    assert attestation["report_data"] == hashlib.sha256(statement.encode()).hexdigest()
    quoted = Quote.parse(bytes.fromhex(attestation["evidence"]["quote"])).body.report_data
    assert quoted == bytes.fromhex(attestation["report_data"]) + bytes(32)
    # its TLS key is that of the certificate
    key = x509.load_der_x509_certificate(routes.identity.leaf).public_key()
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    tls = attestation["workload_keyset"]["tls_public_keys"]
    assert [k["spki_sha256"] for k in tls] == [hashlib.sha256(spki).hexdigest()]
    assert report["api_version"] == "aci/1" and report["service_capabilities"]["serving"] == "direct"


async def test_report_without_nonce_is_made_once_per_certificate(around: Surroundings) -> None:
    routes = Routes(around)
    reports = await asyncio.gather(*(routes.ask("GET", "/v1/aci/attestation") for _ in range(5)))
    assert len(set(reports)) == 1 and len(routes.tdx.asked) == 1
    routes.identity = make_identity()
    await routes.ask("GET", "/v1/aci/attestation")
    assert len(routes.tdx.asked) == 2


async def test_failed_report_is_not_kept(around: Surroundings) -> None:
    routes = Routes(around)
    around.tdx.fails = True
    try:
        with pytest.raises(Refused):
            await routes.ask("GET", "/v1/aci/attestation")
    finally:
        around.tdx.fails = False
    await routes.ask("GET", "/v1/aci/attestation")


@pytest.mark.parametrize("query", ["nonce=", "nonce=zz", "nonce=" + "A" * 64, "nonce=" + "0" * 63, "x=1"])
async def test_any_other_nonce_is_a_400(around: Surroundings, query: str) -> None:
    routes = Routes(around)
    with pytest.raises(Refused) as refused:
        await routes.ask("GET", "/v1/aci/attestation", query=query)
    assert refused.value.refusal.status == 400 and routes.tdx.asked == []


async def test_nonced_reports_are_rate_limited_per_connection(around: Surroundings) -> None:
    routes, statuses = Routes(around), []
    connection = FixedConnection(routes.identity)
    for n in range(6):
        try:
            await routes.ask("GET", "/v1/aci/attestation", query=f"nonce={n:064x}", connection=connection)
        except Refused as refused:
            statuses.append(refused.refusal.status)
    assert statuses == [429, 429]


# --- health -----------------------------------------------------------------------------------------------------------


async def test_ready_is_a_503_until_it_is_true() -> None:
    ready, statuses = [False], []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    routes = health_routes(lambda: ready[0])
    for state in (False, True):
        ready[0] = state
        for path in ("/health/live", "/health/ready"):
            await routes["GET", path]({}, None, send)  # type: ignore[arg-type]  # neither is looked at
    assert statuses == [200, 503, 200, 200]


def test_nonce_in_the_tests_is_canonical() -> None:
    assert base64.urlsafe_b64encode(NONCE).rstrip(b"=").decode().endswith("Hh8")
