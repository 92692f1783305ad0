"""Where the state is kept, as the operator writes it: `sqlite:PATH` or a PostgreSQL URL.

    sqlite:/var/lib/vouchsafe/state.db
    postgresql://USER@/DATABASE?host=/run/postgresql
    postgresql://USER:PASSWORD@HOST:5432/DATABASE?sslmode=verify-full&sslrootcert=/etc/vouchsafe/ca.pem
    postgresql://USER@HOST/DATABASE?sslmode=disable

Over TCP `sslmode` must be given. Rows are sealed either way; TLS keeps others from the account. A measured
configuration is public: a password does not belong into it. Nothing of a URL but its scheme is ever in an error.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from attestation.errors import InputError
from enclave.state.base import Backend
from enclave.state.postgres import PostgresBackend, Server
from enclave.state.sqlite import SqliteBackend

__all__ = ["open_backend", "parse_postgres"]

MAX_URL: Final = 2048
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")


async def open_backend(url: str) -> Backend:
    """Open the storage that *url* names. Raises `InputError` for the URL, `StateError` for the storage."""
    if url.startswith("sqlite:"):
        path = Path(url.removeprefix("sqlite:"))
        if not path.is_absolute() or "\x00" in url or len(url) > MAX_URL:
            raise _bad("the path of an SQLite file is absolute", "sqlite:/PATH")
        return await SqliteBackend.open(path)
    return await PostgresBackend.open(parse_postgres(url))


def parse_postgres(url: str) -> Server:
    """Read a `postgresql://` URL, strictly. Raises `InputError`."""
    if not url.startswith("postgresql://") or len(url) > MAX_URL or not url.isprintable():
        raise _bad("state is kept in SQLite or PostgreSQL", "sqlite:/PATH or postgresql://…")
    try:
        parts = urlsplit(url)
        port, host = parts.port or 5432, parts.hostname or ""
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
        user, password = unquote(parts.username or "", errors="strict"), unquote(parts.password or "", errors="strict")
        database = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError:
        raise _bad("this is no URL", "postgresql://USER@HOST:PORT/DATABASE") from None  # its text quotes the URL
    options = dict(pairs)
    if len(options) != len(pairs) or not options.keys() <= {"host", "sslmode", "sslrootcert"} or parts.fragment:
        raise _bad("an option is unknown or given twice", "host, sslmode, sslrootcert")
    if not _NAME.fullmatch(user) or not _NAME.fullmatch(database) or "\x00" in password:
        raise _bad("user and database must be given", "letters, digits, _ $ -, at most 63")
    socket = options.get("host", "")
    if bool(socket) == bool(host) or (socket and not socket.startswith("/")):
        raise _bad("one host must be given", "a name before the path, or ?host=/DIRECTORY")
    return Server(socket or host, port, user, database, password, _tls(bool(socket), options))


def _tls(socket: bool, options: dict[str, str]) -> ssl.SSLContext | None:
    mode, root = options.get("sslmode"), options.get("sslrootcert")
    if socket:
        if mode or root:
            raise _bad("a UNIX socket has no TLS", "neither sslmode nor sslrootcert")
        return None
    if mode == "disable" and root is None:
        return None
    if mode != "verify-full" or not root:
        raise _bad("over TCP, TLS is chosen or declined", "sslmode=verify-full with sslrootcert, or sslmode=disable")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies; unlike the default one, reads no environment
        context.load_verify_locations(cafile=root)
    except (OSError, ValueError) as err:
        raise _bad("sslrootcert cannot be read", "a PEM file of root certificates") from err
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _bad(reason: str, expected: str) -> InputError:
    return InputError(
        "INPUT_STATE_URL", reason, expected=expected, hint="see the module documentation of enclave.state.location"
    )
