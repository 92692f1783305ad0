"""Programs that know nothing of vouchsafe, through `vouchsafe proxy`: what they get, and what they get to read when the
host puts itself in between."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anthropic
import httpx2
import pytest

from tests.demo.__main__ import careless, tap
from tests.demo.search import found
from tests.demo.stack import Stack
from tests.end_to_end.page import commands, program
from tests.end_to_end.shell import QUESTION, Shell, known_answer, proxied

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

each_command = pytest.mark.parametrize("command", commands("by proxy"))


def text_of(command: str, stdout: str) -> str:
    """The answer as a reader puts it together; curl shows the events themselves."""
    if program(command) != "curl.sh":
        return stdout
    events = [json.loads(line[6:]) for line in stdout.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


@each_command
def test_unmodified_program_gets_the_answer(shell: Shell, proxy_url: str, command: str) -> None:
    before = status(proxy_url)
    done = shell.run(command, VOUCHSAFE_PROXY=proxy_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert known_answer(QUESTION) in text_of(command, done.stdout)
    after = status(proxy_url)
    assert after["receipts_verified"] == before["receipts_verified"] + 1 and after["verdict"] == "accepted"


def test_curl_shows_who_answers(shell: Shell, proxy_url: str, live_stack: Stack) -> None:
    (command,) = [c for c in commands("by proxy") if program(c) == "curl.sh"]
    head = shell.run(command, VOUCHSAFE_PROXY=proxy_url).stdout.partition("data: ")[0]
    assert f'"target": "{live_stack.target}"' in head and '"operator": "vouchsafe demo operator"' in head


def test_proxy_does_not_start_before_a_service_of_another_operator(shell: Shell, wrong_policy: str) -> None:
    (command,) = commands("proxy")
    done = shell.run(command.replace("127.0.0.1:8080", "127.0.0.1:0"), VOUCHSAFE_POLICY=wrong_policy)
    assert done.returncode == 1
    assert "DEPLOYMENT_OPERATOR" in done.stdout and "proxy: http" not in done.stdout


class Turned(NamedTuple):
    """The proxy's URL, the port of the relay that ends TLS, and what that relay has read."""

    url: str
    port: int
    record: Path


@pytest.fixture(scope="module")
def turned(shell: Shell, live_stack: Stack) -> Iterator[Turned]:
    """A proxy that was started on the genuine service, before a relay that has since begun to end TLS itself."""
    record = live_stack.folder / "turned.record"
    with Switch(live_stack.relay_port) as switch, proxied(shell, VOUCHSAFE_CONNECT=f"127.0.0.1:{switch.port}") as url:
        done = shell.run(commands("by proxy")[0], VOUCHSAFE_PROXY=url)
        assert done.returncode == 0, done.stderr
        with tap("terminate", live_stack.relay_port, record, "--mimic") as port:
            switch.turn(port)
            yield Turned(url, port, record)


@each_command
def test_relay_that_begins_to_end_tls_gets_no_prompt_and_the_program_is_told(
    shell: Shell, turned: Turned, command: str
) -> None:
    done = shell.run(command, VOUCHSAFE_PROXY=turned.url)
    assert done.returncode not in (0, 124), done.stdout
    said = done.stdout + done.stderr
    assert "The service is not accepted, nothing was sent to it: CLAIMS_KEY" in said
    assert "Traceback" not in said and "    at " not in said
    assert known_answer(QUESTION) not in said
    seen = turned.record.read_bytes()
    assert not found(seen, QUESTION) and b"Bearer" not in seen and b"chat/completions" not in seen


def test_that_relay_reads_the_prompt_of_a_client_that_verifies_nothing(live_stack: Stack, turned: Turned) -> None:
    """The control of the test above."""
    careless(live_stack, QUESTION, turned.port)
    seen = turned.record.read_bytes()
    assert found(seen, QUESTION) and b"Bearer" in seen and b"chat/completions" in seen


def test_anthropic_client_where_the_service_has_its_route(shell: Shell, proxy_url: str, live_stack: Stack) -> None:
    key = live_stack.tenant.api_key
    probe = httpx2.post(
        f"{proxy_url}/v1/messages", json={}, headers={"Authorization": f"Bearer {key}"}, trust_env=False
    )
    if probe.status_code in (404, 501):
        pytest.skip("the service has no POST /v1/messages yet: an Anthropic-style client has nothing to talk to")
    client = anthropic.Anthropic(base_url=proxy_url, auth_token=key, max_retries=0)
    message = client.messages.create(
        model=live_stack.model_id, max_tokens=200, messages=[{"role": "user", "content": QUESTION}]
    )
    assert known_answer(QUESTION) in "".join(block.text for block in message.content if block.type == "text")


def status(url: str) -> dict[str, int | str]:
    answer: dict[str, int | str] = httpx2.get(f"{url}/vouchsafe/status.json", trust_env=False).json()
    return answer


class Switch:
    """A port whose connections go to another port; `turn` cuts what is open and sends newcomers elsewhere."""

    def __init__(self, onward: int) -> None:
        self._onward, self._open = onward, set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def turn(self, onward: int) -> None:
        self._onward = onward
        self._cut()

    def _cut(self) -> None:
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near, self._onward), daemon=True).start()

    def _serve(self, near: socket.socket, onward: int) -> None:
        with near, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", onward), 10) as far:
            far.settimeout(None)
            pair = {near, far}
            self._open |= pair
            up = threading.Thread(target=self._copy, args=(near, far), daemon=True)
            up.start()
            self._copy(far, near)
            up.join(10)
            self._open -= pair

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut()
