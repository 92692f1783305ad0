"""A live service for benchmarks: development TEE and enclave (echo engine) as processes of their own, over loopback."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attestation.client.openai import attested_client
from attestation.client.session import read_policy
from attestation.client.target import Target
from attestation.policy import Policy
from tests.demo.processes import PYTHON, Process
from tests.demo.provision import Provisioned, provision
from tests.demo.tenant import Tenant, set_up

__all__ = ["MODEL", "NAME", "Service", "cpu_ms", "service", "where"]

NAME = "demo.vouchsafe.test"
MODEL = "parrot"
HINT = "start it by hand and see: python -m tests.enclave.echo_enclave CONFIG"


@dataclass(frozen=True)
class Service:
    """Where the enclave listens, what its clients hold, and a folder for what this run makes."""

    folder: Path
    made: Provisioned
    enclave: Process
    port: int
    tenant: Tenant

    @property
    def target(self) -> Target:
        return Target(NAME, self.port, ("127.0.0.1", self.port))

    @property
    def policy(self) -> Policy:
        return read_policy(self.made.policy)


@contextlib.contextmanager
def service() -> Iterator[Service]:
    """TDX and one GPU, one model answered by the echo engine. Nothing is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="vouchsafe-bench-"))
    started: list[Process] = []
    try:
        tee, model = folder / "tee", folder / "model"
        started.append(Process("development TEE", [PYTHON, "-m", "tests.devtee", "--state", str(tee)]))
        started[0].wait_for("devtee: ready", seconds=60, hint=HINT)
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "none"}')
        made = provision(folder / "made", tee, model, None, MODEL, "tcp:127.0.0.1:0", NAME, max_model_len=32768)
        command = [PYTHON, "-m", "tests.enclave.echo_enclave", str(made.config)]
        enclave = Process("enclave", command, env={"LD_LIBRARY_PATH": str(tee / "lib")})
        started.append(enclave)
        line = enclave.wait_for("enclave: listening on", seconds=60, hint=HINT)
        port = int(line.partition(",")[0].rpartition(":")[2])
        target = f"https://{NAME}:{port}"
        with attested_client(target, policy=read_policy(made.policy), connect=("127.0.0.1", port)) as http:
            tenant = set_up(http, target, made.secret)
        yield Service(folder, made, enclave, port, tenant)
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


def cpu_ms(pid: int) -> float:
    """CPU time that process *pid* has used, all its threads, in milliseconds (clock_getcpuclockid(3))."""
    clock = ctypes.c_int()
    if failed := ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(failed, os.strerror(failed))
    return time.clock_gettime_ns(clock.value) / 1e6


def where(*names: str) -> str:
    """Which processes share which cores, for a reader of the table. Nobody is pinned: the kernel decides."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{', '.join(names)} share {len(cores)} core(s) {cores[0]}-{cores[-1]}, not pinned"
