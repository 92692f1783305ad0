"""The journal's blobs in a PostgreSQL database: for several enclaves that serve the same tenants.

The server is the host's or the operator's, and trusted with nothing but to be durable. The primary key on the row
number lets exactly one enclave write each row; the loser gets `StateConflict`. One connection, one statement at a
time, one round trip per write; when the connection is lost it is made again, with back-off, for as long as the call
may take. No environment variable and no file in a home directory has a say, and no error carries the server's words.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import asyncpg  # type: ignore[import-untyped]  # ships no py.typed

from enclave.state.base import StateConflict, StateError, check_batch

__all__ = ["MIGRATIONS", "PostgresBackend", "Server"]

T = TypeVar("T")

MIGRATIONS: Final[Sequence[str]] = ("CREATE TABLE vouchsafe_journal (seq bigint PRIMARY KEY, sealed bytea NOT NULL)",)
"""Step n leads from layout n to n + 1. Steps are added at the end and never changed."""

CONNECT_S: Final = 5.0
STATEMENT_S: Final = 10.0
DEADLINE_S: Final = 30.0
"""How long one call of the backend may try, connecting included."""
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0

_MIGRATION_LOCK: Final = 0x766F7563687361  # "vouchsa", any number that others do not take
_LAYOUT: Final = "CREATE TABLE IF NOT EXISTS vouchsafe_layout (one boolean PRIMARY KEY CHECK (one), version integer)"
# One statement: the row before must be the last one, and the primary key decides between two who both saw that.
_APPEND: Final = """
INSERT INTO vouchsafe_journal (seq, sealed)
SELECT $1::bigint + n - 1, sealed FROM unnest($2::bytea[]) WITH ORDINALITY AS new (sealed, n)
WHERE (SELECT coalesce(max(seq), -1) FROM vouchsafe_journal) = $1::bigint - 1
"""
_READ: Final = "SELECT seq, sealed FROM vouchsafe_journal WHERE seq >= $1 ORDER BY seq LIMIT $2"
_LAST: Final = "SELECT coalesce(max(seq), -1) FROM vouchsafe_journal"

_TRANSIENT: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.OperatorInterventionError,  # shut down, crashed, cancelled
    asyncpg.TooManyConnectionsError,
    asyncpg.TransactionRollbackError,  # deadlock, serialization
    asyncpg.InterfaceError,  # the connection was closed under us
    asyncpg.InternalClientError,  # the same, in the midst of an answer: asyncpg has lost count
)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the database is. `host` is a directory (UNIX socket) or a name; `tls` None for sockets or by choice."""

    host: str
    port: int
    user: str
    database: str
    password: str = field(repr=False)
    tls: ssl.SSLContext | None


class _Connection(Protocol):
    """What we use of asyncpg's connection."""

    async def execute(self, query: str, *args: Any) -> str: ...  # Any: values of the query
    async def fetch(self, query: str, *args: Any) -> list[Any]: ...  # Any: asyncpg's rows
    async def fetchval(self, query: str, *args: Any) -> Any: ...  # Any: one value
    def transaction(self) -> Any: ...  # Any: asyncpg's context manager
    def terminate(self) -> None: ...
    async def close(self, *, timeout: float) -> None: ...


