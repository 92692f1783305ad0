"""Start `python -m tests.devtee` for a test, and stop it again whatever happens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["running_machine"]

REPOSITORY: Final = Path(__file__).resolve().parents[2]


@contextmanager
def running_machine(state: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A development TEE that serves *state*, ready when the block begins and gone when it ends."""
    command = [sys.executable, "-m", "tests.devtee", "--state", str(state), "--follow-parent", *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # ends with the process, so it needs no deadline of its own
            if not line.startswith("devtee: ready "):
                raise RuntimeError(f"the development TEE did not start: status {process.wait(5)}, said {line!r}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
