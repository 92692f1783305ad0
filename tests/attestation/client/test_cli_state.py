"""`vouchsafe bootstrap` and `unlock` against the real enclave: what they keep, and what never leaves this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attestation.client.cli import main
from attestation.errors import InputError
from attestation.operator_state import Checkpoint, KeyFile, check_secret, new_secret, secret_digest
from tests.demo.provision import Provisioned, provision
from tests.devtee.running import running_machine
from tests.enclave.machine import EnclaveProcess, model_directory
from tests.enclave.support import NAME


@dataclass
class Booted:
    """A running service, and what its operator holds of it."""

    made: Provisioned
    port: int
    enclave: EnclaveProcess

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.port}"

    @property
    def seen(self) -> list[str]:
        return ["--policy", str(self.made.policy), "--connect", f"127.0.0.1:{self.port}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("s")
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def secret(folder: Path) -> Path:
    assert main(["bootstrap", "--new-secret", str(folder / "secret")]) == 0
    return folder / "secret"


def boot(folder: Path, name: str, port: int, secret: Path, state: Path) -> Any:  # Any: a context
    """One boot of a machine over the storage *state*, its configuration naming the secret's hash."""
    import contextlib

    @contextlib.contextmanager
    def running() -> Iterator[Booted]:
        with running_machine(folder / name):
            made = provision(
                folder / f"made-{name}", folder / name, model_directory(folder / "model"), None, "parrot",
                f"tcp:127.0.0.1:{port}", NAME,
            )  # fmt: skip
            text = made.config.read_text()
            before = secret_digest(made.secret).hex()
            assert before in text and "sqlite:state/state.db" in text
            text = text.replace(before, secret_digest(secret.read_text().strip()).hex())
            made.config.write_text(text.replace("sqlite:state/state.db", f"sqlite:{state}"))
            made.write_deployment()
            with EnclaveProcess(made.config, folder / name) as enclave:
                enclave.wait_for("enclave: listening on")
                yield Booted(made, port, enclave)
                assert enclave.stop() == 0

    return running()


@pytest.fixture(scope="module")
def first(folder: Path, port: int, secret: Path) -> Iterator[Booted]:
    with boot(folder, "a", port, secret, folder / "state.db") as booted:
        yield booted


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    told = capsys.readouterr()
    return status, told.out, told.err


def asked(booted: Booted, folder: Path, *more: str) -> list[str]:
    key, admin = str(folder / "key"), str(folder / "admin")
    return ["bootstrap", booted.url, *booted.seen, "--key", key, "--admin-key", admin, *more]


# --- in the order of an operator's first day --------------------------------------------------------------------------


