"""A genuine enclave's evidence, made in process by the development TEE, and every way to tell exactly one lie.

    honest = genuine()
    result = honest.verify()                                  # accepted
    refused = genuine(name="other.test").verify()             # LEAF_NAME
    proof = honest.channel(nonce=NONCE, exporter=EXPORTER)    # a ChannelProof that is accepted

Everything is signed as well as the truth would be: keys are made at run time, one set per test run. A `Story` says what
happens on the machine; its fields have honest defaults, and `genuine(field=…)` changes one. Fields named `…_edit` are
functions over the honest value.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final, Literal, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from attestation import binding
from attestation.bundle import Bundle
from attestation.channel import ChannelProof
from attestation.claims import Claims, GpuNonce, GpuStateClaim, ModelClaim
from attestation.deployment import (
    DEPLOYMENT_PAYLOAD_TYPE,
    STATUS_PAYLOAD_TYPE,
    new_statement,
    new_status_list,
    salted,
)
from attestation.dsse import public_bytes, sign
from attestation.endorsements import Endorsements
from attestation.evidence import Evidence
from attestation.gpu import encode as encode_gpu
from attestation.gpu import from_nvidia_json
from attestation.keyset import keyset_digest, keyset_document
from attestation.policy import Policy
from attestation.ratls import build_leaf
from attestation.reference_values import RELEASE_PAYLOAD_TYPE, new_manifest
from attestation.result import AttestationResult
from attestation.strict_json import jcs
from attestation.tdx import append_records, rtmr3_items
from attestation.verifier import verify, verify_channel
from tests.devtee import gpu as devgpu
from tests.devtee.eventlog import ccel_log
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec
from tests.devtee.pki import Pki
from tests.devtee.rim import RimSpec
from tests.devtee.tdx import CollateralSpec, QuoteForm
from tests.devtee.tee import DevTee
from tests.pinned import (
    MACHINE_GPUS,
    Drop,
    any_reason,
    leaf_key,
    machine,
    operator_key,
    policy_text,
    receipt_key,
    signer_key,
)

__all__ = [
    "CONFIG", "EXPORTER", "MODEL", "NAME", "NONCE", "NOW", "SALT", "Drop", "Genuine", "Shown", "Story", "any_reason",
    "genuine", "gpu_serial", "leaf_key", "machine", "operator_key", "policy_text", "receipt_key", "signer_key",
]  # fmt: skip

NOW: Final = 1_795_000_000
"""2026-11-18. The honest machine's time."""
NAME: Final = "demo.vouchsafe.test"
NONCE: Final = hashlib.sha256(b"the client's nonce").digest()
EXPORTER: Final = hashlib.sha256(b"this connection's exporter").digest()
CONFIG: Final = hashlib.sha256(b"the measured configuration").digest()
SALT: Final = hashlib.sha256(b"the statement's salt").digest()
MODEL: Final = ModelClaim("parrot", "sha256:" + hashlib.sha256(b"the weights").hexdigest())
DRAIN: Final = 600
EVENT_TAG: Final = 6


