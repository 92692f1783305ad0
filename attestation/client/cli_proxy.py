"""`vouchsafe proxy` and `vouchsafe status`: start the local verifying proxy, and ask a running one how it is.

The service is verified before the proxy listens, and again on schedule over a connection of its own. While the latest
verdict is a refusal every new request dials and is judged anew, so a service that is refused serves nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import stat
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from attestation.client.cli_common import ACCEPTED, REFUSED, emit, paint, policy_of, read_file, say, seconds, show
from attestation.client.handshake import NotAttested
from attestation.client.proxy import STATUS_JSON, TOKEN_HEADER, Guard, Proxy
from attestation.client.proxy_state import ProxyState, text
from attestation.client.session import AttestedSession
from attestation.client.target import Target, parse_address
from attestation.client.upstream import Upstream
from attestation.errors import InputError, TransportError, VouchsafeError
from attestation.result import AttestationResult

__all__ = ["proxy", "status"]

MIN_TOKEN: Final = 32
MAX_HEAD: Final = 64 * 1024
RETRY_S: Final = 30.0
"""Seconds to the next try while the service is refused or out of reach."""
MAX_STATUS: Final = 256 * 1024


def proxy(options: Namespace) -> int:
    """Verify, listen, forward, until interrupted."""
    every = seconds(options.reattest)
    if not 10 <= every <= 86400:
        raise InputError("INPUT_TIME", "--reattest", expected="10s to 24h", actual=options.reattest)
    token = _token(options.token_file) if options.token_file else None
    target = Target.parse(options.to, parse_address(options.connect) if options.connect else None)
    session = AttestedSession(target, policy_of(options), cache_dir=Path(options.cache) if options.cache else None)
    with contextlib.closing(_listen(options.listen, exposed=options.expose, token=token)) as sock:
        result = session.verify_once()
        if not result.accepted:
            return show(result, options, target.origin)
        where = _where(sock)
        _announce(where, target, result, options)
        state = ProxyState(target.origin, session.policy.name, options.receipts == "require")
        state.accept(result)
        exposed = token is not None
        guard = Guard(token, named=sock.family != socket.AF_UNIX and not exposed)
        try:
            _run(session, state, guard, sock, float(every))
        finally:
            if where.startswith("unix:"):
                Path(where.removeprefix("unix:")).unlink(missing_ok=True)
    return ACCEPTED


def status(options: Namespace) -> int:
    """What a running proxy says of itself. Exit status 0 while its service is accepted."""
    headers = {TOKEN_HEADER.decode(): _token(options.token_file).decode()} if options.token_file else {}
    connection = _connection(options.proxy)
    try:
        connection.request("GET", STATUS_JSON, headers=headers)
        answer = connection.getresponse()
        raw = answer.read(MAX_STATUS + 1)
        facts = json.loads(raw[:MAX_STATUS]) if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise TransportError(
            "TRANSPORT_CONNECT", f"no proxy answers at {options.proxy}: {err}", hint="is `vouchsafe proxy` running?"
        ) from None
    finally:
        connection.close()
    if not isinstance(facts, dict) or facts.keys() < {"verdict", "target"}:
        raise TransportError(
            "TRANSPORT_STATUS", f"what answers at {options.proxy} is no vouchsafe proxy, or wants its token",
            expected=200, actual=answer.status, hint="--proxy names the proxy's own address, --token-file its token",
        )  # fmt: skip
    emit(facts) if options.json else say(text(facts))
    return ACCEPTED if facts["verdict"] == "accepted" else REFUSED


def _run(session: AttestedSession, state: ProxyState, guard: Guard, sock: socket.socket, every: float) -> None:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Bounded(HttpToolsProtocol):
        """uvicorn's own HTTP/1.1 parser has no limit of its own for a head that does not end."""

        _in_head, _head = False, 0

        def on_message_begin(self) -> None:
            self._in_head, self._head = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head:
                self._head += len(data)
                if self._head > MAX_HEAD:
                    self.transport.close()

    class Quiet(uvicorn.Server):
        """Stops in order on SIGINT and SIGTERM, and lets the command clean up and end by itself."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            yield

    for name in ("uvicorn", "uvicorn.error", "asyncio"):  # what they would print may quote a request
        logging.getLogger(name).disabled = True

    async def main() -> None:
        upstream = Upstream(session, max_age=every)
        app = Proxy(upstream, state, guard, receipts=state.receipts)
        config = uvicorn.Config(
            app, http=Bounded, ws="none", lifespan="off", interface="asgi3", log_config=None, access_log=False,
            server_header=False, date_header=False, proxy_headers=False, timeout_keep_alive=75,
            timeout_graceful_shutdown=5, limit_concurrency=1024,
        )  # fmt: skip
        task = asyncio.create_task(_reattest(session, upstream, state, every))
        try:
            await Quiet(config).serve(sockets=[sock])
        finally:
            task.cancel()
            upstream.close()

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def _reattest(session: AttestedSession, upstream: Upstream, state: ProxyState, every: float) -> None:
    """Prove the service again on schedule; when it is refused, idle connections are hung up."""
    wait = every
    while True:
        state.next_check = time.time() + wait
        await asyncio.sleep(wait)
        wait = RETRY_S if every > RETRY_S else every
        try:
            result = await asyncio.to_thread(session.verify_once)
        except NotAttested as err:
            state.refuse(err.code, err.failure.reason)
        except VouchsafeError as err:  # nobody was judged: the last verdict stands until it ends by itself
            state.last_refusal = f"{err.code}: {err.reason}"
        else:
            if result.accepted:
                state.accept(result)
                wait = every
                continue
            state.refuse(result.failed[0].code, result.failed[0].reason)
        if state.verdict == "refused":
            upstream.close_idle()
            say(f"proxy: REFUSED  {state.target}  {state.last_refusal}")


def _listen(text: str, *, exposed: bool, token: bytes | None) -> socket.socket:
    """A listening socket at `HOST:PORT` or `unix:PATH`. Beyond loopback only with both, the flag and a token."""
    if text.startswith("unix:"):
        return _listen_unix(text.removeprefix("unix:"))
    host, port = _host_port(text)
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
        host = "127.0.0.1" if local else host
    if not local and not (exposed and token is not None):
        raise InputError(
            "INPUT_LISTEN", "other machines reach this address, and what is sent to the proxy is plain HTTP",
            expected="127.0.0.1:PORT, [::1]:PORT or unix:PATH", actual=text,
            hint="if you mean it: --expose and --token-file FILE",
        )  # fmt: skip
    if local and (exposed or token is not None):
        raise InputError("INPUT_LISTEN", "--expose and --token-file are for an address beyond loopback", actual=text)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(256)
    except OSError as err:
        sock.close()
        raise InputError("INPUT_LISTEN", f"cannot listen: {err.strerror or err}", actual=text) from None
    return sock


def _listen_unix(path: str) -> socket.socket:
    """A socket file for this user alone. A socket file that nobody listens on any more is replaced."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(Path(path).lstat().st_mode) and _dead(path):
            Path(path).unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(256)
    except OSError as err:
        sock.close()
        raise InputError("INPUT_LISTEN", f"cannot listen: {err.strerror or err}", actual=f"unix:{path}") from None
    finally:
        os.umask(mask)
    return sock


