"""How long a certificate is (ratls facts §3.7) with what real machines say: quotes of Intel's, evidence of NVIDIA's.

The recorded evidence goes through our own encoder into a leaf of our own issuer's form. The nonce inside is that of
the recording and the quote covers other claims; neither changes a length.
"""

from __future__ import annotations

import hashlib
import random

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from attestation import binding
from attestation.claims import Claims, GpuNonce, GpuStateClaim, ModelClaim
from attestation.gpu import GpuEvidence, decode, encode
from attestation.ratls import MAX_LEAF, Leaf, build_leaf
from tests.attestation.gpu.judge import genuine
from tests.vectors import VECTORS, cases, need_vectors

pytestmark = pytest.mark.vectors

FIRST_FLIGHT = 13_056
"""12.75 KiB: with 1,459 bytes of the rest of the flight, ten segments of 1,460 bytes are not exceeded."""
NAMES = ("api.inference.example.com", "chat.inference.example.com", "eu.inference.example.com", "inference.example.com")
MODELS = tuple(
    ModelClaim(name, "verity-sha256:" + hashlib.sha256(name.encode()).hexdigest())
    for name in (
        "meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-235B-A22B-Instruct-2507", "openai/gpt-oss-120b",
        "deepseek-ai/DeepSeek-R1-0528", "mistralai/Mistral-Small-3.2-24B-Instruct-2506", "google/gemma-3-27b-it",
        "moonshotai/Kimi-K2-Instruct", "BAAI/bge-m3",
    )
)  # fmt: skip
NODE = "h100x8-ls10x4-590.12"
H100 = "h100-550.90.07-full"


def quotes() -> dict[str, bytes]:
    """Every quote of the vectors that is whole, in its canonical form."""
    return {
        folder.name: raw
        for folder in cases("tdx")
        if not folder.name.startswith("neg-") and (folder / "quote.bin").exists()
        if len(raw := (folder / "quote.bin").read_bytes()) > 4096
    }


def devices(name: str) -> GpuEvidence:
    return genuine(VECTORS / "gpu" / name).evidence


def leaf(quote: bytes, evidence: GpuEvidence | None) -> bytes:
    """A certificate of eight models and four names. Key hashes, salts and digests are random, as real ones are."""
    draw, gpu = random.Random(3), None if evidence is None else encode(evidence)
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    nonce = state = None
    if evidence is not None:
        kinds = [device.kind for device in evidence.devices]
        gpus, switches = kinds.count("gpu"), kinds.count("switch")
        nonce = GpuNonce(1_795_000_000, draw.randbytes(32))
        state = GpuStateClaim(gpus, switches, "ppcie" if switches else "spt", True, False, True, True)
    claims = Claims(
        key_hash=binding.key_hash(spki), not_before=1_795_000_000, not_after=1_795_003_600, dns_names=NAMES,
        boot_id=draw.randbytes(16), release=draw.randbytes(32), deployment=draw.randbytes(32),
        config=draw.randbytes(32), event_log=draw.randbytes(48), gpu=None if gpu is None else binding.gpu_digest(gpu),
        gpu_nonce=nonce, gpu_state=state, keyset=draw.randbytes(32), role="both", models=MODELS,
    )  # fmt: skip
    made = build_leaf(key, claims, quote, gpu)
    read = Leaf.parse(made).extension
    assert (read.quote, read.gpu, Claims.decode(read.claims)) == (quote, gpu, claims)
    return made


def within(limit: int, evidence: GpuEvidence | None) -> None:
    """The leaf is at most *limit* bytes with every recorded quote."""
    need_vectors()
    sizes = {name: len(leaf(quote, evidence)) for name, quote in quotes().items()}
    assert len(sizes) > 5
    longest = max(sizes, key=lambda name: sizes[name])
    assert sizes[longest] <= limit, f"{sizes[longest]} bytes, {limit} allowed, with the quote {longest}: {sizes}"


def test_tdx_alone_fits_the_first_flight() -> None:
    within(FIRST_FLIGHT, None)


def test_one_h100_fits_the_first_flight() -> None:
    need_vectors()
    within(FIRST_FLIGHT, devices(H100))


@pytest.mark.parametrize("index", range(8))
def test_each_gpu_of_a_real_node_alone_fits_the_first_flight(index: int) -> None:
    need_vectors()
    quote = max(quotes().values(), key=len)
    size = len(leaf(quote, GpuEvidence((devices(NODE).devices[index],))))
    assert size <= FIRST_FLIGHT, f"{size} bytes, {FIRST_FLIGHT} allowed"


def test_eight_h100_fit_every_tls_stack() -> None:
    need_vectors()
    within(MAX_LEAF, GpuEvidence(devices(NODE).devices[:8]))


def test_eight_h100_and_four_switches_fit_every_tls_stack() -> None:
    need_vectors()
    node = devices(NODE)
    assert [device.kind for device in node.devices] == ["gpu"] * 8 + ["switch"] * 4
    within(30 * 1024, node)


def test_sizes_are_those_of_the_table() -> None:
    """Within 10% of the facts' table plus 0.9 KB for the claims added since and for eight models and four names: an
    encoder that stops sharing chains, or compressing, shows here before it reaches a limit."""
    need_vectors()
    quote, node = max(quotes().values(), key=len), devices(NODE)
    made = {
        "tdx": len(leaf(quote, None)),
        "one": len(leaf(quote, devices(H100))),
        "eight": len(leaf(quote, GpuEvidence(node.devices[:8]))),
        "node": len(leaf(quote, node)),
    }
    table = {"tdx": 6200, "one": 9900, "eight": 15_300, "node": 20_800}
    assert all(abs(made[name] - size - 900) <= size // 10 for name, size in table.items()), made


def test_carried_evidence_is_the_recorded_evidence() -> None:
    need_vectors()
    node = devices(NODE)
    assert decode(encode(node)) == node
