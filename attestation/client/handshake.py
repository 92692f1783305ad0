"""TLS 1.3 and the appraisal inside it, as one state machine over memory: no socket, no clock but the deadline's.

Order: (1) TLS handshake; (2) version, resumption and chain length; (3) the appraiser walks through the evidence and
may ask its two fixed questions over this very connection (`wire.py`); (4) only when it returns is the link open.
`write` and `read` refuse until then, so no byte of a user's request can leave before the verdict, whatever a library
does. Sockets and BIO objects (`sockets.py`) pump bytes in and out. pyOpenSSL, because `ssl` has no TLS exporter.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from attestation.binding import EXPORTER_LABEL
from attestation.client.wire import Answer, Exchange, Question
from attestation.errors import FormatError, RefusedError, TransportError, VouchsafeError
from attestation.result import AttestationResult

__all__ = ["Appraisal", "Appraiser", "Handshake", "Link", "NotAttested", "client_context", "find"]

CHUNK: Final = 64 * 1024


class NotAttested(ssl.SSLCertVerificationError):
    """The other end is not accepted. An `SSLError`, so that every library treats it as a failed handshake.

    code      of the first failed check
    failure   what failed, expected, actual, hint
    result    the whole attestation result, when a verifier got far enough to make one
    """

    def __init__(self, failure: VouchsafeError, result: AttestationResult | None = None) -> None:
        super().__init__(1, f"not attested: {failure}")
        self.failure, self.result = failure, result
        self.code, self.hint = failure.code, failure.hint

    @classmethod
    def from_result(cls, result: AttestationResult) -> NotAttested:
        """For a refused *result*: the first failed check speaks."""
        if not result.failed:
            return cls(RefusedError("RESULT_REFUSED", "the verifier made no check that passed"), result)
        first, more = result.failed[0], len(result.failed) - 1
        also = f", and {more} more failed" if more else ""
        return cls(
            RefusedError(first.code, f"{first.reason}{also}", expected=first.expected, actual=first.actual), result
        )


def find(error: BaseException | None) -> NotAttested | None:
    """The refusal among the causes of an error that an HTTP library raised; None when it has another reason."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, NotAttested):
            return error
        seen.add(id(error))
        reason = getattr(error, "reason", None)  # urllib3 and requests carry theirs here
        error = error.__cause__ or (reason if isinstance(reason, BaseException) else None) or error.__context__
    return None


@dataclass(frozen=True, slots=True)
class Handshake:
    """What TLS itself says about a connection whose handshake is complete and not yet accepted.

    leaf      DER as the peer sent it; the peer holds its key (CertificateVerify), nothing else is known
    group     negotiated key exchange group, "" when unknown
    exporter  nonce (32 bytes) -> 32 bytes, from this connection's own secrets (RFC 8446 §7.5); None where the TLS
              library has none (`ssl`): the channel proof is then bound to the key alone
    """

    leaf: bytes
    group: str
    cipher: str
    exporter: Callable[[bytes], bytes] | None


Appraisal = Generator[Question, Answer, AttestationResult | None]


class Appraiser(Protocol):
    """Decides about connections. `name` is the name dialled, `host` the Host header of the two questions.

    `prepare` may block (it fetches what is missing) and is called before any byte of a handshake.
    `appraise` yields questions, is sent their answers, and returns when the connection is accepted; it raises a
    `VouchsafeError` or `NotAttested` otherwise. It never blocks: event loops run it."""

    @property
    def name(self) -> str: ...
    @property
    def host(self) -> str: ...
    def prepare(self) -> None: ...
    def appraise(self, handshake: Handshake) -> Appraisal: ...


