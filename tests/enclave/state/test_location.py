"""Where the state is, as the operator writes it: strictly read, and never a password in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from attestation.errors import InputError
from enclave.state import open_backend
from enclave.state.location import parse_postgres
from enclave.state.postgres import Server
from enclave.state.sqlite import SqliteBackend


async def test_sqlite_path_is_opened(tmp_path: Path) -> None:
    backend = await open_backend(f"sqlite:{tmp_path}/state.db")
    assert isinstance(backend, SqliteBackend)
    await backend.close()
    assert [p.name for p in sorted(tmp_path.glob("*"))] == ["state.db"]  # noqa: ASYNC240  # a test may block


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("postgresql://u@/db?host=/run/pg", Server("/run/pg", 5432, "u", "db", "", None)),
        ("postgresql://u:p%40ss@h:6000/db?sslmode=disable", Server("h", 6000, "u", "db", "p@ss", None)),
        ("postgresql://u@[::1]/db?sslmode=disable", Server("::1", 5432, "u", "db", "", None)),
    ],
)
def test_postgres_url_is_read(url: str, server: Server) -> None:
    assert parse_postgres(url) == server


@pytest.mark.parametrize(
    "url",
    [
        "", "state.db", "sqlite:", "sqlite:relative.db", "sqlite:/a\x00b", "sqlite:/" + "a" * 3000,
        "postgres://u@h/db?sslmode=disable", "postgresql+asyncpg://u@h/db?sslmode=disable",
        "postgresql://u:secret@h/db",
        "postgresql://u:secret@h/db?sslmode=prefer",
        "postgresql://u:secret@h/db?sslmode=require",
        "postgresql://u:secret@h/db?sslmode=verify-full",
        "postgresql://u:secret@h/db?sslmode=verify-full&sslrootcert=/no/such/secret.pem",
        "postgresql://u:secret@h/db?sslmode=disable&sslrootcert=/x",
        "postgresql://u:secret@h/db?sslmode=disable&sslmode=disable",
        "postgresql://u:secret@h/db?sslmode=disable&application_name=x",
        "postgresql://u:secret@h/db?sslmode=disable&passfile=/etc/secret",
        "postgresql://u:secret@h/db?sslmode=disable#x",
        "postgresql://u:secret@h:0x10/db?sslmode=disable",
        "postgresql://u:secret@h:99999/db?sslmode=disable",
        "postgresql://u:secret@[h/db?sslmode=disable",
        "postgresql://u:secret@h\u2100/db?sslmode=disable",
        "postgresql://u:secret@h/?sslmode=disable",
        "postgresql://u:secret@h?sslmode=disable",
        "postgresql://u:secret@h/a/b?sslmode=disable",
        "postgresql://:secret@h/db?sslmode=disable",
        "postgresql://u:secret@/db",
        "postgresql://u:secret@/db?host=run/pg",
        "postgresql://u:secret@/db?host=",
        "postgresql://u:secret@h/db?host=/run/pg",
        "postgresql://u:secret@/db?host=/run/pg&sslmode=disable",
        "postgresql://u:secret%ff@/db?host=/run/pg",
        "postgresql://u:secret%00@/db?host=/run/pg",
        "postgresql://u:secret@/db?host=/run/pg\n",
    ],
)  # fmt: skip
async def test_any_other_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(InputError) as caught:
        await open_backend(url)
    assert caught.value.code == "INPUT_STATE_URL"
    shown = f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
    assert "secret@" not in shown
    assert "u:secret" not in shown


def test_password_is_not_in_the_text_of_a_server() -> None:
    assert "p@ss" not in repr(parse_postgres("postgresql://u:p%40ss@h:6000/db?sslmode=disable"))
