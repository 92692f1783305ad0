"""The verifying context on the standard library's own sockets, for libraries that insist on a real `ssl.SSLSocket` or
`ssl.SSLObject`. Prefer `AttestedContext`: it proves more.

`ssl` has no TLS exporter, so the channel proof is bound to the certificate's key ("key-bound"): the enclave signs the
client's nonce and the key of this connection's certificate. It proves that the enclave which owns that key is alive
and answered this client; a relay that holds the key could pass the answer on. The result says so, and a policy with
`proof = "exporter"` refuses (`CHANNEL_BINDING`) before a byte of a user's request.

All else is as in `tls.py` and `handshake.py`: TLS 1.3, one certificate, nothing resumed, the same appraiser and the
same two questions inside `do_handshake`, and no plaintext read or written before it returns. The `ssl` module's own
settings would decide here; those that matter are fixed, and what was negotiated is looked at all the same.
"""

from __future__ import annotations

import functools
import socket
import ssl
import time
from _ssl import ENCODING_DER
from collections.abc import Callable
from typing import Any, Final

from attestation.client.handshake import Appraisal, Appraiser, Handshake, NotAttested
from attestation.client.tls import HANDSHAKE_SECONDS, check_name
from attestation.client.wire import Answer, Exchange
from attestation.errors import FormatError, RefusedError, TransportError, VouchsafeError
from attestation.result import AttestationResult

__all__ = ["PlainAttestedContext", "PlainAttestedObject", "PlainAttestedSocket"]

CHUNK: Final = 64 * 1024


class _Verdict:
    """The appraisal of one connection, over `tls`: the `_ssl` object that both of the module's classes wrap."""

    def __init__(self, appraiser: Appraiser, seconds: float, failure: NotAttested | None) -> None:
        self._appraiser, self.failure = appraiser, failure
        self._deadline = time.monotonic() + seconds
        self._appraisal: Appraisal | None = None
        self._exchange: Exchange | None = None
        self._unsent = b""
        self.open = False
        self.leaf = b""
        self.result: AttestationResult | None = None

    def go_on(self, tls: Any, limit: Callable[[float], None] = lambda seconds: None) -> None:  # Any: untyped in `ssl`
        """As far as the bytes at hand allow. Returns when the connection is accepted, and only then.

        limit   told before each step that may block how long it may take

        Raises `SSLWantReadError`, `SSLWantWriteError`, `TimeoutError`; or `NotAttested`, then at every later call."""
        if self.failure is not None:
            raise self.failure
        if self.open:
            return
        try:
            self._advance(tls, limit)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except TimeoutError as err:
            if self._deadline > time.monotonic():
                raise  # the socket's own timeout, shorter than ours
            self._fail(NotAttested(_late()), err)
        except NotAttested as err:
            self._fail(err)
        except VouchsafeError as err:
            self._fail(NotAttested(err))
        except (ssl.SSLError, ConnectionError) as err:
            self._fail(NotAttested(_tls_failure(err)), err)
        except Exception as err:  # fail closed, and as the one class that libraries expect of a handshake
            fault = RefusedError("CLIENT_INTERNAL", f"the check itself failed: {type(err).__name__}")
            self._fail(NotAttested(fault), err)

    def _fail(self, failure: NotAttested, cause: Exception | None = None) -> None:
        self.failure = failure
        self._appraisal = self._exchange = None
        raise failure from cause

    def _advance(self, tls: Any, limit: Callable[[float], None]) -> None:  # Any: untyped in `ssl`
        def in_time() -> None:
            # Before every step: the deadline holds however slowly the peer drips its bytes.
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise _late()
            limit(left)

        if self._appraisal is None:
            in_time()
            tls.do_handshake()
            self._appraisal = self._appraiser.appraise(self._inspect(tls))
            self._ask(None)
        while not self.open:
            assert self._exchange is not None
            in_time()
            if self._unsent:
                self._unsent = self._unsent[tls.write(self._unsent) :]
                continue
            data = tls.read(CHUNK)
            if not data:
                raise _ended()
            answer = self._exchange.feed(data)
            if answer is not None:
                self._ask(answer)

    def _ask(self, answer: Answer | None) -> None:
        assert self._appraisal is not None
        try:
            question = next(self._appraisal) if answer is None else self._appraisal.send(answer)
        except StopIteration as done:
            self.result, self._exchange, self.open = done.value, None, True
            return
        self._exchange = Exchange(question, self._appraiser.host)
        self._unsent = self._exchange.outgoing

    def _inspect(self, tls: Any) -> Handshake:  # Any: untyped in `ssl`
        # Asked of the connection and not of the context, whose settings a library may have touched.
        version = tls.version()
        if version != "TLSv1.3":
            raise RefusedError("TLS_VERSION", "not TLS 1.3", expected="TLSv1.3", actual=version)
        if tls.session_reused:
            raise RefusedError("TLS_RESUMED", "a resumed session shows an old certificate")
        chain = tls.get_unverified_chain() or []
        if len(chain) != 1:
            raise RefusedError("TLS_CHAIN", "the peer sent a chain", expected="1 certificate", actual=len(chain))
        self.leaf = chain[0].public_bytes(ENCODING_DER)
        return Handshake(self.leaf, "", tls.cipher()[0], None)


