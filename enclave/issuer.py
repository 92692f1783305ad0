"""Certificates of this enclave: made, verified by itself, swapped in, renewed (ratls facts §3.4).

Runs in the enclave. The order is fixed, and each step commits to the ones before it:

    (1) key            fresh, for this certificate alone
    (2) GPU nonce      from the key; GPU evidence over it; own verification of it; ready state
    (3) event log      closed once per boot: RTMR3 is sealed before the first quote
    (4) claims, quote  the quote's REPORTDATA covers the claims, the claims cover all the rest
    (5) certificate    then the enclave verifies the whole as a client would, under the appraisal policy it measured

A certificate that the enclave's own verifier refuses is never served. A successor is minted at half of the lifetime,
and at once when the operator's documents change; it takes over for new connections only. A renewal that fails is
said aloud and tried again, less and less often; once the old leaf has ended no handshake and no request is taken
(`enclave.tls`) and the GPUs' ready state, which that leaf vouched for, is withdrawn. It is withdrawn at once when what
was refused is a GPU and not the host's papers about it: an exchanged device gets no more work.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from OpenSSL import SSL

from attestation import binding
from attestation.bundle import Bundle
from attestation.claims import Claims, GpuNonce, GpuStateClaim, ModelClaim
from attestation.deployment import StatusList
from attestation.dsse import Envelope
from attestation.endorsements import Endorsements
from attestation.errors import RefusedError, VouchsafeError
from attestation.evidence import Evidence
from attestation.gpu import GpuEndorsements
from attestation.gpu import encode as encode_gpu
from attestation.keyset import keyset_digest, keyset_document
from attestation.policy import Policy
from attestation.reference_values import ReleaseManifest
from attestation.result import AttestationResult
from attestation.strict_json import jcs
from attestation.verifier import verify, verify_gpu
from enclave import telemetry
from enclave.clock import Clock
from enclave.documents import Statements, read_endorsements, read_statements
from enclave.identity import Identity, ReceiptSigner
from enclave.producer import Producer
from enclave.settings import Settings
from enclave.tls import server_context

if TYPE_CHECKING:
    from attestation.attester.gpu import GpuState

__all__ = ["DRAIN", "Draft", "Issuer", "Keys", "LeafKey"]

DRAIN: Final = 600
"""Seconds that a running answer may outlive its certificate; the keyset ends with it."""
KEPT: Final = 64
"""Bundles of earlier certificates, for receipts that still name them (20 minutes; the shortest renewal is 30 s)."""
POLL: Final = 5.0
RETRY: Final = 5.0
RETRY_MAX: Final = 60.0
"""Seconds before a failed renewal is tried again: doubled each time up to the second, and never past the leaf's end."""
_PAPERS: Final = ("GPU_OCSP_", "GPU_RIM_")
_VERDICTS: Final = frozenset({"GPU_OCSP_REVOKED", "GPU_RIM_MISMATCH"})
"""Refusals about endorsements, which the host can lose or damage, and those among them that speak of the device."""


class LeafKey(Protocol):
    """The private key of one certificate, by what it can do (`enclave.keys.CertificateKey`)."""

    @property
    def spki(self) -> bytes: ...
    def leaf(self, claims: Claims, quote: bytes, gpu: bytes | None) -> bytes: ...
    def install(self, context: SSL.Context, leaf: bytes) -> None: ...


class PublishedSigner(ReceiptSigner, Protocol):
    """A receipt signer whose public key (Ed25519, 32 bytes) goes into the keyset."""

    @property
    def public(self) -> bytes: ...


class Keys(Protocol):
    """Where keys come from (`enclave.keys.KeyRing`)."""

    def certificate_key(self) -> LeafKey: ...
    def receipt_key(self, now: int) -> PublishedSigner: ...


@dataclass(slots=True)
class Draft:
    """A certificate on its way. Filled in the order of the fields."""

    key: LeafKey
    endorsements: Endorsements
    nonce: GpuNonce | None = None
    gpu: bytes | None = None
    gpu_state: GpuStateClaim | None = None
    statements: Statements | None = None
    signer: PublishedSigner | None = None
    keyset: bytes = b""
    claims: Claims | None = None
    quote: bytes = b""