class PostgresBackend:
    """See `enclave.state.base.Backend`. Made by `open`."""

    def __init__(self, server: Server, deadline_s: float) -> None:
        self._server, self._deadline_s = server, deadline_s
        self._lock = asyncio.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    @classmethod
    async def open(
        cls, server: Server, *, migrations: Sequence[str] = MIGRATIONS, deadline_s: float = DEADLINE_S
    ) -> PostgresBackend:
        """Connect, and bring an older layout to this release's. Raises `StateError`: `STATE_SCHEMA`, `STATE_STORAGE`,
        `STATE_UNAVAILABLE`."""
        backend = cls(server, deadline_s)
        try:
            await backend._run(lambda connection: _migrate(connection, migrations))
        except BaseException:
            await backend.close()
            raise
        return backend

    async def append(self, first_seq: int, blobs: Sequence[bytes]) -> None:
        check_batch(first_seq, blobs)

        async def insert(connection: _Connection) -> None:
            try:
                status = await connection.execute(_APPEND, first_seq, list(blobs))
            except asyncpg.UniqueViolationError:
                raise StateConflict(first_seq - 1) from None
            if status == "INSERT 0 0":
                raise StateConflict(first_seq - 1)
            if status != f"INSERT 0 {len(blobs)}":
                raise StateError("STATE_STORAGE", "PostgreSQL stored another number of rows", expected=len(blobs))

        await self._run(insert)

    async def read(self, from_seq: int, limit: int) -> list[tuple[int, bytes]]:
        async def select(connection: _Connection) -> list[tuple[int, bytes]]:
            rows = [(row[0], row[1]) for row in await connection.fetch(_READ, from_seq, limit)]
            # The server says of which types its answer is; bytes(number) would be as many zeros.
            if not all(type(seq) is int and type(sealed) is bytes for seq, sealed in rows):
                raise StateError("STATE_STORAGE", "a stored row has values of the wrong type")
            return rows

        return await self._run(select)

    async def last_seq(self) -> int:
        return int(await self._run(lambda connection: connection.fetchval(_LAST)))

    async def close(self) -> None:
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=CONNECT_S)
            except (*_TRANSIENT, asyncpg.PostgresError):
                connection.terminate()

    async def _run(self, work: Callable[[_Connection], Awaitable[T]]) -> T:
        """Do *work* until the server answers. Safe to repeat: reads are, and one row number is written once."""
        pause = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._deadline_s), self._lock:
                while True:
                    try:
                        return await work(await self._connected())
                    except ssl.SSLCertVerificationError:
                        raise StateError(
                            "STATE_STORAGE", "the database server's certificate does not hold",
                            expected="its name, signed by sslrootcert", hint="check host and sslrootcert of the URL",
                        ) from None  # fmt: skip
                    except _TRANSIENT:
                        self._drop()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
        except StateError:
            raise
        except TimeoutError:
            self._drop()
            raise StateError(
                "STATE_UNAVAILABLE", "PostgreSQL did not answer in time", expected=f"<= {self._deadline_s:g} s",
                hint="is the server running, and can the enclave reach it?",
            ) from None  # fmt: skip
        except asyncpg.PostgresError as err:
            # Neither text nor cause: both are the server's words, and may name user and host.
            code = str(getattr(err, "sqlstate", "")) or type(err).__name__
            raise StateError(
                "STATE_STORAGE", "PostgreSQL refused", actual=f"SQLSTATE {code}" if code.isalnum() else "no SQLSTATE",
                hint="see the server's log",
            ) from None  # fmt: skip
        except Exception as err:
            self._drop()
            raise StateError(
                "STATE_STORAGE", "the database server answered what cannot be read", actual=type(err).__name__
            ) from None
        except asyncio.CancelledError:
            self._drop()  # in the midst of an answer: this connection is of no use to the next call
            raise

    async def _connected(self) -> _Connection:
        if self._closed:
            raise StateError("STATE_CLOSED", "the storage is closed")
        if self._connection is None:
            server = self._server
            self._connection = await asyncpg.connect(
                host=server.host, port=server.port, user=server.user, database=server.database,
                password=server.password, ssl=server.tls or False, direct_tls=False, target_session_attrs="any",
                timeout=CONNECT_S, command_timeout=STATEMENT_S,
                server_settings={"synchronous_commit": "on", "application_name": "vouchsafe", "search_path": "public"},
            )  # fmt: skip
        assert self._connection is not None
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


async def _migrate(connection: _Connection, migrations: Sequence[str]) -> None:
    """Bring the layout to the last one in one transaction, one enclave at a time."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
        await connection.execute(_LAYOUT)
        found = await connection.fetchval("SELECT version FROM vouchsafe_layout")
        version = 0 if found is None else int(found)
        if not 0 <= version <= len(migrations):
            raise StateError(
                "STATE_SCHEMA", "the database has a layout newer than this release",
                expected=f"<= {len(migrations)}", actual=version, hint="start the release that made it, or a later one",
            )  # fmt: skip
        for step in migrations[version:]:
            await connection.execute(step)
        await connection.execute(
            "INSERT INTO vouchsafe_layout VALUES (true, $1) ON CONFLICT (one) DO UPDATE SET version = $1",
            len(migrations),
        )
