"""What the boot reads or claims beside the configuration: appraisal policy, golden answers, the runtime directory.

Runs in the enclave at the first stage, and before an engine starts. Policy and answers are files whose digests the
measured configuration or image covers; the directory must be ours alone: sockets that carry plaintext lie in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import IO, Any, Final

from attestation.errors import InputError
from attestation.policy import Policy, Skip
from enclave.settings import Settings

__all__ = ["appraisal_policy", "golden_answers", "own_runtime", "private_directory"]

MAX_POLICY: Final = 256 * 1024
MAX_GOLDEN: Final = 1024 * 1024


def appraisal_policy(settings: Settings) -> Policy:
    """The appraisal policy, whose bytes the configuration pins."""
    with settings.appraisal.policy.open("rb") as file:
        raw = file.read(MAX_POLICY + 1)
    digest = hashlib.sha256(raw).digest()
    if digest != settings.appraisal.sha256:
        raise InputError(
            "INPUT_APPRAISAL",
            f"the appraisal policy {settings.appraisal.policy} is not the one the configuration pins",
            expected=settings.appraisal.sha256,
            actual=digest,
            hint="restore the file, or measure the new one into the configuration",
        )
    try:
        policy = Policy.parse(raw.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise InputError("INPUT_APPRAISAL", "the appraisal policy is not UTF-8") from err
    if (settings.gpu.count > 0) == isinstance(policy.gpu, Skip):
        raise InputError(
            "INPUT_APPRAISAL",
            "configuration and appraisal policy disagree about the GPU",
            expected="a [gpu] table exactly when [gpu] count is above 0",
            actual=f"count {settings.gpu.count}",
            hint="correct the count, or measure a policy for this kind of machine into the configuration",
        )
    return policy


def own_runtime(runtime: Path) -> IO[str]:
    """The runtime directory, private and ours alone while the lock is held."""
    lock = (private_directory(runtime) / "lock").open("w", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        lock.close()
        raise InputError(
            "INPUT_RUNTIME_BUSY", f"another enclave runs in {runtime}", hint="stop it, or configure another `runtime`"
        ) from err
    return lock


def private_directory(folder: Path) -> Path:
    """*folder*, made when absent, with mode 0700 and our owner: sockets that carry plaintext lie in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as err:
        raise InputError("INPUT_RUNTIME", f"cannot make {folder}: {err.strerror}") from err
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise InputError(
            "INPUT_RUNTIME", f"{folder} is open to others", expected="mode 0700, our owner", hint=f"chmod 700 {folder}"
        )
    return folder


def golden_answers(path: Path) -> list[dict[str, Any]]:  # Any: JSON values, checked by the self-test
    with path.open("rb") as file:
        raw = file.read(MAX_GOLDEN + 1)
    try:
        golden = json.loads(raw) if len(raw) <= MAX_GOLDEN else None
    except ValueError:
        golden = None
    if not isinstance(golden, list) or not all(isinstance(g, dict) for g in golden):
        raise InputError(
            "INPUT_GOLDEN", f"{path} holds no golden answers", expected="a JSON list of objects, at most 1 MiB"
        )
    return golden
