"""Certificates made to cost: too long, too deep, too wide, a bomb; and a thousand of them at once.

What must hold is a bound on memory, stated here and measured with tracemalloc, and the refusal. Without the cap the
same certificate goes further or costs more: each test shows which.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from attestation import binding, cbor, ratls
from attestation.client.handshake import Appraisal, Handshake, NotAttested
from attestation.client.session import AttestedSession
from attestation.gpu import evidence as gpu_evidence
from attestation.ratls import EXTENSION_OID, Leaf, build_leaf
from tests.attestation.client.enclave import served, session_for
from tests.attestation.client.ratls_server import Server, plain_certificate
from tests.attestation.client.talking import SECRET, Send, both_roads, talk
from tests.demo.processes import PYTHON, ROOT
from tests.enclave.support import open_files
from tests.end_to_end.attacks import THROUGH, Defence, replaced, stops
from tests.end_to_end.garbage import raise_limit
from tests.genuine import NAME, Genuine, genuine, leaf_key

KIB: Final = 1024
CAP: Final = 2048 * KIB
"""What one hostile certificate may cost the client at its worst moment; seen: 70 KiB to 1 MiB."""
CROWD: Final = 1000
EACH: Final = 512 * KIB
"""What one of a thousand connections may cost; seen: 291 KiB, of which 256 are the buffer that asyncio gives each."""


def story_with(carried: bytes) -> Genuine:
    """An enclave whose GPU evidence as carried is *carried*, named in its claims and covered by its quote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratls, "MAX_LEAF", 1 << 20)
        return genuine(
            gpu_edit=lambda honest: carried,
            claims_edit=lambda claims: dataclasses.replace(claims, gpu=binding.gpu_digest(carried)),
        )


def with_content(content: bytes) -> x509.Certificate:
    """A certificate of the profile in all but its extension, which holds *content*."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratls, "MAX_LEAF", 1 << 20)
        patch.setattr(ratls, "encode_extension", lambda *parts: content)
        return x509.load_der_x509_certificate(build_leaf(leaf_key(1), genuine().claims, b"", None))


def honest_gpu_evidence() -> bytes:
    carried = Leaf.parse(genuine().evidence.leaf).extension.gpu
    assert carried is not None
    return carried


def padded(blocks: int) -> bytes:
    """The honest evidence, with *blocks* empty stored blocks (RFC 1951 §3.2.4, 5 bytes each) before it."""
    plain = zlib.decompress(honest_gpu_evidence())
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = raw.compress(plain) + raw.flush()
    made = b"\x78\xda" + b"\0\0\0\xff\xff" * blocks + body + zlib.adler32(plain).to_bytes(4, "big")
    assert gpu_evidence.decode(made) == gpu_evidence.decode(honest_gpu_evidence())
    return made


LONG: Final = 8000
DEEP: Final = b"\x81" * 20 + b"\0"
ABYSS: Final = b"\x81" * 25_000 + b"\0"
WIDE: Final = b"\x99\x61\xa8" + bytes(25_000)
LIAR: Final = b"\x5b" + b"\x0f" + b"\xff" * 7
"""A byte string that says it is 2^60 bytes long."""
BOMB: Final = zlib.compress(bytes(20 << 20), 9)


def accept_all(self: AttestedSession, handshake: Handshake) -> Appraisal:
    return None
    yield  # a generator, as every appraiser is


UNVERIFIED: Defence = replaced(AttestedSession, "appraise", accept_all)
"""The client takes every certificate."""


@contextlib.contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Bytes that Python had allocated at the worst moment since the beginning of the block."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def bounded(send: Send) -> Send:
    """*send* within `CAP`."""

    def measured(session: AttestedSession, server: Server) -> bytes:
        with peak() as cost:
            try:
                return send(session, server)
            finally:
                assert cost() < CAP, f"{cost()} bytes"

    return measured


@contextlib.contextmanager
def shown(certificate: x509.Certificate) -> Iterator[tuple[AttestedSession, Server]]:
    story = genuine()
    with served(story) as server:
        server.use(certificate, leaf_key(1))
        yield session_for(server, story), server


@contextlib.contextmanager
def told(story: Genuine) -> Iterator[tuple[AttestedSession, Server]]:
    with served(story) as server:
        yield session_for(server, story), server


def longer_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratls, "MAX_LEAF", 1 << 20)


def deeper_cbor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cbor.decode.__kwdefaults__, "max_depth", 1 << 20)
    monkeypatch.setattr(cbor, "MAX_DEPTH", 1 << 20)


wider_cbor = replaced(cbor, "MAX_ITEMS", 1 << 20)


@both_roads
def test_oversized_certificate(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good to the last byte, with 40 KB of nothing inside its GPU evidence: only its length is wrong."""
    story = story_with(padded(LONG))
    assert len(story.evidence.leaf) > 45_000
    stops(lambda: told(story), "FORMAT_LEAF", (longer_leaf, THROUGH), monkeypatch=monkeypatch, send=bounded(send))


