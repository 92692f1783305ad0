"""What a running proxy knows of itself: verdict, counts, the last refusal; as JSON, as a page, as text. No content.

Nothing of a request or an answer gets here but that there was one. What the service's evidence says is text of
strangers until it is accepted: it is escaped wherever it is shown.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from attestation.client.report import printable
from attestation.result import AttestationResult

__all__ = ["ProxyState", "page", "text"]


@dataclass(slots=True)
class ProxyState:
    """Counts since the start, and the latest verdict.

    receipts   whether they are checked
    """

    target: str
    policy: str
    receipts: bool
    clock: Callable[[], float] = time.time
    started: float = 0.0
    requests: int = 0
    failed: int = 0
    gone: int = 0
    receipts_verified: int = 0
    receipts_refused: int = 0
    last_refusal: str = ""
    verdict: str = "none yet"
    next_check: float = 0.0
    result: AttestationResult | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def accept(self, result: AttestationResult) -> None:
        """The service was verified just now."""
        self.verdict, self.result = "accepted", result

    def refuse(self, code: str, reason: str) -> None:
        """The service was refused just now."""
        self.verdict, self.last_refusal = "refused", f"{code}: {reason}"

    def facts(self, opened: int, idle: int, dialled: int) -> dict[str, Any]:  # Any: JSON values
        """Everything, as JSON values. Times are RFC 3339."""
        claims: Mapping[str, Any] = self.result.claims if self.result is not None else {}
        return {
            "target": self.target,
            "policy": self.policy,
            "verdict": self.verdict,
            "development": self.result.development if self.result is not None else None,
            "operator": claims.get("operator", ""),
            "release": claims.get("version", ""),
            "models": [m["id"] for m in claims.get("models", ())],
            "channel": claims.get("channel", {}),
            "not_proven": list(self.result.not_proven) if self.result is not None else [],
            "verified_at": _when(self.result.verified_at if self.result is not None else 0),
            "valid_until": _when(self.result.valid_until if self.result is not None else 0),
            "next_check": _when(self.next_check),
            "started": _when(self.started),
            "receipts": "required" if self.receipts else "off",
            "requests": self.requests,
            "failed": self.failed,
            "hung_up": self.gone,
            "receipts_verified": self.receipts_verified,
            "receipts_refused": self.receipts_refused,
            "connections": {"open": opened, "idle": idle, "dialled": dialled},
            "last_refusal": self.last_refusal,
        }


def text(facts: Mapping[str, Any]) -> str:  # Any: JSON values
    """For a terminal: one fact a line."""
    return "\n".join(f"{name:18} {printable(shown)}".rstrip() for name, shown in _lines(facts))


def page(facts: Mapping[str, Any]) -> str:  # Any: JSON values
    """For a browser on this machine. No script, nothing loaded from anywhere."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(printable(shown))}</td></tr>"
        for name, shown in _lines(facts)
    )
    colour = "#0a7d32" if facts["verdict"] == "accepted" else "#b3261e"
    head = html.escape(f"{str(facts['verdict']).upper()}  {facts['target']}")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>vouchsafe proxy</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:52rem;padding:0 1rem}"
        "th{text-align:left;padding-right:1.5rem;vertical-align:top;font-weight:500;white-space:nowrap}"
        f"h1{{font-size:1.2rem;color:{colour}}}</style><h1>{head}</h1><table>{rows}</table></html>\n"
    )


def _lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:  # Any: JSON values
    found = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            shown = "; ".join(map(str, value)) or "-"
        elif name == "development":
            shown = "yes: nothing here rests on hardware" if value else "no"
        else:
            shown = str(value) if value not in ("", None) else "-"
        found.append((name.replace("_", " "), shown))
    return found


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z") if seconds else ""