def _gated(method: Callable[..., Any]) -> Any:  # Any: the signature of *method*, which the ssl module does not type
    """*method* of an `ssl` class, refused before acceptance. Once TLS is taken off a socket the module's methods would
    carry plaintext: then they are refused again."""

    @functools.wraps(method)
    def checked(self: PlainAttestedSocket | PlainAttestedObject, *args: Any, **named: Any) -> Any:
        verdict = self._verdict
        if verdict is None or not verdict.open or self._sslobj is None:
            raise (verdict and verdict.failure) or ssl.SSLError(
                ssl.SSL_ERROR_SSL, "the connection is not accepted, or not any more"
            )
        return method(self, *args, **named)

    return checked


class _Facts:
    """What `AttestedSocket` and `AttestedObject` tell beyond the `ssl` module's own classes, and what is not asked."""

    _verdict: _Verdict | None = None
    _sslobj: Any  # the module's own, untyped
    _context: PlainAttestedContext

    @property
    def attestation(self) -> AttestationResult | None:
        """The result under which this connection was accepted."""
        return self._verdict.result if self._verdict else None

    @property
    def leaf(self) -> bytes:
        """The certificate the peer showed, DER."""
        return self._verdict.leaf if self._verdict else b""

    @property
    def session(self) -> None:
        """None. Setting one is refused: a resumed handshake shows an old certificate."""
        return None

    @session.setter
    def session(self, session: object) -> None:
        raise ValueError("an attested connection never resumes a session")

    @property
    def context(self) -> PlainAttestedContext:
        return self._context

    @context.setter
    def context(self, context: object) -> None:
        raise ValueError("an attested connection keeps its context")


class PlainAttestedObject(_Facts, ssl.SSLObject):  # type: ignore[misc]  # properties there too, typed as values
    """A real `ssl.SSLObject`; for the libraries that carry bytes themselves (asyncio, uvloop, anyio, aiohttp)."""

    def do_handshake(self) -> None:
        """Handshake, evidence and channel proof. `SSLWantReadError` until the connection is accepted."""
        assert self._verdict is not None
        self._verdict.go_on(self._sslobj)

    read = _gated(ssl.SSLObject.read)
    write = _gated(ssl.SSLObject.write)
    unwrap = _gated(ssl.SSLObject.unwrap)


class PlainAttestedSocket(_Facts, ssl.SSLSocket):  # type: ignore[misc]  # properties there too, typed as values
    """A real `ssl.SSLSocket`; for blocking libraries. Its timeouts are its own, and a deadline bounds the handshake."""

    def do_handshake(self, block: bool = False) -> None:
        """Handshake, evidence and channel proof; closes the socket when the connection is refused."""
        verdict, timeout = self._verdict, self.gettimeout()
        assert verdict is not None
        waits = None if timeout == 0.0 and block else timeout

        def limit(left: float) -> None:
            if waits != 0.0:
                self.settimeout(left if waits is None else min(left, waits))

        try:
            verdict.go_on(self._sslobj, limit)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except BaseException:
            self.close()
            raise
        finally:
            if self.fileno() >= 0:
                self.settimeout(timeout)

    read = _gated(ssl.SSLSocket.read)
    recv = _gated(ssl.SSLSocket.recv)
    recv_into = _gated(ssl.SSLSocket.recv_into)
    recvfrom = _gated(ssl.SSLSocket.recvfrom)
    recvfrom_into = _gated(ssl.SSLSocket.recvfrom_into)
    recvmsg = _gated(ssl.SSLSocket.recvmsg)
    recvmsg_into = _gated(ssl.SSLSocket.recvmsg_into)
    write = _gated(ssl.SSLSocket.write)
    send = _gated(ssl.SSLSocket.send)
    sendall = _gated(ssl.SSLSocket.sendall)
    sendto = _gated(ssl.SSLSocket.sendto)
    sendmsg = _gated(ssl.SSLSocket.sendmsg)
    sendfile = _gated(ssl.SSLSocket.sendfile)
    unwrap = _gated(ssl.SSLSocket.unwrap)


_SETTLED: Final = frozenset(
    {"check_hostname", "verify_mode", "verify_flags", "minimum_version", "maximum_version", "options",
     "hostname_checks_common_name", "post_handshake_auth", "sslsocket_class", "sslobject_class"}
)  # fmt: skip


