"""Opens the sockets the relay listens on, and leaves nothing behind.

Runs once, at start. A unix path is taken over only from a socket nobody answers on: a live one, or anything
that is not a socket, is left alone. On close the path is removed only if it is still the socket made here.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from host.address import Address, Endpoint, TcpAddress, UnixAddress, resolve
from host.errors import RunError

__all__ = ["Listener", "open_listener"]

_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening, non-blocking socket; `address` is the real one (the port is known even when 0 was
    asked).
    """

    sock: socket.socket
    address: Address
    inode: tuple[int, int] | None
    """Device and inode of the unix socket made here."""

    def close(self) -> None:
        self.sock.close()
        if isinstance(self.address, UnixAddress) and _inode(self.address.path) == self.inode:
            Path(self.address.path).unlink(missing_ok=True)


def open_listener(address: Address) -> Listener:
    """A socket listening on `address`, or RunError saying what stands in the way."""
    if isinstance(address, UnixAddress):
        return _open_unix(address)
    return _open_tcp(address, resolve(address)[0])


def _open_tcp(address: TcpAddress, endpoint: Endpoint) -> Listener:
    sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            # One socket, one family: clients are counted by IPv4 address or by IPv6 /64, never by a mapped
            # address.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(endpoint.sockaddr)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        host, port = sock.getsockname()[:2]
    except OSError as err:
        sock.close()
        raise _cannot_listen(address, err) from err
    return Listener(sock, TcpAddress(host, port), None)


def _open_unix(address: UnixAddress) -> Listener:
    _clear_stale(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address.path)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as err:
        sock.close()
        raise _cannot_listen(address, err) from err
    return Listener(sock, address, _inode(address.path))


def _clear_stale(address: UnixAddress) -> None:
    """Remove a socket left over by a process that is gone; RunError for anything else at that path."""
    try:
        mode = os.lstat(address.path).st_mode
    except OSError:
        return  # nothing there, or bind says it better
    if not stat.S_ISSOCK(mode):
        raise RunError("PATH_TAKEN", f"{address}: something that is not a socket is there", "choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(address.path) != errno.ECONNREFUSED:
            raise RunError(
                "ADDRESS_IN_USE",
                f"{address}: another program is listening there",
                "stop it, or choose another path",
            )
    Path(address.path).unlink(missing_ok=True)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _cannot_listen(address: Address, err: OSError) -> RunError:
    what = f"cannot listen on {address}"
    if err.errno == errno.EADDRINUSE:
        return RunError("ADDRESS_IN_USE", f"{what}: address in use", "stop the other program, or choose another port")
    if err.errno == errno.EADDRNOTAVAIL:
        return RunError("ADDRESS_NOT_HERE", f"{what}: no such address on this machine", "see `ip address`")
    if err.errno == errno.ENOENT and isinstance(address, UnixAddress):
        folder = Path(address.path).parent
        return RunError("NO_DIRECTORY", f"{what}: no directory {folder}", f"mkdir -p {folder}")
    if err.errno in (errno.EACCES, errno.EPERM):
        hint = (
            "use a port of 1024 or more" if isinstance(address, TcpAddress) else "check the directory's owner and mode"
        )
        return RunError("NOT_PERMITTED", f"{what}: not permitted", hint)
    return RunError("CANNOT_LISTEN", f"{what}: {os.strerror(err.errno or 0)}", "check the address")
