"""Every lie that a machine, a host or a stranger can tell about an enclave, and what exactly the verifier says to it.

One row: name, fields of `tests.genuine.Story`, and all codes of the refusal, in order. Each row is one lie away from
the honest story; where one lie shows in two places, both codes stand there.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from attestation.claims import Claims, GpuNonce, ModelClaim
from attestation.deployment import salted
from attestation.dsse import public_bytes, sign
from attestation.keyset import keyset_digest
from attestation.strict_json import jcs
from tests.devtee.eventlog import boot_events
from tests.devtee.gpu import GpuForm
from tests.devtee.ocsp import OcspSpec
from tests.devtee.rim import RimSpec
from tests.devtee.tdx import CollateralSpec, QuoteForm
from tests.devtee.tee import DevTee
from tests.genuine import (
    CONFIG,
    MODEL,
    NAME,
    NOW,
    SALT,
    Story,
    any_reason,
    genuine,
    gpu_serial,
    machine,
    operator_key,
    signer_key,
)

__all__ = ["LIES", "Lie"]

Lie = tuple[dict[str, Any], tuple[str, ...]]


def claims(**fields: Any) -> Callable[[Claims], Claims]:
    return lambda honest: dataclasses.replace(honest, **fields)


def member(**changes: Any) -> Callable[[bytes], bytes]:
    """Edit members of a DSSE envelope."""
    return lambda raw: json.dumps(json.loads(raw) | changes).encode()


def flip(at: int, bits: int = 1) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        changed = bytearray(raw)
        changed[at] ^= bits
        return bytes(changed)

    return edit


def payload_edit(edit: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Edit the payload inside an envelope: the signature stays that of the old one."""

    def change(raw: bytes) -> bytes:
        top = json.loads(raw)
        return json.dumps(top | {"payload": base64.b64encode(edit(base64.b64decode(top["payload"]))).decode()}).encode()

    return change


def resealed(payload: Callable[[bytes], bytes], key: Any) -> Callable[[bytes], bytes]:
    """Edit the payload and have *key* sign it: a document that is genuine and cannot be read."""

    def change(raw: bytes) -> bytes:
        top = json.loads(raw)
        return sign(top["payloadType"], payload(base64.b64decode(top["payload"])), [key])

    return change


def other_kernel(tee: DevTee) -> None:
    tee.events = list(boot_events(kernel="another kernel"))
    tee.td = DevTee(tee.pki, tee.events).td


def twice_signed(raw: bytes) -> bytes:
    """One operator's signature three times, under three key ids."""
    signature = json.loads(raw)["signatures"][0]
    ids = [hashlib.sha256(public_bytes(operator_key(n))).hexdigest() for n in range(3)]
    return member(signatures=[signature | {"keyid": i} for i in ids])(raw)


def foreign_keyset(raw: bytes) -> bytes:
    """The keyset of another certificate: other TLS key, same receipt key."""
    doc = json.loads(raw)
    return jcs(doc | {"tls_public_keys": [{"spki_sha256": "0a" * 32, "domain": NAME}]})


def second_tls_key(raw: bytes) -> bytes:
    doc = json.loads(raw)
    return jcs(doc | {"tls_public_keys": [*doc["tls_public_keys"], {"spki_sha256": "0a" * 32}]})


def naming(edit: Callable[[bytes], bytes]) -> dict[str, Any]:
    """Serve an edited keyset that the claims name."""

    def told(honest: Claims) -> Claims:
        raw = edit(genuine().evidence.keyset)
        return dataclasses.replace(honest, keyset=bytes.fromhex(keyset_digest(raw).removeprefix("sha256:")))

    return {"keyset_edit": edit, "claims_edit": told}


def _honest(what: str) -> Any:
    """A digest that honest documents name."""
    c = genuine().claims
    return {"release": c.release, "config": c.config, "statement": c.deployment}[what]


