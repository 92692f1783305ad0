"""The journal in a real PostgreSQL: several enclaves, a server that comes and goes, a database that is not trusted."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from enclave.access.budgets import Budgets
from enclave.access.prices import Usage
from enclave.custody import Custody
from enclave.state import Journal, StateConflict, StateError, open_backend
from enclave.state.location import parse_postgres
from enclave.state.postgres import MIGRATIONS, PostgresBackend
from enclave.tenancy import Slots
from tests.enclave.api.serving import prices
from tests.enclave.state.postgres_server import PASSWORD, USER, PostgresServer, binaries
from tests.enclave.state.stored import KEY, NOW, Faulty

DATABASE = "postgres"  # the one there is: a new one per test would cost seconds


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed: `make system` as root")
    server = PostgresServer(programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
async def database(server: PostgresServer) -> str:
    """The name of a database in which nothing is."""
    admin = await server.admin(DATABASE)
    await admin.execute("DROP TABLE IF EXISTS vouchsafe_journal, vouchsafe_layout")
    await admin.close()
    return DATABASE


@pytest.fixture
async def url(server: PostgresServer, database: str) -> str:
    return server.url(database)


async def test_service_keeps_its_state_here_and_finds_it_after_a_boot(url: str) -> None:
    """The whole of it: bootstrap, an entry of the ledger, a boot, and a second enclave that is too many."""
    table, slots = prices("parrot"), {"parrot": Slots(4, 100)}
    boots = [Custody(url, hashlib.sha256(b"secret").digest(), table, slots, lambda: NOW) for _ in range(2)]
    assert await boots[0].look() == "new"
    born = await boots[0].bootstrap(b"secret")
    tenancy = boots[0].tenancy
    assert tenancy is not None
    held = await tenancy.ledger.reserve(
        "rcpt-1", project="proj_a", key_id="key_a", model="parrot", operation="completions", amount=10**9,
        budgets=Budgets(),
    )  # fmt: skip
    await held.settle("completed", Usage(1000, 0, 1000, 0))
    spent = tenancy.ledger.spend().spent
    await boots[0].close()

    assert await boots[1].look() == "locked"
    await boots[1].unlock(born.state_key, born.checkpoint)
    again = boots[1].tenancy
    assert again is not None and again.ledger.spend().spent == spent > 0
    assert again.organization.admin(born.admin_key.encode()) is not None
    await boots[1].close()


class Enclave:
    """A journal and the state that its records make: what it wrote itself, and what others did."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}
        self.foreign: list[int] = []
        self.journal: Journal

    def apply(self, seq: int, record: bytes) -> None:
        assert seq not in self.records
        self.records[seq] = record
        self.foreign.append(seq)

    async def append(self, *records: bytes, foreign_seq: int | None = None) -> int:
        point = await self.journal.append(records, foreign_seq=foreign_seq)
        for n, record in enumerate(reversed(records)):
            assert point.seq - n not in self.records
            self.records[point.seq - n] = record
        return point.seq


@pytest.fixture
async def two(url: str) -> AsyncIterator[tuple[Enclave, Enclave]]:
    """Two enclaves on one journal."""
    first, second = Enclave(), Enclave()
    first.journal = await Journal.create(await open_backend(url), KEY, NOW, apply=first.apply)
    second.journal = await Journal.open(await open_backend(url), KEY, apply=second.apply)
    async with first.journal, second.journal:
        yield first, second


async def stored(url: str) -> dict[int, bytes]:
    async with await Journal.open(await open_backend(url), KEY) as journal:
        return {seq: record async for seq, record in journal.replay()}


async def test_journal_in_postgres_is_replayed(url: str) -> None:
    async with await Journal.create(await open_backend(url), KEY, NOW) as journal:
        records = [b"%d" % n for n in range(200)]
        await journal.append(records)
        point = await journal.append([bytes(65536)])
    seen: list[bytes] = []
    async with await Journal.open(
        await open_backend(url), KEY, at_least=point, apply=lambda _, record: seen.append(record)
    ) as again:
        assert seen == [*records, bytes(65536)]
        assert again.checkpoint == point


async def test_largest_write_fits(url: str) -> None:
    async with await Journal.create(await open_backend(url), KEY, NOW) as journal:
        await journal.append([b"x"] * 1024)
        await journal.append([bytes(65536)] * 63)
        assert journal.checkpoint.seq == 1087


# several enclaves


async def test_two_enclaves_see_each_others_records(two: tuple[Enclave, Enclave], url: str) -> None:
    first, second = two
    assert await first.append(b"one") == 1
    assert await second.append(b"two") == 2, "behind the other's record, after a conflict"
    assert second.records == {1: b"one", 2: b"two"}
    assert first.records == {1: b"one"}
    assert (await first.journal.catch_up()).seq == 2
    assert first.records == second.records == await stored(url)
    assert (first.foreign, second.foreign) == ([2], [1])


