"""Keys, time, and certificates: born here, verified by the enclave itself, renewed without a gap."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import pickle
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation import binding
from attestation.attester import AttesterError
from attestation.bundle import Bundle
from attestation.claims import Claims
from attestation.errors import RefusedError
from attestation.keyset import Keyset
from attestation.policy import Policy
from attestation.ratls import Leaf
from attestation.tdx import rtmr3_items
from attestation.verifier import verify
from enclave.boot_steps import seal
from enclave.clock import Clock
from enclave.issuer import Issuer
from enclave.keys import CertificateKey, KeyRing, ReceiptKey
from enclave.producer import Producer
from tests.enclave.machine import Surroundings, surroundings
from tests.enclave.support import NAME, make_claims

# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [CertificateKey(), ReceiptKey(0)])
def test_private_keys_are_not_printed_copied_or_pickled(secret: object) -> None:
    assert repr(secret) == f"<{type(secret).__name__}>" == str(secret)
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leave(secret)
    assert not hasattr(secret, "__dict__")
    assert not any("key" in name and not name.startswith("_") for name in dir(secret) if name not in ("key_id",))


def test_one_key_serves_one_certificate() -> None:
    key = CertificateKey()
    leaf = key.leaf(make_claims(key.spki), b"quote", None)
    assert Leaf.parse(leaf).spki == key.spki
    with pytest.raises(ValueError, match="one key serves one certificate"):
        key.leaf(make_claims(key.spki), b"quote", None)
    assert CertificateKey().spki != key.spki


def test_receipt_key_signs_and_is_replaced_before_it_is_a_day_old() -> None:
    ring = KeyRing()
    first = ring.receipt_key(1000)
    Ed25519PublicKey.from_public_bytes(first.public).verify(first.sign(b"receipt"), b"receipt")
    assert ring.receipt_key(1000 + 82_000) is first
    second = ring.receipt_key(1000 + 82_800)
    assert second is not first and second.key_id != first.key_id
    # a certificate made just before still ends before the key is 24 hours old
    assert 82_800 + 3600 <= 86_400


def test_time_does_not_step_back_and_not_before_what_was_verified() -> None:
    wall, ticks = [1000.0], [0.0]
    clock = Clock(lambda: wall[0], lambda: ticks[0])
    assert clock.now() == 1000
    wall[0] = 500.0  # the host sets its clock back
    assert clock.now() == 1000
    ticks[0] = 60.0
    assert clock.now() == 1060
    clock.raise_floor(2000)
    assert clock.now() == 2000
    wall[0] = 3000.0
    assert clock.now() == 3000
    clock.raise_floor(100)
    assert clock.now() == 3000


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    with surroundings(tmp_path_factory.mktemp("i"), lifetime=60) as made:
        settings = made.settings
        items = rtmr3_items(made.made.release, settings.digest, [(m.id, m.weights) for m in settings.models])
        made.event_log = seal(made.tdx, items)  # type: ignore[attr-defined]  # one seal per machine, as at boot
        yield made


class Told(list[str]):
    """The console."""

    def say(self, line: str) -> None:
        self.append(line)


def make_issuer(around: Surroundings, told: Told | None = None, clock: Clock | None = None) -> Issuer:
    issuer = Issuer(
        around.settings, around.policy, KeyRing(), Producer(around.tdx, None), clock or Clock(),
        say=(told if told is not None else Told()).say, poll=0.02, retry=0.05,
    )  # fmt: skip
    issuer.event_log = around.event_log  # type: ignore[attr-defined]  # see fixture
    issuer.release_digest = around.made.release
    return issuer


async def test_certificate_is_one_that_a_client_accepts_and_everything_names_one_key(around: Surroundings) -> None:
    issuer = make_issuer(around)
    identity = await issuer.issue()
    issuer.publish(identity)
    leaf, claims = Leaf.parse(identity.leaf), Claims.decode(identity.claims_bytes)
    assert identity.claims == claims and leaf.extension.claims == identity.claims_bytes
    assert binding.key_hash(leaf.spki) == claims.key_hash == identity.key_hash
    assert claims.not_after - claims.not_before == 60 and claims.config == around.settings.digest
    keyset = Keyset.parse(identity.keyset)
    assert keyset.tls == ((hashlib.sha256(leaf.spki).digest(), NAME),)
    assert keyset.digest == identity.keyset_digest == "sha256:" + claims.keyset.hex()
    assert list(keyset.signing_keys) == [identity.receipt_signer.key_id]
    bundle = Bundle.decode(identity.bundle())
    client = Policy.parse(around.made.policy.read_text())
    at = claims.not_before  # a bundle verifies at its own time
    assert verify(bundle.evidence, bundle.endorsements, client, now=at, name=None).accepted
    certificate = x509.load_der_x509_certificate(identity.leaf)
    assert certificate.subject.rfc4514_string() == f"CN={NAME}"
    assert "KEY" not in repr(identity).upper().replace("KEY_HASH", "").replace("KEYSET_DIGEST", "")


async def test_each_certificate_has_a_key_of_its_own_and_old_bundles_are_kept(around: Surroundings) -> None:
    issuer = make_issuer(around)
    first, second = await issuer.issue(), await issuer.issue()
    issuer.publish(first)
    issuer.publish(second)
    assert first.key_hash != second.key_hash and first.claims.boot_id == second.claims.boot_id
    assert issuer.current is second
    assert issuer.bundle() == second.bundle()
    assert issuer.bundle(first.keyset_digest) == first.bundle()
    assert issuer.bundle("sha256:" + "0" * 64) is None


async def test_kept_bundles_are_bounded(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclave.issuer.KEPT", 2)
    issuer = make_issuer(around)
    made = [await issuer.issue() for _ in range(3)]
    for identity in made:
        issuer.publish(identity)
    assert [issuer.bundle(i.keyset_digest) is not None for i in made] == [False, True, True]


@pytest.mark.parametrize(
    ("lie", "code"), [("config", "DEPLOYMENT_CONFIG"), ("status", "STATUS_EXPIRED"), ("denied", "STATUS_DENIED")]
)
async def test_own_verifier_refuses_before_anybody_sees_the_certificate(
    around: Surroundings, lie: str, code: str
) -> None:
    issuer, clock = make_issuer(around), Clock()
    try:
        match lie:
            case "config":
                around.made.write_deployment(configs=[bytes(32)])
            case "status":
                clock.raise_floor(clock.now() + 7200)
                issuer = make_issuer(around, clock=clock)
            case "denied":
                around.made.write_status(configs=[around.settings.digest])
        with pytest.raises(RefusedError) as refused:
            await issuer.issue()
        assert refused.value.code == code
    finally:
        around.made.write_deployment()
        around.made.write_status()


async def test_another_release_needs_another_boot(around: Surroundings) -> None:
    issuer = make_issuer(around)
    issuer.release_digest = bytes(32)
    with pytest.raises(RefusedError, match="ISSUE_RELEASE"):
        await issuer.issue()


class Moved(Clock):
    """A clock whose wall time the test moves."""

    def __init__(self) -> None:
        self.offset = 0.0
        import time

        super().__init__(lambda: time.time() + self.offset)


async def until(holds: object, seconds: float = 5) -> None:
    assert callable(holds)
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - a condition of the code under test, not an event of ours
            await asyncio.sleep(0.01)


async def test_successor_is_minted_at_half_life_and_takes_over(around: Surroundings) -> None:
    clock = Moved()
    issuer = make_issuer(around, clock=clock)
    first = await issuer.issue()
    issuer.publish(first)
    task = asyncio.create_task(issuer.renew_forever())
    try:
        await asyncio.sleep(0.2)
        assert issuer.current is first
        clock.offset = 31  # half of 60
        asked = len(around.tdx.asked)
        await until(lambda: len(around.tdx.asked) > asked)
        await asyncio.sleep(0.1)
        assert issuer.current is first, "a leaf so young waits for clients whose clocks are behind"
        clock.offset = 45
        await until(lambda: issuer.current is not first, seconds=10)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_failed_renewal_is_said_aloud_tried_again_and_ends_with_the_leaf(around: Surroundings) -> None:
    clock, told = Moved(), Told()
    issuer = make_issuer(around, told, clock)
    issuer.publish(await issuer.issue())
    around.tdx.fails = True
    task = asyncio.create_task(issuer.renew_forever())
    try:
        clock.offset = 31
        await until(lambda: len(told) >= 2)
        assert "RENEWAL FAILED (ATTESTER_TIMEOUT" in told[0] and issuer.valid
        clock.offset = 61
        assert not issuer.valid
        around.tdx.fails = False
        await until(lambda: issuer.valid)
    finally:
        around.tdx.fails = False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_new_status_list_is_served_without_waiting_for_half_life(around: Surroundings) -> None:
    clock = Moved()
    issuer = make_issuer(around, clock=clock)
    first = await issuer.issue()
    issuer.publish(first)
    task = asyncio.create_task(issuer.renew_forever())
    try:
        around.made.write_status(serial=99)
        await asyncio.sleep(0.2)
        assert issuer.current is first, "a busy host buys no stream of quotes"
        clock.offset = 16
        asked = len(around.tdx.asked)
        await until(lambda: len(around.tdx.asked) > asked)
        clock.offset = 29
        await until(lambda: issuer.current is not first)
        assert (
            Bundle.decode(issuer.bundle() or b"").evidence.status
            == (around.made.statements / "status.json").read_bytes()
        )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_seal_refuses_a_register_that_is_not_zero(around: Surroundings) -> None:
    with pytest.raises(RefusedError, match="BOOT_RTMR3: RTMR3 is not zero"):
        seal(around.tdx, [b"{}"])


async def test_a_thread_that_hangs_does_not_keep_the_process(around: Surroundings) -> None:
    producer = Producer(around.tdx, None)
    around.tdx.delay = 0.3
    try:
        waiting = asyncio.create_task(producer.quote(bytes(64)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        producer.close()
        with pytest.raises(AttesterError, match="ATTESTER_NO_GPU"):
            await producer.gpu_state()
        await asyncio.sleep(0.4)
    finally:
        around.tdx.delay = 0.0
