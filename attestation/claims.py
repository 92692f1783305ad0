"""What a certificate's quote commits to (ratls facts §3.3): the claims, as one deterministic CBOR map.

The quote's REPORTDATA covers the exact bytes. Every key is required, no other is known: a claim that we do not
understand could change the meaning of those that we do. Claims alone prove nothing; a quote over them proves that
the measured TD made them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from attestation import cbor
from attestation.errors import FormatError

__all__ = ["MAX_CLAIMS", "PROFILE", "Claims", "GpuNonce", "GpuStateClaim", "ModelClaim", "Role", "dns_name"]

PROFILE: Final = "urn:uuid:4dca7186-a56e-420c-ae1f-df53a898193b"
MAX_CLAIMS: Final = 16 * 1024
MAX_NAMES: Final = 16
MAX_MODELS: Final = 16
SHA384_OF_SPKI: Final = 7

Role = Literal["both", "model", "gateway"]

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_WEIGHTS: Final = re.compile(r"(?:verity-)?sha256:[0-9a-f]{64}")
_MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")
_KEYS: Final = frozenset(
    {
        "pubkey-hash", "profile", "not-before", "not-after", "dns-names", "boot-id", "release", "deployment",
        "config", "event-log", "gpu", "gpu-nonce", "gpu-state", "keyset", "role", "models",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GpuNonce:
    """What the GPU nonce was made from, besides the key: unix seconds and 32 random bytes."""

    issued_at: int
    salt: bytes


@dataclass(frozen=True, slots=True)
class GpuStateClaim:
    """The driver's word on the GPUs. Vouched for by the TD's measurement; no GPU signs it."""

    count: int
    switches: int
    mode: Literal["spt", "ppcie", "mpt"]
    cc: bool
    dev_tools: bool
    ready: bool
    production: bool


@dataclass(frozen=True, slots=True)
class ModelClaim:
    """A model that this enclave serves: its id and the root of its weights, `[verity-]sha256:<hex>`."""

    id: str
    weights: str


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of one certificate. Digests are bytes; times unix seconds; `key_hash` is k of the binding formulas."""

    key_hash: bytes
    not_before: int
    not_after: int
    dns_names: tuple[str, ...]
    boot_id: bytes
    release: bytes
    deployment: bytes | None
    config: bytes
    event_log: bytes
    gpu: bytes | None
    gpu_nonce: GpuNonce | None
    gpu_state: GpuStateClaim | None
    keyset: bytes
    role: Role
    models: tuple[ModelClaim, ...]

    def encode(self) -> bytes:
        """The bytes that the quote covers. Raises `FormatError` for claims that `decode` would refuse."""
        nonce, state = self.gpu_nonce, self.gpu_state
        raw = cbor.encode(
            {
                "pubkey-hash": cbor.encode([SHA384_OF_SPKI, self.key_hash]),
                "profile": PROFILE,
                "not-before": self.not_before,
                "not-after": self.not_after,
                "dns-names": list(self.dns_names),
                "boot-id": self.boot_id,
                "release": self.release,
                "deployment": self.deployment,
                "config": self.config,
                "event-log": self.event_log,
                "gpu": self.gpu,
                "gpu-nonce": nonce and {"issued-at": nonce.issued_at, "salt": nonce.salt},
                "gpu-state": state
                and {
                    "count": state.count,
                    "switches": state.switches,
                    "mode": state.mode,
                    "cc": state.cc,
                    "dev-tools": state.dev_tools,
                    "ready": state.ready,
                    "production": state.production,
                },
                "keyset": self.keyset,
                "role": self.role,
                "models": [{"id": m.id, "weights": m.weights} for m in self.models],
            }
        )
        Claims.decode(raw)
        return raw

    @classmethod
    def decode(cls, raw: bytes) -> Claims:
        """Strict: all keys, no others, each of its type, size and order. `FORMAT_CLAIMS` or `FORMAT_CBOR`."""
        top = _map(cbor.decode(raw, max_size=MAX_CLAIMS), _KEYS, "claims")
        if top["profile"] != PROFILE:
            _bad("profile", PROFILE, top["profile"])
        hash_raw = _bytes(top, "pubkey-hash", None)
        pair = cbor.decode(hash_raw, max_size=64)
        if not (isinstance(pair, list) and len(pair) == 2 and pair[0] == SHA384_OF_SPKI and _is_bytes(pair[1], 48)):
            _bad("pubkey-hash", "[7, SHA-384]", "another form")
        names = top["dns-names"]
        if not isinstance(names, list) or not 1 <= len(names) <= MAX_NAMES:
            _bad("dns-names", f"1 to {MAX_NAMES} names", type(names).__name__)
        for name in names:
            dns_name(name)
        if names != sorted(set(names)):
            _bad("dns-names", "sorted, each once", "another order")
        before, after = _number(top, "not-before"), _number(top, "not-after")
        if not before < after:
            _bad("not-after", f"after {before}", after)
        gpu = None if top["gpu"] is None else _bytes(top, "gpu", 48)
        nonce, state = _nonce(top["gpu-nonce"]), _state(top["gpu-state"])
        if not (gpu is None) == (nonce is None) == (state is None):
            _bad("gpu", "gpu, gpu-nonce and gpu-state all present or all null", "a mixture")
        if top["role"] not in ("both", "model", "gateway"):
            _bad("role", "both, model or gateway", top["role"])
        return cls(
            key_hash=pair[1],
            not_before=before,
            not_after=after,
            dns_names=tuple(names),
            boot_id=_bytes(top, "boot-id", 16),
            release=_bytes(top, "release", 32),
            deployment=None if top["deployment"] is None else _bytes(top, "deployment", 32),
            config=_bytes(top, "config", 32),
            event_log=_bytes(top, "event-log", 48),
            gpu=gpu,
            gpu_nonce=nonce,
            gpu_state=state,
            keyset=_bytes(top, "keyset", 32),
            role=top["role"],
            models=_models(top["models"]),
        )


