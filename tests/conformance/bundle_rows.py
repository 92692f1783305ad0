"""Whole enclaves: certificate, claims, release, deployment, status and keyset, from the lies of `tests/lies.py`.

Where that list lies about hardware evidence, the other kinds of this table take the lie apart, one rule at a time; here
it stands for the whole road.
"""

from __future__ import annotations

import re

from tests.conformance.book import Book, Input, b64
from tests.genuine import Genuine, genuine
from tests.lies import LIES

__all__ = ["bundle_rows"]

RATLS = "vouchsafe RA-TLS profile"
DSSE = "DSSE v1"
POLICY = "RFC 9334 §8.5, Appraisal Policy for Evidence"
ABI = "Intel TDX Module ABI Reference"
PCS = "Intel PCS API v4, TCB Info V3"
CLAUSES = {
    "LEAF_EXPIRED": "RFC 5280 §4.1.2.5", "LEAF_NAME": "RFC 9525 §6", "FORMAT_LEAF": f"{RATLS} §3.1, certificate",
    "CLAIMS_TIMES": f"{RATLS} §3.1, certificate", "CLAIMS_NAMES": f"{RATLS} §3.1, certificate",
    "CLAIMS_KEY": f"{RATLS} §3.3, claims", "FORMAT_CLAIMS": f"{RATLS} §3.3, claims",
    "FORMAT_CBOR": "RFC 8949 §4.2, deterministic CBOR", "TDX_REPORT_DATA": f"{RATLS} §3.4, REPORTDATA",
    "TDX_ATTRIBUTES": f"{ABI}: TDATTRIBUTES", "TDX_XFAM": f"{ABI}: XFAM", "TDX_MODULE": f"{ABI}: TDREPORT_STRUCT",
    "TDX_MRSEAM": f"{ABI}: TDREPORT_STRUCT", "TDX_MROWNER": f"{ABI}: TDREPORT_STRUCT",
    "TDX_MRCONFIGID": f"{ABI}: TDREPORT_STRUCT", "TDX_MRTD": f"{ABI}: MRTD", "TDX_RTMR1": f"{ABI}: RTMR",
    "TDX_TCB_STATUS": f"{PCS}: tcbStatus", "TDX_ADVISORY": f"{PCS}: advisoryIDs", "TDX_REVOKED": "RFC 5280 §6.3",
    "TDX_TCB_EVALUATION": f"{PCS}: tcbEvaluationDataNumber", "TDX_COLLATERAL_AGE": f"{PCS}: issueDate",
    "FORMAT_TDX_LENGTH": "Intel TDX DCAP Quoting Library API, appendix Quote Format", "TDX_PLATFORM": POLICY,
    "FORMAT_DSSE": f"{DSSE}: envelope", "STATEMENT_TYPE": f"{DSSE}: payloadType",
    "RELEASE_SIGNERS": f"{DSSE}: threshold of distinct keys",
    "DEPLOYMENT_OPERATOR": f"{DSSE}: threshold of distinct keys",
    "STATUS_SIGNER": f"{RATLS} §3.8, status list", "FORMAT_RELEASE": "in-toto Statement v1; vouchsafe release/v1",
    "RELEASE_DATES": "vouchsafe release/v1: notBefore, maxAgeDays", "RELEASE_MODELS": "vouchsafe release/v1: weights",
    "RELEASE_VALUE": "vouchsafe release/v1: reference values", "TDX_EVENT_LOG": f"{ABI}: TDG.MR.RTMR.EXTEND",
    "TDX_RTMR3": f"{RATLS} §3.3, contents of RTMR3", "GPU_ABSENT": f"{RATLS} §3.2, GPU evidence",
    "GPU_DIGEST": f"{RATLS} §3.3, claims", "GPU_CHAIN_ISSUER": "RFC 5280 §6.1, path validation",
    "GPU_NONCE": f"{RATLS} §3.4, GPU nonce", "GPU_NONCE_AGE": f"{RATLS} §3.4, GPU nonce",
    "GPU_STATE": f"{RATLS} §3.3, gpu-state", "GPU_NOT_CONFIDENTIAL": "NVML: nvmlConfComputeSystemState_t",
    "GPU_COUNT": f"{POLICY}: count", "GPU_DUPLICATE": f"{RATLS} §3.2, distinct devices",
    "GPU_RIM_MISMATCH": "TCG Reference Integrity Manifest Information Model: measurements",
    "GPU_RIM_MISSING": f"{POLICY}: a required stage without input is a failure", "GPU_DRIVER": f"{POLICY}: allow lists",
    "GPU_SIGNATURE": "DMTF DSP0274 1.1 §10.11: signature", "GPU_OCSP_REVOKED": "RFC 6960 §2.2, status",
    "GPU_OCSP_WINDOW": "RFC 6960 §3.2, time", "FORMAT_RECEIPT": "aci/1: keyset", "KEYSET_KEY": "aci/1: tls_public_keys",
    "KEYSET_DATES": "aci/1: not_after", "EVIDENCE_DIGEST": f"{RATLS} §3.3, digests of documents",
    "STATUS_EXPIRED": f"{RATLS} §3.8, status list", "STATUS_DENIED": f"{RATLS} §3.8, status list",
    "FORMAT_STATUS": f"{RATLS} §3.8, status list",
}  # fmt: skip
_DEPLOYMENT = f"{RATLS} §3.8, deployment statement"
_OTHERWISE = {"the name in capitals", "the empty name"}
"""Lies about a name that the command line does not pass on: it lowers case, and takes an empty name for none."""


def bundle_rows(book: Book) -> None:
    """One row per lie."""
    book.clause = f"{RATLS} §3.5, bundle"
    honest = _given(genuine())
    book.control("genuine", "a genuine enclave with one GPU", honest)
    for name, changes, why in (
        ("eight-gpus", {"gpus": tuple(range(8))}, "a genuine enclave with eight GPUs, each a single tenant's"),
        ("without-gpu", {"gpus": ()}, "a genuine enclave without GPU, where none is wanted"),
    ):
        book.accept(name, "genuine", why, **_given(genuine(**changes)))
    book.clause = f"{RATLS} §3.5, bundle"
    bare = honest | {"bundle": honest["bundle"] | {"collateral": ""}}
    book.refuse("without-collateral", "genuine", "TDX_COLLATERAL", "nobody vouches for the platform", **bare)
    for why, (lie, codes) in LIES.items():
        if why not in _OTHERWISE:
            book.clause = CLAUSES.get(codes[0], _DEPLOYMENT)
            name = re.sub(r"[^a-z0-9]+", "-", why.lower().replace("'", "")).strip("-")
            book.refuse(name, "genuine", codes[0], why, also=codes[1:], **_given(genuine(**lie)))


def _given(told: Genuine) -> Input:
    e, n = told.evidence, told.endorsements
    documents = {
        "leaf": e.leaf, "keyset": e.keyset, "event-log": e.event_log, "collateral": n.collateral,
        "release": e.release, "deployment": e.deployment or b"", "status": e.status or b"",
    }  # fmt: skip
    return {
        "bundle": {name: b64(raw) for name, raw in documents.items()}
        | {"rims": {k: b64(v) for k, v in n.rims.items()}, "ocsp": {k: b64(v) for k, v in n.ocsp.items()}},
        "policy": told.policy_text,
        "at": told.now,
        "name": told.name,
    }