def test_new_secret_is_private_and_its_hash_is_what_the_configuration_takes(
    folder: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = secret.read_text().strip()
    assert secret.stat().st_mode & 0o777 == 0o600 and len(text) == 43
    status, out, _ = run(capsys, "bootstrap", "--new-secret", str(folder / "other"))
    other = (folder / "other").read_text().strip()
    assert status == 0 and f'bootstrap-sha256 = "{secret_digest(other).hex()}"' in out and other not in out
    status, _, err = run(capsys, "bootstrap", "--new-secret", str(secret))
    assert status == 2 and "INPUT_FILE" in err and secret.read_text().strip() == text


@pytest.mark.parametrize("case", ["policy", "platform", "wrong", "malformed", "open-file", "taken", "missing"])
def test_bootstrap_that_cannot_be_leaves_nothing_behind(
    case: str, first: Booted, folder: Path, secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "secret"
    mine.touch(0o600)
    mine.write_text(new_secret() + "\n" if case == "wrong" else secret.read_text())
    command = asked(first, tmp_path, "--secret", str(mine))
    wanted, code = 1, ""
    if case == "policy":
        text = first.made.policy.read_text()
        other = tmp_path / "other.toml"
        operator = text.split('operators = ["')[1][:64]
        other.write_text(text.replace(operator, "11" * 32))
        command[command.index(str(first.made.policy))] = str(other)
        code = "DEPLOYMENT_OPERATOR"
    elif case == "platform":
        at = command.index("--policy")
        del command[at : at + 2]
        wanted, code = 2, "--policy is missing"
    elif case == "wrong":
        code = "INVALID_SECRET"
    elif case == "malformed":
        mine.write_text("too short")
        wanted, code = 2, "INPUT_SECRET"
    elif case == "open-file":
        mine.chmod(0o644)
        wanted, code = 2, "INPUT_FILE_MODE"
    elif case == "taken":
        (tmp_path / "admin").write_text("mine")
        wanted, code = 2, "INPUT_FILE"
    else:
        command[command.index(str(mine))] = str(tmp_path / "nowhere")
        wanted, code = 2, "INPUT_FILE"
    status, out, err = run(capsys, *command)
    assert status == wanted and code in out + err, out + err
    assert mine.read_text().strip() not in out + err
    assert not (tmp_path / "key").exists() and (case == "taken") == (tmp_path / "admin").exists()
    assert "enclave: ready" not in first.enclave.text


def test_unlock_of_a_new_service_says_that_there_is_nothing(
    first: Booted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = key_file(tmp_path, KeyFile(first.url, bytes(32), Checkpoint(bytes(16), 0, bytes(32))))
    status, _, err = run(capsys, "unlock", first.url, *first.seen, "--key", str(path))
    assert status == 1 and "STATE_ROLLBACK" in err and "rollback suspected" in err


def test_bootstrap_keeps_both_keys_and_prints_neither(
    first: Booted, folder: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *asked(first, folder, "--secret", str(secret), "--json"))
    assert (status, err) == (0, "")
    told = json.loads(out)
    kept, admin = KeyFile.decode((folder / "key").read_bytes()), (folder / "admin").read_text().strip()
    assert told["state"] == "open" and kept.target == first.url and admin.startswith("sk-admin-")
    for path in (folder / "key", folder / "admin"):
        assert path.stat().st_mode & 0o777 == 0o600
    for value in (kept.state_key.hex(), admin, secret.read_text().strip()):
        assert value not in out and value not in first.enclave.text
    first.enclave.wait_for("enclave: ready on")
    again = folder / "again"
    again.mkdir()
    status, _, err = run(capsys, *asked(first, again, "--secret", str(secret)))
    assert status == 1 and "STATE_OPEN" in err and not list(again.iterdir())


def test_unlock_of_an_open_state_remembers_how_far_it_has_come(
    first: Booted, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attestation.client.openai import attested_client
    from attestation.client.session import read_policy

    before = KeyFile.decode((folder / "key").read_bytes())
    connect, policy = ("127.0.0.1", first.port), read_policy(first.made.policy)
    with attested_client(first.url, policy=policy, connect=connect) as http:
        head = {"authorization": f"Bearer {(folder / 'admin').read_text().strip()}"}
        assert http.post("/v1/organization/projects", json={"name": "p"}, headers=head).status_code == 200
    status, out, _ = run(capsys, "unlock", first.url, *first.seen, "--key", str(folder / "key"))
    after = KeyFile.decode((folder / "key").read_bytes())
    assert status == 0 and "the state is open" in out and after.checkpoint.seq > before.checkpoint.seq
    assert after.state_key.hex() not in out and (folder / "key").stat().st_mode & 0o777 == 0o600


def test_answer_that_goes_back_is_refused_and_the_file_stays(
    first: Booted, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = KeyFile.decode((folder / "key").read_bytes())
    at = kept.checkpoint
    for wrong in (Checkpoint(at.state_id, at.seq + 99, at.head), Checkpoint(bytes(16), 0, at.head)):
        path = key_file(tmp_path, KeyFile(kept.target, kept.state_key, wrong))
        status, _, err = run(capsys, "unlock", first.url, *first.seen, "--key", str(path))
        assert status == 1 and "STATE_ROLLBACK" in err
        assert KeyFile.decode(path.read_bytes()).checkpoint == wrong


@pytest.mark.parametrize("case", ["mode", "target", "garbage", "wrong-key"])
def test_unlock_with_what_is_not_the_key(
    case: str, first: Booted, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = KeyFile.decode((folder / "key").read_bytes())
    path = key_file(tmp_path, kept)
    wanted, code = 2, "INPUT_FILE_MODE"
    if case == "mode":
        path.chmod(0o640)
    elif case == "target":
        path = key_file(tmp_path, KeyFile("https://other.test", kept.state_key, kept.checkpoint))
        code = "INPUT_TARGET"
    elif case == "garbage":
        path.write_bytes(b'{"version": 1}')
        code = "INPUT_KEY_FILE"
    else:
        path = key_file(tmp_path, KeyFile(kept.target, os.urandom(32), kept.checkpoint))
        wanted, code = 1, "INVALID_STATE_KEY"
    status, _, err = run(capsys, "unlock", first.url, *first.seen, "--key", str(path))
    assert status == wanted and code in err
    assert kept.state_key.hex() not in err


def test_after_a_reboot_the_state_is_locked_until_its_operator_comes(
    first: Booted, folder: Path, port: int, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = folder / "older.db"
    shutil.copy(folder / "state.db", old)  # what a host may keep
    assert first.enclave.stop() == 0
    first.enclave.stop = lambda: 0  # type: ignore[method-assign]  # it has been
    with boot(folder, "b", port, secret, folder / "state.db") as second:
        assert "and waits for `vouchsafe unlock`: its state is locked" in second.enclave.text
        status, out, _ = run(capsys, "unlock", second.url, *second.seen, "--key", str(folder / "key"), "--json")
        assert status == 0 and json.loads(out)["checkpoint"] > json.loads(out)["before"]
        second.enclave.wait_for("enclave: ready on")
    with boot(folder, "c", port, secret, old) as third:  # the host brings back what it kept
        status, _, err = run(capsys, "unlock", third.url, *third.seen, "--key", str(folder / "key"))
        assert status == 1 and "STATE_ROLLBACK" in err and "rollback suspected" in err
        assert "enclave: ready" not in third.enclave.text


# --- the files --------------------------------------------------------------------------------------------------------


def key_file(folder: Path, kept: KeyFile) -> Path:
    path = folder / "kept"
    path.touch(0o600)
    path.write_bytes(kept.encode())
    return path


def test_key_file_reads_back_and_nothing_else_is_one() -> None:
    kept = KeyFile("https://a.test", bytes(range(32)), Checkpoint(bytes(16), 7, bytes(32)))
    assert KeyFile.decode(kept.encode()) == kept and kept.state_key.hex() not in repr(kept)
    document = json.loads(kept.encode())
    for change in (
        {"version": 2},
        {"more": 1},
        {"state_key": "00"},
        {"state_key": 7},
        {"checkpoint": "zz"},
        {"target": 1},
    ):
        with pytest.raises(InputError):
            KeyFile.decode(json.dumps({**document, **change}).encode())
    for raw in (b"", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(InputError):
            KeyFile.decode(raw)


@pytest.mark.parametrize("text", ["", "a" * 21, "a" * 257, "a b" * 10, "ä" * 30, "a" * 30 + "\n"])
def test_what_has_too_few_bits_or_cannot_be_typed_is_no_secret(text: str) -> None:
    with pytest.raises(InputError):
        check_secret(text)
    assert check_secret(new_secret())
