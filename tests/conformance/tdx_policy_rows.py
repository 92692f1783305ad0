"""One piece of evidence under policies that ask for something else than it shows."""

from __future__ import annotations

from tests.attestation.tdx.dev import tee
from tests.conformance.book import Book
from tests.conformance.tdx_machine import honest
from tests.genuine import any_reason, policy_text

__all__ = ["policy_rows"]


def policy_rows(book: Book) -> None:
    """The same evidence under policies that ask for something else."""
    book.clause = "RFC 9334 §8.5, Appraisal Policy for Evidence"
    absent = any_reason("this table has no release and no operator")
    base = {"release": absent, "deployment": absent}

    def text(**changes: object) -> str:
        return policy_text(
            tee(), base | {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}, gpus=0
        )

    book.control("policy", "a policy that names this very machine", honest(policy=text()))
    pki, one = tee().pki.facts, "01" * 48
    book.accept(
        "policy-by-ppid", "policy", "the platform named by its PPID", policy=text(tdx__platforms=[pki.ppid.hex()])
    )
    for name, changes, code, why in (
        ("status", {"tdx__tcb_status": ["SWHardeningNeeded"]}, "TDX_TCB_STATUS", "UpToDate is not on the list"),
        ("td-attributes", {"tdx__td_attributes": ["0x30000000"]}, "TDX_ATTRIBUTES", "another whole value"),
        ("xfam", {"tdx__xfam": ["0xe7"]}, "TDX_XFAM", "another whole value"),
        ("mrseam", {"tdx__mrseam": [one]}, "TDX_MRSEAM", "a module that the policy does not name"),
        ("mrconfigid", {"tdx__mrconfigid": one}, "TDX_MRCONFIGID", "a configuration that the host chose"),
        ("mrowner", {"tdx__mrowner": one}, "TDX_MROWNER", "an owner that the host chose"),
        (
            "mrownerconfig",
            {"tdx__mrownerconfig": one},
            "TDX_MROWNERCONFIG",
            "an owner's configuration that the host chose",
        ),
        ("platform", {"tdx__platforms": ["01" * 16]}, "TDX_PLATFORM", "a genuine platform that is not on the list"),
    ):
        also = ("TDX_QE_STATUS",) if name == "status" else ()
        book.refuse(f"policy-asks-for-another-{name}", "policy", code, why, also=also, policy=text(**changes))
