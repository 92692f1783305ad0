"""The only two requests that may cross a connection before it is accepted: fetch evidence, channel proof.

Both are fixed and free of credentials; nothing of a user's request can get into them. Answers are parsed by h11 under
a cap for head and body, and refused when anything but one complete answer is there. Pure: bytes in, bytes out, for
sockets and memory BIOs alike. The other end is not yet trusted by anyone here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import h11

from attestation.bundle import MAX_BUNDLE
from attestation.channel import CHANNEL_PATH, EVIDENCE_PATH, MAX_ANSWER, channel_request
from attestation.errors import FormatError, TransportError

__all__ = ["Answer", "Exchange", "FetchEvidence", "ProveChannel", "Question"]

MAX_HEAD: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class FetchEvidence:
    """`GET /.well-known/vouchsafe/evidence`: the bundle. Its answer is untrusted bytes."""

    cap = MAX_BUNDLE

    def request(self) -> tuple[str, str, bytes]:
        return "GET", EVIDENCE_PATH, b""


@dataclass(frozen=True, slots=True)
class ProveChannel:
    """`POST /.well-known/vouchsafe/channel`: a fresh quote over *nonce* (32 bytes) and this very connection."""

    nonce: bytes
    fresh_gpu: bool
    binding: Literal["exporter", "key"]
    cap = MAX_ANSWER

    def request(self) -> tuple[str, str, bytes]:
        return "POST", CHANNEL_PATH, channel_request(self.nonce, gpu=self.fresh_gpu, binding=self.binding)


Question = FetchEvidence | ProveChannel


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, and body as sent: at most the question's cap. Proves nothing."""

    status: int
    body: bytes
    retry_after: str = ""

    def expect_ok(self, what: str) -> bytes:
        """The body of a 200. Raises `TransportError` for busy (429, 503) and for every other status."""
        if self.status == 200:
            return self.body
        if self.status in (429, 503):
            raise TransportError(
                "TRANSPORT_BUSY",
                f"the service is too busy for {what}",
                expected="200",
                actual=self.status,
                hint=f"try again in {self.retry_after} s" if self.retry_after.isdecimal() else "try again later",
            )
        raise TransportError(
            "TRANSPORT_STATUS",
            f"the service did not answer {what}",
            expected="200",
            actual=self.status,
            hint="is this a vouchsafe service?",
        )


class Exchange:
    """One question, one answer, over bytes that somebody else carries. Complexity: linear in the answer."""

    def __init__(self, question: Question, host: str) -> None:
        method, path, body = question.request()
        headers = [("Host", host), ("Accept-Encoding", "identity")]
        if method == "POST":
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._cap = question.cap
        self._body = bytearray()
        self._head: h11.Response | None = None
        self.outgoing = b"".join(
            self._http.send(event) or b""
            for event in (h11.Request(method=method, target=path, headers=headers), h11.Data(body), h11.EndOfMessage())
        )

    def feed(self, data: bytes) -> Answer | None:
        """Take bytes from the connection (b"" at its end). The answer once it is complete, else None.

        Raises `FormatError` when it is not HTTP/1.1 or too long."""
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    return None
                if isinstance(event, h11.Response):
                    self._take_head(event)
                elif isinstance(event, h11.Data):
                    self._take(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return self._finish()
                elif isinstance(event, h11.ConnectionClosed):
                    raise _broken("the connection ended before the answer")
        except h11.RemoteProtocolError as err:
            raise _broken(str(err)) from err

    def _take_head(self, head: h11.Response) -> None:
        if head.http_version != b"1.1":
            raise _broken("another version of HTTP")
        self._head = head

    def _take(self, data: bytes | bytearray) -> None:
        # The peer chooses this length: cap it before it is kept.
        if len(self._body) + len(data) > self._cap:
            raise FormatError("FORMAT_ANSWER_SIZE", "the answer is too long", expected=f"<= {self._cap} bytes")
        self._body += data

    def _finish(self) -> Answer:
        assert self._head is not None
        if self._http.trailing_data[0]:
            raise _broken("bytes follow the answer")
        headers = {bytes(k): bytes(v) for k, v in self._head.headers}
        if b"content-encoding" in headers:
            raise _broken("the answer is encoded")
        if self._http.our_state is h11.MUST_CLOSE:
            raise _broken("the answer ends the connection")
        return Answer(self._head.status_code, bytes(self._body), headers.get(b"retry-after", b"").decode("latin-1"))


def _broken(why: str) -> FormatError:
    return FormatError("FORMAT_ANSWER", f"the answer is not one HTTP/1.1 answer: {why}"[:200])
