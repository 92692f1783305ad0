"""The fetch connection (RA-TLS order): dials without verifying anything, asks for the bundle, closes.

What it brings is untrusted bytes; every object in them is verified for itself. It is used when the cache is empty, so
that a verified connection can be judged before its first byte. It sends one fixed request, free of credentials.
"""

from __future__ import annotations

import socket
import ssl
import time

from attestation.client.target import Target
from attestation.client.wire import Exchange, FetchEvidence
from attestation.errors import TransportError

__all__ = ["dial", "fetch_evidence"]


def fetch_evidence(target: Target, *, seconds: float = 10.0) -> bytes:
    """The bundle as served, at most 4 MiB, within *seconds* in all. Raises `TransportError` or `FormatError`."""
    deadline = time.monotonic() + seconds
    exchange = Exchange(FetchEvidence(), target.host)
    try:
        with dial(target, seconds) as raw, _unverified().wrap_socket(raw, server_hostname=target.name) as tls:
            tls.sendall(exchange.outgoing)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                tls.settimeout(left)
                answer = exchange.feed(tls.recv(65536))
                if answer is not None:
                    return answer.expect_ok("the evidence")
    except ssl.SSLError as err:
        raise TransportError(
            "TRANSPORT_TLS",
            f"no TLS 1.3 with {_where(target)}: {err.reason or type(err).__name__}",
            hint="is this port the service's, and does the relay route this name?",
        ) from err
    except OSError as err:
        raise _unreachable(target, err) from err


def dial(target: Target, seconds: float) -> socket.socket:
    """A TCP connection to the target's address. Raises `TransportError`: `TRANSPORT_CONNECT`."""
    try:
        sock = socket.create_connection(target.address, seconds)
    except OSError as err:
        raise _unreachable(target, err) from err
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def _where(target: Target) -> str:
    host, port = target.address
    return target.host if target.connect is None else f"{target.host} at {host}:{port}"


def _unreachable(target: Target, err: OSError) -> TransportError:
    if isinstance(err, TimeoutError):
        return TransportError("TRANSPORT_DEADLINE", f"{_where(target)} did not answer in time")
    hint = "is the service running?"
    if isinstance(err, socket.gaierror) and target.connect is None:
        hint = f"DNS does not know {target.name}: add --connect HOST:PORT"
    return TransportError("TRANSPORT_CONNECT", f"cannot reach {_where(target)}: {err.strerror or err}", hint=hint)
