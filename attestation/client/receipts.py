"""Receipts at the client: what was sent, what came back, and whether the enclave's signed receipt says the same.

Keeps the exact bytes of the latest inference request and answer, as they went over the attested connection. A receipt
is checked under the keyset of the very certificate that this connection showed, and its absence is an error: whoever
carries the bytes can suppress a receipt, never forge one. Pure but for memory; the transports (`openai.py`) feed it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from attestation.errors import FormatError, RefusedError, VouchsafeError
from attestation.receipt import Receipt, verify_receipt
from attestation.result import Check, Checks, Status
from attestation.sse import split_inline

__all__ = [
    "CREDENTIALS", "Exchange", "ReceiptRecorder", "ReceiptRefused", "ReceiptVerdict", "check_receipt", "receipt_due",
    "stream_ends",
]  # fmt: skip

MAX_RECORDED: Final = 64 * 1024 * 1024
MAX_REST: Final = 4 * 1024 * 1024
"""Bytes read after `[DONE]`: the receipt of a very long stream, and the end of the body."""

CREDENTIALS: Final = ("authorization", "x-api-key")
"""Headers that may hold the API key of a request: its receipt is asked for with the same."""
_WITHOUT: Final = ("/v1/state/", "/v1/organization/", "/v1/responses/input_tokens", "/v1/messages/count_tokens")
"""What is posted and is no inference. Everything else is: a route that is not known here is asked for its receipt."""
_ENDS: Final = (b"data: [DONE]", b": vouchsafe receipt=")

RECEIPT_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class ReceiptVerdict:
    """Every check of one receipt. `accepted` holds when one passed and none failed; skips are not passes."""

    checks: tuple[Check, ...]

    @property
    def accepted(self) -> bool:
        return any(c.status is Status.PASS for c in self.checks) and not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.status is Status.FAIL)

    @property
    def verdict(self) -> str:
        return "accepted" if self.accepted else "refused"

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.code for c in self.failed))

    def as_json(self) -> dict[str, Any]:  # Any: JSON values
        return {"verdict": self.verdict, "codes": list(self.codes), "checks": [c.as_json() for c in self.checks]}


class ReceiptRefused(RefusedError):
    """The answer came without a receipt, or with one that says something else. `verdict` holds the checks, if any."""

    def __init__(self, failure: VouchsafeError, verdict: ReceiptVerdict | None = None) -> None:
        super().__init__(
            failure.code, failure.reason, expected=failure.expected, actual=failure.actual, hint=failure.hint
        )
        self.verdict = verdict

    @classmethod
    def from_verdict(cls, verdict: ReceiptVerdict) -> ReceiptRefused:
        first = verdict.failed[0]
        return cls(
            RefusedError(
                first.code,
                f"the receipt is refused: {first.reason}",
                expected=first.expected,
                actual=first.actual,
                hint="do not rely on this answer: what was served is not what the receipt says",
            ),
            verdict,
        )


def receipt_due(method: str, path: str) -> bool:
    """Whether a 200 to this request comes with a receipt."""
    return method == "POST" and path.startswith("/v1/") and not path.startswith(_WITHOUT)


def stream_ends(event: bytes) -> bool:
    """Whether *event* begins a stream's end: the service's comment, behind which one last event stands, or `[DONE]`."""
    return event.startswith(_ENDS)


def check_receipt(
    raw: bytes, keyset: bytes, *, request: bytes | None, response: bytes | None, allow_cut: bool = False
) -> tuple[Receipt | None, ReceiptVerdict]:
    """Parse and check. *keyset* as verified evidence names it. A malformed receipt is a refusal with its code."""
    checks = Checks()
    receipt = checks.parse("receipt.form", lambda: Receipt.parse(raw), reason="the receipt is well formed")
    if receipt is not None:
        verify_receipt(receipt, keyset, request=request, response=response, checks=checks, allow_cut=allow_cut)
    return receipt, ReceiptVerdict(tuple(checks))


@dataclass(slots=True)
class Exchange:
    """One inference request and its answer. Bytes have no repr: they are the user's.

    leaf       SHA-256 of the certificate of the connection that carried it
    receipt    JSON bytes, None while it has not come
    complete   whether the answer came to its end
    """

    method: str
    path: str
    leaf: bytes
    keyset: bytes = field(repr=False)
    request: bytes = field(repr=False)
    receipt_id: str = ""
    response: bytearray = field(default_factory=bytearray, repr=False)
    receipt: bytes | None = field(default=None, repr=False)
    complete: bool = False
    parsed: Receipt | None = None
    verdict: ReceiptVerdict | None = None

    def take(self, chunk: bytes) -> None:
        """The next bytes of the body. Raises `ReceiptRefused` beyond 64 MiB: what is not kept cannot be checked."""
        if len(self.response) + len(chunk) > MAX_RECORDED:
            raise ReceiptRefused(
                RefusedError("RECEIPT_TOO_LONG", "the answer is too long to be checked", expected=MAX_RECORDED)
            )
        self.response += chunk

    def find_inline(self) -> None:
        """Take the receipt out of a finished stream."""
        self.receipt = split_inline(bytes(self.response))[1]

    def verify(self) -> ReceiptVerdict:
        """Check the receipt against what went over the wire. Raises `ReceiptRefused` when there is none."""
        if self.receipt is None:
            raise ReceiptRefused(
                RefusedError(
                    "RECEIPT_MISSING",
                    "the answer came without a receipt",
                    hint="the stream was cut, or somebody on the way withheld it: do not rely on this answer",
                )
            )
        self.parsed, self.verdict = check_receipt(
            self.receipt,
            self.keyset,
            request=self.request,
            response=bytes(self.response),
            allow_cut=not self.complete,
        )
        return self.verdict


class ReceiptRecorder:
    """The latest exchange of a client. With several requests in flight, the one that began last."""

    def __init__(self) -> None:
        self.last: Exchange | None = None

    @property
    def last_receipt(self) -> Receipt | None:
        """The latest answer's receipt, parsed; trustworthy only when `verify_last()` is accepted."""
        if self.last is None or self.last.receipt is None:
            return None
        try:
            return Receipt.parse(self.last.receipt)
        except FormatError:
            return None

    def verify_last(self) -> ReceiptVerdict:
        """Check the latest answer. Raises `ReceiptRefused` when there was none, or none with a receipt."""
        if self.last is None:
            raise ReceiptRefused(RefusedError("RECEIPT_MISSING", "no answer has been recorded"))
        return self.last.verify()