async def test_enclaves_that_write_at_once_lose_and_double_nothing(two: tuple[Enclave, Enclave], url: str) -> None:
    async def work(enclave: Enclave, name: str) -> None:
        for n in range(25):
            await enclave.append(b"%s.%d.a" % (name.encode(), n), b"%s.%d.b" % (name.encode(), n))

    await asyncio.gather(*(work(e, f"{i}.{n}") for i, e in enumerate(two) for n in range(4)))
    for enclave in two:
        await enclave.journal.catch_up()
    records = await stored(url)
    assert two[0].records == two[1].records == records
    assert two[0].foreign, "the control: they were in each other's way"
    assert len(set(records.values())) == len(records) == 2 * 4 * 25 * 2
    assert all(records[n][:-1] == records[n + 1][:-1] for n in range(1, len(records), 2)), "appends stay whole"


async def test_decision_that_did_not_see_a_record_is_not_written(two: tuple[Enclave, Enclave], url: str) -> None:
    """How a budget holds over two enclaves: decide, append as of what was seen, decide again on a conflict."""
    first, second = two
    seen = second.journal.foreign_seq
    await first.append(b"took the last dollar")
    with pytest.raises(StateConflict):
        await second.append(b"takes the last dollar too", foreign_seq=seen)
    assert second.records == {1: b"took the last dollar"}, "by now it has seen it"
    assert await second.append(b"refused", foreign_seq=second.journal.foreign_seq) == 2
    assert await second.append(b"own records are no news", foreign_seq=second.journal.foreign_seq) == 3
    assert list((await stored(url)).values()) == [b"took the last dollar", b"refused", b"own records are no news"]


async def test_conflict_of_one_caller_leaves_the_others_of_the_same_write(two: tuple[Enclave, Enclave]) -> None:
    first, second = two
    seen = second.journal.foreign_seq
    await first.append(b"news")
    told = await asyncio.gather(
        second.append(b"a"), second.append(b"b", foreign_seq=seen), second.append(b"c"), return_exceptions=True
    )
    assert told[0] == 2
    assert isinstance(told[1], StateConflict)
    assert told[2] == 3


async def test_record_that_cannot_be_applied_stops_the_enclave(two: tuple[Enclave, Enclave]) -> None:
    first, second = two
    second.records[1] = b"in the way"
    await first.append(b"one")
    with pytest.raises(StateError, match="STATE_APPLY"):
        await second.append(b"two")
    assert second.journal.failure is not None


async def test_only_one_of_two_makes_the_journal(url: str) -> None:
    backends = [await open_backend(url) for _ in range(2)]
    made = await asyncio.gather(*(Journal.create(b, KEY, NOW) for b in backends), return_exceptions=True)
    assert sorted(m.code if isinstance(m, StateError) else "" for m in made) == ["", "STATE_EXISTS"]
    for backend in backends:
        await backend.close()


async def test_row_is_written_by_exactly_one_connection(url: str) -> None:
    backends = [await open_backend(url) for _ in range(4)]
    await backends[0].append(0, [b"header"])
    for seq in range(1, 30):
        told = await asyncio.gather(
            *(b.append(seq, [b"%d" % n]) for n, b in enumerate(backends)), return_exceptions=True
        )
        assert [isinstance(t, StateConflict) for t in told].count(True) == 3
        assert [t is None for t in told].count(True) == 1
    with pytest.raises(StateConflict):
        await backends[0].append(31, [b"behind a gap"])
    assert await backends[0].last_seq() == 29
    for backend in backends:
        await backend.close()


# a server that comes and goes


async def test_server_that_crashes_under_load_loses_and_doubles_nothing(server: PostgresServer, url: str) -> None:
    enclave = Enclave()
    enclave.journal = await Journal.create(await open_backend(url), KEY, NOW, apply=enclave.apply)
    done = asyncio.Event()
    answered, wanted, enough = 0, 50, asyncio.Event()

    async def work(name: int) -> None:
        nonlocal answered
        while not done.is_set():
            await enclave.append(b"%d.%d" % (name, answered))
            answered += 1
            if answered >= wanted:
                enough.set()

    async with enclave.journal:
        async with asyncio.TaskGroup() as workers:
            for n in range(8):
                workers.create_task(work(n))
            for _ in range(3):
                wanted, enough = answered + 50, asyncio.Event()
                await enough.wait()
                await asyncio.to_thread(server.stop, signal.SIGQUIT)
                await asyncio.to_thread(server.start)
            done.set()
        assert enclave.foreign == [], "its own records, written before a lost answer, are not somebody else's"
    assert await stored(url) == enclave.records
    assert len(set(enclave.records.values())) == len(enclave.records)


