"""Every parser that reads bytes from the other side, and what must hold for any bytes at all.

Only the package's own errors may escape, and where a format has one spelling, what was read is written back as it came.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from attestation import cbor
from attestation.bundle import Bundle
from attestation.channel import ChannelProof
from attestation.claims import Claims
from attestation.client.wire import Exchange, FetchEvidence
from attestation.deployment import DeploymentStatement, StatusList
from attestation.dsse import Envelope, public_bytes
from attestation.errors import FormatError, PolicyError, RefusedError, TransportError, VouchsafeError
from attestation.gpu import certificates, from_nvidia_json, ocsp, rim
from attestation.gpu import evidence as gpu_evidence
from attestation.gpu.fwid import certified_fwid
from attestation.gpu.report import Report
from attestation.keyset import Keyset
from attestation.policy import Policy, Skip
from attestation.ratls import Leaf, decode_extension, encode_extension
from attestation.receipt import Receipt, verify_receipt
from attestation.reference_values import ReleaseManifest
from attestation.result import Checks
from attestation.sse import SseCutter, split_inline
from attestation.tdx import Collateral, Quote, appraise_event_log, canonical_length, parse_event_log
from host.clienthello import HelloReader
from tests.fuzz import seeds
from tests.genuine import EXPORTER, NONCE, NOW, operator_key

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    """One parser under attack.

    run     takes any bytes; may raise *errors* and nothing else
    seeds   honest inputs
    size    longest input tried (bytes): somewhat beyond the parser's own cap where that is small
    """

    run: Callable[[bytes], object]
    seeds: seeds.Seeds
    errors: tuple[type[Exception], ...] = (FormatError,)
    size: int = 16 * 1024

    def __call__(self, data: bytes) -> None:
        try:
            self.run(data)
        except self.errors:
            return


def same(read: bytes, data: bytes) -> None:
    """The format has one spelling."""
    if read != data:
        raise AssertionError("accepted bytes are not what writing their value gives")


def read_cbor(data: bytes) -> None:
    same(cbor.encode(cbor.decode(data, max_size=8192, tags=frozenset({1}))), data)


def read_claims(data: bytes) -> None:
    same(Claims.decode(data).encode(), data)


def read_extension(data: bytes) -> None:
    found = decode_extension(data)
    same(encode_extension(found.quote, found.claims, found.gpu), data)


def read_quote(data: bytes) -> None:
    length = canonical_length(data)
    if not 0 < length <= len(data):
        raise AssertionError("a canonical length beyond the bytes")
    quote = Quote.parse(data)
    same(quote.raw, data)


def read_log(data: bytes) -> None:
    zero = (bytes(48), bytes(48), bytes(48), bytes(48))
    appraise_event_log(parse_event_log(data), zero, Checks(), items=Skip("fuzzing"))


def read_carried(data: bytes) -> None:
    gpu_evidence.decode(data)


def read_inflated(data: bytes) -> None:
    gpu_evidence.decode(zlib.compress(data, 1))


def read_nvidia(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list):
        from_nvidia_json(value, [])
        from_nvidia_json([], value)


def read_certificate(data: bytes) -> None:
    known = seeds.certificates()
    certificates.issued(data, known[1])
    certificates.issued(known[0], data)
    found = certificates.Certificate.parse(data)
    certified_fwid(found)
    certificates.check_chain([data], root=known[1], length=1, now=NOW, code="GPU_CHAIN")


def read_rim(data: bytes) -> None:
    """Beside the whole, what stands behind the signature: NVIDIA signs, but whoever holds a key must not crash us."""
    with suppress(FormatError, RefusedError):
        rim.Rim.parse(data, root=seeds.honest().tee.roots.nvidia_rim)
    tree = rim._tree(data)
    rim._meta(tree)
    rim._golden(tree)


def read_ocsp(data: bytes) -> None:
    pki = seeds.honest().tee.pki
    known = ocsp.OcspAnswers({"one": data})
    for role, issuer in (("device-ik-0", "device-ica"), ("rim-driver-l4", "rim-l3")):
        ocsp._authentic(data, pki[issuer].der)
        parse = certificates.Certificate.parse
        known.check(parse(pki[role].der), parse(pki[issuer].der), now=seeds.honest().now)


def read_bundle(data: bytes) -> None:
    same(Bundle.decode(data).encode(), data)


def read_answer(data: bytes) -> None:
    ChannelProof.from_answer(data, nonce=NONCE, exporter=EXPORTER)


def read_envelope(data: bytes) -> None:
    Envelope.parse(data).signers([public_bytes(operator_key(n)) for n in range(3)])


def read_policy(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    Policy.parse(text)


def read_receipt(data: bytes) -> None:
    receipt = Receipt.parse(data)
    for response in (None, seeds.streams()[0]):
        verify_receipt(
            receipt, seeds.keysets()[0], request=seeds.REQUEST, response=response, checks=Checks(), allow_cut=True
        )


def read_stream(data: bytes) -> None:
    """The same events whatever the chunks."""
    split_inline(data)
    found = []
    for step in (1, 7, max(1, len(data))):
        cutter = SseCutter(limit=4096)
        events: list[bytes] = []
        try:
            for at in range(0, len(data), step):
                events += cutter.feed(data[at : at + step])
            events.append(cutter.rest)
            same(b"".join(events), data)
        except FormatError:
            events = [b"too long"]
        found.append(events)
    if found[0] != found[1] or found[0] != found[2]:
        raise AssertionError("the cut depends on the chunks")


def read_hello(data: bytes) -> None:
    """The same answer whatever the chunks; it never raises."""
    found = []
    for step in (1, 11, max(1, len(data))):
        reader = HelloReader()
        answer = None
        for at in range(0, len(data), step):
            answer = reader.feed(data[at : at + step][: reader.room])
        same(bytes(reader.buffer), data[: len(reader.buffer)])
        found.append(repr(answer))
    if len({*found}) != 1:
        raise AssertionError(f"the answer depends on the chunks: {found}")


def read_http(data: bytes) -> None:
    exchange = Exchange(FetchEvidence(), "demo.vouchsafe.test")
    for at in range(0, len(data), 100):
        answer = exchange.feed(data[at : at + 100])
        if answer is not None:
            answer.expect_ok("evidence")
            return
    exchange.feed(b"")


_GPU = (FormatError, RefusedError)

TARGETS: dict[str, Target] = {
    "cbor": Target(read_cbor, seeds.cbor),
    "claims": Target(read_claims, seeds.claims),
    "extension": Target(read_extension, seeds.extensions),
    "leaf": Target(Leaf.parse, seeds.leaves),
    "quote": Target(read_quote, seeds.quotes),
    "collateral": Target(Collateral.parse, seeds.collaterals, size=64 * 1024),
    "ccel": Target(read_log, seeds.ccels, size=64 * 1024),
    "dstack-log": Target(read_log, seeds.dstack_logs, size=64 * 1024),
    "gpu-report": Target(Report.parse, seeds.reports),
    "gpu-evidence": Target(read_carried, seeds.carried),
    "gpu-evidence-inflated": Target(read_inflated, lambda: [zlib.decompress(c) for c in seeds.carried()]),
    "gpu-json": Target(read_nvidia, seeds.nvidia_json, size=64 * 1024),
    "gpu-certificate": Target(read_certificate, seeds.certificates, _GPU),
    "gpu-pem": Target(certificates.split_pem, seeds.pem_chains),
    "rim": Target(read_rim, seeds.rims, _GPU, size=64 * 1024),
    "ocsp": Target(read_ocsp, seeds.ocsp, _GPU),
    "bundle": Target(read_bundle, seeds.bundles, size=256 * 1024),
    "channel-answer": Target(read_answer, seeds.answers, size=64 * 1024),
    "envelope": Target(read_envelope, seeds.envelopes),
    "release": Target(ReleaseManifest.parse, seeds.releases, (FormatError, PolicyError)),
    "deployment": Target(DeploymentStatement.parse, seeds.deployments, (FormatError, PolicyError)),
    "status-list": Target(StatusList.parse, seeds.status_lists, (FormatError, PolicyError)),
    "policy": Target(read_policy, seeds.policies, (PolicyError,)),
    "receipt": Target(read_receipt, seeds.receipts),
    "keyset": Target(Keyset.parse, seeds.keysets),
    "sse": Target(read_stream, seeds.streams),
    "client-hello": Target(read_hello, seeds.hellos, ()),
    "http-answer": Target(read_http, seeds.http_answers, (FormatError, TransportError)),
}
assert all(issubclass(e, VouchsafeError) for t in TARGETS.values() for e in t.errors)
