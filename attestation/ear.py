"""The result in the words of EAR and AR4SI (draft-ietf-rats-ear, draft-ietf-rats-ar4si §2.3), for other tools.

Each check speaks for one trustworthiness claim; what nothing was asked about is 0, "no claim". A claim is 2 (affirming)
when at least one of its checks passed and none failed, 96 (contraindicated) when one failed: a failed signature is not
a warning. A check left out by the policy lowers an affirmed claim to 32 (warning) where the claim rests on it.

This is a translation, not a second verdict: `AttestationResult.verdict` decides. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Protocol

__all__ = ["AFFIRMING", "CLAIMS", "CONTRAINDICATED", "NONE", "PROFILE", "WARNING", "ear", "vector"]

PROFILE: Final = "tag:github.com,2023:veraison/ear"
NONE: Final = 0
AFFIRMING: Final = 2
WARNING: Final = 32
CONTRAINDICATED: Final = 96

CLAIMS: Final[dict[str, tuple[str, ...]]] = {
    "instance-identity": ("deployment.", "status.", "tdx.platform", "leaf.", "claims.key", "claims.names", "keyset."),
    "configuration": (
        *("tdx.td-attributes", "tdx.xfam", "tdx.mrconfigid", "tdx.mrowner", "tdx.rtmr3-items", "deployment.config"),
        *("gpu.state", "gpu.mode", "gpu.count", "gpu.topology", "release.td-attributes", "release.xfam"),
    ),
    "executables": (
        *(
            "tdx.mrtd",
            "tdx.rtmr0",
            "tdx.rtmr1",
            "tdx.rtmr2",
            "tdx.event-log",
            "tdx.event-data",
            "release.",
            "gpu.rim",
            "gpu.driver",
        ),
        *("gpu.vbios", "gpu.fwid"),
    ),
    "file-system": ("release.models",),
    "hardware": ("tdx.", "gpu."),
    "runtime-opaque": ("tdx.td-safety", "gpu.confidential"),
}
"""AR4SI claim → prefixes of the check ids that speak for it. `hardware` takes whatever no other claim names."""

_UNSAID: Final = ("storage-opaque", "sourced-data")
_RESTS_ON: Final = frozenset(
    {"tdx.mrtd", "tdx.rtmr0", "tdx.rtmr1", "tdx.rtmr2", "tdx.tcb-status", "gpu.rim", "deployment.operator"}
)


class _Check(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def status(self) -> str: ...


def vector(checks: Iterable[_Check]) -> dict[str, int]:
    """The trustworthiness vector: every AR4SI claim with its value."""
    told: dict[str, list[_Check]] = {name: [] for name in CLAIMS}
    for check in checks:
        for name in _speaks_for(check.id.removeprefix("channel.")):
            told[name].append(check)
    return {**{name: _value(found) for name, found in told.items()}, **dict.fromkeys(_UNSAID, NONE)}


def ear(checks: Iterable[_Check], *, accepted: bool, policy: str, now: int) -> dict[str, Any]:  # Any: JSON values
    """An EAR claims set with one submodule. Unsigned: whoever relays it must sign it."""
    status = "affirming" if accepted else "contraindicated"
    return {
        "eat_profile": PROFILE,
        "iat": now,
        "ear.verifier-id": {"developer": "vouchsafe", "build": "vouchsafe"},
        "submods": {
            "vouchsafe": {
                "ear.status": status,
                "ear.trustworthiness-vector": vector(checks),
                "ear.appraisal-policy-id": policy,
            }
        },
    }


def _speaks_for(id: str) -> list[str]:
    named = [n for n, prefixes in CLAIMS.items() if n != "hardware" and id.startswith(prefixes)]
    return named or (["hardware"] if id.startswith(CLAIMS["hardware"]) else [])


def _value(checks: list[_Check]) -> int:
    statuses = {str(c.status) for c in checks}
    if "fail" in statuses:
        return CONTRAINDICATED
    if "pass" not in statuses:
        return NONE
    left_out = {c.id for c in checks if str(c.status) == "skip"} & _RESTS_ON
    return WARNING if left_out else AFFIRMING
