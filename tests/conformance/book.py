"""Writing the table: controls, cases that are one mutation away from a control, and the two data files.

Large strings become blobs named by their SHA-256, so that what two cases share is stored once. Runs where the table is
made; pure but for `write`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Book", "Input", "b64"]

Input = dict[str, Any]  # Any: JSON values
Kind = Literal["tdx", "gpu", "bundle"]

INLINE = 100
"""Characters: what is no longer stands in the case itself."""


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@dataclass
class Book:
    """The rows of one kind in order. `clause` is the clause of the cases that follow, until it is set anew."""

    kind: Kind
    clause: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)  # Any: JSON values
    blobs: dict[str, bytes] = field(default_factory=dict)
    _controls: dict[str, Input] = field(default_factory=dict)

    def control(self, name: str, why: str, given: Input) -> None:
        """A case that is accepted."""
        self._controls[name] = given
        self._add(name, None, "accepted", "", (), why, given)

    def accept(self, name: str, control: str, why: str, /, **members: object) -> None:
        """A case one mutation away from *control* that is accepted too: what the standard leaves open."""
        self._add(
            name, control, "accepted", "", (), why, _difference(self._controls[control], self._with(control, members))
        )

    def refuse(
        self, name: str, control: str, code: str, why: str, /, *, also: tuple[str, ...] = (), **members: object
    ) -> None:
        """A case one mutation away from *control*: *members* of the input replaced, None for a member left out."""
        patch = _difference(self._controls[control], self._with(control, members))
        self._add(name, control, "refused", code, also, why, patch)

    def given(self, control: str) -> Input:
        """The input of a control."""
        return self._controls[control]

    def _with(self, control: str, members: Mapping[str, object]) -> Input:
        whole = {**self._controls[control], **members}
        return {name: value for name, value in whole.items() if value is not None or name not in members}

    def _add(
        self, name: str, control: str | None, expect: str, code: str, also: tuple[str, ...], why: str, patch: Input
    ) -> None:
        name = f"{self.kind}/{name}"
        if not patch or not self.clause or any(row["id"] == name for row in self.rows):
            raise ValueError(f"{name}: no mutation, no clause, or a name that stands twice")
        self.rows.append(
            {
                "id": name, "kind": self.kind, "control": f"{self.kind}/{control}" if control else None,
                "expect": expect, "code": code, "also": list(also), "clause": self.clause, "why": why,
                "patch": self._stored(patch),
            }
        )  # fmt: skip

    def _stored(self, value: Any) -> Any:  # Any: JSON values
        if isinstance(value, dict):
            return {name: self._stored(member) for name, member in value.items()}
        if isinstance(value, list):
            return [self._stored(member) for member in value]
        if not isinstance(value, str) or (len(value) <= INLINE and not value.startswith(("base64:", "hex:", "text:"))):
            return value
        spelling, raw = "text", value.encode("utf-8", "surrogatepass")
        if re.fullmatch("([0-9a-f]{2})+", value):
            spelling, raw = "hex", bytes.fromhex(value)
        elif re.fullmatch("[A-Za-z0-9+/]+={0,2}", value) and len(value) % 4 == 0:
            decoded = base64.b64decode(value)
            if b64(decoded) == value:
                spelling, raw = "base64", decoded
        name = hashlib.sha256(raw).hexdigest()[:20]
        if self.blobs.setdefault(name, raw) != raw:
            raise ValueError("two blobs of one name")
        return f"{spelling}:{name}"


def _difference(old: Any, new: Any) -> Any:  # Any: JSON values
    """The merge patch (RFC 7396) that makes *new* of *old*."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if new is None:
            raise ValueError("a merge patch cannot write null")
        return new
    patch = dict.fromkeys(old.keys() - new.keys())
    return patch | {n: _difference(old.get(n), v) for n, v in new.items() if n not in old or old[n] != v}


def write(books: list[Book], folder: Path) -> None:
    """`cases.jsonl` and `blobs.tar.xz`; nothing in them depends on who ran this, where or when."""
    rows = [row for book in books for row in book.rows]
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    (folder / "cases.jsonl").write_text(text, "ascii")
    blobs = {name: raw for book in books for name, raw in book.blobs.items()}
    with tarfile.open(folder / "blobs.tar.xz", "w:xz", preset=9) as archive:
        for name, raw in blobs.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
