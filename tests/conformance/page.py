"""The parts of this folder's README that follow from the table: how many cases, and which clauses they cover."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["README", "update", "written"]

README = Path(__file__).parent / "README.md"
_PARTS = re.compile(r"(<!-- (counts|coverage) -->\n).*?(<!-- end -->)", re.S)
KINDS = {"tdx": "TDX quotes", "gpu": "GPU evidence", "bundle": "whole enclaves"}


def counts(rows: Sequence[Mapping[str, Any]]) -> str:  # Any: JSON values
    lines = ["| kind | refused | accepted |", "|---|---|---|"]
    for kind, told in [*KINDS.items(), ("", "**together**")]:
        of = [r["expect"] for r in rows if kind in ("", r["kind"])]
        lines.append(f"| {f'`{kind}`, ' if kind else ''}{told} | {of.count('refused')} | {of.count('accepted')} |")
    return "\n".join(lines) + "\n"


def coverage(rows: Sequence[Mapping[str, Any]]) -> str:  # Any: JSON values
    lines = ["| kind | clause | refused | codes |", "|---|---|---|---|"]
    seen = dict.fromkeys((r["kind"], r["clause"]) for r in rows if r["expect"] == "refused")
    for kind, clause in seen:
        of = [r for r in rows if (r["kind"], r["clause"], r["expect"]) == (kind, clause, "refused")]
        codes = ", ".join(f"`{code}`" for code in dict.fromkeys(r["code"] for r in of))
        lines.append(f"| {kind} | {clause} | {len(of)} | {codes} |")
    return "\n".join(lines) + "\n"


def written(page: str, rows: Sequence[Mapping[str, Any]]) -> str:  # Any: JSON values
    """*page* with both parts as *rows* have it."""
    parts = {"counts": counts(rows), "coverage": coverage(rows)}
    return _PARTS.sub(lambda m: m[1] + parts[m[2]] + m[3], page)


def update(rows: Sequence[Mapping[str, Any]]) -> None:  # Any: JSON values
    """Write both parts anew."""
    README.write_text(written(README.read_text("utf-8"), rows), "utf-8")
