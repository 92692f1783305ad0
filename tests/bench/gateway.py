"""What the gateway costs: on an instant engine, where nothing else takes time; before the real engine, beside the same
vLLM bare on a unix socket; and beside LiteLLM's proxy in front of the same instant answers.

All processes share this machine's cores. Clients are httpx2, ours over an attested connection of its own, the others
in plain HTTP: TLS at the client's end is part of what is compared.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from attestation.client.openai import async_attested_client, attested_client
from attestation.client.session import AttestedSession, read_policy
from enclave.engine.profiles import PROFILES, argv, environment
from tests.bench.live import HINT, MODEL, NAME, Service, cpu_ms, service, where
from tests.bench.rows import Row, adds_at_most, at_most, fact, interleaved, rate_at_least
from tests.demo.processes import PYTHON, ROOT, Process
from tests.demo.provision import provision
from tests.demo.stack import PARROT
from tests.demo.tenant import set_up
from tests.engine_models import Model

REQUEST_US, CHUNK_US = 400.0, 45.0
MOUNTED_MS, PROCESS_MS = 1.0, 2.5
MOUNTED_RATE, PROCESS_RATE = 0.9, 0.85
EVENTS, STREAMS, TOKENS = 4000, 16, 96
REQUESTS = 100_000
GROWTH_MB = 8.0
WORDS = " ".join(f"w{n}" for n in range(EVENTS))
"""Each its own: LiteLLM ends a stream that says the same again and again."""
CHAT = "/v1/chat/completions"
BARE = "bare vLLM on a unix socket"
LITELLM = ROOT / ".venv-litellm/bin/litellm"


def rows(rounds: int) -> list[Row]:
    return [*_instant(rounds), *_real(rounds)]


# --- an instant engine ------------------------------------------------------------------------------------------------


def _instant(rounds: int) -> list[Row]:
    with service() as live:
        print(f"bench: {where('this client', 'the enclave')}", flush=True)
        with _attested(live) as http:
            ours = _costs(live.enclave, http, rounds)
        growth = asyncio.run(_growth(live))
    made = [
        at_most("gateway: CPU of a request, instant engine (us)", ours["request"], REQUEST_US, "us"),
        at_most("gateway: CPU of a streamed chunk, instant engine (us)", ours["chunk"], CHUNK_US, "us"),
        at_most(f"gateway: memory from 20,000 to {REQUESTS:,} requests (MB more)", growth, GROWTH_MB, "MB"),
        fact("gateway: a request, instant engine (p50 ms)", ours["p50"]),
    ]
    if not LITELLM.exists():
        print("bench: LiteLLM is not installed: run tests/bench/setup_litellm.sh; its rows are left out", flush=True)
        return made
    with _litellm() as (process, http):
        peer = _costs(process, http, max(1, rounds // 3))
    name = "LiteLLM's proxy before the same answers"
    return [
        *made,
        _beside("gateway: CPU of a request (us)", ours["request"], peer["request"], name),
        _beside("gateway: CPU of a streamed chunk (us)", ours["chunk"], peer["chunk"], name),
        _beside("gateway: a request (p50 ms)", ours["p50"], peer["p50"], name),
    ]


def _beside(name: str, ours: float, peer: float, peer_name: str) -> Row:
    return Row(name, ours, peer, peer_name, ours / peer)


@contextmanager
def _attested(live: Service) -> Iterator[httpx2.Client]:
    session = AttestedSession(live.target, live.policy, cache_dir=live.folder / "cache")
    with attested_client(live.target, policy=live.policy, session=session, receipts="off") as http:
        http.headers["Authorization"] = f"Bearer {live.tenant.api_key}"
        yield http


@contextmanager
def _litellm() -> Iterator[tuple[Process, httpx2.Client]]:
    folder = Path(tempfile.mkdtemp(prefix="vouchsafe-litellm-"))
    started = [Process("instant engine", [PYTHON, "-m", "tests.bench.instant"])]
    try:
        upstream = started[0].wait_for("listening on", seconds=30, hint=HINT).rpartition(" ")[2]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        key = "sk-" + "0123456789abcdef" * 3
        config = {
            "model_list": [{
                "model_name": MODEL,
                "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"http://{upstream}/v1", "api_key": "none"},
            }],
            "general_settings": {"master_key": key},
        }  # fmt: skip
        (folder / "config.yaml").write_text(json.dumps(config))
        command = [str(LITELLM), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        quiet = {"LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        started.append(Process("LiteLLM", command, env=quiet))
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
            http.headers["Authorization"] = f"Bearer {key}"
            _until(lambda: http.get("/health/liveliness").status_code == 200)
            yield started[1], http
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _until(ready: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except httpx2.TransportError:
            pass
        if time.monotonic() > deadline:
            raise RuntimeError("the peer did not come up")
        time.sleep(0.2)


def _costs(process: Process, http: httpx2.Client, rounds: int) -> dict[str, float]:
    """Microseconds of the process's CPU for a request and a chunk, and the median request in ms."""
    turns = rounds * 40
    for _ in range(20):
        _ask(http)
    before, times = cpu_ms(process.popen.pid), []
    for _ in range(turns):
        began = time.perf_counter()
        _ask(http)
        times.append((time.perf_counter() - began) * 1000)
    request = (cpu_ms(process.popen.pid) - before) / turns * 1000
    chunks = []
    for _ in range(max(3, rounds // 3)):
        before = cpu_ms(process.popen.pid)
        _stream(http)
        chunks.append((cpu_ms(process.popen.pid) - before) * 1000 / EVENTS)
    return {"request": request, "chunk": sorted(chunks)[len(chunks) // 2], "p50": sorted(times)[turns // 2]}


def _ask(http: httpx2.Client) -> None:
    answer = http.post(CHAT, json=_question("say it"))
    assert answer.status_code == 200 and "say it" in answer.text, answer.status_code


def _stream(http: httpx2.Client) -> None:
    with http.stream("POST", CHAT, json={**_question(WORDS), "stream": True}) as answer:
        assert answer.status_code == 200, answer.status_code
        seen = sum(chunk.count(b"data: ") for chunk in answer.iter_raw())
    assert seen >= EVENTS * 0.9, f"{seen} events"


def _question(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


async def _growth(live: Service) -> float:
    """Megabytes that the enclave holds more after all requests than after the first fifth, when its bounded stores
    (receipts for 20 minutes, 16,384 at most) are full."""
    async with _async(live) as http:

        async def some(count: int) -> None:
            for _ in range(count):
                answer = await http.post(CHAT, json=_question("say it"))
                assert answer.status_code == 200

        async def all(count: int) -> None:
            await asyncio.gather(*(some(count // 16) for _ in range(16)))

        await all(REQUESTS // 5)
        first = _rss(live.enclave)
        await all(REQUESTS - REQUESTS // 5)
        return _rss(live.enclave) - first


@asynccontextmanager
async def _async(live: Service) -> AsyncIterator[httpx2.AsyncClient]:
    session = AttestedSession(live.target, live.policy, cache_dir=live.folder / "cache")
    async with async_attested_client(live.target, policy=live.policy, session=session, receipts="off") as http:
        http.headers["Authorization"] = f"Bearer {live.tenant.api_key}"
        yield http


def _rss(process: Process) -> float:
    status = Path(f"/proc/{process.popen.pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


# --- the real engine --------------------------------------------------------------------------------------------------


def _real(rounds: int) -> list[Row]:
    with _enclave() as live, _bare(live.folder) as bare, _attested(live) as http:
        print(f"bench: {where('this client', 'the enclave with two engines', 'bare vLLM')}", flush=True)
        one = partial(_question, "hello", max_tokens=1, temperature=0)
        turns = interleaved(
            {
                "bare": partial(_post, bare, one()),
                "mounted": partial(_post, http, one()),
                "process": partial(_post, http, {**one(), "model": "second"}),
            },
            rounds=rounds * 20,
        )  # fmt: skip
        rates = asyncio.run(_rates(live, max(3, rounds // 3)))
    return [
        adds_at_most("gateway: one token, engine mounted (p50 ms)", turns["mounted"], turns["bare"], BARE, MOUNTED_MS,
                     "ms"),
        adds_at_most("gateway: one token, engine process (p50 ms)", turns["process"], turns["bare"], BARE, PROCESS_MS,
                     "ms"),
        rate_at_least(f"gateway: {STREAMS} streams, engine mounted (tokens/s)", rates["mounted"], rates["bare"], BARE,
                      MOUNTED_RATE),
        rate_at_least(f"gateway: {STREAMS} streams, engine process (tokens/s)", rates["process"], rates["bare"], BARE,
                      PROCESS_RATE),
    ]  # fmt: skip


@contextmanager
def _enclave() -> Iterator[Service]:
    """The enclave as it is served, with the parrot mounted and once more as a process."""
    folder = Path(tempfile.mkdtemp(prefix="vouchsafe-bench-"))
    started: list[Process] = []
    try:
        tee = folder / "tee"
        started.append(Process("development TEE", [PYTHON, "-m", "tests.devtee", "--state", str(tee)]))
        started[0].wait_for("devtee: ready", seconds=60, hint=HINT)
        made = provision(folder / "made", tee, PARROT, None, MODEL, "tcp:127.0.0.1:0", NAME, more=("second",))
        command = [PYTHON, "-m", "enclave.cli", "serve", "--config", str(made.config)]
        enclave = Process("enclave", command, env={"LD_LIBRARY_PATH": str(tee / "lib")})
        started.append(enclave)
        line = enclave.wait_for("enclave: listening on", seconds=300, hint=HINT)
        port = int(line.partition(",")[0].rpartition(":")[2])
        target = f"https://{NAME}:{port}"
        with attested_client(target, policy=read_policy(made.policy), connect=("127.0.0.1", port)) as http:
            tenant = set_up(http, target, made.secret)
        yield Service(folder, made, enclave, port, tenant)
    finally:
        for process in reversed(started):
            process.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bare(folder: Path) -> Iterator[httpx2.Client]:
    """vLLM's own server with the arguments and the environment of the profile, on a unix socket."""
    profile, path, runtime = PROFILES["cpu"], folder / "bare.sock", folder / "bare"
    for name in ("cache", "config", "rpc"):
        (runtime / name).mkdir(parents=True)
    made = environment(profile, runtime)
    made.pop("VLLM_LOGGING_CONFIG_PATH")
    line = argv(profile, Model(PARROT))
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--uds", str(path), *line]
    process = Process("bare vLLM", command, env=made)
    try:
        with httpx2.Client(
            transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://bare", trust_env=False, timeout=120
        ) as http:
            _until(lambda: http.get("/health").status_code == 200, 300)
            yield http
    finally:
        process.stop()


def _post(http: httpx2.Client, question: dict[str, Any]) -> None:
    answer = http.post(CHAT, json=question)
    assert answer.status_code == 200, (answer.status_code, answer.text[:200])


async def _rates(live: Service, rounds: int) -> dict[str, float]:
    """Tokens per second of 16 streams at a time, medians of turns."""
    uds = httpx2.AsyncHTTPTransport(uds=str(live.folder / "bare.sock"))
    found: dict[str, list[float]] = {"bare": [], "mounted": [], "process": []}
    async with (
        _async(live) as http,
        httpx2.AsyncClient(transport=uds, base_url="http://bare", trust_env=False, timeout=120) as bare,
    ):
        for number in range(rounds + 1):
            for name, client, model in (("bare", bare, MODEL), ("mounted", http, MODEL), ("process", http, "second")):
                began = time.perf_counter()
                await asyncio.gather(*(_tokens(client, model) for _ in range(STREAMS)))
                if number:
                    found[name].append(STREAMS * TOKENS / (time.perf_counter() - began))
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


async def _tokens(client: httpx2.AsyncClient, model: str) -> None:
    question = {**_question("hello", stream=True, max_tokens=TOKENS, ignore_eos=True, temperature=0), "model": model}
    async with client.stream("POST", CHAT, json=question) as answer:
        assert answer.status_code == 200, answer.status_code
        async for _ in answer.aiter_raw():
            pass
