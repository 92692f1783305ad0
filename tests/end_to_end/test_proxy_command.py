"""`vouchsafe proxy` and `vouchsafe status` as a user starts them: a process of its own in front of a live service."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import APIStatusError, AsyncOpenAI, OpenAI

from attestation.client import cli_proxy
from tests.attestation.client.enclave import served, show
from tests.attestation.client.proxying import local
from tests.bench.live import MODEL, NAME, Service, service
from tests.genuine import genuine

VOUCHSAFE = [sys.executable, "-m", "attestation.client.cli"]
WORDS = "The very words that come back"
MESSAGES = [{"role": "user", "content": WORDS}]


@pytest.fixture(scope="module")
def live() -> Iterator[Service]:
    with service() as running:
        yield running


def command(live: Service, *options: str, policy: Path | None = None) -> list[str]:
    return [
        *VOUCHSAFE, "proxy", "--to", f"https://{NAME}:{live.port}", "--connect", f"127.0.0.1:{live.port}",
        "--policy", str(policy or live.made.policy), *options,
    ]  # fmt: skip


@contextmanager
def proxy(live: Service, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address once it serves, and its process, which is stopped in order and must end with 0."""
    process = subprocess.Popen(command(live, *options), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("proxy: "), line
        yield line.split()[1], process
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def running(live: Service) -> Iterator[str]:
    with proxy(live, "--listen", "127.0.0.1:0") as (url, _):
        yield url


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VOUCHSAFE, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_unmodified_sdk_works_by_its_base_url(live: Service, running: str) -> None:
    with OpenAI(base_url=f"{running}/v1", api_key=live.tenant.api_key, max_retries=0) as client:
        assert [m.id for m in client.models.list()] == [MODEL]
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == WORDS
        with client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:  # type: ignore[call-overload]
            pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
        assert "".join(pieces) == WORDS and len(pieces) > 2


async def test_many_streams_at_once(live: Service, running: str) -> None:
    async with AsyncOpenAI(base_url=f"{running}/v1", api_key=live.tenant.api_key, max_retries=0) as client:

        async def ask(number: int) -> str:
            said = f"{WORDS}, number {number}"
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": said}], stream=True
            )
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            assert "".join(pieces) == said
            return said

        assert len(set(await asyncio.gather(*(ask(n) for n in range(20))))) == 20