def client_context() -> SSL.Context:
    """TLS 1.3 only, no session kept or offered, HTTP/1.1 only. The chain is not asked: evidence is."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
    context.set_verify(SSL.VERIFY_NONE)  # no authority vouches here: trust comes from evidence, names from its claims
    context.set_alpn_protos([b"http/1.1"])
    return context


class Link:
    """One connection: fed ciphertext, gives ciphertext, and plaintext once it is accepted. Thread-safe per call.

    Methods raise `ssl.SSLWantReadError` when more ciphertext is needed; `outgoing` must be sent first."""

    def __init__(self, context: SSL.Context, appraiser: Appraiser, deadline: float) -> None:
        self._conn = SSL.Connection(context, None)  # None: memory BIOs
        self._conn.set_tlsext_host_name(appraiser.name.encode("ascii"))
        self._conn.set_connect_state()
        self._appraiser = appraiser
        self._deadline = time.monotonic() + deadline
        self._lock = threading.RLock()
        self._appraisal: Appraisal | None = None
        self._exchange: Exchange | None = None
        self._failure: ssl.SSLError | None = None
        self._eof = False
        self.open = False
        self.leaf = b""
        self.group = ""
        self.result: AttestationResult | None = None

    # ciphertext

    def feed(self, data: bytes) -> None:
        """Ciphertext from the network; b"" is its end."""
        with self._lock:
            if data:
                self._conn.bio_write(data)
            else:
                self._eof = True
                self._conn.bio_shutdown()

    def outgoing(self) -> bytes:
        """Ciphertext for the network, possibly empty."""
        parts: list[bytes] = []
        with self._lock:
            # A memory BIO gives all it has: a short read is the last, and spares a call that ends in an exception.
            while not parts or len(parts[-1]) == CHUNK:
                try:
                    parts.append(self._conn.bio_read(CHUNK))
                except SSL.Error:  # WantReadError: nothing there
                    break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def remaining(self) -> float:
        """Seconds left for the handshake and the appraisal."""
        return self._deadline - time.monotonic()

    # handshake

    def refuse(self, failure: VouchsafeError | NotAttested) -> None:
        """Fail this connection before its first byte: the handshake, when the library gets to it, raises."""
        self._failure = failure if isinstance(failure, NotAttested) else NotAttested(failure)

    def handshake(self) -> None:
        """Go on as far as the bytes at hand allow. Returns when the connection is accepted, and only then.

        Raises `SSLWantReadError`, or `NotAttested`, now and at every later call."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self.open:
                return
            try:
                if self.remaining <= 0:
                    raise TransportError("TRANSPORT_DEADLINE", "the handshake took too long")
                self._advance()
            except SSL.WantReadError:
                if self._eof:
                    self._fail(NotAttested(_ended()))
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "more bytes needed") from None
            except NotAttested as err:
                self._fail(err)
            except VouchsafeError as err:
                self._fail(NotAttested(err))
            except SSL.Error as err:
                self._fail(NotAttested(_ended() if _is_eof(err) else _tls_failure(err)))
            except Exception as err:  # fail closed, and as the one class that libraries expect of a handshake
                self._fail(
                    NotAttested(RefusedError("CLIENT_INTERNAL", f"the check itself failed: {type(err).__name__}")), err
                )

    def _fail(self, failure: NotAttested, cause: Exception | None = None) -> None:
        self._failure = failure
        self._appraisal = self._exchange = None
        raise failure from cause

    def _advance(self) -> None:
        if self._appraisal is None:
            self._conn.do_handshake()
            self._appraisal = self._appraiser.appraise(self._inspect())
            self._ask(None)
        while not self.open:
            assert self._exchange is not None
            answer = self._exchange.feed(self._conn.recv(CHUNK))
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
        self._conn.sendall(self._exchange.outgoing)

    def _inspect(self) -> Handshake:
        # (1) Version and resumption. No session is ever offered; a peer that claims one is refused all the same:
        # a resumed handshake carries no certificate, and what is shown then is an old one.
        version = self._conn.get_protocol_version_name()
        if version != "TLSv1.3":
            raise RefusedError("TLS_VERSION", "not TLS 1.3", expected="TLSv1.3", actual=version)
        if self.session_reused:
            raise RefusedError("TLS_RESUMED", "a resumed session shows an old certificate")
        # (2) Exactly one certificate: evidence is in the leaf, and nothing beside it is looked at.
        chain = self._conn.get_peer_cert_chain(as_cryptography=True) or []
        if len(chain) != 1:
            raise RefusedError("TLS_CHAIN", "the peer sent a chain", expected="1 certificate", actual=len(chain))
        self.leaf = chain[0].public_bytes(Encoding.DER)
        self.group = self._conn.get_group_name() or ""
        return Handshake(self.leaf, self.group, self._conn.get_cipher_name() or "", self._exporter)

    def _exporter(self, nonce: bytes) -> bytes:
        return self._conn.export_keying_material(EXPORTER_LABEL, 32, nonce)

    @property
    def session_reused(self) -> bool:
        # pyOpenSSL has no public name for it.
        return bool(SSL._lib.SSL_session_reused(self._conn._ssl))  # type: ignore[attr-defined]

    # plaintext

    def write(self, data: Any) -> int:  # Any: bytes-like
        """Encrypt at most one record of *data*; how many bytes were taken. Refuses before acceptance."""
        with self._lock:
            self._need_open()
            if not len(data):
                return 0
            try:
                return int(self._conn.send(data))
            except SSL.Error as err:
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, f"TLS write failed: {_reason(err)}") from err

    def read(self, size: int) -> bytes:
        """Up to *size* bytes; b"" after the peer's close_notify. A connection that merely ends is an error:
        a relay can end one, only the enclave can close it."""
        with self._lock:
            self._need_open()
            if size == 0:
                return b""
            try:
                return bytes(self._conn.recv(size))
            except SSL.WantReadError:
                if self._eof:
                    raise _eof_error() from None
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "more bytes needed") from None
            except SSL.ZeroReturnError:
                return b""
            except SSL.Error as err:
                if _is_eof(err):
                    raise _eof_error() from err
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, f"TLS read failed: {_reason(err)}") from err

    def close_notify(self) -> bool:
        """Put our close_notify into `outgoing`; true when the peer's has arrived too."""
        with self._lock:
            if not self.open:
                return True
            try:
                return bool(self._conn.shutdown())
            except SSL.Error:
                return True

    def _need_open(self) -> None:
        if not self.open:
            raise self._failure or ssl.SSLError(ssl.SSL_ERROR_SSL, "the connection is not accepted yet")

    # facts

    def pending(self) -> int:
        with self._lock:
            return self._conn.pending()

    def version(self) -> str | None:
        return self._conn.get_protocol_version_name() if self.leaf else None

    def cipher(self) -> tuple[str, str, int] | None:
        name = self._conn.get_cipher_name()
        return (name, "TLSv1.3", self._conn.get_cipher_bits() or 0) if name else None

    def alpn(self) -> str | None:
        return self._conn.get_alpn_proto_negotiated().decode("ascii", "replace") or None

    def peercert(self, binary_form: bool) -> Any:  # Any: bytes, the ssl module's dictionary, or None
        if not self.leaf:
            return None
        return self.leaf if binary_form else _describe(self.leaf)


