"""A real relay process and the two ends around it. Both ends live in the test; the relay under test is a subprocess."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.host.hellos import hello

PATIENCE = 15.0
"""Longest wait for anything, in seconds: a hang is a failure and not a hung suite."""


class RelayProcess:
    """`vouchsafe-host relay` listening on `listen`, its log in a file."""

    def __init__(self, folder: Path, *options: str, listen: str = "tcp:127.0.0.1:0") -> None:
        self._log_path = folder / f"relay-{random.randrange(1 << 32)}.log"
        command = [sys.executable, "-m", "host.cli", "relay", "--listen", listen, *options]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        ready = self.process.stdout.readline().decode().strip()
        assert ready.startswith("relay: listening on "), ready + self.log
        self.address = ready.removeprefix("relay: listening on ")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def reasons(self) -> list[str]:
        return [line.split("reason=")[1] for line in self.log.splitlines() if "reason=" in line]

    def wait_for_reasons(self, *wanted: str) -> None:
        wait_until(lambda: len(self.reasons) >= len(wanted))
        assert self.reasons == list(wanted)

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def connect(self) -> socket.socket:
        return dial(self.address)

    def open(self, name: str | None = "demo.vouchsafe.test") -> socket.socket:
        """A client that has sent its hello."""
        client = self.connect()
        client.sendall(hello(name))
        return client

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def dial(address: str) -> socket.socket:
    kind, _, rest = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(rest)
        return sock
    host, _, port = rest.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE)


class Backend:
    """A listening socket; `accept` gives the far end of the next relayed connection, its hello already read."""

    def __init__(self, address: str) -> None:
        kind, _, rest = address.partition(":")
        if kind == "unix":
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.bind(rest)
            self.address = address
        else:
            host = rest.rpartition(":")[0].strip("[]")
            self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            self.sock.bind((host, 0))
            port = self.sock.getsockname()[1]
            self.address = f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
        self.sock.listen(256)
        self.sock.settimeout(PATIENCE)

    def accept(self, expect: bytes | None = None) -> socket.socket:
        conn, _ = self.sock.accept()
        conn.settimeout(PATIENCE)
        expect = hello() if expect is None else expect
        assert receive(conn, len(expect)) == expect
        return conn

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes, or fewer at the end of the stream."""
    data = bytearray()
    while len(data) < count and (piece := sock.recv(min(65536, count - len(data)))):
        data += piece
    return bytes(data)


def send_digest(sock: socket.socket, count: int, seed: int) -> bytes:
    """Send `count` random bytes in uneven pieces, end the stream, return their SHA-256."""
    dice, digest = random.Random(seed), hashlib.sha256()
    while count:
        piece = dice.randbytes(min(count, dice.choice([1, 100, 5000, 70_000, 300_000])))
        digest.update(piece)
        sock.sendall(piece)
        count -= len(piece)
    sock.shutdown(socket.SHUT_WR)
    return digest.digest()


def receive_digest(sock: socket.socket) -> tuple[int, bytes]:
    """Count and SHA-256 of everything up to the end of the stream."""
    count, digest = 0, hashlib.sha256()
    while piece := sock.recv(65536):
        count += len(piece)
        digest.update(piece)
    return count, digest.digest()


def ended(sock: socket.socket) -> str:
    """How the stream ends from here: "eof" or "reset"; a byte or a hang is a failure."""
    try:
        data = sock.recv(1)
    except (ConnectionResetError, BrokenPipeError):
        return "reset"
    assert data == b"", data
    return "eof"


def refused(address: str) -> bool:
    """Whether a new connection is reset at once: while connecting, or on the first read."""
    try:
        with dial(address) as sock:
            return ended(sock) == "reset"
    except ConnectionResetError:
        return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@contextlib.contextmanager
def together(*jobs: Callable[[], None]) -> Iterator[None]:
    """Run `jobs` in threads beside the body; their first error is the test's."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), "a stream hangs"
    if errors:
        raise errors[0]