async def test_connection_cut_by_the_server_is_made_again(server: PostgresServer, url: str) -> None:
    async with await Journal.create(await open_backend(url), KEY, NOW) as journal:
        for n in range(5):
            admin = await server.admin()
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'vouchsafe'"
            )
            await admin.close()
            assert (await journal.append([b"%d" % n])).seq == n + 1


async def test_write_whose_answer_was_lost_is_not_made_twice(url: str) -> None:
    faulty = Faulty(await open_backend(url))
    async with await Journal.create(faulty, KEY, NOW) as journal:
        faulty.lost = 1
        assert (await journal.append([b"one", b"two"])).seq == 2
        assert journal.foreign_seq == 0
    assert await stored(url) == {1: b"one", 2: b"two"}


async def test_server_that_does_not_answer_is_given_up(server: PostgresServer, database: str, url: str) -> None:
    backend = await PostgresBackend.open(parse_postgres(url), deadline_s=0.5)
    journal = await Journal.create(backend, KEY, NOW)
    admin = await server.admin(database)
    async with admin.transaction():
        await admin.execute("LOCK TABLE vouchsafe_journal IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StateError, match="STATE_UNAVAILABLE"):
            await journal.append([b"one"])
    with pytest.raises(StateError, match="STATE_CLOSED"):
        await journal.append([b"two"])
    await admin.close()
    await journal.close()


async def test_absent_server_is_given_up(server: PostgresServer, tmp_path: Path) -> None:
    absent = parse_postgres(f"postgresql://u@/db?host={tmp_path}")
    with pytest.raises(StateError, match="STATE_UNAVAILABLE"):
        await PostgresBackend.open(absent, deadline_s=0.3)


async def test_call_that_is_cancelled_leaves_a_backend_that_works(url: str) -> None:
    backend = await open_backend(url)
    await backend.append(0, [b"x"])
    for _ in range(20):
        task = asyncio.create_task(backend.read(0, 1))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await backend.read(0, 1) == [(0, b"x")]
    await backend.close()
    with pytest.raises(StateError, match="STATE_CLOSED"):
        await backend.last_seq()


# layouts and trust


async def test_older_layout_is_migrated_and_a_newer_one_refused(server: PostgresServer, url: str) -> None:
    async with await Journal.create(await open_backend(url), KEY, NOW) as journal:
        await journal.append([b"one"])
    where, later = parse_postgres(url), [*MIGRATIONS, "ALTER TABLE vouchsafe_journal ADD COLUMN note text"]
    with pytest.raises(StateError, match="STATE_STORAGE"):
        await PostgresBackend.open(where, migrations=[*later, "CREATE TABLE vouchsafe_journal (x int)"])
    assert await stored(url) == {1: b"one"}, "the first of the two steps was taken back"
    await (await PostgresBackend.open(where, migrations=later)).close()
    with pytest.raises(StateError, match="STATE_SCHEMA"):
        await open_backend(url)


async def test_enclaves_that_start_together_migrate_once(url: str) -> None:
    backends = await asyncio.gather(*(open_backend(url) for _ in range(5)))
    assert [await b.last_seq() for b in backends] == [-1] * 5
    for backend in backends:
        await backend.close()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("DELETE FROM vouchsafe_journal WHERE seq = 2", "STATE_GAP"),
        ("DELETE FROM vouchsafe_journal WHERE seq = 0", "STATE_HEADER"),
        ("DELETE FROM vouchsafe_journal WHERE seq = 3", "STATE_ROLLBACK"),
        ("UPDATE vouchsafe_journal SET sealed = set_byte(sealed, 99, get_byte(sealed, 99) # 1) WHERE seq = 2",
         "STATE_RECORD"),
        ("UPDATE vouchsafe_journal SET sealed = (SELECT sealed FROM vouchsafe_journal WHERE seq = 1) WHERE seq = 2",
         "STATE_RECORD"),
        ("UPDATE vouchsafe_journal SET sealed = decode(repeat('00', 1000000), 'hex') WHERE seq = 2", "STATE_RECORD"),
        ("TRUNCATE vouchsafe_journal", "STATE_ROLLBACK"),
        ("ALTER TABLE vouchsafe_journal ALTER sealed TYPE bigint USING 1000000000000000", "STATE_STORAGE"),
        ("ALTER TABLE vouchsafe_journal ALTER seq TYPE text", "STATE_STORAGE"),
        ("DROP TABLE vouchsafe_journal", "STATE_STORAGE"),
    ],
    ids=["gap", "header", "tail", "bit", "copied", "long", "all", "numbers", "texts", "table"],
)  # fmt: skip
async def test_changed_database_is_refused(
    server: PostgresServer, database: str, url: str, change: str, code: str
) -> None:
    async with await Journal.create(await open_backend(url), KEY, NOW) as journal:
        for record in (b"one", b"two", b"three"):
            point = await journal.append([record])
    admin = await server.admin(database)
    await admin.execute(change)
    await admin.close()
    backend = await open_backend(url)
    with pytest.raises(StateError) as caught:
        await Journal.open(backend, KEY, at_least=point)
    assert caught.value.code == code
    await backend.close()


