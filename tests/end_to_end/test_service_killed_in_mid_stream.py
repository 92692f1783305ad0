"""Killing any one process in the middle of a stream gives the client an error and no false receipt.

The engine is frozen (SIGSTOP) once the first tokens have arrived, so that the stream is certainly not over when the
process dies. The stack of the tests before this file (`live_stack`) serves the relay's death and then the engine's,
after which it serves nobody: this file comes last in its folder. The enclave's own death takes a second boot.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from attestation.client.openai import AttestedClient, attested_client
from attestation.client.receipts import ReceiptRefused
from attestation.client.session import AttestedSession, read_policy
from tests.demo.processes import PYTHON, Process
from tests.demo.stack import NAME, Stack, running
from tests.engine_fixture import need_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

QUESTION = "What can the host see?"
ERRORS = (openai.APIError, httpx2.HTTPError, ReceiptRefused)


@pytest.fixture(scope="module")
def stack(live_stack: Stack) -> Stack:
    return live_stack


def client(stack: Stack, port: int | None = None) -> tuple[AttestedClient, openai.OpenAI]:
    policy = read_policy(stack.provisioned.policy)
    http = attested_client(stack.target, policy=policy, connect=("127.0.0.1", port or stack.relay_port))
    key = stack.tenant.api_key
    return http, openai.OpenAI(base_url=f"{stack.target}/v1", api_key=key, http_client=http, max_retries=0)


def engine_pids(stack: Stack) -> list[int]:
    """EngineCore and its workers: the enclave's group but for the front."""
    return [pid for pid in stack.enclave.group() if pid != stack.enclave.popen.pid]


def engine_core(stack: Stack) -> int:
    for pid in engine_pids(stack):
        if "EngineCor" in Path(f"/proc/{pid}/comm").read_text():
            return pid
    raise AssertionError("no EngineCore among the enclave's processes")


def broken_off(
    stack: Stack, victim: int | None, number: int = signal.SIGKILL, port: int | None = None
) -> AttestedClient:
    """Start a stream, freeze the engine after the first tokens, kill *victim*, and expect an error."""
    http, sdk = client(stack, port)
    core = engine_core(stack)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with pytest.raises(ERRORS):
        stream = sdk.chat.completions.create(
            model=stack.model_id, messages=messages, temperature=0, max_tokens=200, stream=True
        )
        for at, _ in enumerate(stream):
            if at == 1:
                os.kill(core, signal.SIGSTOP)
                if victim is not None:
                    os.kill(victim, number)
                if victim not in (core, stack.enclave.popen.pid):
                    time.sleep(0.2)  # the death, not the next token, is what the client sees
                    os.kill(core, signal.SIGCONT)
    return http


def assert_no_receipt(http: AttestedClient) -> None:
    """What the client holds afterwards is not taken for a proven answer."""
    assert http.receipts.last is not None
    assert not http.receipts.last.complete
    if http.receipts.last.receipt is None:
        with pytest.raises(ReceiptRefused):
            http.receipts.verify_last()


def test_the_whole_answer_has_a_receipt_that_verifies(stack: Stack) -> None:
    """The positive control of the tests below."""
    http, sdk = client(stack)
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    stream = sdk.chat.completions.create(
        model=stack.model_id, messages=messages, temperature=0, max_tokens=200, stream=True
    )
    text = "".join(c.delta.content or "" for event in stream for c in event.choices)
    assert len(text) > 20
    assert http.receipts.verify_last().accepted
    http.close()


def test_killed_relay_is_an_error_and_no_receipt(stack: Stack) -> None:
    socket = stack.folder / "run" / "enclave.sock"
    command = (PYTHON, "-m", "host.cli", "relay", "--listen", "tcp:127.0.0.1:0", "--route", f"{NAME}=unix:{socket}")
    relay = Process("second relay", command)
    try:
        port = int(relay.wait_for("listening on", seconds=20, hint="").rpartition(":")[2])
        http = broken_off(stack, relay.popen.pid, port=port)
        assert_no_receipt(http)
        http.close()
    finally:
        relay.stop()


def test_the_service_goes_on_after_a_relay_died(stack: Stack) -> None:
    policy = read_policy(stack.provisioned.policy)
    session = AttestedSession(stack.target, policy, connect=("127.0.0.1", stack.relay_port))
    assert session.verify_once().accepted


def test_killed_development_tee_does_not_make_a_running_enclave_lie(stack: Stack) -> None:
    """The "hardware" goes: no new connection can be proven, so none is accepted; nothing hangs."""
    os.kill(stack.devtee.popen.pid, signal.SIGSTOP)
    try:
        policy = read_policy(stack.provisioned.policy)
        session = AttestedSession(stack.target, policy, connect=("127.0.0.1", stack.relay_port), seconds=3)
        with pytest.raises(Exception) as caught:
            session.verify_once()
        assert "TRANSPORT" in str(caught.value) or "not attested" in str(caught.value)
    finally:
        os.kill(stack.devtee.popen.pid, signal.SIGCONT)


def test_killed_engine_is_an_error_and_the_enclave_stops_fail_closed(stack: Stack) -> None:
    """Last on this stack: a dead engine ends the enclave."""
    http = broken_off(stack, engine_core(stack))
    assert_no_receipt(http)
    http.close()
    stack.enclave.popen.wait(60)
    assert stack.enclave.popen.returncode == 3
    deadline = time.monotonic() + 15  # Python's resource tracker tidies up after its parent, then ends by itself
    while stack.enclave.group() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stack.enclave.group() == []


def test_killed_enclave_is_an_error_and_leaves_nothing() -> None:
    need_engine()
    with running() as up:
        http = broken_off(up, up.enclave.popen.pid)
        assert_no_receipt(http)
        http.close()
    assert up.enclave.group() == []