OTHER_MODEL: Final = ModelClaim("parrot", "sha256:" + "0d" * 32)
OLD: Final = "535.86.10"
AWAY: Final = hashlib.sha256(b"somewhere else").digest()


def _leaf() -> Mapping[str, Lie]:
    return {
        "the certificate has ended": ({"now": NOW + 3600}, ("LEAF_EXPIRED", "STATUS_EXPIRED")),
        "the certificate is not valid yet": ({"now": NOW - 1}, ("LEAF_EXPIRED",)),
        "another name was dialled": ({"name": "other.test"}, ("LEAF_NAME",)),
        "the name in capitals": ({"name": NAME.upper()}, ("LEAF_NAME",)),
        "the name with a dot behind": ({"name": NAME + "."}, ("LEAF_NAME",)),
        "a parent of the name": ({"name": "vouchsafe.test"}, ("LEAF_NAME",)),
        "the empty name": ({"name": ""}, ("LEAF_NAME",)),
        "an address": ({"name": "127.0.0.1"}, ("LEAF_NAME",)),
        "no leaf": ({"leaf_edit": lambda der: b""}, ("FORMAT_LEAF",)),
        "half a leaf": ({"leaf_edit": lambda der: der[: len(der) // 2]}, ("FORMAT_LEAF",)),
        "a leaf with a byte behind": ({"leaf_edit": lambda der: der + b"\0"}, ("FORMAT_LEAF",)),
        "the evidence in another key's certificate": (
            {"certificate_key": 1}, ("CLAIMS_KEY", "GPU_NONCE", "KEYSET_KEY"),
        ),
        "claims and certificate differ in the end": (
            {"certificate_edit": claims(not_after=NOW + 3599)}, ("CLAIMS_TIMES",),
        ),
        "claims and certificate differ in the beginning": (
            {"certificate_edit": claims(not_before=NOW + 1)}, ("CLAIMS_TIMES",),
        ),
        "the certificate has a name more": (
            {"certificate_edit": claims(dns_names=(NAME, "spare.vouchsafe.test"))}, ("CLAIMS_NAMES",),
        ),
        "the name dialled stands in the certificate alone": (
            {"certificate_edit": claims(dns_names=("bank.test",)), "name": "bank.test"}, ("CLAIMS_NAMES", "LEAF_NAME"),
        ),
        "claims that are no claims": ({"claims_bytes_edit": lambda raw: b"\xa0"}, ("FORMAT_CLAIMS",)),
        "claims in another encoding": (
            {"claims_bytes_edit": lambda raw: b"\xb8" + bytes([raw[0] & 31]) + raw[1:]}, ("FORMAT_CBOR",),
        ),
        "claims name another key": ({"claims_edit": claims(key_hash=b"k" * 48)}, ("CLAIMS_KEY",)),
    }  # fmt: skip


def _quote() -> Mapping[str, Lie]:
    return {
        "the quote covers other claims": ({"quoted_edit": claims(boot_id=bytes(16))}, ("TDX_REPORT_DATA",)),
        "the quote covers another configuration": ({"quoted_edit": claims(config=AWAY)}, ("TDX_REPORT_DATA",)),
        "report data with a tail": ({"report_data_edit": lambda d: d[:32] + b"\0" * 31 + b"\1"}, ("TDX_REPORT_DATA",)),
        "report data of zeros": ({"report_data_edit": lambda d: bytes(64)}, ("TDX_REPORT_DATA",)),
        "a debug TD": (
            {"td": {"td_attributes": 0x10000001}}, ("TDX_ATTRIBUTES", "RELEASE_VALUE"),
        ),
        "a TD module of somebody's own": ({"td": {"mrsignerseam": b"s" * 48}}, ("TDX_MODULE", "TDX_MRSIGNERSEAM")),
        "another TDX module": ({"td": {"mrseam": b"s" * 48}}, ("TDX_MRSEAM", "RELEASE_VALUE")),
        "another XFAM": ({"td": {"xfam": 0x600E3}}, ("TDX_XFAM", "RELEASE_VALUE")),
        "an owner": ({"td": {"mrowner": b"o" * 48}}, ("TDX_MROWNER",)),
        "a configuration id": ({"td": {"mrconfigid": b"o" * 48}}, ("TDX_MRCONFIGID",)),
        "another firmware": ({"td": {"mrtd": b"m" * 48}}, ("TDX_MRTD",)),
        "another kernel, honestly logged": (
            {"machine_edit": other_kernel, "manifest": {"rtmrs": [[r] for r in DevTee(machine()).td.rtmr[:3]]}},
            ("TDX_RTMR1", "TDX_RTMR2"),
        ),
        "the platform is out of date": (
            {"collateral": CollateralSpec(tcb_status="OutOfDate")}, ("TDX_TCB_STATUS",),
        ),
        "an advisory": ({"collateral": CollateralSpec(advisories=("INTEL-SA-00837",))}, ("TDX_ADVISORY",)),
        "the platform is revoked": (
            {"collateral": CollateralSpec(revoked=frozenset({"intel-pck"}))}, ("TDX_REVOKED",),
        ),
        "collateral of an older evaluation": ({"collateral": CollateralSpec(evaluation=19)}, ("TDX_TCB_EVALUATION",)),
        "collateral two months old": (
            {"collateral": CollateralSpec(age=60 * 86400, lifetime=90 * 86400)}, ("TDX_COLLATERAL_AGE",),
        ),
        "padding behind the quote": (
            {"quote_form": QuoteForm(padding=8)}, ("FORMAT_TDX_LENGTH",),
        ),
    }  # fmt: skip


def _release() -> Mapping[str, Lie]:
    names_none = ("EVIDENCE_DIGEST",)
    return {
        "no release manifest": ({"release_edit": lambda raw: b""}, names_none),
        "no envelope": ({"release_edit": lambda raw: b"{}"}, ("FORMAT_DSSE",)),
        "half an envelope": ({"release_edit": lambda raw: raw[: len(raw) // 2]}, ("FORMAT_DSSE",)),
        "a manifest of another type": ({"manifest_type": "application/json"}, ("STATEMENT_TYPE",)),
        "the manifest's type changed afterwards": (
            {"release_edit": member(payloadType="text/plain")}, ("STATEMENT_TYPE",),
        ),
        "a manifest that nobody pinned signed": ({"manifest_keys": (9,)}, ("RELEASE_SIGNERS",)),
        "a manifest that nobody signed": ({"manifest_keys": ()}, ("RELEASE_SIGNERS",)),
        "one release signer of two": ({"policy": {"release.threshold": 2}}, ("RELEASE_SIGNERS",)),
        "an edited manifest": (
            {"release_edit": payload_edit(lambda p: p.replace(b"2026.11.2", b"2026.11.3"))},
            ("EVIDENCE_DIGEST", "RELEASE_SIGNERS"),
        ),
        "a hostile manifest, unsigned": (
            {"release_edit": payload_edit(lambda p: b'{"weights": [{"fileListDigest": []}]}')},
            ("EVIDENCE_DIGEST", "RELEASE_SIGNERS"),
        ),
        "a genuine manifest that is not the one claimed": (
            {"release_edit": lambda raw: genuine(manifest={"version": "2025.1"}).evidence.release}, names_none,
        ),
        "a signed manifest that cannot be read": (
            {"release_edit": resealed(lambda p: p + b" x", signer_key()),
             "claims_edit": lambda c: dataclasses.replace(c, release=_with_tail(genuine().evidence.release))},
            ("FORMAT_RELEASE", "TDX_RTMR3", "DEPLOYMENT_RELEASE"),
        ),
        "the manifest has ended": ({"manifest": {"max_age_days": 1}}, ("RELEASE_DATES",)),
        "other weights": (
            {"models": (OTHER_MODEL,)}, ("RELEASE_MODELS",),
        ),
        "a model that the release does not name": (
            {"models": (ModelClaim("crow", MODEL.weights),)}, ("RELEASE_MODELS",),
        ),
        "a second, unknown model": (
            {"models": (MODEL, ModelClaim("crow", MODEL.weights))}, ("RELEASE_MODELS",),
        ),
        "a release for other attributes": (
            {"manifest": {"td_attributes": [0x10000000 | 1 << 30]}}, ("RELEASE_VALUE",),
        ),
        "a release for another module": ({"manifest": {"mrseam": [b"s" * 48]}}, ("RELEASE_VALUE",)),
        "a release for another driver": ({"manifest": {"drivers": ["570.1"]}}, ("RELEASE_VALUE",)),
        "a release for another VBIOS": ({"manifest": {"vbios": ["96"]}}, ("RELEASE_VALUE",)),
        "a release that allows no driver": ({"manifest": {"drivers": []}}, ("RELEASE_VALUE",)),
    }  # fmt: skip


def _boot() -> Mapping[str, Lie]:
    item = b'{"item":"extra"}'
    return {
        "no event log": ({"event_log_edit": lambda log: b""}, ("EVIDENCE_DIGEST",)),
        "the log is cut": ({"event_log_edit": lambda log: log[:-40]}, ("EVIDENCE_DIGEST",)),
        "another log": ({"event_log_edit": flip(-1)}, ("EVIDENCE_DIGEST",)),
        "an event after the seal": ({"extra_after_seal": [item]}, ("TDX_EVENT_LOG", "TDX_RTMR3")),
        "an event after the seal, logged": (
            {"extra_after_seal": [item], "log_items_edit": lambda items: [*items, item]}, ("TDX_RTMR3",),
        ),
        "no seal": (
            {"items_edit": lambda i: i[:-1], "log_items_edit": lambda i: i[:-1]}, ("TDX_RTMR3",),
        ),
        "no weights measured": (
            {"items_edit": lambda i: [*i[:2], i[3]], "log_items_edit": lambda i: [*i[:2], i[3]]}, ("TDX_RTMR3",),
        ),
        "another order": (
            {"items_edit": lambda i: [i[1], i[0], *i[2:]], "log_items_edit": lambda i: [i[1], i[0], *i[2:]]},
            ("TDX_RTMR3",),
        ),
        "measured but not logged": ({"log_items_edit": lambda i: i[:-1]}, ("TDX_EVENT_LOG", "TDX_RTMR3")),
        "logged but not measured": ({"items_edit": lambda i: i[:-1]}, ("TDX_EVENT_LOG", "TDX_RTMR3")),
        "claims name another configuration than was measured": (
            {"claims_edit": claims(config=AWAY)}, ("TDX_RTMR3", "DEPLOYMENT_CONFIG"),
        ),
        "claims name other weights than were measured": (
            {"claims_edit": claims(models=(OTHER_MODEL,))}, ("RELEASE_MODELS", "TDX_RTMR3"),
        ),
    }  # fmt: skip


def _gpu() -> Mapping[str, Lie]:
    bare: dict[str, Any] = {"gpu": None, "gpu_nonce": None, "gpu_state": None}
    return {
        "no GPU evidence where a GPU is wanted": (
            {"gpus": (), "policy": {"gpu": GPU_SECTION}}, ("GPU_ABSENT",),
        ),
        "GPU evidence that the claims do not name": (
            {"claims_edit": claims(**bare)}, ("GPU_ABSENT",),
        ),
        "GPU evidence left out of the certificate": ({"gpu_edit": lambda carried: None}, ("GPU_ABSENT",)),
        "other GPU evidence than the claims name": (
            {"gpu_edit": flip(10)}, ("GPU_DIGEST",),
        ),
        "GPU evidence of another machine": (
            {"gpu_machine": 1}, ("GPU_CHAIN_ISSUER", "GPU_OCSP_MISSING"),
        ),
        "GPU evidence borrowed from another certificate": ({"gpu_key": 1}, ("GPU_NONCE",)),
        "GPU evidence for another salt": (
            {"claims_edit": claims(gpu_nonce=GpuNonce(NOW - 5, AWAY))}, ("GPU_NONCE",),
        ),
        "GPU evidence for another moment": (
            {"claims_edit": claims(gpu_nonce=GpuNonce(NOW - 6, SALT))}, ("GPU_NONCE",),
        ),
        "GPU evidence eleven minutes older than the certificate": ({"gpu_issued_at": NOW - 601}, ("GPU_NONCE_AGE",)),
        "GPU evidence from after the certificate": ({"gpu_issued_at": NOW + 1}, ("GPU_NONCE_AGE",)),
        "the driver counts two GPUs": ({"state": {"count": 2}}, ("GPU_STATE",)),
        "the driver counts a switch": ({"state": {"switches": 1}}, ("GPU_STATE",)),
        "the driver tells another mode": ({"state": {"mode": "ppcie"}}, ("GPU_STATE",)),
        "confidential computing is off": ({"state": {"cc": False}}, ("GPU_NOT_CONFIDENTIAL",)),
        "developer tools are on": ({"state": {"dev_tools": True}}, ("GPU_NOT_CONFIDENTIAL",)),
        "the GPU is not ready": ({"state": {"ready": False}}, ("GPU_NOT_CONFIDENTIAL",)),
        "the GPU is no production part": ({"state": {"production": False}}, ("GPU_NOT_CONFIDENTIAL",)),
        "two GPUs where one is wanted": (
            {"gpus": (0, 1), "policy": {"gpu.count": 1}}, ("GPU_COUNT",),
        ),
        "one GPU shown twice": ({"gpus": (0, 0)}, ("GPU_DUPLICATE",)),
        "a tampered measurement": ({"gpu_form": GpuForm(measurements={3: b"x" * 48})}, ("GPU_RIM_MISMATCH",)),
        "signed by another GPU's key": (
            {"gpu_form": GpuForm(signer=1)}, ("GPU_SIGNATURE",),
        ),
        "a revoked GPU": ({"ocsp": OcspSpec(revoked=frozenset({"device-ik-0"}))}, ("GPU_OCSP_REVOKED",)),
        "yesterday's revocation answers": ({"ocsp": OcspSpec(age=90_000)}, ("GPU_OCSP_WINDOW",)),
        "an old driver, its RIM at hand": (
            {"gpu_form": GpuForm(driver=OLD), "rims": RimSpec(form=GpuForm(driver=OLD), driver=OLD)},
            ("GPU_DRIVER",),
        ),
        "no RIM for the driver": (
            {"gpu_form": GpuForm(driver=OLD)}, ("GPU_RIM_MISSING", "GPU_DRIVER"),
        ),
    }  # fmt: skip


GPU_SECTION: Final[dict[str, Any]] = {
    "count": 1, "switches": 0, "mode": "spt", "drivers": ["550.90.07"], "vbios": ["96.00.9F.00.01"],
    "hwmodels": {"any": "the manifest's RIMs name the chip"}, "require": ["all"],
}  # fmt: skip


def _deployment() -> Mapping[str, Lie]:
    return {
        "no deployment statement": (
            {"statement": None}, ("DEPLOYMENT_ABSENT",),
        ),
        "the statement is withheld": ({"deployment_edit": lambda raw: b""}, ("DEPLOYMENT_ABSENT",)),
        "the statement is not claimed": (
            {"claims_edit": claims(deployment=None)}, ("DEPLOYMENT_ABSENT",),
        ),
        "a statement by somebody else": ({"statement_keys": (9,)}, ("DEPLOYMENT_OPERATOR",)),
        "a statement that nobody signed": ({"statement_keys": ()}, ("DEPLOYMENT_OPERATOR",)),
        "one operator key of two": (
            {"policy": {"deployment.threshold": 2}, "status_keys": (0, 1)}, ("DEPLOYMENT_OPERATOR",),
        ),
        "one operator key, three times": (
            {"policy": {"deployment.threshold": 2}, "deployment_edit": twice_signed, "status_keys": (0, 1)},
            ("DEPLOYMENT_OPERATOR",),
        ),
        "a status list in the statement's place": (
            {"deployment_edit": lambda raw: genuine().evidence.status}, ("STATEMENT_TYPE",),
        ),
        "a statement of another type": ({"statement_type": "application/json"}, ("STATEMENT_TYPE",)),
        "another genuine statement": (
            {"deployment_edit": lambda raw: genuine(statement={"serial": 8}).evidence.deployment},
            ("EVIDENCE_DIGEST",),
        ),
        "the statement has ended": (
            {"statement": {"not_before": NOW - 86400, "not_after": NOW + 59}}, ("DEPLOYMENT_DATES",),
        ),
        "the statement is not in force yet": (
            {"statement": {"not_before": NOW + 61, "not_after": NOW + 86400}}, ("DEPLOYMENT_DATES",),
        ),
        "an older statement than the pinned serial": ({"statement": {"serial": 4}}, ("DEPLOYMENT_SERIAL",)),
        "the statement names other hosts": ({"statement": {"dns_names": ["other.test"]}}, ("DEPLOYMENT_NAME",)),
        "a name that is not the operator's, beside his own": (
            {"names": ("bank.test", NAME)}, ("DEPLOYMENT_NAME",),
        ),
        "the statement grants another role": ({"statement": {"roles": ["gateway"]}}, ("DEPLOYMENT_ROLE",)),
        "the enclave plays another role than was wanted": (
            {"claims_edit": claims(role="model"), "statement": {"roles": ["both", "model"]}}, ("DEPLOYMENT_ROLE",),
        ),
        "another configuration": ({"config": AWAY}, ("DEPLOYMENT_CONFIG",)),
        "the operator does not run this release": ({"statement": {"releases": [AWAY]}}, ("DEPLOYMENT_RELEASE",)),
        "the same image on somebody else's machine": (
            {"statement": {"platforms": [("piid", b"i" * 16)]}}, ("DEPLOYMENT_PLATFORM",),
        ),
        "the platform's id under the wrong kind": (
            {"statement": {"platforms": [("ppid", machine().facts.piid)]}}, ("DEPLOYMENT_PLATFORM",),
        ),
        "a statement that lists no platform": ({"statement": {"platforms": []}}, ("DEPLOYMENT_PLATFORM",)),
        "the policy lists other platforms": ({"policy": {"tdx.platforms": ["0a" * 16]}}, ("TDX_PLATFORM",)),
        "the statement lists other GPUs": ({"statement": {"gpus": [b"another"]}}, ("DEPLOYMENT_GPUS",)),
        "the statement restricts GPUs and the policy asks for none": (
            {"policy": {"gpu": any_reason()}}, ("DEPLOYMENT_GPUS",),
        ),
        "one GPU of two is not the operator's": (
            {"gpus": (0, 1), "statement": {"gpus": [gpu_serial(machine(), 0)]}}, ("DEPLOYMENT_GPUS",),
        ),
        "a signed statement that cannot be read": (
            {"deployment_edit": resealed(lambda p: p + b" x", operator_key()),
             "claims_edit": lambda c: dataclasses.replace(c, deployment=_with_tail(genuine().evidence.deployment))},
            ("FORMAT_DEPLOYMENT",),
        ),
    }  # fmt: skip


def _with_tail(raw: bytes) -> bytes:
    return hashlib.sha256(base64.b64decode(json.loads(raw)["payload"]) + b" x").digest()


def _status() -> Mapping[str, Lie]:
    return {
        "no status list": ({"status": None}, ("EVIDENCE_DIGEST",)),
        "a status list by somebody else": ({"status_keys": (9,)}, ("STATUS_SIGNER",)),
        "a status list that nobody signed": ({"status_keys": ()}, ("STATUS_SIGNER",)),
        "one operator key of two signed the status list": (
            {"policy": {"deployment.threshold": 2}, "statement_keys": (0, 1)}, ("STATUS_SIGNER",),
        ),
        "a statement in the list's place": (
            {"status_edit": lambda raw: genuine().evidence.deployment}, ("STATEMENT_TYPE",),
        ),
        "a list of another type": ({"status_type": "application/json"}, ("STATEMENT_TYPE",)),
        "an edited list": (
            {"status_edit": payload_edit(lambda p: p.replace(b'"serial":3', b'"serial":4'))}, ("STATUS_SIGNER",),
        ),
        "a signed list that cannot be read": (
            {"status_edit": resealed(lambda p: p + b"x", operator_key())}, ("FORMAT_STATUS",),
        ),
        "the list has ended": ({"status": {"next_update": NOW + 59}}, ("STATUS_EXPIRED",)),
        "the list is from tomorrow": (
            {"status": {"issued_at": NOW + 61, "next_update": NOW + 3600}}, ("STATUS_EXPIRED",),
        ),
        "the release is withdrawn": ({"status": {"releases": [_honest("release")]}}, ("STATUS_DENIED",)),
        "the configuration is withdrawn": ({"status": {"configs": [CONFIG]}}, ("STATUS_DENIED",)),
        "the statement is withdrawn": ({"status": {"statements": [_honest("statement")]}}, ("STATUS_DENIED",)),
        "the platform is withdrawn by instance id": (
            {"status": {"platforms": [salted(SALT, machine().facts.piid)]}}, ("STATUS_DENIED",),
        ),
        "the platform is withdrawn by PPID": (
            {"status": {"platforms": [salted(SALT, machine().facts.ppid)]}}, ("STATUS_DENIED",),
        ),
        "a GPU is withdrawn": (
            {"status": {"gpus": [salted(SALT, gpu_serial(machine(), 0))]}}, ("STATUS_DENIED",),
        ),
        "the operator's key is withdrawn": (
            {"status": {"keys": [public_bytes(operator_key(0))]}, "status_keys": (1,)}, ("STATUS_DENIED",),
        ),
        "the operator's key is withdrawn by its hash": (
            {"status": {"keys": [hashlib.sha256(public_bytes(operator_key(0))).digest()]}}, ("STATUS_DENIED",),
        ),
        "the release signer's key is withdrawn": (
            {"status": {"keys": [public_bytes(signer_key(0))]}}, ("STATUS_DENIED",),
        ),
    }  # fmt: skip


def _keyset() -> Mapping[str, Lie]:
    return {
        "no keyset": ({"keyset_edit": lambda raw: b""}, ("FORMAT_RECEIPT",)),
        "the keyset of another certificate": ({"keyset_edit": foreign_keyset}, ("EVIDENCE_DIGEST", "KEYSET_KEY")),
        "a claimed keyset that names another TLS key": (naming(foreign_keyset), ("KEYSET_KEY",)),
        "a claimed keyset that names a second TLS key": (
            naming(second_tls_key), ("KEYSET_KEY",),
        ),
        "the keyset in another spelling": (
            {"keyset_edit": lambda raw: json.dumps(json.loads(raw)).encode()}, ("EVIDENCE_DIGEST",),
        ),
        "a keyset for another name": ({"keyset": {"domain": "bank.test"}}, ("KEYSET_KEY",)),
        "a keyset that has ended": ({"keyset": {"not_after": NOW + 59}}, ("KEYSET_DATES",)),
        "a keyset that outlives its certificate": ({"keyset": {"not_after": NOW + 3600 + 3601}}, ("KEYSET_DATES",)),
    }  # fmt: skip


def _all() -> dict[str, Lie]:
    found: dict[str, Lie] = {}
    for group in (_leaf, _quote, _release, _boot, _gpu, _deployment, _status, _keyset):
        for name, lie in group().items():
            assert name not in found
            assert set(lie[0]) <= {f.name for f in dataclasses.fields(Story)}
            found[name] = lie
    return found


LIES: Final[Mapping[str, Lie]] = _all()
