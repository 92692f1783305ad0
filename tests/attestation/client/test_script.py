"""What a small program sees: the environment that names a service, and how a refusal ends it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from attestation.client.handshake import NotAttested
from attestation.client.receipts import ReceiptRefused
from attestation.client.script import client_for, exit_on_refusal, session_from_env, verdict
from attestation.errors import InputError, PolicyError, RefusedError, TransportError
from tests.attestation.client.enclave import served, session_for
from tests.attestation.client.ratls_server import Server
from tests.genuine import NAME, Genuine, genuine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def story() -> Genuine:
    return genuine()


@pytest.fixture
def server(story: Genuine) -> Iterator[Server]:
    with served(story) as running:
        yield running


@pytest.mark.parametrize("missing", ["VOUCHSAFE_TARGET", "VOUCHSAFE_POLICY"])
def test_what_is_not_set_is_named(tmp_path: Path, missing: str) -> None:
    given = {"VOUCHSAFE_TARGET": "https://demo.vouchsafe.test", "VOUCHSAFE_POLICY": str(tmp_path / "no.toml")}
    with pytest.raises(InputError, match=f"INPUT_ENVIRONMENT: {missing} is not set"):
        session_from_env({name: value for name, value in given.items() if name != missing})


def test_policy_that_cannot_be_used_is_the_users_own_input(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    given = {"VOUCHSAFE_TARGET": "https://demo.vouchsafe.test", "VOUCHSAFE_POLICY": str(policy)}
    with pytest.raises(InputError, match="INPUT_FILE"):
        session_from_env(given)
    policy.write_text("version = 1\n")
    with pytest.raises(PolicyError):
        session_from_env(given)
    with pytest.raises(InputError, match="INPUT_ADDRESS"):
        session_from_env({**given, "VOUCHSAFE_CONNECT": "somewhere"})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotAttested(RefusedError("TEST_LEAF", "no", hint="do this")), 1),
        (ReceiptRefused(RefusedError("TEST_LEAF", "no", hint="do this")), 1),
        (TransportError("TEST_LEAF", "no", hint="do this"), 1),
        (PolicyError("TEST_LEAF", "no", hint="do this"), 2),
    ],
    ids=["handshake", "receipt", "transport", "policy"],
)
def test_refusal_ends_the_program_however_a_library_wrapped_it(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_refusal():
        try:
            try:
                raise error
            except Exception as err:
                raise ConnectionError("Connection error.") from err
        except ConnectionError:
            raise ValueError("something else went wrong meanwhile")  # noqa: B904  # a careless library
    assert caught.value.code == status
    said = capsys.readouterr().err
    assert "TEST_LEAF: no" in said and "hint: do this" in said and said.count("\n") == 2


def test_every_other_error_passes() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_refusal():
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), exit_on_refusal():
        raise KeyboardInterrupt


def test_text_of_a_stranger_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_refusal():
        raise NotAttested(RefusedError("TEST_LEAF", "no", actual="\x1b[2J"))
    assert "\x1b" not in capsys.readouterr().err


def test_all_failed_checks_are_told(server: Server, story: Genuine, capsys: pytest.CaptureFixture[str]) -> None:
    session = session_for(server, story)
    other = replace(story.policy, deployment=replace(story.policy.deployment, operators=(bytes(32),)))
    session.policy = other
    assert verdict(session) == f"not verified yet: {session.target.origin}"
    client = openai.OpenAI(api_key="k", base_url=f"https://{NAME}/v1", http_client=client_for(session), max_retries=0)
    with pytest.raises(SystemExit) as caught, exit_on_refusal():
        client.models.list()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    failed = session.last_result.failed if session.last_result else []
    assert len(failed) > 1
    assert [line.split(":")[0].split()[-1] for line in said.splitlines() if line.startswith("  fail")] == [
        check.code for check in failed
    ]
    assert verdict(session).startswith(f"refused: {session.target.origin}, operator ")


def test_module_loads_no_http_library() -> None:
    code = "import sys, attestation.client.script; print(sorted({'httpx2', 'openai', 'httpx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
