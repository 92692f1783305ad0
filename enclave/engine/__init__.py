"""Engines: an ASGI app that speaks OpenAI's HTTP inside this process, and a lifecycle around it.

The only folder that touches vLLM. `load` knows the profiles a measured configuration may name; the echo engine of
the tests is not among them, so no configuration can put it into service.
"""

from __future__ import annotations

from pathlib import Path

from enclave.engine.base import Engine, EngineError, Model
from enclave.engine.profiles import PROFILES

__all__ = ["Engine", "EngineError", "Model", "load"]


def load(model: Model, runtime: Path) -> Engine:
    """The engine for one configured model, not started. *runtime* is a directory of mode 0700 for sockets and caches.

    Raises EngineError `ENGINE_PROFILE` for a profile that does not exist. vLLM is imported by `start`, not here."""
    profile = PROFILES.get(model.profile)
    if profile is None:
        raise EngineError(
            "ENGINE_PROFILE",
            "the configuration names an unknown engine profile",
            expected=", ".join(sorted(PROFILES)),
            actual=model.profile,
        )
    from enclave.engine.vllm import VllmEngine

    return VllmEngine(model, profile, runtime)