def gpu_serial(pki: Pki, index: int) -> bytes:
    """Identity serial of one GPU, as statements list it."""
    serial = pki[f"device-ik-{index}"].cert.serial_number
    return serial.to_bytes((serial.bit_length() + 7) // 8 or 1, "big")


_MADE: dict[str, dict[str, bytes]] = {}


def _once(key: object, make: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """Endorsements are signed once per run and spec: XML signatures are slow."""
    name = repr(key)
    if name not in _MADE:
        _MADE[name] = make()
    return dict(_MADE[name])


@cache
def _gpu_evidence(number: int, nonce: bytes, indices: tuple[int, ...]) -> bytes:
    return encode_gpu(from_nvidia_json(DevTee(machine(number)).gpu_evidence(nonce, indices), []))


@dataclass(frozen=True)
class Shown:
    """What `build_leaf` reads of claims, with the two halves told apart: X.509 from *outside*, bytes from *inside*."""

    outside: Claims
    inside: bytes

    @property
    def dns_names(self) -> tuple[str, ...]:
        return self.outside.dns_names

    @property
    def not_before(self) -> int:
        return self.outside.not_before

    @property
    def not_after(self) -> int:
        return self.outside.not_after

    def encode(self) -> bytes:
        return self.inside


def _same(value: Any) -> Any:  # Any: whatever the field holds
    return value


@dataclass(frozen=True)
class Story:
    """What happens on the machine, honest unless a field says otherwise.

    The machine      machine, machine_edit (the DevTee before the boot), td (fields of the TD as the quote shows it),
                     quote_form, collateral, rims, ocsp, gpus (indices), gpu_form
    The boot         items_edit (RTMR3 items as measured), log_items_edit (as logged), extra_after_seal,
                     event_log_edit (the log as served)
    The certificate  key (of enclave and claims), certificate_key (another one in the leaf), names, leaf_edit, lifetime,
                     issued_at; certificate_edit (claims whose names and times stand in X.509 instead)
    The claims       claims_edit; claims_bytes_edit (as carried and quoted); quoted_edit (what the quote covers instead)
    GPU evidence     gpu_machine (whose devices answer), gpu_nonce_edit, gpu_key (whose nonce), gpu_edit (as carried),
                     gpu_issued_at, state (fields of the claim)
    What people sign manifest, manifest_keys, manifest_type, release_edit (the envelope); so for statement and status
    The keyset       keyset (fields of the document)
    The client       policy (dotted field → value, Drop, any_reason()), now, name
    """

    machine: int = 0
    machine_edit: Callable[[DevTee], None] = _same
    td: Mapping[str, Any] = field(default_factory=dict)
    quote_form: QuoteForm | None = None
    collateral: CollateralSpec = field(default_factory=CollateralSpec)
    rims: RimSpec = field(default_factory=RimSpec)
    ocsp: OcspSpec = field(default_factory=OcspSpec)
    gpus: tuple[int, ...] = (0,)
    gpu_form: GpuForm | None = None
    items_edit: Callable[[list[bytes]], list[bytes]] = _same
    log_items_edit: Callable[[list[bytes]], list[bytes]] = _same
    extra_after_seal: Sequence[bytes] = ()
    event_log_edit: Callable[[bytes], bytes] = _same
    key: int = 0
    certificate_key: int | None = None
    names: tuple[str, ...] = (NAME,)
    models: tuple[ModelClaim, ...] = (MODEL,)
    config: bytes = CONFIG
    leaf_edit: Callable[[bytes], bytes] = _same
    lifetime: int = 3600
    issued_at: int = NOW
    certificate_edit: Callable[[Claims], Claims] = _same
    claims_edit: Callable[[Claims], Claims] = _same
    claims_bytes_edit: Callable[[bytes], bytes] = _same
    quoted_edit: Callable[[Claims], Claims] = _same
    report_data_edit: Callable[[bytes], bytes] = _same
    gpu_machine: int | None = None
    gpu_key: int | None = None
    gpu_nonce_edit: Callable[[bytes], bytes] = _same
    gpu_edit: Callable[[bytes], bytes | None] = _same
    gpu_issued_at: int | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    manifest_keys: tuple[int, ...] = (0,)
    manifest_type: str = RELEASE_PAYLOAD_TYPE
    release_edit: Callable[[bytes], bytes] = _same
    statement: Mapping[str, Any] | None = field(default_factory=dict)
    statement_keys: tuple[int, ...] = (0,)
    statement_type: str = DEPLOYMENT_PAYLOAD_TYPE
    deployment_edit: Callable[[bytes], bytes] = _same
    status: Mapping[str, Any] | None = field(default_factory=dict)
    status_keys: tuple[int, ...] = (0,)
    status_release_keys: tuple[int, ...] = ()
    status_type: str = STATUS_PAYLOAD_TYPE
    status_edit: Callable[[bytes], bytes] = _same
    keyset: Mapping[str, Any] = field(default_factory=dict)
    keyset_edit: Callable[[bytes], bytes] = _same
    policy: Mapping[str, Any] = field(default_factory=dict)
    now: int = NOW + 60
    name: str | None = NAME

    def tell(self) -> Genuine:
        tee = DevTee(machine(self.machine))
        self.machine_edit(tee)
        key = leaf_key(self.key)
        spki = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        release, manifest_digest = self._manifest(tee)
        deployment, statement_digest = self._statement(tee, manifest_digest)
        keyset = self._keyset(spki)
        event_log = self._boot(tee, manifest_digest)
        carried, nonce = self._gpu(spki)
        claims = self.claims_edit(
            Claims(
                key_hash=binding.key_hash(spki),
                not_before=self.issued_at,
                not_after=self.issued_at + self.lifetime,
                dns_names=self.names,
                boot_id=hashlib.sha256(b"boot").digest()[:16],
                release=manifest_digest,
                deployment=statement_digest,
                config=self.config,
                event_log=hashlib.sha384(event_log).digest(),
                gpu=None if carried is None else binding.gpu_digest(carried),
                gpu_nonce=nonce,
                gpu_state=self._state(),
                keyset=bytes.fromhex(keyset_digest(keyset).removeprefix("sha256:")),
                role="both",
                models=self.models,
            )
        )
        inside = self.claims_bytes_edit(claims.encode())
        told = inside if self.quoted_edit is _same else self.quoted_edit(claims).encode()
        covered = self.report_data_edit(binding.report_data(told))
        quote = tee.quote(covered, td=tee.changed(**self.td), form=self.quote_form)
        leaf = build_leaf(
            key if self.certificate_key is None else leaf_key(self.certificate_key),
            cast(Claims, Shown(self.certificate_edit(claims), inside)),
            quote,
            None if carried is None else self.gpu_edit(carried),
        )
        evidence = Evidence(
            leaf=self.leaf_edit(leaf),
            keyset=self.keyset_edit(keyset),
            event_log=self.event_log_edit(event_log),
            release=self.release_edit(release),
            deployment=self.deployment_edit(deployment),
            status=self.status_edit(self._status()),
        )
        text = policy_text(tee, self.policy, gpus=len(self.gpus))
        return Genuine(
            evidence=evidence,
            endorsements=self._endorsements(tee),
            policy=Policy.parse(text),
            policy_text=text,
            now=self.now,
            name=self.name,
            claims=claims,
            story=self,
            tee=tee,
            key=key,
            spki=spki,
        )

    def _endorsements(self, tee: DevTee) -> Endorsements:
        rims, answers = dict[str, bytes](), dict[str, bytes]()
        if self.gpus:
            known, count = DevTee(machine(self.machine)), max(self.gpus) + 1
            rims = _once((self.machine, self.rims), lambda: known.rims(self.rims))
            answers = _once(
                (self.machine, self.issued_at, count, self.ocsp),
                lambda: known.ocsp(self.issued_at, gpus=count, spec=self.ocsp),
            )
        return Endorsements(tee.collateral(self.issued_at, self.collateral), rims, answers)

    def _manifest(self, tee: DevTee) -> tuple[bytes, bytes]:
        fields: dict[str, Any] = {
            "name": "vouchsafe-cvm",
            "version": "2026.11.2",
            "source_commit": "0" * 40,
            "subjects": [("cvm.efi", hashlib.sha256(b"the image").digest())],
            "mrtd": tee.td.mrtd,
            "rtmrs": [[tee.td.rtmr[0]], [tee.td.rtmr[1]], [tee.td.rtmr[2]]],
            "td_attributes": [0x10000000],
            "xfam": [tee.td.xfam],
            "mrseam": [tee.td.mrseam],
            "drivers": [devgpu.DRIVER],
            "vbios": [devgpu.VBIOS],
            "weights": [(MODEL.id, MODEL.weights, None)],
            "not_before": datetime.fromtimestamp(self.issued_at - 86400, UTC),
            "max_age_days": 90,
        }
        payload = new_manifest(**{**fields, **self.manifest})
        keys = [signer_key(n) for n in self.manifest_keys]
        return sign(self.manifest_type, payload, keys), hashlib.sha256(payload).digest()

    def _statement(self, tee: DevTee, release: bytes) -> tuple[bytes, bytes | None]:
        if self.statement is None:
            return b"", None
        fields: dict[str, Any] = {
            "operator": "Example Operator",
            "serial": 7,
            "not_before": self.issued_at - 3600,
            "not_after": self.issued_at + 6 * 86400,
            "dns_names": [NAME, "spare.vouchsafe.test"],
            "roles": ["both"],
            "configs": [CONFIG],
            "releases": [release],
            "salt": SALT,
            "platforms": [("piid", tee.pki.facts.piid)],
            "gpus": [gpu_serial(tee.pki, n) for n in range(MACHINE_GPUS)] if self.gpus else None,
        }
        payload = new_statement(**{**fields, **self.statement})
        keys = [operator_key(n) for n in self.statement_keys]
        return sign(self.statement_type, payload, keys), hashlib.sha256(payload).digest()

    def _status(self) -> bytes:
        if self.status is None:
            return b""
        fields: dict[str, Any] = {
            "serial": 3,
            "issued_at": self.issued_at - 600,
            "next_update": self.issued_at + 3000,
            "platforms": [salted(SALT, b"another platform")],
        }
        payload = new_status_list(**{**fields, **self.status})
        keys = [operator_key(n) for n in self.status_keys] + [signer_key(n) for n in self.status_release_keys]
        return sign(self.status_type, payload, keys)

    def _keyset(self, spki: bytes) -> bytes:
        fields: dict[str, Any] = {
            "subject": None,
            "not_after": self.issued_at + self.lifetime + DRAIN,
            "receipt_key_id": "receipt-1",
            "receipt_public": public_bytes(receipt_key()),
            "spki_sha256": hashlib.sha256(spki).digest(),
            "domain": self.names[0],
        }
        return jcs(keyset_document(**{**fields, **self.keyset}))

    def _boot(self, tee: DevTee, release: bytes) -> bytes:
        """Measure the items into RTMR3; the log as the claims' digest covers it."""
        items = rtmr3_items(release, self.config, [(m.id, m.weights) for m in self.models])
        for item in [*self.items_edit(items), *self.extra_after_seal]:
            tee.extend(3, hashlib.sha384(item).digest())
        records = [(4, EVENT_TAG, hashlib.sha384(item).digest(), item) for item in self.log_items_edit(items)]
        return append_records(ccel_log(tee.events), records)

    def _gpu(self, spki: bytes) -> tuple[bytes | None, GpuNonce | None]:
        if not self.gpus:
            return None, None
        nonce = GpuNonce(self.issued_at - 5 if self.gpu_issued_at is None else self.gpu_issued_at, SALT)
        if self.gpu_key is not None:
            spki = (
                leaf_key(self.gpu_key)
                .public_key()
                .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            )
        wire = self.gpu_nonce_edit(binding.gpu_nonce(binding.key_hash(spki), nonce.issued_at, nonce.salt))
        number = self.machine if self.gpu_machine is None else self.gpu_machine
        if self.gpu_form is None:
            return _gpu_evidence(number, wire, self.gpus), nonce
        shown = DevTee(machine(number)).gpu_evidence(wire, self.gpus, self.gpu_form)
        return encode_gpu(from_nvidia_json(shown, [])), nonce

    def _state(self) -> GpuStateClaim | None:
        if not self.gpus:
            return None
        honest = GpuStateClaim(
            count=len(self.gpus), switches=0, mode="spt", cc=True, dev_tools=False, ready=True, production=True
        )
        return dataclasses.replace(honest, **self.state)


@dataclass(frozen=True)
class Genuine:
    """One enclave's evidence, what a client brings to it, and what is behind it (claims, tee, key)."""

    evidence: Evidence
    endorsements: Endorsements
    policy: Policy
    policy_text: str
    now: int
    name: str | None
    claims: Claims
    story: Story
    tee: DevTee
    key: ec.EllipticCurvePrivateKey
    spki: bytes

    def verify(self, **changes: Any) -> AttestationResult:
        """`verify` of this evidence; *changes* replace arguments, or members of the evidence by name."""
        members = {f.name for f in dataclasses.fields(Evidence)}
        evidence = dataclasses.replace(self.evidence, **{k: v for k, v in changes.items() if k in members})
        given: dict[str, Any] = {"now": self.now, "name": self.name}
        given |= {k: v for k, v in changes.items() if k in ("now", "name", "crl_floor", "serial_floor", "at_url")}
        return verify(
            evidence, changes.get("endorsements", self.endorsements), changes.get("policy", self.policy), **given
        )

    def bundle(self) -> bytes:
        return Bundle(self.evidence, self.endorsements).encode()

    def channel(
        self,
        *,
        nonce: bytes = NONCE,
        exporter: bytes | None = EXPORTER,
        binding_: Literal["exporter", "key"] = "exporter",
        others: int = 0,
        place: int = 0,
        gpu: bool = False,
        tee: DevTee | None = None,
        td: Mapping[str, Any] | None = None,
        gpu_indices: tuple[int, ...] | None = None,
        gpu_exporter: bytes | None = None,
        signed_nonce: bytes | None = None,
        signed_exporter: bytes | None = None,
        k: bytes | None = None,
        claims: bytes | None = None,
    ) -> ChannelProof:
        """A proof for a connection with *exporter*, as client and enclave would have it together.

        others, place   leaves of other connections under the same quote, and this one's place among them
        tee, td         another machine, or other values of the TD, that signs
        signed_nonce, signed_exporter, k, claims, gpu_exporter   what the enclave uses instead of the truth
        """
        exporter = None if binding_ == "key" else exporter
        k = binding.key_hash(self.spki) if k is None else k
        used = exporter if signed_exporter is None else signed_exporter
        carried = None
        if gpu:
            wire = binding.connection_gpu_nonce(k, gpu_exporter or used or bytes(32), signed_nonce or nonce)
            carried = _gpu_evidence(self.story.machine, wire, gpu_indices or self.story.gpus)
        leaf = binding.connection_leaf(
            k,
            used,
            signed_nonce or nonce,
            claims or self.claims.encode(),
            None if carried is None else binding.gpu_digest(carried),
            binding_,
        )
        leaves = [hashlib.sha512(b"another connection %d" % n).digest() for n in range(others)]
        leaves.insert(place, leaf)
        root, paths = binding.merkle_paths(leaves)
        signer = tee or self.tee
        quote = signer.quote(root, td=signer.changed(**(td or self.story.td)))
        return ChannelProof(nonce, exporter, quote, tuple(paths[place]), carried, binding_)

    def verify_channel(self, proof: ChannelProof, **changes: Any) -> AttestationResult:
        """Both steps for this evidence: `verify`, then `verify_channel` of *proof*."""
        first = changes.pop("first", None) or self.verify()
        return verify_channel(
            first,
            changes.pop("evidence", self.evidence),
            changes.pop("endorsements", self.endorsements),
            changes.pop("policy", self.policy),
            proof,
            now=changes.pop("now", self.now),
            **{"group": "X25519MLKEM768", **changes},
        )


def genuine(**changes: Any) -> Genuine:
    """The honest story with *changes* (fields of `Story`), told."""
    return Story(**changes).tell()
