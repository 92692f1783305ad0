"""The whole service, once for the tests of what other people's programs see: development TEE, enclave with the real
engine, relay; and the local proxy in front of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.dsse import public_bytes
from tests.demo.stack import Stack, running
from tests.end_to_end.shell import CLIENTS, Shell, proxied
from tests.engine_fixture import need_engine


@pytest.fixture(scope="session")
def live_stack() -> Iterator[Stack]:
    need_engine()
    if not (CLIENTS / "bin/node").exists():
        pytest.fail("no .venv-clients: `make clients` makes it")
    with running() as up:
        yield up


@pytest.fixture(scope="session")
def shell(live_stack: Stack) -> Shell:
    return Shell(live_stack.write_client_env())


@pytest.fixture(scope="session")
def wrong_policy(live_stack: Stack) -> str:
    """The client's policy with another operator's key in it."""
    text = live_stack.provisioned.policy.read_text()
    other = public_bytes(Ed25519PrivateKey.generate()).hex()
    text, count = re.subn(r'operators = \["[0-9a-f]{64}"\]', f'operators = ["{other}"]', text)
    assert count == 1
    path = live_stack.folder / "other-operator.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="session")
def proxy_url(shell: Shell) -> Iterator[str]:
    with proxied(shell) as url:
        yield url
