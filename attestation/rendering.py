"""What an accepted result says: the claims that follow, as JSON values, and the sentences on what does not follow.

Read out of what the steps found; judges nothing. Pure.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from attestation.gpu import GpuFacts
from attestation.policy import Policy, Skip
from attestation.steps import Found
from attestation.tdx import TdxFacts

__all__ = ["NOT_POST_QUANTUM", "NOT_PROVEN", "NO_CHANNEL", "gpu_claims", "not_appraised", "render", "tdx_claims"]

NOT_PROVEN: Final = (
    "physical attacks: whoever taps the memory bus can forge quotes (TEE.fail, WireTap, Battering RAM)",
    "place: on Hopper nothing in hardware ties the GPU to this TD; that rests on the measured driver (relayable)",
    "traffic shape: the host sees sizes and times of what it carries",
)
NOT_POST_QUANTUM: Final = (
    "secrecy: the key exchange is not post-quantum; what is recorded now may be readable to a quantum computer later"
)
NO_CHANNEL: Final = "channel: no proof was asked that this very connection ends in the TD"


def not_appraised(policy: Policy, name: str | None) -> tuple[str, ...]:
    """Sentences for the large things that *policy* leaves out: what a reader must not read into `accepted`."""
    found = [*NOT_PROVEN]
    if isinstance(policy.release, Skip):
        found.append(f"release: not appraised, what the TD runs is unknown ({policy.release.why})")
    if isinstance(policy.deployment, Skip):
        found.append(f"deployment: not appraised, whose machine this is is unknown ({policy.deployment.why})")
    elif isinstance(policy.deployment.status_list, Skip):
        found.append(f"revocation by the operator: not appraised ({policy.deployment.status_list.why})")
    if isinstance(policy.gpu, Skip):
        found.append(f"GPU: not appraised ({policy.gpu.why})")
    if name is None:
        found.append("name: no name was dialled; whose names these are is in the claims")
    return (*found, NO_CHANNEL)


def render(found: Found) -> dict[str, Any]:  # Any: JSON values
    """Claims of a result of `verify`."""
    c, release, statement, status = found.claims, found.release, found.statement, found.status
    return {
        "leaf": hashlib.sha256(found.leaf.der).hexdigest(),
        "names": list(c.dns_names),
        "operator": statement.operator if statement else "",
        "statement_serial": statement.serial if statement else None,
        "status_serial": status.serial if status else None,
        "role": c.role,
        "release": c.release.hex(),
        "version": release.version if release else "",
        "source_commit": release.source_commit if release else "",
        "config": c.config.hex(),
        "models": [{"id": m.id, "weights": m.weights} for m in c.models],
        "keyset": "sha256:" + c.keyset.hex(),
        "not_after": c.not_after,
        **(tdx_claims(found.tdx) if found.tdx else {}),
        **(gpu_claims(found.gpu) if found.gpu else {}),
    }


def tdx_claims(facts: TdxFacts) -> dict[str, Any]:  # Any: JSON values
    """What the quote shows. A client keeps `crl_numbers` as its floor."""
    body = facts.report
    return {
        "tdx": {
            "tcb_status": facts.tcb_status,
            "tcb_evaluation": facts.evaluation,
            "advisories": sorted(facts.advisories),
            "crl_numbers": {
                "root": facts.crl.root,
                "platform": facts.crl.platform,
                "processor": facts.crl.processor,
            },
            "fmspc": facts.fmspc.hex(),
            "mrtd": body.mrtd.hex(),
            "rtmrs": [r.hex() for r in body.rtmrs],
            "mrseam": body.mrseam.hex(),
            "td_attributes": hex(body.td_attributes),
            "xfam": hex(body.xfam),
            "report_data": body.report_data.hex(),
        }
    }


def gpu_claims(facts: GpuFacts) -> dict[str, Any]:  # Any: JSON values
    """What the devices' reports show."""
    return {
        "gpu": {
            "mode": facts.mode,
            "tied_to_td": "relayable",
            "devices": [
                {"kind": d.kind, "hwmodel": d.hwmodel, "driver": d.driver, "vbios": d.vbios, "serial": d.ik_serial}
                for d in facts.devices
            ],
        }
    }
