"""The listening socket, and a uvicorn server that leaves signals to the boot.

Runs in the enclave. uvicorn's own server raises SIGTERM again after its shutdown: the process would die before the
engines are stopped, leaving them orphaned with plaintext in memory. Here the boot owns the signals and uvicorn only
serves. The socket is bound before uvicorn starts, so that a port in use is one clear line and not a log entry.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

import uvicorn

from attestation.errors import InputError
from enclave.settings import Listen
from enclave.tls import Endpoint

__all__ = ["EnclaveServer", "bind", "make_server"]

BACKLOG = 1024


class EnclaveServer(uvicorn.Server):
    """uvicorn without signal handling, which also drops unfinished handshakes at shutdown."""

    def __init__(self, config: uvicorn.Config, endpoint: Endpoint) -> None:
        super().__init__(config)
        self._endpoint = endpoint

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._endpoint.abort_handshakes()
        await super().shutdown(sockets)


def make_server(app: Any, endpoint: Endpoint, *, drain_s: int) -> EnclaveServer:  # Any: ASGI
    """A server for *app* on *endpoint*; running answers get *drain_s* seconds at shutdown."""
    config = uvicorn.Config(
        app,
        http=endpoint.protocol(),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,  # enclave.telemetry alone decides what is logged
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=drain_s,
        backlog=BACKLOG,
    )
    return EnclaveServer(config, endpoint)


def bind(listen: Listen) -> socket.socket:
    """Bind and listen. Raises `InputError` with one line: address in use, no permission, not this machine's address.

    A UNIX socket lies in a directory of mode 0700 that belongs to us: asyncio makes sockets that anybody may use."""
    family = {"unix": socket.AF_UNIX, "vsock": socket.AF_VSOCK}.get(
        listen.kind, socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if listen.kind == "unix":
            _prepare_directory(listen.path)
            _remove_stale(listen.path)
            sock.bind(str(listen.path))
            listen.path.chmod(0o600)
        elif listen.kind == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((listen.host, listen.port))
        else:
            sock.bind((socket.VMADDR_CID_ANY, listen.port))
        sock.listen(BACKLOG)
    except OSError as err:
        sock.close()
        in_use = err.errno == errno.EADDRINUSE
        raise InputError(
            "INPUT_LISTEN_BUSY" if in_use else "INPUT_LISTEN",
            f"cannot listen on {listen}: {'the address is in use' if in_use else err.strerror or err}",
            hint="stop the other server, or change `listen`" if in_use else "correct `listen` in the configuration",
        ) from err
    except InputError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def address(listen: Listen, sock: socket.socket) -> str:
    """Where *sock* listens, with the port that the kernel picked."""
    if listen.kind == "tcp":
        return str(Listen("tcp", host=listen.host, port=sock.getsockname()[1]))
    return str(listen)


def _prepare_directory(path: Path) -> None:
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise InputError(
            "INPUT_LISTEN_DIRECTORY",
            f"others may enter {folder}, where the socket is to lie",
            expected="mode 0700",
            actual=oct(stat.S_IMODE(folder.stat().st_mode)),
            hint=f"chmod 700 {folder}",
        )


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody answers on; refuse one that is alive, and anything that is not a socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError("INPUT_LISTEN", f"{path} exists and is not a socket", hint="remove it, or change `listen`")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as err:
            raise OSError(errno.EADDRINUSE, "in use") from err
    raise OSError(errno.EADDRINUSE, "in use")
