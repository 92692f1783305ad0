"""A PostgreSQL server of the test's own: Debian's binaries, one UNIX socket and one loopback port, never as root."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]  # ships no py.typed

USER = "vouchsafe"
PASSWORD = "canary-password"  # of a database that lives as long as the test


def binaries() -> Path | None:
    """Where initdb and postgres are: on the path, or where Debian puts them. None when nowhere."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


class PostgresServer:
    """One cluster in a folder of its own (a UNIX socket's path must be short). `start`, `stop`, `crash`."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="vs-pg-"))
        # PostgreSQL refuses root; another user cannot enter pytest's own folders.
        self._as: dict[str, object] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._initialise()

    def start(self) -> None:
        """Start, and wait until it answers."""
        log = (self.folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.folder / "data"],
                stdout=log, stderr=log, cwd=self.folder, env={"LC_ALL": "C"}, **self._as,  # type: ignore[call-overload]
            )  # fmt: skip
        asyncio.run(self._ready())

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT: in order. SIGQUIT: at once, as after a crash."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(30)

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://{USER}:{PASSWORD}@:{self.port}/{database}?host={self.folder}"

    def tcp_url(self, database: str, options: str, host: str = "127.0.0.1") -> str:
        return f"postgresql://{USER}:{PASSWORD}@{host}:{self.port}/{database}?{options}"

    async def admin(self, database: str = "postgres") -> asyncpg.Connection:
        """A superuser's connection: the host's hands."""
        return await asyncpg.connect(
            host=str(self.folder), port=self.port, user=USER, password=PASSWORD, database=database
        )

    def _initialise(self) -> None:
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._run("initdb", "-D", "data", "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-N", "-E", "UTF8")
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{self.folder}'\n"
                "shared_buffers = 16MB\nmax_connections = 30\nfsync = on\n"
            )

    def serve_tls(self, certificate: bytes, key: bytes) -> None:
        """From the next start on, TLS with this certificate."""
        for name, content in (("server.crt", certificate), ("server.key", key)):
            path = self.folder / "data" / name
            path.write_bytes(content)
            path.chmod(0o600)
            if self._as:
                owner = pwd.getpwnam("nobody")
                os.chown(path, owner.pw_uid, owner.pw_gid)
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write("ssl = on\n")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], cwd=self.folder, env={"LC_ALL": "C"}, capture_output=True,
            timeout=120, check=False, **self._as,  # type: ignore[call-overload]
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    async def _ready(self) -> None:
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "log").read_text()
            try:
                await (await self.admin()).close()
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.05)
            else:
                return
