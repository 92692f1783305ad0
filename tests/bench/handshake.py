"""The attested channel: what verifying adds to a client's handshake and to a warm request, and what the enclave's TLS
costs its server.

The service is a development TEE and an enclave with the echo engine, each a process of its own: TDX and one GPU, the
channel proof included. The peer is the standard library's `ssl`, TLS 1.3, verifying nothing, against the same server.
Handshakes are measured in CPU time of the process in question: the clock would mostly show the wait for the quote.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2
from OpenSSL import SSL

from attestation.client.handshake import client_context
from attestation.client.session import AttestedSession
from attestation.client.target import Target
from tests.bench.live import Service, cpu_ms, service, where
from tests.bench.rows import Row, adds_at_most, fact, interleaved, ratio_at_most
from tests.demo.processes import PYTHON, ROOT, Process

COLD_MS = 10.0
KNOWN_MS = 2.0
WARM = 1.1
"""What "nothing measurable" means for a warm request: a tenth of its median, through the OpenAI SDK's own library."""
WARM_CPU_MS = 0.1
SERVER = 1.5
STDLIB = "stdlib ssl, no attestation"
UVICORN = "uvicorn with stdlib TLS"
BATCH = 20
"""Handshakes per reading of a server's CPU clock; with the pause after them the closing is counted too."""
_SETTLE_S = 0.03
_FRESH = """
import socket, ssl, sys, time
from pathlib import Path
from attestation.client.session import AttestedSession, read_policy
from attestation.client.target import Target
from tests.bench.handshake import dial, unverified
port, policy, cache = int(sys.argv[1]), read_policy(sys.argv[2]), Path(sys.argv[3])
target = Target(sys.argv[4], port, ("127.0.0.1", port))
peer = unverified()
begun = time.process_time()
dial(target, peer)
middle = time.process_time()
dial(target, AttestedSession(target, policy, cache_dir=cache).context())
print((time.process_time() - middle) * 1000, (middle - begun) * 1000)
"""


def rows(rounds: int) -> list[Row]:
    with service() as live:
        print(f"bench: {where('this client', 'the enclave', 'the development TEE')}", flush=True)
        return [*_client(live, rounds), *_warm(live, rounds), *_server(live, rounds)]


