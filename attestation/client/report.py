"""A verdict as a person reads it: the answer first, then what failed with expected and actual, then everything else.

Pure text; colours only when the caller says that a terminal is listening. Values come from the other side's evidence,
so control characters are taken out before anything is printed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from attestation.result import AttestationResult, Check, Status

__all__ = ["Paint", "printable", "render", "render_beside", "render_checks", "render_not_proven", "short"]

WIDTH: Final = 100
_COLOURS: Final = {"pass": "32", "fail": "31", "skip": "33", "bold": "1", "dim": "2"}


class Paint:
    """ANSI colours, or none."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __call__(self, text: str, colour: str) -> str:
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._on else text


def printable(text: str) -> str:
    """*text* without control characters, line feeds and tabs excepted: a peer must not drive this terminal."""
    return "".join(c if c in "\n\t" or (c.isprintable() or c == "\u00a0") else "�" for c in text)


def short(text: str, size: int = 64) -> str:
    """One line, cut in the middle of nowhere but said so."""
    line = printable(text).replace("\n", " ").replace("\t", " ")
    return line if len(line) <= size else f"{line[: size - 1]}…"


def render(result: AttestationResult, *, subject: str, paint: Paint) -> str:
    """The whole table for an attestation result."""
    lines = [_headline(result.verdict, result.development, subject, paint)]
    lines += _summary(result.claims, result.policy[0])
    lines += render_checks(result.checks, paint)
    lines += _claims(result.claims, paint) + render_not_proven(result, paint)
    lines += ["", paint(_anchors(result), "dim")]
    return "\n".join(lines)


def render_not_proven(result: AttestationResult, paint: Paint) -> list[str]:
    """What the verdict does not say, one sentence each."""
    lines = ["", paint("not proven", "bold")] if result.not_proven else []
    for text in result.not_proven:
        lines += textwrap.wrap(
            printable(text), WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


def render_beside(name: str, said: Mapping[str, object], paint: Paint) -> str:
    """What another verifier said (verdict, agrees, detail): whether it differs from ours comes before why."""
    words = {True: paint("agrees", "pass"), False: paint("DISAGREES", "fail"), None: paint("no opinion", "skip")}
    word = words[said["agrees"] if isinstance(said["agrees"], bool) else None]
    lines = ["", f"{paint(name.replace('_', ' '), 'bold')}  {word}: {said['verdict']}"]
    detail = printable(str(said["detail"])).replace("\n", " ")
    return "\n".join(lines + textwrap.wrap(detail, WIDTH, initial_indent="  ", subsequent_indent="  "))


def render_checks(checks: Sequence[Check], paint: Paint) -> list[str]:
    """Failures first and in full, then passes and skips, one line each."""
    failed = [c for c in checks if c.status is Status.FAIL]
    others = [c for c in checks if c.status is not Status.FAIL]
    lines = []
    if failed:
        lines += ["", paint(f"failed ({len(failed)})", "bold")]
    for check in failed:
        lines.append(f"  {paint('fail', 'fail')}  {check.code}: {short(check.reason, 200)}  [{check.id}]")
        for name, value in (("expected", check.expected), ("actual", check.actual)):
            if value:
                lines += textwrap.wrap(
                    f"{name:8} {printable(value)}", WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 17
                )
    passed = sum(c.status is Status.PASS for c in others)
    lines += ["", paint(f"checks: {passed} passed, {len(failed)} failed, {len(others) - passed} skipped", "bold")]
    # What was not looked at stands before the long list of what was.
    others.sort(key=lambda c: c.status is not Status.SKIP)
    lines += [
        f"  {paint(c.status.value, c.status.value)}  {c.id:{_width(others)}}  {short(c.reason, 120)}" for c in others
    ]
    return lines


def _width(checks: Iterable[Check]) -> int:
    return min(max((len(c.id) for c in checks), default=0), 32)


def _headline(verdict: str, development: bool, subject: str, paint: Paint) -> str:
    word = paint(verdict.upper(), "pass" if verdict == "accepted" else "fail")
    mark = paint("  DEVELOPMENT: nothing here rests on hardware", "skip") if development else ""
    return f"{word}  {short(subject, 120)}{mark}"


def _summary(claims: Mapping[str, Any], policy: str) -> list[str]:  # Any: JSON values
    lines = [f"  policy    {short(policy)}"]
    if claims.get("operator"):
        lines.append(f"  operator  {short(str(claims['operator']))}")
    if claims.get("version"):
        lines.append(f"  release   {short(str(claims['version']))}")
    for model in claims.get("models", []):
        lines.append(f"  model     {short(str(model['id']))}  {short(str(model['weights']), 40)}")
    devices = claims.get("gpu", {}).get("devices", [])
    for name in dict.fromkeys(str(d["hwmodel"]) for d in devices):
        number = sum(d["hwmodel"] == name for d in devices)
        lines.append(f"  device    {number} x {short(name)}")
    if "channel" in claims:
        lines.append(f"  channel   proven for this connection, bound to the {short(str(claims['channel']['binding']))}")
    return lines


def _claims(claims: Mapping[str, Any], paint: Paint) -> list[str]:  # Any: JSON values
    if not claims:
        return []
    lines = ["", paint("claims", "bold")]
    for key, value in claims.items():
        if isinstance(value, dict):
            for inner, deep in value.items():
                lines += _claim(f"{key}.{inner}", deep)
        elif key != "models":
            lines += _claim(key, value)
    return lines


def _claim(name: str, value: Any) -> list[str]:  # Any: a JSON value
    if value in ("", [], None):
        return []
    if isinstance(value, dict):
        value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
    if not isinstance(value, list):
        return [f"  {name:20}  {short(str(value), 100)}"]
    rows = [", ".join(f"{k} {v}" for k, v in row.items() if v) if isinstance(row, dict) else str(row) for row in value]
    return [f"  {name if i == 0 else '':20}  {short(row, 100)}" for i, row in enumerate(rows)]


def _anchors(result: AttestationResult) -> str:
    names = [f"{a.name}{'' if a.built_in else ' (named by the policy)'}" for a in result.anchors]
    return f"trust anchors: {', '.join(names)}"