class PlainAttestedContext(ssl.SSLContext):
    """A client context for the one service that *appraiser* decides about; see the module's text for what it proves.

    Settings that decide whom it talks to are not a library's to change: setting them changes nothing, without an
    error, because libraries set them as a matter of course. To them it says CERT_REQUIRED and check_hostname, which
    is the truth in other words."""

    sslsocket_class = PlainAttestedSocket
    sslobject_class = PlainAttestedObject

    def __new__(cls, appraiser: Appraiser, *, deadline: float = HANDSHAKE_SECONDS) -> PlainAttestedContext:
        self = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        # No authority vouches here: trust comes from evidence, names from its claims.
        _settle(self, "check_hostname", False)
        _settle(self, "verify_mode", ssl.CERT_NONE)
        _settle(self, "minimum_version", ssl.TLSVersion.TLSv1_3)
        _settle(self, "maximum_version", ssl.TLSVersion.TLSv1_3)
        # With this option `ssl` takes a connection's end for a close_notify, and some versions set it by themselves: a
        # relay can end a connection, only the enclave can close it.
        ragged = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        _settle(self, "options", (self.options | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION) & ~ragged)
        ssl.SSLContext.set_alpn_protocols(self, ["http/1.1"])
        return self

    def __init__(self, appraiser: Appraiser, *, deadline: float = HANDSHAKE_SECONDS) -> None:
        self._appraiser, self._seconds = appraiser, deadline

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _SETTLED:
            super().__setattr__(name, value)

    @property
    def verify_mode(self) -> ssl.VerifyMode:  # type: ignore[override]  # setting it changes nothing
        return ssl.CERT_REQUIRED

    @property
    def check_hostname(self) -> bool:  # type: ignore[override]  # setting it changes nothing
        return True

    def set_alpn_protocols(self, alpn_protocols: object) -> None:
        """Changes nothing: the two questions are HTTP/1.1, and so is what follows."""

    def wrap_socket(
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: Any = None,  # Any: refused unless None
    ) -> PlainAttestedSocket:
        """*sock* connected, blocking or with a timeout. `suppress_ragged_eofs` is not honoured: see `options`."""
        _only_clients(server_side, session)
        sock.getpeername()  # OSError here and not later: before `connect` the module's class would carry plaintext
        if do_handshake_on_connect and sock.gettimeout() == 0.0:
            raise ValueError("do_handshake_on_connect should not be specified for non-blocking sockets")
        verdict = self._begin(server_hostname)
        wrapped = super().wrap_socket(
            sock, False, do_handshake_on_connect=False, suppress_ragged_eofs=False, server_hostname=self._appraiser.name
        )
        assert isinstance(wrapped, PlainAttestedSocket)
        wrapped._verdict = verdict
        if do_handshake_on_connect:
            wrapped.do_handshake()
        return wrapped

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: Any = None,  # Any: refused unless None
    ) -> PlainAttestedObject:
        """May block while the appraiser fetches what it has not; prepare the session first to avoid that."""
        _only_clients(server_side, session)
        verdict = self._begin(server_hostname)
        wrapped = super().wrap_bio(incoming, outgoing, server_hostname=self._appraiser.name)
        assert isinstance(wrapped, PlainAttestedObject)
        wrapped._verdict = verdict
        return wrapped

    def _begin(self, server_hostname: str | bytes | None) -> _Verdict:
        failure = None
        try:
            check_name(self._appraiser, server_hostname)
            self._appraiser.prepare()
        except NotAttested as err:
            failure = err
        except VouchsafeError as err:
            # Told by the handshake, where every library expects it, and before a byte is sent.
            failure = NotAttested(err)
        return _Verdict(self._appraiser, self._seconds, failure)


def _settle(context: ssl.SSLContext, name: str, value: object) -> None:
    getattr(ssl.SSLContext, name).__set__(context, value)


def _only_clients(server_side: bool, session: object) -> None:
    if server_side:
        raise ValueError("a PlainAttestedContext is for clients")
    if session is not None:
        raise ValueError("an attested connection never resumes a session")


def _late() -> TransportError:
    return TransportError("TRANSPORT_DEADLINE", "the handshake took too long")


def _ended() -> TransportError:
    return TransportError(
        "TRANSPORT_ENDED",
        "the connection ended inside the handshake",
        hint="is the service running, and does the relay route this name?",
    )


def _tls_failure(error: ssl.SSLError | ConnectionError) -> VouchsafeError:
    if isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
        return _ended()
    reason = (error.reason or type(error).__name__).lower().replace("_", " ")  # OpenSSL's words, no bytes
    if "protocol version" in reason or "unsupported protocol" in reason:
        return RefusedError("TLS_VERSION", "the peer does not speak TLS 1.3", expected="TLSv1.3", actual=reason)
    return FormatError("FORMAT_TLS", f"the TLS handshake failed: {reason}", hint="is this port a TLS service?")
