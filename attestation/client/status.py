"""The operator's status list from the URL that the policy pins, beside the one in the evidence (RA-TLS profile §3.8).

Of all lists at hand that enough pinned keys signed, the one with the highest serial is judged: the evidence's, the
URL's, one seen before. So a host that holds a newer list back is found out by the URL, a URL that serves an old list or
nonsense changes nothing, and neither can replace a list by an older one. A list is chosen by serial alone: one that has
ended is still newer than its predecessor, and the verifier refuses it. Trusts nobody: signatures decide.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import h11

from attestation.client.floor import operator_scope, replace_file
from attestation.deployment import StatusList
from attestation.errors import FormatError, TransportError, VouchsafeError
from attestation.evidence import Evidence
from attestation.policy import Policy, Skip
from attestation.statements import UrlStatus, read_status

__all__ = ["MAX_STATUS", "StatusLists", "fetch_status"]

MAX_STATUS: Final = 128 * 1024
MAX_HEAD: Final = 16 * 1024
FETCH_SECONDS: Final = 10.0
ASK_AGAIN: Final = 60
"""Seconds before a URL that gave no current list is asked again: it must not slow every connection down."""

Fetch = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class _Signed:
    """An envelope's bytes, and what they say: enough pinned keys signed it."""

    raw: bytes
    list: StatusList

    @property
    def age(self) -> tuple[int, int, int]:
        """Orders lists. Serials decide; a list signed again under its serial is the newer one."""
        return self.list.serial, self.list.issued_at, self.list.next_update

    def current(self, now: int) -> bool:
        return self.list.issued_at <= now <= self.list.next_update


class StatusLists:
    """What one session knows of the status lists of one service. Thread-safe; `refresh` one caller at a time.

    folder   keeps the URL's list between runs, as untrusted as the URL
    fetch    URL -> bytes; `fetch_status`, or the same with another `context`"""

    def __init__(self, policy: Policy, folder: Path | None, name: str, fetch: Fetch) -> None:
        self._policy, self._fetch = policy, fetch
        wanted = policy.deployment
        self._url = "" if isinstance(wanted, Skip) or isinstance(wanted.status_url, Skip) else wanted.status_url
        self._path = folder / f"status-{operator_scope(policy, name)}.json" if folder is not None else None
        self._lock = threading.Lock()
        self._newest: _Signed | None = None
        self._from_url: _Signed | None = None
        self._asked = -ASK_AGAIN
        self._answer: UrlStatus | None = None
        if self._url and self._path is not None:
            with contextlib.suppress(OSError), self._path.open("rb") as file:
                self._take(file.read(MAX_STATUS + 1))

    @property
    def answer(self) -> UrlStatus | None:
        """For the verifier; None when the policy names no URL."""
        return self._answer

    @property
    def serial(self) -> int:
        """Of the newest list seen; -1 before the first."""
        return self._newest.list.serial if self._newest else -1

    def due(self, now: int) -> bool:
        """Whether the URL would be asked at *now*."""
        if not self._url or (self._from_url is not None and self._from_url.current(now)):
            return False
        return not 0 <= now - self._asked < ASK_AGAIN

    def refresh(self, now: int) -> None:
        """Ask the URL if its last list is not current at *now*. Blocks for some ten seconds at most; never raises."""
        if not self.due(now):
            return
        self._asked = now
        try:
            raw = self._fetch(self._url)
        except VouchsafeError as err:
            self._answer = UrlStatus(None, str(err))
            return
        except Exception as err:  # a list more is help; no answer of that server may stop what works without it
            self._answer = UrlStatus(None, type(err).__name__)
            return
        if not self._take(raw):
            self._answer = UrlStatus(None, "what it gave is no status list that enough pinned keys signed")
        elif self._path is not None:
            replace_file(self._path, raw)

    def newest(self, evidence: Evidence) -> Evidence:
        """*evidence* with the newest list known, its own included."""
        kept = self._newest
        if kept is None or kept.raw != evidence.status:
            own = self._read(evidence.status)
            kept = self._keep(own) if own is not None else kept
        # Without a list that counts the evidence speaks for itself: the verifier says what is wrong with it.
        return evidence if kept is None else replace(evidence, status=kept.raw)

    def _take(self, raw: bytes) -> bool:
        """A list that the URL gave, now or in an earlier run."""
        found = self._read(raw)
        if found is None:
            return False
        if self._from_url is None or found.age > self._from_url.age:
            self._from_url = found
        self._answer = UrlStatus(found.list.serial)
        self._keep(found)
        return True

    def _read(self, raw: bytes) -> _Signed | None:
        found = read_status(raw, self._policy) if raw else None
        return None if found is None else _Signed(raw, found)

    def _keep(self, found: _Signed) -> _Signed:
        """The newer of *found* and the newest so far, which it becomes."""
        with self._lock:
            if self._newest is None or found.age > self._newest.age:
                self._newest = found
            return self._newest


def fetch_status(url: str, *, context: ssl.SSLContext | None = None, seconds: float = FETCH_SECONDS) -> bytes:
    """The body at *url* (as a policy allows it): WebPKI, one GET without credentials or cookies, no redirect, no proxy,
    at most 128 KiB, *seconds* in all once the name is resolved. Raises `TransportError`, `FormatError`.

    context   instead of the machine's trust store: for an operator with an authority of his own"""
    deadline = time.monotonic() + seconds
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        with contextlib.closing(_dial(host, port, deadline)) as raw:
            verifying = context or ssl.create_default_context()
            with verifying.wrap_socket(raw, server_hostname=host) as tls:
                return _get(tls, parts.netloc, path, deadline)
    except h11.RemoteProtocolError as err:
        raise FormatError("FORMAT_ANSWER", f"the status URL does not speak HTTP/1.1: {err}"[:200]) from err
    except TimeoutError as err:
        raise TransportError("TRANSPORT_DEADLINE", "the status URL did not answer in time") from err
    except (OSError, ValueError) as err:  # ValueError: a name that cannot be looked up
        told = getattr(err, "verify_message", "") or getattr(err, "strerror", "") or type(err).__name__
        raise TransportError("TRANSPORT_CONNECT", f"cannot reach the status URL: {told}"[:200]) from err


def _dial(host: str, port: int, deadline: float) -> socket.socket:
    """Connected to the first address that answers; its timeout is what is left."""
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(address)
            sock.settimeout(_left(deadline))
            return sock
        except OSError as err:
            sock.close()
            last = err
    raise last


def _get(tls: ssl.SSLSocket, host: str, path: str, deadline: float) -> bytes:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    headers = [("Host", host), ("Accept-Encoding", "identity"), ("User-Agent", "vouchsafe"), ("Connection", "close")]
    request = h11.Request(method="GET", target=path, headers=headers)
    tls.settimeout(_left(deadline))
    tls.sendall((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    body = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            # That server chooses the pace: one deadline for all of it.
            tls.settimeout(_left(deadline))
            http.receive_data(tls.recv(65536))
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                hint = "the policy pins the list's own address" if 300 <= event.status_code < 400 else ""
                raise TransportError(
                    "TRANSPORT_STATUS", "the status URL has no list", expected=200, actual=event.status_code, hint=hint
                )
        elif isinstance(event, h11.Data):
            if len(body) + len(event.data) > MAX_STATUS:
                raise FormatError("FORMAT_ANSWER_SIZE", "the answer is too long", expected=f"<= {MAX_STATUS} bytes")
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise TransportError("TRANSPORT_ENDED", "the status URL's answer broke off")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