def unverified() -> ssl.SSLContext:
    """The peer's context: the cheapest that the standard library offers for TLS 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def dial(target: Target, context: ssl.SSLContext) -> None:
    """Connect, shake hands, hang up."""
    with (
        socket.create_connection(target.address, 30) as raw,
        context.wrap_socket(raw, server_hostname=target.name) as tls,
    ):
        assert tls.getpeercert(True)


# --- a client's handshake ---------------------------------------------------------------------------------------------


def _client(live: Service, rounds: int) -> list[Row]:
    target, policy, cache, peer = live.target, live.policy, live.folder / "cache", unverified()
    known = AttestedSession(target, policy, cache_dir=cache)
    result = known.verify_once()
    assert result.accepted and result.claims["channel"]["binding"] == "exporter", result.codes
    assert (cache / f"{target.name}_{target.port}.bundle").exists()
    told = interleaved(
        {
            "stdlib": lambda: dial(target, peer),
            "cold": lambda: dial(target, AttestedSession(target, policy, cache_dir=cache).context()),
            "known": lambda: dial(target, known.context()),
        },
        rounds=rounds * 8,
        cpu=True,
    )
    first = [_fresh_process(live, cache) for _ in range(max(5, rounds // 2))]
    fresh, alone = statistics.median(f[0] for f in first), statistics.median(f[1] for f in first)
    return [
        adds_at_most(
            "client: verified handshake, a fresh session, bundle on disk (CPU ms)", told["cold"], told["stdlib"],
            STDLIB, COLD_MS, "ms",
        ),
        adds_at_most(
            "client: handshake, certificate already verified (CPU ms)", told["known"], told["stdlib"],
            STDLIB, KNOWN_MS, "ms",
        ),
        Row(
            "client: the first handshake of a process, nothing parsed before (CPU ms)", fresh, alone, STDLIB,
            fresh / alone,
        ),
    ]  # fmt: skip


def _fresh_process(live: Service, cache: Path) -> tuple[float, float]:
    """CPU ms of an attested handshake in a process that has parsed and verified nothing before, and of the peer's."""
    command = [PYTHON, "-c", _FRESH, str(live.port), str(live.made.policy), str(cache), live.target.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    ours, theirs = done.stdout.split()
    return float(ours), float(theirs)


# --- a warm request ---------------------------------------------------------------------------------------------------


def _warm(live: Service, rounds: int) -> list[Row]:
    """The same small GET of the same server on a connection that is kept, through the same library."""
    session, peer = AttestedSession(live.target, live.policy), unverified()
    with httpx2.Client(verify=session.context(), trust_env=False) as ours, httpx2.Client(
        verify=peer, trust_env=False
    ) as theirs:  # fmt: skip
        pooled = {"ours": lambda: _get(ours, live), "theirs": lambda: _get(theirs, live)}
        clock = interleaved(pooled, rounds=rounds * 60)
        spent = interleaved(pooled, rounds=rounds * 60, cpu=True)
    with _kept(live, session.context()) as one, _kept(live, peer) as two:
        thin = interleaved({"ours": lambda: _thin(one), "theirs": lambda: _thin(two)}, rounds=rounds * 60)
    name = "client: a small GET on a kept connection"
    return [
        ratio_at_most(f"{name}, httpx2 (p50 ms)", clock["ours"], clock["theirs"], STDLIB, WARM),
        adds_at_most(f"{name}, httpx2 (CPU ms)", spent["ours"], spent["theirs"], STDLIB, WARM_CPU_MS, "ms"),
        Row(f"{name}, http.client (p50 ms)", thin["ours"], thin["theirs"], STDLIB, thin["ours"] / thin["theirs"]),
    ]


def _get(client: httpx2.Client, live: Service) -> None:
    answer = client.get(
        f"https://127.0.0.1:{live.port}/health/live", extensions={"sni_hostname": live.target.name}
    )  # fmt: skip
    assert answer.status_code == 200


@contextmanager
def _kept(live: Service, context: ssl.SSLContext) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection(live.target.name, live.port, context=context)
    raw = socket.create_connection(live.target.address, 30)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sock = context.wrap_socket(raw, server_hostname=live.target.name)
    try:
        yield connection
    finally:
        connection.close()


def _thin(connection: http.client.HTTPSConnection) -> None:
    connection.request("GET", "/health/live")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200


# --- the server's handshake -------------------------------------------------------------------------------------------


def _server(live: Service, rounds: int) -> list[Row]:
    session = AttestedSession(live.target, live.policy)
    session.verify_once()
    bundle = session.newest_bundle()
    assert bundle is not None
    leaf = live.folder / "leaf.der"
    leaf.write_bytes(bundle.evidence.leaf)
    with _tls_server("enclave", leaf) as ours, _tls_server("stdlib", leaf) as theirs:
        stdlib, attested = unverified(), client_context()
        same = _server_cpu({"ours": ours, "theirs": theirs}, lambda port: _stdlib(port, stdlib), rounds)
        best = _server_cpu({"ours": ours, "theirs": theirs}, lambda port: _pyopenssl(port, attested), rounds)
        groups = _pyopenssl(ours[1], attested), _pyopenssl(theirs[1], attested)
    proven = _server_cpu(
        {"enclave": (live.enclave, live.port)}, lambda port: dial(live.target, session.context()), max(3, rounds // 3)
    )
    name = "server: handshake"
    return [
        ratio_at_most(
            f"{name}, one stdlib client for both (server CPU ms)", same["ours"], same["theirs"], UVICORN, SERVER
        ),
        ratio_at_most(
            f"{name}, our client: {groups[0]} here, {groups[1]} there (server CPU ms)",
            best["ours"], best["theirs"], UVICORN, SERVER,
        ),
        fact("server: handshake and channel proof of a client, quote not counted (CPU ms)", proven["enclave"]),
    ]  # fmt: skip


@contextmanager
def _tls_server(kind: str, leaf: Path) -> Iterator[tuple[Process, int]]:
    process = Process(f"{kind} TLS", [PYTHON, "-m", "tests.bench.tls_server", kind, str(leaf)])
    try:
        line = process.wait_for("ready", seconds=30, hint="run it by hand: python -m tests.bench.tls_server")
        yield process, int(line.split()[1])
    finally:
        process.stop()


def _server_cpu(
    servers: Mapping[str, tuple[Process, int]], shake: Callable[[int], object], rounds: int
) -> dict[str, float]:
    """CPU ms of each server per connection: `BATCH` of them a turn, in turns."""

    def turn(process: Process, port: int) -> float:
        before = cpu_ms(process.popen.pid)
        for _ in range(BATCH):
            shake(port)
        time.sleep(_SETTLE_S)
        return (cpu_ms(process.popen.pid) - before) / BATCH

    contestants = {name: lambda p=process, q=port: turn(p, q) for name, (process, port) in servers.items()}
    return interleaved(contestants, rounds=max(rounds, 3))


def _stdlib(port: int, context: ssl.SSLContext) -> None:
    with socket.create_connection(("127.0.0.1", port), 30) as raw, context.wrap_socket(raw, server_hostname="x") as tls:
        assert tls.version() == "TLSv1.3"


def _pyopenssl(port: int, context: SSL.Context) -> str:
    """Shake hands as our clients do; returns the group."""
    with socket.create_connection(("127.0.0.1", port), 30) as raw:
        raw.settimeout(None)
        tls = SSL.Connection(context, raw)
        tls.set_connect_state()
        tls.do_handshake()
        return tls.get_group_name() or ""
