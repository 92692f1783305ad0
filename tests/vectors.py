"""Where the real evidence lies that Intel and NVIDIA signed. It is never copied into the project.

`VOUCHSAFE_VECTORS` names the folder; without it `../shared/vectors` beside the checkout is tried. A variable that
is set but names no folder is an error: a CI run must not pass by looking away.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_NAMED = os.environ.get("VOUCHSAFE_VECTORS")
VECTORS = Path(_NAMED) if _NAMED else Path(__file__).resolve().parents[1].parent / "shared" / "vectors"

if _NAMED and not VECTORS.is_dir():
    raise RuntimeError(f"VOUCHSAFE_VECTORS is set to {_NAMED}, which is not a folder")


def cases(kind: str) -> list[Path]:
    """Folders of the vectors of one kind (`tdx`, `gpu`, `measure`) that hold a `case.json`; empty when absent."""
    root = VECTORS / kind
    return sorted(p.parent for p in root.glob("*/case.json")) if root.is_dir() else []


def need_vectors() -> None:
    """Skip the calling test, saying where the vectors were looked for."""
    if not VECTORS.is_dir():
        pytest.skip(f"shared vectors are absent (looked in {VECTORS}; set VOUCHSAFE_VECTORS)")
