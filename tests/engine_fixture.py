"""The real vLLM for tests: one boot per test run (`live_engine`), in a process of its own (`tests.engine_host`)."""

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

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(os.environ.get("VOUCHSAFE_TEST_MODEL", ROOT / "tests" / "model" / "parrot"))
BOOT_SECONDS = 240


@dataclass
class LiveEngine:
    """A running engine host.

    base_url    of the gateway, plain HTTP on loopback
    children    pid → start time of the processes below the host
    connection  holds the identity that signs its receipts
    """

    process: subprocess.Popen[bytes]
    folder: Path
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

    @property
    def core(self) -> int:
        """pid of the engine core."""
        named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes.alive(self.children)}
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
            self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) == 0, self.output[-2000:].decode()
            assert self.reported("left", 1).keys() <= {str(pid) for pid in children}
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
def engine_host(
    model: Path = MODEL, *, say: str = "", environment: dict[str, str] | None = None
) -> Iterator[LiveEngine]:
    """Boot one. The runtime folder's path is short: ZMQ's unix sockets live below it (107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="vs-engine-") as name:
        folder = Path(name)
        (folder / "run").mkdir(mode=0o700)
        line = [sys.executable, "-m", "tests.engine_host", str(model), str(folder / "run"), str(folder / "report")]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [*line, "--say", say],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
            )
        live = LiveEngine(process, folder)
        try:
            yield live
        finally:
            live.stop()


@pytest.fixture(scope="session")
def live_engine() -> Iterator[LiveEngine]:
    """The engine of this test run. Its end is a test as well: it must exit 0 and leave no process behind."""
    need_engine()
    with engine_host(say="POSITIVE-CONTROL") as live:
        assert live.base_url
        yield live
