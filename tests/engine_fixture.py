"""The real vLLM for tests, booted once per test run (`live_engine`) in a process of its own (`tests.engine_host`).

Three models side by side: the parrot mounted in process, the parrot again and the magpie as processes. Each takes about
2 GB and half a minute, and they start one after another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from enclave.engine import processes
from tests.enclave.api.client import Connection
from tests.engine_models import Model

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(os.environ.get("VOUCHSAFE_TEST_MODEL", ROOT / "tests" / "model" / "parrot"))
MAGPIE = ROOT / "tests" / "model" / "magpie"
BOOT_SECONDS = 600


@dataclass
class LiveEngine:
    """A running engine host.

    base_url    of the gateway, plain HTTP on loopback
    children    pid → start time of the processes below the host
    processes   models that are served by processes of their own
    connection  holds the identity that signs its receipts
    """

    process: subprocess.Popen[bytes]
    folder: Path
    processes: tuple[str, ...] = ()
    connection: Connection = field(default_factory=Connection)

    @property
    def reports(self) -> list[dict[str, Any]]:
        path = self.folder / "report"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def reported(self, name: str, seconds: float) -> Any:
        """Value of *name* in the report, waited for."""
        for _ in range(round(seconds / 0.1)):
            for line in self.reports:
                if name in line:
                    return line[name]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        found = [line[name] for line in self.reports if name in line]
        if not found:
            pytest.fail(f"the engine host never reported {name}: {self.reports} {self.output[-2000:].decode()}")
        return found[0]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.reported('port', BOOT_SECONDS)}"

    @property
    def children(self) -> dict[int, str]:
        return {int(pid): start for pid, start in self.reported("children", BOOT_SECONDS).items()}

    def worker(self, model: str) -> int:
        """pid of the process that serves *model* now."""
        wanted = f"--id={model}".encode()
        for pid in processes.descendants(self.process.pid):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if wanted in line and b"enclave.engine.worker" in line:
                return pid
        raise AssertionError(f"no process serves {model}")

    def core(self, front: int) -> int:
        """pid of the engine core of *front*: this host's process, or a worker."""
        below = processes.descendants(front)
        if front == self.process.pid:
            for model in self.processes:
                worker = self.worker(model)
                below = {p: s for p, s in below.items() if p not in processes.descendants(worker)}
        named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below}
        return next(pid for pid, line in named.items() if line.startswith(b"VLLM::EngineCore"))

    @property
    def output(self) -> bytes:
        return (self.folder / "output").read_bytes()

    def stop(self) -> None:
        """End it in order; whatever happens, nothing of it is left."""
        children = {}
        if any("children" in line for line in self.reports):
            children = self.children
        if self.process.poll() is None:
            children |= processes.descendants(self.process.pid)
            self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(90) == 0, self.output[-2000:].decode()
            assert not self.reported("left", 1)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(10)
            left = _wait_gone(children)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert not left, "processes outlived the engine host"


def _wait_gone(children: dict[int, str]) -> dict[int, str]:
    for _ in range(100):
        if not processes.alive(children):
            break
        time.sleep(0.1)
    return processes.alive(children)


def need_engine() -> None:
    """Skip where vLLM is not installed; fail where the model that the project ships is missing."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (extra [enclave-cpu])")
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"no model at {MODEL}; VOUCHSAFE_TEST_MODEL may name another")


@contextmanager
def engine_host(*models: Model, say: str = "", environment: dict[str, str] | None = None) -> Iterator[LiveEngine]:
    """Boot one. The runtime folder's path is short: ZMQ's unix sockets live below it (107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="vs-engine-") as name:
        folder = Path(name)
        (folder / "run").mkdir(mode=0o700)
        asked = json.dumps([m.fields() for m in models])
        line = [sys.executable, "-m", "tests.engine_host", str(folder / "run"), str(folder / "report"), asked]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [*line, "--say", say],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
            )
        live = LiveEngine(process, folder, tuple(m.id for m in models if m.placement == "process"))
        try:
            yield live
        finally:
            live.stop()


@pytest.fixture(scope="session")
def live_engine() -> Iterator[LiveEngine]:
    """The engines of this test run. Their end is a test as well: they must exit 0 and leave no process behind."""
    need_engine()
    golden = ROOT / "tests" / "model" / "golden.json" if MODEL == ROOT / "tests" / "model" / "parrot" else None
    models = (
        Model(MODEL, "parrot", golden),
        Model(MODEL, "second", golden, placement="process"),
        Model(
            MAGPIE, "magpie", MAGPIE.parent / "magpie-golden.json", placement="process", task="embed", max_model_len=512
        ),
    )
    with engine_host(*models, say="POSITIVE-CONTROL") as live:
        assert live.base_url
        yield live