def _dead(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        return False


def _host_port(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise InputError("INPUT_LISTEN", "not an address", expected="HOST:PORT or unix:PATH", actual=text)
    return match[1].strip("[]"), int(match[2])


def _where(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(where: str, target: Target, result: AttestationResult, options: Namespace) -> None:
    if options.json:
        emit({"listening": where, "target": target.origin, "attestation": result.as_json()})
    else:
        mark = "  DEVELOPMENT: nothing here rests on hardware" if result.development else ""
        say(f"proxy: {where} -> {target.origin}  {paint()('ACCEPTED', 'pass')}{mark}")
        say(f"  operator {result.claims['operator'] or '-'}, release {result.claims['version'] or '-'}")
        if not where.startswith("unix:"):
            say(f"  set your program's base URL to {where}/v1; state: {where}/vouchsafe/status or `vouchsafe status`")
        if options.expose:
            say(
                "  reachable from other machines as plain HTTP: whoever is on that network can read prompts and answers"
            )
    sys.stdout.flush()


def _connection(text: str) -> http.client.HTTPConnection:
    if text.startswith("unix:"):
        return _UnixConnection(text.removeprefix("unix:"))
    host, port = _host_port(text.removeprefix("http://").rstrip("/"))
    return http.client.HTTPConnection(host, port, timeout=10)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock: Any = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # Any: typeshed says a TCP socket
        self.sock.settimeout(10)
        self.sock.connect(self._path)


def _token(path: str) -> bytes:
    raw = read_file(path, "token", 4096).strip()
    if not re.fullmatch(rb"[A-Za-z0-9._~+/=-]{%d,256}" % MIN_TOKEN, raw):
        raise InputError(
            "INPUT_TOKEN", "not a token", expected=f"one line of {MIN_TOKEN} to 256 letters and digits", actual=path,
            hint="openssl rand -hex 32 > FILE",
        )  # fmt: skip
    return raw
