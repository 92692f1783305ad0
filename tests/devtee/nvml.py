"""The driver behind the NVML stand-in (`nvml.c`): a unix socket that answers one fixed-size request per connection.

Request (48 bytes, native order): magic, operation, device index, argument (u32 each), nonce (32 bytes). Reply:
magic, NVML status, length (u32 each), payload. Everything is bounded: connections, their age, the size of both.

Runs in the development TEE's own loop; never blocks.
"""

from __future__ import annotations

import selectors
import shutil
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.devtee.gpu import GpuForm
from tests.devtee.tee import DevTee

__all__ = ["GpuSystem", "NvmlServer", "build_library", "write_pci"]

MAGIC: Final = 0x4C4D564E
REQUEST: Final = struct.Struct("=IIII32s")
REPLY: Final = struct.Struct("=III")
MAX_CONNECTIONS: Final = 64
MAX_AGE: Final = 5.0
HOPPER: Final = 9
INVALID_ARGUMENT: Final = 2
NO_PERMISSION: Final = 4


@dataclass(frozen=True, slots=True)
class GpuSystem:
    """What the driver says about the machine; NVML's numbers.

    gpus: devices listed. duplicate: every device is really the first one. environment 2 production, 1 simulation;
    cc_feature 1 on; dev_tools 1 on; multi_gpu 0 none, 1 protected PCIe, 2 NVLink encryption; cpu_caps 2 TDX.
    ready_locked: the ready state cannot be set, as after a failed attestation. form: what the reports say;
    foreign_form: what the report of the last device says instead. unlisted: GPUs on the PCI bus that the driver does
    not list; foreign_display: a display device of another vendor beside them.
    """

    gpus: int = 1
    duplicate: bool = False
    environment: int = 2
    cc_feature: int = 1
    dev_tools: int = 0
    multi_gpu: int = 0
    cpu_caps: int = 2
    ready_locked: bool = False
    form: GpuForm = field(default_factory=GpuForm)
    foreign_form: GpuForm | None = None
    unlisted: int = 0
    foreign_display: bool = False


