"""The TDX attester: quotes through configfs-tsm, RTMR3 through sysfs, the event log through ACPI (TDX facts §3).

Runs in the enclave, the only place that may. Three directories of the measured configuration:

    tsm_dir    /sys/kernel/config/tsm/report (Linux ABI configfs-tsm, kernel >= 6.7)
    rtmr_dir   /sys/devices/virtual/misc/tdx_guest/measurements (kernel >= 6.16)
    ccel_dir   /sys/firmware/acpi/tables (CCEL and data/CCEL)

The host that signs quotes is not trusted: it can be slow, silent or wrong, never harmful. Every wait has a bound, every
read a cap, and a quote that does not hold the bytes that were asked for is not returned.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from attestation.attester.base import AttesterError
from attestation.errors import FormatError
from attestation.tdx.ccel import MAX_LOG, EventLog
from attestation.tdx.events import extend
from attestation.tdx.quote import Quote, canonical_length

__all__ = ["TdxAttester"]

T = TypeVar("T")

PROVIDER: Final = "tdx_guest"
MAX_RAW: Final = 32 * 1024
"""Bytes of outblob. Platforms pad to 8,000 at most."""
ATTRIBUTE_WAIT: Final = 20.0
"""Seconds for attributes to appear and for a write to show. The kernel needs none."""
QUOTE_WAIT: Final = 60.0
"""Seconds for one quote. The kernel itself gives the host 30."""
ATTEMPTS: Final = 4
RETRY_PAUSE: Final = 0.05
POLL: Final = 0.002
_RETRIED: Final = frozenset({errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.EWOULDBLOCK, errno.EAGAIN})
_TABLE_SIZE: Final = 56
_CC_TYPE_TDX: Final = 2
_AZURE: Final = "on Azure a paravisor stands between the TD and the TDX module: this release does not support it"


class _Raced(Exception):
    """Somebody else wrote to our entry, or the platform was busy: worth another attempt."""


class TdxAttester:
    """Evidence of the TD this process runs in. Thread-safe: one lock, one request at a time."""

    def __init__(self, tsm_dir: Path, rtmr_dir: Path, ccel_dir: Path, *, quote_wait: float = QUOTE_WAIT) -> None:
        self._tsm_dir, self._rtmr_dir, self._ccel_dir = tsm_dir, rtmr_dir, ccel_dir
        self._quote_wait = quote_wait
        self._lock = threading.Lock()
        self._entry: Path | None = None
        self._entry_pid = 0

    def quote(self, report_data: bytes) -> bytes:
        """A quote over *report_data* (64 bytes), cut to its canonical length. Raises `AttesterError`."""
        if len(report_data) != 64:
            raise AttesterError("ATTESTER_REPORT_DATA", "report_data has another length", expected=64,
                                actual=len(report_data))  # fmt: skip
        with self._lock:
            deadline = time.monotonic() + self._quote_wait
            last = "no attempt"
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(RETRY_PAUSE * attempt)
                try:
                    return self._exchange(bytes(report_data), deadline)
                except _Raced as err:
                    last = str(err)
                if time.monotonic() >= deadline:
                    break
            raise AttesterError(
                "ATTESTER_BUSY", f"no quote after {ATTEMPTS} attempts: {last}",
                hint="does another program write to our configfs entry? is the quote service up?",
            )  # fmt: skip

    def extend_rtmr3(self, digest: bytes) -> None:
        """Extend RTMR3 by *digest* (48 bytes) and wait until the register shows it. Raises `AttesterError`."""
        if len(digest) != 48:
            raise AttesterError("ATTESTER_RTMR", "a digest has another length", expected=48, actual=len(digest))
        with self._lock:
            wanted = extend(self._register(3), bytes(digest))
            try:
                handle = os.open(self._register_file(3), os.O_WRONLY | os.O_CLOEXEC)
                try:
                    written = os.write(handle, digest)
                finally:
                    os.close(handle)
            except OSError as err:
                raise _system("ATTESTER_RTMR", "RTMR3 cannot be extended", err, "kernel 6.16 or later?") from err
            if written != 48:
                raise AttesterError("ATTESTER_RTMR", "a short write to RTMR3", expected=48, actual=written)
            if _wait(lambda: self._register(3) == wanted or None, ATTRIBUTE_WAIT) is None:
                raise AttesterError("ATTESTER_RTMR", "RTMR3 holds another value after the extend", expected=wanted,
                                    actual=self._register(3), hint="does another program extend RTMR3?")  # fmt: skip

    def read_rtmr(self, index: int) -> bytes:
        """RTMR *index* (0 to 3), 48 bytes. Raises `AttesterError`."""
        if index not in range(4):
            raise AttesterError("ATTESTER_RTMR", "no such register", expected="0 to 3", actual=index)
        with self._lock:
            return self._register(index)

    def event_log(self) -> bytes:
        """The CCEL area cut at its end marker, after the table was checked. Raises `AttesterError`."""
        with self._lock:
            area = self._ccel_area()
            data = _read(self._ccel_dir / "data" / "CCEL", area, "ATTESTER_CCEL")
        try:
            log = EventLog.parse(data)
        except FormatError as err:
            raise AttesterError("ATTESTER_CCEL", f"the event log cannot be read: {err.reason}") from err
        return data[: log.used]

    def close(self) -> None:
        """Remove the entry. On a directory that is not configfs it is not empty: left to whoever serves it."""
        with self._lock:
            if self._entry is not None and self._entry_pid == os.getpid():
                with suppress(OSError):
                    self._entry.rmdir()
            self._entry = None

    def _exchange(self, report_data: bytes, deadline: float) -> bytes:
        """One write of inblob, one read of outblob, nobody else in between."""
        entry = self._own_entry()
        before = _generation(entry)
        try:
            handle = os.open(entry / "inblob", os.O_WRONLY | os.O_CLOEXEC)
            try:
                written = os.write(handle, report_data)
            finally:
                os.close(handle)  # the kernel takes a binary attribute over on close
        except OSError as err:
            raise _retried(err, "inblob cannot be written") from err
        if written != len(report_data):
            raise AttesterError("ATTESTER_TSM", "a short write to inblob", expected=len(report_data), actual=written)
        _wait(lambda: _generation(entry) != before or None, ATTRIBUTE_WAIT)
        if (seen := _generation(entry)) != before + 1:
            raise _Raced(f"generation went from {before} to {seen}, not by one")
        raw = _read_blocking(entry / "outblob", deadline)
        if (after := _generation(entry)) != before + 1:
            raise _Raced(f"generation is {after} after the read, {before + 1} expected")
        try:
            cut = raw[: canonical_length(raw)]
            got = Quote.parse(cut).body.report_data
        except FormatError as err:
            raise AttesterError("ATTESTER_QUOTE", f"the platform returned no quote: {err}",
                                hint="is the quote generation service running on the host?") from err  # fmt: skip
        if got != report_data:
            raise _Raced("the quote holds other report data than was asked for")
        return cut

    def _own_entry(self) -> Path:
        """This process's one entry, made on first use under a random name, its attributes there."""
        if self._entry is not None and self._entry_pid == os.getpid():
            return self._entry
        entry = self._tsm_dir / f"vouchsafe-{secrets.token_hex(8)}"
        try:
            entry.mkdir(mode=0o700)
        except OSError as err:
            raise _system("ATTESTER_TSM", "no configfs-tsm entry can be made", err,
                          f"is this a TDX guest with kernel 6.7 or later? {_AZURE}") from err  # fmt: skip
        names = ("generation", "provider", "outblob", "inblob")
        if _wait(lambda: all((entry / n).exists() for n in names) or None, ATTRIBUTE_WAIT) is None:
            with suppress(OSError):
                entry.rmdir()
            raise AttesterError("ATTESTER_TSM", "the entry's attributes did not appear", expected=", ".join(names),
                                hint="is the directory configfs?")  # fmt: skip
        provider = _read(entry / "provider", 64, "ATTESTER_TSM").decode("ascii", "replace").strip()
        if provider != PROVIDER:
            with suppress(OSError):
                entry.rmdir()
            raise AttesterError("ATTESTER_PROVIDER", "another quote provider", expected=PROVIDER, actual=provider,
                                hint=f"a TDX guest on bare metal or GCP; {_AZURE}")  # fmt: skip
        self._entry, self._entry_pid = entry, os.getpid()
        return entry

    def _register_file(self, index: int) -> Path:
        return self._rtmr_dir / f"rtmr{index}:sha384"

    def _register(self, index: int) -> bytes:
        value = _read(self._register_file(index), 48, "ATTESTER_RTMR")
        if len(value) != 48:
            raise AttesterError("ATTESTER_RTMR", f"RTMR{index} reads short", expected=48, actual=len(value))
        return value

    def _ccel_area(self) -> int:
        """Check the CCEL table (ACPI §5.2.6 header, then type, subtype, area); the area's size, capped."""
        table = _read(self._ccel_dir / "CCEL", _TABLE_SIZE, "ATTESTER_CCEL")
        if len(table) != _TABLE_SIZE or table[:4] != b"CCEL" or struct.unpack_from("<I", table, 4)[0] != _TABLE_SIZE:
            raise AttesterError("ATTESTER_CCEL", "not a CCEL table", expected=f"CCEL, {_TABLE_SIZE} bytes",
                                actual=len(table))  # fmt: skip
        if table[10:16] == b"VRTUAL" or table[16:24] == b"MICROSFT":
            raise AttesterError("ATTESTER_PROVIDER", "the firmware tables are those of Azure", hint=_AZURE)
        if sum(table) % 256 != 0:
            raise AttesterError(
                "ATTESTER_CCEL", "the CCEL table's checksum is wrong", expected=0, actual=sum(table) % 256
            )
        if table[36] != _CC_TYPE_TDX:
            raise AttesterError("ATTESTER_CCEL", "the event log is not a TD's", expected=_CC_TYPE_TDX, actual=table[36])
        area = int(struct.unpack_from("<Q", table, 40)[0])
        if not 0 < area <= MAX_LOG:
            raise AttesterError("ATTESTER_CCEL", "size of the log area", expected=f"1 to {MAX_LOG}", actual=area)
        return area