def test_errors_of_the_service_pass_unchanged(live: Service, running: str) -> None:
    with OpenAI(base_url=f"{running}/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(APIStatusError) as caught:
            client.models.list()
        assert caught.value.status_code == 401
    with OpenAI(base_url=f"{running}/v1", api_key=live.tenant.api_key, max_retries=0) as client:
        with pytest.raises(APIStatusError) as caught:
            client.chat.completions.create(model="no-such-model", messages=MESSAGES)  # type: ignore[arg-type]
        assert caught.value.status_code == 404


def test_status_command_tells_the_verdict(live: Service, running: str) -> None:
    told = run("status", "--proxy", running)
    assert told.returncode == 0
    assert re.search(r"verdict +accepted", told.stdout) and WORDS not in told.stdout
    facts = json.loads(run("status", "--proxy", running.removeprefix("http://"), "--json").stdout)
    assert facts["target"] == f"https://{NAME}:{live.port}" and facts["development"] is True


def test_status_command_says_when_there_is_none(tmp_path: Path) -> None:
    told = run("status", "--proxy", f"unix:{tmp_path}/none.sock")
    assert told.returncode == 1 and "is `vouchsafe proxy` running?" in told.stderr
    assert "Traceback" not in told.stderr


def test_unix_socket_is_for_this_user_alone_and_goes_with_the_proxy(live: Service, tmp_path: Path) -> None:
    path = tmp_path / "p.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # nobody listens on it any more: it is replaced
    with proxy(live, "--listen", f"unix:{path}") as (where, _):
        assert where == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert run("status", "--proxy", where).returncode == 0
        asked = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.tenant.api_key}\r\n\r\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(asked.encode())
            assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
        second = subprocess.run(
            command(live, "--listen", where), capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 2 and "Address already in use" in second.stderr
    assert not path.exists()


@pytest.mark.parametrize("options", [["--listen", "0.0.0.0:0"], ["--listen", "[::]:0", "--expose"]])
def test_address_beyond_loopback_needs_the_flag_and_a_token(live: Service, options: list[str]) -> None:
    told = subprocess.run(command(live, *options), capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2 and told.stdout == ""
    assert "INPUT_LISTEN" in told.stderr and "--expose and --token-file" in told.stderr


def test_weak_token_is_no_token(live: Service, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    options = ["--listen", "0.0.0.0:0", "--expose", "--token-file", str(tmp_path / "token")]
    told = subprocess.run(command(live, *options), capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2 and "INPUT_TOKEN" in told.stderr and "secret" not in told.stderr


def test_address_beyond_loopback_with_flag_and_token(live: Service, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 40 + "\n")
    # 127.0.0.0/8 is loopback to the kernel; 0.0.0.0 is the address that the rule is about.
    with proxy(live, "--listen", "0.0.0.0:0", "--expose", "--token-file", str(tmp_path / "token")) as (url, _):
        near = url.replace("0.0.0.0", "127.0.0.1")
        with OpenAI(base_url=f"{near}/v1", api_key=live.tenant.api_key, max_retries=0) as client:
            with pytest.raises(APIStatusError) as caught:
                client.models.list()
            assert caught.value.status_code == 401
            asked = client.with_options(default_headers={"X-Vouchsafe-Token": "t" * 40})
            assert [m.id for m in asked.models.list()] == [MODEL]
        assert run("status", "--proxy", near).returncode == 1
        assert run("status", "--proxy", near, "--token-file", str(tmp_path / "token")).returncode == 0


def test_service_that_is_refused_is_not_served(live: Service, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    text = live.made.policy.read_text()
    key = re.search(r'operators = \["([0-9a-f]{64})"', text)
    assert key is not None
    policy.write_text(text.replace(key[1], "11" * 32))
    told = subprocess.run(
        command(live, "--listen", "127.0.0.1:0", policy=policy), capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 1
    assert "REFUSED" in told.stdout and "DEPLOYMENT_OPERATOR" in told.stdout and "proxy:" not in told.stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--listen", "nowhere"], "INPUT_LISTEN"), (["--listen", "127.0.0.1:99999"], "INPUT_LISTEN"),
        (["--listen", "127.0.0.1:0", "--expose"], "INPUT_LISTEN"), (["--reattest", "1s"], "INPUT_TIME"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_said(live: Service, options: list[str], code: str) -> None:
    told = subprocess.run(command(live, *options), capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2 and code in told.stderr and "Traceback" not in told.stderr


def test_head_without_an_end_is_cut(running: str) -> None:
    host, port = running.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises((ConnectionError, EOFError)):  # the kernel may take some more before it tells
            for _ in range(200):
                client.sendall(b"x-more: " + b"y" * 4096 + b"\r\n")
            if not client.recv(1):
                raise EOFError


def test_proxy_prints_nothing_of_a_request(live: Service) -> None:
    process = subprocess.Popen(
        command(live, "--listen", "127.0.0.1:0"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split()[1]
        with OpenAI(base_url=f"{url}/v1", api_key=live.tenant.api_key, max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)  # type: ignore[call-overload]
            next(iter(stream))
            stream.close()  # in the middle
            with pytest.raises(APIStatusError):
                client.chat.completions.create(model=WORDS, messages=MESSAGES)  # type: ignore[arg-type]
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert WORDS not in rest and live.tenant.api_key not in rest and "Traceback" not in rest
    finally:
        process.kill()
        process.wait(10)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def test_service_is_proven_again_on_schedule_and_hung_up_when_refused(capsys: pytest.CaptureFixture[str]) -> None:
    story = genuine()
    with served(story) as server:
        async with local(server, story) as made:
            assert (await made.ask("GET", "/v1/models", b"")).status == 404
            assert made.upstream.counts == (1, 1)
            task = asyncio.create_task(cli_proxy._reattest(made.session, made.upstream, made.state, 0.05))
            try:
                await until(lambda: made.state.verdict == "accepted")
                assert made.upstream.counts == (1, 1)
                show(server, genuine(key=1, config=b"c" * 32))
                await until(lambda: made.state.verdict == "refused")
                await until(lambda: made.upstream.counts == (0, 0))
                show(server, story)
                await until(lambda: made.state.verdict == "accepted")
            finally:
                task.cancel()
    assert "REFUSED" in capsys.readouterr().out
