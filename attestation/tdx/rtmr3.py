"""What vouchsafe measures into RTMR3: one JSON item per thing that is not in the image (measurement facts §6).

In this order: release, configuration, one item per model in the order of the claims, seal. Each extends
SHA-384(JCS(item)) (RFC 8785), and the item itself is the event data, so that the digest covers what the log says. After
the seal nothing more is extended: whatever is added later shows as another register value.

Pure. The same functions build the items in the guest and check them at a verifier.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import rfc8785

from attestation.errors import FormatError
from attestation.tdx.events import extend

__all__ = ["rtmr3_items", "rtmr_after"]


def rtmr3_items(release_sha256: bytes, config_sha256: bytes, weights: Sequence[tuple[str, str]]) -> list[bytes]:
    """The items as JCS bytes, in order. *weights* are (model id, root) with root as the claims state it,
    `sha256:<hex>` or `verity-sha256:<hex>`. Raises `FormatError` when a value has another shape."""
    for name, value in (("release", release_sha256), ("config", config_sha256)):
        if len(value) != 32:
            raise FormatError("FORMAT_TDX_RTMR3", f"{name} is not a SHA-256", expected="32 bytes", actual=len(value))
    for id, root in weights:
        if not id or not re.fullmatch(r"(?:verity-)?sha256:[0-9a-f]{64}", root):
            raise FormatError("FORMAT_TDX_RTMR3", "weights without an id or root", expected="sha256:<hex>", actual=root)
    items: list[dict[str, str]] = [
        {"item": "release", "sha256": release_sha256.hex()},
        {"item": "config", "sha256": config_sha256.hex()},
        *({"item": "weights", "id": id, "root": root} for id, root in weights),
        {"item": "seal"},
    ]
    return [rfc8785.dumps(item) for item in items]


def rtmr_after(items: Iterable[bytes]) -> bytes:
    """RTMR3 (48 bytes) after *items* were extended, starting from zero."""
    value = bytes(48)
    for item in items:
        value = extend(value, hashlib.sha384(item).digest())
    return value