def _wait(ask: Callable[[], T | None], seconds: float) -> T | None:
    """What *ask* answers once it is not None; None when *seconds* have passed."""
    deadline = time.monotonic() + seconds
    while (answer := ask()) is None:
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL)
    return answer


def _read(file: Path, limit: int, code: str) -> bytes:
    """At most *limit* bytes; more is an error, because then the file is not what it should be."""
    try:
        with file.open("rb", buffering=0) as handle:
            data = bytearray()
            while len(data) <= limit and (part := handle.read(limit + 1 - len(data))):
                data += part
    except OSError as err:
        raise _system(code, f"{file.name} cannot be read", err, f"looked in {file.parent}") from err
    if len(data) > limit:
        raise AttesterError(code, f"{file.name} is too long", expected=f"<= {limit} bytes", actual=f"> {limit}")
    return bytes(data)


def _generation(entry: Path) -> int:
    text = _read(entry / "generation", 32, "ATTESTER_TSM").strip()
    if not text.isdigit():
        raise AttesterError("ATTESTER_TSM", "generation is no number", expected="digits", actual=f"{len(text)} bytes")
    return int(text)


def _read_blocking(file: Path, deadline: float) -> bytes:
    """All of *file*, waiting for the platform until *deadline*. On configfs the wait is inside read(), bounded by the
    kernel; on a FIFO it is in poll(), bounded here."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _drain(handle, deadline)
        finally:
            os.close(handle)
    except OSError as err:
        raise _retried(err, "outblob cannot be read") from err


def _drain(handle: int, deadline: float) -> bytes:
    data = bytearray()
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not watch.poll(left * 1000):
            raise AttesterError("ATTESTER_TIMEOUT", "the platform did not sign in time",
                                hint="is the quote generation service running on the host?")  # fmt: skip
        try:
            part = os.read(handle, MAX_RAW + 1 - len(data))
        except BlockingIOError:
            continue
        if not part:
            return bytes(data)
        data += part
        if len(data) > MAX_RAW:
            raise AttesterError("ATTESTER_QUOTE", "the platform returned too much", expected=f"<= {MAX_RAW} bytes")


def _retried(err: OSError, what: str) -> _Raced | AttesterError:
    if err.errno in _RETRIED:
        return _Raced(f"{what}: {os.strerror(err.errno or 0)}")
    return _system("ATTESTER_TSM", what, err, "")


def _system(code: str, what: str, err: OSError, hint: str) -> AttesterError:
    return AttesterError(code, f"{what}: {os.strerror(err.errno or 0)}", hint=hint)