async def test_journal_set_back_under_a_running_enclave_stops_it(
    server: PostgresServer, database: str, two: tuple[Enclave, Enclave]
) -> None:
    await two[0].append(b"one")
    await two[0].append(b"two")
    admin = await server.admin(database)
    await admin.execute("DELETE FROM vouchsafe_journal WHERE seq = 2")
    await admin.close()
    with pytest.raises(StateError, match="STATE_ROLLBACK"):
        await two[0].append(b"three")


async def test_error_has_neither_password_nor_the_servers_words(server: PostgresServer, database: str) -> None:
    wrong = server.url(database).replace(PASSWORD, "wrong-canary")
    with pytest.raises(StateError) as caught:
        await open_backend(wrong)
    assert caught.value.code == "STATE_STORAGE"
    assert caught.value.actual == "SQLSTATE 28P01"
    text = f"{caught.value}{caught.value.hint}{caught.value.__cause__}{caught.value.__suppress_context__}"
    assert "canary" not in text
    assert USER not in text
    assert text.endswith("NoneTrue")


async def test_environment_and_home_have_no_say(
    server: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "PGHOST": "/nowhere", "PGPORT": "1", "PGUSER": "root", "PGDATABASE": "other", "PGPASSWORD": PASSWORD,
        "PGSSLMODE": "verify-full", "PGSSLNEGOTIATION": "direct", "PGTARGETSESSIONATTRS": "read-only",
        "PGOPTIONS": "-c search_path=x", "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    await (await open_backend(url)).close()
    home = tmp_path / ".pgpass"
    home.write_text(f"*:*:*:*:{PASSWORD}\n")
    home.chmod(0o600)
    with pytest.raises(StateError, match="STATE_STORAGE"):
        await open_backend(url.replace(f":{PASSWORD}@", "@"))


# TLS


@pytest.fixture
def tls(server: PostgresServer, tmp_path: Path) -> Path:
    """The server speaks TLS as `localhost`, signed by the root in this file."""
    root, certificate, key = chain("localhost")
    server.stop()
    server.serve_tls(certificate, key)
    server.start()
    path = tmp_path / "root.pem"
    path.write_bytes(root)
    return path


async def test_certificate_of_the_server_is_verified(server: PostgresServer, url: str, tls: Path) -> None:
    def over(root: Path, host: str) -> str:
        return server.tcp_url(DATABASE, f"sslmode=verify-full&sslrootcert={root}", host)

    backend = await open_backend(over(tls, "localhost"))
    assert await backend.last_seq() == -1
    await backend.close()
    other = tls.with_name("other.pem")
    await asyncio.to_thread(other.write_bytes, chain("localhost")[0])
    for refused in (over(other, "localhost"), over(tls, "127.0.0.1")):
        with pytest.raises(StateError, match="STATE_STORAGE: the database server's certificate"):
            await open_backend(refused)


async def test_server_without_tls_is_not_spoken_to(server: PostgresServer, tmp_path: Path) -> None:
    """A server that answers 'no TLS' gets no password: a network attacker would answer so."""
    heard: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readexactly(8))
        writer.write(b"N")
        heard.append(await reader.read())
        writer.close()

    root = tmp_path / "root.pem"
    await asyncio.to_thread(root.write_bytes, chain("localhost")[0])
    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    where = parse_postgres(f"postgresql://u:{PASSWORD}@localhost:{port}/db?sslmode=verify-full&sslrootcert={root}")
    async with listener:
        with pytest.raises(StateError, match="STATE_UNAVAILABLE"):
            await PostgresBackend.open(where, deadline_s=0.3)
    assert b"".join(heard) in {bytes.fromhex("0000000804d2162f") * n for n in range(1, 20)}


def chain(name: str) -> tuple[bytes, bytes, bytes]:
    """A new root, a certificate it signed for *name*, and that one's key, all PEM."""
    now = dt.datetime.now(dt.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test root")])
    made = []
    for key, subject in zip(keys, (issuer, x509.Name([])), strict=True):
        ca = subject is issuer
        made.append(
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=not ca)
            .sign(keys[0], hashes.SHA256())
        )
    pem = keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made[0].public_bytes(Encoding.PEM), made[1].public_bytes(Encoding.PEM), pem
