"""An enclave's surroundings for tests: a simulated machine in this process, or an enclave process beside one.

`surroundings` makes documents, configuration and an attester that signs with the development TEE's keys directly: the
same bytes as through the files, without a second process. `EnclaveProcess` runs the real boot.
"""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from attestation.attester.tdx import TdxAttester
from attestation.policy import Policy
from enclave.settings import Settings
from tests.demo.provision import Provisioned, provision
from tests.demo.tenant import Tenant, set_up
from tests.devtee.machine import Machine
from tests.devtee.tee import DevTee
from tests.enclave.support import NAME

ROOT = Path(__file__).resolve().parents[2]


def model_directory(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


class DirectTdx(TdxAttester):
    """Quotes and registers straight from the simulated CPU; the event log from its files. Counts what it is asked."""

    def __init__(self, tee: DevTee, state: Path) -> None:
        super().__init__(state / "tsm", state / "measurements", state / "acpi")
        self.tee, self.asked, self.delay = tee, list[bytes](), 0.0
        self.fails = False

    def quote(self, report_data: bytes) -> bytes:
        from attestation.attester import AttesterError

        time.sleep(self.delay)
        if self.fails:
            raise AttesterError("ATTESTER_TIMEOUT", "the platform did not sign in time")
        self.asked.append(report_data)
        return self.tee.quote(report_data)

    def extend_rtmr3(self, digest: bytes) -> None:
        self.tee.extend(3, digest)

    def read_rtmr(self, index: int) -> bytes:
        return self.tee.td.rtmr[index]


@dataclass
class Surroundings:
    made: Provisioned
    settings: Settings
    policy: Policy
    tdx: DirectTdx
    state: Path = field(default_factory=Path)


@contextlib.contextmanager
def surroundings(folder: Path, *, lifetime: int = 3600, gpus: int = 0) -> Iterator[Surroundings]:
    """A machine in this process, without a GPU or with one; who answers for it is the test's to say."""
    state = folder / "tee"
    tee = DevTee.create(state, gpus=1)
    with Machine(state, tee):
        made = provision(
            folder / "made", state, model_directory(folder / "model"), None, "parrot",
            f"unix:{folder / 'sock' / 'e.sock'}", NAME, gpus=gpus, lifetime=lifetime,
        )  # fmt: skip
        policy = Policy.parse(made.appraisal.read_text())
        yield Surroundings(made, Settings.load(made.config), policy, DirectTdx(tee, state), state)


class EnclaveProcess:
    """The boot in a process of its own. Output is kept; the process is ended whatever happens."""

    def __init__(self, config: Path, devtee: Path, *wishes: str, env: dict[str, str] | None = None) -> None:
        self.output = config.parent / f"enclave-{time.monotonic_ns()}.log"
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.enclave.echo_enclave", str(config), *wishes],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, "LD_LIBRARY_PATH": str(devtee / "lib"), **(env or {})},
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def console(self) -> list[str]:
        """What it said on its console, telemetry left out."""
        return [line for line in self.text.splitlines() if not line.startswith("{")]

    def wait_for(self, word: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while word not in self.text:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text
            time.sleep(0.02)

    def set_up(self, made: Provisioned, at: Path | int) -> Tenant:
        """Wait until it listens *at* a socket or a port, bootstrap it, wait until it is ready."""
        self.wait_for("enclave: listening on")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        way = httpx2.HTTPTransport(uds=str(at) if isinstance(at, Path) else None, verify=context)
        base = f"https://{NAME}" if isinstance(at, Path) else f"https://127.0.0.1:{at}"
        with httpx2.Client(transport=way, timeout=30) as http:
            tenant = set_up(http, base, made.secret)
        self.wait_for("enclave: ready on")
        return tenant

    def wait(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def __enter__(self) -> EnclaveProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