@both_roads
def test_certificate_longer_than_tls_takes(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 KB do not get past OpenSSL, whose own limit is left in force: the appraiser never sees them."""
    certificate = with_content(b"\x5a" + (150_000).to_bytes(4, "big") + bytes(150_000))
    seen: list[int] = []

    def counted(self: AttestedSession, handshake: Handshake) -> Appraisal:
        seen.append(len(handshake.leaf))
        return accept_all(self, handshake)

    monkeypatch.setattr(AttestedSession, "appraise", counted)
    with shown(certificate) as (session, server), pytest.raises(NotAttested) as caught:
        bounded(send)(session, server)
    assert caught.value.code == "FORMAT_TLS" and not seen and server.received == b""
    # the positive control: 90 KB do
    with shown(with_content(b"\x5a" + (90_000).to_bytes(4, "big") + bytes(90_000))) as (session, server):
        send(session, server)
        assert seen and SECRET in server.received


@both_roads
def test_deeply_nested_extension(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty levels. With the cap out it is read, and found to be no evidence."""
    certificate = with_content(DEEP)
    stops(
        lambda: shown(certificate), "FORMAT_CBOR", (deeper_cbor, "FORMAT_EXTENSION"), (UNVERIFIED, THROUGH),
        monkeypatch=monkeypatch, send=bounded(send),
    )  # fmt: skip


@both_roads
@pytest.mark.parametrize("content", [ABYSS, WIDE, LIAR], ids=["25000 levels", "25000 items", "2^60 bytes"])
def test_extension_that_would_keep_a_parser_busy(content: bytes, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = with_content(content)
    stops(
        lambda: shown(certificate), "FORMAT_CBOR", (UNVERIFIED, THROUGH), monkeypatch=monkeypatch, send=bounded(send)
    )  # fmt: skip


def test_cap_on_items_comes_before_the_items_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cap out, 25,000 items are decoded, and found to be no evidence."""
    certificate = with_content(WIDE)
    stops(
        lambda: shown(certificate), "FORMAT_CBOR", (wider_cbor, "FORMAT_EXTENSION"), (UNVERIFIED, THROUGH),
        monkeypatch=monkeypatch,
    )  # fmt: skip


@both_roads
def test_decompression_bomb(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 KB that inflate to 20 MiB, in claims and quote as they should be. Without the cap they are all allocated."""
    story = story_with(BOMB)
    assert len(story.evidence.leaf) < ratls.MAX_LEAF
    costs: list[int] = []

    def measured(session: AttestedSession, server: Server) -> bytes:
        with peak() as cost:
            try:
                return send(session, server)
            finally:
                costs.append(cost())

    stops(
        lambda: told(story), "FORMAT_GPU_SIZE", (replaced(gpu_evidence, "MAX_INFLATED", 1 << 30), "FORMAT_GPU_CBOR"),
        (UNVERIFIED, THROUGH), monkeypatch=monkeypatch, send=measured,
    )  # fmt: skip
    capped, uncapped, _ = costs
    assert capped < CAP and uncapped > 20 << 20


# --- a thousand at once ---


def pem(folder: Path, number: int, certificate: x509.Certificate, key: Any) -> str:
    path = folder / f"{number}.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
    return str(path)


def garbage() -> list[tuple[x509.Certificate, Any]]:
    contents = [DEEP, ABYSS, WIDE, LIAR, b"", os.urandom(9000)]
    own = [(with_content(c), leaf_key(1)) for c in contents]
    stories = [story_with(BOMB), story_with(padded(LONG))]
    return [
        plain_certificate(NAME),
        *own,
        *((x509.load_der_x509_certificate(s.evidence.leaf), leaf_key(0)) for s in stories),
    ]


@contextlib.contextmanager
def crowd(folder: Path) -> Iterator[tuple[list[int], Callable[[], dict[str, int]]]]:
    """Servers with garbage certificates, in another process: their ports, and what they saw once all is over."""
    files = [pem(folder, n, *pair) for n, pair in enumerate(garbage())]
    process = subprocess.Popen(
        [PYTHON, "-m", "tests.end_to_end.garbage", *files], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=sys.stderr, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline()), lambda: json.loads(process.communicate(timeout=60)[0])
    finally:
        process.kill()
        process.communicate()


async def meet(session: AttestedSession, ports: list[int], crashes: list[Any]) -> list[str]:
    """All of *ports* dialled at once; what came of each."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: crashes.append(context))

    async def one(port: int) -> str:
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=session.context(), server_hostname=NAME, ssl_handshake_timeout=200
            )
        except NotAttested as refusal:
            return refusal.code
        writer.write(SECRET)
        await writer.drain()
        writer.close()
        return THROUGH

    return list(await asyncio.gather(*(one(port) for port in ports)))


def test_a_thousand_garbage_certificates_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client process, one session: every handshake is refused, nothing leaks, and the next genuine one works."""
    if raise_limit() < CROWD + 200:
        pytest.skip("this user may not have a thousand descriptors")
    story, crashes = genuine(), list[Any]()
    with served(story) as server, crowd(tmp_path) as (ports, seen):
        session = session_for(server, story, seconds=200.0)
        dialled = [ports[n % len(ports)] for n in range(CROWD)]
        asyncio.run(meet(session, ports, crashes))  # first-time costs are not the crowd's
        files = open_files()
        with peak() as cost:
            codes = asyncio.run(meet(session, dialled, crashes))
            worst = cost()
        gc.collect()
        assert len(codes) == CROWD and THROUGH not in codes
        assert set(codes) == {"FORMAT_LEAF", "FORMAT_CBOR", "FORMAT_GPU_SIZE"}
        assert worst < CROWD * EACH, f"{worst // CROWD} bytes for each"
        assert open_files() == files and not crashes
        assert b"404" in talk(session, server)
        assert seen()["bytes"] == 0
    UNVERIFIED(monkeypatch)  # the control: a client that takes every certificate sends its secret to all of them
    with served(story) as server, crowd(tmp_path) as (ports, seen):
        session = session_for(server, story, seconds=200.0)
        assert set(asyncio.run(meet(session, ports, crashes))) == {THROUGH}
        assert seen() == {"handshakes": len(ports), "bytes": len(ports) * len(SECRET)}


def test_extension_identifier_is_the_one_that_the_tests_fill() -> None:
    held = with_content(DEEP).extensions.get_extension_for_oid(x509.ObjectIdentifier(EXTENSION_OID)).value
    assert isinstance(held, x509.UnrecognizedExtension) and held.value == DEEP
