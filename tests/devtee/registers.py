"""A directory shaped like `/sys/devices/virtual/misc/tdx_guest/measurements`: 48 raw bytes per register.

A write of exactly 48 bytes at offset 0 of an rtmr file extends that register; the file then holds the new value. A
foreign write is told from our own by the modification time, which we set to a mark after each of ours. Files are
written in place and never replaced, so that a writer's open descriptor stays the register.

Runs in the development TEE's own loop; never blocks. Writers must be serialised, as they are by the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.devtee.tdx import Td

__all__ = ["Registers"]

MARK: Final = 1_000_000_000
SIZE: Final = 48


class Registers:
    """Serves *path* for a TD whose registers *td* gives and *extend* changes."""

    def __init__(self, path: Path, td: Callable[[], Td], extend: Callable[[int, bytes], bytes]) -> None:
        self._path, self._td, self._extend = path, td, extend
        path.mkdir(parents=True, exist_ok=True)
        now = td()
        for name, value in (
            ("mrtd:sha384", now.mrtd),
            ("mrconfigid", now.mrconfigid),
            ("mrowner", now.mrowner),
            ("mrownerconfig", now.mrownerconfig),
        ):
            (path / name).unlink(missing_ok=True)
            (path / name).write_bytes(value)
            (path / name).chmod(0o444)
        for index, value in enumerate(now.rtmr):
            self._write(index, value)

    def poll(self) -> None:
        """Look once at the four registers and extend where somebody wrote."""
        for index in range(4):
            file = self._file(index)
            found = file.stat()
            if found.st_mtime_ns == MARK or found.st_size == 0:
                continue  # ours, or a writer between truncating and writing
            before = self._td().rtmr[index]
            os.utime(file, ns=(MARK, MARK))
            written = file.read_bytes()
            # Another length is EINVAL on hardware; a short write leaves our own tail in place. The register's own
            # value is a digest like any other (zeros on a fresh register).
            if len(written) == SIZE and (written[-8:] != before[-8:] or written == before):
                self._write(index, self._extend(index, written))
            else:
                self._write(index, before)

    def _file(self, index: int) -> Path:
        return self._path / f"rtmr{index}:sha384"

    def _write(self, index: int, value: bytes) -> None:
        file = self._file(index)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(handle, value, 0)
            os.ftruncate(handle, SIZE)
            os.utime(handle, ns=(MARK, MARK))
        finally:
            os.close(handle)
