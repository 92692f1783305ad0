"""Engines: an ASGI app that speaks OpenAI's HTTP inside this process, and a lifecycle around it.

The only folder that touches vLLM. `load` knows the profiles a measured configuration may name; the echo engine of
the tests is not among them, so no configuration can put it into service.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from enclave.engine.base import Engine, EngineError, EngineGone, Model
from enclave.engine.profiles import PROFILES
from enclave.engine.uds import ProcessEngine

__all__ = ["Engine", "EngineError", "EngineGone", "Model", "load", "slots", "sweep"]


def load(model: Model, runtime: Path) -> Engine:
    """The engine for one configured model, not started: mounted here or in a process of its own, as its `placement`
    says. *runtime* is a directory of mode 0700 for sockets and caches.

    Raises EngineError `ENGINE_PROFILE` for a profile that does not exist. vLLM is imported by `start`, not here."""
    profile = PROFILES.get(model.profile)
    if profile is None:
        raise EngineError(
            "ENGINE_PROFILE",
            "the configuration names an unknown engine profile",
            expected=", ".join(sorted(PROFILES)),
            actual=model.profile,
        )
    if model.placement == "process":
        return ProcessEngine(model, runtime)
    from enclave.engine.vllm import VllmEngine

    return VllmEngine(model, profile, runtime)


def slots(model: Model) -> int:
    """How many requests the model's engine runs at a time; what comes beyond that waits in its queue."""
    return PROFILES[model.profile].slots


def sweep(models: Iterable[Model], folder: Path = Path("/dev/shm")) -> None:  # noqa: S108 - POSIX shared memory
    """Remove shared memory that killed engines left: it carried prompts. Only while no engine runs.

    Only under profiles whose user runs nothing else: a segment's name (`psm_…`, multiprocessing's) does not say whose
    it is. Python's resource tracker removes what a single engine leaves; this is for what outlived the tracker too."""
    if not all(PROFILES[m.profile].exclusive_uid for m in models if m.profile in PROFILES):
        return
    for segment in folder.glob("psm_*"):
        if segment.stat().st_uid == os.getuid():
            segment.unlink(missing_ok=True)
