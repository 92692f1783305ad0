"""A dated, signed exception for a TCB status (TDX facts §5, item 7): how release signers say "not yet, and until when".

A DSSE envelope by enough of the policy's release signers, payload `application/vnd.vouchsafe.tcb-exception+json`: one
status, the advisories that may come with it, a reason, the first and the last moment, and optionally the one FMSPC it
is for. It widens exactly the two checks it names, for at most 90 days, and stands in the result. What Intel calls
OutOfDateConfigurationNeeded or Revoked is refused whatever is signed. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import rfc8785

from attestation.dsse import Envelope
from attestation.errors import FormatError
from attestation.policy import TCB_STATUSES, Policy, Skip, TdxPolicy
from attestation.result import Checks
from attestation.strict_json import count, exact, listed, load, short

__all__ = ["EXCEPTION_PAYLOAD_TYPE", "MAX_EXCEPTION_LIFETIME", "TcbException", "admit", "confine", "new_exception"]

EXCEPTION_PAYLOAD_TYPE: Final = "application/vnd.vouchsafe.tcb-exception+json"
MAX_EXCEPTION_LIFETIME: Final = 90 * 86400
MAX_PAYLOAD: Final = 16 * 1024
MAX_MOMENT: Final = 253_402_300_799  # the year 9999: later ones have no date
_CITE: Final = "TCB exception, signed by release signers"


@dataclass(frozen=True, slots=True)
class TcbException:
    """One exception. Worth something only when `admit` found enough signatures and the time inside it."""

    status: str
    advisories: frozenset[str]
    fmspc: bytes | None
    reason: str
    not_before: int
    not_after: int

    @classmethod
    def parse(cls, payload: bytes) -> TcbException:
        """`FORMAT_EXCEPTION` for anything else; a life beyond 90 days is malformed too."""
        try:
            return cls._read(load(payload, MAX_PAYLOAD, "TCB exception"))
        except FormatError as err:
            raise FormatError("FORMAT_EXCEPTION", err.reason, expected=err.expected, actual=err.actual) from None

    @classmethod
    def _read(cls, t: dict[str, Any]) -> TcbException:  # Any: JSON values, each checked
        names = frozenset({"version", "status", "advisories", "fmspc", "reason", "notBefore", "notAfter"})
        exact(t, names, names, "TCB exception")
        start, end = count(t["notBefore"], "notBefore"), count(t["notAfter"], "notAfter")
        if (
            t["version"] != 1
            or t["version"] is True
            or end > MAX_MOMENT
            or not 0 < end - start <= MAX_EXCEPTION_LIFETIME
        ):
            raise FormatError("FORMAT_EXCEPTION", "lifetime", expected="version 1, at most 90 days", actual=end - start)
        if t["status"] not in TCB_STATUSES:
            raise FormatError("FORMAT_EXCEPTION", "status", expected=sorted(TCB_STATUSES), actual=t["status"])
        advisories = listed(t["advisories"], "advisories")
        if not all(isinstance(a, str) and re.fullmatch(r"INTEL-(SA|DOC)-[0-9]{5}", a) for a in advisories):
            raise FormatError(
                "FORMAT_EXCEPTION", "advisories", expected="ids such as INTEL-SA-00837", actual=advisories
            )
        fmspc = t["fmspc"]
        if fmspc is not None and not (isinstance(fmspc, str) and re.fullmatch(r"[0-9a-f]{12}", fmspc)):
            raise FormatError("FORMAT_EXCEPTION", "fmspc", expected="null or 6 bytes in hex", actual=fmspc)
        reason = short(t["reason"], "reason")
        if reason is None or len(reason) < 8:
            raise FormatError("FORMAT_EXCEPTION", "reason", expected="at least eight characters", actual=reason)
        return cls(t["status"], frozenset(advisories), bytes.fromhex(fmspc) if fmspc else None, reason, start, end)


def new_exception(
    *,
    status: str,
    advisories: list[str],
    fmspc: bytes | None,
    reason: str,
    not_before: int,
    not_after: int,
) -> bytes:
    """Payload (JCS), which `TcbException.parse` accepts."""
    document: dict[str, Any] = {  # Any: JSON values
        "version": 1,
        "status": status,
        "advisories": sorted(advisories),
        "fmspc": fmspc.hex() if fmspc is not None else None,
        "reason": reason,
        "notBefore": not_before,
        "notAfter": not_after,
    }
    payload = rfc8785.dumps(document)
    TcbException.parse(payload)
    return payload


def admit(policy: Policy, *, fmspc: bytes, now: int, checks: Checks) -> tuple[TdxPolicy, TcbException | None]:
    """The TDX part of *policy*, widened by its exception when that is signed, in force and for this *fmspc*; and the
    exception, None when none was used. `confine` must follow once the platform's status is known.

    One exception at a time: two could lend each other their advisories. A malformed or unsigned one is a failed check;
    one that is not in force, or for another platform, is skipped and widens nothing."""
    tdx, envelope = policy.tdx, policy.exception
    if envelope is None:
        return tdx, None
    if isinstance(policy.release, Skip):
        checks.require(
            "tdx.exception", False, code="EXCEPTION_SIGNER", reason="the policy pins signers who may grant exceptions",
            expected="[release] signers", actual="none", cite=_CITE,
        )  # fmt: skip
        return tdx, None
    outer = checks.parse("tdx.exception", lambda: Envelope.parse(envelope), reason="a DSSE envelope", cite=_CITE)
    if outer is None:
        return tdx, None
    signed = len(outer.signers(policy.release.signers))
    wanted = policy.release.threshold
    good = checks.require(
        "tdx.exception", outer.payload_type == EXCEPTION_PAYLOAD_TYPE and signed >= wanted, code="EXCEPTION_SIGNER",
        reason=f"{wanted} of the release signers signed this exception", expected=f">= {wanted}", actual=signed,
        cite=_CITE,
    )  # fmt: skip
    if not good:
        return tdx, None
    found = checks.parse(
        "tdx.exception", lambda: TcbException.parse(outer.payload), reason="the exception is well formed", cite=_CITE
    )
    if found is None:
        return tdx, None
    if not found.not_before <= now <= found.not_after:
        checks.skip("tdx.exception", f"not in force: it held until {_day(found.not_after)}", cite=_CITE)
        return tdx, None
    if found.fmspc is not None and found.fmspc != fmspc:
        checks.skip("tdx.exception", f"it is for FMSPC {found.fmspc.hex()} alone", cite=_CITE)
        return tdx, None
    allowed = f"{found.status} with {', '.join(sorted(found.advisories)) or 'no advisory'}"
    checks.require(
        "tdx.exception", True, code="EXCEPTION_SIGNER",
        reason=f"EXCEPTION until {_day(found.not_after)}: {allowed} is allowed ({found.reason})", cite=_CITE,
    )  # fmt: skip
    wider = replace(
        tdx,
        tcb_status=tdx.tcb_status if isinstance(tdx.tcb_status, Skip) else tdx.tcb_status | {found.status},
        advisories=tdx.advisories if isinstance(tdx.advisories, Skip) else tdx.advisories | found.advisories,
    )
    return wider, found


def confine(
    policy: Policy, exception: TcbException, tcb_status: str, advisories: frozenset[str], checks: Checks
) -> None:
    """Its advisories go with its own status alone: a platform of another status is judged by the policy as written."""
    plain = policy.tdx.advisories
    lent = tcb_status != exception.status and not isinstance(plain, Skip) and not advisories <= plain
    checks.require(
        "tdx.exception", not lent, code="EXCEPTION_SCOPE", reason="its advisories come with its status alone",
        expected=exception.status, actual=tcb_status, cite=_CITE,
    )  # fmt: skip


def _day(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%MZ")
