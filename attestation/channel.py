"""The channel proof (ratls facts §3.5): the answer to a client's nonce over one connection, in bytes, undecided.

What it proves, once `verifier.verify_channel` accepts it: the TD that owns the certificate's key was at the other end
of *this* TLS connection after the nonce was drawn. Pure.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from attestation.binding import MAX_PATH, Side
from attestation.errors import FormatError

__all__ = ["CHANNEL_PATH", "EVIDENCE_PATH", "MAX_ANSWER", "ChannelProof", "channel_request"]

CHANNEL_PATH: Final = "/.well-known/vouchsafe/channel"
EVIDENCE_PATH: Final = "/.well-known/vouchsafe/evidence"
MAX_ANSWER: Final = 512 * 1024

Binding = Literal["exporter", "key"]


@dataclass(frozen=True, slots=True)
class ChannelProof:
    """nonce    32 bytes that this client drew for this connection
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

    @classmethod
    def from_answer(cls, answer: bytes, *, nonce: bytes, exporter: bytes | None) -> ChannelProof:
        """Read the server's JSON. `FORMAT_CHANNEL`. Nonce and exporter are the client's own, never the peer's."""
        if len(answer) > MAX_ANSWER:
            _bad("too long", f"at most {MAX_ANSWER} bytes", len(answer))
        try:
            top = json.loads(answer)
        except (ValueError, RecursionError):
            _bad("not JSON", "", "")
        if not isinstance(top, dict) or top.keys() != {"quote", "path", "gpu", "binding"}:
            _bad("members", "quote, path, gpu, binding", "others")
        if top["binding"] not in ("exporter", "key"):
            _bad("binding", "exporter or key", top["binding"])
        if (top["binding"] == "exporter") != (exporter is not None):
            _bad("binding", "the one that was asked for", top["binding"])
        path = top["path"]
        if not isinstance(path, list) or len(path) > MAX_PATH:
            _bad("path", f"a list of at most {MAX_PATH}", "another form")
        return cls(
            nonce=nonce,
            exporter=exporter,
            quote=_base64(top["quote"], "quote"),
            path=tuple(_step(step) for step in path),
            gpu=None if top["gpu"] is None else _base64(top["gpu"], "gpu"),
            binding=top["binding"],
        )


def channel_request(nonce: bytes, *, gpu: bool, binding: Binding) -> bytes:
    """Body of the POST, as a client sends it."""
    text = base64.urlsafe_b64encode(nonce).rstrip(b"=").decode()
    return json.dumps({"nonce": text, "gpu": gpu, "binding": binding}, separators=(",", ":")).encode()


def _step(step: object) -> tuple[Side, bytes]:
    if not isinstance(step, dict) or step.keys() != {"side", "hash"} or step["side"] not in ("left", "right"):
        _bad("path", "{side, hash}", "another form")
    sibling = _base64(step["hash"], "hash")
    if len(sibling) != 64:
        _bad("hash", "64 bytes", len(sibling))
    return step["side"], sibling


def _base64(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        _bad(what, "base64 text", type(text).__name__)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        _bad(what, "base64 with padding", "another form")


def _bad(what: str, expected: object, actual: object) -> NoReturn:
    raise FormatError("FORMAT_CHANNEL", f"channel proof: {what}", expected=expected, actual=actual)
