"""One service, one policy: what has been verified of it, and the appraiser that its connections go through.

Runs on the user's machine. Keeps bundles (untrusted bytes, verified whenever used) and, by the digest of a leaf, the
accepted result until its earliest expiry, so that a further connection under the same certificate costs the channel
proof alone. When a certificate is new, what is known is judged first; if only objects that change with a certificate
are missing (keyset, statements), the bundle is asked for over that very connection, else it is refused without a byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from attestation.bundle import Bundle
from attestation.channel import ChannelProof
from attestation.client.fetch import dial, fetch_evidence
from attestation.client.first_use import MARK
from attestation.client.floor import CrlFloor, SerialFloors, replace_file
from attestation.client.handshake import Appraisal, Handshake, NotAttested
from attestation.client.status import Fetch, StatusLists, fetch_status
from attestation.client.target import Target
from attestation.client.tls import AttestedContext
from attestation.client.wire import FetchEvidence, ProveChannel
from attestation.deployment import SerialFloor
from attestation.errors import FormatError, InputError, PolicyError, RefusedError
from attestation.policy import ChannelPolicy, Policy, Skip
from attestation.ratls import Leaf
from attestation.result import AttestationResult
from attestation.tdx import CrlNumbers
from attestation.verifier import verify, verify_channel

__all__ = ["AttestedSession"]

MAX_KEPT: Final = 16
"""Certificates remembered: one service behind a balancer may show several at a time, two each at a rotation."""

_FETCHABLE: Final = frozenset({"EVIDENCE_DIGEST", "KEYSET_KEY", "KEYSET_DATES", "STATUS_EXPIRED", "STATUS_ROLLBACK"})
"""Refusals that other documents may heal. Everything else is about the certificate and its quote: refused at once."""


@dataclass(frozen=True, slots=True)
class _Known:
    bundle: Bundle
    result: AttestationResult
    """accepted, steps (1) to (6)"""


class AttestedSession:
    """Thread-safe. `context()` is for any HTTP library; `last_result` is the latest verdict, refusals included.

    clock      unix seconds; this machine's own time decides every validity
    cache_dir  where the bundle is kept between runs; its content is as untrusted as the network's
    explore    look only: allowed under a policy that pins nobody; the context is then for `verify_once` alone
    fetch_list how the status list at the policy's status URL is fetched
    """

    def __init__(
        self,
        target: Target | str,
        policy: Policy,
        *,
        connect: tuple[str, int] | None = None,
        cache_dir: Path | None = None,
        clock: Callable[[], float] = time.time,
        seconds: float = 30.0,
        explore: bool = False,
        fetch_list: Fetch = fetch_status,
    ) -> None:
        self.target = target if isinstance(target, Target) else Target.parse(target, connect)
        self.policy = _connectable(policy, explore)
        self._clock, self._seconds = clock, seconds
        self._cache = cache_dir / f"{self.target.name}_{self.target.port}.bundle" if cache_dir else None
        self._lock = threading.Lock()
        self._fetching = threading.Lock()
        self._bundles: dict[bytes, Bundle] = {}  # by leaf digest, oldest first
        self._known: dict[bytes, _Known] = {}  # likewise
        self._crl_floor = CrlFloor(cache_dir, policy.roots.intel)  # a CRL seen once is not followed by an older one
        self._serial_floors = SerialFloors(cache_dir, policy, self.target.name)  # nor is a statement or a status list
        self._lists = StatusLists(policy, cache_dir, self.target.name, fetch_list)
        self._context: AttestedContext | None = None
        self.last_result: AttestationResult | None = None

    # for libraries

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def host(self) -> str:
        return self.target.host

    def context(self) -> AttestedContext:
        """The verifying context, one per session. May fetch at its first use: see `prepare`."""
        with self._lock:
            if self._context is None:
                self._context = AttestedContext(self, deadline=self._seconds)
            return self._context

    @property
    def prepared(self) -> bool:
        """Whether `prepare` would have nothing to wait for now."""
        return self._newest_valid() and not self._lists.due(int(self._clock()))

    def prepare(self) -> None:
        """Make sure that there is evidence to judge a handshake with; blocks while it is fetched, from disk or network.

        Asks the policy's status URL too, when its last list has ended. Call it (in a thread) before the first
        connection of an event loop. Raises `TransportError`, `FormatError`."""
        with self._fetching:
            self._gather()
            self._lists.refresh(int(self._clock()))

    def _gather(self) -> None:
        if self._newest_valid():
            return
        if self._cache is not None and not self._bundles:
            with contextlib.suppress(OSError, FormatError):
                self.offer(Bundle.decode(self._cache.read_bytes()))
            if self._newest_valid():
                return
        self.offer(Bundle.decode(fetch_evidence(self.target, seconds=self._seconds)))

    def offer(self, bundle: Bundle) -> None:
        """Evidence that the caller has from anywhere; it is judged when a connection shows its certificate."""
        digest = hashlib.sha256(bundle.evidence.leaf).digest()
        with self._lock:
            self._bundles.pop(digest, None)
            self._bundles[digest] = bundle
            _trim(self._bundles)

    def verify_once(self) -> AttestationResult:
        """Dial, verify, prove the channel, hang up. Returns the verdict, refusals included.

        Raises `TransportError` when there was nobody to judge, `NotAttested` when there was nothing to judge."""
        self.prepare()
        sock = dial(self.target, self._seconds)
        try:
            with self.context().wrap_socket(sock, server_hostname=self.name) as tls:
                result = tls.attestation
        except NotAttested as err:
            if err.result is None:
                raise
            result = err.result
        assert result is not None
        return result

    # for receipts and files

    def bundle(self, leaf: bytes) -> Bundle | None:
        """The bundle of an accepted certificate (SHA-256 of its DER)."""
        with self._lock:
            known = self._known.get(leaf)
            return known.bundle if known else None

    def newest_bundle(self) -> Bundle | None:
        """The last bundle that came in, verified or not."""
        with self._lock:
            return next(reversed(self._bundles.values()), None)

    # Appraiser

    def appraise(self, handshake: Handshake) -> Appraisal:
        """Steps (1) to (6) for an unknown certificate, step (7) for every connection."""
        digest = hashlib.sha256(handshake.leaf).digest()
        now = int(self._clock())
        with self._lock:
            known = self._known.get(digest)
        if known is None or now >= known.result.valid_until or self._overtaken(known.result):
            bundle, first = self._judge(handshake.leaf, now)
            if not first.accepted:
                if not set(first.codes) <= _FETCHABLE:
                    self._refuse(first)
                answer = yield FetchEvidence()
                bundle = Bundle.decode(answer.expect_ok("the evidence"))
                if bundle.evidence.leaf != handshake.leaf:
                    raise RefusedError(
                        "EVIDENCE_LEAF",
                        "the evidence is of another certificate than the connection's",
                        expected=digest,
                        actual=hashlib.sha256(bundle.evidence.leaf).digest(),
                    )
                bundle, first = self._verify(bundle, now)
            if not first.accepted:
                self._refuse(first)
            known = self._remember(digest, bundle, first)
        result = known.result
        if not isinstance(self.policy.channel.proof, Skip):
            nonce = os.urandom(32)
            exporter = None if handshake.exporter is None else handshake.exporter(nonce)
            # Without an exporter the proof is bound to the key: the verifier refuses it where the policy wants more.
            answer = yield ProveChannel(nonce, self.policy.channel.fresh_gpu, "key" if exporter is None else "exporter")
            proof = ChannelProof.from_answer(answer.expect_ok("the channel proof"), nonce=nonce, exporter=exporter)
            evidence, endorsements = known.bundle.evidence, known.bundle.endorsements
            result = verify_channel(
                result,
                evidence,
                endorsements,
                self.policy,
                proof,
                now=int(self._clock()),
                group=handshake.group,
                crl_floor=self._crl_floor.numbers,
            )
            if not result.accepted:
                self._refuse(result)
        self.last_result = result
        return result

    def _judge(self, leaf: bytes, now: int) -> tuple[Bundle, AttestationResult]:
        """With the bundle of this very leaf, or with the newest one's other objects."""
        with self._lock:
            own = self._bundles.get(hashlib.sha256(leaf).digest())
            newest = next(reversed(self._bundles.values()), None)
        bundle = own or newest
        if bundle is None:
            raise RefusedError("EVIDENCE_NONE", "there is no evidence to judge this certificate with")
        if own is None:
            bundle = Bundle(replace(bundle.evidence, leaf=leaf), bundle.endorsements)
        return self._verify(bundle, now)

    def _overtaken(self, result: AttestationResult) -> bool:
        """Whether a newer statement or status list was seen since: it may take back what *result* rests on."""
        floor = self._serial_floors.floor or SerialFloor()
        statement, status = result.claims["statement_serial"], result.claims["status_serial"]
        return (statement is not None and statement < (floor.statement or 0)) or (
            status is not None and status < max(floor.status or 0, self._lists.serial)
        )

    def _verify(self, bundle: Bundle, now: int) -> tuple[Bundle, AttestationResult]:
        """The verdict on *bundle* with the newest status list at hand in it, and that bundle."""
        bundle = replace(bundle, evidence=self._lists.newest(bundle.evidence))
        return bundle, verify(
            bundle.evidence,
            bundle.endorsements,
            self.policy,
            now=now,
            name=self.name,
            crl_floor=self._crl_floor.numbers,
            serial_floor=self._serial_floors.floor,
            at_url=self._lists.answer,
        )

    def _refuse(self, result: AttestationResult) -> None:
        self.last_result = result
        raise NotAttested.from_result(result)

    # the cache

    def _newest_valid(self) -> bool:
        bundle = self.newest_bundle()
        if bundle is None:
            return False
        try:
            return self._clock() < Leaf.parse(bundle.evidence.leaf).not_after
        except FormatError:
            return False

    def _remember(self, digest: bytes, bundle: Bundle, result: AttestationResult) -> _Known:
        known = _Known(bundle, result)
        self.offer(bundle)
        with self._lock:
            self._crl_floor.raise_to(CrlNumbers(**result.claims["tdx"]["crl_numbers"]))
            self._serial_floors.raise_to(SerialFloor(result.claims["statement_serial"], result.claims["status_serial"]))
            self._known.pop(digest, None)
            self._known[digest] = known
            _trim(self._known)
        if self._cache is not None:
            replace_file(self._cache, bundle.encode())
        return known