def build_library(folder: Path) -> Path:
    """Compile the stand-in into *folder* with the system's C compiler. Raises `RuntimeError` with its words."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler (cc) is on the path: install gcc, the NVML stand-in is built at start")
    folder.mkdir(parents=True, exist_ok=True)
    target, fresh = folder / "libnvidia-ml.so.1", folder / ".libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    done = subprocess.run([compiler, *flags, "-o", fresh, source, "-ldl"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"the NVML stand-in does not compile:\n{done.stderr}")
    fresh.replace(target)
    return target


@dataclass(slots=True)
class _Connection:
    end: float
    data: bytes = b""


class NvmlServer:
    """Listens on *path* for the machine of *tee*. `ready` is the GPUs' ready state, 0 at boot."""

    def __init__(self, path: Path, tee: DevTee, system: GpuSystem) -> None:
        if not 1 <= system.gpus <= tee.pki.gpus and not system.duplicate:
            raise ValueError(f"this machine has identities for {tee.pki.gpus} GPUs, {system.gpus} were asked for")
        self._tee, self._system, self.ready = tee, system, 0
        path.unlink(missing_ok=True)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._open: dict[socket.socket, _Connection] = {}

    def wait(self, seconds: float) -> None:
        """Answer what arrives within *seconds*: the machine's loop sleeps here."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.fileobj, socket.socket):
                self._read(key.fileobj)
        for connection in [c for c, state in self._open.items() if state.end < time.monotonic()]:
            self._drop(connection)

    def close(self) -> None:
        for connection in list(self._open):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            if len(self._open) >= MAX_CONNECTIONS:
                connection.close()
                return
            connection.setblocking(False)
            self._open[connection] = _Connection(time.monotonic() + MAX_AGE)
            self._selector.register(connection, selectors.EVENT_READ, None)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._open[connection]
        connection.close()

    def _read(self, connection: socket.socket) -> None:
        state = self._open[connection]
        try:
            got = connection.recv(REQUEST.size - len(state.data))
        except BlockingIOError:
            return
        except OSError:
            got = b""
        state.data += got
        if got and len(state.data) < REQUEST.size:
            return
        # At most 9 KiB: fits the socket's buffer, so this does not block and a client that is gone costs nothing.
        with suppress(OSError):
            if len(state.data) == REQUEST.size:
                connection.sendall(self.answer(state.data))
        self._drop(connection)

    def answer(self, request: bytes) -> bytes:
        """The reply to one request."""
        magic, operation, index, argument, nonce = REQUEST.unpack(request)
        handler = self._operations().get(operation)
        if magic != MAGIC or handler is None or index >= self._system.gpus:
            return REPLY.pack(MAGIC, INVALID_ARGUMENT, 0)
        payload = handler(index, argument, nonce)
        if isinstance(payload, int):
            return REPLY.pack(MAGIC, payload, 0)
        return REPLY.pack(MAGIC, 0, len(payload)) + payload

    def _operations(self) -> dict[int, Callable[[int, int, bytes], bytes | int]]:
        """By the numbers of `nvml.c`. A handler gives the payload, or an NVML status that is not success."""
        s = self._system
        words = struct.pack
        return {
            1: lambda i, a, n: words("=I", s.gpus),
            2: lambda i, a, n: f"GPU-{self._identity(i)}".encode(),
            3: lambda i, a, n: b"SIM NVIDIA H100 80GB HBM3",
            4: lambda i, a, n: _pci(i),
            5: lambda i, a, n: self._form(i).driver.encode(),
            6: lambda i, a, n: self._form(i).vbios.encode(),
            7: lambda i, a, n: words("=I", HOPPER),
            8: lambda i, a, n: words("=III", s.environment, s.cc_feature, s.dev_tools),
            9: lambda i, a, n: words("=IIII", s.environment, s.cc_feature, s.dev_tools, s.multi_gpu),
            10: lambda i, a, n: words("=II", s.cpu_caps, 1),
            11: lambda i, a, n: words("=I", self.ready),
            12: lambda i, a, n: self._set_ready(a),
            13: lambda i, a, n: self._tee.gpu_report(n, self._device(i), self._form(i))[0],
            14: lambda i, a, n: self._tee.pki.device_chain(self._device(i)),
            15: lambda i, a, n: words("=QQ", 80 << 20, 0),
            16: lambda i, a, n: words("=I", 0x100 + i),
        }

    def _device(self, index: int) -> int:
        return 0 if self._system.duplicate else index

    def _identity(self, index: int) -> uuid.UUID:
        return uuid.uuid5(uuid.NAMESPACE_OID, str(self._tee.pki[f"device-ik-{self._device(index)}"].cert.serial_number))

    def _form(self, index: int) -> GpuForm:
        foreign = self._system.foreign_form
        return foreign if foreign is not None and index == self._system.gpus - 1 else self._system.form

    def _set_ready(self, state: int) -> bytes | int:
        if self._system.ready_locked:
            return NO_PERMISSION
        self.ready = state
        return b""


def write_pci(folder: Path, system: GpuSystem) -> None:
    """The kernel's list of PCI functions, as sysfs has it: a network card, the machine's GPUs, and its lies."""
    shutil.rmtree(folder, ignore_errors=True)
    functions = {"0000:00:01.0": ("0x020000", "0x1af4")}
    for index in range(system.gpus + system.unlisted):
        functions[f"0000:{_bus(index):02x}:00.0"] = ("0x030200", "0x10de")
    if system.foreign_display:
        functions["0000:00:02.0"] = ("0x030000", "0x1234")
    for name, (kind, vendor) in functions.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "class").write_text(kind + "\n")
        (folder / name / "vendor").write_text(vendor + "\n")


def _bus(index: int) -> int:
    return 0x10 + 0x10 * index


def _pci(index: int) -> bytes:
    """nvmlPciInfo_t: legacy id, domain, bus, device, vendor and device id (H100 SXM), subsystem, bus id."""
    bus = _bus(index)
    legacy, full = f"0000:{bus:02X}:00.0".encode(), f"00000000:{bus:02X}:00.0".encode()
    return struct.pack("=16sIIIII32s", legacy, 0, bus, 0, 0x233010DE, 0x16C110DE, full)
