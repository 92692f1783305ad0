"""What happens inside the engine's child processes: their log door, and an end with their parent.

vLLM starts its engine core as a child and gives it no reason to die: if this process is killed outright, the child
goes on holding prompts and their KV cache. The logging configuration is the one piece of ours that every child loads
before it loads a model, so `handler` is where the child ties its life to its parent's. The cgroup around the whole
service is the first layer; this is the second.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

from enclave.telemetry import LibraryHandler

__all__ = ["FRONT", "FACTORY", "handler", "die_with_parent"]

FRONT: Final = "VOUCHSAFE_ENGINE_FRONT"
"""Environment: pid of the process that serves, which must not tie itself to its own parent."""
FACTORY: Final = "enclave.engine.child.handler"
_PR_SET_PDEATHSIG: Final = 1


def handler() -> LibraryHandler:
    """Factory named by the logging configuration."""
    if os.environ.get(FRONT) not in (None, str(os.getpid())):
        die_with_parent()
    return LibraryHandler()


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent ends (prctl(2)); end at once when it has ended already.

    *parent*, where it is known, is who started this process: one that ended before this call is noticed too."""
    parent = os.getppid() if parent is None else parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent or parent == 1:
        os._exit(1)