def dns_name(name: object) -> str:
    """*name* if it is a lower-case DNS name of A-labels without a wildcard (RFC 5890), else `FORMAT_CLAIMS`."""
    if not isinstance(name, str) or len(name) > 253 or not all(_LABEL.fullmatch(p) for p in name.split(".")):
        _bad("dns-names", "lower-case A-labels", name)
    return name


def _nonce(value: object) -> GpuNonce | None:
    if value is None:
        return None
    t = _map(value, frozenset({"issued-at", "salt"}), "gpu-nonce")
    return GpuNonce(_number(t, "issued-at"), _bytes(t, "salt", 32))


def _state(value: object) -> GpuStateClaim | None:
    if value is None:
        return None
    flags = ("cc", "dev-tools", "ready", "production")
    t = _map(value, frozenset({"count", "switches", "mode", *flags}), "gpu-state")
    if t["mode"] not in ("spt", "ppcie", "mpt"):
        _bad("gpu-state.mode", "spt, ppcie or mpt", t["mode"])
    if not all(isinstance(t[f], bool) for f in flags):
        _bad("gpu-state", "true or false", "another type")
    return GpuStateClaim(
        _number(t, "count"), _number(t, "switches"), t["mode"], t["cc"], t["dev-tools"], t["ready"], t["production"]
    )


def _models(value: object) -> tuple[ModelClaim, ...]:
    if not isinstance(value, list) or len(value) > MAX_MODELS:
        _bad("models", f"a list of at most {MAX_MODELS}", type(value).__name__)
    found = []
    for entry in value:
        t = _map(entry, frozenset({"id", "weights"}), "models")
        if not isinstance(t["id"], str) or not _MODEL_ID.fullmatch(t["id"]):
            _bad("models.id", "a model id of 1 to 128 plain characters", t["id"])
        if not isinstance(t["weights"], str) or not _WEIGHTS.fullmatch(t["weights"]):
            _bad("models.weights", "[verity-]sha256:<64 hex digits>", t["weights"])
        found.append(ModelClaim(t["id"], t["weights"]))
    if len({m.id for m in found}) != len(found):
        _bad("models", "each id once", "a repeated id")
    return tuple(found)


def _bad(what: str, expected: object, actual: object) -> NoReturn:
    raise FormatError("FORMAT_CLAIMS", f"claim {what} is malformed", expected=expected, actual=actual)


def _map(value: object, keys: frozenset[str], what: str) -> Mapping[str, Any]:  # Any: CBOR values, each checked
    if not isinstance(value, dict):
        _bad(what, "a map", type(value).__name__)
    if value.keys() != keys:
        _bad(what, f"keys {', '.join(sorted(keys))}", ", ".join(sorted(map(str, value))))
    return value


def _number(t: Mapping[str, Any], key: str) -> int:
    value = t[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        _bad(key, "a whole number", value)
    return value


def _is_bytes(value: object, size: int | None) -> bool:
    return isinstance(value, bytes) and (size is None or len(value) == size)


def _bytes(t: Mapping[str, Any], key: str, size: int | None) -> bytes:
    value = t[key]
    if not isinstance(value, bytes) or not _is_bytes(value, size):
        _bad(key, f"{size or 'some'} bytes", type(value).__name__)
    return value
