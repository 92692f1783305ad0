"""Process engines for tests: the real worker and supervision, the echo engine inside, a back-off of milliseconds."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from enclave.engine.base import Task
from enclave.engine.uds import Backoff, ProcessEngine
from enclave.weights import file_list_digest

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Model:
    path: Path
    id: str = "parrot"
    weights: str = ""
    profile: str = "cpu"
    placement: Literal["in-process", "process"] = "process"
    task: Task = "generate"
    memory_percent: int = 10
    max_model_len: int = 2048


@dataclass
class Worker:
    """One engine and what its process does when asked."""

    folder: Path
    id: str = "parrot"
    task: Task = "generate"
    first: float = 0.01
    engine: ProcessEngine = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "model").mkdir(parents=True)
        (self.folder / "model" / "config.json").write_text("{}")
        (self.folder / "run").mkdir(mode=0o700)
        self.wish()
        weights = file_list_digest(self.folder / "model")
        model = Model(self.folder / "model", self.id, weights, task=self.task)
        program = (sys.executable, "-m", "tests.enclave.engine.echo_worker", str(self.folder / "wishes.json"))
        backoff = Backoff(self.first, self.first, lambda: 0.5)
        self.engine = ProcessEngine(model, self.folder / "run", program=program, backoff=backoff)

    def wish(self, **wishes: Any) -> None:
        path = self.folder / "wishes.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(wishes))
        fresh.replace(path)  # the worker reads it whenever it likes

    def seen(self, what: str) -> list[Any]:
        """`started`, `asked` or `calls`, as the processes wrote them."""
        path = self.folder / f"wishes.{what}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def sent(self) -> int:
        """Bytes of its last answer that the worker has got rid of."""
        path = self.folder / "wishes.sent"
        return int(path.read_text() or 0) if path.exists() else 0

    @property
    def pid(self) -> int:
        assert self.engine.pid is not None
        return self.engine.pid


async def until(holds: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while True:
            if holds():
                return
            await asyncio.sleep(0.01)