def _trim(kept: dict[bytes, Bundle] | dict[bytes, _Known]) -> None:
    while len(kept) > MAX_KEPT:
        del kept[next(iter(kept))]


def _connectable(policy: Policy, explore: bool) -> Policy:
    """A policy under which user data may flow. One that pins neither release nor operator says nothing about who
    would read it; `explore` allows that for looking, and asks for the channel proof all the same."""
    if explore:
        if isinstance(policy.channel.proof, Skip):
            policy = replace(policy, channel=ChannelPolicy("exporter", policy.channel.fresh_gpu))
        return policy
    pins = (policy.release, policy.deployment)
    unpinned = all if policy.development else any
    if unpinned(isinstance(p, Skip) for p in pins):
        raise PolicyError(
            "POLICY_PLATFORM",
            f"policy {policy.name} does not say whose service this must be: nothing is sent under it",
            expected="pinned release signers and operator keys",
            hint="give --policy FILE with [release] and [deployment]",
        )
    return policy


def read_policy(path: Path | str) -> Policy:
    """The policy in a file. Raises `PolicyError`, or `InputError` when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError("INPUT_FILE", f"cannot read the policy {path}: {err}") from err
    if text.lstrip().startswith("{") and MARK in text:  # no TOML begins so
        raise PolicyError(
            "POLICY_FIRST_USE",
            "a record of first use is no policy: it says whom you met, not whom you meant",
            actual=str(path),
            hint="write a policy that pins the operator's key in [deployment]",
        )
    return Policy.parse(text)
