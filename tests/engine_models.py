"""What the engine host is asked to serve: `[[models]]` of a configuration, as data for a command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from enclave.engine.base import Task
from enclave.weights import file_list_digest


@dataclass(frozen=True)
class Model:
    """As `[[models]]` of the configuration gives it."""

    path: Path
    id: str = "parrot"
    golden: Path | None = None
    profile: str = "cpu"
    placement: Literal["in-process", "process"] = "in-process"
    task: Task = "generate"
    memory_percent: int = 10
    max_model_len: int = 2048

    @property
    def weights(self) -> str:
        return file_list_digest(self.path)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Model:
        return cls(**{k: Path(v) if k in ("path", "golden") and v else v for k, v in fields.items()})

    def fields(self) -> dict[str, Any]:
        return {f.name: v if not isinstance(v := getattr(self, f.name), Path) else str(v) for f in fields(self)}
