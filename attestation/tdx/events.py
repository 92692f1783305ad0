"""One measured event, and what its digest says about the data beside it (TCG PC Client Platform Firmware Profile §10).

A log is untrusted until its replay equals the registers of a quote. Even then the replay vouches for digests only: the
data beside a digest is vouched for where a rule says what was hashed. `authentic` holds that answer per event; nobody
should act on data for which it is not true.

Pure; trusts nobody.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["EVENT_NAMES", "EV_EVENT_TAG", "EV_NO_ACTION", "Event", "extend", "replay"]

EV_NO_ACTION: Final = 0x3
EV_SEPARATOR: Final = 0x4
EV_EVENT_TAG: Final = 0x6
EV_EFI_VARIABLE_BOOT: Final = 0x80000002

EVENT_NAMES: Final = {
    0x1: "EV_POST_CODE", 0x3: "EV_NO_ACTION", 0x4: "EV_SEPARATOR", 0x5: "EV_ACTION", 0x6: "EV_EVENT_TAG",
    0x8: "EV_S_CRTM_VERSION", 0xA: "EV_PLATFORM_CONFIG_FLAGS", 0xD: "EV_IPL",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG", 0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION", 0x80000006: "EV_EFI_GPT_EVENT", 0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB", 0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2", 0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}  # fmt: skip

_HASH_OF_DATA: Final = frozenset({EV_SEPARATOR, 0x80000001, 0x80000006, 0x80000007, 0x800000E0})
"""Types whose digest is SHA-384 of the event data. Measured on real logs; the others hash an image, a table, a blob."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event in log order.

    number     position in the log, from 1
    register   0 to 3 for RTMR0 to RTMR3; None for EV_NO_ACTION, which extends nothing
    digest     SHA-384, 48 bytes
    data       what stands beside the digest, at most 1 MiB
    authentic  True: the digest was recomputed from the data; False: a rule defines it and it differs; None: no rule,
               the data is a hint
    """

    number: int
    register: int | None
    type: int
    digest: bytes
    data: bytes = field(repr=False)
    authentic: bool | None

    @property
    def type_name(self) -> str:
        return EVENT_NAMES.get(self.type, f"0x{self.type:x}")

    @property
    def label(self) -> str:
        """For people: register, number and type. No event data, which may be anything."""
        where = "no register" if self.register is None else f"rtmr{self.register}"
        return f"{where} event {self.number} {self.type_name}"


def recompute(register: int | None, event_type: int, digest: bytes, data: bytes) -> bool | None:
    """Whether *digest* is what the rule for this type makes of *data*; None where no rule is defined."""
    if register is None:
        return None
    if event_type in _HASH_OF_DATA or (event_type == EV_EVENT_TAG and register == 3):
        return hashlib.sha384(data).digest() == digest
    if event_type == EV_EFI_VARIABLE_BOOT:
        variable = _variable_data(data)
        return variable is not None and hashlib.sha384(variable).digest() == digest
    return None


def _variable_data(data: bytes) -> bytes | None:
    """The contents in UEFI_VARIABLE_DATA: guid 16 · name length u64 (characters) · size u64 · name · contents."""
    if len(data) < 32:
        return None
    name, size = struct.unpack_from("<QQ", data, 16)
    return data[32 + 2 * name :] if 32 + 2 * name + size == len(data) else None


def extend(register: bytes, digest: bytes) -> bytes:
    """TDG.MR.RTMR.EXTEND: SHA-384(register ‖ digest), 48 bytes each (Intel TDX Module ABI)."""
    return hashlib.sha384(register + digest).digest()


def replay(events: Iterable[Event]) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR0 to RTMR3 as these events leave them, starting from zero."""
    values = [bytes(48)] * 4
    for event in events:
        if event.register is not None:
            values[event.register] = extend(values[event.register], event.digest)
    return values[0], values[1], values[2], values[3]
