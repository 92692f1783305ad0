"""Everything that `make demo` starts, as one thing that starts and stops: development TEE, enclave, relay, tap.

Each is a process of its own, as in production; the operator's first steps are made through the relay. The demo and the
end-to-end tests use the same class.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attestation.client.openai import attested_client
from attestation.client.session import read_policy
from attestation.operator_state import Checkpoint, KeyFile
from tests.demo.processes import PYTHON, ROOT, Failed, Process
from tests.demo.provision import Provisioned, provision
from tests.demo.tenant import Tenant, set_up

NAME = "demo.vouchsafe.test"
PARROT = ROOT / "tests/model/parrot"
GOLDEN = ROOT / "tests/model/golden.json"
ENCLAVE_SECONDS = 300.0


@dataclass
class Stack:
    """The running service. `relay_port` is where clients go; `folder` holds what this run made."""

    folder: Path
    provisioned: Provisioned
    devtee: Process
    enclave: Process
    relay: Process
    relay_port: int
    model_id: str
    tenant: Tenant

    @property
    def target(self) -> str:
        return f"https://{NAME}:{self.relay_port}"

    def write_client_env(self) -> Path:
        """A file of shell exports that the programs under docs/ read; the keys are in it."""
        values = {
            "VOUCHSAFE_TARGET": self.target,
            "VOUCHSAFE_CONNECT": f"127.0.0.1:{self.relay_port}",
            "VOUCHSAFE_POLICY": str(self.provisioned.policy),
            "VOUCHSAFE_API_KEY": self.tenant.api_key,
            "VOUCHSAFE_MODEL": self.model_id,
            "VOUCHSAFE_ADMIN_KEY": self.tenant.admin_key,
            "VOUCHSAFE_STATE_KEY": str(self.provisioned.directory / "state.key"),
        }
        path = self.provisioned.directory / "client.env"
        path.touch(mode=0o600)
        path.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items()))
        return path

    @property
    def processes(self) -> tuple[Process, ...]:
        return self.relay, self.enclave, self.devtee


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C, or a SIGTERM, must not leave half of the clean-up undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left(started: list[Process], seconds: float = 10.0) -> list[int]:
    """Processes that are still there after *seconds*: what was killed takes a moment to be gone from the table."""
    deadline = time.monotonic() + seconds
    while (left := [pid for process in started for pid in process.group()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@contextlib.contextmanager
def running(
    *,
    model: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Stack]:
    """Start the stack, yield it, and leave nothing behind: no process, no file, whatever happened in between."""
    model_id = "parrot" if model is None else model.resolve().name
    # A short path: unix sockets have at most 107 bytes of name.
    folder = Path(tempfile.mkdtemp(prefix="vouchsafe-"))
    started: list[Process] = []

    def start(name: str, *command: str, env: dict[str, str] | None = None) -> Process:
        process = Process(name, command, env=env, tell=tell)
        started.append(process)
        return process

    try:
        tee = folder / "tee"
        devtee = start("development TEE", PYTHON, "-m", "tests.devtee", "--state", str(tee), "--gpus", "1")
        devtee.wait_for("devtee: ready", seconds=60, hint="is a C compiler there? `make system` installs one")
        socket = folder / "run" / "enclave.sock"
        socket.parent.mkdir(mode=0o700)
        made = provision(
            folder / "made",
            tee,
            model or PARROT,
            GOLDEN if model is None else None,
            model_id,
            f"unix:{socket}",
            NAME,
        )
        enclave = start(
            "enclave", PYTHON, "-m", "enclave.cli", "serve", "--config", str(made.config),
            env={"LD_LIBRARY_PATH": str(tee / "lib")},
        )  # fmt: skip
        hint = "the line above names the boot stage and what to do"
        enclave.wait_for("enclave: listening", seconds=ENCLAVE_SECONDS, hint=hint)
        relay = start(
            "relay", PYTHON, "-m", "host.cli", "relay", "--listen", "tcp:127.0.0.1:0",
            "--route", f"{NAME}=unix:{socket}", "--drain-timeout", "2",
        )  # fmt: skip
        line = relay.wait_for("listening on", seconds=20, hint="is the loopback device up?")
        port = int(line.rpartition(":")[2])
        target, policy = f"https://{NAME}:{port}", read_policy(made.policy)
        with attested_client(target, policy=policy, connect=("127.0.0.1", port)) as http:
            tenant = set_up(http, target, made.secret)
        enclave.wait_for("enclave: ready", seconds=20, hint=hint)
        kept = KeyFile(target, bytes.fromhex(tenant.state_key), Checkpoint.decode(bytes.fromhex(tenant.checkpoint)))
        files = {"api-key": tenant.api_key, "admin-key": tenant.admin_key, "state.key": kept.encode().decode()}
        for name, value in files.items():
            path = made.directory / name
            path.touch(mode=0o600)
            path.write_text(value)
        yield Stack(folder, made, devtee, enclave, relay, port, model_id, tenant)
    finally:
        with undisturbed():
            for process in reversed(started):
                process.stop()
            shutil.rmtree(folder, ignore_errors=True)
        left = _left(started)
        if left:
            raise Failed("clean-up", f"processes {left} are still there", f"kill {' '.join(map(str, left))}")
