"""The channel proof (ratls facts §3.5): the answer to a client's nonce over one connection, in bytes, undecided.

What it proves, once `verifier.verify_channel` accepts it: the TD that owns the certificate's key was at the other end
of *this* TLS connection after the nonce was drawn. Pure.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from attestation.binding import EXPORTER_SIZE, MAX_PATH, Side
from attestation.errors import FormatError
from attestation.strict_json import load

__all__ = ["CHANNEL_PATH", "EVIDENCE_PATH", "MAX_ANSWER", "ChannelProof", "channel_request"]

CHANNEL_PATH: Final = "/.well-known/vouchsafe/channel"
EVIDENCE_PATH: Final = "/.well-known/vouchsafe/evidence"
MAX_ANSWER: Final = 512 * 1024
NONCE_SIZE: Final = 32
NODE_SIZE: Final = 64

Binding = Literal["exporter", "key"]


@dataclass(frozen=True, slots=True)
class ChannelProof:
    """Sizes and sides are checked when one is made (`FORMAT_CHANNEL`), so the formulas can take what it holds.

    nonce    32 bytes that this client drew for this connection
    exporter  32 bytes of this client's own TLS exporter, None for binding `key`
    quote     the connection's quote;  path   Merkle siblings, lowest first
    gpu       fresh GPU evidence as carried, or None
    """

    nonce: bytes
    exporter: bytes | None
    quote: bytes
    path: tuple[tuple[Side, bytes], ...]
    gpu: bytes | None
    binding: Binding

    def __post_init__(self) -> None:
        if len(self.nonce) != NONCE_SIZE:
            _bad("nonce", f"{NONCE_SIZE} bytes", len(self.nonce))
        if self.binding not in ("exporter", "key"):
            _bad("binding", "exporter or key", self.binding)
        if (self.binding == "exporter") != (self.exporter is not None):
            _bad("binding", "an exporter exactly for the binding exporter", self.binding)
        if self.exporter is not None and len(self.exporter) != EXPORTER_SIZE:
            _bad("exporter", f"{EXPORTER_SIZE} bytes", len(self.exporter))
        if len(self.path) > MAX_PATH:
            _bad("path", f"at most {MAX_PATH} steps", len(self.path))
        if any(side not in ("left", "right") or len(sibling) != NODE_SIZE for side, sibling in self.path):
            _bad("path", f"left or right, and {NODE_SIZE} bytes", "another form")

    @classmethod
    def from_answer(cls, answer: bytes, *, nonce: bytes, exporter: bytes | None) -> ChannelProof:
        """Read the server's JSON. `FORMAT_CHANNEL`. Nonce and exporter are the client's own, never the peer's."""
        top = _load(answer)
        if top.keys() != {"quote", "path", "gpu", "binding"}:
            _bad("members", "quote, path, gpu, binding", "others")
        bound = top["binding"]
        if bound != "exporter" and bound != "key":
            _bad("binding", "exporter or key", type(bound).__name__)
        path = top["path"]
        if not isinstance(path, list) or len(path) > MAX_PATH:
            _bad("path", f"a list of at most {MAX_PATH}", "another form")
        return cls(
            nonce=nonce,
            exporter=exporter,
            quote=_base64(top["quote"], "quote"),
            path=tuple(_step(step) for step in path),
            gpu=None if top["gpu"] is None else _base64(top["gpu"], "gpu"),
            binding=bound,
        )


def channel_request(nonce: bytes, *, gpu: bool, binding: Binding) -> bytes:
    """Body of the POST, as a client sends it."""
    text = base64.urlsafe_b64encode(nonce).rstrip(b"=").decode()
    return json.dumps({"nonce": text, "gpu": gpu, "binding": binding}, separators=(",", ":")).encode()


def _load(answer: bytes) -> Mapping[str, Any]:  # Any: JSON values, each checked where it is read
    try:
        return load(answer, MAX_ANSWER, "answer")
    except FormatError as err:
        raise FormatError(
            "FORMAT_CHANNEL", f"channel proof: {err.reason}", expected=err.expected, actual=err.actual
        ) from None


def _step(step: object) -> tuple[Side, bytes]:
    if not isinstance(step, dict) or step.keys() != {"side", "hash"} or step["side"] not in ("left", "right"):
        _bad("path", "{side, hash}", "another form")
    return step["side"], _base64(step["hash"], "hash")


def _base64(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        _bad(what, "base64 text", type(text).__name__)
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if base64.b64encode(raw).decode() != text:
        _bad(what, "base64 with padding, in its one spelling", "another form")
    return raw


def _bad(what: str, expected: object, actual: object) -> NoReturn:
    raise FormatError("FORMAT_CHANNEL", f"channel proof: {what}", expected=expected, actual=actual)