def _describe(leaf: bytes) -> dict[str, object]:
    """The shape of `ssl.SSLSocket.getpeercert()`, as far as libraries look at it (urllib3 compares the names)."""
    certificate = x509.load_der_x509_certificate(leaf)
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = san.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        names = []
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return {
        "subject": tuple(((("commonName", str(a.value)),)) for a in common),
        "subjectAltName": tuple(("DNS", name) for name in names),
        "notBefore": certificate.not_valid_before_utc.strftime("%b %d %H:%M:%S %Y GMT"),
        "notAfter": certificate.not_valid_after_utc.strftime("%b %d %H:%M:%S %Y GMT"),
    }


def _is_eof(error: SSL.Error) -> bool:
    return isinstance(error, SSL.SysCallError)


def _eof_error() -> ssl.SSLEOFError:
    return ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection ended without close_notify")


def _ended() -> TransportError:
    return TransportError(
        "TRANSPORT_ENDED",
        "the connection ended inside the handshake",
        hint="is the service running, and does the relay route this name?",
    )


def _tls_failure(error: SSL.Error) -> VouchsafeError:
    reason = _reason(error)
    if "protocol version" in reason or "unsupported protocol" in reason:
        return RefusedError("TLS_VERSION", "the peer does not speak TLS 1.3", expected="TLSv1.3", actual=reason)
    if isinstance(error, SSL.ZeroReturnError):
        return _ended()
    return FormatError("FORMAT_TLS", f"the TLS handshake failed: {reason}", hint="is this port a TLS service?")


def _reason(error: SSL.Error) -> str:
    """OpenSSL's own words, without addresses or bytes."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and queue:
        return "; ".join(str(entry[-1]) for entry in queue)[:200]
    return type(error).__name__
