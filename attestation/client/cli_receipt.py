"""`vouchsafe receipt verify`: did the program that the evidence shows give this answer to this request? No network."""

from __future__ import annotations

from argparse import Namespace

from attestation.bundle import MAX_BUNDLE, Bundle
from attestation.client.cli_common import ACCEPTED, REFUSED, emit, paint, policy_of, read_file, say
from attestation.client.cli_service import own_time
from attestation.client.receipts import check_receipt
from attestation.client.report import render, render_checks
from attestation.receipt import MAX_RECEIPT
from attestation.verifier import verify

__all__ = ["verify_receipt_file"]


def verify_receipt_file(options: Namespace) -> int:
    """First the evidence under the policy, then the receipt under the keyset that this evidence names."""
    policy = policy_of(options)
    raw = read_file(options.receipt, "receipt", MAX_RECEIPT)
    saved = Bundle.decode(read_file(options.bundle, "bundle", MAX_BUNDLE))
    request = read_file(options.request, "request") if options.request else None
    response = read_file(options.response, "response") if options.response else None
    attested = verify(saved.evidence, saved.endorsements, policy, now=own_time(saved, options.at), name=None)
    # Keys that merely lie beside a quote sign nothing: an unaccepted bundle refuses, whatever its keyset says.
    _, verdict = check_receipt(raw, saved.evidence.keyset, request=request, response=response, allow_cut=options.cut)
    accepted = attested.accepted and verdict.accepted
    if options.json:
        emit({
            "subject": options.receipt, "verdict": "accepted" if accepted else "refused",
            "development": attested.development, "codes": [*attested.codes, *verdict.codes],
            "checks": [c.as_json() for c in (*attested.checks, *verdict.checks)],
            "attestation": attested.as_json(), "receipt": verdict.as_json(),
        })  # fmt: skip
        return ACCEPTED if accepted else REFUSED
    brush = paint()
    word = brush("ACCEPTED", "pass") if accepted else brush("REFUSED", "fail")
    mark = brush("  DEVELOPMENT: nothing here rests on hardware", "skip") if attested.development else ""
    say(f"{word}  receipt {options.receipt}{mark}")
    say("\n".join(render_checks(verdict.checks, brush)))
    say()
    say(render(attested, subject=f"evidence {options.bundle}", paint=brush))
    return ACCEPTED if accepted else REFUSED
