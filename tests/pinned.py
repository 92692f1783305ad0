"""What the tests' policies pin: keys made at run time, one set per test run, and the text of an honest policy.

Used through `tests.genuine`; here so that a policy can be written without telling a whole story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.dsse import public_bytes
from tests.devtee import gpu as devgpu
from tests.devtee.pki import Pki
from tests.devtee.tee import DevTee

__all__ = [
    "MACHINE_GPUS", "Drop", "any_reason", "leaf_key", "machine", "operator_key", "policy_text", "receipt_key",
    "signer_key", "toml",
]  # fmt: skip

MACHINE_GPUS: Final = 8


class Drop:
    """In `Story.policy`: leave the field out."""


def any_reason(why: str = "this test does not look at it") -> dict[str, str]:
    """What a policy writes to leave a check out."""
    return {"any": why}


@cache
def _machine(number: int) -> Pki:
    return Pki.fresh(MACHINE_GPUS)


@cache
def _ed25519(purpose: str, number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@cache
def _p256(number: int) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def machine(number: int = 0) -> Pki:
    """The PKI of machine *number*: each is a world of its own, roots included."""
    return _machine(number)


def operator_key(number: int = 0) -> Ed25519PrivateKey:
    """0 to 2 are pinned by the honest policy."""
    return _ed25519("operator", number)


def signer_key(number: int = 0) -> Ed25519PrivateKey:
    """Of release manifests; 0 to 2 are pinned by the honest policy."""
    return _ed25519("signer", number)


def receipt_key(number: int = 0) -> Ed25519PrivateKey:
    return _ed25519("receipt", number)


def leaf_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    return _p256(number)


def policy_text(tee: DevTee, changes: Mapping[str, Any] | None = None, *, gpus: int = 1) -> str:
    """A whole development policy for *tee*, TOML. *changes*: dotted field → value, `Drop`, or `any_reason()`."""
    pem = {name: text.decode() for name, text in tee.roots_pem.items()}
    document: dict[str, Any] = {
        "version": 1,
        "name": "genuine",
        "development": True,
        "roots": {
            "intel": pem["intel"],
            "nvidia-device": pem["nvidia_device"],
            "nvidia-rim": pem["nvidia_rim"],
        },
        "tdx": {
            "tcb-status": ["UpToDate"],
            "advisories": [],
            "min-tcb-evaluation": 20,
            "max-collateral-age-days": 30,
            "td-attributes": ["0x10000000"],
            "xfam": ["0x600e7"],
            "mrseam": [tee.td.mrseam.hex()],
            "mrconfigid": "zero",
            "mrowner": "zero",
            "mrownerconfig": "zero",
            "platforms": [tee.pki.facts.piid.hex()],
        },
        "gpu": {
            "count": gpus,
            "switches": 0,
            "mode": "spt",
            "drivers": [devgpu.DRIVER],
            "vbios": [devgpu.VBIOS],
            "hwmodels": any_reason("the manifest's RIMs name the chip"),
            "require": ["all"],
        }
        if gpus
        else any_reason("a machine without a GPU"),
        "release": {"signers": [public_bytes(signer_key(n)).hex() for n in range(3)], "threshold": 1},
        "deployment": {
            "operators": [public_bytes(operator_key(n)).hex() for n in range(3)],
            "threshold": 1,
            "min-serial": 5,
            "role": "both",
            "status-list": "required",
            "status-url": any_reason("the evidence's list is all there is"),
        },
        "channel": {"proof": "exporter", "fresh-gpu": False},
    }
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        table = document
        for parent in parents:
            table = table[parent]
        if value is Drop:
            del table[last]
        else:
            table[last] = value
    return toml(document)


def toml(document: Mapping[str, Any]) -> str:
    """*document* as TOML: inline values first, then its tables."""
    lines = [f"{k} = {_value(v)}" for k, v in document.items() if not isinstance(v, dict) or "any" in v]
    for name, table in document.items():
        if isinstance(table, dict) and "any" not in table:
            lines += ["", f"[{name}]", *(f"{k} = {_value(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)
