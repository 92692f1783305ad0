"""The boot that the simulated machine remembers: a CCEL whose replay gives RTMR0, RTMR1 and RTMR2.

The events are those of an OVMF (edk2 2025.02) direct boot of a unified kernel image with systemd-stub, in their
order and with their types. Where a rule says how a digest follows from the event data (variables, separators,
actions) it does; what stands for an image or a blob is the digest of its simulated name.

Sources: TCG PC Client Platform Firmware Profile §10 (records), ACPI 6.5 §5.2.34 (CCEL), UEFI
EFI_CC_MEASUREMENT_PROTOCOL (register map). Pure.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tests.devtee.tdx import measured

__all__ = ["Event", "boot_events", "ccel_log", "ccel_table", "replay"]

LOG_AREA: Final = 64 * 1024
LOG_ADDRESS: Final = 0x7F000000
SHA384: Final = 0x000C

SEPARATOR: Final = 0x4
EVENT_TAG: Final = 0x6
CONFIG_FLAGS: Final = 0xA
IPL: Final = 0xD
VARIABLE_CONFIG: Final = 0x80000001
VARIABLE_BOOT: Final = 0x80000002
BOOT_APPLICATION: Final = 0x80000003
ACTION: Final = 0x80000007
FIRMWARE_BLOB2: Final = 0x8000000A
HANDOFF_TABLES2: Final = 0x8000000B

_GLOBAL: Final = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_IMAGE_SECURITY: Final = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"


@dataclass(frozen=True, slots=True)
class Event:
    """One record. rtmr 0 to 3 (the log's index is one more), digest SHA-384, data as the firmware would write it."""

    rtmr: int
    kind: int
    digest: bytes
    data: bytes


def boot_events(cmdline: str = "console=hvc0 quiet", kernel: str = "kernel", initrd: str = "initrd") -> list[Event]:
    """The events of one boot. Another *cmdline*, *kernel* or *initrd* changes the registers it would change."""

    def plain(rtmr: int, kind: int, data: bytes) -> Event:
        return Event(rtmr, kind, hashlib.sha384(data).digest(), data)

    zero = bytes(4)
    boot0000 = _variable(_GLOBAL, "Boot0000", b"\x09\x01\0\0\0\0" + "UiApp".encode("utf-16-le") + b"\0\0")
    order = _variable(_GLOBAL, "BootOrder", b"\0\0")
    image = b"\0" * 32 + "SIMULATED UKI".encode("utf-16-le")
    rtmr0 = [
        Event(0, HANDOFF_TABLES2, measured("TD HOB"), b"\x03HOB" + bytes(20)),
        Event(0, FIRMWARE_BLOB2, measured("CFV"), b"\x0bTdx CFV\0\0\0\0" + struct.pack("<QQ", 0xFFC00000, 0x84000)),
        *(plain(0, VARIABLE_CONFIG, _variable(_GLOBAL, name, b"")) for name in ("SecureBoot", "PK", "KEK")),
        *(plain(0, VARIABLE_CONFIG, _variable(_IMAGE_SECURITY, name, b"")) for name in ("db", "dbx")),
        plain(0, SEPARATOR, zero),
        *(Event(0, CONFIG_FLAGS, measured(f"fw_cfg {n}"), b"ACPI DATA\0") for n in ("loader", "rsdp", "tables")),
        Event(0, VARIABLE_BOOT, hashlib.sha384(b"\0\0").digest(), order),
        Event(0, VARIABLE_BOOT, hashlib.sha384(boot0000[48:]).digest(), boot0000),
    ]
    rtmr1 = [
        Event(1, BOOT_APPLICATION, measured(f"UKI {kernel} {initrd}"), image),
        plain(1, ACTION, b"Calling EFI Application from Boot Option"),
        plain(1, SEPARATOR, zero),
        Event(1, BOOT_APPLICATION, measured(f".linux {kernel}"), image),
        plain(1, ACTION, b"Exit Boot Services Invocation"),
        plain(1, ACTION, b"Exit Boot Services Returned with Success"),
    ]
    rtmr2 = []
    sections = {
        ".linux": kernel.encode(),
        ".osrel": b"ID=vouchsafe-devtee\n",
        ".cmdline": cmdline.encode(),
        ".initrd": initrd.encode(),
        ".uname": b"6.18.0-devtee",
    }
    for name, content in sections.items():
        note = name.encode("utf-16-le") + b"\0\0"
        rtmr2 += [
            Event(2, IPL, hashlib.sha384(name.encode() + b"\0").digest(), note),
            Event(2, IPL, hashlib.sha384(content).digest(), note),
        ]
    wide = cmdline.encode("utf-16-le") + b"\0\0"
    rtmr2 += [
        Event(2, EVENT_TAG, hashlib.sha384(wide).digest(), _tagged(0x8F3B22ED, b"LOADED_IMAGE::LoadOptions\0")),
        Event(2, EVENT_TAG, measured(f"initrd {initrd}"), _tagged(0x8F3B22EC, b"Linux initrd\0")),
    ]
    return [*rtmr0, *rtmr1, *rtmr2]


def replay(events: Iterable[Event]) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR0 to RTMR3 after *events*: each extends its register with SHA-384(register ‖ digest)."""
    registers = [bytes(48)] * 4
    for event in events:
        registers[event.rtmr] = hashlib.sha384(registers[event.rtmr] + event.digest).digest()
    return registers[0], registers[1], registers[2], registers[3]


def ccel_log(events: Iterable[Event], area: int = LOG_AREA) -> bytes:
    """The log area: the Spec ID record, the events, and 0xff to the end as edk2 fills it."""
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, SHA384, 48, 0)
    out = [struct.pack("<II20sI", 1, 3, bytes(20), len(spec)), spec]
    for event in events:
        out.append(struct.pack("<IIIH", event.rtmr + 1, event.kind, 1, SHA384))
        out.append(event.digest + struct.pack("<I", len(event.data)) + event.data)
    log = b"".join(out)
    if len(log) > area:
        raise ValueError(f"the events need {len(log)} bytes, the log area has {area}")
    return log.ljust(area, b"\xff")


def ccel_table(area: int = LOG_AREA) -> bytes:
    """The 56 bytes of the ACPI table that names the log area: cc_type 2 is TDX."""
    head = b"CCEL" + struct.pack("<IBB", 56, 1, 0) + b"SIMDEV" + b"DEVTEE  " + struct.pack("<I4sI", 1, b"VCHS", 1)
    table = bytearray(head + struct.pack("<BBHQQ", 2, 0, 0, area, LOG_ADDRESS))
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _variable(guid: str, name: str, data: bytes) -> bytes:
    """UEFI_VARIABLE_DATA: for an eight-character name the data begin at 48."""
    wide = name.encode("utf-16-le")
    return uuid.UUID(guid).bytes_le + struct.pack("<QQ", len(name), len(data)) + wide + data


def _tagged(tag: int, data: bytes) -> bytes:
    """TCG_PCClientTaggedEvent."""
    return struct.pack("<II", tag, len(data)) + data
