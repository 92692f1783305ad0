"""What HTTP libraries hold in their hands: a socket and a BIO object over one attested `Link`.

`AttestedSocket` serves blocking libraries (httpx2, http.client, requests, urllib3), `AttestedObject` the ones that
carry bytes themselves (asyncio, uvloop, anyio, aiohttp). Both look like the `ssl` module's own classes as far as
libraries look. The socket is a wrapper, not a subclass of `socket.socket`: a method nobody thought of is then an
AttributeError and never plaintext on the wire.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from attestation.client.handshake import Link, NotAttested
from attestation.errors import TransportError
from attestation.result import AttestationResult

if TYPE_CHECKING:
    from attestation.client.tls import AttestedContext

__all__ = ["AttestedObject", "AttestedSocket"]

READ: Final = 64 * 1024
RECORD_HEAD: Final = 5
"""Type, version, length (RFC 8446 §5.1)."""


class _Facts:
    """What `ssl.SSLSocket` and `ssl.SSLObject` tell about a connection, told from the link."""

    _link: Link
    context: AttestedContext
    server_hostname: str
    server_side = False
    session = None

    @property
    def attestation(self) -> AttestationResult | None:
        """The result under which this connection was accepted."""
        return self._link.result

    @property
    def leaf(self) -> bytes:
        """The certificate the peer showed, DER."""
        return self._link.leaf

    @property
    def session_reused(self) -> bool:
        return self._link.session_reused

    def getpeercert(self, binary_form: bool = False) -> Any:  # Any: bytes, the ssl module's dictionary, or None
        return self._link.peercert(binary_form)

    def cipher(self) -> tuple[str, str, int] | None:
        return self._link.cipher()

    def shared_ciphers(self) -> None:
        return None

    def compression(self) -> None:
        return None

    def version(self) -> str | None:
        return self._link.version()

    def group(self) -> str:
        """The negotiated key exchange group, "" when unknown."""
        return self._link.group

    def selected_alpn_protocol(self) -> str | None:
        return self._link.alpn()

    def selected_npn_protocol(self) -> None:
        return None

    def pending(self) -> int:
        return self._link.pending()

    def get_channel_binding(self, cb_type: str = "tls-unique") -> None:
        """TLS 1.3 has no tls-unique; the channel proof binds evidence to the exporter."""
        if cb_type != "tls-unique":
            raise ValueError(f"{cb_type} channel binding type not implemented")

    def verify_client_post_handshake(self) -> NoReturn:
        raise NotImplementedError("no client certificates")


class AttestedObject(_Facts):
    """The counterpart of `ssl.SSLObject`: reads ciphertext from one memory BIO and writes it to another."""

    def __init__(
        self, link: Link, context: AttestedContext, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, name: str
    ) -> None:
        self._link, self.context, self.server_hostname = link, context, name
        self._incoming, self._outgoing = incoming, outgoing
        self._head, self._wanted = b"", 0  # of the record that is being taken in
        self._ended = False

    def do_handshake(self) -> None:
        """Handshake, evidence and channel proof. `SSLWantReadError` until the connection is accepted."""
        self._pump(self._link.handshake)

    def read(self, size: int = 1024, buffer: Any = None) -> Any:  # Any: a writable buffer; bytes or a count
        data = self._pump(lambda: self._link.read(size if buffer is None else min(size or len(buffer), len(buffer))))
        if buffer is None:
            return data
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:  # Any: bytes-like
        taken = self._link.write(data)
        self._flush()
        return taken

    def unwrap(self) -> None:
        """Say close_notify; `SSLWantReadError` until the peer's has come."""

        def close() -> None:
            if not self._link.close_notify():
                # Data that is still coming in stands before the peer's close_notify.
                while self._link.open and self._link.read(READ):
                    pass

        self._pump(close)

    def _pump(self, step: Any) -> Any:  # Any: the step's own result
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                if not self._fill():
                    raise
            finally:
                self._flush()

    def _fill(self) -> bool:
        # One TLS record at a time, and only when TLS asks for it: what lies beyond stays in the library's own BIO,
        # where it counts it. uvloop stops reading when that BIO and `pending()` are both empty.
        if not self._wanted:
            self._head += self._incoming.read(RECORD_HEAD - len(self._head))
            if len(self._head) == RECORD_HEAD:
                self._wanted = int.from_bytes(self._head[3:], "big")
                self._link.feed(self._head)
                self._head = b""
        data = self._incoming.read(self._wanted) if self._wanted else b""
        if data:
            self._wanted -= len(data)
            self._link.feed(data)
            return True
        if self._incoming.eof and not self._ended:
            self._ended = True
            self._link.feed(b"")
            return True
        return False

    def _flush(self) -> None:
        data = self._link.outgoing()
        if data:
            self._outgoing.write(data)


