"""Child processes of the demo and of the end-to-end tests: started in a group of their own, ended by their own id.

A program says that it is ready by one line on stdout. What it prints is kept, so that a failure can show its reason.
Nothing outlives `stop()`: the whole group is ended, first asked, then forced.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


class Failed(Exception):
    """A stage failed: which, why, and the way out."""

    def __init__(self, stage: str, why: str, hint: str) -> None:
        super().__init__(why)
        self.stage, self.why, self.hint = stage, why, hint


class Process:
    """One running program. *tell* is called with each line it prints, for progress."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.lines, self._tell = name, list[str](), tell
        self._new = threading.Condition()
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if self._tell:
                self._tell(line.rstrip("\n"))
            with self._new:
                self.lines.append(line.rstrip("\n"))
                self._new.notify_all()
        with self._new:
            self._new.notify_all()

    def wait_for(self, text: str, *, seconds: float, hint: str) -> str:
        """The first line that contains *text*. Raises `Failed` when the program ends or takes longer."""
        deadline = time.monotonic() + seconds
        at = 0
        with self._new:
            while True:
                for line in self.lines[at:]:
                    if text in line:
                        return line
                at = len(self.lines)
                if self.popen.poll() is not None and not self._reader.is_alive():
                    raise Failed(self.name, f"ended with status {self.popen.returncode}: {self.last()}", hint)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Failed(self.name, f"was not ready after {seconds:.0f} s: {self.last()}", hint)
                self._new.wait(min(left, 0.2))

    def last(self, count: int = 3) -> str:
        """The last lines it printed, on one line."""
        return " | ".join(line for line in self.lines[-count:] if line) or "it printed nothing"

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def group(self) -> list[int]:
        """Process ids of its group that are still there (zombies aside)."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.popen.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return found

    def stop(self, *, seconds: float = 20) -> int:
        """Ask, wait, then force; returns the exit status. Safe to call twice."""
        if self.running:
            self.popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(seconds)
        if self.group():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        status = self.popen.wait(10)
        self._reader.join(5)
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        return status
