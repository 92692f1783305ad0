"""`vouchsafe proxy` on the way of a program that knows nothing of attestation, beside the same program attested itself.

One HTTP client (httpx2) asks the same enclave (echo engine) twice: through an attested connection of its own, and in
plain HTTP through the proxy, which holds the attested connection. Receipts are verified on both roads where a row says
so: by the client itself on one, by the proxy on the other. All processes share this machine's cores, so through the
proxy the same cores do more work: with more of them the stream's row only gets better.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx2

from attestation.client.openai import attested_client
from attestation.client.session import AttestedSession
from tests.bench.live import MODEL, Service, cpu_ms, service, where
from tests.bench.rows import Row, adds_at_most, fact, interleaved, rate_at_least
from tests.demo.processes import PYTHON, ROOT, Process

ADDED_MS = 0.5
RATE = 0.8
EVENTS = 6000
DIRECT = "an attested connection of its own"
_CLI = (PYTHON, "-m", "attestation.client.cli", "proxy")


def rows(rounds: int) -> list[Row]:
    if subprocess.run([*_CLI, "--help"], cwd=ROOT, capture_output=True, timeout=60).returncode:
        print("bench: there is no `vouchsafe proxy` in this tree: its rows are left out", flush=True)
        return []
    with service() as live, _proxy(live) as (process, url):
        print(f"bench: {where('this client', 'the proxy', 'the enclave', 'the development TEE')}", flush=True)
        session = AttestedSession(live.target, live.policy, cache_dir=live.folder / "cache")
        headers = {"Authorization": f"Bearer {live.tenant.api_key}"}
        checked = attested_client(live.target, policy=live.policy, session=session)
        bare = attested_client(live.target, policy=live.policy, session=session, receipts="off")
        plain = httpx2.Client(base_url=url, trust_env=False, timeout=60)
        with checked, bare, plain:
            for client in (checked, bare, plain):
                client.headers.update(headers)
            return [*_requests(process, checked, bare, plain, rounds), *_streams(process, checked, plain, rounds)]


@contextmanager
def _proxy(live: Service) -> Iterator[tuple[Process, str]]:
    cache = live.folder / "proxy-cache"
    cache.mkdir(mode=0o700)
    options = (
        "--to", live.target.origin, "--connect", f"127.0.0.1:{live.port}", "--policy", str(live.made.policy),
        "--cache", str(cache), "--listen", "127.0.0.1:0",
    )  # fmt: skip
    process = Process("proxy", [*_CLI, *options])
    try:
        line = process.wait_for("proxy: http://", seconds=60, hint="start it by hand: vouchsafe proxy --help")
        yield process, line.split()[1]
    finally:
        process.stop()


def _requests(
    process: Process, checked: httpx2.Client, bare: httpx2.Client, plain: httpx2.Client, rounds: int
) -> list[Row]:
    turns = rounds * 20
    small = interleaved({"direct": partial(_models, bare), "proxy": partial(_models, plain)}, rounds=turns)
    before = cpu_ms(process.popen.pid)
    chat = interleaved({"direct": partial(_chat, checked), "proxy": partial(_chat, plain)}, rounds=turns)
    spent = (cpu_ms(process.popen.pid) - before) / (turns + 1)
    return [
        adds_at_most(
            "proxy: GET /v1/models, no receipt on either road (p50 ms)", small["proxy"], small["direct"], DIRECT,
            ADDED_MS, "ms",
        ),
        adds_at_most(
            "proxy: a chat completion, receipt verified on both roads (p50 ms)", chat["proxy"], chat["direct"], DIRECT,
            ADDED_MS, "ms",
        ),
        fact("proxy: the same completion, CPU of the proxy (ms)", spent),
    ]  # fmt: skip


def _streams(process: Process, checked: httpx2.Client, plain: httpx2.Client, rounds: int) -> list[Row]:
    turns = max(3, rounds // 3)
    before = cpu_ms(process.popen.pid)
    rate = interleaved({"direct": partial(_stream, checked), "proxy": partial(_stream, plain)}, rounds=turns)
    spent = (cpu_ms(process.popen.pid) - before) / (turns + 1) / EVENTS * 1000
    return [
        rate_at_least(
            f"proxy: a stream of {EVENTS} events, receipt verified on both roads (events/s)", rate["proxy"],
            rate["direct"], DIRECT, RATE,
        ),
        fact("proxy: the same stream, CPU of the proxy (us per event)", spent),
    ]  # fmt: skip


def _models(client: httpx2.Client) -> None:
    answer = client.get("/v1/models")
    assert answer.status_code == 200 and MODEL in answer.text, answer.status_code


def _chat(client: httpx2.Client) -> None:
    answer = client.post("/v1/chat/completions", json=_question("say it"))
    assert answer.status_code == 200 and "say it" in answer.text, answer.status_code


def _stream(client: httpx2.Client) -> float:
    """Events per second, from the request to the end of the stream; the client only counts them."""
    question = {**_question(" ".join(["word"] * EVENTS)), "stream": True}
    began, seen, tail = time.perf_counter(), 0, b""
    with client.stream("POST", "/v1/chat/completions", json=question) as answer:
        assert answer.status_code == 200, answer.status_code
        for chunk in answer.iter_raw():
            seen += (tail + chunk).count(b"\n\n")  # the end of an event may be split between two chunks
            tail = chunk[-1:]
    spent = time.perf_counter() - began
    assert seen >= EVENTS, f"{seen} events"
    return seen / spent


def _question(text: str) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]}
