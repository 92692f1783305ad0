"""What an operator keeps of an enclave's state: the bootstrap secret, the state key, and the last checkpoint.

Pure; used by the enclave, which takes them, and by the operator's commands, which hold them. The secret is text, so
that it can be typed: its SHA-256 stands in the measured configuration, which is public, so it has at least 128 random
bits. The state key opens the stored state after a boot; the checkpoint tells whether that state was set back.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from attestation.errors import InputError

__all__ = ["CHECKPOINT_SIZE", "MAX_KEY_FILE", "Checkpoint", "KeyFile", "check_secret", "new_secret", "secret_digest"]

CHECKPOINT_SIZE: Final = 56
MAX_KEY_FILE: Final = 4096
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{22,256}")
"""22 characters of base64url hold 128 bits. Whether they were chosen at random nobody can see."""
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_CHECKPOINT: Final = re.compile(r"[0-9a-f]{112}")


def new_secret() -> str:
    """256 random bits, base64url."""
    return secrets.token_urlsafe(32)


def check_secret(text: str) -> str:
    """*text* as it is sent, or `InputError`."""
    if _SECRET.fullmatch(text) is None:
        raise InputError(
            "INPUT_SECRET", "this is no bootstrap secret", expected="22 to 256 characters of A-Z a-z 0-9 _ -",
            hint="`vouchsafe bootstrap --new-secret FILE` makes one",
        )  # fmt: skip
    return text


def secret_digest(text: str) -> bytes:
    """What stands in the configuration: SHA-256 of the secret's ASCII text, without a line end."""
    return hashlib.sha256(text.encode("ascii")).digest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A point of one journal: its id, a row's number, the head there. Public: the host could compute the head.

    Whoever kept one can tell, when the journal is opened again, that it is the same journal and at least as long. It
    proves nothing about rows after it: a host that drops those is seen only by somebody with a later checkpoint.
    """

    state_id: bytes
    seq: int
    head: bytes

    def __post_init__(self) -> None:
        if len(self.state_id) != 16 or len(self.head) != 32 or not 0 <= self.seq < 2**63:
            raise ValueError("a checkpoint is 16 bytes, a sequence number and 32 bytes")

    def encode(self) -> bytes:
        """56 bytes: state_id ‖ u64be(seq) ‖ head."""
        return self.state_id + self.seq.to_bytes(8, "big") + self.head

    @classmethod
    def decode(cls, raw: bytes) -> Checkpoint:
        """Inverse of `encode`. ValueError for anything else."""
        if len(raw) != CHECKPOINT_SIZE:
            raise ValueError(f"a checkpoint has {CHECKPOINT_SIZE} bytes")
        return cls(raw[:16], int.from_bytes(raw[16:24], "big"), raw[24:])


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The operator's file: which service, its state key, and the last checkpoint that it told."""

    target: str
    state_key: bytes = field(repr=False)
    checkpoint: Checkpoint

    def encode(self) -> bytes:
        document = {
            "version": 1, "target": self.target, "state_key": self.state_key.hex(),
            "checkpoint": self.checkpoint.encode().hex(),
        }  # fmt: skip
        return json.dumps(document, indent=2).encode("ascii") + b"\n"

    @classmethod
    def decode(cls, raw: bytes) -> KeyFile:
        """Strict. Raises `InputError`, which repeats nothing of it."""
        try:
            top = json.loads(raw)
            known = isinstance(top, dict) and top.keys() == {"version", "target", "state_key", "checkpoint"}
            if not known or top["version"] != 1 or not isinstance(top["target"], str):
                raise ValueError("fields")
            return cls(top["target"], _bytes(top["state_key"], _KEY), Checkpoint.decode(_bytes(top["checkpoint"],
                       _CHECKPOINT)))  # fmt: skip
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                "INPUT_KEY_FILE", "this is no key file of a state", expected="a file that `vouchsafe bootstrap` wrote"
            ) from None


def _bytes(value: object, form: re.Pattern[str]) -> bytes:
    if not isinstance(value, str) or form.fullmatch(value) is None:
        raise ValueError("not hex")
    return bytes.fromhex(value)
