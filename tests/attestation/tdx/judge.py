"""One road from bytes to a book of checks, as the verifier walks it: parse, parse, appraise, event log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attestation.policy import Skip, TdxPolicy, platform_policy
from attestation.result import Checks, Status
from attestation.roots import INTEL_SGX_ROOT_CA
from attestation.tdx import (
    Collateral,
    CrlNumbers,
    Quote,
    Registers,
    TdxFacts,
    appraise,
    appraise_event_log,
    parse_event_log,
)

NOT_GIVEN = Skip("no release manifest was given")


@dataclass(frozen=True)
class Verdict:
    """What came out: `accepted` as the verifier concludes it, and every check."""

    checks: Checks
    facts: TdxFacts | None

    @property
    def accepted(self) -> bool:
        return not self.checks.failed and any(c.status is Status.PASS for c in self.checks)

    @property
    def codes(self) -> set[str]:
        return {c.code for c in self.checks.failed}

    @property
    def failed(self) -> dict[str, str]:
        return {c.id: c.code for c in self.checks.failed}

    def status(self, id: str) -> Status:
        found: Status = next(c.status for c in self.checks if c.id == id)
        return found


def judge(
    quote: bytes,
    collateral: bytes,
    now: int,
    *,
    root: bytes = INTEL_SGX_ROOT_CA,
    policy: TdxPolicy | None = None,
    registers: Registers | Skip = NOT_GIVEN,
    crl_floor: CrlNumbers | None = None,
    event_log: bytes | None = None,
) -> Verdict:
    checks, facts = Checks(), None
    parsed = checks.parse("tdx.quote", lambda: Quote.parse(quote), reason="the quote is well formed")
    given = checks.parse("tdx.collateral", lambda: Collateral.parse(collateral), reason="collateral is well formed")
    if parsed is not None and given is not None:
        facts = appraise(
            parsed,
            given,
            policy=policy or platform_policy(min_tcb_evaluation=0).tdx,
            registers=registers,
            root=root,
            now=now,
            checks=checks,
            crl_floor=crl_floor,
        )
    if parsed is not None and event_log is not None:
        log = checks.parse("tdx.event-log", lambda: parse_event_log(event_log), reason="the log is well formed")
        if log is not None:
            appraise_event_log(log, parsed.body.rtmrs, checks, items=NOT_GIVEN)
    return Verdict(checks, facts)


@dataclass(frozen=True)
class Case:
    """One shared vector."""

    folder: Path
    about: dict[str, Any]
    quote: bytes
    collateral: bytes
    event_log: bytes | None

    @classmethod
    def read(cls, folder: Path) -> Case:
        logs = [folder / n for n in ("ccel.bin", "eventlog.json") if (folder / n).exists()]
        return cls(
            folder,
            json.loads((folder / "case.json").read_text()),
            (folder / "quote.bin").read_bytes(),
            (folder / "collateral.json").read_bytes(),
            logs[0].read_bytes() if logs else None,
        )

    def judge(self, **changes: Any) -> Verdict:
        floor = int(self.about["eval_floor"])
        root = self.folder / "root.der"
        given: dict[str, Any] = {
            "policy": platform_policy(min_tcb_evaluation=floor).tdx,
            "event_log": self.event_log,
            "root": root.read_bytes() if root.exists() else INTEL_SGX_ROOT_CA,
        }
        given |= {"quote": self.quote, "collateral": self.collateral, "now": int(self.about["at"])} | changes
        return judge(**given)
