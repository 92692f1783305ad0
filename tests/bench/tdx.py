"""TDX: the whole appraisal of a quote beside bare dcap-qvl, which does signatures, CRLs and TCB matching only."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import dcap_qvl  # type: ignore[import-untyped]  # ships stubs without py.typed

from attestation.policy import Policy, Roots, platform_policy
from attestation.verifier import verify_quote
from tests.bench.rows import Row, interleaved, ratio_at_most
from tests.devtee.pki import Pki
from tests.devtee.tee import DevTee
from tests.vectors import VECTORS

GOAL = 1.5
VECTOR = "bb7c69487f-eval20"


@dataclass(frozen=True)
class Question:
    origin: str
    quote: bytes
    collateral: bytes
    at: int
    policy: Policy
    root: bytes | None


def rows(rounds: int) -> list[Row]:
    asked = question()
    given = asked.collateral.decode()
    prepared = dcap_qvl.QuoteCollateralV3.from_json(given)

    def ours() -> None:
        result = verify_quote(asked.quote, asked.collateral, asked.policy, now=asked.at)
        assert result.accepted, result.codes

    def bare(collateral: dcap_qvl.QuoteCollateralV3) -> None:
        if asked.root is None:
            dcap_qvl.verify(asked.quote, collateral, asked.at)
        else:
            dcap_qvl.verify_with_root_ca(asked.quote, collateral, asked.root, asked.at)

    found = interleaved(
        {
            "ours": ours,
            "bytes": lambda: bare(dcap_qvl.QuoteCollateralV3.from_json(given)),
            "prepared": lambda: bare(prepared),
        },
        rounds=rounds * 20,
        cpu=True,
    )
    name = f"TDX quote of {asked.origin}, warm"
    return [
        ratio_at_most(
            f"{name}, from bytes to verdict (CPU ms)", found["ours"], found["bytes"], "bare dcap_qvl.verify", GOAL
        ),
        Row(
            f"{name}, the peer's collateral parsed beforehand (CPU ms)", found["ours"], found["prepared"],
            "bare dcap_qvl.verify", found["ours"] / found["prepared"],
        ),
    ]  # fmt: skip


def question() -> Question:
    """A real quote that is accepted, or, without the vectors, one of the development TEE."""
    folder = VECTORS / "tdx" / VECTOR
    if (folder / "case.json").exists():
        case = json.loads((folder / "case.json").read_text())
        quote, collateral = (folder / "quote.bin").read_bytes(), (folder / "collateral.json").read_bytes()
        policy = platform_policy(min_tcb_evaluation=int(case["eval_floor"]))
        return Question(f"a real machine ({VECTOR})", quote, collateral, int(case["at"]), policy, None)
    tee, now = DevTee(Pki.fresh(1)), int(time.time())
    roots = Roots(tee.roots.intel, tee.roots.nvidia_device, tee.roots.nvidia_rim)
    return Question(
        "the DEVELOPMENT TEE (no shared vectors)", tee.quote(bytes(64)), tee.collateral(now), now,
        platform_policy(roots=roots, min_tcb_evaluation=0), roots.intel,
    )  # fmt: skip