class Issuer:
    """Makes identities and knows the current one. Used from one event loop.

    event_log   the closed log; set once, by `seal` of the boot
    failing     code of the last renewal when it failed, "" otherwise
    say         one line for the operator's console, without content
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        keys: Keys,
        producer: Producer,
        clock: Clock,
        *,
        say: Callable[[str], None] = lambda line: None,
        poll: float = POLL,
        retry: float = RETRY,
    ) -> None:
        self._settings, self._policy, self._keys, self._producer, self._clock = settings, policy, keys, producer, clock
        self._say, self._poll, self._retry = say, poll, retry
        self._boot_id = secrets.token_bytes(16)
        self._current: Identity | None = None
        self._documents = b""
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._gpus_stopped = False
        self.failing = ""
        self.event_log = b""
        self.release_digest: bytes | None = None

    @property
    def current(self) -> Identity:
        """The identity for the next handshake."""
        if self._current is None:
            raise RuntimeError("no certificate has been made")
        return self._current

    @property
    def valid(self) -> bool:
        """Whether the current leaf has not ended, and no GPU has been refused since it was made."""
        current = self._current
        return current is not None and not self._gpus_stopped and self._clock.now() < current.not_after

    def bundle(self, digest: str | None = None) -> bytes | None:
        """The current bundle, or that of the certificate whose keyset has *digest*; None when it is not kept."""
        return self.current.bundle() if digest is None else self._kept.get(digest)

    # --- the steps, as the boot numbers them --------------------------------------------------------------------------

    async def prepare(self) -> Draft:
        """Steps (1), (2). Raises `AttesterError`, `InputError`, `RefusedError` for GPU evidence that does not pass."""
        draft = Draft(self._keys.certificate_key(), read_endorsements(self._settings.paths.endorsements))
        if not self._producer.has_gpu:
            return draft
        draft.nonce = GpuNonce(self._clock.now(), secrets.token_bytes(32))
        wire_nonce = binding.gpu_nonce(binding.key_hash(draft.key.spki), draft.nonce.issued_at, draft.nonce.salt)
        evidence = await self._producer.gpu_evidence(wire_nonce)
        hints = GpuEndorsements(draft.endorsements.rims, draft.endorsements.ocsp)
        judged = verify_gpu(evidence, hints, self._policy, nonce=wire_nonce, now=self._clock.now())
        state = await self._producer.gpu_state()
        try:
            _demand(judged, "the GPU evidence does not pass the enclave's own verification")
            _same(state, judged)
        except RefusedError as err:
            if not judged.failed or not all(_of_papers(c.code) for c in judged.failed):
                await self._stop_gpus(err.code)
            raise
        # Only now: work on a GPU that has not been verified would hand it plaintext.
        if not state.ready:
            await self._producer.set_gpu_ready(True)
        draft.gpu_state = self._state(await self._producer.gpu_state())
        draft.gpu = encode_gpu(evidence)
        return draft

    async def quote(self, draft: Draft) -> None:
        """Step (4). Raises `AttesterError`, `InputError`, `FormatError`."""
        settings, now = self._settings, self._clock.now()
        statements = read_statements(settings.paths.statements)
        if self.release_digest is not None and statements.release != self.release_digest:
            # RTMR3 holds the release of this boot: another manifest cannot be claimed without another boot.
            raise RefusedError(
                "ISSUE_RELEASE",
                "the release manifest is another one than at boot",
                expected=self.release_digest,
                actual=statements.release,
                hint="restart the enclave to serve under another release manifest",
            )
        k, not_after = binding.key_hash(draft.key.spki), now + settings.lifetime
        signer = self._keys.receipt_key(now)
        names = settings.dns_names
        draft.keyset = jcs(
            keyset_document(
                subject=None,
                not_after=not_after + DRAIN,
                receipt_key_id=signer.key_id,
                receipt_public=signer.public,
                spki_sha256=hashlib.sha256(draft.key.spki).digest(),
                domain=names[0] if len(names) == 1 else None,
            )
        )
        draft.statements, draft.signer = statements, signer
        draft.claims = Claims(
            key_hash=k,
            not_before=now,
            not_after=not_after,
            dns_names=names,
            boot_id=self._boot_id,
            release=statements.release,
            deployment=statements.deployment,
            config=settings.digest,
            event_log=hashlib.sha384(self.event_log).digest(),
            gpu=None if draft.gpu is None else binding.gpu_digest(draft.gpu),
            gpu_nonce=draft.nonce,
            gpu_state=draft.gpu_state,
            keyset=hashlib.sha256(draft.keyset).digest(),
            role=settings.role,
            models=tuple(ModelClaim(m.id, m.weights) for m in settings.models),
        )
        draft.quote = await self._producer.quote(binding.report_data(draft.claims.encode()))

    def certify(self, draft: Draft) -> Identity:
        """Step (5). Raises `RefusedError` when our own verifier refuses, `FormatError` for a leaf too long."""
        assert draft.claims is not None and draft.statements is not None and draft.signer is not None
        claims, statements = draft.claims, draft.statements
        leaf = draft.key.leaf(claims, draft.quote, draft.gpu)
        evidence = Evidence(
            leaf=leaf,
            keyset=draft.keyset,
            event_log=self.event_log,
            release=statements.release_raw,
            deployment=statements.deployment_raw,
            status=statements.status_raw,
        )
        result = verify(
            evidence, draft.endorsements, self._policy, now=self._clock.now(), name=self._settings.dns_names[0]
        )
        _demand(result, "the enclave's own verifier refuses the certificate")
        if any(c.id == "status.current" for c in result.checks):
            # Signed and accepted: time was at least this late.
            self._clock.raise_floor(StatusList.parse(Envelope.parse(statements.status_raw).payload).issued_at)
        context = server_context()
        draft.key.install(context, leaf)
        self._documents = statements.digest
        return Identity(
            leaf=leaf,
            claims=claims,
            claims_bytes=claims.encode(),
            key_hash=claims.key_hash,
            keyset=draft.keyset,
            keyset_digest=keyset_digest(draft.keyset),
            not_before=claims.not_before,
            not_after=claims.not_after,
            event_log=self.event_log,
            provenance=_provenance(statements.release_raw),
            evidence_bundle=Bundle(evidence, draft.endorsements).encode(),
            receipt_signer=draft.signer,
            context=context,
        )

    def publish(self, identity: Identity) -> None:
        """Use *identity* for every handshake from now on. Connections that exist keep theirs."""
        self._current, self._gpus_stopped = identity, False
        self._kept[identity.keyset_digest] = identity.bundle()
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        telemetry.event(
            "certificate",
            not_before=identity.not_before,
            not_after=identity.not_after,
            keyset=identity.keyset_digest,
        )

    async def issue(self) -> Identity:
        """All steps once more, for a successor."""
        draft = await self.prepare()
        await self.quote(draft)
        return self.certify(draft)

    # --- renewal ------------------------------------------------------------------------------------------------------

    async def renew_forever(self) -> None:
        """Mint successors until cancelled. Failures are said, counted by their code, and tried again."""
        failures = 0
        while True:
            await self._until_due()
            try:
                successor = await self.issue()
            except (VouchsafeError, OSError) as err:
                failures += 1
                await self._failed(err, failures)
                continue
            failures, self.failing = 0, ""
            await self._settle(successor)
            self.publish(successor)

    async def _failed(self, err: VouchsafeError | OSError, failures: int) -> None:
        """Tell, withdraw the ready state when the leaf has ended, and wait before the next attempt."""
        self.failing = err.code if isinstance(err, VouchsafeError) else "ISSUE_SYSTEM"
        left = max(0, self.current.not_after - self._clock.now())
        pause = min(self._retry * 2 ** min(failures - 1, 10), RETRY_MAX)
        if left:
            pause = min(pause, left)  # the end of the leaf is not slept through
        telemetry.event("certificate.failed", code=self.failing, attempt=failures, left=left)
        self._say(
            f"certificate: RENEWAL FAILED ({err}); attempt {failures}, next in {pause:.0f} s; "
            f"the current one ends in {left} s"
        )
        if not left:
            await self._stop_gpus(self.failing)
        await asyncio.sleep(pause)

    async def _stop_gpus(self, code: str) -> None:
        """Withdraw the GPUs' ready state, and with it our own, until a certificate has been made."""
        self._gpus_stopped = self._producer.has_gpu
        try:
            if not self._producer.has_gpu or not (await self._producer.gpu_state()).ready:
                return
            await self._producer.set_gpu_ready(False)
        except VouchsafeError as err:  # what led here is told by the caller and must not be hidden by this
            telemetry.event("gpu.stopped", code=code, done=False)
            self._say(f"gpu: READY STATE NOT WITHDRAWN ({err})")
        else:
            telemetry.event("gpu.stopped", code=code, done=True)
            self._say(
                f"gpu: READY STATE WITHDRAWN ({code}): no more work for the GPUs until they are vouched for again"
            )

    async def _until_due(self) -> None:
        current = self.current
        due = current.not_before + (current.not_after - current.not_before) // 2
        floor = current.not_before + min(60, self._settings.lifetime // 4)  # a busy host buys no stream of quotes
        while (now := self._clock.now()) < due:
            if now >= floor and self._changed():
                return
            await asyncio.sleep(min(self._poll, max(0.05, due - now)))

    def _changed(self) -> bool:
        """Whether the operator's documents are others than those of the current certificate."""
        try:
            return read_statements(self._settings.paths.statements).digest != self._documents
        except VouchsafeError:
            return False  # half written, or damaged: the renewal at half life will say so

    async def _settle(self, successor: Identity) -> None:
        """Wait a moment before the swap, while the old leaf serves: a client whose clock is a little behind would
        refuse one so young."""
        pause = min(30, self._settings.lifetime // 8)
        until = min(successor.not_before + pause, self.current.not_after - pause)
        while self.valid and self._clock.now() < until:  # noqa: ASYNC110 - a clock
            await asyncio.sleep(self._poll)

    def _state(self, state: GpuState) -> GpuStateClaim:
        return GpuStateClaim(
            count=state.count,
            switches=state.switches,
            mode=state.mode,
            cc=state.cc,
            dev_tools=state.dev_tools,
            ready=state.ready,
            production=state.production,
        )


def _of_papers(code: str) -> bool:
    return code.startswith(_PAPERS) and code not in _VERDICTS


def _same(state: GpuState, judged: AttestationResult) -> None:
    """The driver counts the devices that the evidence shows, in the same mode, and says that they are confidential.

    Raises `RefusedError`; a verifier makes the same comparison with the claims (GPU facts §7, 5 and 6)."""
    seen = judged.claims["gpu"]
    kinds = [device["kind"] for device in seen["devices"]]
    shown = (kinds.count("gpu"), kinds.count("switch"), seen["mode"])
    counted = (state.count, state.switches, state.mode)
    if counted != shown:
        raise RefusedError(
            "GPU_STATE", "the driver counts other devices than the evidence shows", expected=shown, actual=counted,
            hint="was a GPU added, lost or reset? restart the machine",
        )  # fmt: skip
    if (state.cc, state.production, state.dev_tools) != (True, True, False):
        raise RefusedError(
            "GPU_NOT_CONFIDENTIAL", "the driver says that the GPUs are not confidential",
            expected="cc=True, production=True, dev_tools=False",
            actual=f"cc={state.cc}, production={state.production}, dev_tools={state.dev_tools}",
            hint="nvidia-smi conf-compute -q shows the mode; it changes at a reset of the GPU alone",
        )  # fmt: skip


def _provenance(release_raw: bytes) -> dict[str, str | None]:
    """What the release manifest says of the image, in the words of `aci/1`. RTMR3 and the claims back the digest.

    `image_digest` is the first subject of the manifest."""
    payload = Envelope.parse(release_raw).payload
    manifest = ReleaseManifest.parse(payload)
    subject = json.loads(payload)["subject"][0]["digest"]["sha256"]
    return {
        "repo_url": None,
        "repo_commit": manifest.source_commit,
        "image_digest": f"sha256:{subject}",
        "image_provenance": None,
    }


def _demand(result: AttestationResult, what: str) -> None:
    """Raise `RefusedError` with the first failed check unless *result* is accepted."""
    if result.accepted:
        return
    if not result.failed:
        raise RefusedError("VERIFY_NOTHING", f"{what}: no check passed", hint="does the appraisal policy cover it?")
    first, more = result.failed[0], len(result.failed) - 1
    raise RefusedError(
        first.code,
        f"{what}: {first.reason}" + (f" ({more} more failed)" if more else ""),
        expected=first.expected,
        actual=first.actual,
        hint="vouchsafe verify shows every check; compare the documents and endorsements that the host provides",
    )