class AttestedSocket(_Facts):
    """The counterpart of `ssl.SSLSocket`. Owns the file descriptor of the socket it was made from.

    Timeouts are the socket's own; with timeout 0 the calls raise `SSLWantReadError` and `SSLWantWriteError`."""

    def __init__(self, link: Link, context: AttestedContext, sock: socket.socket, name: str) -> None:
        self._link, self.context, self.server_hostname = link, context, name
        timeout = sock.gettimeout()
        self._sock = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._sock.settimeout(timeout)
        self._unsent = b""  # ciphertext of plaintext that was already taken
        self._closed = False
        self._io_refs = 0  # files made from this socket, counted by socket.SocketIO

    def do_handshake(self, block: bool = False) -> None:
        """Handshake, evidence and channel proof; closes the socket when the connection is refused."""
        timeout = self._sock.gettimeout()
        if timeout == 0.0 and block:
            self._sock.settimeout(None)
        try:
            self._handshake(nonblocking=self._sock.gettimeout() == 0.0, timeout=self._sock.gettimeout())
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except BaseException:
            self._real_close()
            raise
        finally:
            if self._sock.fileno() >= 0:
                self._sock.settimeout(timeout)

    def _handshake(self, *, nonblocking: bool, timeout: float | None) -> None:
        while True:
            try:
                self._link.handshake()
            except ssl.SSLWantReadError:
                pass
            else:
                self._send_unsent()
                return
            if not nonblocking:
                # The overall deadline holds however slowly the peer drips its bytes.
                left = max(self._link.remaining, 0.001)
                self._sock.settimeout(left if timeout is None else min(left, timeout))
            try:
                self._send_unsent()
                self._fill()
            except TimeoutError as err:
                if self._link.remaining > 0:
                    raise
                raise NotAttested(TransportError("TRANSPORT_DEADLINE", "the handshake took too long")) from err
            except ConnectionError as err:
                self._link.feed(b"")
                raise NotAttested(TransportError("TRANSPORT_ENDED", f"the connection ended: {err}")) from err

    # reading

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        _no_flags(flags)
        deadline = self._deadline()
        while True:
            try:
                return self._link.read(size)
            except ssl.SSLWantReadError:
                self._wait_within(deadline)
                self._send_unsent()
                self._fill()

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:  # Any: a writable buffer
        view = memoryview(buffer).cast("B")
        data = self.recv(min(nbytes or len(view), len(view)), flags)
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = 1024, buffer: Any = None) -> Any:  # Any: a writable buffer; bytes or a count
        return self.recv(size) if buffer is None else self.recv_into(buffer, size)

    # writing

    def send(self, data: Any, flags: int = 0) -> int:  # Any: bytes-like
        _no_flags(flags)
        if self._unsent:
            self._send_unsent()
        taken = self._link.write(memoryview(data).cast("B"))
        # What was taken is ours to deliver: what the kernel does not take now goes before the next byte.
        with contextlib.suppress(ssl.SSLWantWriteError):
            self._send_unsent()
        return taken

    def sendall(self, data: Any, flags: int = 0) -> None:  # Any: bytes-like
        view = memoryview(data).cast("B")
        while len(view):
            view = view[self.send(view, flags) :]

    def write(self, data: Any) -> int:  # Any: bytes-like
        return self.send(data)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:  # Any: a binary file
        """Through TLS, never `os.sendfile`: that would write plaintext."""
        if offset:
            file.seek(offset)
        total = 0
        while count is None or total < count:
            block = file.read(READ if count is None else min(READ, count - total))
            if not block:
                break
            self.sendall(block)
            total += len(block)
        return total

    # closing

    def unwrap(self) -> socket.socket:
        """Say close_notify. The socket below is not handed back: plaintext has no place on this connection."""
        self.shutdown(socket.SHUT_WR)
        raise NotImplementedError("an attested connection does not go back to plaintext")

    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_RD:
            self._say_goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        self._closed = True
        if self._io_refs <= 0:
            self._real_close()

    def _real_close(self) -> None:
        if self._sock.fileno() >= 0:
            self._say_goodbye()
            self._sock.close()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError):
            self._link.close_notify()
            if self._link.open:
                self._sock.setblocking(False)
                self._send_unsent()

    def _decref_socketios(self) -> None:
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._closed:
            self.close()

    def __enter__(self) -> AttestedSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the socket below

    makefile = socket.socket.makefile

    def fileno(self) -> int:
        return self._sock.fileno()

    def getpeername(self) -> Any:  # Any: by address family
        return self._sock.getpeername()

    def getsockname(self) -> Any:  # Any: by address family
        return self._sock.getsockname()

    def getsockopt(self, *args: Any) -> Any:  # Any: passed through
        return self._sock.getsockopt(*args)

    def setsockopt(self, *args: Any) -> None:  # Any: passed through
        self._sock.setsockopt(*args)

    def settimeout(self, timeout: float | None) -> None:
        self._sock.settimeout(timeout)

    def gettimeout(self) -> float | None:
        return self._sock.gettimeout()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def getblocking(self) -> bool:
        return self._sock.getblocking()

    @property
    def timeout(self) -> float | None:
        return self._sock.gettimeout()

    @property
    def family(self) -> int:
        return self._sock.family

    @property
    def type(self) -> int:
        return self._sock.type

    @property
    def proto(self) -> int:
        return self._sock.proto

    # ciphertext

    def _fill(self) -> None:
        try:
            self._link.feed(self._sock.recv(READ))
        except BlockingIOError as err:
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the socket has no bytes") from err

    def _send_unsent(self) -> None:
        self._unsent += self._link.outgoing()
        while self._unsent:
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            except BlockingIOError as err:
                raise ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "the socket takes no bytes") from err

    def _deadline(self) -> float | None:
        timeout = self._sock.gettimeout()
        return time.monotonic() + timeout if timeout else None

    def _wait_within(self, deadline: float | None) -> None:
        # One read by the caller may need several reads below; its timeout bounds them together.
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("The read operation timed out")


def _no_flags(flags: int) -> None:
    if flags != 0:
        raise ValueError("non-zero flags not allowed on a TLS socket")
